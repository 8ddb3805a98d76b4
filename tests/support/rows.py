"""A table whose rows are tests: each with a name and a verdict that pytest prints."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

Row = Callable[..., None]


class Table(dict[str, Any]):
    """Rows by name, each a parameter of pytest's: the function that asserts it."""

    def row(
        self, name: str, verdict: str, *marks: pytest.MarkDecorator
    ) -> Callable[[Row], Row]:
        """Makes a row of a function; its parameters are fixtures."""

        def register(test: Row) -> Row:
            self[name] = pytest.param(test, id=f"{name}: {verdict}", marks=marks)
            return test

        return register

    def parametrize(self) -> Any:
        """Runs the rows as parameters of one test."""
        return pytest.mark.parametrize("test", self.values())


def call(test: Row, request: pytest.FixtureRequest) -> None:
    """Runs a row with the fixtures that it names."""
    test(
        **{name: request.getfixturevalue(name) for name in inspect.signature(test).parameters}
    )
