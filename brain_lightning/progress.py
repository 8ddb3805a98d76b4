"""The bar a person watches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

from .protocol import BrainProtocol
from .stage import Stage


class LossBar(tqdm):  # type: ignore[type-arg]  # no generic at run time
    """A bar with the running loss, which is looked at when the bar is drawn.

    Attributes:
        running: Gives what to show behind the bar.
    """

    running: Callable[[], dict[str, Any]] | None = None

    @property
    def format_dict(self) -> Any:
        """What the bar shows; tqdm asks for it every tenth of a second."""
        if self.running is not None:
            self.set_postfix(self.running(), refresh=False)
        return super().format_dict


def progress_bar(
    brain: BrainProtocol, loader: Iterable[Any], stage: Stage, enable: bool
) -> LossBar:
    """SpeechBrain's bar over the batches of a stage.

    Args:
        brain: Gives the colour; a resumed training epoch starts at its ``step``.
        loader: The batches.
        stage: The stage that is starting.
        enable: Whether to show anything.

    Returns:
        The bar, which gives the batches when iterated.
    """
    return LossBar(
        loader,
        initial=brain.step if stage is Stage.TRAIN else 0,
        dynamic_ncols=True,
        disable=not enable,
        colour=brain.tqdm_barcolor[stage.name.lower()],
    )
