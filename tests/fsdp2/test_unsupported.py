"""What cannot be sharded is refused in words before training; no other process is started."""

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
from tests.support.upstream import needs_shards

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
    """As a transformer of SpeechBrain's."""

    def __init__(self) -> None:
        super().__init__()
        self.layerdrop_prob = 0.1
        self.layers = nn.ModuleList([nn.Linear(4, 4)])


@pytest.fixture
def one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of the one process that this is, which a fit leaves alone."""
    # Lightning sets it.
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
    "tied": (tied, {}, r"decoder\.0\.weight and encoder\.weight are the same.*in one entry"),
    "tied block": (
        tied_block, {"blocks": ["Linear"]},
        r"model\.0\.weight is 'weight' of a block as well, a Linear: .* or none$",
    ),
    "sparse": (
        lambda: {"m": nn.Sequential(nn.Embedding(4, 4, sparse=True))}, {},
        r"m\.0 has sparse gradients.*sparse=False",
    ),
    "scalar": (scalar, {}, r"model\.scale is a scalar.*torch\.tensor\(\[\.\.\.\]\)"),
    "lazy": (lambda: {"m": nn.LazyLinear(2)}, {}, r"m\.weight has no shape yet: give"),
    "types": (
        lambda: {"m": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16())}, {},
        r"m has parameters of bfloat16 and float32 that are gathered together.*blocks=",
    ),
    "script": (
        lambda: {"m": torch.jit.script(nn.Linear(2, 2))}, {},
        "m is TorchScript, which cannot be sharded: use --compile instead of --jit",
    ),
    "replicate": (
        lambda: {"m": Model()}, {"replicate": 3},
        r"replicate=3\) does not divide the number of processes, 1: give 1$",
    ),
    "layerdrop": (
        lambda: {"m": Dropping()}, {"blocks": ["Linear"]},
        r"Dropping with layerdrop_prob=0\.1 leaves out layers by chance.*set it to 0",
    ),
    "no class": (
        lambda: {"m": Model()}, {"blocks": ["Layer"]},
        r"blocks=\['Layer'\]\): no module.* there are Encoder, Linear, Model$",
    ),
    "no method": (
        lambda: {"m": Model()}, {"methods": ["sing"]},
        r"methods=\['sing'\]\): no entry.* there are score$",
    ),
    "a part": (
        lambda: {"m": Model()}, {"methods": ["encoder"]},
        r"name its class, blocks=\['Encoder'\]",
    ),
    "method of a part": (
        lambda: {"m": Model()}, {"methods": ["project"]},
        r"name its class, blocks=\['Encoder'\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("modules", "settings", "words"), MODULES.values(), ids=MODULES)
def test_modules_are_refused(
    modules: Callable[[], dict[str, nn.Module]],
    settings: dict[str, Any],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As of a torch that has what layerdrop needs.
    monkeypatch.setattr(unsupported, "REDUCES_UNUSED", True)
    brain = make()
    brain.modules = nn.ModuleDict(modules())
    with pytest.raises(UnsupportedError, match=words):
        unsupported.check_modules(brain, Sharding(**settings))


def test_names_that_there_are_and_types_in_blocks_of_their_own_are_accepted() -> None:
    brain = with_model()
    unsupported.check_modules(
        brain, Sharding(blocks=["Encoder"], methods=["score", "project"])
    )
    brain.modules.model.encoder.bfloat16()
    unsupported.check_modules(brain, Sharding(blocks=["Encoder"]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"blocks": "Encoder"}, r"give 'auto', a list of names.*\['Encoder'\]"),
        ({"methods": "score"}, r"give a list, \['score'\]"),
        ({"replicate": 0}, r"replicate=0\) must be the number of copies"),
    ],
)
def test_values_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        FSDP2Strategy(**settings)


def test_layers_that_are_left_out_by_chance_are_gathered_together_which_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(blocks, "SMALLEST", 1)
    model = Dropping()
    with caplog.at_level(logging.WARNING):
        assert blocks.blocks(model, "auto") == blocks.blocks(model, "auto") == []
    (record,) = caplog.records
    assert "Dropping with layerdrop_prob=0.1 leaves out layers" in record.getMessage()
    model.layerdrop_prob = 0.0
    assert blocks.blocks(model, "auto") == [model.layers[0]]


def test_versions_of_torch_that_shard_wrongly_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    brain = make(find_unused_parameters=True)
    monkeypatch.setattr(unsupported, "REDUCES_UNUSED", False)
    with pytest.raises(
        UnsupportedError, match=r"find_unused_parameters=True: .*upgrade torch"
    ):
        unsupported.check_modules(brain, Sharding())
    brain.find_unused_parameters, brain.modules.model = False, Dropping()
    with pytest.raises(UnsupportedError, match=r"layerdrop_prob=0\.1: each process may leave"):
        unsupported.check_modules(brain, Sharding())
    monkeypatch.setattr(unsupported, "SHARDS", False)
    with pytest.raises(UnsupportedError, match=r"needs torch 2\.8 or newer, and this is"):
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
def test_what_a_recipe_does_around_its_shards_is_refused_in_words() -> None:
    for name, words in {
        "optimizer": r"self\.optimizer was made before.*make it in init_optimizers",
        "replaced": r"was made before.*, or after self\._wrap_distributed\(\) where",
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
def test_a_loss_of_what_modules_did_not_return_is_refused_in_words() -> None:
    for brain_class, model in ((LossOfWhatIsKept, Keeping()), (PenalizedGradient, Model())):
        brain = make(brain_class)
        brain.modules.model = model
        with pytest.raises(RuntimeError, match="storage of size 0") as error:
            brain.fit(range(1), loader(), trainer=sharded())
        assert any("on an attribute needs it returned" in n for n in error.value.__notes__)
    # Without the words of torch: the gradient of one layer needs none of its weights.
    brain = make(LossOfWhatIsKept)
    brain.modules.model = KeepingLayer(4, 2)
    with pytest.raises(UnsupportedError, match=r"'model' would not be trained.*Return all"):
        brain.fit(range(1), loader(), trainer=sharded())


@needs_shards
@pytest.mark.usefixtures("one_process")
def test_after_a_fit_in_shards_modules_are_trained_in_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    brain = with_model()
    brain.fit(range(1), loader(), trainer={"devices": 1})
    looked_through: list[str] = []
    monkeypatch.setattr(
        unsupported, "check_resets", lambda name, _: looked_through.append(name)
    )
    # Its optimizer is of whole parameters, and the next fit makes another one.
    brain.fit(range(1), loader(), trainer=sharded(FSDP2Strategy(methods=["score"])))
    assert looked_through == ["model"]
    before = tensors.whole(brain.modules.model.output.weight).detach().clone()
    brain.fit(range(1), loader(), trainer=sharded(FSDP2Strategy(methods=["score"])))
    assert not torch.equal(before, tensors.whole(brain.modules.model.output.weight))
    assert looked_through == ["model"]
    with pytest.raises(
        UnsupportedError, match=r"methods=\['score'\]\).*methods=\(\) needs a new"
    ):
        brain.fit(range(1), loader(), trainer=sharded())
    for strategy in ("ddp", "auto"):
        with pytest.raises(UnsupportedError, match=r"'model' is in shards since.*again, or"):
            brain.fit(range(1), loader(), trainer=sharded(strategy))
    assert torch.isfinite(torch.tensor(brain.evaluate(loader())))
    # A state is asked for by the main process alone, in run_on_main.
    monkeypatch.setattr(tensors, "world_size", lambda: 2)
    monkeypatch.setattr(tensors, "communicates", lambda: False)
    with pytest.raises(UnsupportedError, match=r"call state_dict\(\) in all processes"):
        brain.modules.model.state_dict()


@needs_shards
@pytest.mark.usefixtures("one_process")
def test_parameters_that_are_not_used_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # As of several processes, which may use different ones.
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
def test_callbacks_that_copy_modules_are_refused(name: str) -> None:
    words = rf"{name} is not supported with .*{REFUSED[name]}"
    module = to_lightning(make())
    module.trainer = trainer_with(callback(name), **sharded())
    with pytest.raises(UnsupportedError, match=words):
        module.configure_callbacks()
