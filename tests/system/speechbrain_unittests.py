"""SpeechBrain's own unit tests, with our Brain, EpochCounter and Checkpointer in the place of theirs.

``python tests/system/speechbrain_unittests.py /path/to/speechbrain`` (a checkout of its repository,
which holds the tests; the package does not). The exit status is pytest's.

What cannot apply, and is left out: nothing of the three files.
"""  # noqa: E501

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

FILES = ("test_core.py", "test_epoch_loop.py", "test_checkpoints.py")
CHECKPOINTS = (
    "Checkpointer", "average_checkpoints", "register_checkpoint_hooks", "mark_as_saver",
    "mark_as_loader", "mark_as_transfer",
)  # fmt: skip


def make_speechbrain_importable() -> None:
    """What our own tests do, of which only the file is known here: theirs have the name."""
    path = Path(__file__).parents[1] / "support" / "environment.py"
    spec = importlib.util.spec_from_file_location("environment_of_our_tests", path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def put_ours_in_their_place() -> Any:
    import speechbrain
    import speechbrain.core
    import speechbrain.utils.checkpoints
    import speechbrain.utils.epoch_loop

    import brain_lightning

    for module, names in {
        speechbrain: ("Brain", "Stage"),
        speechbrain.core: ("Brain", "Stage"),
        speechbrain.utils.epoch_loop: ("EpochCounter", "EpochCounterWithStopper"),
        speechbrain.utils.checkpoints: CHECKPOINTS,
    }.items():
        for name in names:
            setattr(module, name, getattr(brain_lightning, name))


# Also in the processes that one of the tests spawns: they import this file.
make_speechbrain_importable()
put_ours_in_their_place()


def main(checkout: str) -> int:
    files = [str(Path(checkout) / "tests" / "unittests" / name) for name in FILES]
    options = ["--rootdir", checkout, "-c", "/dev/null", "-p", "no:cacheprovider", "-v"]
    # The option `device` and the fixture of that name.
    return int(pytest.main([*options, "--confcutdir", checkout, *files]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
