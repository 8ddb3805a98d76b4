"""The real images, and how generated images are measured and drawn."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
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


@cache
def _reader() -> KNeighborsClassifier:
    images, digits = written_digits().tensors
    return KNeighborsClassifier(n_neighbors=3).fit(images.numpy(), digits.numpy())


def legibility(images: Tensor, digits: Tensor) -> float:
    """Returns the share of images that a classifier recognizes as the intended digit.

    The classifier is 3-nearest-neighbours, fitted on the real images.

    Args:
        images: Generated images, (images, pixels).
        digits: Intended digits, (images,).

    Returns:
        A number from 0 to 1; random images give about 0.1.
    """
    return float((torch.tensor(_reader().predict(images.numpy())) == digits).double().mean())


def draw_grid(images: Tensor, rows: int, title: str, path: str | Path) -> None:
    """Draws images as a grid.

    Args:
        images: Images row by row, (images, pixels).
        rows: Number of rows.
        title: Title of the picture.
        path: Path of the PNG file; its folder is created.
    """
    columns = len(images) // rows
    tiles = images.view(rows, columns, SIDE, SIDE)
    # One dark pixel between two neighbours.
    tiles = torch.nn.functional.pad(tiles, (0, 1, 0, 1))
    picture = tiles.permute(0, 2, 1, 3).reshape(rows * (SIDE + 1), columns * (SIDE + 1))
    figure = Figure(figsize=(columns * 0.5, rows * 0.5 + 0.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture[:-1, :-1].numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
    axes.set_title(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
