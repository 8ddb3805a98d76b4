"""A table whose rows are tests: each with a name and a verdict that pytest prints."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

Row = Callable[..., None]


class Table(dict[str, tuple[str, Row]]):
    """Rows by name, each a verdict and the function that asserts it."""

    def row(self, name: str, verdict: str) -> Callable[[Row], Row]:
        """Makes a row of a function; its parameters are fixtures."""

        def register(test: Row) -> Row:
            self[name] = (verdict, test)
            return test

        return register

    def parametrize(self) -> Any:
        """Runs the rows as parameters of one test."""
        ids = [f"{name}: {verdict}" for name, (verdict, _) in self.items()]
        return pytest.mark.parametrize("test", [test for _, test in self.values()], ids=ids)


def call(test: Row, request: pytest.FixtureRequest) -> None:
    """Runs a row with the fixtures that it names."""
    test(
        **{name: request.getfixturevalue(name) for name in inspect.signature(test).parameters}
    )
