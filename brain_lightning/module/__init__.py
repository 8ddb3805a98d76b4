"""The LightningModule that is generated for a Brain.

``to_lightning`` generates the class. ``brain_module`` is the base class. ``automatic`` and
``manual`` are its two subclasses: either Lightning steps the optimizers, or the Brain does.
``checkpoint_file`` saves and recovers a Brain in a ``.ckpt`` file. ``named_checkpoint``
recovers a checkpoint directory that the user names.
"""
