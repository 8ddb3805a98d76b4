"""Clusters handwritten digits by k-means: a recipe without gradients.

There is no optimizer and no parameter. ``fit_batch`` sums up the images of each cluster, and
``on_stage_end`` moves the centroids (Lloyd's algorithm). Run it as ``python train.py
hparams.yaml [--overrides]``. The recipe also runs on SpeechBrain: import ``Brain``, ``Stage``
and ``parse_arguments`` from ``speechbrain``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from clusters import draw_centroids, written_digits
from hyperpyyaml import load_hyperpyyaml
from torch import Tensor

from brain_lightning import Brain, Stage, parse_arguments

Batch = tuple[Tensor, Tensor]


class KMeansBrain(Brain):
    """Clusters images. The digits are used only to evaluate the clusters.

    Attributes:
        distances: Mean squared distance to the nearest centroid, one value per epoch.
        purity: Share of the images that show the most frequent digit of their cluster.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distances: list[float] = []
        self.purity = float("nan")

    def compute_forward(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor]:
        """Finds the nearest centroid of each image.

        Args:
            batch: Images and their digits.
            stage: TRAIN or TEST.

        Returns:
            Squared distances to the nearest centroids, and their indices, both (images,).
        """
        nearest = self.modules.centroids(batch[0].to(self.device)).min(dim=1)
        return nearest.values, nearest.indices

    def compute_objectives(
        self, predictions: tuple[Tensor, Tensor], batch: Batch, stage: Stage
    ) -> Tensor:
        """Computes the objective of k-means, and counts the digits of each cluster in TEST.

        Args:
            predictions: Distances and indices from ``compute_forward``.
            batch: Images and their digits.
            stage: TRAIN or TEST.

        Returns:
            The mean squared distance.
        """
        distances, clusters = predictions
        if stage == Stage.TEST:
            self.members.index_put_(
                (clusters.cpu(), batch[1]), torch.ones(len(clusters)), accumulate=True
            )
        return distances.mean()

    def fit_batch(self, batch: Batch) -> Tensor:
        """Adds the images to the sums of their clusters.

        Args:
            batch: Images and their digits.

        Returns:
            The mean squared distance.
        """
        distances, clusters = self.compute_forward(batch, Stage.TRAIN)
        self.modules.centroids.gather(batch[0].to(self.device), clusters)
        return self.compute_objectives((distances, clusters), batch, Stage.TRAIN).cpu()

    def on_stage_start(self, stage: Stage, epoch: int | None = None) -> None:
        """Resets the counts of digits per cluster.

        Args:
            stage: TRAIN or TEST.
            epoch: Number of the epoch; None in TEST.
        """
        self.members = torch.zeros(self.hparams.clusters, 10)

    def on_stage_end(self, stage: Stage, stage_loss: float, epoch: int | None = None) -> None:
        """Moves the centroids in TRAIN, and computes the purity in TEST.

        Args:
            stage: TRAIN or TEST.
            stage_loss: Mean squared distance.
            epoch: Number of the epoch; None in TEST.
        """
        if stage == Stage.TRAIN:
            moved = self.modules.centroids.move()
            self.distances.append(stage_loss)
            print(f"epoch {epoch:2d}  squared distance {stage_loss:.4f}  moved {moved:.4f}")
        if stage == Stage.TEST:
            self.purity = float(self.members.amax(dim=1).sum() / self.members.sum())


def main(arguments: Sequence[str] | None = None) -> KMeansBrain:
    """Clusters, evaluates, draws the centroids and prints a summary.

    Args:
        arguments: Command-line arguments; ``sys.argv[1:]`` by default.

    Returns:
        The Brain after ``evaluate``.
    """
    hparams_file, run_opts, overrides = parse_arguments(arguments)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    brain = KMeansBrain(modules=hparams["modules"], hparams=hparams, run_opts=run_opts)
    loader_kwargs = hparams["train_loader_kwargs"]
    epochs = range(1, hparams["number_of_epochs"] + 1)
    brain.fit(epochs, written_digits(), train_loader_kwargs=loader_kwargs)
    distance = brain.evaluate(written_digits(), test_loader_kwargs=loader_kwargs)
    picture = Path(hparams["output_folder"]) / "centroids.png"
    title = f"{brain.hparams.clusters} centroids: {brain.purity:.0%} of the images in place"
    draw_centroids(brain.modules.centroids.centroids.cpu(), title, picture)
    print(
        f"squared distance  {distance:.4f}\n"
        f"purity            {brain.purity:.1%}\n"
        f"centroids         {picture}"
    )
    return brain


if __name__ == "__main__":
    main()
