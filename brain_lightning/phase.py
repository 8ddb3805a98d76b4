"""Where a run is: what is done of its epoch, and what comes next."""

from __future__ import annotations

from enum import Enum, auto


class Phase(Enum):
    """What is done of the current epoch; whoever saves reads it.

    A hook of the Brain that is running counts as done for what it saves itself, and is
    called again where it fails.

    Attributes:
        EPOCH_OVER: The epoch, callbacks included; also before the first.
        STARTING: The epoch counter has yielded its number; hooks hear of it.
        FETCHED: All that comes before the next batch, which is to be fitted.
        BATCH_OVER: A batch, and every callback has heard of it. The next may be fetched, and
            a validation be due.
        FITTING: Nothing of a batch that counts: its forward and backward pass, or a part
            of its update.
        STEPPED: The update of a batch; ``on_fit_batch_end`` runs.
        FITTED: A batch; callbacks hear of it.
        VALIDATED: A validation in the middle of training; callbacks hear of it.
        TRAIN_OVER: Training, with ``on_stage_end(TRAIN)``.
        VALIDATING: A part of a validation, which begins again when it is resumed.
        VALID_OVER: The last validation, with ``on_stage_end(VALID)``; callbacks hear of it
            and of the end of the epoch.
    """

    EPOCH_OVER = auto()
    STARTING = auto()
    FETCHED = auto()
    BATCH_OVER = auto()
    FITTING = auto()
    STEPPED = auto()
    FITTED = auto()
    VALIDATED = auto()
    TRAIN_OVER = auto()
    VALIDATING = auto()
    VALID_OVER = auto()
