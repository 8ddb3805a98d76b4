"""A port as a diff, in place, and beside."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from brain_lightning.errors import RecipeError
from brain_lightning.port.files import (
    changed_lines,
    unified_diff,
    write_beside,
    write_in_place,
)
from brain_lightning.port.recipe import Change

BEFORE = "one\ntwo\x0cstill two\r\nthree\nfour"
AFTER = "one\n2\r\nthree\nfour and no end of line"


@pytest.fixture
def changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Change]:
    monkeypatch.chdir(tmp_path)
    for name in ("train.py", "hparams/a.yaml", "same.py"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(BEFORE.encode())
    Path("train.py").chmod(0o750)
    return [
        Change(Path("train.py"), BEFORE, AFTER),
        Change(tmp_path / "hparams" / "a.yaml", BEFORE, AFTER),
        Change(Path("same.py"), BEFORE, BEFORE),
    ]


@pytest.mark.parametrize("tool", [["git", "apply", "-"], ["patch", "-s", "-p1", "--binary"]])
def test_the_diff_is_one_that_tools_apply(changes: list[Change], tool: list[str]) -> None:
    diff = unified_diff(changes)
    assert [line for line in diff.splitlines() if line.startswith("+++")] == [
        "+++ b/train.py", "+++ b/hparams/a.yaml",
    ]  # fmt: skip
    subprocess.run(tool, input=diff.encode(), check=True)
    for change in changes:
        assert change.path.read_bytes().decode() == change.after
    assert [changed_lines(change) for change in changes] == [4, 4, 0]


def test_files_are_written_in_place_through_links(changes: list[Change]) -> None:
    Path("train.py").rename("real.py")
    Path("train.py").symlink_to("real.py")
    assert write_in_place(changes) == [change.path for change in changes[:2]]
    assert Path("train.py").is_symlink()
    assert Path("real.py").read_bytes() == AFTER.encode()
    assert Path("real.py").stat().st_mode & 0o777 == 0o750
    # Nothing is left of what was written beside them.
    assert not list(Path().rglob("tmp*"))


def test_files_are_written_beside_and_over_no_other(changes: list[Change]) -> None:
    places = write_beside(changes, Path("out"))
    assert list(places.values()) == [
        Path("out", n) for n in ("train.py", "hparams/a.yaml", "same.py")
    ]
    assert all(places[c.path].read_bytes().decode() == c.after for c in changes)
    assert Path("train.py").read_bytes() == BEFORE.encode()
    write_beside(changes, Path("out"))
    Path("out/same.py").write_text("of somebody")
    Path("out/train.py").unlink()
    with pytest.raises(RecipeError, match="exists already with other content"):
        write_beside(changes, Path("out"))
    assert not Path("out/train.py").exists()


def test_all_files_are_written_or_none(
    changes: list[Change], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def fails_on_yaml(source: str | Path, place: str | Path) -> None:
        if Path(place).suffix == ".yaml":
            raise PermissionError(13, "Permission denied")
        replace(source, place)

    monkeypatch.setattr(os, "replace", fails_on_yaml)
    for write in (write_in_place, lambda changes: write_beside(changes, Path("out"))):
        with pytest.raises(RecipeError, match=r"a\.yaml cannot be written: Permission denied"):
            write(changes)
        assert not list(Path().rglob("tmp*"))
    assert Path("train.py").read_bytes() == BEFORE.encode()
    assert Path("train.py").stat().st_mode & 0o777 == 0o750
    assert not Path("out/train.py").exists()


def test_a_folder_that_is_a_file_is_one_mistake(changes: list[Change]) -> None:
    for folder in ("same.py", "same.py/within"):
        with pytest.raises(RecipeError, match=r"same\.py.* cannot be written: "):
            write_beside(changes, Path(folder))
    # And a file that is a folder.
    Path("out/train.py").mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"out/train\.py cannot be written: "):
        write_beside(changes, Path("out"))
    assert not list(Path().rglob("tmp*"))
