"""The Trainer counts calls of ``optimizer.step()`` in an overridden ``fit_batch``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from brain_lightning import to_lightning
from tests.parity.recipes import dataset
from tests.parity.sides import OURS, Record
from tests.support.brains import Regression, loader, make, trainer_with, weights
from tests.system.distributed.scenarios import gan_brain

# Lightning warns that ModelCheckpoint saves the weights after the steps, as intended.
pytestmark = pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual")


class LightningGAN(LightningModule):
    """A GAN as for Lightning's manual optimization, with two steps per batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(3, 6), nn.Linear(6, 1)

    def configure_optimizers(self) -> list[Any]:
        parts = (self.discriminator, self.generator)
        return [torch.optim.Adam(part.parameters(), 0.01) for part in parts]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            fake = self.generator(torch.randn(len(batch[0]), 3))
            self.manual_backward(self.discriminator(fake).mean())
            optimizer.step()
            optimizer.zero_grad()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.discriminator(batch[0]).mean()


class Steps(Callback):
    """Records the optimizers before their steps, and the step counts before and after."""

    def __init__(self) -> None:
        self.optimizers: list[Any] = []
        self.counted: list[int] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        assert all(
            g is not None and g.any() for g in gradients if g is not None and g.dim() > 1
        )
        self.optimizers.append(optimizer)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.counted.append(trainer.global_step)


def fit(module: Any, *callbacks: Any, **kwargs: Any) -> Any:
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = trainer_with(*callbacks, enable_checkpointing=saves, **kwargs)
    batches = DataLoader(dataset(), batch_size=4)
    trainer.fit(module, batches, batches)
    return trainer


def saved_by(module: Any, folder: Path, every: int, **kwargs: Any) -> list[str]:
    saver = ModelCheckpoint(
        folder, every_n_train_steps=every, save_top_k=-1, filename="{epoch}-{step}"
    )
    fit(module, saver, **kwargs)
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("every", [5, 6, 2, 1])
def test_checkpoints_come_as_often_as_of_a_lightning_gan(tmp_path: Path, every: int) -> None:
    brain = gan_brain(OURS, Record())
    ours = saved_by(to_lightning(brain), tmp_path / "ours", every)
    theirs = saved_by(LightningGAN(), tmp_path / "theirs", every)
    # 2 epochs of 5 batches with 2 steps: multiples of 5 are reached at 10 and 20.
    assert ours == theirs
    assert len(ours) == {5: 2, 6: 3, 2: 10, 1: 10}[every]


def test_a_checkpoint_holds_the_weights_of_its_step(tmp_path: Path) -> None:
    saved_by(to_lightning(gan_brain(OURS, Record())), tmp_path / "long", 5)
    torch.manual_seed(1234)
    brain = gan_brain(OURS, Record())
    torch.manual_seed(99)
    saver = ModelCheckpoint(tmp_path / "short", every_n_train_steps=5, filename="{step}")
    fit(to_lightning(brain), saver, max_steps=10, max_epochs=-1)
    held = torch.load(tmp_path / "short" / "step=10.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(a, b) for a, b in zip(held.values(), weights(brain), strict=True))


@pytest.mark.parametrize("steps", [2, 6, 10, 14])
def test_max_steps_stops_at_that_many(steps: int) -> None:
    brain = gan_brain(OURS, Record())
    trainer = fit(to_lightning(brain), max_steps=steps, max_epochs=-1)
    assert trainer.global_step == steps
    taken = sum(int(opt.state_dict()["state"][0]["step"]) for opt in optimizers(brain))
    assert taken == steps


def optimizers(brain: Any) -> list[Any]:
    return list(brain.optimizers_dict.values())


def test_every_raw_step_is_announced_with_its_optimizer() -> None:
    steps = Steps()
    brain = gan_brain(OURS, Record())
    fit(to_lightning(brain), steps, max_epochs=1)
    g, d = brain.optimizers_dict["g"], brain.optimizers_dict["d"]
    assert [id(opt) for opt in steps.optimizers] == [
        id(opt) for _ in range(5) for opt in (d, g)
    ]
    assert steps.counted == [2, 4, 6, 8, 10]


def test_the_modules_own_hook_is_called_too() -> None:
    called = []
    brain = gan_brain(OURS, Record())
    module = to_lightning(brain)
    module.on_before_optimizer_step = called.append
    fit(module, max_epochs=1)
    assert len(called) == 10


def test_after_a_run_nothing_is_counted() -> None:
    steps = Steps()
    brain = gan_brain(OURS, Record())
    fit(to_lightning(brain), steps, max_epochs=1)
    brain.optimizer_d.step()
    other = make()
    other.init_optimizers()
    other.optimizer.step()
    assert len(steps.optimizers) == 10


def test_steps_of_optimizers_without_a_dictionary_are_counted() -> None:
    """Older recipes do not set ``optimizers_dict``."""
    brain = gan_brain(OURS, Record())
    init = brain.init_optimizers
    brain.init_optimizers = lambda: (init(), setattr(brain, "optimizers_dict", None))
    brain.opt_class = None
    steps = Steps()
    fit(to_lightning(brain), steps, max_epochs=1)
    assert steps.counted == [2, 4, 6, 8, 10]


def test_steps_of_another_brain_within_a_batch_are_not_counted() -> None:
    class Nested(Regression):
        def fit_batch(self, batch: Any) -> Any:
            make().fit(range(1), loader(), progressbar=False)
            return super().fit_batch(batch)

    steps = Steps()
    brain = make(Nested)
    trainer = trainer_with(steps, max_epochs=1)
    trainer.fit(to_lightning(brain), loader(), loader())
    assert trainer.global_step == 5
    assert [id(optimizer) for optimizer in steps.optimizers] == [id(brain.optimizer)] * 5


class ByHand(Regression):
    def fit_batch(self, batch: Any) -> Any:
        stage = self.stage_type.TRAIN
        loss = self.compute_objectives(self.compute_forward(batch, stage), batch, stage)
        loss.backward()
        self.optimizer.step()
        return loss.detach().cpu()


class Derived(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_step_that_calls_the_step_of_its_base_is_one() -> None:
    """torch calls its hooks for both steps, if an optimizer of the base class exists."""

    def steps(cls: type[torch.optim.SGD]) -> int:
        brain = make(ByHand, opt_class=lambda parameters: cls(parameters, 0.1))
        trainer = trainer_with(max_epochs=1)
        trainer.fit(to_lightning(brain), loader(), loader())
        return trainer.global_step

    assert 0 < steps(torch.optim.SGD) == steps(Derived)
