"""The LightningModule that is generated for a Brain.

``to_lightning`` generates the class; ``brain_module`` is what all of them share, and
``automatic`` and ``manual`` are the two ways to fit a batch: Lightning steps the optimizers,
or the Brain does. ``checkpoint_file`` is what a ``.ckpt`` holds of a Brain,
``named_checkpoint`` a directory that a user names instead.
"""
