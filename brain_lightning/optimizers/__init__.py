"""The optimizers of a Brain: which there are, what they train, and all of them as one.

``active`` says which optimizers there are and which step, ``group`` has the ``OptimizerGroup``
that is all of them in Lightning, ``initial_groups`` parameter groups that change,
``trained_parts`` what is frozen and unfrozen.
"""
