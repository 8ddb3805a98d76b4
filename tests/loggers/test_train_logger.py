"""``LightningTrainLogger``: what a recipe reports, in Lightning's loggers, each epoch once."""

from __future__ import annotations

import csv
import inspect
import logging
import math
import os
import subprocess
import sys
import time
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import speechbrain.utils.train_logger
import torch
from hyperpyyaml import load_hyperpyyaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from matplotlib.figure import Figure
from speechbrain.utils.train_logger import FileTrainLogger, TensorboardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from brain_lightning import BrainTypeError, Checkpointer, EpochCounter, LightningTrainLogger
from tests.cli.test_main import stub_path
from tests.support.brains import Regression, loader, make

Row = dict[str, str]


class Stub(Logger):
    """Any other logger."""

    name, version = "stub", 0

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.entries.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Killed(RuntimeError):  # noqa: N818  no error of anybody's
    """What ends a run in these tests."""


class Reporting(Regression):
    """Logs an epoch and saves it; is killed in between if asked to."""

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        log_stats = self.hparams.train_logger.log_stats
        if stage.name == "TRAIN":
            self.train_stats = {"loss": stage_loss, "accuracy": epoch / 8}
        elif stage.name == "VALID":
            valid = {"loss": stage_loss, "WER": 30.0 - epoch}
            if getattr(self.hparams, "sounds", False):
                sound = torch.full((80,), epoch / 10)
                self.hparams.train_logger.log_audio("voice", sound, 8000)
            log_stats({"epoch": epoch, "lr": 0.1}, self.train_stats, valid)
            if epoch == self.hparams.killed_in:
                raise Killed
            if self.checkpointer is not None:
                self.checkpointer.save_and_keep_only(meta={"loss": stage_loss})
        else:
            loaded = {"Epoch loaded": self.hparams.epoch_counter.current}
            log_stats(loaded, test_stats={"loss": stage_loss, "WER": 5.0})


def reporting(
    train_logger: Any,
    folder: Path | None = None,
    epochs: int = 4,
    killed_in: int = 0,
    **more: Any,
) -> Any:
    counter = EpochCounter(epochs)
    hparams = {
        "train_logger": train_logger, "epoch_counter": counter, "killed_in": killed_in, **more
    }  # fmt: skip
    checkpointer = None if folder is None else Checkpointer(folder, {"counter": counter})
    brain = make(Reporting, hparams=hparams, checkpointer=checkpointer)
    if checkpointer is not None:
        checkpointer.add_recoverable("model", brain.modules.model)
    return brain


def train(brain: Any) -> None:
    brain.fit(brain.hparams.epoch_counter, loader(), loader(8))


def train_and_test(brain: Any) -> None:
    train(brain)
    brain.evaluate(loader(12))


def killed(brain: Any) -> None:
    with pytest.raises(Killed):
        train(brain)


def killed_twice_and_resumed(
    train_logger: Callable[[], Any], folder: Path, **more: Any
) -> None:
    """Each time in a process of its own, as far as objects go."""
    for killed_in in (2, 3):
        killed(reporting(train_logger(), folder / "save", killed_in=killed_in, **more))
        # TensorBoard reads its files in the order of the seconds in their names.
        time.sleep(1.1)
    train_and_test(reporting(train_logger(), folder / "save", **more))


def rows_in(folder: Path) -> list[Row]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def steps_in(folder: Path) -> list[str]:
    return [row["step"] for row in rows_in(folder)]


def scalars_in(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def csv_logger(folder: Path, **kwargs: Any) -> Callable[[], LightningTrainLogger]:
    return lambda: LightningTrainLogger(CSVLogger(folder, **kwargs))


def tensorboard_logger(folder: Path, **kwargs: Any) -> Callable[[], LightningTrainLogger]:
    return lambda: LightningTrainLogger(TensorBoardLogger(folder, **kwargs))


# ---------------------------------------------------------------------- what is logged


def test_names_are_a_trainers_and_entries_stand_at_their_epoch() -> None:
    stub = Stub()
    train_and_test(reporting(LightningTrainLogger(stub), epochs=2))
    assert [step for step, _ in stub.entries] == [1, 2, 2]
    epoch, test = stub.entries[0][1], stub.entries[-1][1]
    names = {"epoch", "lr", "train_loss", "train_accuracy", "valid_loss", "valid_WER"}
    assert epoch.keys() == names
    assert (epoch["valid_WER"], epoch["train_accuracy"], epoch["lr"]) == (29.0, 0.125, 0.1)
    assert test.keys() == {"Epoch loaded", "test_loss", "test_WER"}


def test_one_line_of_yaml_takes_the_place_of_a_speechbrain_logger(tmp_path: Path) -> None:
    hparams = load_hyperpyyaml(
        f"output_folder: {tmp_path}\n"
        "train_logger: !new:brain_lightning.LightningTrainLogger\n"
        "    logger: !new:lightning.pytorch.loggers.CSVLogger\n"
        "        save_dir: !ref <output_folder>\n"
    )
    train_and_test(reporting(hparams["train_logger"], epochs=2))
    rows = rows_in(tmp_path / "lightning_logs" / "version_0")
    assert [(row["step"], row["valid_WER"]) for row in rows] == [
        ("1", "29.0"), ("2", "28.0"), ("2", "")
    ]  # fmt: skip
    assert rows[2]["test_WER"] == "5.0"


def test_several_loggers_all_get_it(tmp_path: Path) -> None:
    stubs = [Stub(), Stub()]
    train(reporting(LightningTrainLogger(stubs), epochs=2))
    assert stubs[0].entries == stubs[1].entries
    assert len(stubs[0].entries) == 2


def test_lists_dictionaries_and_what_is_no_number(caplog: pytest.LogCaptureFixture) -> None:
    stub = Stub()
    train_logger = LightningTrainLogger(stub)
    for epoch in (1, 2):
        train_logger.log_stats(
            {"Epoch": epoch, "name": "run"},
            {"loss": [1.0, torch.tensor(2.0)], "asr": {"WER": torch.tensor([7.0])}},
            {"confusions": torch.ones(2, 2), "empty": []},
        )
    assert stub.entries[1] == (2, {"Epoch": 2.0, "train_loss": 1.5, "train_asr_WER": 7.0})
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    names = sorted(message.split("'")[1] for message in warned)
    assert names == ["name", "valid_confusions", "valid_empty"]


def test_where_entries_stand_without_an_epoch() -> None:
    stub = Stub()
    train_logger = LightningTrainLogger(stub)
    train_logger.log_stats({"lr": 1}, {"loss": 3})
    train_logger.log_stats({"lr": 1}, {"loss": 3})
    train_logger.log_stats({}, test_stats={"loss": 3})
    train_logger.log_stats({"steps": 500}, {"loss": 3})
    assert [step for step, _ in stub.entries] == [1, 2, 2, 500]


@pytest.mark.parametrize("odd", [math.nan, math.inf, 1j, torch.tensor(1j)], ids=str)
def test_no_number_raises(odd: Any) -> None:
    stub = Stub()
    brain = reporting(LightningTrainLogger(stub))

    def on_stage_end(stage: Any, stage_loss: float, epoch: Any = None) -> None:
        report = brain.hparams.train_logger.log_stats
        report({"epoch": odd, "Epoch loaded": odd}, {"loss": odd, "WER": 1})

    brain.on_stage_end = on_stage_end
    brain.evaluate(loader())
    ((step, numbers),) = stub.entries
    assert (step, numbers["train_WER"]) == (1, 1.0)


@pytest.mark.parametrize("logger", ["CSVLogger", None, [CSVLogger], {}])
def test_anything_but_a_logger_is_refused_in_words(logger: Any) -> None:
    with pytest.raises(BrainTypeError, match=r"lightning\.pytorch\.loggers.*got"):
        LightningTrainLogger(logger)


def test_the_line_is_the_one_that_filetrainlogger_writes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "brain_lightning.loggers.train_logger")
    stats: Any = [
        {"epoch": 3, "lr": 0.00123, "name": "a"}, {"loss": 250.0}, {"WER": 12.3456}, {"b": {}}
    ]  # fmt: skip
    FileTrainLogger(str(tmp_path / "log")).log_stats(*stats, verbose=False)
    LightningTrainLogger(Stub()).log_stats(*stats)
    LightningTrainLogger(Stub()).log_stats(*stats, verbose=False)
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert lines == (tmp_path / "log").read_text().splitlines()


def test_its_methods_have_the_signatures_of_speechbrains() -> None:
    methods = {
        "log_stats": FileTrainLogger,
        "log_audio": TensorboardLogger,
        "log_figure": TensorboardLogger,
    }
    for name, cls in methods.items():
        theirs = inspect.signature(getattr(cls, name)).parameters
        ours = inspect.signature(getattr(LightningTrainLogger, name)).parameters
        assert [(p.name, p.default) for p in ours.values()] == [
            (p.name, p.default) for p in theirs.values()
        ]


# ----------------------------------------------------------------- beside a Trainer


def test_a_logger_that_is_the_trainers_too_has_it_once(tmp_path: Path) -> None:
    logger, own = Stub(), Stub()
    train_logger = LightningTrainLogger([logger, own])
    arguments = {"logger": logger, "log_every_n_steps": 2}
    train_and_test(reporting(train_logger, epochs=2, trainer=arguments))
    with_wer = [metrics for _, metrics in logger.entries if "valid_WER" in metrics]
    assert [metrics["valid_WER"] for metrics in with_wer] == [29.0, 28.0]
    assert sum("test_WER" in metrics for _, metrics in logger.entries) == 1
    assert [step for step, _ in own.entries] == [1, 2, 2]
    # Outside of a run nobody else logs what it is given.
    train_logger.log_stats({"epoch": 3}, {"loss": 1.0})
    assert logger.entries[-1] == (3, {"epoch": 3.0, "train_loss": 1.0})


# ------------------------------------------------------------------ sounds and pictures


def media(train_logger: LightningTrainLogger) -> None:
    train_logger.log_stats({"epoch": 3}, {"loss": 1.0})
    train_logger.log_audio("voice", torch.linspace(-1.5, 1.5, 800).reshape(1, -1), 8000)
    train_logger.log_figure("spectrogram", torch.rand(1, 8, 5, requires_grad=True))
    train_logger.log_figure("attention", Figure())


def test_sounds_and_pictures_are_files_beside_a_csv_log(tmp_path: Path) -> None:
    media(csv_logger(tmp_path, version=0)())
    folder = tmp_path / "lightning_logs" / "version_0"
    with wave.open(str(folder / "audio" / "voice" / "3.wav")) as file:
        assert (file.getframerate(), file.getnframes(), file.getnchannels()) == (8000, 800, 1)
        samples = torch.frombuffer(bytearray(file.readframes(800)), dtype=torch.int16)
    assert (samples[0], samples[-1]) == (-32767, 32767)
    pictures = sorted(path.parent.name for path in folder.glob("figures/*/3.png"))
    assert pictures == ["attention", "spectrogram"]


def test_sounds_and_pictures_in_tensorboard(tmp_path: Path) -> None:
    media(tensorboard_logger(tmp_path, version=0)())
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    events.Reload()
    assert [event.step for event in events.Audio("voice")] == [3]
    assert [event.step for event in events.Images("spectrogram")] == [3]
    assert [event.step for event in events.Images("attention")] == [3]


def test_a_logger_without_sounds_and_pictures_is_warned_about_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    train_logger = LightningTrainLogger(Stub())
    media(train_logger)
    media(train_logger)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warned == [
        "Stub does not log audio ('voice').",
        "Stub does not log figures ('spectrogram').",
        "Stub does not log figures ('attention').",
    ]


# ---------------------------------------------------------- SpeechBrain's loop and loggers


def test_on_speechbrains_loop_it_logs_the_same() -> None:
    ours, theirs = Stub(), Stub()
    train_and_test(reporting(LightningTrainLogger(ours)))
    train_and_test(speechbrain_reporting(LightningTrainLogger(theirs)))
    assert ours.entries == theirs.entries
    assert len(ours.entries) == 4 + 1


def test_filetrainlogger_writes_the_same_file_and_appends_when_resumed(tmp_path: Path) -> None:
    speechbrains = speechbrain_reporting(FileTrainLogger(str(tmp_path / "theirs.txt")))
    train_and_test(speechbrains)
    train_and_test(reporting(FileTrainLogger(str(tmp_path / "ours.txt"))))
    whole = (tmp_path / "theirs.txt").read_text()
    assert (tmp_path / "ours.txt").read_text() == whole
    killed_twice_and_resumed(lambda: FileTrainLogger(str(tmp_path / "killed.txt")), tmp_path)
    lines = (tmp_path / "killed.txt").read_text().splitlines()
    # SpeechBrain's logger appends: an epoch that was logged and not saved is there twice.
    assert list(dict.fromkeys(lines)) == whole.splitlines()
    assert len(lines) == len(whole.splitlines()) + 2


def test_speechbrains_tensorboardlogger_writes_the_same_scalars(tmp_path: Path) -> None:
    for folder, a_brain in (("ours", reporting), ("theirs", speechbrain_reporting)):
        train_logger = TensorboardLogger(str(tmp_path / folder))
        train_and_test(a_brain(train_logger))
        train_logger.writer.close()
    ours, theirs = scalars_in(tmp_path / "ours"), scalars_in(tmp_path / "theirs")
    assert ours == theirs
    assert [value for _, value in ours["WER/valid"]] == [29.0, 28.0, 27.0, 26.0]


def speechbrain_reporting(train_logger: Any) -> Any:
    """The same Brain on SpeechBrain's loop."""
    namespace = {
        name: vars(cls)[name]
        for cls in (Regression, Reporting)
        for name in ("compute_forward", "compute_objectives", "on_stage_end")
        if name in vars(cls)
    }
    cls = type("SpeechBrainReporting", (speechbrain.Brain,), namespace)
    counter = speechbrain.utils.epoch_loop.EpochCounter(4)
    hparams = {"train_logger": train_logger, "epoch_counter": counter, "killed_in": 0}
    return make(cls, hparams=hparams)


# --------------------------------------------------------------- processes of their own


def in_processes(*words: str, cwd: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[2]), stub_path(cwd)])
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_in_a_service_each_epoch_is_found_once(service: str, tmp_path: Path) -> None:
    in_processes("-m", "tests.support.log_services", service, cwd=tmp_path)


TWO = """
import sys
import torch
from lightning.pytorch.loggers import CSVLogger
from tests.loggers.test_train_logger import LightningTrainLogger, loader, reporting

brain = reporting(LightningTrainLogger(CSVLogger(sys.argv[1])), epochs=2)
brain.distributed_backend = "gloo"
brain.fit(brain.hparams.epoch_counter, loader().dataset, loader(8).dataset)
brain.evaluate(loader(12))
if brain.rank == 0:
    # Alone, as in a recipe that tests on the main process.
    brain.hparams.train_logger.log_stats({"Epoch loaded": 1}, test_stats={"WER": 6})
torch.distributed.destroy_process_group()
"""


def test_two_processes_log_once(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TWO)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    in_processes(*torchrun, str(script), str(tmp_path / "logs"), cwd=tmp_path)
    (log,) = (tmp_path / "logs").rglob("metrics.csv")
    assert [row["step"] for row in rows_in(log.parent)] == ["1", "2", "2", "1"]
