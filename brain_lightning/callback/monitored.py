"""Warns before training if a callback monitors a name that the recipe does not report."""

from __future__ import annotations

import difflib
import re
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from brain_lightning.compat.speechbrain import metrics_code
from brain_lightning.lightning_internals.trainer_callbacks import callbacks_of
from brain_lightning.protocol import BrainProtocol
from brain_lightning.references import own_methods, referenced, texts, texts_in
from brain_lightning.stage import Stage
from brain_lightning.stages.metrics import staged

# Separators between the parts of a name. Code may join parts, for example f"{task}_{name}".
SEPARATORS = "_/.-"
# Words in names that users expect a loss to have, although the loss has another name.
WORDS_OF_A_LOSS = {
    "train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing",
    "loss", "epoch", "step", "avg", "mean",
}  # fmt: skip


def warn_of_unknown_names(trainer: Trainer, brain: BrainProtocol, validates: bool) -> None:
    """Warns before training if the code does not seem to report a monitored name.

    Lightning raises an error only when it looks up the name, at the end of an epoch. This
    check searches the source code for the name or its parts, so it can miss a name.

    Args:
        trainer: The Trainer in ``setup``.
        brain: The Brain that is about to fit.
        validates: Whether the Trainer validates.
    """
    monitoring = [c for c in callbacks_of(trainer) if isinstance(_monitor_of(c), str)]
    if not monitoring:
        return
    methods = own_methods(brain)
    validates = validates or "_fit_valid" in {*methods, *referenced(brain, methods)}
    losses = ["train_loss", "train_loss_step", *["valid_loss"] * validates, "loss"]
    found = _texts_of(trainer, brain)
    for callback in monitoring:
        own = ("epoch", "step") if isinstance(callback, ModelCheckpoint) else ()
        name = _monitor_of(callback)
        if name not in (*losses, *own) and not _may_be_reported(name, found, validates):
            rank_zero_warn(_message(callback, name, brain, losses))


def _monitor_of(callback: Callback) -> Any:
    return getattr(callback, "monitor", None)


def _message(callback: Callback, name: str, brain: BrainProtocol, losses: list[str]) -> str:
    recipe = type(brain).__name__
    close = difflib.get_close_matches(name, losses, 1)
    found = f"{type(callback).__name__}(monitor={name!r})"
    return (
        f"{found}: the code of {recipe} does not seem to report a metric of this name. "
        f"Available are {', '.join(losses)}, and the metrics that the recipe passes to "
        "train_logger.log_stats (as valid_WER) and to the meta of its checkpoints (as WER)."
        + (f" Did you mean {close[0]!r}?" if close else "")
    )


def _texts_of(trainer: Trainer, brain: BrainProtocol) -> set[str]:
    """Returns every string in the code that may be the name of a metric, or a part of one."""
    hparams = getattr(brain, "hparams", None)
    found = texts(brain) | texts_in(getattr(hparams, "__dict__", hparams))
    for callback in callbacks_of(trainer):
        # A user's callback may call self.log.
        found |= texts(callback)
    # Recipes may report the summaries of SpeechBrain's metrics unchanged.
    return found | texts_in(metrics_code())


def _may_be_reported(name: str, found: set[str], validates: bool) -> bool:
    if name in found or name.startswith("lr-"):
        # LearningRateMonitor logs learning rates as "lr-" and the optimizer's name.
        return True
    if any(_is_affix(text, name) for text in found):
        return True
    # The losses of several validation sets have a number or a name at the end.
    if name.startswith("valid_loss_"):
        return validates
    words = _words(name)
    if "loss" in words and words <= WORDS_OF_A_LOSS:
        return False
    bare = re.sub(_STAGE, "", name)
    return bare in found or words - _STAGES <= {w for text in found for w in _words(text)}


_STAGES = {stage.name.lower() for stage in Stage}
_STAGE = "^" + "|^".join(staged(stage, "") for stage in Stage)


def _words(text: str) -> set[str]:
    """Returns the parts of a name except for numbers; an empty set for a sentence."""
    if any(character.isspace() for character in text):
        return set()
    parts = re.split(f"[{re.escape(SEPARATORS)}]", text)
    return {part for part in parts if part and not part.isdigit()}


def _is_affix(text: str, name: str) -> bool:
    """Whether the name starts or ends with a string, as ``f"val_{name}"`` with ``val_``."""
    if len(text) < 2:
        return False
    begins = text[-1] in SEPARATORS and name.startswith(text)
    return begins or (text[0] in SEPARATORS and name.endswith(text))
