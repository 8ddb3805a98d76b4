"""The phase of an epoch: which steps are complete, and which step comes next."""

from __future__ import annotations

from enum import Enum, auto


class Phase(Enum):
    """The steps of the current epoch that are complete. Everything that saves a run reads it.

    While a hook of the Brain runs, a save in the hook counts the hook as done. If the hook
    fails, it is called again when the run is resumed.

    Attributes:
        EPOCH_OVER: The epoch is complete, including callbacks. Also set before the first
            epoch.
        STARTING: The epoch counter has yielded the number of the epoch. Hooks are called.
        FETCHED: Everything before the next batch is done. The batch is about to be fitted.
        BATCH_OVER: A batch is complete and all callbacks were called. The next batch may
            be fetched, and a validation may be due.
        FITTING: A batch is in its forward pass, backward pass or optimizer step. Nothing of
            the batch counts as done.
        STEPPED: The optimizer step of a batch is done. ``on_fit_batch_end`` is called.
        FITTED: A batch is fitted. Callbacks are called.
        VALIDATED: A validation within the epoch is done. Callbacks are called.
        TRAIN_OVER: Training is done, including ``on_stage_end(TRAIN)``.
        VALIDATING: A validation is running. It restarts when the run is resumed.
        VALID_OVER: The last validation is done, including ``on_stage_end(VALID)``. Callbacks
            are called for the validation and for the end of the epoch.
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
