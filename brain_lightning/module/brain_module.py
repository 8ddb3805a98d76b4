"""What the LightningModules of all Brains share; ``automatic`` and ``manual`` fit batches."""

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
from brain_lightning.step.wrap import save_whole
from brain_lightning.temporary import TemporaryAttributes
from brain_lightning.trials.learning_rate import set_learning_rate

from .checkpoint_file import check_content, content, recover
from .named_checkpoint import Recovery, is_directory, named_checkpoint, recovering


class BrainModule(LightningModule):
    """Calls the stages of a run from Lightning's hooks, and saves and loads checkpoints.

    Subclasses have ``fit_batch(batch, batch_idx)``, which does one training step without
    Lightning's hooks where no callback needs them, and returns what ``training_step`` would;
    ``run.train.steps`` are the steps that the Trainer has to count then.

    Args:
        brain: The Brain to run.
        epoch_counter: Its epochs; ``hparams.epoch_counter`` if not given, and
            where there is none 1, 2, … until the Trainer stops, which counts on in
            another ``fit``.
        progressbar: Whether to show SpeechBrain's bar where the Trainer has none.
        max_key: For ``on_evaluate_start``.
        min_key: For ``on_evaluate_start``.
        own_fit: The recipe's own ``fit``, where that calls for the stages of the run:
            ``_fit_train`` and ``_fit_valid``.

    Attributes:
        run: The current or last run.
        is_of_fit: Whether it is the Brain's ``fit`` that runs it.
        recovers: What to recover for TEST; None leaves the modules as they are.
    """

    is_of_fit = False
    recovers: Checkpoint | Recovery | None = Recovery.BY_KEYS
    # By ckpt_path.
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
        """The Trainer that runs, or has run, the Brain."""
        return super().trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        LightningModule.trainer.__set__(self, trainer)  # type: ignore[attr-defined]
        if trainer is not None:
            # The only call that a module gets before Lightning looks at ckpt_path.
            self._named = None
            read_ckpt_path(trainer, self._take_directory, Run.is_running(self.brain))

    def _take_directory(self, ckpt_path: Any) -> bool:
        if is_directory(ckpt_path):
            self._named = named_checkpoint(self.brain, ckpt_path)
        return self._named is not None

    def configure_callbacks(self) -> list[Callback]:
        """Begins a run: new stages over the same Brain, and the callback that runs them."""
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
        """Copies the weights, for callbacks that average them, and shares everything else."""
        brain = copy.copy(self.brain)
        brain.modules = copy.deepcopy(self.brain.modules, memo)
        brain._lightning = copy.copy(brain._lightning)
        module = type(self)(brain, epoch_counter=self._epoch_counter)
        for name in ("_progressbar", "_own_fit", "_best_keys"):
            setattr(module, name, getattr(self, name))
        return module

    def __getattr__(self, name: str) -> Any:
        """Finds an entry of the Brain's modules: BackboneFinetuning wants ``backbone``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self._modules.get("brain_modules")
            if isinstance(modules, ModuleDict) and name in modules:
                return modules[name]
            raise

    def configure_optimizers(self) -> Optimizer:
        """``on_fit_start`` of the Brain: compile, init_optimizers, recover.

        Lightning calls this once the modules are on their device and the
        process group is up.
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
                # A fit within this one starts by itself.
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
        # It may have made some by itself.
        save_whole(brain)
        recovered = (brain.step, brain.avg_train_loss) != counts
        self.run.run_state.has_recovered_counts = recovered
        if self._explicit is not None:
            # A callback that averages weights replaces the state by its average.
            weights = self._explicit.get("current_model_state", self._explicit["state_dict"])
            self.load_state_dict(weights, self.strict_loading)
            own = self.state_dict(keep_vars=True)
            recover(self._explicit, self.run, own, self.strict_loading)
            self._explicit = None
        if several:
            check_same(
                "has recovered what there was",
                "how many updates they have done",
                getattr(brain, "optimizer_step", 0),
            )
            self.run.epochs.is_collective = True

    def _init_optimizers(self, init_optimizers: Callable[[], None]) -> None:
        """``init_optimizers`` of the Brain, before anything is recovered."""
        check_sharded(self.brain)
        init_optimizers()
        set_learning_rate(self.brain)
        save_whole(self.brain)
        self._initial_groups.remember()
        self.run.trainer.remember_trained()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Weights by the names that they have where nothing is compiled or wrapped."""
        state = super().state_dict(*args, **kwargs)
        for name in list(state):
            # In place: the dictionary carries metadata; all of them, to keep the order.
            state[self._plain(name)] = state.pop(name)
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Takes what ``state_dict`` gave, whatever the modules are wrapped in by now."""
        prune_as_saved(self, state_dict, self._plain)
        names = {self._plain(name): name for name in super().state_dict(keep_vars=True)}
        renamed = {names.get(name, name): value for name, value in state_dict.items()}
        return super().load_state_dict(renamed, strict, assign)

    def _plain(self, name: str) -> str:
        """The name of a weight where nothing is compiled or wrapped."""
        before, found, rest = name.partition("brain_modules.")
        return before + found + plain_name(rest, self.brain)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what Lightning does not save, unless weights alone are saved."""
        if self.hparams and checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_NAME) is None:
            # What load_from_checkpoint gives them to the constructor as.
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_NAME] = "hparams"
        if self._running() is TrainerFn.FITTING and "optimizer_states" in checkpoint:
            checkpoint[KEY] = content(self.run, self.state_dict(keep_vars=True))
            # An error may come before the run begins.
            if self.run.run_state.trainer is not None:
                # After the callbacks: WeightAveraging may have exchanged the weights.
                self.run.trainer.correct(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps an explicit ``ckpt_path``: it wins over what a Checkpointer recovers."""
        running = self._running()
        if running is TrainerFn.FITTING:
            check_content(checkpoint)
            # Lightning would begin in the middle of its own loop, without a TRAIN stage.
            checkpoint.pop("loops", None)
        if running in (TrainerFn.FITTING, TrainerFn.TESTING):
            self._explicit = checkpoint

    def _running(self) -> TrainerFn | None:
        # Without a Trainer, as in load_from_checkpoint, the property raises.
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
        """Ends a batch: the last hook, the callbacks' come before."""
        self.end_batch(self.trainer)

    def end_batch(self, trainer: Trainer) -> None:
        """Fetches the next batch, as late as SpeechBrain does; without one TRAIN ends.

        Args:
            trainer: The Trainer that runs.
        """
        train = self.run.train
        if trainer.loggers and not train.accumulates:
            log_step_metrics(trainer)
        if self.brain.profile_training:
            end_when_profiled(trainer, self.brain, train.batches)
        train.end_batch()
        fit_loop_of(trainer).fetch_batch()

    def on_validation_model_eval(self) -> None:
        """Begins the VALID stage: the hook first, then ``eval()``."""
        if self._running() is TrainerFn.VALIDATING:
            self._recover_named()
        self.run.valid.start()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """``evaluate_batch`` at Stage.VALID."""
        return self.run.valid.evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Ends the VALID stage, before callbacks look at what it changed."""
        with self.run.trainer.measured():
            self.run.valid.end()
        self._log_metrics()

    def on_test_model_eval(self) -> None:
        """Begins an evaluation: the best or an explicit checkpoint, then the TEST stage."""
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
        """``evaluate_batch`` at Stage.TEST."""
        return self.run.test.evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Ends the TEST stage."""
        self.run.test.end()
        self._log_metrics()

    def on_train_epoch_end(self) -> None:
        """Logs what no validation has logged, before callbacks that monitor read it."""
        self._log_metrics()

    def _log_metrics(self) -> None:
        several = self.trainer.world_size > 1
        metrics = self.run.take_metrics(several)
        self._report_metrics(metrics)
        if not self.trainer.barebones:
            log_numbers(self.trainer, metrics)

    def _report_metrics(self, metrics: Mapping[str, float]) -> None:
        """Calls ``on_brain_metrics`` of every callback that has it, such as CurvePlot."""
        running = self._running()
        if running not in (TrainerFn.FITTING, TrainerFn.TESTING):
            return
        epoch = self.run.epochs.current if running is TrainerFn.FITTING else None
        for callback in callbacks_of(self.trainer):
            if hasattr(callback, "on_brain_metrics"):
                callback.on_brain_metrics(self.trainer, self, epoch, metrics)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """``compute_forward`` at Stage.TEST, in evaluation precision."""
        with self.brain.evaluation_ctx:
            stage = self.brain._lightning.stage_type.TEST
            return self.brain.compute_forward(batch, stage=stage)

    def on_predict_model_eval(self) -> None:
        """Puts the modules in eval mode, as every evaluation of a Brain does."""
        self._recover_named()
        self.brain.modules.eval()
        # Processes have different numbers of batches to predict.
        self.run.test.gather()

    def _recover_named(self) -> None:
        if self._named is not None:
            self.brain.checkpointer.load_checkpoint(self._named)

    def on_validation_model_train(self) -> None:
        """Nothing: a Brain stays in eval mode until its next TRAIN stage."""

    def on_test_model_train(self) -> None:
        """Nothing: a Brain stays in eval mode after an evaluation."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: a Brain zeroes its gradients itself, but not those of frozen optimizers."""

    def to(self, *args: Any, **kwargs: Any) -> BrainModule:
        """Moves the modules, unless a strategy wants them where they are."""
        device = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(device, torch.device) and leave_on(self, device):
            return self
        return super().to(*args, **kwargs)

    def cpu(self) -> BrainModule:
        """Nothing: a Brain stays on its device after a run."""
        return self

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Moves a batch to the device; on the CPU every batch is there."""
        if device.type == "cpu":
            return batch
        try:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        except Exception as error:
            if not self.trainer.predicting:
                self.run.locate(error, batch, next_is="moving batch")
            raise
