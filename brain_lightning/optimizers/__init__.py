"""The optimizers of a Brain, what they train, and one optimizer that combines them.

``active`` finds the optimizers of a Brain and those that step. ``group`` has the
``OptimizerGroup``, which stands for all of them in Lightning. ``initial_groups`` saves and
restores parameter groups that change during training. ``module_attributes`` saves and restores
which parameters are frozen or unfrozen during a run.
"""
