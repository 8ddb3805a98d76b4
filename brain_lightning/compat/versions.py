"""What differs between the versions of other packages: the only file that knows.

Each name has the version with which it goes away. ``tests/system/versions.sh`` runs the
tests on the oldest and the newest.
"""

from __future__ import annotations

import _codecs
import logging
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch.torch_version import TorchVersion

logger = logging.getLogger(__name__)

LIGHTNING = TorchVersion(lightning.__version__)
NEWEST_LIGHTNING = "2.6.6"
TESTED_LIGHTNING = f"2.4 to {NEWEST_LIGHTNING}"


if LIGHTNING > NEWEST_LIGHTNING:
    warnings.warn(
        f"Lightning {LIGHTNING} is installed, and brain_lightning is tested with "
        f"{TESTED_LIGHTNING}. A run is refused if a private part that it needs is gone.",
        stacklevel=1,
    )

# From 2.5.2 on each process asks the others in each batch whether one got a SIGTERM.
BROADCASTS_SIGTERM = LIGHTNING >= "2.5.2"

# From 2.6.1 on StochasticWeightAveraging takes its average also where max_epochs is -1.
AVERAGES_WITHOUT_END = LIGHTNING >= "2.6.1"

# What bytes are pickled as; torch loads it as a plain value from 2.6 on.
PLAIN_GLOBALS: list[Any] = [] if torch.__version__ >= "2.6" else [_codecs.encode]

# From 2.8 on gradients of sharded modules are averaged on the CPU too, if it is asked for by
# set_force_sum_reduction_for_comms; earlier versions lack some of what is used.
SHARDS = torch.__version__ >= "2.8" and torch.distributed.is_available()
if TYPE_CHECKING or SHARDS:
    from torch.distributed.fsdp import FSDPModule as FSDPModule
    from torch.distributed.tensor import DTensor as DTensor
else:
    # Of which there are no instances.
    FSDPModule = DTensor = type("NotInThisVersion", (), {})


# torch has it from 2.6 on.
accelerator: Any = getattr(torch, "accelerator", None) or SimpleNamespace(
    is_available=torch.cuda.is_available,
    current_accelerator=lambda: torch.device("cuda"),
    device_count=torch.cuda.device_count,
)


def run_option_defaults(core: Any) -> dict[str, Any]:
    """What SpeechBrain's run options are where nobody gives them.

    Args:
        core: ``speechbrain.core``, which had a dictionary before ``RunOptions`` came
            with 1.1.

    Returns:
        Values by name.
    """
    if hasattr(core, "run_opt_defaults"):
        return dict(core.run_opt_defaults)
    return dict(core.RunOptions().as_dict())


def add_note(error: BaseException, note: str) -> None:
    """Adds a line to what a traceback shows of an error.

    Args:
        error: The error; its type, its arguments and ``str(error)`` stay as they are.
        note: The line. Python 3.10 knows no notes: there it is logged, and kept where
            later versions keep them.
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
        return
    vars(error).setdefault("__notes__", []).append(note)
    logger.error("%s: %s", type(error).__name__, note)
