"""Runs with W&B, offline, and MLflow, which leave threads and variables behind.

``python -m tests.support.log_services wandb`` or ``mlflow``, in a folder to write to.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

from brain_lightning import LightningTrainLogger
from tests.support.reporting import (
    killed_twice_and_resumed,
    media,
    reporting,
    train_and_test,
)

WERS = [(1, 29), (2, 28), (3, 27), (4, 26)]


def wandb() -> None:
    for prefix in ("", "mine-"):
        wandb_has_each_epoch(prefix)
        wandb_resumed_has_each_epoch_once(prefix)
    wandb_has_sounds_and_pictures()


def wandb_run(name: str, prefix: str = "") -> tuple[WandbLogger, list[dict[str, Any]]]:
    """A logger, and the rows that it hands to W&B."""
    logger = WandbLogger(
        project="p", save_dir=".", offline=True, version=name + prefix, prefix=prefix[:-1]
    )
    rows: list[dict[str, Any]] = []
    log = logger.experiment.log

    def noting(row: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        rows.append({key.removeprefix(prefix): value for key, value in row.items()})
        log(row, *args, **kwargs)

    logger.experiment.log = noting
    return logger, rows


def wandb_has_each_epoch(prefix: str) -> None:
    logger, rows = wandb_run("whole", prefix)
    train_and_test(reporting(LightningTrainLogger(logger)))
    steps = [(row["trainer/global_step"], row.get("valid_WER")) for row in rows]
    assert steps == [*WERS, (4, None)], rows
    assert rows[-1]["test_WER"] == 5
    assert logger.experiment.summary[f"{prefix}test_WER"] == 5
    logger.experiment.finish()


def wandb_resumed_has_each_epoch_once(prefix: str) -> None:
    logger, rows = wandb_run("resumed", prefix)
    # Killed in epoch 2, of which one entry of two was made. W&B puts its last numbers there
    # where it resumes a run from its server (wandb 0.31, Run._set_run_obj).
    last = {"epoch": 2, "train_loss": 0.5, "valid_loss": 0.75}
    logger.experiment.summary.update({prefix + name: value for name, value in last.items()})
    train_logger = LightningTrainLogger(logger)
    train_logger.begin_run(goes_on=True)
    for epoch, train, valid in [(1, 0.75, 1.0), (2, 0.5, 0.8), (3, 0.25, 0.7)]:
        train_logger.log_stats({"epoch": epoch}, {"loss": train})
        train_logger.log_stats({"epoch": epoch}, None, {"loss": valid})
    found = [(row["epoch"], row.get("train_loss"), row.get("valid_loss")) for row in rows]
    assert found == [(2, None, 0.8), (3, 0.25, None), (3, None, 0.7)], found
    other, rows = wandb_run("replaced", prefix)
    other.experiment.summary.update({f"{prefix}epoch": 2})
    LightningTrainLogger(other).log_stats({"epoch": 1}, {"loss": 0.75})
    assert len(rows) == 1, rows
    other.experiment.finish()
    logger.experiment.finish()


def wandb_has_sounds_and_pictures() -> None:
    logger, _ = wandb_run("media")
    media(LightningTrainLogger(logger))
    logger.experiment.finish()
    files = {path.suffix for path in Path.cwd().rglob("media/**/*") if path.is_file()}
    assert files == {".wav", ".png"}, files


def mlflow() -> None:
    from mlflow.tracking import MlflowClient

    uri = "sqlite:///mlflow.db"
    client = MlflowClient(uri)
    artifacts = Path("artifacts").resolve()
    experiment = client.create_experiment("e", artifact_location=str(artifacts))

    def new(prefix: str = "") -> tuple[str, Callable[[], LightningTrainLogger]]:
        run_id = client.create_run(experiment).info.run_id
        arguments = {"tracking_uri": uri, "run_id": run_id, "prefix": prefix}
        return run_id, lambda: LightningTrainLogger(MLFlowLogger("e", **arguments))

    def history(run_id: str) -> dict[str, list[tuple[int, float]]]:
        names = client.get_run(run_id).data.metrics
        return {
            name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)]
            for name in names
        }

    for prefix in ("", "mine"):
        (whole, whole_logger), (killed, killed_logger) = new(prefix), new(prefix)
        train_and_test(reporting(whole_logger(), Path(f"{prefix}0")))
        killed_twice_and_resumed(killed_logger, Path(f"{prefix}1"))
        train_and_test(reporting(killed_logger(), Path(f"{prefix}1", "save")))
        assert history(killed) == history(whole), history(killed)
        assert history(whole)[f"{prefix}-valid_WER" if prefix else "valid_WER"] == WERS
    media(new()[1]())
    found = {"/".join(path.parts[-3:]) for path in artifacts.rglob("3.*")}
    assert found == {
        "audio/voice/3.wav", "figures/spectrogram/3.png", "figures/attention/3.png"
    }, found  # fmt: skip


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    {"wandb": wandb, "mlflow": mlflow}[sys.argv[1]]()
