"""``LightningTrainLogger`` with W&B, offline, and MLflow, where these are installed.

Each run is in a process of its own: W&B leaves threads and variables behind.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .test_train_logger import environment

MEDIA = ("voice", "spectrogram", "attention")


def in_a_process(code: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder, env={**environment(), "WANDB_MODE": "offline"},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------- W&B

WANDB = """
from lightning.pytorch.loggers import WandbLogger
from tests.test_train_logger import *
logger = WandbLogger(project="p", save_dir=".", offline=True, version="one", prefix={prefix!r})
# What W&B puts there where a run is resumed from its server (Run._set_run_obj).
logger.experiment.summary.update({summary})
train_logger = LightningTrainLogger(logger)
"""


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of the only run that was written."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    (file,) = folder.rglob("*.wandb")
    store, rows = DataStore(), []
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append(
                {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            )
    return rows


@pytest.mark.parametrize("prefix", ["", "mine"])
def test_wandb(tmp_path: Path, prefix: str) -> None:
    pytest.importorskip("wandb", reason="W&B is not installed")
    code = WANDB.format(prefix=prefix, summary={})
    in_a_process(code + "train_and_test(reporting(train_logger, epochs=2))", tmp_path)
    before = f"{prefix}-" if prefix else ""
    rows = history(tmp_path)
    assert [row["trainer/global_step"] for row in rows] == [1, 2, 2]
    assert [row.get(f"{before}valid_WER") for row in rows] == [29, 28, None]
    assert rows[-1][f"{before}test_WER"] == 5


@pytest.mark.parametrize("prefix", ["", "mine"])
def test_wandb_resumed_has_each_epoch_once(tmp_path: Path, prefix: str) -> None:
    pytest.importorskip("wandb", reason="W&B is not installed")
    before = f"{prefix}-" if prefix else ""
    # Killed in epoch 2, of which one entry of two was made.
    last = {"epoch": 2, "train_loss": 0.5, "valid_loss": 0.75}
    summary = {f"{before}{name}": value for name, value in last.items()}
    code = WANDB.format(prefix=prefix, summary=summary)
    entries = [(1, 0.75, 1.0), (2, 0.5, 0.8), (3, 0.25, 0.7)]
    code += f"for epoch, train, valid in {entries}:\n"
    code += "    train_logger.log_stats({'epoch': epoch}, {'loss': train})\n"
    code += "    train_logger.log_stats({'epoch': epoch}, None, {'loss': valid})\n"
    in_a_process(code, tmp_path)
    found = [
        (row[f"{before}epoch"], row.get(f"{before}train_loss"), row.get(f"{before}valid_loss"))
        for row in history(tmp_path)
    ]
    assert found == [(2, None, 0.8), (3, 0.25, None), (3, None, 0.7)]


def test_sounds_and_pictures_in_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="W&B is not installed")
    in_a_process(WANDB.format(prefix="", summary={}) + "media(train_logger)", tmp_path)
    rows = history(tmp_path)
    assert [name for row in rows for name in row if name.split("/")[0] in MEDIA]
    files = {path.suffix for path in tmp_path.rglob("media/**/*") if path.is_file()}
    assert files == {".wav", ".png"}


# ----------------------------------------------------------------------------- MLflow

MLFLOW = """
from lightning.pytorch.loggers import MLFlowLogger
from tests.test_train_logger import *
from mlflow.tracking import MlflowClient
URI = "sqlite:///mlflow.db"
client = MlflowClient(URI)
experiment = client.create_experiment("e", artifact_location=str(Path("artifacts").resolve()))
def new(prefix=""):
    run_id = client.create_run(experiment).info.run_id
    def train_logger():
        return LightningTrainLogger(
            MLFlowLogger("e", tracking_uri=URI, run_id=run_id, prefix=prefix))
    return run_id, train_logger
def history(run_id):
    metrics = client.get_run(run_id).data.metrics
    return {name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)]
            for name in metrics}
"""


@pytest.mark.parametrize("prefix", ["", "mine"])
def test_mlflow_resumed_has_each_epoch_once(tmp_path: Path, prefix: str) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed")
    code = MLFLOW + f"whole, whole_logger = new({prefix!r})\n"
    code += f"killed, killed_logger = new({prefix!r})\n"
    code += "folder = Path.cwd()\n"
    code += "train_and_test(reporting(whole_logger(), folder / 'save0'))\n"
    code += "killed_twice_and_resumed(killed_logger, folder)\n"
    code += "assert history(killed) == history(whole), history(killed)\n"
    code += f"name = {(prefix + '-' if prefix else '') + 'valid_WER'!r}\n"
    code += "assert history(whole)[name] == [(1, 29), (2, 28), (3, 27), (4, 26)]\n"
    in_a_process(code, tmp_path)


def test_sounds_and_pictures_in_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed")
    in_a_process(MLFLOW + "media(new()[1]())", tmp_path)
    found = {str(Path(*path.parts[-3:])) for path in tmp_path.rglob("artifacts/**/3.*")}
    assert found == {
        "audio/voice/3.wav", "figures/spectrogram/3.png", "figures/attention/3.png"
    }  # fmt: skip
