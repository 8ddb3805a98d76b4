"""The generated LightningModule, on the Trainer of brain.fit and on a user's Trainer."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.optim import Optimizer

from brain_lightning import (
    Brain,
    BrainCallback,
    BrainTypeError,
    OptimizerGroup,
    lightning_module_class,
    to_lightning,
)
from tests.support.brains import (
    Manual,
    Regression,
    all_equal,
    loader,
    make,
    trainer_with,
    weights,
)


class Trace(Callback):
    """Records calls of Lightning's hooks, with the step counters."""

    def __init__(self) -> None:
        self.hooks: list[str] = []
        self.steps: list[tuple[int, int]] = []
        self.gradients: list[bool] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hooks.append("on_train_epoch_start")

    def on_before_zero_grad(self, *_: Any) -> None:
        self.hooks.append("on_before_zero_grad")

    def on_before_backward(self, *_: Any) -> None:
        self.hooks.append("on_before_backward")

    def on_after_backward(self, *_: Any) -> None:
        self.hooks.append("on_after_backward")

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self.hooks.append("on_before_optimizer_step")
        grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
        self.gradients.append(all(g is not None for g in grads))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.hooks.append("on_train_batch_end")
        self.steps.append((trainer.global_step, pl_module.brain.optimizer_step))


class OwnStep(Regression):
    def optimizers_step(self) -> None:
        super().optimizers_step()


def test_the_class_is_named_after_the_brain_and_made_once() -> None:
    cls = lightning_module_class(Regression)
    assert cls.__name__ == "RegressionModule"
    assert issubclass(cls, LightningModule)
    assert lightning_module_class(Regression) is cls
    assert type(to_lightning(make())) is cls


@pytest.mark.parametrize(
    ("brain_class", "automatic"),
    [(Regression, True), (type("Sub", (Regression,), {}), True), (Manual, False),
     (OwnStep, False), (type("Sub", (Manual,), {}), False)],
)  # fmt: skip
def test_what_is_overridden_decides_who_steps(
    brain_class: type[Brain], automatic: bool
) -> None:
    assert to_lightning(make(brain_class)).automatic_optimization is automatic


@pytest.mark.parametrize("thing", [nn.Linear, 42, "Brain"])
def test_what_is_no_brain_class_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match="not a Brain class"):
        lightning_module_class(thing)


class TrainLogger:
    def log_stats(self, stats_meta: Any, train_stats: Any) -> None: ...


class HparamsOfAnyKind:
    """Has class attributes."""

    epoch_counter = (7, 8)
    train_logger = TrainLogger()


def test_a_recipe_may_replace_its_hparams() -> None:
    class Reporting(Regression):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            if stage.name == "TRAIN":
                stats = {"acc": epoch}
                self.hparams.train_logger.log_stats({"epoch": epoch}, train_stats=stats)

    brain = make(Reporting)
    brain.hparams = HparamsOfAnyKind()
    trainer = trainer_with(max_epochs=5)
    trainer.fit(to_lightning(brain), loader(), loader())
    assert trainer.callback_metrics["train_acc"] == 8


class Emptying(Logger):
    name, version = "emptying", 0

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if "train_loss_step" in metrics:
            self.found += metrics
            metrics.clear()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def test_each_logger_gets_its_own_numbers() -> None:
    loggers = [Emptying(), Emptying()]
    trainer = trainer_with(max_epochs=1, logger=loggers, log_every_n_steps=1)
    trainer.fit(to_lightning(make()), loader(), loader())
    assert loggers[0].found == loggers[1].found == ["train_loss_step", "epoch"] * 5


@pytest.mark.parametrize("brain_class", [Regression, Manual, OwnStep])
def test_a_trainer_of_the_users_gives_the_same_weights(brain_class: type[Brain]) -> None:
    own, users = make(brain_class), make(brain_class)
    own.fit(range(1, 3), loader(), loader())
    trainer_with().fit(to_lightning(users), loader(), loader())
    assert all_equal(weights(own), weights(users))
    assert not all_equal(weights(own), weights(make()))
    assert own.events == users.events
    assert users.events[0] == ("start", "TRAIN", 1)


def test_lightnings_hooks_fire_in_lightnings_order() -> None:
    trace = Trace()
    brain = make(grad_accumulation_factor=2)
    brain.fit(range(1), loader(12), trainer={"callbacks": [trace]})
    batch = ["on_before_zero_grad", "on_before_backward", "on_after_backward"]
    step = [*batch, "on_before_optimizer_step", "on_train_batch_end"]
    skip = [*batch, "on_train_batch_end"]
    assert trace.hooks == ["on_train_epoch_start", *skip, *step, *skip]
    assert trace.gradients == [True]


def test_global_step_counts_what_the_brain_counts() -> None:
    trace = Trace()
    brain = make(grad_accumulation_factor=3)
    brain.fit(range(2), loader(20, batch_size=2), trainer={"callbacks": [trace]})
    assert [g for g, _ in trace.steps] == [o for _, o in trace.steps]
    assert trace.steps[-1] == (6, 6)


def test_global_step_counts_raw_steps() -> None:
    trace = Trace()
    make(Manual).fit(range(2), loader(), trainer={"callbacks": [trace]})
    assert [g for g, _ in trace.steps] == [2 * (i + 1) for i in range(10)]


def test_no_epoch_is_announced_that_does_not_come() -> None:
    trace = Trace()
    counter = iter([1, 2])
    brain = make()
    brain.fit(counter, loader(), trainer={"callbacks": [trace]})
    brain.fit(counter, loader(), trainer={"callbacks": [trace]})
    assert trace.hooks.count("on_train_epoch_start") == 2


def test_max_epochs_leaves_the_counter_where_it_stopped() -> None:
    from brain_lightning import EpochCounter

    counter = EpochCounter(10)
    make().fit(counter, loader(), trainer={"max_epochs": 3})
    assert counter.current == 3


def test_a_stop_asked_for_in_the_middle_ends_after_the_stage_hooks() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 7

    brain = make()
    brain.fit(range(5), loader(), loader(), trainer={"callbacks": [Stop()]})
    assert brain.optimizer_step == 7
    assert brain.events[-3:] == [
        ("end", "TRAIN", 1),
        ("start", "VALID", 1),
        ("end", "VALID", 1),
    ]


def test_the_trainer_is_given_back_as_it_was() -> None:
    trainer = trainer_with(num_sanity_val_steps=2)
    make().fit(range(1), loader(), loader(), trainer=trainer)
    assert trainer.num_sanity_val_steps == 2
    assert trainer.current_epoch == 1


def test_the_callback_comes_with_the_module_and_goes_with_it() -> None:
    class Looking(Callback):
        def on_train_start(self, trainer: Trainer, *_: Any) -> None:
            self.found = [c for c in trainer.callbacks if isinstance(c, BrainCallback)]

    looking = Looking()
    trainer = trainer_with(callbacks=[looking])
    trainer.fit(to_lightning(make()), loader(), loader())
    assert len(looking.found) == 1
    assert trainer.callbacks == [looking]


def test_the_epoch_counter_of_hparams_counts() -> None:
    brain = make(hparams={"epoch_counter": range(7, 9)})
    trainer_with(max_epochs=10).fit(to_lightning(brain), loader(), loader())
    assert [e for name, stage, e in brain.events if (name, stage) == ("end", "VALID")] == [
        7,
        8,
    ]


def test_trainer_arguments_come_from_hparams_or_the_call() -> None:
    brain = make(hparams={"trainer": {"max_epochs": 1}})
    brain.fit(range(5), loader())
    assert brain.optimizer_step == 5
    brain.fit(range(5), loader(), trainer={"max_epochs": 2})
    assert brain.optimizer_step == 15


def test_a_trainer_must_be_one() -> None:
    with pytest.raises(BrainTypeError, match="a dict of its arguments, but got 'ddp'"):
        make().fit(range(1), loader(), trainer="ddp")


def test_a_class_is_not_a_brain() -> None:
    with pytest.raises(BrainTypeError, match=r"got the class Regression\. Create an instance"):
        to_lightning(Regression)


def test_weights_are_in_the_modules_state() -> None:
    brain = make()
    names = set(to_lightning(brain).state_dict())
    assert names == {"brain_modules.model.weight", "brain_modules.model.bias"}


def test_the_group_shows_and_restores_its_members() -> None:
    class Two(Regression):
        def init_optimizers(self) -> None:
            weight, bias = self.modules.model.parameters()
            self.optimizers_dict = {
                "weight": torch.optim.Adam([weight], 0.1),
                "bias": torch.optim.SGD([bias], 0.2, momentum=0.9),
            }

    brain, other = make(Two), make(Two)
    brain.fit(range(1), loader())
    other.init_optimizers()
    group, restored = OptimizerGroup(brain), OptimizerGroup(other)
    assert [g["lr"] for g in group.param_groups] == [0.1, 0.2]
    restored.load_state_dict(group.state_dict())
    state = other.optimizers_dict["bias"].state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(state, group.state_dict()["bias"]["state"][0]["momentum_buffer"])
    group.param_groups[0]["lr"] = 0.5
    assert brain.optimizers_dict["weight"].param_groups[0]["lr"] == 0.5


def test_a_loss_that_is_not_one_number_is_refused() -> None:
    class Unreduced(Regression):
        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            return (predictions - batch[1]) ** 2

    class NoTensor(Regression):
        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            return {"loss": 1.0}

    with pytest.raises(BrainTypeError, match=r"Unreduced.*tensor of shape \(4, 2\)\. Reduce"):
        make(Unreduced).fit(range(1), loader())
    with pytest.raises(BrainTypeError, match="got dict"):
        make(NoTensor).fit(range(1), loader())


def test_hooks_that_must_be_overridden_say_so() -> None:
    class Empty(Brain):
        pass

    class Half(Brain):
        compute_forward = Regression.compute_forward

    for brain_class, hook in [(Empty, "compute_forward"), (Half, "compute_objectives")]:
        brain = make(brain_class)
        with pytest.raises(BrainTypeError, match=f"{brain_class.__name__} must define {hook}"):
            brain.fit(range(1), loader())
        assert brain.step == 0


def test_a_brain_without_optimizer_says_that_nothing_changes(caplog: Any) -> None:
    brain = make(opt_class=None)
    brain.fit(range(1), loader())
    assert "fit() will not change any parameter" in caplog.text
    assert all_equal(weights(brain), weights(make()))


def test_an_epoch_counter_must_be_iterable() -> None:
    with pytest.raises(
        TypeError,
        match=r"epoch_counter must be iterable, got 3\. For ten epochs, use EpochCounter",
    ):
        make().fit(3, loader())


@pytest.mark.gpu
def test_a_brain_on_a_gpu_trains_and_stays_there() -> None:
    brain = make(device="cuda:0", precision="fp16")
    before = weights(brain)
    brain.fit(range(2), loader(), loader())
    assert all(p.is_cuda for p in brain.modules.parameters())
    assert not all_equal(before, weights(brain))
    assert brain.evaluate(loader()) > 0


class Moved(nn.Linear):
    """Has a tensor that is no buffer, as torchmetrics metrics have."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.moves = 0

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.moves += 1
        return super()._apply(fn, recurse)


def test_modules_are_moved_when_they_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = []

    @functools.wraps(nn.Module._apply)
    def apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        moves.append(self)
        return nn.Module._apply(self, fn, recurse)

    monkeypatch.setattr(nn.Linear, "_apply", apply, raising=False)
    brain = make()
    module = to_lightning(brain)
    moves.clear()
    module.to(torch.device("cpu"))
    assert (moves, module.device) == ([], torch.device("cpu"))
    for _ in range(2):
        module.to(torch.device("meta"))
        assert (moves, module.device) == ([brain.modules.model], torch.device("meta"))
    assert brain.modules.model.weight.is_meta
    brain.modules["moved"] = moved = Moved().to("meta")
    module.to(torch.device("meta"))
    assert moved.moves == 2
