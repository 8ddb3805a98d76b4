"""Loops of a recipe's own: how far the Trainer reaches into them."""

from __future__ import annotations

from collections.abc import Iterator

from .remark import ARGUMENTS, DDP, FSDP2, Remark, remark
from .source import BrainSource

PARTS = ("_fit_train", "_fit_valid")
# Arguments that are about the epochs of a whole fit.
OF_EPOCHS = (
    "max_epochs", "min_epochs", "max_steps", "max_time", "check_val_every_n_epoch",
    "val_check_interval", "fast_dev_run", "overfit_batches",
    "reload_dataloaders_every_n_epochs",
)  # fmt: skip
# Arguments that reach into the batches of any stage.
OF_BATCHES = (
    "fast_dev_run", "overfit_batches", "precision", "callbacks", "enable_progress_bar",
    "profiler", "barebones",
)  # fmt: skip
OF_STAGE = {
    "_fit_train": (
        *OF_BATCHES, "limit_train_batches", "accumulate_grad_batches", "gradient_clip_val",
        "gradient_clip_algorithm", "log_every_n_steps", "max_steps", "max_time",
        "val_check_interval", "detect_anomaly", "reload_dataloaders_every_n_epochs",
    ),
    "_fit_valid": (
        *OF_BATCHES, "limit_val_batches", "val_check_interval", "check_val_every_n_epoch",
    ),
    "evaluate": (*OF_BATCHES, "limit_test_batches"),
}  # fmt: skip


def is_whole(brain: BrainSource) -> bool:
    """Whether a Brain's fit is its own from beginning to end.

    Args:
        brain: The Brain.

    Returns:
        True where its ``fit`` calls neither Brain's own nor a part of it.
    """
    if not brain.is_own("fit"):
        return False
    called = {name for method in brain.every(brain.reached_from(["fit"]))
              for found in (method.reads, method.supers) for name in found}  # fmt: skip
    return not called & {*PARTS}


def loop_remarks(brain: BrainSource) -> Iterator[Remark]:
    """What is to be known of a Brain's own loops.

    Args:
        brain: The Brain.

    Yields:
        Remarks, the one that matters most first.
    """
    if "fit" in brain.chains:
        yield _fit_remark(brain)
    if not is_whole(brain):
        yield from (_part_remark(brain, name) for name in PARTS if brain.is_own(name))
    for part in PARTS:
        for method in brain.chains.get(part, []):
            if part in method.super_in_branch and not brain.is_own(part):
                yield _conditional_remark(part, method.at)
    if brain.is_own("evaluate"):
        yield _part_remark(brain, "evaluate")
    if "fit" in brain.reads and "fit" not in brain.chains:
        says = "a fit within a fit gets device, strategy and precision of the outer Trainer, "
        says += "not its limits and callbacks"
        yield remark("fit", says, brain.reads["fit"][0])


def _fit_remark(brain: BrainSource) -> Remark:
    method = brain.chains["fit"][0]
    name = f"{method.owner}.fit"
    refused = "trainer.fit(to_lightning(brain)) is refused: call brain.fit"
    if not brain.is_own("fit"):
        # Brain's own is called, and runs on the Trainer as ever.
        return Remark("fit", f"{name} calls Brain's own, which runs on a Trainer; {refused}",
                      method.at.line, method.at.file)  # fmt: skip
    if is_whole(brain):
        says = (
            f"{name} is the recipe's own loop and runs as it is written: nothing of a Trainer "
            "reaches into it, no argument and no callback. Call self._fit_train and "
            f"self._fit_valid in it, or super().fit; {refused}"
        )
        return remark("fit", says, method.at, *ARGUMENTS, DDP, FSDP2)
    says = (
        f"{name} is the recipe's own loop: each _fit_train and _fit_valid that it calls is a "
        "stage of one Trainer, but how many epochs there are is for the loop to say. Where "
        "the Trainer stops, its later stages run no batch, with a warning; "
        f"{refused}"
    )
    wraps = {"on_fit_start", "_wrap_distributed"} & {*brain.reads, *brain.supers}
    return remark("fit", says, method.at, *OF_EPOCHS, *([] if wraps else [DDP, FSDP2]))


def _part_remark(brain: BrainSource, name: str) -> Remark:
    method = brain.chains[name][0]
    says = (
        f"{method.owner}.{name} is written anew and runs as it is, with a warning: limits, "
        f"callbacks of batches, precision and the bar do not reach into it; super().{name} "
        "would be a stage of the Trainer's"
    )
    return remark(name, says, method.at, *OF_STAGE[name])


def _conditional_remark(name: str, at: tuple[str, int]) -> Remark:
    stage, argument = {
        "_fit_train": ("training", "max_epochs"),
        "_fit_valid": ("validation", "check_val_every_n_epoch"),
    }[name]
    says = (
        f"calls super().{name} in a branch: in an epoch without it there is no {stage}, and "
        "nothing new for callbacks that monitor it"
    )
    return Remark(name, says, at[1], at[0], [argument])
