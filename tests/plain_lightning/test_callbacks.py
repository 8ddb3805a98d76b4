"""What a callback with every hook hears of a Brain, compared with a plain LightningModule."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from brain_lightning import to_lightning
from tests.support.brains import all_equal, loader, make, trainer_with, weights
from tests.support.plain_modules import PlainRegression
from tests.support.upstream import weights_only

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

HOOKS = [
    name for name, _ in inspect.getmembers(Callback, inspect.isfunction) if name[0] != "_"
]


class Plain(PlainRegression):
    """Returns what a Brain returns."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        super().validation_step(batch, batch_idx)
        return nn.functional.mse_loss(self.model(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.mse_loss(self.model(batch[0]), batch[1])

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(batch[0])


class HearsAll(Callback):
    """Records each hook with its arguments, and the Trainer's counts; may fail in a batch."""

    def __init__(self, fails_in: int = -1) -> None:
        self.heard: list[Any] = []
        self.fails_in = fails_in
        for hook in HOOKS:
            setattr(self, hook, self.hears(hook))

    def hears(self, hook: str) -> Any:
        def hear(*args: Any, **kwargs: Any) -> dict[str, Any] | None:
            # It is watched by what it hears: a state is saved of what was heard before.
            if hook == "state_dict":
                return {"heard": len(self.heard)}
            if hook == "load_state_dict":
                self.heard.append((hook, args[0]["heard"]))
                return None
            trainer, _, *rest = *args, *kwargs.values()
            content = [] if hook.endswith("_checkpoint") else [comparable(a) for a in rest]
            self.heard.append((hook, trainer.current_epoch, trainer.global_step, *content))
            if hook == "on_train_batch_end" and rest[-1] == self.fails_in:
                raise KeyError("of the user's")
            return None

        return hear


def comparable(value: Any) -> Any:
    """Tensors as numbers; the optimizers of a Brain are one for Lightning, a group."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: comparable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [comparable(each) for each in value]
    return value if isinstance(value, (int, float, str)) else type(value).__name__


def heard(module: Any, what: str, **arguments: Any) -> list[Any]:
    """What a callback hears of one call of a Trainer's method."""
    callback = HearsAll(arguments.pop("fails_in", -1))
    path, saver = arguments.pop("ckpt_path", None), arguments.pop("saver", None)
    own = {"max_epochs": 2, "num_sanity_val_steps": 0, "enable_model_summary": False}
    savers = [] if saver is None else [ModelCheckpoint(saver, "{epoch}", save_top_k=-1)]
    trainer = trainer_with(
        callback, *savers, **own | arguments, enable_checkpointing=bool(savers)
    )
    loaders = [loader(12), loader(8)] if what == "fit" else [loader(8)]
    kwargs = {"ckpt_path": path, **weights_only(False)} if path else {}
    try:
        getattr(trainer, what)(module, *loaders, **kwargs)
    except KeyError as error:
        callback.heard.append(repr(error))
    return comparable([*callback.heard])


def without_optimizers(events: list[Any], *left_out: str) -> list[Any]:
    names = ("SGD", "OptimizerGroup")
    kept = [event for event in events if event[0] not in left_out]
    return [[part for part in event if part not in names] for event in kept]


# Of a Brain in each batch, also within an accumulation window, whose gradients it keeps.
DIFFERS = {"accumulate_grad_batches": "on_before_zero_grad"}


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("fit", {}),
        ("fit", {"accumulate_grad_batches": 2}),
        ("fit", {"val_check_interval": 2}),
        ("fit", {"check_val_every_n_epoch": 2}),
        ("fit", {"limit_train_batches": 2, "max_epochs": 1}),
        ("fit", {"fails_in": 1}),
        ("validate", {}),
        ("test", {}),
        ("predict", {}),
    ],
    ids=str,
)
def test_a_callback_hears_the_same(what: str, arguments: dict[str, Any]) -> None:
    plain, brain = Plain(), make(max_grad_norm=0.0)
    left_out = [DIFFERS.get(name, "") for name in arguments]
    expected = without_optimizers(heard(plain, what, **arguments), *left_out)
    assert len(expected) > 9
    found = heard(to_lightning(brain), what, **arguments)
    assert without_optimizers(found, *left_out) == expected
    assert all_equal([p.detach() for p in plain.parameters()], weights(brain))


def test_a_callback_hears_the_same_of_a_resumed_run(tmp_path: Path) -> None:
    def runs(name: str, make_module: Any) -> list[Any]:
        saver = {"saver": tmp_path / name}
        first = heard(make_module(), "fit", **saver)
        path = tmp_path / name / "epoch=1.ckpt"
        return [*first, *heard(make_module(), "fit", **saver, max_epochs=3, ckpt_path=path)]

    # A Brain resumes in the epoch whose end was saved, and callbacks get their state again
    # with that of the run.
    left_out = ("on_train_start", "load_state_dict")
    expected = without_optimizers(runs("plain", Plain), *left_out)
    assert {"on_save_checkpoint", "on_load_checkpoint"} <= {event[0] for event in expected}
    brains = runs("brain", lambda: to_lightning(make(max_grad_norm=0.0)))
    assert without_optimizers(brains, *left_out) == expected
