"""DataLoaders and samplers as a Brain makes them from a dataset.

``dataloaders`` makes loaders, chooses their samplers, and has the loader whose position a
Checkpointer saves. ``samplers`` has SpeechBrain's two: one that shuffles reproducibly by
epoch, and one that shards what another sampler yields among processes. ``several_loaders``
has what ``fit`` and ``evaluate`` do with several sets. ``examples`` counts the examples in
batches, to find a position where batches have another size by now.
"""
