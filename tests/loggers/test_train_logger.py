"""``LightningTrainLogger`` logs the metrics of a recipe to Lightning's loggers."""

from __future__ import annotations

import inspect
import logging
import math
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml
from lightning.pytorch.loggers import CSVLogger
from speechbrain.utils.train_logger import FileTrainLogger, TensorboardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from brain_lightning import BrainTypeError, LightningTrainLogger
from brain_lightning.loggers.log_versions import log_class
from tests.support.brains import loader
from tests.support.processes import TORCHRUN, check_python
from tests.support.reporting import (
    Stub,
    csv_logger,
    killed_twice_and_resumed,
    media,
    reporting,
    rows_in,
    scalars_in,
    speechbrain_reporting,
    tensorboard_logger,
    train,
    train_and_test,
)

# ---------------------------------------------------------------------- logged metrics


def test_names_are_those_of_a_trainer_and_entries_are_logged_at_their_epoch() -> None:
    stub = Stub()
    train_and_test(reporting(LightningTrainLogger(stub), epochs=2))
    assert [step for step, _ in stub.entries] == [1, 2, 2]
    epoch, test = stub.entries[0][1], stub.entries[-1][1]
    names = {"epoch", "lr", "train_loss", "train_accuracy", "valid_loss", "valid_WER"}
    assert epoch.keys() == names
    assert (epoch["valid_WER"], epoch["train_accuracy"], epoch["lr"]) == (29.0, 0.125, 0.1)
    assert test.keys() == {"Epoch loaded", "test_loss", "test_WER"}


def test_one_line_of_yaml_replaces_a_speechbrain_logger(tmp_path: Path) -> None:
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


def test_several_loggers_get_the_same_entries(tmp_path: Path) -> None:
    stubs = [Stub(), Stub()]
    train(reporting(LightningTrainLogger(stubs), epochs=2))
    assert stubs[0].entries == stubs[1].entries
    assert len(stubs[0].entries) == 2


def test_lists_dictionaries_and_values_that_are_no_numbers(
    caplog: pytest.LogCaptureFixture,
) -> None:
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


def test_positions_of_entries_without_an_epoch() -> None:
    stub = Stub()
    train_logger = LightningTrainLogger(stub)
    train_logger.log_stats({"lr": 1}, {"loss": 3})
    train_logger.log_stats({"lr": 1}, {"loss": 3})
    train_logger.log_stats({}, test_stats={"loss": 3})
    train_logger.log_stats({"steps": 500}, {"loss": 3})
    assert [step for step, _ in stub.entries] == [1, 2, 2, 500]


@pytest.mark.parametrize("odd", [math.nan, math.inf, 1j, torch.tensor(1j)], ids=str)
def test_values_that_are_no_numbers_do_not_raise(odd: Any) -> None:
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
def test_other_objects_than_loggers_raise(logger: Any) -> None:
    with pytest.raises(BrainTypeError, match=r"is not a logger.*lightning\.pytorch\.loggers"):
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


# ----------------------------------------------------------------- with a Trainer


def test_a_logger_that_is_also_the_trainers_has_each_entry_once(tmp_path: Path) -> None:
    logger, own = Stub(), Stub()
    train_logger = LightningTrainLogger([logger, own])
    arguments = {"logger": logger, "log_every_n_steps": 2}
    train_and_test(reporting(train_logger, epochs=2, trainer=arguments))
    with_wer = [metrics for _, metrics in logger.entries if "valid_WER" in metrics]
    assert [metrics["valid_WER"] for metrics in with_wer] == [29.0, 28.0]
    assert sum("test_WER" in metrics for _, metrics in logger.entries) == 1
    assert [step for step, _ in own.entries] == [1, 2, 2]
    # Outside of a run the Trainer does not log.
    train_logger.log_stats({"epoch": 3}, {"loss": 1.0})
    assert logger.entries[-1] == (3, {"epoch": 3.0, "train_loss": 1.0})


# ------------------------------------------------------------------ audio and figures


def test_audio_and_figures_are_files_in_the_folder_of_a_csv_log(tmp_path: Path) -> None:
    media(csv_logger(tmp_path, version=0)())
    folder = tmp_path / "lightning_logs" / "version_0"
    with wave.open(str(folder / "audio" / "voice" / "3.wav")) as file:
        assert (file.getframerate(), file.getnframes(), file.getnchannels()) == (8000, 800, 1)
        samples = torch.frombuffer(bytearray(file.readframes(800)), dtype=torch.int16)
    assert (samples[0], samples[-1]) == (-32767, 32767)
    pictures = sorted(path.parent.name for path in folder.glob("figures/*/3.png"))
    assert pictures == ["attention", "spectrogram"]


def test_audio_and_figures_in_tensorboard(tmp_path: Path) -> None:
    media(tensorboard_logger(tmp_path, version=0)())
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    events.Reload()
    assert [event.step for event in events.Audio("voice")] == [3]
    assert [event.step for event in events.Images("spectrogram")] == [3]
    assert [event.step for event in events.Images("attention")] == [3]


def test_a_logger_that_does_not_support_audio_and_figures_logs_one_warning_each(
    caplog: pytest.LogCaptureFixture,
) -> None:
    train_logger = LightningTrainLogger(Stub())
    media(train_logger)
    media(train_logger)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warned == [
        "Stub does not support audio, so 'voice' is not logged.",
        "Stub does not support figures, so 'spectrogram' is not logged.",
        "Stub does not support figures, so 'attention' is not logged.",
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
    # SpeechBrain's logger appends, so an epoch after the checkpoint is logged twice.
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


# --------------------------------------------------------------- separate processes


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_a_service_has_each_epoch_once(service: str, tmp_path: Path) -> None:
    check_python("-m", "tests.support.log_services", service, cwd=tmp_path)


TWO = """
import sys
import torch
from lightning.pytorch.loggers import CSVLogger
from brain_lightning import LightningTrainLogger
from tests.support.brains import loader
from tests.support.reporting import reporting

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
    check_python(*TORCHRUN, str(script), str(tmp_path / "logs"), cwd=tmp_path)
    (log,) = (tmp_path / "logs").rglob("metrics.csv")
    assert [row["step"] for row in rows_in(log.parent)] == ["1", "2", "2", "1"]


class DownOnce(Stub):
    """A service that is not available at first."""

    tries = 0


def test_a_logger_that_fails_to_open_does_not_affect_other_loggers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(logger: Any) -> Any:
        if isinstance(logger, DownOnce):
            DownOnce.tries += 1
            if DownOnce.tries == 1:
                raise ConnectionError
        return log_class(logger)

    monkeypatch.setattr("brain_lightning.loggers.train_logger.log_class", opened)
    down = DownOnce()
    train_logger = LightningTrainLogger([CSVLogger(tmp_path), down])
    with pytest.raises(ConnectionError):
        train_logger.log_stats({"epoch": 1}, {"loss": 1.0})
    train_logger.log_stats({"epoch": 2}, {"loss": 0.5})
    (folder,) = (tmp_path / "lightning_logs").iterdir()
    assert [row["step"] for row in rows_in(folder)] == ["1", "2"]
    assert [step for step, _ in down.entries] == [2]
