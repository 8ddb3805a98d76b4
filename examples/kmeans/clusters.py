"""The centroids of k-means, the images that are clustered, and a picture of the centroids."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

SIDE = 8
# The brightness of the scans is from 0 to 16.
BRIGHTEST = 16


@cache
def written_digits() -> TensorDataset:
    """Returns scikit-learn's scans, (1797, pixels) from 0 to 1, and their digits, (1797,)."""
    images, digits = load_digits(return_X_y=True)
    return TensorDataset(
        torch.tensor(images / BRIGHTEST, dtype=torch.float32), torch.tensor(digits)
    )


class Centroids(nn.Module):
    """The centroids of all clusters, as buffers: there is no parameter and no gradient.

    Args:
        clusters: Number of clusters.
    """

    def __init__(self, clusters: int) -> None:
        super().__init__()
        images = written_digits().tensors[0]
        first = torch.randperm(len(images))[:clusters]
        self.register_buffer("centroids", images[first].clone())
        self.register_buffer("sums", torch.zeros_like(self.centroids))
        self.register_buffer("counts", torch.zeros(clusters))

    def forward(self, images: Tensor) -> Tensor:
        """Computes the squared distance of each image to each centroid.

        Args:
            images: Images, (images, pixels).

        Returns:
            Squared distances, (images, clusters).
        """
        return torch.cdist(images, self.centroids).square()

    def gather(self, images: Tensor, clusters: Tensor) -> None:
        """Adds images to the sums from which ``move`` computes the next centroids.

        Args:
            images: Images, (images, pixels).
            clusters: Index of the cluster of each image, (images,).
        """
        self.sums.index_add_(0, clusters, images)
        self.counts.index_add_(0, clusters, torch.ones_like(images[:, 0]))

    def move(self) -> float:
        """Moves each centroid to the mean of its images, and resets the sums.

        Returns:
            The norm of the change of all centroids.
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
        centroids: Centroids on the CPU, (clusters, pixels).
        title: Title of the picture.
        path: Path of the PNG file; its folder is created.
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
