"""SpeechBrain 0.5.16, the last of those that the Brain class tutorial is written for.

It cannot be imported beside SpeechBrain 1: what needs it runs in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from .processes import ROOT

VERSION = "0.5.16"
# Beside the virtual environment, and as little a part of the repository.
FOLDER = ROOT / f".venv-speechbrain-{VERSION}"


def folder() -> Path:
    """Where it is, for ``sys.path``; installed at first use, and where that fails skips."""
    if not (FOLDER / "speechbrain").is_dir():
        failure = _install()
        if failure:
            pytest.skip(f"SpeechBrain {VERSION} could not be installed: {failure}")
    return FOLDER


def _install() -> str:
    """Installs it without what it needs, which SpeechBrain 1 needs as well.

    Returns:
        Why that failed; nothing where it did not.
    """
    target = tempfile.mkdtemp(prefix=FOLDER.name, dir=ROOT)
    words = ["-m", "pip", "install", "-q", "--no-compile", "--no-deps", "--target", target]
    done = subprocess.run(
        [sys.executable, *words, f"speechbrain=={VERSION}"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    try:
        if done.returncode == 0:
            os.rename(target, FOLDER)
    except OSError:
        # Another process was faster.
        pass
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return "" if done.returncode == 0 else done.stderr.strip()[-300:]
