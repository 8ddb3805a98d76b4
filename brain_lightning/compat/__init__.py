"""What differs between versions of other packages, and SpeechBrain's classes.

``versions`` is the only file that compares versions, and warns of a Lightning that is not
tested. ``speechbrain`` is the only file that knows SpeechBrain's classes, which it looks up
where a script has loaded them and never imports.
"""
