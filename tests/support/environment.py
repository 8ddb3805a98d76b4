"""What every process of the tests begins with: SpeechBrain importable, and seeds."""

from __future__ import annotations

import random
import sys
import types
import warnings

import numpy as np
import torch
import yaml
from lightning.pytorch.utilities import memory


def import_torchaudio() -> None:
    """Imports it, without its extensions where this build of torch cannot load them.

    PyPI's torchaudio ships extensions that are built for one version of CUDA. Missing
    ones count as "not built", so a stub in their place is enough.
    """
    try:
        import torchaudio
    except (ImportError, OSError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            del sys.modules[name]
        stub = types.ModuleType("torchaudio._extension")
        stub._IS_TORCHAUDIO_EXT_AVAILABLE = False  # type: ignore[attr-defined]
        stub._IS_ALIGN_AVAILABLE = False  # type: ignore[attr-defined]
        stub.fail_if_no_align = lambda function: function  # type: ignore[attr-defined]
        sys.modules["torchaudio._extension"] = stub
        import torchaudio  # noqa: F401


def import_speechbrain() -> None:
    """Imports it once, with its own warnings left out: they are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import speechbrain
        import speechbrain.core
        import speechbrain.utils.checkpoints  # noqa: F401


# SpeechBrain's Checkpointer reads its meta files again and again; libyaml reads the same.
yaml.Loader = getattr(yaml, "CLoader", yaml.Loader)  # type: ignore[misc]

# Where there was no memory Lightning has Python look at every object of the process, which
# takes longer than most tests.
memory.gc = types.SimpleNamespace(collect=int)  # type: ignore[attr-defined]

# The tensors are tiny, and other processes share the machine.
torch.set_num_threads(1)
import_torchaudio()
import_speechbrain()


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def forget_saves() -> None:
    """Clears what SpeechBrain's Checkpointer remembers of all saves of the process.

    Each ``save_and_keep_only`` adds to the list that is its default for ``importance_keys``,
    and for each element the next one reads all checkpoints twice.
    """
    checkpointer = sys.modules["speechbrain.utils.checkpoints"].Checkpointer
    for default in checkpointer.save_and_keep_only.__defaults__:
        if isinstance(default, list):
            default.clear()
