"""Kills trainings anywhere, resumes each, and compares the weights with a run left alone.

``python -m tests.system.resume_kills [KILLS]`` kills at least so many times in every
setting and prints a table; a test does a few.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from brain_lightning import Brain, Checkpointer, EpochCounter, to_lightning
from tests.support import environment  # noqa: F401  It makes SpeechBrain importable.


@dataclass(frozen=True)
class Setting:
    """One way to train, and to save.

    Attributes:
        workers: Of the DataLoader.
        accumulation: Batches for one update; 3 is not a divisor of the interval.
        augments: Where examples are changed at random: in the dataset, or in the step.
        loader: Whose DataLoader.
        saver: Who saves.
    """

    workers: int = 0
    accumulation: int = 1
    augments: str = "dataset"
    loader: str = "ours"
    saver: str = "ours"

    def __str__(self) -> str:
        return (
            f"{self.saver:<12}{self.loader:<13}{self.workers:>7}{self.accumulation:>13}  "
            f"{self.augments:<8}"
        )


def settings() -> list[Setting]:
    """All combinations that are promised: SpeechBrain's workers must draw nothing."""
    found = [
        Setting(workers, accumulation, augments, loader, saver)
        for saver, loader, workers, accumulation, augments in itertools.product(
            ("ours", "speechbrain", "lightning"), ("ours", "speechbrain"), (0, 2), (1, 3),
            ("dataset", "step"),
        )
    ]  # fmt: skip
    return [
        s
        for s in found
        # With SpeechBrain's Checkpointer make_dataloader makes SpeechBrain's loader.
        if not (s.saver == "speechbrain" and s.loader == "ours")
        if not (s.loader == "speechbrain" and s.workers and s.augments == "dataset")
    ]


EPOCHS, BATCHES, INTERVAL = 2, 22, 4
# /tmp may be in memory.
DISK = Path("/var/tmp")  # noqa: S108


class Examples(Dataset[Any]):
    """Noisy where the setting says so, from all three generators."""

    def __init__(self, noisy: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(BATCHES * 2 + 1, 6, generator=generator)
        self.noisy = noisy

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        x = self.inputs[index]
        return (x + noise(x) if self.noisy else x), self.inputs[index, :1]


def noise(x: torch.Tensor) -> torch.Tensor:
    return torch.randn_like(x) * np.random.rand() + random.random()  # noqa: S311


class Noisy(Brain):
    """Dropout, two optimizers, a schedule, and a loss gathered over the epoch."""

    setting: Setting
    dies_at: Iterator[int]
    summary: torch.Tensor | None = None

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        if stage.name == "TRAIN" and next(self.dies_at, None) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        x = batch[0] + noise(batch[0]) if self.setting.augments == "step" else batch[0]
        return self.modules.head(self.modules.body(x))

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        loss = torch.nn.functional.mse_loss(predictions, batch[1])
        if stage.name == "TRAIN":
            self.losses.append(float(loss.detach()))
        return loss

    def init_optimizers(self) -> None:
        self.adam = torch.optim.Adam(self.modules.body.parameters(), 0.02)
        self.sgd = torch.optim.SGD(self.modules.head.parameters(), 0.05, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.sgd, 1, 0.5)
        self.optimizers_dict = {"adam": self.adam, "sgd": self.sgd}
        if self.checkpointer is not None:
            for name in ("adam", "sgd", "schedule"):
                self.checkpointer.add_recoverable(name, getattr(self, name))

    def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
        if stage.name == "TRAIN":
            self.losses: list[float] = []

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        if stage.name == "TRAIN":
            self.summary = torch.tensor([stage_loss, *self.losses], dtype=torch.float64)
            return
        self.schedule.step()
        if self.checkpointer is not None:
            self.checkpointer.save_and_keep_only(meta={"loss": stage_loss})


def train(setting: Setting, folder: Path, dies_at: int | None = None) -> dict[str, Any]:
    """Trains, from what there is in the folder, and returns everything that was learned."""
    seed_everything(3, verbose=False)
    modules = {
        "body": torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Dropout(0.3)),
        "head": torch.nn.Linear(12, 1),
    }
    counter = EpochCounter(EPOCHS)
    run_opts = {
        "device": "cpu", "noprogressbar": True, "ckpt_interval_steps": INTERVAL,
        "grad_accumulation_factor": setting.accumulation,
    }  # fmt: skip
    kind = {"ours": Checkpointer, "speechbrain": _speechbrains}.get(setting.saver)
    checkpointer = kind and kind(folder / "save", {**modules, "counter": counter})
    brain = Noisy(modules, None, {}, run_opts, checkpointer)
    brain.setting = setting
    brain.dies_at = iter(() if dies_at is None else range(dies_at, -1, -1))
    loaders = [_loader(brain, setting, stage) for stage in ("TRAIN", "VALID")]
    if checkpointer is not None:
        brain.fit(counter, *loaders)
    else:
        _fit_with_trainer(brain, counter, loaders, folder)
    weights = {f"{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}
    momenta = {
        f"{name}.{index}.{key}": torch.as_tensor(value)
        for name, optimizer in brain.optimizers_dict.items()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    rate = torch.tensor(brain.sgd.param_groups[0]["lr"])
    updates = torch.tensor(brain.optimizer_step)
    # A run that was killed after its last epoch has none left.
    losses = {} if brain.summary is None else {"losses": brain.summary}
    return {**weights, **momenta, **losses, "rate": rate, "updates": updates}


def _speechbrains(folder: Path, recoverables: dict[str, Any]) -> Any:
    from speechbrain.utils.checkpoints import Checkpointer as SpeechBrains

    return SpeechBrains(folder, recoverables)


def _loader(brain: Any, setting: Setting, stage: str) -> Any:
    dataset = Examples(noisy=setting.augments == "dataset" and stage == "TRAIN")
    kwargs: dict[str, Any] = {"batch_size": 2, "num_workers": setting.workers}
    kwargs |= {"drop_last": True, "shuffle": stage == "TRAIN"}
    if setting.loader == "speechbrain":
        from speechbrain.dataio.dataloader import make_dataloader

        loader = make_dataloader(dataset, **kwargs)
        if brain.checkpointer is not None and stage == "TRAIN":
            brain.checkpointer.add_recoverable("dataloader-TRAIN", loader)
        return loader
    return brain.make_dataloader(dataset, brain.stage_type[stage], **kwargs)


def _fit_with_trainer(brain: Any, counter: Any, loaders: list[Any], folder: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=-1,
        callbacks=[ModelCheckpoint(folder / "save", save_last=True, save_top_k=0)],
    )  # fmt: skip
    trainer.fit(to_lightning(brain, epoch_counter=counter), *loaders, ckpt_path="last")


@dataclass
class Outcome:
    """What was seen after kills."""

    kills: int = 0
    crashes: int = 0
    different: int = 0

    @property
    def clean(self) -> bool:
        return not (self.crashes or self.different)


def kill_trainings(setting: Setting, kills: int, seed: int, parent: Path = DISK) -> Outcome:
    """Kills a training again and again, lets it end, and compares; until it was enough."""
    rng = random.Random(seed)  # noqa: S311
    outcome = Outcome()
    started = time.perf_counter()
    alone = _run_alone(setting, parent)
    duration = time.perf_counter() - started
    while outcome.kills < kills:
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            limit = min(kills - outcome.kills, 5)
            _kill_one(setting, Path(folder), limit, duration, rng, outcome, alone)
    return outcome


def _run_alone(setting: Setting, parent: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        assert _run(setting, Path(folder), None, None) == 0
        return torch.load(Path(folder, "final.pt"))


def _kill_one(
    setting: Setting,
    folder: Path,
    kills: int,
    duration: float,
    rng: random.Random,
    outcome: Outcome,
    alone: dict[str, Any],
) -> None:
    for attempt in range(10 * kills + 1):
        last = kills <= 0 or attempt == 10 * kills
        delay = None if last else rng.uniform(0.05, duration)
        dies_at = None
        if setting.saver == "speechbrain" and not last:
            # A save of SpeechBrain's that was cut short cannot be recovered.
            delay, dies_at = None, rng.randrange(3, EPOCHS * BATCHES)
        status = _run(setting, folder, delay, dies_at)
        if status == -signal.SIGKILL:
            kills -= 1
            outcome.kills += 1
        elif status:
            outcome.crashes += 1
            return
        else:
            break
    final = torch.load(folder / "final.pt")
    assert final.keys() | {"losses"} == alone.keys()
    outcome.different += not all(torch.equal(final[name], alone[name]) for name in final)


def _run(setting: Setting, folder: Path, delay: float | None, dies_at: int | None) -> int:
    """Trains in a process of its own; the signal that ended it is negative."""
    lives, held = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            final = train(setting, folder, dies_at)
            torch.save(final, folder / "final.pt")
            status = 0
        except BaseException:  # noqa: BLE001  told, and counted by the parent
            traceback.print_exc()
        finally:
            # Never the parent's code.
            os._exit(status)
    os.close(held)
    if delay is not None:
        # Until it has ended, and no longer.
        select.select([lives], [], [], delay)
        os.kill(child, signal.SIGKILL)
    os.close(lives)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def quiet() -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def main(kills: int) -> None:
    quiet()
    header = f"{'saver':<12}{'loader':<13}{'workers':>7}{'accumulation':>13}  {'random':<8}"
    print(f"{header}{'kills':>7}{'crashes':>9}{'different':>11}")
    total = Outcome()
    for number, setting in enumerate(settings()):
        o = kill_trainings(setting, kills, seed=number)
        print(f"{setting}{o.kills:>7}{o.crashes:>9}{o.different:>11}", flush=True)
        total = replace(
            total,
            kills=total.kills + o.kills,
            crashes=total.crashes + o.crashes,
            different=total.different + o.different,
        )
    print(f"{'all':<53}{total.kills:>7}{total.crashes:>9}{total.different:>11}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
