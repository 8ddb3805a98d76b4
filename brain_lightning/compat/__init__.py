"""Differences between versions of other packages, and access to SpeechBrain's classes.

Only ``versions`` compares versions. It also warns about an untested version of Lightning. Only
``speechbrain`` knows SpeechBrain's classes. It never imports SpeechBrain, but looks classes up
if the script has loaded them. ``load_hooks`` adapts load hooks of SpeechBrain 0.5.
``dynamic_batches`` knows the internals of DynamicBatchSampler.
"""
