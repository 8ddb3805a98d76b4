"""The modules: a generator and a discriminator of 8x8 images, conditioned on the digit."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

PIXELS = 64
DIGITS = 10


class Generator(nn.Module):
    """Generates images of given digits.

    Args:
        noise: Size of the noise vector.
        hidden: Number of units of each hidden layer.
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
        """Generates one image per digit.

        Args:
            noise: Standard normal noise, (images, noise).
            digits: Digits to generate, (images,).

        Returns:
            Brightness from 0 to 1, (images, pixels).
        """
        return self.layers(torch.cat([noise, one_hot(digits, DIGITS)], dim=1))


class Discriminator(nn.Module):
    """Distinguishes generated images from real ones.

    Args:
        hidden: Number of units of each hidden layer.
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
            images: Brightness from 0 to 1, (images, pixels).
            digits: Digits that the images should show, (images,).

        Returns:
            Logits; a positive value means "real", (images,).
        """
        return self.layers(torch.cat([images, one_hot(digits, DIGITS)], dim=1)).squeeze(1)
