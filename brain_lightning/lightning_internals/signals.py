"""Lightning's handlers of signals.

Lightning registers them after ``on_fit_start``, waits for the other processes, and only
then calls another hook. A SIGTERM in between, as torchrun sends it where a process has
failed, would not end the process; so handlers that are put back in ``on_train_start``, which
needs nothing private, come too late.
"""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose


def disable_signal_handlers(trainer: Trainer) -> None:
    """Keeps a Trainer that ``brain.fit`` made from handling signals.

    SIGTERM would else wait for the end of the batch and exit with status 0, in
    processes that a hook forks as well; and at the end of a run Lightning would undo
    what a hook has registered.

    Args:
        trainer: The Trainer before its first run.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def is_lightning_handler(handler: object) -> bool:
    """Whether a signal is handled by a Trainer, and by nothing else.

    Its handler would end the process with status 0, and makes a collective call from
    within the signal (Lightning 2.6, ``_sigterm_notifier_fn``).

    Args:
        handler: What ``signal.getsignal`` returned.
    """
    return isinstance(handler, _HandlersCompose) and len(handler.signal_handlers) == 1
