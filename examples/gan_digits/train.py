"""Draws handwritten digits with a conditional GAN: a recipe with its own ``fit_batch``.

Run it as ``python train.py hparams.yaml [--overrides]``. It runs on SpeechBrain too: import
``Brain``, ``Stage`` and ``parse_arguments`` from ``speechbrain``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hyperpyyaml import load_hyperpyyaml
from model import DIGITS
from samples import draw_grid, legibility, written_digits
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from brain_lightning import Brain, Stage, parse_arguments

Batch = tuple[Tensor, Tensor]


class GANBrain(Brain):
    """A generator and a discriminator, each with an optimizer, two updates a batch.

    Attributes:
        legible: The part of the samples that could be read at the end of the last epoch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.legible = float("nan")
        # The same at the end of every epoch, so that pictures can be compared.
        count = self.hparams.samples_per_digit
        self.sample_digits = torch.arange(DIGITS).repeat_interleave(count)
        self.sample_noise = torch.randn(DIGITS * count, self.hparams.noise)

    def compute_forward(self, batch: Batch, stage: Stage) -> Tensor:
        """Draws as many digits as the batch has, and the same ones.

        Args:
            batch: Images and which digits they are.
            stage: TRAIN.

        Returns:
            Images, (images, pixels).
        """
        digits = batch[1].to(self.device)
        noise = torch.randn(len(digits), self.hparams.noise, device=digits.device)
        return self.modules.generator(noise, digits)

    def compute_objectives(self, predictions: Tensor, batch: Batch, stage: Stage) -> Tensor:
        """Asks the discriminator, which should take the drawings for written digits.

        Args:
            predictions: Drawn images.
            batch: Images and which digits they are.
            stage: TRAIN.

        Returns:
            The generator's loss.
        """
        scores = self.modules.discriminator(predictions, batch[1].to(self.device))
        return binary_cross_entropy_with_logits(scores, torch.ones_like(scores))

    def fit_batch(self, batch: Batch) -> Tensor:
        """One update of the discriminator, then one of the generator.

        Args:
            batch: Images and which digits they are.

        Returns:
            The sum of both losses, detached.
        """
        drawn = self.compute_forward(batch, Stage.TRAIN)
        d_loss = self.discriminator_loss(drawn.detach(), batch)
        d_loss.backward()
        self.d_optimizer.step()
        self.d_optimizer.zero_grad()

        g_loss = self.compute_objectives(drawn, batch, Stage.TRAIN)
        g_loss.backward()
        self.g_optimizer.step()
        self.g_optimizer.zero_grad()
        # What the generator's loss left in the discriminator is not meant for it.
        self.d_optimizer.zero_grad()
        self.optimizer_step += 1
        return (d_loss + g_loss).detach().cpu()

    def discriminator_loss(self, drawn: Tensor, batch: Batch) -> Tensor:
        """How well the discriminator tells drawn from written digits.

        Args:
            drawn: Drawn images.
            batch: Written images and which digits they are.

        Returns:
            The discriminator's loss.
        """
        written, digits = (part.to(self.device) for part in batch)
        on_written = self.modules.discriminator(written, digits)
        on_drawn = self.modules.discriminator(drawn, digits)
        real = torch.full_like(on_written, self.hparams.real_label)
        return binary_cross_entropy_with_logits(
            on_written, real
        ) + binary_cross_entropy_with_logits(on_drawn, torch.zeros_like(on_drawn))

    def init_optimizers(self) -> None:
        """Makes an optimizer for the generator and one for the discriminator."""
        self.g_optimizer = self.hparams.g_opt_class(self.modules.generator.parameters())
        self.d_optimizer = self.hparams.d_opt_class(self.modules.discriminator.parameters())
        self.optimizers_dict = {"g": self.g_optimizer, "d": self.d_optimizer}

    @torch.no_grad()
    def samples(self) -> Tensor:
        """Draws the same digits from the same noise at each call.

        Returns:
            Images on the CPU, (digits * samples per digit, pixels).
        """
        self.modules.eval()
        noise, digits = self.sample_noise, self.sample_digits
        return self.modules.generator(noise.to(self.device), digits.to(self.device)).cpu()

    def on_stage_end(self, stage: Stage, stage_loss: float, epoch: int | None = None) -> None:
        """Reports the epoch, and shows what is drawn by now.

        Args:
            stage: TRAIN.
            stage_loss: The average sum of both losses.
            epoch: Its epoch.
        """
        images = self.samples()
        self.legible = legibility(images, self.sample_digits)
        if epoch is not None and epoch % self.hparams.draw_every == 0:
            print(f"epoch {epoch:3d}  loss {stage_loss:.3f}  legible {self.legible:.1%}")
            self.draw(images, epoch)

    def draw(self, images: Tensor, epoch: int) -> Path:
        """Writes the samples.

        Args:
            images: What ``samples`` returned.
            epoch: The epoch that they are of.

        Returns:
            The file.
        """
        path = Path(self.hparams.output_folder) / f"samples_{epoch:03d}.png"
        title = f"Drawn after epoch {epoch}: {self.legible:.0%} legible"
        draw_grid(images, DIGITS, title, path)
        return path


def main(arguments: Sequence[str] | None = None) -> GANBrain:
    """Trains, draws and sums up.

    Args:
        arguments: The words of the command line; ``sys.argv[1:]`` if not given.

    Returns:
        The trained Brain.
    """
    start = time.perf_counter()
    hparams_file, run_opts, overrides = parse_arguments(arguments)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    brain = GANBrain(modules=hparams["modules"], hparams=hparams, run_opts=run_opts)
    epochs = hparams["number_of_epochs"]
    brain.fit(
        range(1, epochs + 1),
        written_digits(),
        train_loader_kwargs=hparams["train_loader_kwargs"],
    )
    picture = brain.draw(brain.samples(), epochs)
    print(
        f"legible samples  {brain.legible:.1%}\n"
        f"epochs           {epochs}\n"
        f"seconds          {time.perf_counter() - start:.1f}\n"
        f"samples          {picture}"
    )
    return brain


if __name__ == "__main__":
    main()
