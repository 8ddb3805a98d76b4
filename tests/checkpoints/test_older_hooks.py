"""Load hooks of SpeechBrain 0.5 with a ``device`` argument, and of SpeechBrain 1 without."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from speechbrain.utils import checkpoints
from speechbrain.utils.epoch_loop import EpochCounter as TheirCounter
from speechbrain.utils.epoch_loop import EpochCounterWithStopper as TheirStopper
from speechbrain.utils.parameter_transfer import Pretrainer

import brain_lightning
from brain_lightning import (
    Checkpointer,
    EpochCounter,
    average_checkpoints,
    mark_as_loader,
    mark_as_saver,
    mark_as_transfer,
    patch_speechbrain,
    register_checkpoint_hooks,
)
from tests.support.upstream import needs_speechbrain

Stopper = brain_lightning.EpochCounterWithStopper
GIVEN = torch.device("meta")


def four(obj: Any, path: Any, end_of_epoch: Any, device: Any) -> None:
    obj.got = (end_of_epoch, device)


def four_by_another_name(obj: Any, path: Any, end_of_epoch: Any, where: Any) -> None:
    obj.got = (end_of_epoch, where)


def with_defaults(obj: Any, path: Any, end_of_epoch: Any = False, device: Any = None) -> None:
    obj.got = (end_of_epoch, device)


def by_keyword(obj: Any, path: Any, end_of_epoch: Any, *, device: Any) -> None:
    obj.got = (end_of_epoch, device)


def three(obj: Any, path: Any, end_of_epoch: Any) -> None:
    obj.got = (end_of_epoch, None)


def another_fourth(obj: Any, path: Any, end_of_epoch: Any, strict: Any = None) -> None:
    obj.got = (end_of_epoch, strict)


def anything(*args: Any) -> None:
    args[0].got = (args[2], None if len(args) == 3 else args[3])


class Thing:
    got: Any = None


HOOKS = {
    four: GIVEN, four_by_another_name: GIVEN, with_defaults: GIVEN, by_keyword: GIVEN,
    partial(four, device="mine"): GIVEN, three: None, another_fourth: None, anything: None,
}  # fmt: skip


@pytest.mark.parametrize("side", [brain_lightning, checkpoints])
@pytest.mark.parametrize("form", ["recover_if_possible", "load_checkpoint", "by position"])
def test_a_hook_gets_the_device_if_it_asks_for_one(
    side: Any, form: str, tmp_path: Path
) -> None:
    things = {f"thing{index}": Thing() for index in range(len(HOOKS))}
    hooks = dict(zip(things, HOOKS, strict=True))
    saving = dict.fromkeys(things, lambda _, path: Path(path).write_text("saved"))
    with patch_speechbrain():
        ckpts = side.Checkpointer(tmp_path, things, hooks, saving)
        ckpts.save_checkpoint()
        if form == "recover_if_possible":
            ckpts.recover_if_possible(device=GIVEN)
        elif form == "load_checkpoint":
            ckpts.load_checkpoint(ckpts.find_checkpoint(), device=GIVEN)
        else:
            ckpts.recover_if_possible(None, None, None, None, GIVEN)
    expected = [(True, device) for device in HOOKS.values()]
    assert [thing.got for thing in things.values()] == expected
    assert ckpts.custom_load_hooks == hooks


def transfer_to(obj: Any, saved: Path, folder: Path, *hook: Any, **device: Any) -> None:
    """SpeechBrain's parameter transfer from the ``it.ckpt`` of a checkpoint."""
    hooks = dict.fromkeys(["it"], *hook) if hook else None
    transfer = Pretrainer(folder / "transfer", loadables={"it": obj}, custom_hooks=hooks)
    transfer.collect_files(str(saved))
    transfer.load_collected(**device)


@pytest.mark.parametrize("patched", [False, True])
def test_decorators_take_hooks_of_either_form(patched: bool, tmp_path: Path) -> None:
    side: Any = checkpoints if patched else brain_lightning

    def make() -> Any:
        @side.register_checkpoint_hooks
        class Either:
            got: Any = None
            save = side.mark_as_saver(lambda self, path: Path(path).write_text("saved"))
            load = side.mark_as_loader(four)
            transfer = side.mark_as_transfer(
                lambda self, path, device: setattr(self, "t", device)
            )

        return Either()

    if patched:
        with pytest.raises(TypeError, match="signature"):
            make()
    with patch_speechbrain():
        either = make()
        ckpts = side.Checkpointer(tmp_path, {"it": either})
        path = ckpts.save_checkpoint().path
        ckpts.recover_if_possible(device=GIVEN)
        assert either.got == (True, GIVEN)
        # SpeechBrain 1 passes no device. A recipe may pass one to its own hook.
        ckpts.recover_if_possible()
        assert either.got == (True, None)
        either.load(path, False, GIVEN)
        assert either.got == (False, GIVEN)
        if patched:
            transfer_to(either, path, tmp_path)
            assert either.t is None
            transfer_to(either, path, tmp_path, device=GIVEN)
            assert either.t is GIVEN

            def custom(obj: Any, path: Any, device: Any) -> None:
                obj.t = (Path(path).name, device)

            transfer_to(either, path, tmp_path, custom, device=GIVEN)
            assert either.t == ("it.ckpt", GIVEN)
    with pytest.raises(TypeError, match=r"loader must have the signature \(self, path, end"):
        mark_as_loader(lambda self, path: None)
    with pytest.raises(TypeError, match="saver must have the signature"):
        mark_as_saver(lambda self, path, device: None)
    assert mark_as_transfer(three) is three
    assert register_checkpoint_hooks(Thing) is Thing


def test_the_mean_of_checkpoints_goes_to_a_device(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    for side in (brain_lightning, checkpoints):
        ckpts = side.Checkpointer(tmp_path / side.__name__, {"model": model})
        ckpts.save_checkpoint()
        ckpts.save_checkpoint()
        with patch_speechbrain():
            mean = side.average_checkpoints(ckpts.find_checkpoints(), "model", device="cpu")
        assert torch.equal(mean["weight"], model.weight)
    found = Checkpointer(tmp_path / "brain_lightning").find_checkpoints()
    assert average_checkpoints(found, "model", device="meta")["weight"].is_meta


@pytest.mark.parametrize(
    ("saving", "loading"),
    [(EpochCounter, EpochCounter), (TheirCounter, EpochCounter), (Stopper, Stopper),
     (TheirStopper, Stopper),
     pytest.param(EpochCounter, TheirCounter, marks=needs_speechbrain("1.1"))],
)  # fmt: skip
def test_a_counter_that_a_pretrainer_loads_goes_on(
    saving: Any, loading: Any, tmp_path: Path
) -> None:
    """SpeechBrain issue 2964: the saved epoch is over."""

    def counter(cls: Any, limit: int) -> Any:
        is_stopper = issubclass(cls, (TheirStopper, Stopper))
        return cls(limit, 99, 0, "min") if is_stopper else cls(limit)

    first, second = counter(saving, 3), counter(loading, 9)
    side: Any = checkpoints if saving.__module__.startswith("speechbrain") else brain_lightning
    ckpts = side.Checkpointer(tmp_path / "save", {"it": first})
    assert list(first) == [1, 2, 3]
    transfer_to(second, ckpts.save_checkpoint().path, tmp_path)
    assert next(iter(second)) == 4
