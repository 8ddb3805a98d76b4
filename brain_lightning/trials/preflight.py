"""Runs the longest batches of each set before a run, and reports their memory and time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from brain_lightning.batch_content import described, shortened
from brain_lightning.compat.versions import add_note
from brain_lightning.distributed.communication import gather
from brain_lightning.errors import PreflightError, UnsupportedError
from brain_lightning.lightning_internals.trainer_callbacks import (
    TunerExitException,
    callbacks_of,
)
from brain_lightning.stage import Stage
from brain_lightning.stages.base import RunStage
from brain_lightning.stages.run import Run
from brain_lightning.step.out_of_memory import in_gib, is_out_of_memory

from .longest import Examples, longest_batches
from .memory import capacity, current_memory, measured_usage
from .trial import Trial

logger = logging.getLogger(__name__)

REMEDY = (
    "Make batches smaller (batch_size, max_batch_length) and set grad_accumulation_factor, "
    "remove the longest examples, or use --precision=bf16."
)


@dataclass(frozen=True)
class Tried:
    """Measurements of one of the longest batches.

    Attributes:
        set_name: Name of the stage, and of the set if there are several sets.
        chosen: Description of how the batch was found.
        examples: Number of examples, or None if it is not known.
        longest: Length of the longest example, or None if it is not known.
        peak: Peak memory in bytes (see ``memory.Usage``), the maximum over all ranks.
        seconds: Duration of the last step.
    """

    set_name: str
    chosen: str
    examples: int | None
    longest: float | None
    peak: int
    seconds: float


class PreflightAlone(Callback):
    """Makes a run try its longest batches and end, without training or evaluation.

    ``brain-lightning preflight`` uses this callback.

    Attributes:
        tried: Measurements of all runs.
        is_trying: Whether a preflight has started and not succeeded. The preflight of an
            evaluation is only counted if no other preflight has run, because the evaluation
            may depend on results of training.
    """

    def __init__(self) -> None:
        self.tried: list[Tried] = []
        self.is_trying = False

    def ignores(self, error: BaseException) -> bool:
        """Returns whether an error does not end the command: only a warning is logged.

        After a successful preflight, the script may need results of a training.

        Args:
            error: The error that the script raised.
        """
        has_failed = self.is_trying or isinstance(error, PreflightError)
        return bool(self.tried) and not has_failed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets an evaluation start without a checkpoint to recover or to average."""
        run: Any = pl_module.run
        run.temporary.wrap(run.test, "recover_best", _if_possible)


def preflight_ignores(error: BaseException, trainer: Trainer) -> bool:
    """Returns whether ``brain-lightning preflight`` only warns about an error.

    Args:
        error: The error that ended the run.
        trainer: The Trainer of the run.
    """
    alone = (each for each in callbacks_of(trainer) if isinstance(each, PreflightAlone))
    return any(each.ignores(error) for each in alone)


def preflight_if_asked(run: Run, trainer: Trainer, by_own_fit: bool = False) -> None:
    """Runs a preflight if ``--preflight`` or ``brain-lightning preflight`` requests it.

    Only ``brain-lightning preflight`` tries the batches of an evaluation. With
    ``--preflight`` an evaluation runs after training, where a preflight is too late.

    Args:
        run: The run, with its DataLoaders, before its first stage.
        trainer: The Trainer that runs it.
        by_own_fit: Whether an overridden ``fit`` of the recipe provides the DataLoaders later.

    Raises:
        PreflightError: A batch does not fit into memory.
        UnsupportedError: The longest batches cannot be determined.
        TunerExitException: ``brain-lightning preflight`` has finished. Lightning ends the run.
    """
    alone = [each for each in callbacks_of(trainer) if isinstance(each, PreflightAlone)]
    fits = trainer.state.fn is TrainerFn.FITTING
    if not alone and not (fits and run.brain._lightning.preflight):
        return
    for callback in alone:
        callback.is_trying = fits or not callback.tried
    if by_own_fit:
        raise UnsupportedError(
            f"a preflight is not supported for {type(run.brain).__name__}, because its "
            "overridden fit creates or selects the DataLoaders. Remove --preflight."
        )
    if fits:
        _make_validation_loaders(run, trainer)
    tried = preflight(run, trainer, (run.train, run.valid) if fits else (run.test,))
    if trainer.is_global_zero and not getattr(run.brain, "rank", 0):
        print(table(tried, run.brain.device), flush=True)  # noqa: T201
    for callback in alone:
        callback.tried += tried
        callback.is_trying = False
    if alone:
        raise TunerExitException


def _make_validation_loaders(run: Run, trainer: Trainer) -> None:
    """Creates the validation DataLoaders, which Lightning may create only in a later epoch."""
    if trainer.enable_validation and not run.valid.loaders:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        trainer.training = True


def preflight(run: Run, trainer: Trainer, stages: Sequence[RunStage]) -> list[Tried]:
    """Runs the longest batches of each set in a trial.

    Each batch of TRAIN makes two optimizer steps. Batches of VALID and TEST are evaluated.

    Args:
        run: The run, before its first stage.
        trainer: The Trainer that runs it.
        stages: Stages whose DataLoaders are tried.

    Returns:
        Measurements of each batch.

    Raises:
        PreflightError: A batch does not fit into memory.
        UnsupportedError: The longest batches of a DataLoader cannot be determined.
    """
    sets = [
        _Set(stage, name, wrapped.loader)
        for stage in stages
        for name, wrapped in zip(stage.set_names, stage.loaders, strict=False)
    ]
    device = run.brain.device
    before = current_memory(device)
    with Trial(run, trainer, *(each.loader for each in sets)) as trial:
        # Memory of the snapshot, which the run itself does not need.
        copies = max(0, current_memory(device) - before)
        tried = [found for each in sets for found in _try(trial, each, device)]
    return [replace(each, peak=each.peak - copies) for each in tried]


def table(tried: Sequence[Tried], device: str) -> str:
    """Formats the measurements as a table.

    Args:
        tried: Measurements from ``preflight``.
        device: Device of the Brain.
    """
    total = capacity(device)
    head = ("preflight", "chosen by", "examples", "longest", "peak memory", "seconds")
    rows = [
        (
            each.set_name,
            each.chosen,
            "-" if each.examples is None else str(each.examples),
            "-" if each.longest is None else f"{each.longest:g}",
            in_gib(each.peak) + (f" ({each.peak / total:.0%})" if total else ""),
            f"{each.seconds:.2f}",
        )
        for each in tried
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
    of_what = (
        "the process" if total is None else f"tensors on {device}, which has {in_gib(total)}"
    )
    return "\n".join([*lines, f"The peak memory is the memory of {of_what}."])


@dataclass(frozen=True)
class _Set:
    stage: RunStage
    name: str
    loader: Any

    @property
    def title(self) -> str:
        return f"{self.stage.kind.name} {self.name}".rstrip()


def _try(trial: Trial, data: _Set, device: str) -> Iterator[Tried]:
    kind = data.stage.kind
    # In TEST a rank may run alone, so there are no collectives.
    together = gather if kind is not Stage.TEST else _alone
    with _explained(data.title):
        longest = longest_batches(data.loader)
        steps = _start(trial, data)
        batches = islice(trial.batches(longest.loader), longest.count)
    batch, examples = None, None
    for number in range(max(together(longest.count))):
        if number < len(longest.examples):
            examples = longest.examples[number]
        with _explained(data.title, examples):
            # If another rank has more batches, the last batch is repeated for its collectives.
            batch = next(batches, batch)
        if batch is None:
            return
        with _explained(data.title, examples, batch):
            peak, seconds = _measured(steps, batch, device)
        yield Tried(
            data.title,
            longest.chosen,
            len(examples.names) if examples else None,
            max(examples.lengths, default=None) if examples else None,
            max(together(peak)),
            seconds,
        )


def _start(trial: Trial, data: _Set) -> list[Callable[[Any], float]]:
    """Starts the stage of a set, and returns the steps to run with each batch.

    In TRAIN the steps continue until peak memory is reached. The first update creates the
    state of the optimizers. In an accumulation window of several batches, gradients of
    previous batches are in memory.
    """
    if data.stage.kind is not Stage.TRAIN:
        trial.start_evaluation(data.stage, data.name)
        return [trial.evaluate]
    brain = data.stage.brain
    trial.start()
    window = min(brain.grad_accumulation_factor, 2)
    brain.grad_accumulation_factor = window
    # The first step ends an accumulation window, and the last step ends the next one.
    brain.step = window - 1
    return [trial.fit] * (window + 1)


def _if_possible(recover: Callable[[], None]) -> None:
    try:
        recover()
    except Exception as error:  # noqa: BLE001  a recipe may raise any error
        message = "on_evaluate_start failed, so TEST is tried without its effects: %s: %s"
        logger.info(message, type(error).__name__, error)


def _alone(value: Any) -> list[Any]:
    """Returns the result of ``gather`` in a single process."""
    return [value]


def _measured(
    steps: Sequence[Callable[[Any], float]], batch: Any, device: str
) -> tuple[int, float]:
    """Returns the peak memory of all steps, and the duration of the last step in seconds."""
    usages = []
    for step in steps:
        with measured_usage(device) as usage:
            step(batch)
        usages.append(usage)
    return max(usage.peak for usage in usages), usages[-1].seconds


@contextmanager
def _explained(
    title: str, examples: Examples | None = None, batch: Any = None
) -> Iterator[None]:
    """Adds the set and the batch to errors that are raised within."""
    try:
        yield
    except Exception as error:
        what = ", ".join([f"in {title}", *_of_examples(examples), *described(batch)])
        if is_out_of_memory(error):
            reason = str(error).rstrip(". ")
            raise PreflightError(
                f"preflight: out of memory with the longest batch {what}: {reason}. {REMEDY}"
            ) from error
        add_note(error, f"brain_lightning: in the preflight, {what}")
        raise


def _of_examples(examples: Examples | None) -> Iterator[str]:
    if examples is not None:
        yield f"with ids {shortened(examples.names)}"
        yield f"lengths {shortened([round(each, 4) for each in examples.lengths])}"
