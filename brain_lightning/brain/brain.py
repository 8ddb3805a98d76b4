"""The Brain class: SpeechBrain's public API, with Lightning's Trainer running the loops."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from brain_lightning.checkpoints.state_files import not_finite
from brain_lightning.data import dataloaders as data
from brain_lightning.distributed.communication import is_distributed_initialized
from brain_lightning.errors import NonFiniteLossError
from brain_lightning.optimizers.active import split_vectors_from_weight_decay
from brain_lightning.stage import Stage
from brain_lightning.stages import interval_checkpoints as interval
from brain_lightning.step.compile import compile_modules
from brain_lightning.step.losses import evaluation_loss
from brain_lightning.step.older_api import check_gradients, zero_grad_of_optimizer
from brain_lightning.step.update import RawUpdate, fit_batch, optimizers_step
from brain_lightning.step.wrap import wrap_modules
from brain_lightning.temporary import TemporaryAttributes

from .base import BrainBase
from .fit import FitAndEvaluate

logger = logging.getLogger(__name__)


def _cause_of_nonfinite_loss(brain: Brain) -> str:
    """Describes whether this batch or an earlier one causes a loss that is not finite.

    Args:
        brain: The Brain, before the batch changes its parameters.
    """
    broken = not_finite(dict(brain.modules.items()))
    if not broken:
        # If modules are sharded, each rank checks its own shards.
        where = " on this rank" if is_distributed_initialized() else ""
        return f"All parameters{where} are finite. Look at the batch and at the loss function."
    return (
        f"Parameters of {', '.join(broken)} are not finite. Probably an earlier batch had a "
        "gradient that was not finite. To find it, resume from a checkpoint with "
        "--trainer.detect_anomaly=true."
    )


class Brain(FitAndEvaluate, BrainBase):
    """Fits and evaluates a set of modules. Subclass it, as in SpeechBrain.

    Override ``compute_forward`` and ``compute_objectives``, and any other hook if
    needed. ``fit`` and ``evaluate`` run on a Lightning Trainer. They compute the
    same numbers as SpeechBrain, and call the hooks in the same order.

    Args:
        modules: Dict from names to modules. The Brain moves them to the device, switches
            them between train and eval mode, and passes their parameters to the optimizer.
        opt_class: Callable that creates the optimizer from a list of parameters.
        hparams: Hyperparameters by name, available as ``self.hparams.name``. An entry
            with the name of a run option sets this option. The entry ``trainer`` (a
            dict) has arguments for the Trainer.
        run_opts: Run options, from ``parse_arguments`` or as a dict; they take
            precedence over ``hparams``.
        checkpointer: Saves and recovers the state that is needed to resume training.

    Raises:
        BrainTypeError: If an argument has the wrong type.
        RunOptionError: If a run option is unknown or its value is invalid.
        UnsupportedError: If a run option is not supported here.

    Example:
        >>> class SimpleBrain(Brain):
        ...     def compute_forward(self, batch, stage):
        ...         return self.modules.model(batch[0])
        ...     def compute_objectives(self, predictions, batch, stage):
        ...         return torch.nn.functional.l1_loss(predictions, batch[0])
        >>> model = torch.nn.Linear(in_features=10, out_features=10)
        >>> brain = SimpleBrain(
        ...     {"model": model}, lambda x: torch.optim.SGD(x, 0.1), run_opts={"device": "cpu"}
        ... )
        >>> brain.fit(range(1), [torch.rand(10, 10)], progressbar=False)
    """

    # --------------------------------------------------------- what to compute

    def compute_forward(self, batch: Any, stage: Stage) -> Any:
        """Computes predictions; must be overridden.

        Args:
            batch: Batch as the DataLoader returned it.
            stage: TRAIN, VALID or TEST.

        Returns:
            The predictions, of any type, which are passed to ``compute_objectives``.
        """
        raise NotImplementedError

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Tensor:
        """Computes the loss; must be overridden.

        Args:
            predictions: Return value of ``compute_forward``.
            batch: Batch as the DataLoader returned it.
            stage: TRAIN, VALID or TEST.

        Returns:
            The loss to minimize, a tensor with one element.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------- hooks

    def on_stage_start(self, stage: Stage, epoch: Any = None) -> None:
        """Called when a stage starts, before the modules switch to train or eval mode.

        Args:
            stage: The stage.
            epoch: The epoch of the stage; None in TEST.
        """

    def on_stage_end(self, stage: Stage, stage_loss: float, epoch: Any = None) -> None:
        """Called when a stage has ended, for statistics and checkpoints.

        Args:
            stage: The stage.
            stage_loss: The average loss over the batches of the stage.
            epoch: The epoch of the stage; None in TEST.
        """

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        """Called before the forward pass of a training batch, outside autocast.

        Args:
            batch: Batch as the DataLoader returned it.
            should_step: Whether the optimizers step after this batch.
        """

    def on_fit_batch_end(
        self, batch: Any, outputs: Any, loss: Tensor, should_step: bool
    ) -> None:
        """Called after each training batch, unless ``oom_patience`` skips the batch.

        Args:
            batch: Batch as the DataLoader returned it.
            outputs: Return value of ``compute_forward``.
            loss: Return value of ``compute_objectives``.
            should_step: Whether the optimizers stepped. False if a step was due but was
                skipped, because the only loss of the accumulation window was not finite.
        """

    # -------------------------------------------- beginning to fit or to evaluate

    def on_fit_start(self) -> None:
        """Starts ``fit``: compiles, creates the optimizers, recovers the latest checkpoint."""
        self._compile()
        self._wrap_distributed()
        self.init_optimizers()
        if self.checkpointer is not None:
            self.checkpointer.recover_if_possible()

    def on_evaluate_start(
        self, max_key: str | None = None, min_key: str | None = None
    ) -> None:
        """Starts ``evaluate``: recovers the best checkpoint.

        Args:
            max_key: Name of a metric; the checkpoint with its highest value is recovered.
            min_key: Name of a metric; the checkpoint with its lowest value is recovered.
        """
        if self.checkpointer is not None:
            self.checkpointer.recover_if_possible(max_key=max_key, min_key=min_key)

    def _compile(self) -> None:
        """Compiles the modules; recipes that override ``on_fit_start`` call it."""
        compile_modules(self)

    def _wrap_distributed(self) -> None:
        """Prepares for several processes; recipes that override ``on_fit_start`` call it."""
        if is_distributed_initialized():
            wrap_modules(self)

    # -------------------------------------------------------------- one batch

    def fit_batch(self, batch: Any) -> Any:
        """Fits one batch. Override it for more than one update per batch.

        Args:
            batch: Batch as the DataLoader returned it.

        Returns:
            The detached loss.
        """
        return fit_batch(self, batch, RawUpdate(self))

    def evaluate_batch(self, batch: Any, stage: Stage) -> Any:
        """Evaluates one batch.

        Args:
            batch: Batch as the DataLoader returned it.
            stage: VALID or TEST.

        Returns:
            The detached loss.
        """
        return evaluation_loss(self, batch, stage).cpu()

    def check_loss_isfinite(self, loss: Tensor) -> None:
        """Counts losses that are not finite.

        Args:
            loss: The scaled loss of a training batch.

        Raises:
            NonFiniteLossError: If more than ``nonfinite_patience`` losses of this epoch
                were not finite.
        """
        if torch.isfinite(loss):
            return
        self.nonfinite_count += 1
        found = f"Loss is {loss.item()} at step {self.step}, which is not finite"
        patience = self.nonfinite_patience
        if self.nonfinite_count > patience:
            raise NonFiniteLossError(
                f"{found}, and nonfinite_patience={patience} is exhausted. "
                f"{_cause_of_nonfinite_loss(self)}"
            )
        logger.warning(
            "%s. The batch is skipped (%d of %d that nonfinite_patience allows in this "
            "epoch). %s",
            found,
            self.nonfinite_count,
            patience,
            _cause_of_nonfinite_loss(self),
        )

    def update_average(self, loss: Any, avg_loss: float) -> float:
        """Updates the running average of the loss; ignores a loss that is not finite.

        Args:
            loss: The detached loss of batch number ``step``.
            avg_loss: The average so far.

        Returns:
            The new average.
        """
        value = float(loss)
        if math.isfinite(value):
            avg_loss -= avg_loss / self.step
            avg_loss += value / self.step
        return avg_loss

    # -------------------------------------------------------------- optimizers

    def init_optimizers(self) -> None:
        """Creates the optimizer. To use several, override it and set ``optimizers_dict``."""
        if self.opt_class is None:
            trainable = any(p.requires_grad for p in self.modules.parameters())
            logger.log(
                logging.WARNING if trainable else logging.INFO,
                "No `opt_class` was provided, skipping optimizer initialization%s.",
                ": fit() will not change any parameter" if trainable else "",
            )
            return
        parameters: Any = self.modules.parameters()
        if self.remove_vector_weight_decay:
            parameters = split_vectors_from_weight_decay(self.modules)
        self.optimizer = self.opt_class(parameters)
        self.optimizers_dict = {"opt_class": self.optimizer}
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("optimizer", self.optimizer)

    def freeze_optimizers(self, optimizers: dict[str, Optimizer]) -> Mapping[str, Optimizer]:
        """Returns the optimizers that step. Override it to freeze some.

        Args:
            optimizers: All optimizers by name.

        Returns:
            The active optimizers by name.
        """
        return optimizers

    def optimizers_step(self) -> None:
        """Clips, steps and zeroes gradients, at the end of an accumulation window."""
        optimizers_step(self, RawUpdate(self).apply)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zeroes the gradients of the active optimizers.

        Args:
            set_to_none: Whether to set the gradients to None instead.
        """
        if self.optimizers_dict is not None:
            for opt in self.freeze_optimizers(self.optimizers_dict).values():
                opt.zero_grad(set_to_none=set_to_none)
        else:
            zero_grad_of_optimizer(self, set_to_none)

    def check_gradients(self, loss: Tensor | None = None) -> bool | None:
        """Drops each gradient that is not finite, and warns with the parameter's name.

        Args:
            loss: Passed by a ``fit_batch`` from SpeechBrain 0.5. The method then checks the
                loss, and clips all gradients together to ``max_grad_norm``.

        Returns:
            None, or if a loss is passed, whether the optimizer may step.

        Raises:
            NonFiniteLossError: See ``check_loss_isfinite``.
        """
        return check_gradients(self, loss)

    @contextmanager
    def no_sync(self, use: bool = True) -> Iterator[None]:
        """Does not synchronize gradients between ranks while they accumulate.

        Args:
            use: If False, gradients are synchronized as usual.

        Yields:
            None
        """
        name = "require_backward_grad_sync"
        # Modules in DDP have this attribute. FSDP2 reduces the gradients in any case.
        wrapped = [m for m in self.modules.values() if hasattr(m, name)] if use else []
        if not wrapped:
            # A shortcut for most steps.
            yield
            return
        with TemporaryAttributes() as temporary:
            for module in wrapped:
                temporary.set(module, name, False)
            yield

    # ------------------------------------------------------------------- data

    def make_dataloader(
        self,
        dataset: Any,
        stage: Stage,
        ckpt_prefix: str | None = "dataloader-",
        **loader_kwargs: Any,
    ) -> Any:
        """Creates the DataLoader that ``fit`` or ``evaluate`` uses for a dataset.

        Args:
            dataset: The dataset.
            stage: The stage that iterates over it. In TRAIN, shuffling is reproducible.
            ckpt_prefix: The checkpointer saves the position of the loader under this prefix
                followed by the stage's name. None saves no position.
            **loader_kwargs: Arguments of ``DataLoader``.

        Returns:
            The DataLoader.
        """
        if stage == Stage.TRAIN:
            loader_kwargs = self._train_loader_specifics(dataset, loader_kwargs)
        loader = data.make_dataloader(dataset, self.checkpointer, **loader_kwargs)
        is_saved = ckpt_prefix is not None and data.is_saveable(loader)
        if is_saved and self.checkpointer is not None:
            self.checkpointer.add_recoverable(f"{ckpt_prefix}{stage.name}", loader)
        return loader

    def _train_loader_specifics(
        self, dataset: Any, loader_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Adds the training sampler; recipes that override ``make_dataloader`` call it."""
        if self.distributed_launch:
            is_random = getattr(self.hparams, "sorting", "random") == "random"
            shard = {"rank": self._lightning.rank, "num_replicas": self._lightning.world_size}
            sampler = data.distributed_sampler(dataset, loader_kwargs, is_random, **shard)
        elif loader_kwargs.get("shuffle"):
            sampler = {"sampler": data.shuffling_sampler(dataset, loader_kwargs)}
        else:
            return loader_kwargs
        for self.train_sampler in sampler.values():
            loader_kwargs.pop("shuffle", None)
        return {**loader_kwargs, **sampler}

    # -------------------------------------------- parts of SpeechBrain's own loops

    def _should_save_intra_epoch_ckpt(
        self, last_ckpt_time: float, steps_since_ckpt: int
    ) -> bool:
        """Whether to save a checkpoint now; recipes may override it."""
        if self.checkpointer is None:
            return False
        return interval.is_due(self, last_ckpt_time, steps_since_ckpt)

    def _save_intra_epoch_ckpt(self) -> None:
        """Saves a checkpoint within an epoch; recipes may override it."""
        interval.save(self.checkpointer)
