"""The stages of an experiment, as ``speechbrain.Stage``."""

from __future__ import annotations

from enum import Enum, auto


class Stage(Enum):
    """What a batch is used for; an argument of every hook that depends on it.

    Equal to SpeechBrain's stage of the same name: a recipe that changed its Brain and
    kept ``if stage == sb.Stage.TRAIN`` would otherwise take the wrong branch.
    """

    TRAIN = auto()
    VALID = auto()
    TEST = auto()

    def __eq__(self, other: object) -> bool:
        return self is other or (_is_speechbrain_stage(other) and str(self) == str(other))

    # Enum hashes by name, SpeechBrain's too: equal stages have equal hashes.
    __hash__ = Enum.__hash__


def _is_speechbrain_stage(obj: object) -> bool:
    cls = type(obj)
    return (cls.__module__, cls.__qualname__) == ("speechbrain.core", "Stage")
