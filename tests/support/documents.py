"""The code blocks of our Markdown files, and a place to run them as a reader would.

A block runs as it is written. What makes it short is the copy of the examples that it runs in:
``SMALL`` is all that differs there.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hyperpyyaml import load_hyperpyyaml

from .brains import Regression, dataset, sgd
from .processes import LAUNCHERS, ROOT, programs, variables

# The least that every example can learn from.
SMALL = {
    "porting/before/hparams.yaml": {"number_of_epochs": 2, "train": 32, "valid": 24},
    "porting/after/hparams.yaml": {"number_of_epochs": 2, "train": 32, "valid": 24},
    "ctc_digits/hparams.yaml": {
        "number_of_epochs": 2, "train_lines": 70, "valid_lines": 70, "test_lines": 40,
        "channels": 4, "hidden": 16,
    },
    "gan_digits/hparams.yaml": {"number_of_epochs": 2, "draw_every": 1},
    "kmeans/hparams.yaml": {"number_of_epochs": 2},
    "sharded/hparams.yaml": {"train_lines": 32, "hidden": 32},
}  # fmt: skip
# What a reader has to know of his cluster; here it is this machine.
CLUSTER = {"NODES": "2", "GPUS": "1", "HEAD": "localhost"}
SHELL = ("bash",)
OUTPUT = ("", "text")


@dataclass(frozen=True)
class Block:
    """A fenced block: its file, the line of its fence, its language and its text."""

    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    @property
    def source(self) -> Path | None:
        """The file that the block is an excerpt of; its first line names it: ``# a.py``."""
        named = re.match(r"# (\S+\.(?:py|yaml))\n", self.text)
        return self.document.parent / named[1] if named else None


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
    """Returns the rows of all tables whose first column is called ``first``."""
    head = rf"^\| {re.escape(first)} \|.*\n\|[-| ]+\n"
    tables = re.findall(head + r"((?:\|.*\n?)+)", text, flags=re.MULTILINE)
    rows = [row for each in tables for row in each.splitlines()]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


class Scratch:
    """A copy of the examples, where shell blocks leave what the next ones find.

    Args:
        folder: Where to copy them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
        # What a reader's shell finds: here `python` forks a process.
        path = [str(programs()), str(LAUNCHERS), os.environ["PATH"]]
        return variables(**CLUSTER, PATH=os.pathsep.join(path))


def _change(hparams: Path, values: dict[str, int]) -> None:
    text = hparams.read_text(encoding="utf-8")
    for name, value in values.items():
        # Not where the file refers to the value, as in "name: !ref <name>".
        line = rf"^(\s*{name}:) [^!\n]*$"
        text, found = re.subn(line, rf"\1 {value}", text, flags=re.MULTILINE)
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
    if sys.version_info < (3, 11):
        # Notes of an error are logged there, with the error in front.
        lines = [line for line in lines if not line.startswith("brain_lightning: in ")]
    return [line for line in lines if line not in rest]


def code_lines(text: str) -> list[str]:
    """Lines of a Python or YAML file, without docstrings and blank lines."""
    lines = text.splitlines()
    with contextlib.suppress(SyntaxError):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                    lines[number - 1] = ""
    return [line for line in lines if line.strip()]


def is_excerpt(shown: str, text: str) -> bool:
    """Whether a block, after the line that names its file, shows lines of that file.

    Docstrings and blank lines do not count. A line ``...`` stands for lines that are left out.
    """
    lines = [line for line in shown.splitlines()[1:] if line.strip()]
    gap = r"(?:.*\n)*"
    parts = [gap if line.strip() == "..." else re.escape(f"{line}\n") for line in lines]
    code = "".join(f"{line}\n" for line in code_lines(text))
    return re.search("^" + "".join(parts), code, flags=re.MULTILINE) is not None


# ----------------------------------------------------------------------- of YAML


class Reporter(Regression):
    """Says what the documents' callbacks monitor."""

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        if stage.name == "VALID":
            numbers = {"error": stage_loss, "WER": stage_loss}
            self.hparams.train_logger.log_stats({"epoch": epoch}, valid_stats=numbers)


class TrainLogger:
    def log_stats(self, stats_meta: Any, valid_stats: Any) -> None:
        """What a Trainer listens to."""


def trains(yaml: str, folder: str) -> None:
    """Trains a Brain with these hyperparameters."""
    out = os.path.join(folder, "out")
    os.makedirs(out)
    known = "" if "output_folder:" in yaml else f"output_folder: {out}\n"
    hparams = load_hyperpyyaml(known + yaml, {"output_folder": out})
    assert hparams.keys() & {"trainer", "train_logger"}
    hparams = {"train_logger": TrainLogger(), **hparams}
    run_opts = {"device": "cpu", "noprogressbar": True}
    brain = Reporter({"model": torch.nn.Linear(4, 2)}, sgd, hparams, run_opts)
    loader_kwargs = {"batch_size": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        brain.fit(range(2), dataset(), dataset(), None, loader_kwargs, loader_kwargs)
    assert brain.optimizer_step > 0
