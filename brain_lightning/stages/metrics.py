"""The numbers of a run: each stage's loss, and what a recipe reports in its own words."""

from __future__ import annotations

import inspect
import math
import operator
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from brain_lightning.distributed.communication import gather
from brain_lightning.protocol import BrainProtocol, hparam
from brain_lightning.resume.plain_values import plain_or_none
from brain_lightning.stage import Stage
from brain_lightning.temporary import TemporaryAttributes

# Arguments of SpeechBrain's TrainLogger.log_stats, such as valid_stats, and their stages.
STAGES_OF_STATS = {f"{stage.name.lower()}_stats": stage for stage in Stage}
# Lightning names files and axes by these, and counts them itself.
LIGHTNINGS_OWN = {"epoch", "step"}
# What of two values is the better one.
BETTER = {"min": operator.lt, "max": operator.gt}
# Of a number, by each of ``BETTER`` and by "last": its value, and the epoch that it is of.
Record = dict[str, tuple[float, Any]]


class Metrics:
    """Collects numbers for ``monitor=`` and the Trainer's loggers; the recipe stays as it is.

    A recipe passes them to ``hparams.train_logger.log_stats`` and to the ``meta``
    of its checkpoints. They are named after their stage, ``valid_WER``, and
    without it, ``WER``; where several stages report a name, VALID has it.

    Args:
        stage: Returns the stage that is running: a checkpoint's ``meta`` does not say it.

    Attributes:
        valids: The names that are VALID's, once it has reported them; ``loss`` is from the
            beginning, where the run validates.
    """

    def __init__(self, stage: Callable[[], Stage]) -> None:
        self.valids: set[str] = set()
        self._stage = stage
        self._found: dict[Stage, dict[str, float]] = {each: {} for each in Stage}
        self._plain: dict[str, float] = {}

    def watch(self, brain: BrainProtocol, temporary: TemporaryAttributes) -> None:
        """Records what the recipe reports, until ``temporary`` is restored.

        Args:
            brain: The Brain whose train logger and checkpointer it reports to.
            temporary: Records what is changed.
        """
        for owner, name, record in (
            (hparam(brain, "train_logger"), "log_stats", self._record_stats),
            (brain.checkpointer, "save_checkpoint", self._record_meta),
            (brain.checkpointer, "save_and_keep_only", self._record_meta),
        ):
            # A method of an object with slots cannot be overridden.
            if hasattr(owner, name) and hasattr(owner, "__dict__"):
                temporary.override(owner, name, _Recorded(owner, name, record))

    def add(self, stage: Stage, numbers: Any) -> None:
        """Adds what is a number.

        Args:
            stage: The stage they speak of.
            numbers: Values by name; those that are no number are left out, and so
                is anything but a mapping, for a recipe may report what it likes.
        """
        self._found[stage] |= numbers_in(numbers)

    def name_by_set(self, stage: Stage, set_name: str) -> None:
        """Names what a stage found after its set, where each of several is a stage.

        Args:
            stage: The stage that has ended.
            set_name: Of its set among the others: ``valid_loss_clean``, ``valid_loss_0``.
        """
        found = self._found[stage]
        self._plain |= {f"{staged(stage, name)}_{set_name}": v for name, v in found.items()}
        found.clear()

    def found(self, from_all_ranks: bool = False) -> dict[str, float]:
        """What was found since ``take`` was called last.

        Args:
            from_all_ranks: Whether every process asks at this time.

        Returns:
            Numbers by name, with and without their stage.
        """
        valids = self.valids | self._found[Stage.VALID].keys()
        found = {n: v for n, v in self._plain.items() if n not in LIGHTNINGS_OWN}
        for stage, numbers in self._found.items():
            found |= {staged(stage, name): value for name, value in numbers.items()}
            # TEST's never stand for VALID's, which the next process may not have seen.
            mine = set() if stage is Stage.TEST else numbers.keys() - LIGHTNINGS_OWN
            mine -= set() if stage is Stage.VALID else valids
            found |= {name: numbers[name] for name in mine}
        # What any rank reports, the first one first: recipes report on the main process.
        return dict(ChainMap(*gather(found))) if from_all_ranks else found

    def take(self, from_all_ranks: bool = False) -> dict[str, float]:
        """The same, once.

        Args:
            from_all_ranks: As for ``found``.

        Returns:
            As ``found``.
        """
        found = self.found(from_all_ranks)
        self.valids |= self._found[Stage.VALID].keys()
        for numbers in (*self._found.values(), self._plain):
            numbers.clear()
        return found

    def state(self) -> dict[str, dict[str, float]]:
        """What was found and not taken, by stage, and what is of no stage."""
        found = {stage.name: dict(numbers) for stage, numbers in self._found.items()}
        return {**found, "": dict(self._plain)}

    def restore(self, state: Mapping[str, dict[str, float]]) -> None:
        """Restores what a run had found.

        Args:
            state: From ``state``.
        """
        for stage, numbers in self._found.items():
            numbers |= state[stage.name]
        self._plain |= state[""]

    def _record_stats(self, arguments: Mapping[str, Any]) -> None:
        self._plain |= numbers_in(arguments.get("stats_meta"))
        for name, stage in STAGES_OF_STATS.items():
            self.add(stage, arguments.get(name))

    def _record_meta(self, arguments: Mapping[str, Any]) -> None:
        self.add(self._stage(), arguments.get("meta"))


def record(records: dict[str, Record], numbers: Mapping[str, float], epoch: Any) -> None:
    """Keeps the best value of each number, and its last.

    Args:
        records: What is known, by the number's name.
        numbers: What was found; what is not finite is never the best.
        epoch: The number of the epoch.
    """
    epoch = plain_or_none(epoch)
    for name, value in numbers.items():
        best = dict.fromkeys(BETTER if math.isfinite(value) else (), (value, epoch))
        merge_records(records, {name: {**best, "last": (value, epoch)}})


def merge_records(records: dict[str, Record], later: Mapping[str, Record]) -> None:
    """Adds records, such as those of a run that is resumed.

    Args:
        records: What is known, by the number's name.
        later: Whose last values are later, and whose best ones may be better.
    """
    for name, found in later.items():
        known = records.setdefault(name, {})
        for kind, (value, epoch) in found.items():
            is_better = BETTER.get(kind)
            if kind not in known or is_better is None or is_better(value, known[kind][0]):
                known[kind] = (value, epoch)


def arguments_of(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The arguments of a call by their names, in the order of the function's own.

    Args:
        function: The function.
        args: Its positional arguments.
        kwargs: Its arguments by name.
    """
    return inspect.signature(function).bind(*args, **kwargs).arguments


def is_of_a_stage(name: str) -> bool:
    """Whether a metric is named after its stage, ``valid_WER``.

    Args:
        name: What ``Metrics.take`` calls it.
    """
    return name.startswith(tuple(staged(stage, "") for stage in Stage))


class _Recorded:
    """A method whose arguments are recorded; its result and errors stay as they are."""

    def __init__(
        self, owner: Any, name: str, record: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._owner, self._name = owner, name
        self._method = getattr(owner, name)
        self._record = record

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._record(arguments_of(self._method, args, kwargs))
        return self._method(*args, **kwargs)

    def __reduce__(self) -> Any:
        """Pickles as the method itself: a copy records nothing."""
        return getattr, (self._owner, self._name)


def staged(stage: Stage, name: str) -> str:
    """The name of a number of one stage, ``valid_WER``.

    Args:
        stage: The stage.
        name: What the recipe calls it.
    """
    return f"{stage.name.lower()}_{name}"


def leaves(values: Any, within: str = "") -> Iterator[tuple[str, Any]]:
    """Values by name, those of a dictionary within another one by both names: ``asr_WER``.

    Args:
        values: What a recipe reports; anything but a mapping has none.
        within: Stands before each name.

    Yields:
        Names and values.
    """
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{within}{name}_")
        else:
            yield f"{within}{name}", value


def scalar(value: Any) -> Tensor | None:
    """A number as ``LightningModule.log`` stores it; it stays on its device.

    Args:
        value: What a recipe calls a loss.

    Returns:
        None where it is no number.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            return None
        keeps = value.dtype in (torch.float32, torch.float64)
        return (
            value.detach().reshape(()).to(value.dtype if keeps else torch.get_default_dtype())
        )
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return torch.tensor(float(value)) if is_number else None


def numbers_in(values: Any) -> dict[str, float]:
    """What is a number among the values that a recipe reports.

    Args:
        values: As for ``leaves``.
    """
    numbers = {name: _number(value) for name, value in leaves(values)}
    return {name: number for name, number in numbers.items() if number is not None}


def _number(value: Any) -> float | None:
    """A number; the mean of a list, in which SpeechBrain's loggers expect one per batch."""
    if isinstance(value, (list, tuple)):
        numbers: list[Any] = [_number(each) for each in value]
        return None if None in numbers or not numbers else sum(numbers) / len(numbers)
    if isinstance(value, Tensor):
        is_number = value.numel() == 1 and not value.is_complex()
    else:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
    return float(value) if is_number else None
