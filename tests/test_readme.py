"""The README does what it says."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("code", blocks("python"))
def test_its_code_runs(code: str, capsys: Any) -> None:
    with warnings.catch_warnings():
        # Lightning advises about workers and loggers, as it would any reader.
        warnings.simplefilter("ignore")
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102


def test_every_row_of_the_table_has_its_test() -> None:
    features = README.split("| Brain feature |")[1].split("\n\n")[0]
    rows = features.splitlines()[2:]
    assert len(rows) > 10
    for row in rows:
        named = re.search(r"`(tests/[\w/]+\.py)`", row)
        assert named, row
        assert (ROOT / named[1]).exists(), row


def test_both_commands_are_one_line_with_constraints() -> None:
    commands = [block.strip() for block in blocks("bash") if "pip install" in block]
    assert len(commands) == 2
    for command in commands:
        assert "\n" not in command
        assert "-c constraints.txt" in command


def test_the_layout_names_every_file() -> None:
    for path in (ROOT / "brain_lightning").glob("*.py"):
        if path.name not in ("__init__.py", "stage.py", "errors.py", "_speechbrain.py"):
            assert path.name in README, path.name
