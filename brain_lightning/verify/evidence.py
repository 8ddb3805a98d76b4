"""Evidence that a Trainer ran one side. Two runs of the same loop prove nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NOTHING = (
    "no batch of a Brain was recorded, so there is nothing to compare. Use a script that "
    "calls fit or evaluate of SpeechBrain's Brain."
)


@dataclass(frozen=True)
class Evidence:
    """Counts of what the Trainer's side ran, by Brain class.

    Attributes:
        trained: Number of training objectives and optimizer steps.
        tested: Number of validation and test objectives.
        on_trainer: Number of training batches that a Trainer ran.
        others: Number of validation and test batches that a Trainer ran.
        loops: Loops that the recipe overrides, for example ``MyBrain.fit``.
    """

    trained: Mapping[str, int] = field(default_factory=dict)
    tested: Mapping[str, int] = field(default_factory=dict)
    on_trainer: Mapping[str, int] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)
    loops: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, side: Mapping[str, Any]) -> Evidence:
        """Creates the evidence from a recording.

        Args:
            side: Recording of the Trainer's side, see ``verify_recorder.record``.

        Returns:
            The evidence.
        """
        return cls(**{name: value for name, value in side.items() if name != "events"})

    @property
    def without_trainer(self) -> list[str]:
        """Brains that ran without a Trainer: in training, or in tests if none was trained."""
        trains = any(self.trained.values())
        done, ran = (self.trained, self.on_trainer) if trains else (self.tested, self.others)
        return [brain for brain, count in done.items() if count and not ran.get(brain)]

    @property
    def ran_nothing(self) -> bool:
        """Whether no Brain ran a batch."""
        counts = (self.trained, self.tested, self.on_trainer, self.others)
        return not any(any(count.values()) for count in counts)

    @property
    def own_loops(self) -> list[str]:
        """Loops that the recipe overrides, each once."""
        return list(dict.fromkeys(loop for loops in self.loops.values() for loop in loops))

    def missing(self) -> str:
        """Returns a message if no Trainer ran, or empty."""
        if self.ran_nothing:
            return NOTHING
        if not self.without_trainer:
            return ""
        loops = f" ({', '.join(self.own_loops)})" if self.own_loops else ""
        return (
            f"no Trainer ran a batch of {', '.join(self.without_trainer)}. Both sides ran the "
            f"same custom loop{loops}, so their equality proves nothing. Run brain-lightning "
            "doctor, which shows what to change."
        )

    def note(self) -> str:
        """Returns a note on loops that both sides ran, or empty."""
        if not self.own_loops:
            return ""
        loops = ", ".join(self.own_loops)
        return (
            f"Note: custom loop {loops}. Both sides ran its code. The methods of Brain that "
            "it calls ran on a Trainer."
        )
