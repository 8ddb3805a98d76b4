"""Differences between the versions of other packages. Only this file compares versions.

Each comment names the version that makes the difference. ``tests/system/versions.sh`` runs the
tests on the oldest and the newest versions.
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
        f"Lightning {LIGHTNING} is installed, but brain_lightning is tested with "
        f"{TESTED_LIGHTNING}. If a private part of Lightning that a run needs is missing, the "
        "run raises an error.",
        stacklevel=1,
    )

# Since 2.5.2, ranks exchange in each batch whether one of them received SIGTERM.
BROADCASTS_SIGTERM = LIGHTNING >= "2.5.2"

# Since 2.6.1, StochasticWeightAveraging also averages if max_epochs is -1.
AVERAGES_WITHOUT_END = LIGHTNING >= "2.6.1"

# The function that bytes are pickled with. Since 2.6, torch loads it as a plain value.
PLAIN_GLOBALS: list[Any] = [] if torch.__version__ >= "2.6" else [_codecs.encode]

# Since 2.8, gradients of sharded modules can be averaged on the CPU, too
# (set_force_sum_reduction_for_comms). Earlier versions also lack other functions.
SHARDS = torch.__version__ >= "2.8" and torch.distributed.is_available()
if TYPE_CHECKING or SHARDS:
    from torch.distributed.fsdp import FSDPModule as FSDPModule
    from torch.distributed.tensor import DTensor as DTensor
else:
    # No object is an instance of this class.
    FSDPModule = DTensor = type("NotInThisVersion", (), {})


# Whether gradients are averaged if only some ranks used a parameter.
REDUCES_UNUSED = hasattr(FSDPModule, "set_reduce_scatter_unused_params")

# torch.accelerator needs torch 2.6.
accelerator: Any = getattr(torch, "accelerator", None) or SimpleNamespace(
    is_available=torch.cuda.is_available,
    current_accelerator=lambda: torch.device("cuda"),
    device_count=torch.cuda.device_count,
)


def run_option_defaults(core: Any) -> dict[str, Any]:
    """Returns the defaults of SpeechBrain's run options.

    Args:
        core: The module ``speechbrain.core``. It has a dictionary before SpeechBrain 1.1, and
            ``RunOptions`` since.

    Returns:
        Defaults by name.
    """
    if hasattr(core, "run_opt_defaults"):
        return dict(core.run_opt_defaults)
    return dict(core.RunOptions().as_dict())


def add_note(error: BaseException, note: str) -> None:
    """Adds a note to an error, which tracebacks show after the error.

    Args:
        error: The error. Its type, its arguments and ``str(error)`` are not changed.
        note: The note. Python 3.10 does not show notes. There the note is logged, and stored
            in the attribute that later versions use.
    """
    if hasattr(error, "add_note"):
        error.add_note(note)
        return
    vars(error).setdefault("__notes__", []).append(note)
    logger.error("%s: %s", type(error).__name__, note)
