"""The stages of an experiment, as ``speechbrain.Stage``."""

from __future__ import annotations

from enum import Enum, auto


class Stage(Enum):
    """The purpose of a batch: training, validation or test. Many hooks get it as an argument.

    A stage equals SpeechBrain's stage of the same name. A recipe that changed its Brain class
    but kept ``if stage == sb.Stage.TRAIN`` would otherwise take the wrong branch.
    """

    TRAIN = auto()
    VALID = auto()
    TEST = auto()

    def __eq__(self, other: object) -> bool:
        return self is other or (_is_speechbrain_stage(other) and str(self) == str(other))

    # Enum hashes by name, as SpeechBrain's does. Equal stages therefore have equal hashes.
    __hash__ = Enum.__hash__


def _is_speechbrain_stage(obj: object) -> bool:
    cls = type(obj)
    return (cls.__module__, cls.__qualname__) == ("speechbrain.core", "Stage")
