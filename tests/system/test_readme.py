"""The README is complete; test_documents.py runs what it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.documents import ROOT, blocks_of, documents

README = ROOT / "README.md"


def test_both_commands_are_one_line_with_constraints() -> None:
    commands = [
        block.text.strip() for block in blocks_of(README) if "pip install" in block.text
    ]
    assert len(commands) == 2
    for command in commands:
        assert "\n" not in command
        assert "-c constraints.txt" in command


def test_it_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_what_a_document_links_to_is_there(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", document.read_text())
    for name, heading in links:
        target = document.parent / name if name else document
        assert target.exists(), name
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if heading else []
        anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
        assert not heading or heading in anchors, heading
