"""From what the head says to digits, and how many of those are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def greedy_decode(log_probs: Tensor, counts: Tensor, blank: int) -> list[list[int]]:
    """Takes the best class of each frame, merges repetitions and drops blanks.

    Args:
        log_probs: What the head said, (lines, frames, classes).
        counts: The number of frames of each line.
        blank: The class that is no digit.

    Returns:
        The digits of each line.
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
        hypothesis: One sequence.
        reference: The other one.

    Returns:
        The smallest number that turns one into the other (Levenshtein).
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
    """Counts errors over many lines, with the methods of SpeechBrain's ``MetricStats``.

    By these, processes that share a validation out find it and add their counts up.

    Attributes:
        wrong: Edits so far.
        digits: Digits so far in the references.
    """

    wrong: int = 0
    digits: int = 0

    def append(self, hypothesis: Sequence[int], reference: Sequence[int]) -> None:
        """Adds one line.

        Args:
            hypothesis: What was read.
            reference: What is written there.
        """
        self.wrong += edit_distance(hypothesis, reference)
        self.digits += len(reference)

    def summarize(self) -> float:
        """Edits per digit: 0 is perfect."""
        return self.wrong / max(self.digits, 1)
