"""A generator and a discriminator of 8 x 8 digits, both told which digit is meant."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

PIXELS = 64
DIGITS = 10


class Generator(nn.Module):
    """Draws digits.

    Args:
        noise: Size of the noise that tells two drawings of a digit apart.
        hidden: Units of each hidden layer.
    """

    def __init__(self, noise: int, hidden: int) -> None:
        super().__init__()
        self.noise = noise
        self.layers = nn.Sequential(
            nn.Linear(noise + DIGITS, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, PIXELS),
            nn.Sigmoid(),
        )

    def forward(self, noise: Tensor, digits: Tensor) -> Tensor:
        """Draws one image for each digit.

        Args:
            noise: Standard normal, (images, noise).
            digits: Which digits, (images,).

        Returns:
            Brightness between 0 and 1, (images, pixels).
        """
        return self.layers(torch.cat([noise, one_hot(digits, DIGITS)], dim=1))


class Discriminator(nn.Module):
    """Tells drawn from written digits.

    Args:
        hidden: Units of each hidden layer.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(PIXELS + DIGITS, hidden),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(hidden, 1),
        )

    def forward(self, images: Tensor, digits: Tensor) -> Tensor:
        """Scores images.

        Args:
            images: Brightness between 0 and 1, (images, pixels).
            digits: Which digits they are said to be, (images,).

        Returns:
            Logits of being written by hand, (images,).
        """
        return self.layers(torch.cat([images, one_hot(digits, DIGITS)], dim=1)).squeeze(1)
