"""Brain: the class that recipes subclass.

``base`` has the constructor and the attributes, ``fit`` has ``fit`` and ``evaluate``, and
``brain`` has the hooks. ``own_fit`` runs a ``fit`` that a recipe overrides.
``own_trainer`` creates the Trainer for ``fit`` and ``evaluate``. ``patch`` makes SpeechBrain's
own Brain run on a Trainer. ``settings`` makes run options readable as attributes of a Brain.
"""

from .brain import Brain

__all__ = ["Brain"]
