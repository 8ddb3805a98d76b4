"""One batch becomes one update: precision, gradients, optimizers, compiled modules."""
