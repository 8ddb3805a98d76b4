"""Reads lines of handwritten digits with CTC: a small SpeechBrain recipe.

Run it as ``python train.py hparams.yaml [--overrides]``. ``README.md`` explains it step by
step. The recipe also runs on SpeechBrain: import ``Brain``, ``Stage`` and ``parse_arguments``
from ``speechbrain``, import ``if_main_process`` from ``speechbrain.utils.distributed``, and
use ``speechbrain.utils.epoch_loop.EpochCounter`` in the YAML file.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curves import Epoch, draw_curves
from decoding import DigitErrors, greedy_decode
from digit_lines import Batch, absolute
from hyperpyyaml import load_hyperpyyaml
from torch import Tensor
from torch.nn.functional import ctc_loss

from brain_lightning import Brain, Stage, parse_arguments
from brain_lightning.distributed import if_main_process


class CTCBrain(Brain):
    """Trains an encoder and a head, each with its own optimizer.

    Attributes:
        history: One entry for each finished epoch.
        digit_errors: Errors of the current or last VALID or TEST stage.
        train_loss: Average loss of the last TRAIN stage.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.history: list[Epoch] = []
        self.digit_errors = DigitErrors()
        self.train_loss = float("nan")

    def compute_forward(self, batch: Batch, stage: Stage) -> Tensor:
        """Scores every digit and the blank at each frame.

        Args:
            batch: Padded lines.
            stage: TRAIN, VALID or TEST.

        Returns:
            Log-probabilities, (lines, frames, classes).
        """
        batch = batch.to(self.device)
        return self.modules.head(self.modules.encoder(batch.frames, batch.frame_lengths))

    def compute_objectives(self, predictions: Tensor, batch: Batch, stage: Stage) -> Tensor:
        """Computes the loss, and counts the errors in VALID and TEST.

        Args:
            predictions: Log-probabilities from ``compute_forward``.
            batch: Padded lines.
            stage: TRAIN, VALID or TEST.

        Returns:
            The CTC loss per digit.
        """
        batch = batch.to(self.device)
        frame_counts = absolute(batch.frame_lengths, batch.frames.shape[1])
        digit_counts = absolute(batch.digit_lengths, batch.digits.shape[1])
        if stage != Stage.TRAIN:
            self.count_errors(predictions, frame_counts, batch.digits, digit_counts)
        return ctc_loss(
            predictions.transpose(0, 1),
            batch.digits,
            frame_counts,
            digit_counts,
            blank=self.hparams.blank_index,
        )

    def init_optimizers(self) -> None:
        """Creates one optimizer for the encoder and one for the head."""
        self.optimizers_dict = {
            "encoder": self.hparams.encoder_opt_class(self.modules.encoder.parameters()),
            "head": self.hparams.head_opt_class(self.modules.head.parameters()),
        }
        if self.checkpointer is not None:
            for name, optimizer in self.optimizers_dict.items():
                self.checkpointer.add_recoverable(f"{name}_optimizer", optimizer)

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        """Resets the error counts.

        Args:
            stage: TRAIN, VALID or TEST.
            epoch: Number of the epoch; None in TEST.
        """
        self.digit_errors = DigitErrors()

    def on_stage_end(self, stage: Stage, stage_loss: float, epoch: int | None = None) -> None:
        """Reports the epoch and anneals the learning rates.

        Args:
            stage: TRAIN, VALID or TEST.
            stage_loss: Average loss over the batches of the stage.
            epoch: Number of the epoch; None in TEST.
        """
        if stage == Stage.TRAIN:
            self.train_loss = stage_loss
        if stage == Stage.VALID and epoch is not None:
            self.report(epoch, stage_loss)
            self.anneal()

    def count_errors(
        self, predictions: Tensor, frame_counts: Tensor, digits: Tensor, digit_counts: Tensor
    ) -> None:
        """Decodes a batch and compares it with the references.

        Args:
            predictions: Log-probabilities, (lines, frames, classes).
            frame_counts: Number of frames of each line.
            digits: Padded references, (lines, digits).
            digit_counts: Number of digits of each reference.
        """
        decoded = greedy_decode(predictions, frame_counts, self.hparams.blank_index)
        references = zip(digits.tolist(), digit_counts.tolist(), strict=True)
        for hypothesis, (reference, count) in zip(decoded, references, strict=True):
            self.digit_errors.append(hypothesis, reference[:count])

    def report(self, epoch: int, valid_loss: float) -> None:
        """Records the results of an epoch; the main process prints them.

        Args:
            epoch: Number of the epoch.
            valid_loss: Average validation loss.
        """
        rate = self.optimizers_dict["encoder"].param_groups[0]["lr"]
        errors = self.digit_errors.summarize()
        self.history.append(Epoch(epoch, rate, self.train_loss, valid_loss, errors))
        if if_main_process():
            print(
                f"epoch {epoch:2d}  lr {rate:.2e}  train loss {self.train_loss:.3f}  "
                f"valid loss {valid_loss:.3f}  valid digit error rate {errors:.2%}"
            )

    def anneal(self) -> None:
        """Lowers all learning rates if the error rate has stopped improving."""
        factor = self.hparams.annealing(self.digit_errors.summarize())
        for optimizer in self.optimizers_dict.values():
            for group in optimizer.param_groups:
                group["lr"] *= factor


def main(arguments: Sequence[str] | None = None) -> tuple[CTCBrain, float]:
    """Trains, evaluates, draws the curves and prints a summary.

    Args:
        arguments: Command-line arguments; ``sys.argv[1:]`` by default.

    Returns:
        The trained Brain and its loss on the test lines.
    """
    start = time.perf_counter()
    hparams_file, run_opts, overrides = parse_arguments(arguments)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)

    brain = CTCBrain(modules=hparams["modules"], hparams=hparams, run_opts=run_opts)

    brain.fit(
        hparams["epoch_counter"],
        hparams["train_data"],
        hparams["valid_data"],
        train_loader_kwargs=hparams["train_loader_kwargs"],
        valid_loader_kwargs=hparams["test_loader_kwargs"],
    )

    test_loss = brain.evaluate(
        hparams["test_data"], test_loader_kwargs=hparams["test_loader_kwargs"]
    )

    if if_main_process():
        picture = Path(hparams["output_folder"]) / "curves.png"
        draw_curves(brain.history, test_loss, brain.digit_errors.summarize(), picture)
        print_summary(brain, test_loss, time.perf_counter() - start, picture)
    return brain, test_loss


def print_summary(brain: CTCBrain, test_loss: float, seconds: float, picture: Path) -> None:
    """Prints the results of the run.

    Args:
        brain: The Brain after ``evaluate``.
        test_loss: Average loss on the test lines.
        seconds: Duration of the whole run.
        picture: Path of the curves.
    """
    errors = brain.digit_errors
    rate = errors.summarize()
    print(
        f"test loss              {test_loss:.4f}\n"
        f"test digit error rate  {rate:.2%} ({errors.wrong} of {errors.digits})\n"
        f"epochs                 {len(brain.history)}\n"
        f"seconds                {seconds:.1f}\n"
        f"curves                 {picture}"
    )


if __name__ == "__main__":
    main()
