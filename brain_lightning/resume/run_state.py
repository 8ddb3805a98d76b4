"""What a run needs to resume exactly, beyond weights, optimizers and counters."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from itertools import chain
from os import PathLike
from typing import Any

from torch.nn import Parameter

from brain_lightning.checkpoints.state_files import load_state, write_state
from brain_lightning.distributed.communication import gather, if_main_process, rank, world_size
from brain_lightning.protocol import BrainProtocol
from brain_lightning.step.optimizers import all_optimizers, parameters_of

from .data_position import DataPosition
from .epoch_statistics import EpochStatistics
from .plain_values import State
from .random_state import random_state, set_random_state

logger = logging.getLogger(__name__)

# The name of the recoverable, and the key in a Lightning file.
KEY = "brain_lightning"


class RunState:
    """The state of a run of a Brain, saved with every checkpoint.

    Holds, for each process, the random states, the position in the data, the gradients
    of an accumulation window that is not full, and the statistics of the epoch. What is
    recovered takes effect when the next epoch begins, because the hooks before its first
    batch are called again.

    Args:
        brain: The Brain that runs.

    Attributes:
        position: In the training data.
        of_trainer: Returns the state of the Trainer.
        epochs: The number of epochs that have begun.
        drawn: The number of epochs that the epoch counter has yielded in this run.
        validations: The positions in the validation data.
        validated: Whether there was a validation after the last batch.
        resumed: What was recovered and has not taken effect yet.
        explicit: Whether it comes from a file that the user named: then its epochs are
            over, even if the counter does not remember them.
    """

    def __init__(self, brain: BrainProtocol) -> None:
        self.brain = brain
        self._saved_by = uuid.uuid4().hex
        self.begin()

    def begin(self) -> None:
        """Begins a run."""
        self.position = DataPosition()
        self.of_trainer: Callable[[], State] = dict
        self.epochs = 0
        self.validated = False
        self.resumed: State | None = None
        self._resumed_validations: dict[int, State] = {}
        self.explicit = False
        self.drawn = 0
        self.validations: list[DataPosition] = []
        self._statistics = EpochStatistics(self.brain)
        self._stage_random: State = {}
        self._in_training = False
        self._in_pass = False
        self._in_batch = False
        # Whether the current batch has its gradients, or its update, already.
        self._batch_used = False
        self._batch_random: State | None = None
        # The state of the epoch before a validation, until the validation is over.
        self._before_validation: State | None = None

    # ----------------------------------------------------------------- moments

    def begin_epoch(self, loader: Any) -> None:
        """Called before ``on_stage_start(TRAIN)``.

        Args:
            loader: What ``fit`` was given.
        """
        self.epochs += 1
        self.drawn += 1
        resumed = self.resumed
        if resumed is not None:
            epoch = resumed["epoch"]
            position = resumed["between"] if epoch is None else epoch["position"]
            self.position.resume(position, loader)
            set_random_state(resumed["random"] if epoch is None else epoch["stage_random"])
        self._stage_random = random_state()
        self._statistics = EpochStatistics(self.brain)
        self.validated = False
        self._in_training = True
        self._in_pass = False

    def batches(self, loader: Any) -> Iterator[Any]:
        """The batches of the epoch that has begun, from its position on.

        Args:
            loader: What ``fit`` was given.

        Yields:
            The batches.
        """
        self._statistics.begin()
        self._in_pass = True
        epoch, self.resumed = self._epoch_to_resume(), None
        if epoch is not None:
            self._resume_epoch(epoch)
        yield from self.position.batches(loader)

    def begin_batch(self) -> None:
        """Called before a batch is fitted."""
        self._in_batch, self._batch_used = True, False
        if self.position.records_fetches:
            self._batch_random = random_state()

    def use_batch(self) -> None:
        """Called once a batch has its gradients: to fit it again would count them twice."""
        self._batch_used = True

    def end_batch(self) -> None:
        """Called after a batch was fitted."""
        self._in_batch = False
        self.position.fitted += 1
        self.validated = False

    @property
    def resumed_batches(self) -> int | None:
        """The number of batches before those of a resumed epoch; None for a new epoch."""
        epoch = self._epoch_to_resume()
        return None if epoch is None else epoch["position"]["batches"]

    def _epoch_to_resume(self) -> State | None:
        return None if self.resumed is None else self.resumed["epoch"]

    def _resume_epoch(self, epoch: State) -> None:
        brain = self.brain
        brain.step, brain.avg_train_loss = epoch["step"], epoch["avg_train_loss"]
        brain.nonfinite_count = epoch["nonfinite_count"]
        self.validated = epoch["validated"]
        if epoch["gathered"] is not None:
            self._statistics.restore(epoch["gathered"])
        for index, parameter in enumerate(_parameters(brain)):
            gradient = epoch["gradients"].get(index)
            parameter.grad = None if gradient is None else gradient.to(parameter.device)

    def end_training(self) -> None:
        """Called before ``on_stage_end(TRAIN)``."""
        self._before_validation = self._epoch()
        self._in_training = False

    def begin_validation(self) -> None:
        """Called before ``on_stage_start(VALID)``, which may be in the middle of an epoch."""
        if self._in_training:
            self._before_validation = self._epoch()

    def end_validation(self) -> None:
        """Called after ``on_stage_end(VALID)``."""
        self.validated = True
        if self._in_training:
            self._before_validation = None

    def end_epoch(self) -> None:
        """Called when training and validation of an epoch are over."""
        self._before_validation = None

    def validation_batches(self, loader: Any, index: int) -> Iterator[Any]:
        """The batches of a validation, whose loader is resumed as well.

        Args:
            loader: What ``fit`` was given.
            index: The number of the loader, where there are several.

        Returns:
            The batches.
        """
        while len(self.validations) <= index:
            self.validations.append(DataPosition())
        if index in self._resumed_validations:
            self.validations[index].resume(self._resumed_validations.pop(index), loader)
        return self.validations[index].batches(loader)

    def counts(self) -> State:
        """``step`` and ``avg_train_loss`` of the epoch, which a validation overwrites."""
        epoch = self._before_validation or vars(self.brain)
        return {name: epoch[name] for name in ("step", "avg_train_loss")}

    @property
    def is_between_epochs(self) -> bool:
        """Whether the last epoch is over, with its validation."""
        return not self._in_training and self._before_validation is None

    # ------------------------------------------------------------------ saving

    def state(self) -> State:
        """The state of this process."""
        return {
            "saved_by": self._saved_by,
            "random": random_state(),
            "epoch": self._before_validation or (self._epoch() if self._in_training else None),
            "epochs": self.epochs,
            "drawn": self.drawn,
            "validations": [each.state_between_passes() for each in self.validations],
            "between": self.position.state_between_passes(),
            "trainer": self.of_trainer(),
        }

    def _epoch(self) -> State:
        if not self._in_pass:
            return self._epoch_to_begin()
        brain, parameters = self.brain, enumerate(_parameters(self.brain))
        # A batch in which something failed is fitted again, unless its gradients were used.
        again = self._in_batch and not self._batch_used
        fitted = self.position.fitted + (self._in_batch and not again)
        after_fetch = self._batch_random if again else random_state()
        return {
            "stage_random": self._stage_random,
            "position": self.position.state(fitted, after_fetch),
            "step": brain.step - again,
            "avg_train_loss": brain.avg_train_loss,
            "nonfinite_count": brain.nonfinite_count,
            "validated": self.validated,
            "gathered": self._statistics.state(),
            "gradients": {i: p.grad.cpu() for i, p in parameters if p.grad is not None},
        }

    def _epoch_to_begin(self) -> State:
        """The state of an epoch whose ``on_stage_start`` is not over: it saves, or fails."""
        epoch, resumed = self._epoch_to_resume(), self.resumed
        if epoch is not None:
            return epoch
        between = resumed["between"] if resumed else self.position.state_between_passes()
        return {
            "stage_random": self._stage_random,
            "position": {**between, "batches": 0},
            "step": 0,
            "avg_train_loss": 0.0,
            "nonfinite_count": 0,
            "validated": True,
            "gathered": None,
            "gradients": {},
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Saves the states of all processes.

        Args:
            path: The file.
        """
        states = gather(self.state())
        if if_main_process():
            write_state({"processes": states}, str(path))

    def recover(self, path: str | PathLike[str], end_of_epoch: bool) -> None:
        """Recovers what the next epoch needs.

        A Brain that recovers the end of an epoch that it saved itself keeps its current
        random state, as SpeechBrain's does. One that recovers within a run keeps it too.

        Args:
            path: The file.
            end_of_epoch: Whether an epoch had ended.
        """
        if self._stage_random:
            # Within an epoch.
            return
        states = load_state(str(path))["processes"]
        if len(states) != world_size():
            logger.warning(
                "The checkpoint was saved by %d processes, and there are %d now: what they "
                "draw at random differs.",
                len(states),
                world_size(),
            )
        state = states[rank() % len(states)]
        if end_of_epoch:
            state["epoch"] = None
        is_own = end_of_epoch and state["saved_by"] == self._saved_by
        self.resumed = None if is_own else state
        self._resumed_validations = {} if is_own else dict(enumerate(state["validations"]))


def run_state(brain: BrainProtocol) -> RunState:
    """The state of a run that begins, a recoverable of the Brain's Checkpointer.

    Args:
        brain: The Brain. It must not be within another run, whose state is to be saved.

    Returns:
        The object of the Brain's earlier runs, where it has one, begun again.
    """
    checkpointer = brain.checkpointer
    known = getattr(checkpointer, "recoverables", {}).get(KEY)
    if isinstance(known, RunState) and known.brain is brain:
        known.begin()
        return known
    new = RunState(brain)
    if hasattr(checkpointer, "add_recoverable"):
        hooks = (RunState.recover, RunState.save)
        checkpointer.add_recoverable(KEY, new, *hooks, optional_load=True)
    return new


def _parameters(brain: BrainProtocol) -> list[Parameter]:
    """The parameters of the modules and of the optimizers, each once."""
    optimized = map(parameters_of, all_optimizers(brain).values())
    return list(dict.fromkeys(chain(brain.modules.parameters(), *optimized)))
