"""What of SpeechBrain's a port replaces, and by what of ours; everything else stays."""

from __future__ import annotations

from typing import NamedTuple

OURS = "brain_lightning"
COUNTERS_AND_CHECKPOINTER = {
    "speechbrain.utils.checkpoints.Checkpointer": "Checkpointer",
    "speechbrain.utils.epoch_loop.EpochCounter": "EpochCounter",
    "speechbrain.utils.epoch_loop.EpochCounterWithStopper": "EpochCounterWithStopper",
}
# The dotted name that a script imports it by, and its name in brain_lightning.
IN_SCRIPTS = {
    **{f"{module}.{name}": name
       for module in ("speechbrain", "speechbrain.core")
       for name in ("Brain", "Stage", "parse_arguments")},
    **COUNTERS_AND_CHECKPOINTER,
}  # fmt: skip
# The name after ``!new:`` and other tags, and what it becomes.
IN_YAML = {name: f"{OURS}.{ours}" for name, ours in COUNTERS_AND_CHECKPOINTER.items()}
# The Trainer starts the process group.
STARTS_PROCESS_GROUP = "speechbrain.utils.distributed.ddp_init_group"
BRAINS = frozenset(
    [*(name for name, ours in IN_SCRIPTS.items() if ours == "Brain"),
     "brain_lightning.Brain", "brain_lightning.brain.Brain",
     "brain_lightning.brain.brain.Brain"]
)  # fmt: skip
MODULES = frozenset(name.rpartition(".")[0] for name in IN_SCRIPTS)


class Remark(NamedTuple):
    """What a port leaves as it is.

    Attributes:
        file: Where it is.
        line: On which line.
        says: What it is, why it stays, and what can be done about it.
    """

    file: str
    line: int
    says: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.says}"
