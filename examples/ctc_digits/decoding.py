"""Decodes the output of the head to digits, and counts errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def greedy_decode(log_probs: Tensor, counts: Tensor, blank: int) -> list[list[int]]:
    """Takes the best class of each frame, merges repetitions and drops blanks.

    Args:
        log_probs: Output of the head, (lines, frames, classes).
        counts: Number of frames of each line, (lines,).
        blank: Index of the blank class.

    Returns:
        One list of digits per line.
    """
    best = log_probs.argmax(dim=-1)
    merged = [
        torch.unique_consecutive(line[:count]).tolist()
        for line, count in zip(best, counts.tolist(), strict=True)
    ]
    return [[label for label in line if label != blank] for line in merged]


def edit_distance(hypothesis: Sequence[int], reference: Sequence[int]) -> int:
    """Counts the substitutions, insertions and deletions between two sequences.

    Args:
        hypothesis: First sequence.
        reference: Second sequence.

    Returns:
        The smallest number of edits that turns one into the other (Levenshtein distance).
    """
    row = list(range(len(reference) + 1))
    for i, label in enumerate(hypothesis, start=1):
        diagonal, row[0] = row[0], i
        for j, expected in enumerate(reference, start=1):
            substituted = diagonal + (label != expected)
            diagonal, row[j] = row[j], min(substituted, row[j] + 1, row[j - 1] + 1)
    return row[-1]


@dataclass
class DigitErrors:
    """Counts errors over many lines.

    It has the methods ``append`` and ``summarize`` of SpeechBrain's ``MetricStats``. With
    ``--shard_eval``, these methods identify the object as a metric, and the counts of all
    processes are added up.

    Attributes:
        wrong: Number of edits.
        digits: Number of digits in the references.
    """

    wrong: int = 0
    digits: int = 0

    def append(self, hypothesis: Sequence[int], reference: Sequence[int]) -> None:
        """Adds one line.

        Args:
            hypothesis: Decoded digits.
            reference: True digits.
        """
        self.wrong += edit_distance(hypothesis, reference)
        self.digits += len(reference)

    def summarize(self) -> float:
        """Returns the number of edits per digit; 0 is perfect."""
        return self.wrong / max(self.digits, 1)
