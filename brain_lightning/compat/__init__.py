"""Versions of other packages; SpeechBrain's classes, looked up and never imported.

``versions`` is the only file that compares versions, and warns of a Lightning that is not
tested. ``speechbrain`` is the only file that knows SpeechBrain's classes, which it looks up
where a script has loaded them and never imports; ``dynamic_batches`` knows what its
DynamicBatchSampler looks like inside.
"""
