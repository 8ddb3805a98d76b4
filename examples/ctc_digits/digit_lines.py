"""A dataset of lines of handwritten digits: scikit-learn's 8x8 scans, placed side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

# Fractions of the 1797 scans. Each scan belongs to one split only.
SPLITS = {"train": (0.0, 0.6), "valid": (0.6, 0.8), "test": (0.8, 1.0)}
# Fixed, so that the splits do not depend on the seed of the experiment.
SPLIT_SEED = 0

FRAME_SIZE = 8


class Line(NamedTuple):
    """One line: its columns as frames (columns, rows), and its digits."""

    frames: Tensor
    digits: Tensor


class Batch(NamedTuple):
    """Lines padded to the longest one. Lengths are fractions of it, as in SpeechBrain."""

    frames: Tensor
    frame_lengths: Tensor
    digits: Tensor
    digit_lengths: Tensor

    def to(self, device: str | torch.device) -> Batch:
        """Returns the batch on another device."""
        return Batch(*(tensor.to(device) for tensor in self))


class DigitLines(Dataset[Line]):
    """A fixed set of random lines, built from the scans of one split.

    Args:
        split: ``"train"``, ``"valid"`` or ``"test"``.
        size: Number of lines.
        digits: Smallest and largest number of digits per line.
        max_gap: Largest number of empty columns before a digit.
        augment: Function that changes the scans; called each time a line is read.
    """

    def __init__(
        self,
        split: str,
        size: int,
        digits: Sequence[int] = (3, 7),
        max_gap: int = 2,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.images, self.labels = load_split(split)
        self.augment = augment
        generator = torch.Generator().manual_seed(list(SPLITS).index(split))

        def draw(low: int, high: int, count: int) -> Tensor:
            return torch.randint(low, high, (count,), generator=generator)

        counts = draw(digits[0], digits[1] + 1, size).tolist()
        self.scans = [draw(0, len(self.images), count) for count in counts]
        self.gaps = [draw(0, max_gap + 1, count) for count in counts]

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, index: int) -> Line:
        images = self.images[self.scans[index]]
        if self.augment is not None:
            images = self.augment(images)
        return Line(side_by_side(images, self.gaps[index]), self.labels[self.scans[index]])


def load_split(split: str) -> tuple[Tensor, Tensor]:
    """Loads the scans of one split.

    Args:
        split: A key of ``SPLITS``.

    Returns:
        The scans, (scans, 8, 8) with values from 0 to 1, and their digits, (scans,).
    """
    scans = load_digits()
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(scans.target), generator=generator)
    first, last = (round(fraction * len(order)) for fraction in SPLITS[split])
    chosen = order[first:last]
    images = torch.from_numpy(scans.images).float() / 16
    return images[chosen], torch.from_numpy(scans.target)[chosen]


def side_by_side(images: Tensor, gaps: Tensor) -> Tensor:
    """Places scans side by side and returns the columns as frames.

    Args:
        images: Scans, (digits, rows, columns).
        gaps: Number of empty columns before each scan, (digits,).

    Returns:
        Frames, (columns of the line, rows).
    """
    spaced = [pad(i, (g, 0)) for i, g in zip(images, gaps.tolist(), strict=True)]
    return torch.cat(spaced, dim=1).T


def distort(images: Tensor, rotation: float, stretch: float, shift: float) -> Tensor:
    """Rotates, stretches and shifts each scan at random.

    Args:
        images: Scans, (digits, rows, columns).
        rotation: Largest angle, in degrees.
        stretch: Largest relative change of the width or the height.
        shift: Largest shift, in pixels.

    Returns:
        The changed scans, (digits, rows, columns).
    """
    count = len(images)
    angle = _uniform(count) * math.radians(rotation)
    width, height = 1 + stretch * _uniform(2, count)
    right, down = 2 * shift / FRAME_SIZE * _uniform(2, count)
    affine = torch.stack(
        [
            torch.stack([angle.cos() * width, -angle.sin() * height, right], dim=1),
            torch.stack([angle.sin() * width, angle.cos() * height, down], dim=1),
        ],
        dim=1,
    )
    pixels = images.unsqueeze(1)
    grid = affine_grid(affine, list(pixels.shape), align_corners=False)
    return grid_sample(pixels, grid, align_corners=False).squeeze(1)


def _uniform(*size: int) -> Tensor:
    return 2 * torch.rand(size) - 1


def pad_lines(lines: Sequence[Line]) -> Batch:
    """Pads lines to a batch; the ``collate_fn`` of the DataLoaders.

    Args:
        lines: Lines of different lengths.

    Returns:
        The padded batch.
    """
    frames, digits = zip(*lines, strict=True)
    return Batch(*_pad(frames), *_pad(digits))


def _pad(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    padded = pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return padded, lengths / padded.shape[1]


def absolute(lengths: Tensor, longest: int) -> Tensor:
    """Converts relative lengths to numbers of frames or digits.

    Args:
        lengths: Fractions of ``longest``.
        longest: Length that corresponds to 1.0.

    Returns:
        Integer lengths.
    """
    return (lengths * longest).round().long()
