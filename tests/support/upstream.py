"""What the oldest versions of others do not have: tests that need it say so here."""

from __future__ import annotations

from typing import Any

import pytest
import speechbrain
from torch.torch_version import TorchVersion

from brain_lightning.compat.versions import LIGHTNING, REDUCES_UNUSED, SHARDS

SPEECHBRAIN = TorchVersion(speechbrain.__version__)


# Modules in shards, on a torch that averages their gradients as it should.
needs_shards = pytest.mark.skipif(not SHARDS, reason="needs torch 2.8")
# Shards of parameters that one process leaves out.
needs_unused = pytest.mark.skipif(
    not REDUCES_UNUSED, reason="needs FSDPModule.set_reduce_scatter_unused_params"
)


def needs_lightning(version: str) -> pytest.MarkDecorator:
    reason = f"Lightning {LIGHTNING} has no such thing: it came with {version}"
    return pytest.mark.skipif(version > LIGHTNING, reason=reason)


def needs_speechbrain(version: str) -> pytest.MarkDecorator:
    reason = f"SpeechBrain {SPEECHBRAIN} has no such thing: it came with {version}"
    return pytest.mark.skipif(version > SPEECHBRAIN, reason=reason)


def weights_only(value: bool | None) -> dict[str, Any]:
    """An argument of ``Trainer.fit`` and the like, which came with Lightning 2.6."""
    return {"weights_only": value} if LIGHTNING >= "2.6" else {}
