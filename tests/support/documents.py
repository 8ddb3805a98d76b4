"""The code blocks of our Markdown files, and a place to run them as a reader would.

A block runs as it is written. What makes it short is the copy of the examples that it runs in:
``SMALL`` is all that differs there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCHERS = Path(__file__).parent / "launchers"
# The least that every example can learn from.
SMALL = {
    "porting/before/hparams.yaml": {"number_of_epochs": 2, "train": 32, "valid": 24},
    "porting/after/hparams.yaml": {"number_of_epochs": 2, "train": 32, "valid": 24},
    "ctc_digits/hparams.yaml": {"number_of_epochs": 1, "train_lines": 64, "test_lines": 100},
    "gan_digits/hparams.yaml": {"number_of_epochs": 1},
    "kmeans/hparams.yaml": {"number_of_epochs": 2},
}  # fmt: skip
# What a reader has to know of his cluster; here it is this machine.
CLUSTER = {"NODES": "2", "GPUS": "1", "HEAD": "localhost"}
SHELL = ("bash",)
OUTPUT = ("", "text")


@dataclass(frozen=True)
class Block:
    """A fenced block: its file, the line of its fence, its language and what is in it."""

    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def documents() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("examples/**/*.md"))]


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [
        Block(document, text.count("\n", 0, each.start()) + 1, each[1], each[2])
        for each in found
    ]


def before(block: Block) -> list[Block]:
    """The shell blocks of its document above it, in order."""
    earlier = [each for each in blocks_of(block.document) if each.line < block.line]
    return [each for each in earlier if each.language in SHELL]


def table(text: str, first: str) -> list[list[str]]:
    """The rows of the table whose first column is called ``first``, or none."""
    head = rf"^\| {re.escape(first)} \|.*\n\|[-| ]+\n"
    found = re.search(head + r"((?:\|.*\n)+)", text, flags=re.MULTILINE)
    rows = found[1].splitlines() if found else []
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


class Scratch:
    """A copy of the examples, where shell blocks leave what the next ones find.

    Args:
        folder: Where to copy them.
        python_path: What the processes have in ``PYTHONPATH``.
    """

    def __init__(self, folder: Path, python_path: str) -> None:
        self.folder = folder
        self._python_path = python_path
        self._done: dict[Block, subprocess.CompletedProcess[str]] = {}
        left_out = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(ROOT / "examples", folder / "examples", ignore=left_out)
        for name, values in SMALL.items():
            _change(folder / "examples" / name, values)

    def run(self, block: Block) -> subprocess.CompletedProcess[str]:
        """What a shell block says and returns; it runs once, after those above it.

        Args:
            block: Runs in the folder of its document.
        """
        if block not in self._done:
            self._done[block] = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.text],  # noqa: S607
                cwd=self.folder / block.document.parent.relative_to(ROOT),
                env=self._environment(),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, timeout=240, check=False,
            )  # fmt: skip
        return self._done[block]

    def _environment(self) -> dict[str, str]:
        path = [str(LAUNCHERS), str(Path(sys.executable).parent), os.environ["PATH"]]
        return {
            **os.environ,
            **CLUSTER,
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": os.pathsep.join([str(ROOT), self._python_path]),
            "OMP_NUM_THREADS": "1",
        }


def _change(hparams: Path, values: dict[str, int]) -> None:
    text = hparams.read_text(encoding="utf-8")
    for name, value in values.items():
        text, found = re.subn(rf"^(\s*{name}:) .*", rf"\1 {value}", text, flags=re.MULTILINE)
        assert found == 1, f"{hparams}: {name}"
    hparams.write_text(text, encoding="utf-8")


def shape(text: str) -> list[str]:
    """Lines without their numbers and digests, and with single spaces."""
    numbers = r"\b[0-9a-f]{8}\b|[-+]?\b\d[\d.]*(e[-+]?\d+)?"
    lines = (re.sub(numbers, "#", line) for line in text.splitlines())
    return [" ".join(line.split()) for line in lines]


def missing(shown: str, real: str) -> list[str]:
    """The lines of a shown output that the real one does not have, in that order.

    A line ``...`` stands for lines that are left out.
    """
    rest = iter(shape(real))
    lines = [line for line in shape(shown) if line not in ("", "...")]
    return [line for line in lines if line not in rest]
