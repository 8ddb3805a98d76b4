"""A remark, and the Trainer arguments and strategies that it may exclude."""

from __future__ import annotations

from dataclasses import dataclass, field

from .method import Location

ONE_DEVICE = "one device"
DDP = "strategy=ddp"
FSDP2 = "strategy=fsdp2"
ARGUMENTS = (
    "accelerator", "devices", "num_nodes", "precision", "logger", "callbacks", "fast_dev_run",
    "max_epochs", "min_epochs", "max_steps", "max_time", "limit_train_batches",
    "limit_val_batches", "limit_test_batches", "overfit_batches", "val_check_interval",
    "check_val_every_n_epoch", "log_every_n_steps", "enable_checkpointing",
    "enable_progress_bar", "accumulate_grad_batches", "gradient_clip_val",
    "gradient_clip_algorithm", "deterministic", "benchmark", "profiler", "detect_anomaly",
    "barebones", "reload_dataloaders_every_n_epochs",
)  # fmt: skip


@dataclass(frozen=True)
class Remark:
    """A problem in a recipe, and the change that solves it.

    Attributes:
        about: A Trainer argument, a strategy or a method of the Brain.
        says: Sentences that describe the problem and the remedy.
        line: Line to change.
        file: File that contains the line.
        limits: Trainer arguments and strategies that do not work for this reason.
    """

    about: str
    says: str
    line: int
    file: str = ""
    limits: list[str] = field(default_factory=list)


def remark(about: str, says: str, at: Location, *limits: str) -> Remark:
    """Creates a remark.

    Args:
        about: See ``Remark``.
        says: See ``Remark``.
        at: File and line of the remark.
        *limits: See ``Remark``. Default: ``about``.

    Returns:
        The remark.
    """
    return Remark(about, says, at.line, at.file, list(limits or [about]))
