"""The Brain: SpeechBrain's public surface, its loops run by Lightning's Trainer."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

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


class Brain(FitAndEvaluate, BrainBase):
    """Fits and evaluates a set of modules: subclass it and say how, as in SpeechBrain.

    Override ``compute_forward`` and ``compute_objectives``; where that is not
    enough, any other hook. ``fit`` and ``evaluate`` run on a Lightning Trainer,
    with SpeechBrain's numbers in SpeechBrain's order.

    Args:
        modules: The modules by name; moved to the device, trained and evaluated
            together, and given to the optimizer.
        opt_class: Makes the optimizer of a list of parameters.
        hparams: Hyperparameters by name, available as ``self.hparams.name``.
            Those named as a run option set it, and ``trainer`` (a dict) gives
            arguments to the Trainer.
        run_opts: Run options, from ``parse_arguments`` or a plain dict; they
            outrank ``hparams``.
        checkpointer: Recovers and saves what training needs to go on.

    Raises:
        BrainTypeError: An argument is of the wrong type.
        RunOptionError: A run option is unknown or its value makes no sense.
        UnsupportedError: A run option cannot be honoured.

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
            batch: What the loader yielded.
            stage: TRAIN, VALID or TEST.

        Returns:
            Whatever ``compute_objectives`` needs.
        """
        raise NotImplementedError

    def compute_objectives(self, predictions: Any, batch: Any, stage: Stage) -> Tensor:
        """Computes the loss; must be overridden.

        Args:
            predictions: What ``compute_forward`` returned.
            batch: What the loader yielded.
            stage: TRAIN, VALID or TEST.

        Returns:
            A tensor with one number, to minimize.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------- hooks

    def on_stage_start(self, stage: Stage, epoch: Any = None) -> None:
        """Called when a stage starts, before the modules change between train and eval.

        Args:
            stage: The stage.
            epoch: Its epoch; None in TEST.
        """

    def on_stage_end(self, stage: Stage, stage_loss: float, epoch: Any = None) -> None:
        """Called when a stage has ended, for statistics and checkpoints.

        Args:
            stage: The stage.
            stage_loss: The average loss over its batches.
            epoch: Its epoch; None in TEST.
        """

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        """Called before the forward pass of a training batch, outside autocast.

        Args:
            batch: What the loader yielded.
            should_step: Whether an update will follow.
        """

    def on_fit_batch_end(
        self, batch: Any, outputs: Any, loss: Tensor, should_step: bool
    ) -> None:
        """Called after the update; not for a batch that ``oom_patience`` skips.

        Args:
            batch: What the loader yielded.
            outputs: What ``compute_forward`` returned.
            loss: What ``compute_objectives`` returned.
            should_step: Whether there was an update; False where one was due
                but skipped, for its only loss was not finite.
        """

    # -------------------------------------------- beginning to fit or to evaluate

    def on_fit_start(self) -> None:
        """Begins ``fit``: compiles, makes the optimizers, loads the latest checkpoint."""
        self._compile()
        self._wrap_distributed()
        self.init_optimizers()
        if self.checkpointer is not None:
            self.checkpointer.recover_if_possible()

    def on_evaluate_start(
        self, max_key: str | None = None, min_key: str | None = None
    ) -> None:
        """Begins ``evaluate``: loads the best checkpoint.

        Args:
            max_key: The metric of which more is better.
            min_key: The metric of which less is better.
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
        """Fits one batch. Override it for more than one update a batch.

        Args:
            batch: What the loader yielded.

        Returns:
            The detached loss.
        """
        return fit_batch(self, batch, RawUpdate(self))

    def evaluate_batch(self, batch: Any, stage: Stage) -> Any:
        """Evaluates one batch.

        Args:
            batch: What the loader yielded.
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
            NonFiniteLossError: There were more than ``nonfinite_patience`` in
                this epoch.
        """
        if torch.isfinite(loss):
            return
        self.nonfinite_count += 1
        found = f"Loss is {loss.item()} at step {self.step}"
        patience = self.nonfinite_patience
        if self.nonfinite_count > patience:
            raise NonFiniteLossError(
                f"{found}: not finite, and the patience of {patience} is exhausted. To debug, "
                "wrap fit() with torch.autograd.detect_anomaly(), or pass "
                "trainer={'detect_anomaly': True}"
            )
        logger.warning(
            "%s: its update is skipped (%d of %d forgiven in this epoch).",
            found,
            self.nonfinite_count,
            patience,
        )

    def update_average(self, loss: Any, avg_loss: float) -> float:
        """Updates the running average of the loss; a loss that is not finite is left out.

        Args:
            loss: The detached loss of the batch that ``step`` counts.
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
        """Makes the optimizers. Override it for several, and fill ``optimizers_dict``."""
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
        """Chooses the optimizers that step. Override it to freeze some.

        Args:
            optimizers: All optimizers by name.

        Returns:
            Those that are active.
        """
        return optimizers

    def optimizers_step(self) -> None:
        """Clips, steps and zeroes; called once every ``grad_accumulation_factor`` batches."""
        optimizers_step(self, RawUpdate(self).apply)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zeroes the gradients of the active optimizers.

        Args:
            set_to_none: Frees them instead.
        """
        if self.optimizers_dict is not None:
            for opt in self.freeze_optimizers(self.optimizers_dict).values():
                opt.zero_grad(set_to_none=set_to_none)
        else:
            zero_grad_of_optimizer(self, set_to_none)

    def check_gradients(self, loss: Tensor | None = None) -> bool | None:
        """Drops each gradient that is not finite, and says whose it was.

        Args:
            loss: Given by a ``fit_batch`` of SpeechBrain 0.5: checks the loss, and clips the
                gradients of all modules as one by ``max_grad_norm``.

        Returns:
            None; with a loss whether the optimizer may step.

        Raises:
            NonFiniteLossError: See ``check_loss_isfinite``.
        """
        return check_gradients(self, loss)

    @contextmanager
    def no_sync(self, use: bool = True) -> Iterator[None]:
        """Keeps gradients local to this process while they accumulate.

        Args:
            use: False synchronizes as always.

        Yields:
            None
        """
        name = "require_backward_grad_sync"
        # In DDP; of shards gradients are averaged all the same.
        wrapped = [m for m in self.modules.values() if hasattr(m, name)] if use else []
        if not wrapped:
            # For most steps.
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
        """Makes the loader that ``fit`` or ``evaluate`` needs for a dataset.

        Args:
            dataset: The dataset.
            stage: The stage that iterates it; TRAIN shuffles reproducibly.
            ckpt_prefix: With the stage's name the key under which the
                checkpointer saves the position; None saves none.
            **loader_kwargs: Arguments of ``DataLoader``.

        Returns:
            The loader.
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
        """Shuffles and shards; recipes that override ``make_dataloader`` call it."""
        if self.distributed_launch:
            by_chance = getattr(self.hparams, "sorting", "random") == "random"
            shard = {"rank": self._lightning.rank, "num_replicas": self._lightning.world_size}
            sampler = data.distributed_sampler(dataset, loader_kwargs, by_chance, **shard)
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
        """Whether to save now; recipes may override it."""
        if self.checkpointer is None:
            return False
        return interval.is_due(self, last_ckpt_time, steps_since_ckpt)

    def _save_intra_epoch_ckpt(self) -> None:
        """Saves within an epoch; recipes may override it."""
        interval.save(self.checkpointer)
