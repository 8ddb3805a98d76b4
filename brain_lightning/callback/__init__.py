"""BrainCallback: Trainer and Brain reconciled, refused, restored."""
