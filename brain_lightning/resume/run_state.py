"""What a run needs to resume exactly, beyond weights, optimizers and counters."""

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

from .process_state import differing, mean_gradients, mean_window, whole_in_first, with_whole
from .run_progress import RunProgress
from .saved_state import migrated

logger = logging.getLogger(__name__)

# The name of the recoverable, and the key in a Lightning file.
KEY = "brain_lightning"


class RunState(RunProgress):
    """The state of a run of a Brain, of each process, saved with every checkpoint."""

    def save(self, path: str | PathLike[str]) -> None:
        """Saves the states of all processes.

        Args:
            path: The file.
        """
        states = gather(collectively(lambda: whole_in_first(self.state())))

        def write() -> None:
            first = states[0]["buffers"]
            for state in states:
                state["buffers"] = differing(state["buffers"], first)
            write_state({"processes": states}, str(path))

        by_main_process(write)

    def recover(self, path: str | PathLike[str], end_of_epoch: bool) -> None:
        """Recovers what the next epoch needs.

        A Brain that recovers the end of an epoch that it saved itself keeps its current
        random state, as SpeechBrain's does. One that recovers within a run keeps it too.

        Args:
            path: The file.
            end_of_epoch: Whether an epoch had ended.
        """
        if self.drawn or self.phase is not Phase.EPOCH_OVER:
            # Within the run.
            return
        states = load_state(str(path))["processes"]
        if len(states) != world_size():
            logger.warning(
                "The checkpoint was saved by %d processes, and there are %d now: what they "
                "draw at random differs.",
                len(states),
                world_size(),
            )
        own = with_whole(states[rank() % len(states)], states[0])
        state = migrated(own, end_of_epoch)
        is_sharded = self.brain._lightning.sharding is not None
        if state["epoch"] is not None and (is_sharded or len(states) != world_size()):
            # Of a window: here all processes have the same gradients, or other batches.
            state["epoch"]["gradients"] = mean_gradients(states)
            state["window"] = mean_window(states)
        # The main process has them.
        state["beside_weights"] = states[0].get("beside_weights", {})
        if state["trainer"]:
            first = states[0]["trainer"]["callbacks"]
            state["trainer"]["callbacks"] = {**first, **state["trainer"]["callbacks"]}
        is_own = state["saved_by"] == self._saved_by
        is_own = is_own and end_of_epoch and not state["beside_weights"]
        self.resumed = None if is_own else state
        self._resumed_validations = {} if is_own else dict(enumerate(state["validations"]))
