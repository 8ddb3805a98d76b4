"""The modules: an encoder of frames, and a head that scores digits."""

from __future__ import annotations

import torch
from digit_lines import FRAME_SIZE, absolute
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Encoder(nn.Module):
    """Two 2-D convolutions, one convolution over the columns, and a bidirectional GRU.

    There is no pooling over columns, so each frame has one feature vector.

    Args:
        channels: Number of channels of the 2-D convolutions.
        hidden: Number of units of the GRU in each direction.
        dropout: Probability of dropout.
    """

    def __init__(self, channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.picture = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d((2, 1)),
            nn.Dropout(dropout),
        )
        self.columns = nn.Sequential(
            nn.Conv1d(channels * FRAME_SIZE // 2, 2 * hidden, 5, padding=2),
            nn.BatchNorm1d(2 * hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.gru = nn.GRU(2 * hidden, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Encodes lines.

        Args:
            frames: Columns of pixels, (lines, frames, rows).
            lengths: Relative lengths of the lines, (lines,).

        Returns:
            Features, (lines, frames, 2 * hidden).
        """
        pictures = frames.transpose(1, 2).unsqueeze(1)
        columns = self.columns(self.picture(pictures).flatten(1, 2))
        return self.dropout(self._read(columns.transpose(1, 2), lengths))

    def _read(self, columns: Tensor, lengths: Tensor) -> Tensor:
        # Packed, so that the backward GRU does not start in the padding.
        counts = absolute(lengths, columns.shape[1]).cpu()
        packed = pack_padded_sequence(columns, counts, batch_first=True, enforce_sorted=False)
        features, _ = self.gru(packed)
        return pad_packed_sequence(features, batch_first=True)[0]


class Head(nn.Module):
    """Scores every digit and the blank at each frame.

    Args:
        features: Size of a feature vector.
        classes: Number of digits plus one, for the blank.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Computes the scores.

        Args:
            features: Output of the encoder, (lines, frames, features).

        Returns:
            Log-probabilities, (lines, frames, classes).
        """
        return torch.log_softmax(self.linear(features), dim=-1)
