"""The names of SpeechBrain that a port replaces. All other names stay."""

from __future__ import annotations

from typing import NamedTuple

OURS = "brain_lightning"
COUNTERS_AND_CHECKPOINTER = {
    "speechbrain.utils.checkpoints.Checkpointer": "Checkpointer",
    "speechbrain.utils.epoch_loop.EpochCounter": "EpochCounter",
    "speechbrain.utils.epoch_loop.EpochCounterWithStopper": "EpochCounterWithStopper",
}
# Full names in SpeechBrain that scripts import, with their names in brain_lightning.
IN_SCRIPTS = {
    **{f"{module}.{name}": name
       for module in ("speechbrain", "speechbrain.core")
       for name in ("Brain", "Stage", "parse_arguments")},
    **COUNTERS_AND_CHECKPOINTER,
}  # fmt: skip
# Full names after ``!new:`` and other tags, with their replacements.
IN_YAML = {name: f"{OURS}.{ours}" for name, ours in COUNTERS_AND_CHECKPOINTER.items()}
# A function that a port removes, because the Trainer initializes the process group.
STARTS_PROCESS_GROUP = "speechbrain.utils.distributed.ddp_init_group"
BRAINS = frozenset(
    [*(name for name, ours in IN_SCRIPTS.items() if ours == "Brain"),
     "brain_lightning.Brain", "brain_lightning.brain.Brain",
     "brain_lightning.brain.brain.Brain"]
)  # fmt: skip
MODULES = frozenset(name.rpartition(".")[0] for name in IN_SCRIPTS)


class Remark(NamedTuple):
    """Code that a port leaves unchanged and that needs attention.

    Attributes:
        file: Path of the file.
        line: Line in the file.
        says: Sentences that describe the code, the reason and the remedy.
    """

    file: str
    line: int
    says: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.says}"
