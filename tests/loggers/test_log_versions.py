"""A resumed run continues its own log, with each epoch once."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from brain_lightning import LightningTrainLogger
from tests.support.brains import loader
from tests.support.reporting import (
    Killed,
    csv_logger,
    killed,
    killed_twice_and_resumed,
    reporting,
    rows_in,
    scalars_in,
    steps_in,
    tensorboard_logger,
    train,
    train_and_test,
)

VERSIONS: list[dict[str, Any]] = [
    {}, {"name": None}, {"name": "log", "version": 7}, {"version": "a", "prefix": "mine"}
]  # fmt: skip


@pytest.mark.parametrize("where", VERSIONS, ids=str)
def test_a_resumed_csv_log_equals_that_of_an_uninterrupted_run(
    tmp_path: Path, where: dict[str, Any]
) -> None:
    train_and_test(reporting(csv_logger(tmp_path / "whole", **where)(), tmp_path / "save0"))
    killed_twice_and_resumed(csv_logger(tmp_path / "killed", **where), tmp_path)
    whole, killed = ([*(tmp_path / run).rglob("metrics.*")] for run in ("whole", "killed"))
    assert len(whole) == len(killed) == 1
    assert killed[0].read_text() == whole[0].read_text()
    assert len(whole[0].read_text().splitlines()) == 1 + 4 + 1


@pytest.mark.parametrize("where", VERSIONS, ids=str)
def test_a_resumed_tensorboard_log_equals_that_of_an_uninterrupted_run(
    tmp_path: Path, where: dict[str, Any]
) -> None:
    where = {**where, "name": where.get("name", "log") or ""}
    runs = [tensorboard_logger(tmp_path / run, **where) for run in ("whole", "killed")]
    train_and_test(reporting(runs[0](), tmp_path / "save0"))
    killed_twice_and_resumed(runs[1], tmp_path)
    folders = [
        {path.parent for path in (tmp_path / run).rglob("*tfevents*")}
        for run in ("whole", "killed")
    ]
    assert [len(found) for found in folders] == [1, 1]
    whole, killed = (scalars_in(found.pop()) for found in folders)
    assert killed == whole
    name = "mine-valid_WER" if "prefix" in where else "valid_WER"
    assert whole[name] == [(epoch, 30.0 - epoch) for epoch in (1, 2, 3, 4)]


def test_csv_and_tensorboard_share_a_folder_and_are_both_continued(tmp_path: Path) -> None:
    def both() -> LightningTrainLogger:
        return LightningTrainLogger([CSVLogger(tmp_path), TensorBoardLogger(tmp_path)])

    killed_twice_and_resumed(both, tmp_path)
    assert len(list(tmp_path.rglob("metrics.csv"))) == 1
    assert len({path.parent for path in tmp_path.rglob("*tfevents*")}) == 1


@pytest.mark.parametrize("make_logger", [csv_logger, tensorboard_logger])
def test_a_new_run_has_a_new_version(tmp_path: Path, make_logger: Any) -> None:
    for _ in range(2):
        train(reporting(make_logger(tmp_path)(), epochs=2))
    versions = sorted(path.name for path in (tmp_path / "lightning_logs").iterdir())
    assert versions == ["version_0", "version_1"]


def test_a_test_without_training_is_added_to_the_newest_log(tmp_path: Path) -> None:
    train(reporting(csv_logger(tmp_path)(), tmp_path / "save", epochs=2))
    reporting(csv_logger(tmp_path)(), tmp_path / "save", epochs=2).evaluate(loader())
    rows = rows_in(tmp_path / "lightning_logs" / "version_0")
    assert [(row["step"], row["test_WER"]) for row in rows] == [
        ("1", ""), ("2", ""), ("2", "5.0")
    ]  # fmt: skip


@pytest.mark.parametrize("make_logger", [csv_logger, tensorboard_logger])
def test_a_resumed_process_may_test_before_it_trains(tmp_path: Path, make_logger: Any) -> None:
    killed(reporting(make_logger(tmp_path)(), tmp_path / "save", killed_in=3))
    brain = reporting(make_logger(tmp_path)(), tmp_path / "save")
    brain.evaluate(loader(8))
    train(brain)
    (folder,) = (tmp_path / "lightning_logs").iterdir()
    if make_logger is csv_logger:
        assert steps_in(folder) == ["1", "2", "2", "3", "4"]
    else:
        scalars = scalars_in(folder)
        assert [step for step, _ in scalars["valid_WER"]] == [1, 2, 3, 4]
        assert scalars["test_WER"] == [(2, 5.0)]


def test_an_untrained_model_may_be_tested_first(tmp_path: Path) -> None:
    for _ in range(2):
        brain = reporting(csv_logger(tmp_path)(), epochs=2)
        brain.evaluate(loader(8))
        train(brain)
    versions = sorted((tmp_path / "lightning_logs").iterdir())
    assert [steps_in(version) for version in versions] == [["0", "1", "2"]] * 2


def test_audio_may_be_logged_before_the_first_metrics(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_and_test(reporting(csv_logger(whole)(), tmp_path / "save0", sounds=True))
    killed_twice_and_resumed(csv_logger(resumed), tmp_path, sounds=True)
    found = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*v")}
        for folder in (whole, resumed)
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 1 + 4


def test_a_finished_run_that_is_tested_again_has_its_tests_once(tmp_path: Path) -> None:
    for _ in range(2):
        brain = reporting(csv_logger(tmp_path)(), tmp_path / "save")
        train_and_test(brain)
        brain.evaluate(loader(8))
    (folder,) = (tmp_path / "lightning_logs").iterdir()
    assert steps_in(folder) == ["1", "2", "3", "4", "4", "4"]


@pytest.mark.parametrize("make_logger", [csv_logger, tensorboard_logger])
def test_without_begin_run_a_run_is_new(tmp_path: Path, make_logger: Any) -> None:
    for steps in [(100, 200, 300), (150, 250)]:
        train_logger = make_logger(tmp_path)()
        for step in steps:
            train_logger.log_stats({"steps": step}, {"loss": 1.0})
    versions = sorted((tmp_path / "lightning_logs").iterdir())
    read = {
        csv_logger: lambda folder: [int(step) for step in steps_in(folder)],
        tensorboard_logger: lambda folder: [s for s, _ in scalars_in(folder)["train_loss"]],
    }[make_logger]
    assert [read(version) for version in versions] == [[100, 200, 300], [150, 250]]


@pytest.mark.parametrize("killed_in", [(3,), (3, 5), (3, 16)], ids=str)
def test_a_trainers_log_in_the_same_folder_is_not_changed(
    tmp_path: Path, killed_in: tuple[int, ...]
) -> None:
    trainers: dict[Path, str] = {}
    for epoch in (*killed_in, 0):
        logger = CSVLogger(tmp_path)
        brain = reporting(
            csv_logger(tmp_path)(), tmp_path / "save", epochs=18, killed_in=epoch,
            trainer={"logger": logger, "log_every_n_steps": 1},
        )  # fmt: skip
        killed(brain) if epoch else train(brain)
        trainers[Path(logger.log_dir, "metrics.csv")] = ""
        trainers = {path: old or path.read_text() for path, old in trainers.items()}
    assert {path: path.read_text() for path in trainers} == trainers
    (own,) = {*tmp_path.rglob("metrics.csv")} - trainers.keys()
    assert steps_in(own.parent) == [str(epoch) for epoch in range(1, 19)]


def test_a_kill_while_a_csv_log_is_rewritten_loses_no_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: dict[str, Any] = {"version": 0}
    train(reporting(csv_logger(tmp_path, **where)(), epochs=3))
    folder = tmp_path / "lightning_logs" / "version_0"
    before = rows_in(folder)
    with monkeypatch.context() as patch:
        patch.setattr(CSVLogger, "save", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            going_on(csv_logger(tmp_path, **where)).log_stats({"epoch": 3}, {"loss": 0.0})
    going_on(csv_logger(tmp_path, **where)).log_stats({"epoch": 4}, {"loss": 0.0})
    assert rows_in(folder)[:3] == before
    assert [path.name for path in folder.glob("metrics*")] == ["metrics.csv"]


def going_on(train_logger: Callable[[], LightningTrainLogger]) -> LightningTrainLogger:
    resumed = train_logger()
    resumed.begin_run(goes_on=True)
    return resumed


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_backup_after_a_kill_never_replaces_newer_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_logger = csv_logger(tmp_path, version=0)
    make_logger().log_stats({"epoch": 1}, {"loss": 101.0})
    with monkeypatch.context() as patch:
        patch.setattr(CSVLogger, "save", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            going_on(make_logger).log_stats({"epoch": 2}, {"loss": 0.0})
    make_logger().log_stats({"epoch": 1}, {"loss": 201.0})
    going_on(make_logger).log_stats({"epoch": 2}, {"loss": 202.0})
    rows = rows_in(tmp_path / "lightning_logs" / "version_0")
    assert [row["train_loss"] for row in rows] == ["201.0", "202.0"]


DAMAGED = {
    "half a number": b"2.0,2,0.1",
    "a field too many": b"2.0,2,1.0,9.9\r\n",
    "a field too few": b"2.0,2\r\n",
    "no step": b"2.0,,1.0\r\n",
    "no number": b"2.0,2,\xff1\r\n",
    "zeros": b"\0" * 9,
    "zeros in a row": b"2.0,2,\0\0\r\n",
}


@pytest.mark.parametrize("row", DAMAGED.values(), ids=DAMAGED)
def test_a_row_that_a_kill_has_damaged_is_removed(tmp_path: Path, row: bytes) -> None:
    csv_logger(tmp_path)().log_stats({"epoch": 1}, {"loss": 0.5})
    folder = tmp_path / "lightning_logs" / "version_0"
    with open(folder / "metrics.csv", "ab") as file:
        file.write(row)
    going_on(csv_logger(tmp_path)).log_stats({"epoch": 3}, {"loss": 0.5})
    assert steps_in(folder) == ["1", "3"]


def test_a_pickled_copy_continues_the_log(tmp_path: Path) -> None:
    train(reporting(csv_logger(tmp_path)(), tmp_path / "save", epochs=2))
    train_logger = going_on(csv_logger(tmp_path))
    train_logger.log_stats({"epoch": 3}, {"loss": 0.0})
    copied = pickle.loads(pickle.dumps(train_logger))  # noqa: S301
    copied.log_stats({"epoch": 2}, {"loss": 0.0})
    assert steps_in(tmp_path / "lightning_logs" / "version_0") == ["1", "2", "3", "2"]


def test_another_run_replaces_a_tensorboard_version_that_is_set(
    tmp_path: Path,
) -> None:
    for epochs in (3, 2):
        train(reporting(tensorboard_logger(tmp_path, version=0)(), epochs=epochs))
    scalars = scalars_in(tmp_path / "lightning_logs" / "version_0")
    assert [step for step, _ in scalars["valid_WER"]] == [1, 2]


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_another_run_replaces_a_csv_version_that_is_set(tmp_path: Path) -> None:
    for _ in range(2):
        train(reporting(csv_logger(tmp_path, version=3)(), epochs=2))
    rows = rows_in(tmp_path / "lightning_logs" / "version_3")
    assert [row["step"] for row in rows] == ["1", "2"]


def test_a_logger_that_is_also_the_trainers_continues_as_with_a_trainer(
    tmp_path: Path,
) -> None:
    for killed_in in (3, 0):
        logger = CSVLogger(tmp_path)
        brain = reporting(
            LightningTrainLogger(logger), tmp_path / "save", killed_in=killed_in, sounds=True,
            trainer={"logger": logger, "log_every_n_steps": 2},
        )  # fmt: skip
        killed(brain) if killed_in else train(brain)
    versions = sorted((tmp_path / "lightning_logs").iterdir())
    found = [{row["valid_WER"] for row in rows_in(version)} - {""} for version in versions]
    assert found == [{"29.0", "28.0"}, {"27.0", "26.0"}]
