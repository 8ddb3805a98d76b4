"""The longest batches of each set, tried before a run: do they fit, and what do they take?"""

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
from .memory import capacity, held, measured_usage
from .trial import Trial

logger = logging.getLogger(__name__)

REMEDY = (
    "Make batches smaller (batch_size, max_batch_length) and set grad_accumulation_factor, "
    "leave out the longest examples, or use --precision=bf16"
)


@dataclass(frozen=True)
class Tried:
    """What one of the longest batches takes.

    Attributes:
        set_name: The stage, and the name of the set where there are several.
        chosen: By what the batch was found.
        examples: How many are in it; None where it is not known.
        longest: The length of its longest example; None where it is not known.
        peak: Bytes, see ``memory.Usage``; the most of all processes.
        seconds: Of the last of its steps.
    """

    set_name: str
    chosen: str
    examples: int | None
    longest: float | None
    peak: int
    seconds: float


class PreflightAlone(Callback):
    """Has a run try its longest batches and end, without training or an evaluation.

    It is that of ``brain-lightning preflight``.

    Attributes:
        tried: What was tried, over all runs.
        is_trying: Whether a preflight has begun and not succeeded; that of an evaluation
            counts where nothing was tried before, for it may need what training leaves.
    """

    def __init__(self) -> None:
        self.tried: list[Tried] = []
        self.is_trying = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets an evaluation begin where there is no checkpoint to recover or to average."""
        run: Any = pl_module.run
        run.temporary.wrap(run.test, "recover_best", _if_possible)


def preflight_if_asked(run: Run, trainer: Trainer, by_own_fit: bool = False) -> None:
    """Tries the longest batches of a fit, or of an evaluation, if that is asked for.

    An evaluation is tried by ``brain-lightning preflight`` alone: of others the training is
    over.

    Args:
        run: The run, its loaders known, before its first stage.
        trainer: The Trainer that runs it.
        by_own_fit: Whether the recipe's own ``fit`` brings its loaders later.

    Raises:
        PreflightError: There is no memory for a batch.
        UnsupportedError: The longest batches cannot be known.
        TunerExitException: Nothing more is asked for; Lightning ends the run.
    """
    alone = [each for each in callbacks_of(trainer) if isinstance(each, PreflightAlone)]
    fits = trainer.state.fn is TrainerFn.FITTING
    if not alone and not (fits and run.brain._lightning.preflight):
        return
    for callback in alone:
        callback.is_trying = fits or not callback.tried
    if by_own_fit:
        raise UnsupportedError(
            f"a preflight cannot know the batches of {type(run.brain).__name__}: its own fit "
            "makes or chooses the loaders. Leave out --preflight"
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
    """Lightning makes them later, where it does not validate after the first epoch."""
    if trainer.enable_validation and not run.valid.loaders:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        trainer.training = True


def preflight(run: Run, trainer: Trainer, stages: Sequence[RunStage]) -> list[Tried]:
    """Runs the longest batches of each set on a snapshot of the run.

    Those of TRAIN make two updates each, those of VALID and TEST are evaluated.

    Args:
        run: The run, before its first stage.
        trainer: The Trainer that runs it.
        stages: Those whose loaders are tried.

    Returns:
        What each batch takes.

    Raises:
        PreflightError: There is no memory for one.
        UnsupportedError: The longest batches of a loader cannot be known.
    """
    sets = [
        _Set(stage, name, wrapped.loader)
        for stage in stages
        for name, wrapped in zip(stage.set_names, stage.loaders, strict=False)
    ]
    device = run.brain.device
    before = held(device)
    with Trial(run, trainer, *(each.loader for each in sets)) as trial:
        # The copies of the snapshot, which is on the CPU: the run will not have them.
        copies = max(0, held(device) - before)
        tried = [found for each in sets for found in _try(trial, each, device)]
    return [replace(each, peak=each.peak - copies) for each in tried]


def table(tried: Sequence[Tried], device: str) -> str:
    """What was tried, as lines of text.

    Args:
        tried: What ``preflight`` has returned.
        device: The device of the Brain.
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
    of_what = "the process" if total is None else f"tensors on {device}, of {in_gib(total)}"
    return "\n".join([*lines, f"The peak memory is that of {of_what}."])


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
    # Each process tests alone.
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
            # Once more, where another process has more of them: they wait for each other.
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
    """Starts the stage of a set; returns what to do with each batch.

    In TRAIN until memory holds all that it will: the first update makes the state of the
    optimizers, and in a window of several batches there are the gradients of those before.
    """
    if data.stage.kind is not Stage.TRAIN:
        trial.start_evaluation(data.stage, data.name)
        return [trial.evaluate]
    brain = data.stage.brain
    trial.start()
    window = min(brain.grad_accumulation_factor, 2)
    brain.grad_accumulation_factor = window
    # The first batch ends a window, and the last one another.
    brain.step = window - 1
    return [trial.fit] * (window + 1)


def _if_possible(recover: Callable[[], None]) -> None:
    try:
        recover()
    except Exception as error:  # noqa: BLE001  whatever a recipe does there
        message = "TEST is tried without what on_evaluate_start does, which ended with %s: %s"
        logger.info(message, type(error).__name__, error)


def _alone(value: Any) -> list[Any]:
    """What ``gather`` gives to a process that is alone."""
    return [value]


def _measured(
    steps: Sequence[Callable[[Any], float]], batch: Any, device: str
) -> tuple[int, float]:
    """The most memory that any of the steps takes, and the seconds of the last."""
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
    """Says of an error which batch of which set it comes from."""
    try:
        yield
    except Exception as error:
        what = ", ".join([f"in {title}", *_of_examples(examples), *described(batch)])
        if is_out_of_memory(error):
            reason = str(error).rstrip(". ")
            raise PreflightError(
                f"preflight: no memory for the longest batch {what}: {reason}. {REMEDY}"
            ) from error
        add_note(error, f"brain_lightning: in the preflight, {what}")
        raise


def _of_examples(examples: Examples | None) -> Iterator[str]:
    if examples is not None:
        yield f"with ids {shortened(examples.names)}"
        yield f"lengths {shortened([round(each, 4) for each in examples.lengths])}"
