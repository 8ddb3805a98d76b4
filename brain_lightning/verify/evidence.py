"""Whether a Trainer ran what is compared: two runs of one loop are no proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Evidence:
    """What the Trainer's side ran, by class of Brain.

    Attributes:
        trained: Objectives of training, and updates.
        tested: Objectives of validations and tests.
        on_trainer: Training batches that a Trainer ran.
        others: Batches of validations and tests that a Trainer ran.
        loops: Loops that are the recipe's own, as ``Own.fit``.
    """

    trained: Mapping[str, int] = field(default_factory=dict)
    tested: Mapping[str, int] = field(default_factory=dict)
    on_trainer: Mapping[str, int] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)
    loops: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, side: Mapping[str, Any]) -> Evidence:
        """Takes it from what was recorded.

        Args:
            side: See ``verify_recorder.record``.

        Returns:
            The evidence.
        """
        return cls(**{name: value for name, value in side.items() if name != "events"})

    @property
    def without_trainer(self) -> list[str]:
        """Brains that trained, or else were tested, without a Trainer."""
        trains = any(self.trained.values())
        done, ran = (self.trained, self.on_trainer) if trains else (self.tested, self.others)
        return [brain for brain, count in done.items() if count and not ran.get(brain)]

    @property
    def own_loops(self) -> list[str]:
        """Loops of the recipe's own, as ``Own.fit``, each once."""
        return list(dict.fromkeys(loop for loops in self.loops.values() for loop in loops))

    def missing(self) -> str:
        """What to say where no Trainer ran; empty where one did."""
        if not self.without_trainer:
            return ""
        loops = f" ({', '.join(self.own_loops)})" if self.own_loops else ""
        return (
            f"no Trainer ran a batch of {', '.join(self.without_trainer)}: both sides ran the "
            f"same loop, the recipe's own{loops}, and that they agree proves nothing; "
            "brain-lightning doctor says what to change"
        )

    def note(self) -> str:
        """What to say of loops that both sides have; empty where there are none."""
        if not self.own_loops:
            return ""
        loops = ", ".join(self.own_loops)
        return (
            f"note: {loops} is the recipe's own loop: both sides ran the same code there, and "
            "what it calls of Brain's ran on a Trainer"
        )
