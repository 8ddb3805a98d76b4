"""Centroids of k-means, the images they are found in, and a picture of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

SIDE = 8
# Brightness of the scans goes from 0 to 16.
BRIGHTEST = 16


@cache
def written_digits() -> TensorDataset:
    """scikit-learn's scans: images (1797, pixels) between 0 and 1, and which digits."""
    images, digits = load_digits(return_X_y=True)
    return TensorDataset(
        torch.tensor(images / BRIGHTEST, dtype=torch.float32), torch.tensor(digits)
    )


class Centroids(nn.Module):
    """The middle of each cluster; nothing here has a gradient.

    Args:
        clusters: How many there are.
    """

    def __init__(self, clusters: int) -> None:
        super().__init__()
        images = written_digits().tensors[0]
        first = torch.randperm(len(images))[:clusters]
        self.register_buffer("centroids", images[first].clone())
        self.register_buffer("sums", torch.zeros_like(self.centroids))
        self.register_buffer("counts", torch.zeros(clusters))

    def forward(self, images: Tensor) -> Tensor:
        """Squared distances to every centroid.

        Args:
            images: (images, pixels).

        Returns:
            (images, clusters).
        """
        return torch.cdist(images, self.centroids).square()

    def gather(self, images: Tensor, clusters: Tensor) -> None:
        """Remembers images for the next centroids.

        Args:
            images: (images, pixels).
            clusters: Which cluster each belongs to, (images,).
        """
        self.sums.index_add_(0, clusters, images)
        self.counts.index_add_(0, clusters, torch.ones_like(images[:, 0]))

    def move(self) -> float:
        """Moves each centroid to the mean of what was gathered.

        Returns:
            How far the centroids moved, all together.
        """
        found = self.counts > 0
        means = self.centroids.clone()
        means[found] = self.sums[found] / self.counts[found, None]
        moved = float((means - self.centroids).norm())
        self.centroids.copy_(means)
        self.sums.zero_()
        self.counts.zero_()
        return moved


def draw_centroids(centroids: Tensor, title: str, path: str | Path) -> None:
    """Draws each centroid as an image.

    Args:
        centroids: (clusters, pixels), on the CPU.
        title: What stands above.
        path: Where to write the PNG; its folder is made.
    """
    columns = 8
    rows = -(-len(centroids) // columns)
    figure = Figure(figsize=(columns, rows + 0.5), dpi=100, layout="constrained")
    for axes, centroid in zip(figure.subplots(rows, columns).flat, centroids, strict=False):
        axes.imshow(centroid.view(SIDE, SIDE).numpy(), cmap="gray")
    for axes in figure.axes:
        axes.set_axis_off()
    figure.suptitle(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
