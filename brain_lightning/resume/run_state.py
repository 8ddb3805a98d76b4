"""The recoverable with the state of a run, besides weights, optimizers and counters."""

from __future__ import annotations

import logging
from os import PathLike

from brain_lightning.checkpoints.state_files import load_state, write_state
from brain_lightning.distributed.communication import (
    by_main_process,
    collectively,
    gather,
    rank,
    world_size,
)
from brain_lightning.phase import Phase

from .process_state import (
    differing,
    full_on_main,
    mean_gradients,
    mean_window,
    unsaved_buffers,
    with_full,
)
from .run_progress import RunProgress
from .saved_state import migrated

logger = logging.getLogger(__name__)

# Name of the recoverable, and key in a Lightning checkpoint file.
KEY = "brain_lightning"


class RunState(RunProgress):
    """The state of a run on all ranks. It is saved with every checkpoint."""

    def save(self, path: str | PathLike[str]) -> None:
        """Saves the states of all ranks to one file. The call is collective.

        Args:
            path: Path of the file.
        """
        states = gather(collectively(lambda: full_on_main(self.state())))

        def write() -> None:
            first, unsaved = states[0]["buffers"], unsaved_buffers(self.brain)
            for state in states:
                state["buffers"] = differing(state["buffers"], first, unsaved)
            write_state({"processes": states}, str(path))

        by_main_process(write)

    def recover(self, path: str | PathLike[str], end_of_epoch: bool) -> None:
        """Recovers the state of this rank. It takes effect in the next epoch.

        The current random state is kept in two cases, as in SpeechBrain: the Brain recovers
        an end of an epoch that it has saved itself, or it recovers within a run.

        Args:
            path: Path of the file.
            end_of_epoch: Whether an epoch had ended.
        """
        if self.drawn or self.phase is not Phase.EPOCH_OVER:
            # Called within a run.
            return
        states = load_state(str(path))["processes"]
        if len(states) != world_size():
            logger.warning(
                "The checkpoint was saved by %d processes, but %d processes run now. Their "
                "random numbers will differ.",
                len(states),
                world_size(),
            )
        own = with_full(states[rank() % len(states)], states[0])
        state = migrated(own, end_of_epoch)
        is_sharded = self.brain._lightning.sharding is not None
        if state["epoch"] is not None and (is_sharded or len(states) != world_size()):
            # If modules are sharded or the number of ranks has changed, each rank continues
            # the accumulation window with the mean gradients.
            state["epoch"]["gradients"] = mean_gradients(states)
            state["window"] = mean_window(states)
        # Only the state of rank 0 contains these values.
        state["beside_weights"] = states[0].get("beside_weights", {})
        if state["trainer"]:
            first = states[0]["trainer"]["callbacks"]
            state["trainer"]["callbacks"] = {**first, **state["trainer"]["callbacks"]}
        is_own = state["saved_by"] == self._saved_by
        is_own = is_own and end_of_epoch and not state["beside_weights"]
        self.resumed = None if is_own else state
        self._resumed_validations = {} if is_own else dict(enumerate(state["validations"]))
