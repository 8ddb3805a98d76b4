"""The README is complete; test_documents.py runs what it shows."""

from __future__ import annotations

from .documents import ROOT, blocks_of

README = ROOT / "README.md"


def test_both_commands_are_one_line_with_constraints() -> None:
    commands = [
        block.text.strip() for block in blocks_of(README) if "pip install" in block.text
    ]
    assert len(commands) == 2
    for command in commands:
        assert "\n" not in command
        assert "-c constraints.txt" in command


def test_the_layout_names_every_file() -> None:
    text = README.read_text()
    for path in (ROOT / "brain_lightning").glob("*.py"):
        if path.name not in ("__init__.py", "stage.py", "errors.py", "_speechbrain.py"):
            assert path.name in text, path.name
