"""Generates handwritten digits with a conditional GAN: a recipe that overrides ``fit_batch``.

Run it as ``python train.py hparams.yaml [--overrides]``. The recipe also runs on SpeechBrain:
import ``Brain``, ``Stage`` and ``parse_arguments`` from ``speechbrain``.
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
    """Trains a generator and a discriminator, each with its own optimizer.

    Each batch makes two updates, one of the discriminator and one of the generator.

    Attributes:
        legible: Share of the samples that were recognized at the end of the last epoch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.legible = float("nan")
        # Fixed, so that the pictures of different epochs can be compared.
        count = self.hparams.samples_per_digit
        self.sample_digits = torch.arange(DIGITS).repeat_interleave(count)
        self.sample_noise = torch.randn(DIGITS * count, self.hparams.noise)

    def compute_forward(self, batch: Batch, stage: Stage) -> Tensor:
        """Generates one image for each digit of the batch.

        Args:
            batch: Real images and their digits.
            stage: TRAIN.

        Returns:
            Generated images, (images, pixels).
        """
        digits = batch[1].to(self.device)
        noise = torch.randn(len(digits), self.hparams.noise, device=digits.device)
        return self.modules.generator(noise, digits)

    def compute_objectives(self, predictions: Tensor, batch: Batch, stage: Stage) -> Tensor:
        """Computes the loss of the generator.

        It is small if the discriminator takes the generated images for real ones.

        Args:
            predictions: Generated images, (images, pixels).
            batch: Real images and their digits.
            stage: TRAIN.

        Returns:
            The loss of the generator.
        """
        scores = self.modules.discriminator(predictions, batch[1].to(self.device))
        return binary_cross_entropy_with_logits(scores, torch.ones_like(scores))

    def fit_batch(self, batch: Batch) -> Tensor:
        """Updates the discriminator, then the generator.

        Args:
            batch: Real images and their digits.

        Returns:
            The sum of both losses, detached.
        """
        generated = self.compute_forward(batch, Stage.TRAIN)
        d_loss = self.discriminator_loss(generated.detach(), batch)
        d_loss.backward()
        self.d_optimizer.step()
        self.d_optimizer.zero_grad()

        g_loss = self.compute_objectives(generated, batch, Stage.TRAIN)
        g_loss.backward()
        self.g_optimizer.step()
        self.g_optimizer.zero_grad()
        # The backward pass of the generator's loss leaves gradients in the discriminator.
        self.d_optimizer.zero_grad()
        self.optimizer_step += 1
        return (d_loss + g_loss).detach().cpu()

    def discriminator_loss(self, generated: Tensor, batch: Batch) -> Tensor:
        """Computes the loss of the discriminator on real and generated images.

        Args:
            generated: Generated images, detached, (images, pixels).
            batch: Real images and their digits.

        Returns:
            The loss of the discriminator.
        """
        real_images, digits = (part.to(self.device) for part in batch)
        on_real = self.modules.discriminator(real_images, digits)
        on_generated = self.modules.discriminator(generated, digits)
        real = torch.full_like(on_real, self.hparams.real_label)
        return binary_cross_entropy_with_logits(
            on_real, real
        ) + binary_cross_entropy_with_logits(on_generated, torch.zeros_like(on_generated))

    def init_optimizers(self) -> None:
        """Creates one optimizer for the generator and one for the discriminator."""
        self.g_optimizer = self.hparams.g_opt_class(self.modules.generator.parameters())
        self.d_optimizer = self.hparams.d_opt_class(self.modules.discriminator.parameters())
        self.optimizers_dict = {"g": self.g_optimizer, "d": self.d_optimizer}

    @torch.no_grad()
    def samples(self) -> Tensor:
        """Generates images from the fixed noise and digits.

        Returns:
            Images on the CPU, (10 * samples per digit, pixels).
        """
        self.modules.eval()
        noise, digits = self.sample_noise, self.sample_digits
        return self.modules.generator(noise.to(self.device), digits.to(self.device)).cpu()

    def on_stage_end(self, stage: Stage, stage_loss: float, epoch: int | None = None) -> None:
        """Measures the samples. Every ``draw_every`` epochs, prints and draws the results.

        Args:
            stage: TRAIN.
            stage_loss: Average sum of both losses.
            epoch: Number of the epoch.
        """
        images = self.samples()
        self.legible = legibility(images, self.sample_digits)
        if epoch is not None and epoch % self.hparams.draw_every == 0:
            print(f"epoch {epoch:3d}  loss {stage_loss:.3f}  legible {self.legible:.1%}")
            self.draw(images, epoch)

    def draw(self, images: Tensor, epoch: int) -> Path:
        """Draws the samples.

        Args:
            images: Images from ``samples``.
            epoch: Number of the epoch; part of the file name.

        Returns:
            Path of the picture.
        """
        path = Path(self.hparams.output_folder) / f"samples_{epoch:03d}.png"
        title = f"Drawn after epoch {epoch}: {self.legible:.0%} legible"
        draw_grid(images, DIGITS, title, path)
        return path


def main(arguments: Sequence[str] | None = None) -> GANBrain:
    """Trains, draws the last samples and prints a summary.

    Args:
        arguments: Command-line arguments; ``sys.argv[1:]`` by default.

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
