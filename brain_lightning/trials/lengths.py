"""Finds the lengths of a dataset's examples, if possible without reading the examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset

from brain_lightning.batch_content import tensors_of_batch

# Names of columns with the length of an example, in SpeechBrain's recipes and elsewhere.
COLUMNS = (
    "duration", "length", "n_frames", "num_frames", "n_samples", "num_samples", "frames",
    "samples", "wav_len", "len",
)  # fmt: skip
# Number of examples to read if no column has their lengths.
MOST_READ = 64


@dataclass(frozen=True)
class Lengths:
    """The lengths of the examples of a dataset.

    Attributes:
        values: Length by index. If examples had to be read, only some of them have a length.
        source: Description of where the lengths come from.
    """

    values: Mapping[int, float]
    source: str


def lengths_of(dataset: Any) -> Lengths:
    """Returns the lengths of the examples of a dataset.

    If the dataset has a table with a length column, this column is used. The examples of a
    list are in memory and are all measured. From any other dataset a few examples are read.

    Args:
        dataset: Map-style dataset. SpeechBrain's ``DynamicItemDataset``, a dataset of Hugging
            Face, and a ``Subset`` or ``ConcatDataset`` of them have tables.

    Returns:
        The lengths, in the unit of the column, or in tensor elements.
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
    """Returns the id of an example if the dataset has ids, otherwise its index.

    Args:
        dataset: The dataset.
        index: Index of the example.
    """
    if isinstance(dataset, Subset):
        return name_of(dataset.dataset, dataset.indices[index])
    ids = getattr(dataset, "data_ids", None)
    return index if ids is None else ids[index]


def size_of(example: Any) -> float:
    """Returns the total number of elements in the tensors of an example or of a batch.

    Args:
        example: An example or a batch, see ``tensors_of_batch``.
    """
    return float(sum(np.prod(tensor.shape) for _, tensor in tensors_of_batch(example)))


def _in_table(dataset: Any) -> tuple[str, Sequence[float]] | None:
    """Returns the name and the values of a dataset's length column, if it has one."""
    if isinstance(dataset, Subset):
        whole = _in_table(dataset.dataset)
        return whole and (whole[0], [whole[1][index] for index in dataset.indices])
    if isinstance(dataset, ConcatDataset):
        tables = [table for table in map(_in_table, dataset.datasets) if table is not None]
        columns = {column for column, _ in tables}
        # All datasets need a length in the same unit.
        if len(columns) > 1 or len(tables) < len(dataset.datasets):
            return None
        return columns.pop(), list(chain.from_iterable(values for _, values in tables))
    for column in COLUMNS:
        values = _numbers(_column(dataset, column))
        if values is not None:
            return column, values
    return None


def _column(dataset: Any, name: str) -> Iterable[Any] | None:
    """Returns one column of a table, or None if there is no such column or no table."""
    if name in (getattr(dataset, "column_names", None) or ()):
        # A Hugging Face dataset reads only this column.
        return dataset[name]  # type: ignore[no-any-return]
    data, ids = getattr(dataset, "data", None), getattr(dataset, "data_ids", None)
    if isinstance(data, Mapping) and ids is not None:
        # A SpeechBrain dataset. Its data is used directly, so that its pipeline does not run.
        return _of_rows([data[each] for each in ids], name)
    return _of_rows(dataset, name) if isinstance(dataset, (list, tuple)) else None


def _of_rows(rows: Sequence[Any], name: str) -> Iterable[Any] | None:
    has_column = all(isinstance(row, Mapping) and name in row for row in rows)
    return [row[name] for row in rows] if rows and has_column else None


def _numbers(values: Iterable[Any] | None) -> list[float] | None:
    """Converts values to numbers, because a table from a CSV file has strings."""
    try:
        return None if values is None else [float(value) for value in values]
    except (TypeError, ValueError):
        return None
