"""A Trainer's loops and loaders ruled by a Brain, for one run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from brain_lightning.compat.speechbrain import redirect_validation
from brain_lightning.protocol import overrides
from brain_lightning.stages.run import Run
from brain_lightning.step.older_api import support_older_api
from brain_lightning.temporary import TemporaryAttributes

from .lean_loops import make_lean
from .loaders import StageSource
from .loops import BrainEpochLoop, BrainEvaluationLoop, BrainFitLoop, become


def attach(trainer: Trainer, run: Run, temporary: TemporaryAttributes) -> None:
    """Lets the stages of a Brain rule the Trainer's loops.

    Args:
        trainer: The Trainer in its ``setup``.
        run: The run.
        temporary: Records what is changed.
    """
    support_older_api(run.brain, temporary)
    fit: Any = trainer.fit_loop
    evaluations = (fit.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
    for loop in evaluations:
        become(loop, BrainEvaluationLoop, temporary)
    if trainer.state.fn is TrainerFn.FITTING:
        become(fit, BrainFitLoop, temporary, brain_run=run)
        become(fit.epoch_loop, BrainEpochLoop, temporary, brain_run=run)
        if overrides(type(run.brain), "_fit_valid"):
            _validate_by_recipe(fit.epoch_loop.val_loop, run, temporary)
    # Without this line, and the file, everything is the same, but slower.
    make_lean((fit.epoch_loop, *evaluations), temporary)
    stages = (run.train, run.valid, run.valid, run.test)
    for loop, stage in zip((fit, *evaluations), stages, strict=True):
        given = loop._data_source
        source = StageSource(given.instance, given.name, trainer, stage, temporary)
        temporary.set(loop, "_data_source", source)
        # None, and so again at the end: the loop would reuse the loaders of this run.
        temporary.set(loop, "_combined_loader", None)
    for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        # torch.no_grad, as a Brain evaluates: what is stored may be trained on later.
        temporary.set(loop, "inference_mode", False)


def _validate_by_recipe(loop: Any, run: Run, temporary: TemporaryAttributes) -> None:
    """Lets a recipe decide whether to validate, by its own ``_fit_valid``.

    Recipes override it to validate every few epochs, and call SpeechBrain's, which
    stands for Lightning's validation here. Lightning has no hook that could leave
    one out.
    """
    brain = run.brain
    temporary.override(brain, "_validate", loop.run)
    redirect_validation(brain, temporary)

    def validate() -> None:
        loader = run.valid.given()
        brain._fit_valid(loader, run.epochs.current, run.trainer.shows_bar)

    temporary.override(loop, "run", validate)
