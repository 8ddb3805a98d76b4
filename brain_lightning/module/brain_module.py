"""The base class of generated LightningModules; ``automatic`` and ``manual`` fit batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn import ModuleDict
from torch.optim import Optimizer

from brain_lightning.callback.brain_callback import BrainCallback
from brain_lightning.callback.profiling import end_when_profiled
from brain_lightning.callback.recoverables import run_state
from brain_lightning.checkpoints.checkpoint import Checkpoint
from brain_lightning.checkpoints.shared_recovery import recovers_together
from brain_lightning.compat import speechbrain
from brain_lightning.distributed.agreement import check_same
from brain_lightning.distributed.ddp import plain_name, unwrap_modules
from brain_lightning.fsdp2.shard import check_sharded
from brain_lightning.lightning_internals.checkpoint_connector import read_ckpt_path
from brain_lightning.lightning_internals.loggers import log_numbers, log_step_metrics
from brain_lightning.lightning_internals.loops import fit_loop_of
from brain_lightning.lightning_internals.strategies import leave_on
from brain_lightning.lightning_internals.trainer_callbacks import callbacks_of
from brain_lightning.loggers.hyperparameters import hyperparameters
from brain_lightning.optimizers.group import OptimizerGroup
from brain_lightning.optimizers.initial_groups import InitialGroups
from brain_lightning.protocol import BrainProtocol, check_fit, check_hooks, hparam
from brain_lightning.resume.run_state import KEY, RunState
from brain_lightning.stages.epochs import Epochs, EpochsOfTrainer
from brain_lightning.stages.run import Run
from brain_lightning.step.pruning import prune_as_saved
from brain_lightning.step.window import check_window
from brain_lightning.step.wrap import save_full_states
from brain_lightning.temporary import TemporaryAttributes
from brain_lightning.trials.learning_rate import set_learning_rate

from .checkpoint_file import check_content, content, recover
from .named_checkpoint import Recovery, is_directory, named_checkpoint, recovering


class BrainModule(LightningModule):
    """Calls the stages of a run from Lightning's hooks, and saves and loads checkpoints.

    Subclasses define ``fit_batch(batch, batch_idx)``. It runs one training step without
    Lightning's hooks if no callback needs them, and returns the value of ``training_step``.
    The Trainer then counts ``run.train.steps`` optimizer steps.

    Args:
        brain: The Brain to run.
        epoch_counter: Iterable over epoch numbers; default: ``hparams.epoch_counter``. If
            there is none, the epochs are 1, 2, … until the Trainer stops. Another ``fit``
            continues to count.
        progressbar: Whether to show SpeechBrain's progress bar if the Trainer has none.
        max_key: Argument of ``on_evaluate_start``.
        min_key: Argument of ``on_evaluate_start``.
        own_fit: The overridden ``fit`` of the recipe, if it calls the stages of the run by
            ``_fit_train`` and ``_fit_valid``.

    Attributes:
        run: The current or last run.
        is_of_fit: Whether the Brain's ``fit`` created this module.
        recovers: The checkpoint to recover for TEST; None recovers nothing.
    """

    is_of_fit = False
    recovers: Checkpoint | Recovery | None = Recovery.BY_KEYS
    # The checkpoint directory from ckpt_path.
    _named: Checkpoint | None = None

    def __init__(
        self,
        brain: BrainProtocol,
        *,
        epoch_counter: Iterable[Any] | None = None,
        progressbar: bool = False,
        max_key: str | None = None,
        min_key: str | None = None,
        own_fit: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__()
        speechbrain.add_attributes(brain)
        self.brain = brain
        self.brain_modules = brain.modules
        self.run = Run(brain, Epochs(()), RunState(brain))
        self._epoch_counter = epoch_counter
        self._explicit: dict[str, Any] | None = None
        self._progressbar = progressbar
        self._own_fit = own_fit
        self._best_keys = {"max_key": max_key, "min_key": min_key}
        if found := hyperparameters(brain):
            self.save_hyperparameters(found)

    @property
    def trainer(self) -> Trainer:
        """The Trainer that runs, or last ran, the Brain."""
        return super().trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        LightningModule.trainer.__set__(self, trainer)  # type: ignore[attr-defined]
        if trainer is not None:
            # Lightning calls nothing else of a module before it reads ckpt_path.
            self._named = None
            read_ckpt_path(trainer, self._take_directory, Run.is_running(self.brain))

    def _take_directory(self, ckpt_path: Any) -> bool:
        if is_directory(ckpt_path):
            self._named = named_checkpoint(self.brain, ckpt_path)
        return self._named is not None

    def configure_callbacks(self) -> list[Callback]:
        """Starts a run: creates new stages for the Brain, and the callback that runs them."""
        fitting = self.trainer.state.fn is TrainerFn.FITTING
        if fitting:
            check_hooks(self.brain)
            check_window(self.brain)
            if not self.is_of_fit:
                check_fit(self.brain)
        self._explicit = None
        counters = (self._epoch_counter, hparam(self.brain, "epoch_counter"))
        counter = next((each for each in counters if each is not None), None)
        if counter is None:
            counter = EpochsOfTrainer(lambda: self.trainer.current_epoch)
        within = not fitting or Run.is_running(self.brain)
        state = RunState(self.brain) if within else run_state(self.brain)
        self.run = Run(self.brain, Epochs(counter), state, self._best_keys)
        own_fit = None if self._own_fit is None else self._fit_by_recipe
        return [BrainCallback(self.run, self.trainer, self._progressbar, own_fit)]

    def __deepcopy__(self, memo: dict[int, Any]) -> BrainModule:
        """Copies the weights and shares the rest, for callbacks that average weights."""
        brain = copy.copy(self.brain)
        brain.modules = copy.deepcopy(self.brain.modules, memo)
        brain._lightning = copy.copy(brain._lightning)
        module = type(self)(brain, epoch_counter=self._epoch_counter)
        for name in ("_progressbar", "_own_fit", "_best_keys"):
            setattr(module, name, getattr(self, name))
        return module

    def __getattr__(self, name: str) -> Any:
        """Returns an entry of the Brain's modules; BackboneFinetuning reads ``backbone``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self._modules.get("brain_modules")
            if isinstance(modules, ModuleDict) and name in modules:
                return modules[name]
            raise

    def configure_optimizers(self) -> Optimizer:
        """Calls ``on_fit_start``: compiles, creates the optimizers, recovers the checkpoint.

        Lightning calls this method after it moved the modules to their device and
        initialized the process group.
        """
        self._initial_groups = InitialGroups(self.brain)
        if self._own_fit is None:
            self._start_fit(self.brain.on_fit_start)
        return OptimizerGroup(self.brain, self._initial_groups)

    def _fit_by_recipe(self) -> None:
        assert self._own_fit is not None
        with TemporaryAttributes() as temporary:
            on_fit_start = self.brain.on_fit_start

            def start_once() -> None:
                # Restore first, because a nested fit calls on_fit_start itself.
                temporary.restore()
                self._start_fit(on_fit_start)

            temporary.override(self.brain, "on_fit_start", start_once)
            self._own_fit()

    def _start_fit(self, on_fit_start: Callable[[], None]) -> None:
        brain, several = self.brain, self.trainer.world_size > 1
        unwrap_modules(brain)
        counts = brain.step, brain.avg_train_loss
        together = recovers_together(brain.checkpointer) if several else nullcontext()
        with together, TemporaryAttributes() as temporary:
            temporary.wrap(brain, "init_optimizers", self._init_optimizers)
            temporary.enter_context(recovering(brain, self._named))
            on_fit_start()
        # on_fit_start may have replaced modules.
        save_full_states(brain)
        recovered = (brain.step, brain.avg_train_loss) != counts
        self.run.run_state.has_recovered_counts = recovered
        if self._explicit is not None:
            # A callback that averages weights saves its average as state_dict.
            weights = self._explicit.get("current_model_state", self._explicit["state_dict"])
            self.load_state_dict(weights, self.strict_loading)
            own = self.state_dict(keep_vars=True)
            recover(self._explicit, self.run, own, self.strict_loading)
            self._explicit = None
        if several:
            check_same(
                "has recovered its checkpoint",
                "the number of optimizer steps",
                getattr(brain, "optimizer_step", 0),
            )
            self.run.epochs.is_collective = True

    def _init_optimizers(self, init_optimizers: Callable[[], None]) -> None:
        """Calls ``init_optimizers`` of the Brain, before anything is recovered."""
        check_sharded(self.brain)
        init_optimizers()
        set_learning_rate(self.brain)
        save_full_states(self.brain)
        self._initial_groups.remember()
        self.run.trainer.remember_trained()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the weights, by names without the prefixes of compiling and wrapping."""
        state = super().state_dict(*args, **kwargs)
        for name in list(state):
            # Rename in place to keep the metadata, and rename every entry to keep the order.
            state[self._plain(name)] = state.pop(name)
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads a ``state_dict``, also if the modules are compiled or wrapped now."""
        prune_as_saved(self, state_dict, self._plain)
        names = {self._plain(name): name for name in super().state_dict(keep_vars=True)}
        renamed = {names.get(name, name): value for name, value in state_dict.items()}
        return super().load_state_dict(renamed, strict, assign)

    def _plain(self, name: str) -> str:
        """Returns the name of a weight without the prefixes of compiling and wrapping."""
        before, found, rest = name.partition("brain_modules.")
        return before + found + plain_name(rest, self.brain)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the states that Lightning does not save, unless only weights are saved."""
        if self.hparams and checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_NAME) is None:
            # The name of the constructor's argument, for load_from_checkpoint.
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_NAME] = "hparams"
        if self._running() is TrainerFn.FITTING and "optimizer_states" in checkpoint:
            checkpoint[KEY] = content(self.run, self.state_dict(keep_vars=True))
            # It is None if an error was raised before the run started.
            if self.run.run_state.trainer is not None:
                # Lightning calls callbacks before: WeightAveraging may have swapped weights.
                self.run.trainer.correct(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the content of ``ckpt_path``, which takes precedence over a Checkpointer."""
        running = self._running()
        if running is TrainerFn.FITTING:
            check_content(checkpoint)
            # Otherwise Lightning would start within its loop, without a TRAIN stage.
            checkpoint.pop("loops", None)
        if running in (TrainerFn.FITTING, TrainerFn.TESTING):
            self._explicit = checkpoint

    def _running(self) -> TrainerFn | None:
        # The property raises if there is no Trainer, for example in load_from_checkpoint.
        try:
            return self.trainer.state.fn
        except RuntimeError:
            return None

    def _fit(
        self,
        batch: Any,
        batch_idx: int,
        fit_batch: Callable[[Any], Any],
        step: Callable[[], None],
    ) -> Any:
        train = self.run.train
        is_last = (
            train.steps_on_last_batch and batch_idx + 1 >= self.trainer.num_training_batches
        )
        return train.fit(batch, fit_batch, is_last, step)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ends a batch; Lightning calls this hook after the hooks of callbacks."""
        self.end_batch(self.trainer)

    def end_batch(self, trainer: Trainer) -> None:
        """Ends a batch and fetches the next one, as late as SpeechBrain does.

        If there is no next batch, the TRAIN stage ends.

        Args:
            trainer: The running Trainer.
        """
        train = self.run.train
        if trainer.loggers and not train.accumulates:
            log_step_metrics(trainer)
        if self.brain.profile_training:
            end_when_profiled(trainer, self.brain, train.batches)
        train.end_batch()
        fit_loop_of(trainer).fetch_batch()

    def on_validation_model_eval(self) -> None:
        """Starts the VALID stage, which calls ``on_stage_start`` and then ``eval()``."""
        if self._running() is TrainerFn.VALIDATING:
            self._recover_named()
        self.run.valid.start()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Calls ``evaluate_batch`` with Stage.VALID."""
        return self.run.valid.evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Ends the VALID stage, before callbacks read its metrics."""
        with self.run.trainer.measured():
            self.run.valid.end()
        self._log_metrics()

    def on_test_model_eval(self) -> None:
        """Recovers the best checkpoint or ``ckpt_path``, and starts the TEST stage."""
        recovers = self._named or self.recovers
        if recovers is not None:
            named = None if isinstance(recovers, Recovery) else recovers
            with recovering(self.brain, named):
                self.run.test.recover_best()
        if self._explicit is not None:
            self.load_state_dict(self._explicit["state_dict"], self.strict_loading)
            self._explicit = None
        self.run.test.start()

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Calls ``evaluate_batch`` with Stage.TEST."""
        return self.run.test.evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Ends the TEST stage."""
        self.run.test.end()
        self._log_metrics()

    def on_train_epoch_end(self) -> None:
        """Logs metrics that no validation has logged, before callbacks read them."""
        self._log_metrics()

    def _log_metrics(self) -> None:
        several = self.trainer.world_size > 1
        metrics = self.run.take_metrics(several)
        self._report_metrics(metrics)
        if not self.trainer.barebones:
            log_numbers(self.trainer, metrics)

    def _report_metrics(self, metrics: Mapping[str, float]) -> None:
        """Calls ``on_brain_metrics`` of each callback that has it, such as CurvePlot."""
        running = self._running()
        if running not in (TrainerFn.FITTING, TrainerFn.TESTING):
            return
        epoch = self.run.epochs.current if running is TrainerFn.FITTING else None
        for callback in callbacks_of(self.trainer):
            if hasattr(callback, "on_brain_metrics"):
                callback.on_brain_metrics(self.trainer, self, epoch, metrics)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Calls ``compute_forward`` with Stage.TEST, in the evaluation precision."""
        with self.brain.evaluation_ctx:
            stage = self.brain._lightning.stage_type.TEST
            return self.brain.compute_forward(batch, stage=stage)

    def on_predict_model_eval(self) -> None:
        """Sets the modules to eval mode, as every evaluation of a Brain does."""
        self._recover_named()
        self.brain.modules.eval()
        # Ranks may predict different numbers of batches, so shards are gathered in advance.
        self.run.test.gather()

    def _recover_named(self) -> None:
        if self._named is not None:
            self.brain.checkpointer.load_checkpoint(self._named)

    def on_validation_model_train(self) -> None:
        """Does nothing, because a Brain stays in eval mode until its next TRAIN stage."""

    def on_test_model_train(self) -> None:
        """Does nothing, because a Brain stays in eval mode after an evaluation."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing, because a Brain zeroes gradients, except for frozen optimizers."""

    def to(self, *args: Any, **kwargs: Any) -> BrainModule:
        """Moves the modules, unless the strategy moves them itself."""
        device = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(device, torch.device) and leave_on(self, device):
            return self
        return super().to(*args, **kwargs)

    def cpu(self) -> BrainModule:
        """Does nothing, because a Brain stays on its device after a run."""
        return self

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Moves a batch to the device; does nothing on the CPU."""
        if device.type == "cpu":
            return batch
        try:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        except Exception as error:
            if not self.trainer.predicting:
                self.run.locate(error, batch, next_is="moving batch")
            raise
