"""The written digits, and a look at the drawn ones."""

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
# Brightness of the scans goes from 0 to 16.
BRIGHTEST = 16


@cache
def written_digits() -> TensorDataset:
    """scikit-learn's scans: images (1797, pixels) between 0 and 1, and which digits."""
    images, digits = load_digits(return_X_y=True)
    return TensorDataset(
        torch.tensor(images / BRIGHTEST, dtype=torch.float32), torch.tensor(digits)
    )


@cache
def _reader() -> KNeighborsClassifier:
    images, digits = written_digits().tensors
    return KNeighborsClassifier(n_neighbors=3).fit(images.numpy(), digits.numpy())


def legibility(images: Tensor, digits: Tensor) -> float:
    """The part of the images that a 3-nearest-neighbour classifier reads as meant.

    Args:
        images: Drawn digits, (images, pixels).
        digits: What they should be, (images,).

    Returns:
        Between 0 and 1; chance is 0.1.
    """
    return float((torch.tensor(_reader().predict(images.numpy())) == digits).double().mean())


def draw_grid(images: Tensor, rows: int, title: str, path: str | Path) -> None:
    """Writes images as a grid.

    Args:
        images: (images, pixels), one row after the other.
        rows: How many rows.
        title: What stands above.
        path: Where to write the PNG; its folder is made.
    """
    columns = len(images) // rows
    tiles = images.view(rows, columns, SIDE, SIDE)
    # One dark pixel between two images.
    tiles = torch.nn.functional.pad(tiles, (0, 1, 0, 1))
    picture = tiles.permute(0, 2, 1, 3).reshape(rows * (SIDE + 1), columns * (SIDE + 1))
    figure = Figure(figsize=(columns * 0.5, rows * 0.5 + 0.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.imshow(picture[:-1, :-1].numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_axis_off()
    axes.set_title(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
