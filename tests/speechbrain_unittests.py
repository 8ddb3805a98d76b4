"""SpeechBrain's own unit tests, with our Brain and EpochCounter in the place of theirs.

``python -m tests.speechbrain_unittests /path/to/speechbrain`` (a checkout of its repository,
which holds the tests; the package does not). The exit status is pytest's.

What cannot apply, and is left out:

* nothing of test_core.py and test_epoch_loop.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from .conftest import _hide_torchaudio_extensions

FILES = ("test_core.py", "test_epoch_loop.py")


class OursInTheirPlace:
    """A pytest plugin."""

    def pytest_configure(self) -> None:
        _hide_torchaudio_extensions()
        import speechbrain
        import speechbrain.core
        import speechbrain.utils.epoch_loop

        import brain_lightning

        for module, names in {
            speechbrain: ("Brain", "Stage"),
            speechbrain.core: ("Brain", "Stage"),
            speechbrain.utils.epoch_loop: ("EpochCounter", "EpochCounterWithStopper"),
        }.items():
            for name in names:
                setattr(module, name, getattr(brain_lightning, name))

    def pytest_runtest_setup(self) -> None:
        from speechbrain.core import Brain

        assert Brain.__module__.startswith("brain_lightning")


def main(checkout: str) -> int:
    files = [str(Path(checkout) / "tests" / "unittests" / name) for name in FILES]
    options = ["--rootdir", checkout, "-c", "/dev/null", "-p", "no:cacheprovider", "-v"]
    # The option `device` and the fixture of that name.
    options += ["--confcutdir", checkout]
    return int(pytest.main([*options, *files], plugins=[OursInTheirPlace()]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
