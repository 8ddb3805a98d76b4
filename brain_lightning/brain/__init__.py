"""Brain: what recipes subclass.

``base`` is its constructor and its attributes, ``fit`` its ``fit`` and ``evaluate``, and
``brain`` its hooks. ``own_fit`` runs a ``fit`` that a recipe has written itself.
``own_trainer`` is the Trainer that ``fit`` and ``evaluate`` make, and ``patch`` runs
SpeechBrain's own Brain on one, too.
"""

from .brain import Brain

__all__ = ["Brain"]
