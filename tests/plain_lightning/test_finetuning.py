"""Parts that are frozen and unfrozen, and optimizers whose parameter groups change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from torch import Tensor, nn

from brain_lightning import Brain, Checkpointer, EpochCounter, to_lightning
from tests.support.brains import all_equal, loader, trainer_with

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def parts() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 4))
    return {"backbone": backbone, "head": nn.Linear(4, 2)}


def loss_of(modules: Any, batch: Any) -> Tensor:
    return nn.functional.mse_loss(modules["head"](modules["backbone"](batch[0])), batch[1])


class Plain(LightningModule):
    """What Lightning's documentation asks for: an optimizer of what is not frozen."""

    def __init__(self, only_trained: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts())
        self.backbone = self.parts["backbone"]
        self.only_trained = only_trained

    def training_step(self, batch: Any, _: int) -> Tensor:
        return loss_of(self.parts, batch)

    def configure_optimizers(self) -> Any:
        parameters = list(self.parts.parameters())
        if self.only_trained:
            parameters = [p for p in parameters if p.requires_grad]
        return torch.optim.Adam(parameters, 0.01)


class Tuned(Brain):
    """Its optimizer has every parameter, as init_optimizers makes it."""

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        return batch

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Tensor:
        return loss_of(self.modules, batch)

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        if stage.name == "TRAIN" and self.checkpointer is not None:
            self.checkpointer.save_checkpoint(name=f"end-{epoch}")


class Stepping(Tuned):
    """Steps by itself."""

    def fit_batch(self, batch: Any) -> Tensor:
        loss = loss_of(self.modules, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer_step += 1
        return loss.detach()


class Two(Tuned):
    """An optimizer for each part; the backbone's comes first."""

    def init_optimizers(self) -> None:
        self.optimizers_dict = {
            name: torch.optim.Adam(part.parameters(), 0.01)
            for name, part in self.modules.items()
        }
        self.optimizer = self.optimizers_dict["head"]
        if self.checkpointer is not None:
            named = {f"optimizer_{n}": o for n, o in self.optimizers_dict.items()}
            self.checkpointer.add_recoverables(named)


class Gradual(BaseFinetuning):
    """Unfreezes the last layer of the backbone first, and then the rest."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone[2], optimizer, 0.002)
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone[:2], optimizer)


class NoNorms(Gradual):
    """Never trains the norms; lets them track statistics again."""

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, train_bn=False)


class Thaw(Gradual):
    """Adds nothing: the optimizer has every parameter from the start."""

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.make_trainable(pl_module.backbone)


class Regroup(Gradual):
    """Assigns the list of groups, appends to it and reorders it."""

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        groups = optimizer.param_groups
        if epoch == 1:
            self.make_trainable(pl_module.backbone)
            options = {k: v for k, v in groups[0].items() if k not in ("params", "name")}
            last, first = (list(pl_module.backbone[i].parameters()) for i in (2, 0))
            groups.append({**options, "params": last, "lr": 0.003})
            optimizer.param_groups = [
                *optimizer.param_groups, {**options, "params": first, "lr": 0.1}
            ]  # fmt: skip
        if epoch == 2:
            groups.append(groups.pop(0))
            groups[0]["lr"] = 0.02


class Watch(Callback):
    """Records the groups of each epoch; fails where it is told to."""

    def __init__(self, cut: int | None = None) -> None:
        self.cut = cut
        self.groups: list[Any] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.cut:
            raise ConnectionError("power cut")

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        self.groups.append([(g["lr"], len(g["params"])) for g in groups])


TUNING: dict[str, tuple[Callable[[], BaseFinetuning], bool]] = {
    "backbone": (lambda: BackboneFinetuning(1, backbone_initial_lr=0.001), True),
    "no norms": (NoNorms, True),
    "gradual": (Gradual, True),
    "thaw": (Thaw, False),
    "regroup": (Regroup, True),
}


def ours(cls: type[Brain] = Tuned, folder: Path | None = None) -> Any:
    modules, counter = parts(), EpochCounter(4)
    saved = {**modules, "counter": counter}
    checkpointer = None if folder is None else Checkpointer(folder, saved)
    options: dict[str, Any] = {"device": "cpu", "noprogressbar": True}
    if folder is not None:
        options["ckpt_interval_steps"] = 3
    return to_lightning(
        cls(modules, lambda p: torch.optim.Adam(p, 0.01), None, options, checkpointer),
        epoch_counter=counter,
    )


def fit(module: Any, *callbacks: Callback, **kwargs: Any) -> Watch:
    saves = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}
    trainer = trainer_with(*callbacks, max_epochs=4, **saves)
    trainer.fit(module, loader(), **kwargs)
    return next(c for c in callbacks if isinstance(c, Watch))


def learned(module: Any) -> list[Tensor]:
    modules = module.brain.modules if hasattr(module, "brain") else module.parts
    return list(modules.state_dict().values())


@pytest.mark.parametrize("way", TUNING)
def test_groups_and_weights_are_those_of_a_plain_module(way: str) -> None:
    make, only_trained = TUNING[way]
    plain = Plain(only_trained)
    theirs = fit(plain, make(), Watch())
    assert not torch.equal(plain.backbone[2].weight, parts()["backbone"][2].weight)
    for module in (ours(), ours(Stepping)):
        watch = fit(module, make(), Watch())
        assert all_equal(learned(plain), learned(module))
        if only_trained:
            assert watch.groups == theirs.groups


def test_a_frozen_part_goes_back_to_the_optimizer_that_had_it() -> None:
    plain, module = Plain(only_trained=True), ours(Two)
    theirs, watch = (fit(each, BackboneFinetuning(1), Watch()) for each in (plain, module))
    assert all_equal(learned(plain), learned(module))
    assert [group[-1] for group in watch.groups[1:]] == [g[-1] for g in theirs.groups[1:]]
    of_backbone, of_head = module.brain.optimizers_dict.values()
    # The norm was not frozen.
    assert [len(group["params"]) for group in of_backbone.param_groups] == [2, 4]
    assert [len(group["params"]) for group in of_head.param_groups] == [2]


# Before anything is unfrozen, in the epoch in which it is, after it.
RESUMED = [
    ("backbone", Tuned, 4),
    ("backbone", Tuned, 13),
    ("gradual", Two, 13),
    ("no norms", Stepping, 13),
    ("thaw", Tuned, 8),
    ("regroup", Tuned, 8),
]


@pytest.mark.parametrize("saved", ["directory", "file"])
@pytest.mark.parametrize(("way", "cls", "cut"), RESUMED)
def test_resumed_before_and_after_parts_are_unfrozen(
    tmp_path: Path, saved: str, way: str, cls: type[Brain], cut: int
) -> None:
    """Parameter groups, what is frozen, and weights."""
    make, _ = TUNING[way]

    def run(name: str, cut: int | None = None, again: bool = False) -> tuple[Any, Watch]:
        module = ours(cls, tmp_path / name if saved == "directory" else None)
        files = ModelCheckpoint(tmp_path / name, every_n_train_steps=3, save_last=True)
        callbacks = [make(), Watch(cut), *([files] if saved == "file" else [])]
        ckpt_path = "last" if again and saved == "file" else None
        return module, fit(module, *callbacks, ckpt_path=ckpt_path)

    whole, watch = run("whole")
    with pytest.raises(ConnectionError):
        run("cut", cut)
    resumed, rest = run("cut", again=True)
    assert all_equal(learned(whole), learned(resumed))
    # In the first epoch they show what is unfrozen already.
    assert rest.groups[1:] == watch.groups[1 - len(rest.groups) :]
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert one.requires_grad is other.requires_grad is True


def test_what_a_script_freezes_itself_is_its_own_affair(tmp_path: Path) -> None:
    """Somebody unfreezes it between two starts."""
    first = ours(folder=tmp_path)
    first.brain.modules.backbone.requires_grad_(False)
    with pytest.raises(ConnectionError):
        fit(first, Watch(7))
    second = ours(folder=tmp_path)
    fit(second, Watch())
    assert not torch.equal(
        first.brain.modules.backbone[0].weight, second.brain.modules.backbone[0].weight
    )


class TrainedOnly(Callback):
    """Leaves out of the checkpoint what is pretrained."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: w for n, w in weights.items() if "backbone" not in n}


@pytest.mark.parametrize("cls", [Plain, Tuned])
def test_a_checkpoint_without_what_is_frozen_is_loaded_where_it_need_not_be_whole(
    tmp_path: Path, cls: Any
) -> None:
    def make(strict: bool = False) -> Any:
        module = Plain(only_trained=True) if cls is Plain else ours(cls)
        module.backbone.requires_grad_(False)
        module.strict_loading = strict
        return module

    def files(name: str) -> list[Callback]:
        return [ModelCheckpoint(tmp_path / name, save_last=True), TrainedOnly()]

    def parameters(module: Any) -> list[Tensor]:
        return [p.detach() for p in module.parameters()]

    whole, cut, resumed = make(), make(), make()
    fit(whole, *files("whole"), Watch())
    with pytest.raises(ConnectionError):
        fit(cut, *files("cut"), Watch(13))
    fit(resumed, *files("cut"), Watch(), ckpt_path="last")
    assert all_equal(parameters(whole), parameters(resumed))
    assert not torch.equal(parameters(whole)[-1], parameters(cut)[-1])
    last = tmp_path / "cut" / "last.ckpt"
    with pytest.raises(RuntimeError, match="Missing key"):
        fit(make(strict=True), Watch(), ckpt_path=last)
    arguments = {"only_trained": True} if cls is Plain else {"brain": ours(cls).brain}
    loaded = type(whole).load_from_checkpoint(last, strict=False, **arguments)
    assert torch.equal(parameters(loaded)[-1], parameters(resumed)[-1])
    if cls is Tuned:
        tested = make()
        trainer_with().test(tested, loader(), ckpt_path=last, verbose=False)
        assert all_equal(parameters(tested), parameters(resumed))
