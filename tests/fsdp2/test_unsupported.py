"""Modules that cannot be sharded raise errors before training. All tests use one process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks
from torch import Tensor, nn

from brain_lightning import FSDP2Strategy, UnsupportedError, to_lightning
from brain_lightning.fsdp2 import blocks, tensors, unsupported
from brain_lightning.fsdp2.sharding import Sharding
from tests.support.brains import Regression, loader, make, sgd, trainer_with
from tests.support.upstream import needs_shards, needs_unused

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def project(self, x: Tensor) -> Tensor:
        return self(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.output = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.encoder(x))

    def score(self, x: Tensor) -> Tensor:
        return self(x)


class Keeping(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept.detach()


class KeepingLayer(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept.detach()


class Dropping(nn.Module):
    """Skips layers at random, like a transformer of SpeechBrain."""

    def __init__(self) -> None:
        super().__init__()
        self.layerdrop_prob = 0.1
        self.layers = nn.ModuleList([nn.Linear(4, 4)])


@pytest.fixture
def one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Initializes a process group of this process, which ``fit`` uses."""
    # Lightning sets this variable. monkeypatch removes it after the test.
    monkeypatch.setenv("LOCAL_RANK", "0")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def sharded(strategy: Any = "fsdp2", **arguments: Any) -> dict[str, Any]:
    return {"strategy": strategy, "devices": 1, **arguments}


def with_model(cls: type[Regression] = Regression, **options: Any) -> Any:
    brain = make(cls, **options)
    brain.modules.model = Model()
    return brain


def tied() -> dict[str, nn.Module]:
    encoder = nn.Linear(4, 4)
    return {"encoder": encoder, "decoder": nn.Sequential(encoder)}


def scalar() -> dict[str, nn.Module]:
    model = nn.Linear(4, 4)
    model.scale = nn.Parameter(torch.tensor(1.0))
    return {"model": model}


def tied_block() -> dict[str, nn.Module]:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    return {"model": model}


MODULES: dict[str, tuple[Callable[[], dict[str, nn.Module]], dict[str, Any], str]] = {
    "tied": (tied, {}, r"decoder\.0\.weight and encoder\.weight are the same.*in one entry\."),
    "tied block": (
        tied_block, {"blocks": ["Linear"]},
        r"model\.0\.weight is the same parameter as 'weight' of a block, a Linear\. .*blocks=",
    ),
    "sparse": (
        lambda: {"m": nn.Sequential(nn.Embedding(4, 4, sparse=True))}, {},
        r"m\.0 has sparse gradients.*sparse=False",
    ),
    "scalar": (scalar, {}, r"model\.scale is a scalar.*torch\.tensor\(\[\.\.\.\]\)"),
    "lazy": (lambda: {"m": nn.LazyLinear(2)}, {}, r"m\.weight is a lazy parameter without"),
    "types": (
        lambda: {"m": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())}, {},
        r"m has parameters of bfloat16 and float32 that are gathered together.*blocks=",
    ),
    "script": (
        lambda: {"m": torch.jit.script(nn.Linear(2, 2))}, {},
        r"m is TorchScript, which cannot be sharded\. Use --compile instead of --jit",
    ),
    "replicate": (
        lambda: {"m": Model()}, {"replicate": 3},
        r"replicate=3\) does not divide the number of ranks, 1\. Use 1\.$",
    ),
    "layerdrop": (
        lambda: {"m": Dropping()}, {"blocks": ["Linear"]},
        r"Dropping with layerdrop_prob=0\.1 skips layers at random.*Set it to 0",
    ),
    "no class": (
        lambda: {"m": Model()}, {"blocks": ["Layer"]},
        r"blocks=\['Layer'\]\): no module.* Available classes: Encoder, Linear, Model\.$",
    ),
    "no method": (
        lambda: {"m": Model()}, {"methods": ["sing"]},
        r"methods=\['sing'\]\): no entry.* Available methods: score\.$",
    ),
    "a part": (
        lambda: {"m": Model()}, {"methods": ["encoder"]},
        r"Make this part a block: blocks=\['Encoder'\]",
    ),
    "method of a part": (
        lambda: {"m": Model()}, {"methods": ["project"]},
        r"Make this part a block: blocks=\['Encoder'\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("modules", "settings", "words"), MODULES.values(), ids=MODULES)
def test_modules_that_cannot_be_sharded_raise(
    modules: Callable[[], dict[str, nn.Module]],
    settings: dict[str, Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # layerdrop is supported with this version of torch.
    monkeypatch.setattr(unsupported, "REDUCES_UNUSED", True)
    brain = make()
    brain.modules = nn.ModuleDict(modules())
    with pytest.raises(UnsupportedError, match=words):
        unsupported.check_modules(brain, Sharding(**settings))


def test_existing_names_and_separate_blocks_for_types_are_accepted() -> None:
    brain = with_model()
    unsupported.check_modules(
        brain, Sharding(blocks=["Encoder"], methods=["score", "project"])
    )
    brain.modules.model.encoder.bfloat16()
    unsupported.check_modules(brain, Sharding(blocks=["Encoder"]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"blocks": "Encoder"}, r"Use 'auto', a list of class names.*\['Encoder'\]"),
        ({"methods": "score"}, r"Use a list: \['score'\]"),
        ({"replicate": 0}, r"replicate=0\) is not valid\. Set it to the number of copies"),
    ],
)
def test_invalid_values_raise(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        FSDP2Strategy(**settings)


def test_layers_that_are_skipped_at_random_are_gathered_together_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(blocks, "SMALLEST", 1)
    model = Dropping()
    with caplog.at_level(logging.WARNING):
        assert blocks.blocks(model, "auto") == blocks.blocks(model, "auto") == []
    (record,) = caplog.records
    assert "Dropping with layerdrop_prob=0.1 skips layers at random" in record.getMessage()
    model.layerdrop_prob = 0.0
    assert blocks.blocks(model, "auto") == [model.layers[0]]


def test_versions_of_torch_that_shard_wrongly_raise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    brain = make(find_unused_parameters=True)
    monkeypatch.setattr(unsupported, "REDUCES_UNUSED", False)
    with pytest.raises(
        UnsupportedError, match=r"find_unused_parameters=True lets .*upgrade torch"
    ):
        unsupported.check_modules(brain, Sharding())
    brain.find_unused_parameters, brain.modules.model = False, Dropping()
    with pytest.raises(UnsupportedError, match=r"layerdrop_prob=0\.1 lets each rank leave"):
        unsupported.check_modules(brain, Sharding())
    monkeypatch.setattr(unsupported, "SHARDS", False)
    with pytest.raises(UnsupportedError, match=r"needs torch 2\.8 or newer, and torch"):
        brain.fit(range(1), loader(), trainer=sharded())


def trap(name: str) -> Any:
    class Trapped(Regression):
        def init_optimizers(self) -> None:
            if name == "hook":
                self.modules.model.register_comm_hook(None, print)
            if name != "optimizer":
                super().init_optimizers()

        def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
            if name.startswith("replaced") and stage.name == "TRAIN":
                self.modules.model = Model()
                if name == "replaced, sharded":
                    self._wrap_distributed()
                self.init_optimizers()

        def compute_forward(self, batch: Any, stage: Any) -> Any:
            if name == "part":
                return self.modules.model.output(batch[0])
            return super().compute_forward(batch, stage)

    brain = with_model(Trapped)
    if name == "optimizer":
        brain.optimizer = sgd(brain.modules.parameters())
    return brain


@needs_shards
@pytest.mark.usefixtures("one_process")
def test_unsupported_uses_of_sharded_modules_raise() -> None:
    for name, words in {
        "optimizer": r"self\.optimizer was created before.*Create it in init_optimizers",
        "replaced": r"was created before.*replaces.*after self\._wrap_distributed\(\)",
        "hook": r"register_comm_hook is for gradients that DistributedDataParallel averages",
    }.items():
        with pytest.raises(UnsupportedError, match=words):
            trap(name).fit(range(1), loader(), trainer=sharded())
    trap("replaced, sharded").fit(range(1), loader(), trainer=sharded())
    brain = with_model()
    brain.modules.model.norm = nn.SyncBatchNorm(2)
    with pytest.raises(
        UnsupportedError, match=r"'model' has a SyncBatchNorm, which needs a GPU"
    ):
        brain.fit(range(1), loader(), trainer=sharded())
    with pytest.raises(RuntimeError, match="mixed") as error:
        trap("part").fit(range(1), loader(), trainer=sharded())
    assert any("FSDP2Strategy(methods=[...])" in note for note in error.value.__notes__)
    trap("part").fit(range(1), loader(), trainer=sharded(FSDP2Strategy(blocks=["Linear"])))


class LossOfWhatIsKept(Regression):
    def compute_forward(self, batch: Any, stage: Any) -> Any:
        self.modules.model(batch[0])
        return self.modules.model.kept


class PenalizedGradient(Regression):
    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        gradient = torch.autograd.grad(predictions.sum(), self.features, create_graph=True)[0]
        return gradient.square().sum()

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        self.features = batch[0].clone().requires_grad_()
        return self.modules.model(self.features).square()


@needs_shards
@pytest.mark.usefixtures("one_process")
def test_a_loss_of_tensors_that_modules_did_not_return_raises() -> None:
    for brain_class, model in ((LossOfWhatIsKept, Keeping()), (PenalizedGradient, Model())):
        brain = make(brain_class)
        brain.modules.model = model
        with pytest.raises(RuntimeError, match="storage of size 0") as error:
            brain.fit(range(1), loader(), trainer=sharded())
        assert any(
            "tensor in an attribute, return this tensor" in n for n in error.value.__notes__
        )
    # torch raises no error here, because the gradient of one layer does not need its weights.
    brain = make(LossOfWhatIsKept)
    brain.modules.model = KeepingLayer(4, 2)
    with pytest.raises(UnsupportedError, match=r"'model' would not be trained.*Return all"):
        brain.fit(range(1), loader(), trainer=sharded())


@needs_shards
@pytest.mark.usefixtures("one_process")
def test_after_a_sharded_fit_modules_can_only_be_trained_sharded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    brain = with_model()
    brain.fit(range(1), loader(), trainer={"devices": 1})
    looked_through: list[str] = []
    monkeypatch.setattr(
        unsupported, "check_resets", lambda name, _: looked_through.append(name)
    )
    # The optimizer has unsharded parameters, and the next fit creates a new optimizer.
    brain.fit(range(1), loader(), trainer=sharded(FSDP2Strategy(methods=["score"])))
    assert looked_through == ["model"]
    before = tensors.whole(brain.modules.model.output.weight).detach().clone()
    brain.fit(range(1), loader(), trainer=sharded(FSDP2Strategy(methods=["score"])))
    assert not torch.equal(before, tensors.whole(brain.modules.model.output.weight))
    assert looked_through == ["model"]
    with pytest.raises(
        UnsupportedError,
        match=r"methods=\['score'\]\).*Create a new Brain to use methods=\(\)",
    ):
        brain.fit(range(1), loader(), trainer=sharded())
    for strategy in ("ddp", "auto"):
        with pytest.raises(UnsupportedError, match=r"'model' was sharded by.*again, or"):
            brain.fit(range(1), loader(), trainer=sharded(strategy))
    assert torch.isfinite(torch.tensor(brain.evaluate(loader())))
    # Simulates a call of state_dict on rank 0 only, in run_on_main.
    monkeypatch.setattr(tensors, "world_size", lambda: 2)
    monkeypatch.setattr(tensors, "communicates", lambda: False)
    with pytest.raises(UnsupportedError, match=r"Call state_dict\(\) on all ranks"):
        brain.modules.model.state_dict()


@needs_unused
@pytest.mark.usefixtures("one_process")
def test_unused_parameters_log_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Simulates two ranks, which may use different parameters.
    monkeypatch.setattr(unsupported, "world_size", lambda: 2)
    for options, warned in (({}, 1), ({"find_unused_parameters": True}, 0)):
        caplog.clear()
        brain = with_model(**options)
        brain.modules.model.spare = nn.Linear(2, 2)
        brain.modules["unused"] = nn.Linear(2, 2)
        brain.fit(range(2), loader(), trainer=sharded())
        found = [r.getMessage() for r in caplog.records if "no gradient" in r.getMessage()]
        assert [text.startswith("2 parameters of 'model'") for text in found] == [
            True
        ] * warned


REFUSED = {
    "WeightAveraging": "it copies modules",
    "EMAWeightAveraging": "it copies modules",
    "StochasticWeightAveraging": "it copies modules",
    "ModelPruning": "it needs the smallest",
}


def callback(name: str) -> Any:
    cls = getattr(callbacks, name, None)
    if cls is None:
        pytest.skip(f"this Lightning has no {name}")
    return cls(
        **{
            "StochasticWeightAveraging": {"swa_lrs": 0.1},
            "ModelPruning": {"pruning_fn": "l1_unstructured"},
        }.get(name, {})
    )


@needs_shards
@pytest.mark.parametrize("name", REFUSED)
def test_callbacks_that_copy_modules_raise(name: str) -> None:
    words = rf"{name} is not supported with .*{REFUSED[name]}"
    module = to_lightning(make())
    module.trainer = trainer_with(callback(name), **sharded())
    with pytest.raises(UnsupportedError, match=words):
        module.configure_callbacks()
