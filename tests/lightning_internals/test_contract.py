"""Every private name of Lightning and torch has a row, exists, and is used."""

from __future__ import annotations

import ast
import importlib
import runpy
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch._dynamo  # noqa: F401  A row speaks of it, and is skipped where it is not loaded.

import brain_lightning
from brain_lightning import UnsupportedError, to_lightning
from brain_lightning.compat import versions
from brain_lightning.lightning_internals import contract
from brain_lightning.lightning_internals.contract import (
    LIGHTNING_PARTS,
    TORCH_PARTS,
    Row,
    check_contract,
    check_imports,
    holds,
)
from tests.support.brains import Regression, all_equal, loader, make, trainer_with, weights

from .private_names import ANY, Use, foreign_uses, members

PACKAGE = Path(brain_lightning.__file__).parent
ROWS = (*LIGHTNING_PARTS, *TORCH_PARTS)
LIGHTNINGS, TORCHS = ({row.name for row in rows} for rows in (LIGHTNING_PARTS, TORCH_PARTS))
# This file is not searched, because its rows contain every name.
TABLE = PACKAGE / "lightning_internals" / "contract.py"
# Every file may use the private names of a Brain, which SpeechBrain has too.
BRAIN = ("protocol.py", "brain/base.py", "brain/brain.py", "step/older_api.py")
# Private names of other packages.
OTHERS = {
    **dict.fromkeys(
        (
            "_batches",
            "_bucket_boundaries",
            "_bucket_lens",
            "_ex_lengths",
            "_generate_batches",
            "_get_boundaries_through_warping",
            "_max_batch_ex",
            "_max_batch_length",
            "_shuffle_ex",
        ),
        "speechbrain.dataio.sampler.DynamicBatchSampler",
    ),
    "_asdict": "collections.namedtuple",
    "_HOOKS": "speechbrain.utils.checkpoints",
    "_speechbrain_iterator": "speechbrain.dataio.dataloader.SaveableDataLoader",
    "_speechbrain_loader": "speechbrain.utils.checkpoints.mark_as_loader",
    "_speechbrain_recovery_skip_to": "speechbrain.dataio.dataloader.SaveableDataLoader",
    "_speechbrain_saver": "speechbrain.utils.checkpoints.mark_as_saver",
    "_speechbrain_transfer": "speechbrain.utils.checkpoints.mark_as_transfer",
}


@cache
def trees() -> dict[Path, ast.Module]:
    files = [file for file in PACKAGE.rglob("*.py") if file.name != "__main__.py"]
    return {file: ast.parse(file.read_text()) for file in files if file != TABLE}


def module_of(file: Path) -> Any:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return importlib.import_module(".".join(parts).removesuffix(".__init__"))


@cache
def uses() -> dict[Path, list[Use]]:
    brain = set().union(*(members(trees()[PACKAGE / file]) for file in BRAIN))
    return {
        file: [
            use
            for use in foreign_uses(tree, vars(module_of(file)), members(tree) | brain)
            if use.name not in OTHERS
        ]
        for file, tree in trees().items()
    }


def identifiers() -> set[str]:
    found: set[str] = {use.name for file in uses() for use in uses()[file]}
    for tree in trees().values():
        for node in ast.walk(tree):
            found.add(getattr(node, "attr", getattr(node, "name", "")))
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.owner.split(':')[-1]}.{row.name}")
def test_each_row_holds(row: Row) -> None:
    assert holds(row), f"{row.owner} has no {row.name} any more, which is needed: {row.why}"


@pytest.mark.parametrize("file", sorted(trees()), ids=lambda file: file.stem)
def test_each_private_name_has_a_row(file: Path) -> None:
    inside = file.parent == TABLE.parent
    for name, line in uses()[file]:
        where = f"{file}:{line} uses {name}"
        assert name in TORCHS or inside, f"{where}; lightning_internals is the folder for it"
        assert name in TORCHS | LIGHTNINGS, f"{where}; contract.py has no row for it"


@pytest.mark.parametrize("name", sorted(LIGHTNINGS | TORCHS))
def test_each_row_is_used(name: str) -> None:
    assert name in identifiers(), f"{name} is not used any more: its row can go"


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_each_name_of_another_package_is_used(name: str) -> None:
    assert any(name in file.read_text() for file in trees())


def test_no_row_is_there_twice() -> None:
    assert len({(row.owner, row.name) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from lightning.pytorch.loops import _Loop", ["_Loop"]),
        ("from torch._dynamo import config", ["_dynamo"]),
        ("import torch._dynamo", ["_dynamo"]),
        ("import _codecs", []),
        ("from .mine import _own", []),
        ("def f(trainer): return trainer._data_connector", ["_data_connector"]),
        ("def f(trainer): trainer.fit_loop._data_source = 1", ["_data_source"]),
        ("def f(trainer): return getattr(trainer, '_state')", ["_state"]),
        ("def f(trainer, name): return getattr(trainer, f'_{name}')", [ANY]),
        ("def f(name): return f'on_{name}_batch_start'", []),
        ("def f(loader): vars(loader).update(_iterator=None)", ["_iterator"]),
        ("def f():\n    '_docstring'", []),
        ("class A:\n    def f(self): self._own = 1\ndef g(a): return a._own", []),
        ("class A:\n    def f(self): return self._own", []),
        ("class A(Trainer):\n    def f(self): self._data_connector = 1", ["_data_connector"]),
        ("class A(Trainer):\n    def f(self): return self._own", []),
        ("class A(Trainer):\n    def _run(self): pass", ["_run"]),
        ("class A(Trainer):\n    def _own(self): pass", []),
    ],
)  # fmt: skip
def test_a_private_name_is_found(code: str, names: list[str]) -> None:
    tree = ast.parse(code)
    namespace: dict[str, Any] = {"Trainer": lightning.Trainer}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    exec(compile(ast.Module(classes, []), "code", "exec"), namespace)  # noqa: S102
    assert [use.name for use in foreign_uses(tree, namespace, members(tree))] == names


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Row:
    """A row whose name does not exist."""
    row = Row("lightning.pytorch:Trainer", "_moved", "nothing public does it")
    monkeypatch.setattr(contract, "LIGHTNING_PARTS", (*LIGHTNING_PARTS, row))
    return row


def test_a_run_without_a_part_is_refused_before_it_trains(missing: Row) -> None:
    class Started(Regression):
        def on_fit_start(self) -> None:
            pytest.fail("the run has started")

        on_stage_start = on_evaluate_start = on_fit_start

    brain = make(Started)
    before = weights(brain)
    words = (
        rf"Lightning {lightning.__version__} .*Trainer\._moved \(nothing public does it\).*"
        r'tested with Lightning 2\.4 to 2\.6\.6\. Run pip install "lightning==2\.6\.6"'
    )
    with pytest.raises(UnsupportedError, match=words):
        brain.fit(range(1), loader())
    with pytest.raises(UnsupportedError, match=words):
        trainer_with().fit(to_lightning(brain), loader())
    with pytest.raises(UnsupportedError, match=words):
        brain.evaluate(loader())
    assert all_equal(weights(brain), before)


def test_a_name_that_cannot_be_imported_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_imports()
    for owner in ("lightning.pytorch.loops", "lightning.pytorch.moved"):
        row = Row(owner, "_Moved", "nothing public does it")
        monkeypatch.setattr(contract, "LIGHTNING_PARTS", (row,))
        with pytest.raises(UnsupportedError, match=rf"{owner}\._Moved \(nothing public"):
            check_imports()


def test_a_part_that_came_later_is_not_missed_before() -> None:
    check_contract()
    assert holds(Row("lightning.pytorch:Trainer", "_moved", "", since="99"))
    assert not holds(Row("lightning.pytorch:Trainer", "_moved", ""))


@pytest.mark.parametrize(("version", "count"), [("2.6.7", 1), ("3.0", 1), ("2.6.6", 0)])
def test_an_untested_lightning_gives_one_warning_at_import(
    version: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lightning, "__version__", version)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        runpy.run_path(versions.__file__)
    assert len(found) == count
    for each in found:
        assert f"Lightning {version} is installed" in str(each.message)
        assert "tested with 2.4 to 2.6.6" in str(each.message)
