"""A training whose loss becomes NaN: ``python train.py hparams.yaml --cause=loss``.

One example of the data is silent, all zeros. ``--cause=loss`` divides it by its standard
deviation, 0, so the loss is NaN. ``--cause=gradient`` takes the square root of its energy, 0:
the loss is finite, and its gradient is NaN.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from hyperpyyaml import load_hyperpyyaml
from torch import Tensor

from brain_lightning import Brain, Stage, parse_arguments

EXAMPLES = 40


class EnergyBrain(Brain):
    """Learns a projection in which each example has an energy of 1."""

    def compute_forward(self, batch: dict[str, Any], stage: Stage) -> Tensor:
        """Projects the signals.

        Args:
            batch: Signals and their ids.
            stage: TRAIN.

        Returns:
            The projections, (examples, features).
        """
        signals = batch["signal"].to(self.device)
        if self.hparams.cause == "loss":
            signals = signals / signals.std(dim=1, keepdim=True)
        return self.modules.model(signals)

    def compute_objectives(
        self, predictions: Tensor, batch: dict[str, Any], stage: Stage
    ) -> Tensor:
        """Returns the mean squared distance of the energies from 1.

        Args:
            predictions: The projections.
            batch: Signals and their ids.
            stage: TRAIN.

        Returns:
            The loss.
        """
        return (predictions.pow(2).sum(dim=1).sqrt() - 1).pow(2).mean()

    def on_stage_end(self, stage: Stage, stage_loss: float, epoch: int | None = None) -> None:
        """Reports and saves.

        Args:
            stage: TRAIN.
            stage_loss: The mean loss.
            epoch: The number of the epoch.
        """
        print(f"epoch {epoch}  train loss {stage_loss:.4f}")
        self.checkpointer.save_and_keep_only(meta={"loss": stage_loss})


def signals(silent: int) -> list[dict[str, Any]]:
    """Returns the examples.

    Args:
        silent: The number of the example that is silent.
    """
    examples = [{"id": f"utt{i:03d}", "signal": torch.randn(100)} for i in range(EXAMPLES)]
    examples[silent]["signal"].zero_()
    return examples


if __name__ == "__main__":
    hparams_file, run_opts, overrides = parse_arguments()
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    brain = EnergyBrain(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    brain.fit(
        brain.hparams.epoch_counter,
        signals(hparams["silent"]),
        train_loader_kwargs={"batch_size": 4},
    )
