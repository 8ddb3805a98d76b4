"""How long the examples of a dataset are, as far as that is known without reading them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset

from brain_lightning.batch_content import tensors_of_batch

# Columns that say how long an example is, in SpeechBrain's recipes and elsewhere.
COLUMNS = (
    "duration", "length", "n_frames", "num_frames", "n_samples", "num_samples", "frames",
    "samples", "wav_len", "len",
)  # fmt: skip
# Examples that are read where nothing says how long they are.
MOST_READ = 64


@dataclass(frozen=True)
class Lengths:
    """The lengths of the examples of a dataset.

    Attributes:
        values: By index; a part of the examples, where they had to be read.
        source: Where they come from, in words.
    """

    values: Mapping[int, float]
    source: str


def lengths_of(dataset: Any) -> Lengths:
    """How long the examples of a dataset are.

    A column of the table behind it says so, where there is one. The examples of a list, which
    are in memory, are measured. Of any other dataset a few examples are read.

    Args:
        dataset: Has a length and indices. SpeechBrain's ``DynamicItemDataset``, a dataset of
            Hugging Face, and parts or chains of them have tables.

    Returns:
        The lengths, in the unit of the column.
    """
    found = _in_table(dataset)
    if found is not None:
        column, values = found
        return Lengths(dict(enumerate(values)), column)
    if isinstance(dataset, (list, tuple)):
        return Lengths({i: size_of(each) for i, each in enumerate(dataset)}, "size")
    count = len(dataset)
    indices = range(0, count, -(-count // MOST_READ) or 1)
    sizes = {index: size_of(dataset[index]) for index in indices}
    source = "size" if len(sizes) == count else f"size, of {len(sizes)} of {count} examples"
    return Lengths(sizes, source)


def name_of(dataset: Any, index: int) -> Any:
    """What an example is called: its id in a table, else its index.

    Args:
        dataset: The dataset.
        index: The example.
    """
    if isinstance(dataset, Subset):
        return name_of(dataset.dataset, dataset.indices[index])
    ids = getattr(dataset, "data_ids", None)
    return index if ids is None else ids[index]


def size_of(example: Any) -> float:
    """The number of elements that the tensors of an example, or of a batch, have.

    Args:
        example: See ``tensors_of_batch``.
    """
    return float(sum(np.prod(tensor.shape) for _, tensor in tensors_of_batch(example)))


def _in_table(dataset: Any) -> tuple[str, Sequence[float]] | None:
    """The column of a dataset that says how long its examples are, and its name."""
    if isinstance(dataset, Subset):
        whole = _in_table(dataset.dataset)
        return whole and (whole[0], [whole[1][index] for index in dataset.indices])
    if isinstance(dataset, ConcatDataset):
        tables = [table for table in map(_in_table, dataset.datasets) if table is not None]
        columns = {column for column, _ in tables}
        # In one unit, and of all.
        if len(columns) > 1 or len(tables) < len(dataset.datasets):
            return None
        return columns.pop(), list(chain.from_iterable(values for _, values in tables))
    for column in COLUMNS:
        values = _numbers(_column(dataset, column))
        if values is not None:
            return column, values
    return None


def _column(dataset: Any, name: str) -> Iterable[Any] | None:
    """One column of a table; None where there is no such column, or no table."""
    if name in (getattr(dataset, "column_names", None) or ()):
        # A dataset of Hugging Face, which reads nothing else then.
        return dataset[name]  # type: ignore[no-any-return]
    data, ids = getattr(dataset, "data", None), getattr(dataset, "data_ids", None)
    if isinstance(data, Mapping) and ids is not None:
        # SpeechBrain's; without what its pipeline would read and compute.
        return _of_rows([data[each] for each in ids], name)
    return _of_rows(dataset, name) if isinstance(dataset, (list, tuple)) else None


def _of_rows(rows: Sequence[Any], name: str) -> Iterable[Any] | None:
    has_column = all(isinstance(row, Mapping) and name in row for row in rows)
    return [row[name] for row in rows] if rows and has_column else None


def _numbers(values: Iterable[Any] | None) -> list[float] | None:
    """Numbers; a table that was read from CSV may have them as texts."""
    try:
        return None if values is None else [float(value) for value in values]
    except (TypeError, ValueError):
        return None
