"""Loaders of any kind, alone or together: what a Trainer sees of them, and how they resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from brain_lightning import Checkpointer, EpochCounter, to_lightning
from tests.support.brains import Regression, all_equal, make, trainer_with, weights
from tests.support.plain_modules import PlainRegression
from tests.support.resuming import Cut, Noise, StatefulStream, seed
from tests.support.upstream import weights_only

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)`"),
]

# ------------------------------------------------------------------ sets without a length


class Numbers(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.full((4,), i / 10), torch.zeros(2)) for i in range(10)])


class Sized(Numbers):
    def __len__(self) -> int:
        return 10


class Asking(Callback):
    """Notes what a callback is told of the lengths, whenever it may ask."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def ask(self, trainer: Trainer) -> None:
        numbers = [trainer.num_training_batches, trainer.num_val_batches]
        self.seen.append([trainer.estimated_stepping_batches, *numbers])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ask(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ask(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.ask(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ask(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ask(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append(trainer.num_test_batches)


class Asks(Regression):
    def init_optimizers(self) -> None:
        super().init_optimizers()
        self.steps = self.hparams.trainer_asked.estimated_stepping_batches


class PlainAsks(PlainRegression):
    def configure_optimizers(self) -> Any:
        self.steps = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)


def pairs(items: int, noise: bool = False) -> TensorDataset:
    x = torch.arange(items * 4).reshape(items, 4) / items / 4
    return TensorDataset(x, x[:, :2])


@pytest.mark.parametrize("limits", [{}, {"limit_train_batches": 3, "limit_val_batches": 2}])
@pytest.mark.parametrize(
    "train",
    [
        lambda: DataLoader(Numbers(), 4),
        lambda: DataLoader(Sized(), 4),
        lambda: ((x, x[:, :2]) for x in torch.rand(5, 2, 4)),
        lambda: {"a": DataLoader(pairs(8), 2), "b": DataLoader(Numbers(), 2)},
    ],
    ids=["stream", "sized stream", "iterator", "together"],
)
def test_lengths_are_what_lightning_has(train: Any, limits: dict[str, int]) -> None:
    def seen(module: LightningModule, trainer: Trainer) -> Any:
        asking = Asking()
        trainer.callbacks.append(asking)  # type: ignore[attr-defined]
        data = train()
        trainer.fit(module, data, DataLoader(Numbers(), 4))
        trainer.test(module, DataLoader(Numbers(), 4), verbose=False)
        return asking.seen

    # An iterator has one pass.
    once = {"max_epochs": 1} if not isinstance(train(), (DataLoader, dict)) else {}
    options = {"num_sanity_val_steps": 0, **limits, **once}
    plain = PlainTogether() if isinstance(train(), dict) else PlainAsks()
    expected = seen(plain, trainer_with(**options))
    trainer = trainer_with(**options)
    brain = make(AsksTogether, hparams={"trainer_asked": trainer})
    assert seen(to_lightning(brain), trainer) == expected
    assert brain.steps == plain.steps
    assert not all_equal(weights(brain), weights(make()))


class Together(Regression):
    """Takes a dict of batches, or one; notes what it gets."""

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        if stage.name == "TRAIN":
            self.hparams.seen.append(_plain(batch))
        parts = _parts(batch)
        x = torch.cat([x for x, _ in parts])
        return self.modules.model(x + torch.rand_like(x) * np.random.rand())

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        y = torch.cat([y for _, y in _parts(batch)])
        return torch.nn.functional.mse_loss(predictions, y)


class FirstOf(Regression):
    def compute_forward(self, batch: Any, stage: Any) -> Any:
        return self.modules.model(_parts(batch)[0][0])

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        return torch.nn.functional.mse_loss(predictions, _parts(batch)[0][1])


class AsksTogether(FirstOf, Asks):
    """Both."""


class PlainTogether(PlainAsks):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(_parts(batch)[0], batch_idx)


def _parts(batch: Any) -> list[Any]:
    if isinstance(batch, dict):
        return [part for each in batch.values() for part in _parts(each)]
    if batch is None:
        return []
    return [batch] if isinstance(batch[0], Tensor) else [p for e in batch for p in _parts(e)]


def _plain(batch: Any) -> Any:
    return [x.flatten().tolist() for x, _ in _parts(batch)]


# -------------------------------------------------------------- several training loaders


class Counted(DataLoader[Any]):
    """With an ``__iter__`` of its own."""

    begun = 0

    def __iter__(self) -> Any:
        Counted.begun += 1
        return super().__iter__()


class Stateful(DataLoader[Any]):
    """A stateful loader, as torchdata has one."""

    done = 0

    def __iter__(self) -> Any:
        while self.done < len(self):
            self.done += 1
            yield self.dataset[2 * self.done - 2 : 2 * self.done]
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def generator(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


LOADERS: dict[str, Callable[[], Any]] = {
    "min_size": lambda: {
        "a": DataLoader(Noise(10), 2, shuffle=True),
        "b": [Counted(Noise(7), 2, shuffle=True), DataLoader(Noise(9), 2)],
    },
    "max_size_cycle": lambda: {
        "a": DataLoader(Noise(18), 2, shuffle=True, generator=generator(1)),
        "b": DataLoader(Noise(5), 2, shuffle=True),
        "c": Counted(Noise(6), 2, shuffle=True),
    },
    "max_size": lambda: [
        DataLoader(Noise(14), 2, shuffle=True, num_workers=2),
        DataLoader(StatefulStream(), 12),
        Stateful(pairs(6), 2),
    ],
    "sequential": lambda: [
        DataLoader(Noise(6), 2, shuffle=True), DataLoader(Noise(8), 2, shuffle=True),
    ],
}  # fmt: skip


class CutTogether(Together):
    cut: tuple[int, int] | None = None

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        if (self.hparams.epoch_counter.current, self.step) == self.cut:
            raise Cut


def run(
    mode: str, folder: Path, by_trainer: bool, cut: Any = None, resumes: bool = False
) -> Any:
    counter = EpochCounter(2)
    checkpointer = None if by_trainer else Checkpointer(folder, {"counter": counter})
    hparams = {"epoch_counter": counter, "seen": []}
    brain = make(CutTogether, None, hparams, checkpointer, ckpt_interval_steps=1)
    brain.opt_class = lambda parameters: torch.optim.SGD(parameters, 0.1)
    if checkpointer is not None:
        checkpointer.add_recoverable("model", brain.modules.model)
    seed(77 if resumes else 999)
    brain.cut = cut
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, save_last=True)
    callbacks = [saving] if by_trainer else []
    trainer = trainer_with(*callbacks, max_epochs=-1, enable_checkpointing=by_trainer)
    path = "last" if resumes and by_trainer else None
    fit = (to_lightning(brain), CombinedLoader(LOADERS[mode](), mode))
    if cut is None:
        trainer.fit(*fit, ckpt_path=path, **weights_only(True))
    else:
        with pytest.raises(Cut):
            trainer.fit(*fit)
    return brain


@pytest.mark.parametrize("mode", LOADERS)
def test_several_training_loaders(mode: Any, tmp_path: Path) -> None:
    Counted.begun = 0
    whole = run(mode, tmp_path / "whole", True)
    assert Counted.begun == {"min_size": 2, "max_size_cycle": 6}.get(mode, 0)
    combined = CombinedLoader(LOADERS[mode](), mode)
    seed(999)
    make(CutTogether)
    lightnings = [batch for batch, _, _ in combined]
    batches = len(whole.hparams.seen) // 2
    assert len(lightnings) == batches
    shapes = [[x.shape for x, _ in _parts(batch)] for batch in lightnings]
    assert [[len(x) // 4 for x in each] for each in whole.hparams.seen[:batches]] == [
        [shape[0] for shape in each] for each in shapes
    ]
    for by_trainer, cut in (
        (True, (1, 4)),
        (False, (2, batches)),
        (False, (1, min(batches, 7))),
    ):
        folder = tmp_path / f"{by_trainer}{cut}"
        run(mode, folder, by_trainer, cut)
        resumed = run(mode, folder, by_trainer, resumes=True)
        seen = resumed.hparams.seen
        assert 0 < len(seen) < len(whole.hparams.seen)
        assert seen == whole.hparams.seen[-len(seen) :], (by_trainer, cut)
        assert all_equal(weights(whole), weights(resumed))


# ------------------------------------------------------- several sets to validate and test


class Named(FirstOf):
    """Notes its stages, and what set they are of."""

    cut: tuple[str, Any] | None = None

    def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
        self.hparams.seen.append(("start", stage.name, epoch, self._lightning.set_name))

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        name = self._lightning.set_name
        self.hparams.seen.append(("end", stage.name, name, stage_loss))
        if (name, epoch) == self.cut:
            raise Cut
        if stage.name == "VALID" and self.checkpointer is not None and name != "clean":
            self.checkpointer.save_checkpoint(meta={"loss": stage_loss})


def fit_on_several(folder: Path, cut: Any = None) -> tuple[Any, dict[str, Any]]:
    counter, losses = EpochCounter(2), {}
    checkpointer = Checkpointer(folder, {"counter": counter})
    hparams = {"epoch_counter": counter, "seen": []}
    brain = make(Named, hparams=hparams, checkpointer=checkpointer, ckpt_interval_steps=2)
    checkpointer.add_recoverable("model", brain.modules.model)
    brain.cut = cut
    seed(3)

    class Notes(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            losses.update(trainer.callback_metrics)

    train = {"a": Noise(8), "b": DataLoader(Noise(4), 2)}
    valid = {"clean": pairs(8), "noisy": DataLoader(Noise(6), 2, shuffle=True)}
    kwargs = {"train_loader_kwargs": {"batch_size": 2, "shuffle": True}}
    kwargs["valid_loader_kwargs"] = {"batch_size": 4}
    with nullcontext() if cut is None else pytest.raises(Cut):
        brain.fit(counter, train, valid, trainer={"callbacks": [Notes()]}, **kwargs)
    return brain, losses


def test_each_of_several_sets_is_a_stage(tmp_path: Path) -> None:
    brain, losses = fit_on_several(tmp_path / "whole")
    found = {e[2]: e[3] for e in brain.hparams.seen if e[:2] == ("end", "VALID")}
    assert losses["valid_loss_clean"] == pytest.approx(found["clean"])
    assert losses["valid_loss_noisy"] == pytest.approx(found["noisy"])
    assert "valid_loss" not in losses
    order = [e[:2] + e[-1:] if e[0] == "start" else e[:3] for e in brain.hparams.seen]
    assert order == 2 * [
        ("start", "TRAIN", ""), ("end", "TRAIN", ""),
        ("start", "VALID", "clean"), ("end", "VALID", "clean"),
        ("start", "VALID", "noisy"), ("end", "VALID", "noisy"),
    ]  # fmt: skip
    for cut in (("", 2), ("clean", 2), ("noisy", 1)):
        folder = tmp_path / str(cut)
        fit_on_several(folder, cut)
        resumed, again = fit_on_several(folder)
        assert all_equal(weights(resumed), weights(brain))
        assert again == losses, cut
        assert resumed.hparams.seen[-4:] == brain.hparams.seen[-4:]

    each = {name: brain.evaluate(pairs(n), min_key="loss") for name, n in (("x", 4), ("y", 6))}
    assert len(set(each.values())) == 2
    assert brain.evaluate({"x": pairs(4), "y": DataLoader(pairs(6))}, min_key="loss") == each
    assert brain.evaluate([pairs(4), pairs(6)], min_key="loss") == list(each.values())
    assert brain._lightning.set_name == ""
