"""Supported strategies, and errors for unsupported ones; starts no process."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from brain_lightning import FSDP2Strategy, RunOptionError, UnsupportedError, to_lightning
from brain_lightning.callback.reconcile import reconcile
from brain_lightning.distributed.ddp import wrap_modules
from brain_lightning.lightning_internals.strategies import check_strategy
from brain_lightning.temporary import TemporaryAttributes
from tests.support.brains import loader, make, trainer_with
from tests.support.upstream import needs_shards


def ddp(**kwargs: Any) -> Any:
    return trainer_with(devices=2, strategy=DDPStrategy(**kwargs))


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (ModelParallelStrategy, r"ModelParallelStrategy is not supp.*strategy='fsdp2'"),
        (lambda: FSDP2Strategy(start_method="spawn"), r"FSDP2Strategy\(start_method='spawn'"),
        (lambda: FSDP2Strategy(static_graph=True), r"FSDP2Strategy\(static_graph=\.\.\.\) is"),
        (lambda: FSDP2Strategy(ddp_comm_hook=print), r"ddp_comm_hook=.*Remove the argument"),
        (lambda: "ddp_spawn", r"start_method='spawn'.*Use strategy='ddp' or torchrun"),
        (lambda: "ddp_notebook", r"start_method='fork'"),
        (lambda: DDPStrategy(ddp_comm_hook=print), r"ddp_comm_hook=\.\.\..*Remove the arg"),
        (lambda: DDPStrategy(model_averaging_period=2), r"model_averaging_period=\.\.\."),
    ],
    ids=[
        "model_parallel",
        "spawn",
        "static_graph",
        "hook",
        "ddp_spawn",
        "ddp_notebook",
        "comm_hook",
        "model_averaging",
    ],
)
def test_what_cannot_run_a_brain_is_refused(strategy: Callable[[], Any], words: str) -> None:
    brain = make()
    arguments = {"devices": 2, "strategy": strategy(), "accelerator": "cpu"}
    with pytest.raises(UnsupportedError, match=words):
        brain.fit(range(1), loader(), trainer=arguments)
    module = to_lightning(brain)
    module.trainer = trainer_with(**{**arguments, "strategy": strategy()})
    with pytest.raises(UnsupportedError, match=words):
        module.configure_callbacks()


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        ("fsdp", "strategy='fsdp'"),
        ("fsdp_cpu_offload", "strategy='fsdp_cpu_offload'"),
        ("deepspeed_stage_3", "strategy='deepspeed_stage_3'"),
        # Otherwise Lightning would raise an error, because there is no GPU.
        (FSDPStrategy(), "FSDPStrategy"),
    ],
)
def test_strategies_that_shard_the_whole_are_refused_first(strategy: Any, name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"^{name} is not supp.*use strategy='fsdp2'"):
        make().fit(range(1), loader(), trainer={"devices": 1, "strategy": strategy})


def test_the_strategys_arguments_reach_every_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module, **kwargs: Any) -> None:
            super().__init__()
            self.module = module
            calls.append((type(module).__name__, kwargs))

    monkeypatch.setattr("brain_lightning.distributed.ddp.DistributedDataParallel", Wrapper)
    brain, temporary = make(), TemporaryAttributes()
    trainer = ddp(find_unused_parameters=True, gradient_as_bucket_view=True)
    reconcile(trainer, brain, temporary)
    brain._wrap_distributed()
    expected = {
        "device_ids": None, "find_unused_parameters": True, "gradient_as_bucket_view": True
    }  # fmt: skip
    assert calls == [("Linear", expected)]
    assert trainer.strategy.configure_ddp() is None
    temporary.restore()
    assert "_wrap_distributed" not in vars(brain)
    assert "configure_ddp" not in vars(trainer.strategy)


@needs_shards
def test_what_ddp_finds_shards_find_too() -> None:
    brain, temporary = make(), TemporaryAttributes()
    strategy = FSDP2Strategy(find_unused_parameters=True, methods=["score"])
    trainer = trainer_with(devices=2, strategy=strategy)
    check_strategy(trainer)
    reconcile(trainer, brain, temporary)
    assert brain.find_unused_parameters
    assert brain._lightning.sharding.methods == ["score"]
    temporary.restore()
    assert (brain.find_unused_parameters, brain._lightning.sharding) == (False, None)


def test_a_recipes_own_wrapping_is_left_to_it() -> None:
    class Own(type(make())):  # type: ignore[misc]
        def _wrap_distributed(self) -> None:
            self.wrapped = True

    brain, temporary = make(Own), TemporaryAttributes()
    reconcile(ddp(), brain, temporary)
    brain._wrap_distributed()
    temporary.restore()
    assert brain.wrapped


@pytest.mark.parametrize(
    ("option", "kwargs"),
    [
        ({"find_unused_parameters": False}, {"find_unused_parameters": True}),
        ({"distributed_backend": "nccl"}, {"process_group_backend": "gloo"}),
    ],
)
def test_contradictions_are_errors_that_name_both(
    option: dict[str, Any], kwargs: dict[str, Any]
) -> None:
    (name, value), (argument, other) = *option.items(), *kwargs.items()
    with pytest.raises(RunOptionError, match=rf"{name}={value!r} and .*{argument}={other!r}"):
        reconcile(ddp(**kwargs), make(**option), TemporaryAttributes())


def test_the_backend_is_the_run_options_if_somebody_chose_it() -> None:
    trainer, default = ddp(), ddp()
    reconcile(trainer, make(distributed_backend="mpi"), TemporaryAttributes())
    reconcile(default, make(), TemporaryAttributes())
    assert trainer.strategy.process_group_backend == "mpi"
    assert default.strategy.process_group_backend is None


def test_a_synchronized_batchnorm_on_the_cpu_is_refused() -> None:
    brain = make()
    brain.modules = nn.ModuleDict({"norm": nn.SyncBatchNorm(2)})
    with pytest.raises(UnsupportedError, match=r"'norm' has a SyncBatchNorm.*needs a GPU"):
        wrap_modules(brain)


def test_without_a_process_group_nothing_is_wrapped() -> None:
    brain = make()
    brain.on_fit_start()
    assert type(brain.modules.model) is nn.Linear
    with brain.no_sync():
        brain.modules.model(torch.ones(1, 4)).sum().backward()
    assert brain.modules.model.weight.grad is not None


def test_the_private_parts_of_strategies_are_where_they_were() -> None:
    strategy = DDPStrategy(bucket_cap_mb=7)
    assert strategy._ddp_kwargs == {"bucket_cap_mb": 7}
    assert (strategy._start_method, strategy._process_group_backend) == ("popen", None)
    for name in inspect.signature(DDPStrategy).parameters:
        if name.startswith(("ddp_comm", "model_averaging")):
            assert getattr(strategy, f"_{name}") is None
    assert trainer_with()._accelerator_connector.use_distributed_sampler is True
