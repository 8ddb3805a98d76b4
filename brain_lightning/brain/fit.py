"""``fit`` and ``evaluate`` of a Brain, ours or SpeechBrain's, on a Trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer

from brain_lightning.compat import speechbrain
from brain_lightning.data import dataloaders as data
from brain_lightning.errors import BrainTypeError
from brain_lightning.module.to_lightning import to_lightning
from brain_lightning.protocol import BrainProtocol
from brain_lightning.stages.run import Run

from . import own_trainer as trainers

logger = logging.getLogger(__name__)

# Arguments of the Trainer that hold for a fit within a fit too, as MetricGAN does it several
# times an epoch; the others, callbacks and limits among them, are meant for the outer one.
OF_EVERY_RUN = (
    "accelerator", "devices", "num_nodes", "strategy", "plugins", "precision", "deterministic",
    "benchmark", "detect_anomaly",
)  # fmt: skip


class FitAndEvaluate:
    """``speechbrain.Brain.fit`` and ``evaluate``, run by Lightning's Trainer."""

    def fit(
        self: BrainProtocol,
        epoch_counter: Iterable[Any],
        train_set: Any,
        valid_set: Any = None,
        progressbar: bool | None = None,
        train_loader_kwargs: Mapping[str, Any] = {},
        valid_loader_kwargs: Mapping[str, Any] = {},
        *,
        trainer: Trainer | Mapping[str, Any] | None = None,
    ) -> None:
        """Iterates epochs and datasets to improve the objective.

        Args:
            epoch_counter: Yields the number of each epoch.
            train_set: A DataLoader, or a dataset to make one for.
            valid_set: The same for validation; None validates nothing.
            progressbar: Whether to show a bar; by default unless ``noprogressbar``.
            train_loader_kwargs: Arguments of the training DataLoader.
            valid_loader_kwargs: Arguments of the validation DataLoader.
            trainer: A Trainer, or arguments for one; ``hparams["trainer"]`` if not
                given. ``--trainer.X=Y`` of the command line outranks both.

        Raises:
            BrainTypeError: ``epoch_counter`` is None, or ``trainer`` is neither of the two.
        """
        if epoch_counter is None:
            raise BrainTypeError(
                "epoch_counter is None: use EpochCounter(limit=10) or range(10)"
            )
        if self.test_only:
            logger.info("Test only mode, skipping training and validation stages.")
            return
        running = _trainer_for(self, trainer)
        stage = self._lightning.stage_type
        if not data.is_loader(train_set):
            train_set = self.make_dataloader(
                train_set, stage=stage.TRAIN, **train_loader_kwargs
            )
        if valid_set is not None and not data.is_loader(valid_set):
            kwargs = {"ckpt_prefix": None, **valid_loader_kwargs}
            valid_set = self.make_dataloader(valid_set, stage=stage.VALID, **kwargs)
        shows_bar = _shows_bar(self, progressbar)
        module = to_lightning(self, epoch_counter=epoch_counter, progressbar=shows_bar)
        trainers.run(running, module, lambda: running.fit(module, train_set, valid_set))

    def evaluate(
        self: BrainProtocol,
        test_set: Any,
        max_key: str | None = None,
        min_key: str | None = None,
        progressbar: bool | None = None,
        test_loader_kwargs: Mapping[str, Any] = {},
        *,
        trainer: Trainer | Mapping[str, Any] | None = None,
    ) -> float:
        """Evaluates on a dataset, by default with the best checkpoint.

        Args:
            test_set: A DataLoader, or a dataset to make one for.
            max_key: For ``on_evaluate_start``.
            min_key: For ``on_evaluate_start``.
            progressbar: Whether to show a bar; by default unless ``noprogressbar``.
            test_loader_kwargs: Arguments of the DataLoader.
            trainer: As for ``fit``.

        Returns:
            The average loss.
        """
        running = _trainer_for(self, trainer, collective=False)
        if not data.is_loader(test_set):
            kwargs = {**test_loader_kwargs, "ckpt_prefix": None}
            stage = self._lightning.stage_type.TEST
            test_set = self.make_dataloader(test_set, stage, **kwargs)
        shows_bar = _shows_bar(self, progressbar)
        module = to_lightning(self, progressbar=shows_bar, max_key=max_key, min_key=min_key)
        trainers.run(running, module, lambda: running.test(module, test_set, verbose=False))
        return module.run.test.average


def _shows_bar(brain: BrainProtocol, progressbar: bool | None) -> bool:
    return not brain.noprogressbar if progressbar is None else progressbar


def _trainer_for(
    brain: BrainProtocol, trainer: Trainer | Mapping[str, Any] | None, collective: bool = True
) -> Trainer:
    """The Trainer to run on: the command line outranks the call, which outranks hparams.

    Ranks train together; each evaluates alone, as in SpeechBrain.
    """
    speechbrain.add_attributes(brain)
    settings = brain._lightning
    given = settings.trainer_arguments if trainer is None else trainer
    if settings.trainer_overrides:
        if not isinstance(given, Mapping):
            name = next(iter(settings.trainer_overrides))
            raise BrainTypeError(
                f"--trainer.{name} cannot change {given!r}: give a dict of Trainer arguments"
            )
        given = {**given, **settings.trainer_overrides}
    if trainer is None and isinstance(given, Mapping) and Run.is_running(brain):
        given = {name: value for name, value in given.items() if name in OF_EVERY_RUN}
    return trainers.make_trainer(given, brain, collective)
