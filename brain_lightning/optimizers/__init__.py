"""The optimizers of a Brain: which exist, what they train, and all of them as one.

``active`` finds the optimizers of a Brain and those that step. ``group`` has the
``OptimizerGroup``, which stands for all of them in Lightning. ``initial_groups`` saves and
restores parameter groups that change during training. ``trained_parts`` saves and restores
what is frozen or unfrozen during a run.
"""
