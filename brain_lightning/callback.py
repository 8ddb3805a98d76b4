"""When things happen in a run, and what is allowed: the Brain's semantics as a callback."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from . import _loops
from .stages import Stages


class BrainCallback(Callback):
    """Runs the stages of a Brain at the right moments of a Trainer.

    The generated module brings it along (``configure_callbacks``); a user adds
    nothing. What it changes on the Trainer it puts back when the run is over.

    Args:
        stages: The stages of this run.
    """

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self.interrupt: KeyboardInterrupt | None = None
        self._sanity_steps: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes over the loops, before any loader is looked at."""
        if trainer.num_sanity_val_steps:
            # Recipes read in VALID what their on_stage_start set.
            rank_zero_info("A Brain validates in its own order: no sanity check.")
            self._sanity_steps = trainer.num_sanity_val_steps  # type: ignore[assignment]
            trainer.num_sanity_val_steps = 0
        self.stages.progressbar &= trainer.is_global_zero
        self.stages.progressbar &= trainer.progress_bar_callback is None
        _loops.attach(trainer, self.stages)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins the TRAIN stage."""
        _loops.start_train_epoch(trainer, self.stages.train_loader.known_length())
        self.stages.start_train()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the validation run to the end of its loader."""
        _loops.start_validation(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the test run to the end of its loader."""
        _loops.start_validation(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends an epoch that had no batch, and decides about the next one."""
        if self.stages.in_training:
            self.stages.end_train()
            _loops.run_validation(trainer)
        self.stages.end_epoch()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remembers a Ctrl-C, which Lightning turns into SystemExit, and tidies up."""
        if isinstance(exception, KeyboardInterrupt):
            self.interrupt = exception
        self._put_back(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the Trainer back as it was."""
        self._put_back(trainer)

    def _put_back(self, trainer: Trainer) -> None:
        self.stages.close()
        _loops.detach(trainer)
        if self._sanity_steps is not None:
            trainer.num_sanity_val_steps = self._sanity_steps
            self._sanity_steps = None
