"""The DataLoaders and samplers that a Brain creates for a dataset.

``dataloaders`` creates loaders, chooses their samplers, and has the loader whose position a
Checkpointer saves. ``samplers`` has SpeechBrain's two samplers: one that shuffles reproducibly
by epoch, and one that distributes another sampler over processes. ``several_loaders`` handles
several sets in ``fit`` and ``evaluate``. ``batch_size`` reads and changes the batch size of a
loader. ``examples`` counts the examples in batches, to resume with batches of another size.
"""
