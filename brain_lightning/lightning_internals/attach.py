"""Attaches the stages of a Brain to a Trainer's loops and loaders, for one run."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from brain_lightning.compat.speechbrain import redirect_parts
from brain_lightning.protocol import PARTS, BrainProtocol, has_own
from brain_lightning.references import referenced
from brain_lightning.stages.base import RunStage
from brain_lightning.stages.run import Run
from brain_lightning.step.older_api import support_older_api
from brain_lightning.temporary import TemporaryAttributes

from .lean_loops import make_lean
from .loaders import StageSource
from .loggers import BrainLoggerConnector, keep_step_metrics
from .loops import BrainEpochLoop, BrainEvaluationLoop, BrainFitLoop, become
from .parts import StageParts

logger = logging.getLogger(__name__)


def attach(
    trainer: Trainer,
    run: Run,
    temporary: TemporaryAttributes,
    own_fit: Callable[[], Any] | None,
    resume: Callable[[], None],
) -> None:
    """Attaches the stages of a Brain to the Trainer's loops.

    Args:
        trainer: The Trainer in its ``setup``.
        run: The run.
        temporary: Records the changes.
        own_fit: The overridden ``fit`` of the recipe, if it calls the stages.
        resume: Function that resumes the run, after ``own_fit`` has recovered a checkpoint.
    """
    support_older_api(run.brain, temporary)
    connector = trainer._logger_connector
    become(connector, BrainLoggerConnector, temporary, brain_run=run, brain_numbers={})
    fit: Any = trainer.fit_loop
    evaluations = (fit.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
    for loop, of_loop in zip(evaluations, (run.valid, run.valid, run.test), strict=True):
        become(loop, BrainEvaluationLoop, temporary, brain_stage=of_loop)
    if trainer.state.fn is TrainerFn.FITTING:
        overridden = [part for part in PARTS if has_own(run.brain, part)]
        by_parts = own_fit is not None or bool(overridden)
        parts = run.parts = StageParts(trainer, run, by_parts, own_fit, resume)
        runs_parts = parts.run if by_parts else None
        become(fit, BrainFitLoop, temporary, brain_run=run, brain_runs_parts=runs_parts)
        become(
            fit.epoch_loop, BrainEpochLoop, temporary,
            brain_run=run, brain_validates_after=by_parts,
        )  # fmt: skip
        # This stores the metrics of the last batch also if the run is interrupted after it.
        temporary.callback(keep_step_metrics, trainer)
        redirect_parts(run.brain, Run.parts_of, temporary)
        for part in overridden:
            _let_run(parts, part, run.brain, temporary)
        if overridden:
            _validate_by_brain(fit.epoch_loop.val_loop, parts, run, temporary)
    # This line only saves time: it changes no result.
    make_lean((fit.epoch_loop, *evaluations), temporary)
    stages: Sequence[RunStage] = (run.train, run.valid, run.valid, run.test)
    for loop, stage in zip((fit, *evaluations), stages, strict=True):
        given = loop._data_source
        source = StageSource(given.instance, given.name, trainer, stage, temporary)
        temporary.set(loop, "_data_source", source)
        # If it were not None at the end, the loop would reuse the loaders of this run.
        temporary.set(loop, "_combined_loader", None)
    for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        # Use torch.no_grad as SpeechBrain does: stored tensors may be trained on later.
        temporary.set(loop, "inference_mode", False)


def _let_run(
    parts: StageParts, part: str, brain: BrainProtocol, temporary: TemporaryAttributes
) -> None:
    """Runs an overridden part (``_fit_train`` or ``_fit_valid``) within Lightning's hooks.

    If the part calls ``super()``, nothing is changed, because ``super()`` runs the stage.
    """
    if part in referenced(brain, [part]):
        return
    found = getattr(brain, part)
    # In a nested run of the same Brain, the part is already replaced.
    recipe = getattr(found, "recipe", found)
    _warn_of_own_loop(type(brain).__name__, part)
    run = parts.train_by_recipe if part == "_fit_train" else parts.valid_by_recipe

    def within_hooks(*args: Any, **kwargs: Any) -> Any:
        results: list[Any] = []
        epoch = _epoch_of(recipe, args, kwargs)
        run(lambda: results.append(recipe(*args, **kwargs)), epoch)
        return results[0] if results else None

    within_hooks.recipe = recipe  # type: ignore[attr-defined]
    temporary.override(brain, part, within_hooks)


def _epoch_of(recipe: Callable[..., Any], args: Sequence[Any], kwargs: Any) -> Any:
    """Returns the epoch argument of a part, whose signature the recipe may have changed."""
    bound = inspect.signature(recipe).bind(*args, **kwargs)
    bound.apply_defaults()
    given = {**bound.arguments, **kwargs}
    return given["epoch"] if "epoch" in given else args[1] if len(args) > 1 else None


@cache
def _warn_of_own_loop(brain: str, part: str) -> None:
    logger.warning(
        "%s.%s is a custom loop. Limits, gradient options and batch hooks of the Trainer have "
        "no effect in it. Epochs, metrics, checkpoints and loggers work as usual.",
        brain,
        part,
    )


def _validate_by_brain(
    loop: Any, parts: StageParts, run: Run, temporary: TemporaryAttributes
) -> None:
    """Makes a validation in the middle of an epoch call the Brain's ``_fit_valid``."""
    temporary.override(loop, "run", lambda: parts.validate_by_brain(run.trainer.shows_bar))
