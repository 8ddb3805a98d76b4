"""The metrics of a run: the loss of each stage, and the numbers that the recipe reports."""

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

# The stage of each argument of SpeechBrain's TrainLogger.log_stats, such as valid_stats.
STAGES_OF_STATS = {f"{stage.name.lower()}_stats": stage for stage in Stage}
# Lightning uses these names in file names and as axes, and counts them itself.
LIGHTNINGS_OWN = {"epoch", "step"}
# Compares two values: returns whether the first one is better.
BETTER = {"min": operator.lt, "max": operator.gt}
# For "min", "max" and "last": the value of a metric, and the epoch that reported it.
Record = dict[str, tuple[float, Any]]


class Metrics:
    """Collects metrics for ``monitor=`` and the Trainer's loggers, without recipe changes.

    The recipe passes metrics to ``hparams.train_logger.log_stats`` and to the ``meta`` of
    its checkpoints. Each metric has a name with its stage, ``valid_WER``, and a name without
    it, ``WER``. If several stages report the same metric, the short name is VALID's.

    Args:
        stage: Returns the running stage, which the ``meta`` of a checkpoint does not name.

    Attributes:
        valids: Short names that belong to VALID, because VALID has reported them. If the run
            validates, ``loss`` belongs to VALID from the start.
    """

    def __init__(self, stage: Callable[[], Stage]) -> None:
        self.valids: set[str] = set()
        self._stage = stage
        self._found: dict[Stage, dict[str, float]] = {each: {} for each in Stage}
        self._plain: dict[str, float] = {}

    def watch(self, brain: BrainProtocol, temporary: TemporaryAttributes) -> None:
        """Records the metrics that the recipe reports, until ``temporary`` is restored.

        Args:
            brain: Brain with the train logger and the checkpointer to watch.
            temporary: Records the changes, to undo them later.
        """
        for owner, name, record in (
            (hparam(brain, "train_logger"), "log_stats", self._record_stats),
            (brain.checkpointer, "save_checkpoint", self._record_meta),
            (brain.checkpointer, "save_and_keep_only", self._record_meta),
        ):
            # A method of an object without __dict__ (slots) cannot be overridden.
            if hasattr(owner, name) and hasattr(owner, "__dict__"):
                temporary.override(owner, name, _Recorded(owner, name, record))

    def add(self, stage: Stage, numbers: Any) -> None:
        """Adds the numbers among the reported values.

        Args:
            stage: Stage of the numbers.
            numbers: Values by name. Values that are not numbers are ignored. An argument
                that is not a mapping is ignored too, because recipes may report anything.
        """
        self._found[stage] |= numbers_in(numbers)

    def name_by_set(self, stage: Stage, set_name: str) -> None:
        """Adds the name of the dataset to the metrics of a stage, if there are several.

        Args:
            stage: Stage that has ended.
            set_name: Name of its dataset, the suffix in ``valid_loss_clean`` or
                ``valid_loss_0``.
        """
        found = self._found[stage]
        self._plain |= {f"{staged(stage, name)}_{set_name}": v for name, v in found.items()}
        found.clear()

    def found(self, from_all_ranks: bool = False) -> dict[str, float]:
        """Returns the metrics that were reported since the last call of ``take``.

        Args:
            from_all_ranks: Whether to gather the metrics of all ranks. Then the call is
                collective.

        Returns:
            Numbers by name, with and without their stage.
        """
        valids = self.valids | self._found[Stage.VALID].keys()
        found = {n: v for n, v in self._plain.items() if n not in LIGHTNINGS_OWN}
        for stage, numbers in self._found.items():
            found |= {staged(stage, name): value for name, value in numbers.items()}
            # A metric of TEST never takes a short name: it could be mistaken for VALID's in
            # a later process, in which VALID has not reported it.
            mine = set() if stage is Stage.TEST else numbers.keys() - LIGHTNINGS_OWN
            mine -= set() if stage is Stage.VALID else valids
            found |= {name: numbers[name] for name in mine}
        # Metrics of any rank; the lowest rank takes precedence. Recipes report on rank 0.
        return dict(ChainMap(*gather(found))) if from_all_ranks else found

    def take(self, from_all_ranks: bool = False) -> dict[str, float]:
        """Returns the same metrics as ``found``, and clears them.

        Args:
            from_all_ranks: See ``found``.

        Returns:
            See ``found``.
        """
        found = self.found(from_all_ranks)
        self.valids |= self._found[Stage.VALID].keys()
        for numbers in (*self._found.values(), self._plain):
            numbers.clear()
        return found

    def state(self) -> dict[str, dict[str, float]]:
        """Returns the metrics that were not taken, by stage; the key "" has those without."""
        found = {stage.name: dict(numbers) for stage, numbers in self._found.items()}
        return {**found, "": dict(self._plain)}

    def restore(self, state: Mapping[str, dict[str, float]]) -> None:
        """Restores the metrics of a run.

        Args:
            state: Result of ``state``.
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
    """Updates the best and the last value of each metric.

    Args:
        records: Records by metric name; changed in place.
        numbers: New values by metric name. A value that is not finite is never the best.
        epoch: Number of the epoch.
    """
    epoch = plain_or_none(epoch)
    for name, value in numbers.items():
        best = dict.fromkeys(BETTER if math.isfinite(value) else (), (value, epoch))
        merge_records(records, {name: {**best, "last": (value, epoch)}})


def merge_records(records: dict[str, Record], later: Mapping[str, Record]) -> None:
    """Merges later records into earlier ones, for example when a run is resumed.

    Args:
        records: Earlier records by metric name; changed in place.
        later: Later records. Their last values replace the earlier ones, and their best
            values replace the earlier ones if they are better.
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
    """Returns the arguments of a call by name, in the order of the function's signature.

    Args:
        function: The function.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
    """
    return inspect.signature(function).bind(*args, **kwargs).arguments


def is_of_a_stage(name: str) -> bool:
    """Whether the name of a metric starts with its stage, such as ``valid_WER``.

    Args:
        name: Name from ``Metrics.take``.
    """
    return name.startswith(tuple(staged(stage, "") for stage in Stage))


class _Recorded:
    """Wraps a method and records its arguments. Results and errors do not change."""

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
        """Pickles as the original method, so that an unpickled copy records nothing."""
        return getattr, (self._owner, self._name)


def staged(stage: Stage, name: str) -> str:
    """Returns the name of a metric with its stage, such as ``valid_WER``.

    Args:
        stage: The stage.
        name: Name in the recipe.
    """
    return f"{stage.name.lower()}_{name}"


def leaves(values: Any, within: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of nested dictionaries, with joined names such as ``asr_WER``.

    Args:
        values: Reported values by name. Nothing is yielded if it is not a mapping.
        within: Prefix of each name.

    Yields:
        Pairs of name and value.
    """
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{within}{name}_")
        else:
            yield f"{within}{name}", value


def scalar(value: Any) -> Tensor | None:
    """Returns a number as ``LightningModule.log`` stores it, on the same device.

    Args:
        value: Loss as the recipe returned it.

    Returns:
        A tensor without dimensions, or None if ``value`` is not a number.
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
    """Returns the numbers among the values that a recipe reports.

    Args:
        values: See ``leaves``.
    """
    numbers = {name: _number(value) for name, value in leaves(values)}
    return {name: number for name, number in numbers.items() if number is not None}


def _number(value: Any) -> float | None:
    """Returns a number, or the mean of a list: SpeechBrain's loggers accept one per batch."""
    if isinstance(value, (list, tuple)):
        numbers: list[Any] = [_number(each) for each in value]
        return None if None in numbers or not numbers else sum(numbers) / len(numbers)
    if isinstance(value, Tensor):
        is_number = value.numel() == 1 and not value.is_complex()
    else:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
    return float(value) if is_number else None
