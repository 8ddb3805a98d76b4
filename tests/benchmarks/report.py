"""What all benchmarks share of the outside: options, tables, and the same figures as JSON.

A ratio is the median of the ratios of each round, in which the contestants took turns: the
machine may be shared. Beside it stand the quartiles of these ratios.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "lightning", "speechbrain", "brain_lightning")


@dataclass(frozen=True)
class Figure:
    """What was measured.

    Attributes:
        values: One of each round.
        unit: Of the values.
        base: What they are compared with, in the same rounds.
        bound: The most that the ratio may be, or the value where nothing is compared.
    """

    values: Sequence[float]
    unit: str
    base: Sequence[float] | None = None
    bound: float | None = None

    @property
    def ratios(self) -> list[float] | None:
        """Of each round."""
        if self.base is None:
            return None
        return [mine / base for mine, base in zip(self.values, self.base, strict=True)]

    @property
    def holds(self) -> bool | None:
        """Whether it is within its bound, as it is printed."""
        found = statistics.median(self.values if self.ratios is None else self.ratios)
        return None if self.bound is None else round(found, 2) <= self.bound

    def __str__(self) -> str:
        text = f"{_short(statistics.median(self.values))} {self.unit}"
        spread = _spread(self.values if self.ratios is None else self.ratios)
        if self.ratios is not None and self.values is not self.base:
            text += f"  {spread['median']:.2f}"
        if self.values is not self.base and spread["lowest"] != spread["highest"]:
            short = _short if self.ratios is None else "{:.2f}".format
            text += f" ({short(spread['lower_quartile'])}-{short(spread['upper_quartile'])})"
        return text if self.bound is None else f"{text}  {self._verdict()}"

    def _verdict(self) -> str:
        return f"<= {self.bound:.2f} {'holds' if self.holds else 'DOES NOT HOLD'}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        ratio = None if self.ratios is None else _spread(self.ratios)
        return {
            "unit": self.unit, "rounds": len(self.values), "value": _spread(self.values),
            "ratio": ratio, "bound": self.bound, "holds": self.holds,
        }  # fmt: skip


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _spread(values: Sequence[float]) -> dict[str, float]:
    lower, median, upper = (
        statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    )
    return {
        "median": median, "lowest": min(values), "lower_quartile": lower,
        "upper_quartile": upper, "highest": max(values),
    }  # fmt: skip


def compared(
    found: Mapping[str, Sequence[float]],
    unit: str,
    base: str = "SpeechBrain",
    bounds: Mapping[str, float] | None = None,
) -> dict[str, Figure]:
    """The figures of contestants that took turns, against one of them.

    Args:
        found: One value a round of each.
        unit: Of the values.
        base: Which one they are compared with; where it did not take part, nothing is.
        bounds: Of the ratios.
    """
    return {
        name: Figure(values, unit, found.get(base), (bounds or {}).get(name))
        for name, values in found.items()
    }


Rows = Mapping[str, Mapping[str, Figure]]


class Report:
    """The tables of one benchmark, which are printed as they come.

    Args:
        options: What ``parser`` has parsed.
    """

    def __init__(self, options: Namespace) -> None:
        self._to = options.json
        self._tables: list[dict[str, Any]] = []

    def table(self, title: str, rows: Rows) -> None:
        """Prints a table, and keeps it for the end.

        Args:
            title: What was measured.
            rows: By name, each with its columns; not every row has every column.
        """
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        cells = [["", *columns]]
        for name, row in rows.items():
            cells.append([name, *(str(row.get(column, "-")) for column in columns)])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        print(f"\n{title}")
        for line in cells:
            padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            print("  ".join(padded).rstrip(), flush=True)
        figures = {
            name: {column: figure.as_dict() for column, figure in row.items()}
            for name, row in rows.items()
        }
        self._tables.append({"title": title, "rows": figures})

    def end(self) -> None:
        """Writes everything as JSON, where that was asked for."""
        if self._to is None:
            return
        name = Path(sys.argv[0]).stem
        text = json.dumps({"benchmark": name, **_machine(), "tables": self._tables}, indent=1)
        if self._to == "-":
            print(text)
        else:
            Path(self._to).write_text(text + "\n")


def parser(doc: str, rounds: int = 7) -> ArgumentParser:
    """The options that all benchmarks have.

    Args:
        doc: The module's docstring, of which the first line is shown.
        rounds: How many, if nothing else is said.
    """
    made = ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("rounds", nargs="?", type=int, default=rounds, help=f"default {rounds}")
    made.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="the figures with their spread and all versions, in a file or behind the tables",
    )  # fmt: skip
    return made


def _machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }
    return {"versions": versions, "cpus": os.cpu_count(), "gpu": gpu}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        # A checkout on the path has a version too, and may not be there at all.
        return getattr(sys.modules.get(package), "__version__", None)
