"""Checks custom loops: which Trainer arguments have an effect in them."""

from __future__ import annotations

from collections.abc import Iterator

from .remark import ARGUMENTS, DDP, FSDP2, Remark, remark
from .source import BrainSource

PARTS = ("_fit_train", "_fit_valid")
# Trainer arguments that act on the epochs of a fit.
EPOCH_ARGUMENTS = (
    "max_epochs", "min_epochs", "max_steps", "max_time", "check_val_every_n_epoch",
    "val_check_interval", "fast_dev_run", "overfit_batches",
    "reload_dataloaders_every_n_epochs",
)  # fmt: skip
# Trainer arguments that act on the batches of any stage.
BATCH_ARGUMENTS = (
    "fast_dev_run", "overfit_batches", "precision", "callbacks", "enable_progress_bar",
    "profiler", "barebones",
)  # fmt: skip
STAGE_ARGUMENTS = {
    "_fit_train": (
        *BATCH_ARGUMENTS, "limit_train_batches", "accumulate_grad_batches",
        "gradient_clip_val", "gradient_clip_algorithm", "log_every_n_steps", "max_steps",
        "max_time", "val_check_interval", "detect_anomaly",
        "reload_dataloaders_every_n_epochs",
    ),
    "_fit_valid": (
        *BATCH_ARGUMENTS, "limit_val_batches", "val_check_interval", "check_val_every_n_epoch",
    ),
    "evaluate": (*BATCH_ARGUMENTS, "limit_test_batches"),
}  # fmt: skip


def has_custom_fit(brain: BrainSource) -> bool:
    """Returns whether a Brain's ``fit`` uses nothing of Brain's ``fit``.

    Args:
        brain: The Brain.

    Returns:
        True if its ``fit`` calls neither ``super().fit`` nor ``_fit_train`` or ``_fit_valid``.
    """
    if not brain.is_replaced("fit"):
        return False
    called = {name for method in brain.every(brain.reached_from(["fit"]))
              for found in (method.reads, method.supers) for name in found}  # fmt: skip
    return not called & {*PARTS}


def loop_remarks(brain: BrainSource) -> Iterator[Remark]:
    """Checks the loops that a Brain overrides.

    Args:
        brain: The Brain.

    Yields:
        Remarks, the most important first.
    """
    if "fit" in brain.chains:
        yield _fit_remark(brain)
    if not has_custom_fit(brain):
        yield from (_part_remark(brain, name) for name in PARTS if brain.is_replaced(name))
    for part in PARTS:
        for method in brain.chains.get(part, []):
            if part in method.super_in_branch and not brain.is_replaced(part):
                yield _conditional_remark(part, method.at)
    if brain.is_replaced("evaluate"):
        yield _part_remark(brain, "evaluate")
    if "fit" in brain.reads and "fit" not in brain.chains:
        says = "A fit within a fit uses the device, strategy and precision of the outer "
        says += "Trainer, but not its limits and callbacks."
        yield remark("fit", says, brain.reads["fit"][0])


def _fit_remark(brain: BrainSource) -> Remark:
    method = brain.chains["fit"][0]
    name = f"{method.owner}.fit"
    refused = "trainer.fit(to_lightning(brain)) is not supported. Call brain.fit."
    if not brain.is_replaced("fit"):
        # super().fit is called, and runs on the Trainer.
        return Remark("fit", f"{name} calls super().fit, which runs on a Trainer. {refused}",
                      method.at.line, method.at.file)  # fmt: skip
    if has_custom_fit(brain):
        says = (
            f"{name} is a custom loop and runs unchanged, so Trainer arguments and callbacks "
            "have no effect in it. Call self._fit_train and self._fit_valid in it, or "
            f"super().fit. {refused}"
        )
        return remark("fit", says, method.at, *ARGUMENTS, DDP, FSDP2)
    says = (
        f"{name} is a custom loop. Each _fit_train and _fit_valid that it calls is a stage of "
        "one Trainer, but the loop sets the number of epochs. After the Trainer stops, later "
        f"stages run no batch, and a warning is logged. {refused}"
    )
    wraps = {"on_fit_start", "_wrap_distributed"} & {*brain.reads, *brain.supers}
    return remark("fit", says, method.at, *EPOCH_ARGUMENTS, *([] if wraps else [DDP, FSDP2]))


def _part_remark(brain: BrainSource, name: str) -> Remark:
    method = brain.chains[name][0]
    says = (
        f"{method.owner}.{name} is overridden without super().{name} and runs unchanged, with "
        "a warning. Limits, batch hooks of callbacks, precision and the progress bar have no "
        f"effect in it. Call super().{name}, which is a stage of the Trainer."
    )
    return remark(name, says, method.at, *STAGE_ARGUMENTS[name])


def _conditional_remark(name: str, at: tuple[str, int]) -> Remark:
    stage, argument = {
        "_fit_train": ("training", "max_epochs"),
        "_fit_valid": ("validation", "check_val_every_n_epoch"),
    }[name]
    says = (
        f"super().{name} is called within an if. An epoch without the call has no {stage}, "
        "and no new values for callbacks that monitor it."
    )
    return Remark(name, says, at[1], at[0], [argument])
