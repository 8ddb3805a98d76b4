"""The bar a person watches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from .protocol import BrainProtocol
from .stage import Stage


def progress_bar(
    brain: BrainProtocol, loader: Iterable[Any], stage: Stage, enable: bool
) -> tqdm[Any]:
    """SpeechBrain's bar over the batches of a stage.

    Args:
        brain: Gives the colour; a resumed training epoch starts at its ``step``.
        loader: The batches.
        stage: The stage that is starting.
        enable: Whether to show anything.

    Returns:
        The bar, which gives the batches when iterated.
    """
    return tqdm(
        loader,
        initial=brain.step if stage is Stage.TRAIN else 0,
        dynamic_ncols=True,
        disable=not enable,
        colour=brain.tqdm_barcolor[stage.name.lower()],
    )
