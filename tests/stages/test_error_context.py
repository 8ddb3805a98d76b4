"""Errors of a recipe get a note with the stage, the epoch, the step and the batch ids."""

from __future__ import annotations

import gc
import logging
import sys
from typing import Any

import pytest
import speechbrain
import torch
from lightning.pytorch import Callback
from speechbrain.dataio.batch import PaddedBatch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from brain_lightning import HookStoppedError, patch_speechbrain, to_lightning
from brain_lightning.compat import versions
from tests.support.brains import Regression, loader, make, trainer_with

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class MineError(Exception):
    """An error whose arguments are not strings."""


class Fails:
    """Mixed into a Brain: raises ``error`` in ``hook`` of ``stage`` at step ``at``."""

    hook, stage, at = "compute_forward", "TRAIN", 0
    error: BaseException = MineError(1, {"a": 2})

    def _fail(self, hook: str, stage: str) -> None:
        if hook == self.hook and stage == self.stage and self.step == self.at:
            raise self.error

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        self._fail("compute_forward", stage.name)
        return self.modules.model(batch[0])

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        self._fail("compute_objectives", stage.name)
        return nn.functional.mse_loss(predictions, batch[1])

    def on_fit_batch_end(self, *args: Any) -> None:
        self._fail("on_fit_batch_end", "TRAIN")

    def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
        self._fail("on_stage_start", stage.name)

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        self._fail("on_stage_end", stage.name)


class Failing(Fails, Regression):
    pass


class ByHand(Failing):
    def fit_batch(self, batch: Any) -> Any:
        self._fail("fit_batch", "TRAIN")
        return super().fit_batch(batch)

    def evaluate_batch(self, batch: Any, stage: Any) -> Any:
        self._fail("evaluate_batch", stage.name)
        return super().evaluate_batch(batch, stage)


class Theirs(Fails, speechbrain.Brain):
    pass


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.1)


def by_fit(brain: Any, data: Any) -> None:
    brain.fit(range(1, 3), data, data)


def by_evaluate(brain: Any, data: Any) -> None:
    brain.evaluate(data)


def by_lightnings_own_loop(brain: Any, data: Any) -> None:
    class Watching(Callback):
        def on_before_backward(self, *args: Any) -> None:
            pass

    brain.fit(range(1, 3), data, data, trainer={"callbacks": [Watching()]})


def by_a_trainer(brain: Any, data: Any) -> None:
    trainer_with().fit(to_lightning(brain), data, data)


def by_a_patch(brain: Any, data: Any) -> None:
    model = {"model": nn.Linear(4, 2)}
    theirs = Theirs(model, sgd, run_opts={"device": "cpu", "noprogressbar": True})
    for name in ("hook", "stage", "at", "error"):
        setattr(theirs, name, getattr(brain, name))
    with patch_speechbrain():
        by_fit(theirs, data)


def failed(
    run: Any, cls: Any = Failing, data: Any = None, **attributes: Any
) -> tuple[BaseException, list[str]]:
    """Returns the error that ends a run, and its notes."""
    brain = make(cls)
    brain.error = MineError(1, {"a": 2})
    vars(brain).update(attributes)
    with pytest.raises(type(brain.error)) as caught:
        run(brain, loader() if data is None else data)
    if data is None:
        assert caught.value is brain.error
        assert brain.error.args == type(brain.error)(*brain.error.args).args
    return caught.value, notes(caught.value)


def notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", None) or ())


@pytest.mark.parametrize("run", [by_fit, by_lightnings_own_loop, by_a_trainer, by_a_patch])
@pytest.mark.parametrize(
    ("hook", "stage", "at", "place"),
    [
        ("compute_forward", "TRAIN", 2, "TRAIN, epoch 1, step 2"),
        ("compute_objectives", "VALID", 4, "VALID, epoch 1, step 4"),
        ("on_fit_batch_end", "TRAIN", 1, "TRAIN, epoch 1, step 1"),
        ("on_stage_start", "TRAIN", 0, "TRAIN, epoch 1"),
        ("on_stage_end", "VALID", 0, "VALID, epoch 1"),
    ],
)
def test_an_error_names_its_stage_and_batch(
    run: Any, hook: str, stage: str, at: int, place: str
) -> None:
    error, found = failed(run, hook=hook, stage=stage, at=at)
    assert error.args == (1, {"a": 2})
    assert found == [f"brain_lightning: in {place}"]


@pytest.mark.parametrize("hook", ["fit_batch", "evaluate_batch"])
def test_methods_of_the_recipes_own_too(hook: str) -> None:
    stage = "TRAIN" if hook == "fit_batch" else "VALID"
    _, found = failed(by_fit, ByHand, hook=hook, stage=stage, at=3)
    assert found == [f"brain_lightning: in {stage}, epoch 1, step 3"]


def test_a_test_has_no_epoch() -> None:
    _, found = failed(by_evaluate, stage="TEST", at=5)
    assert found == ["brain_lightning: in TEST, step 5"]


class Batch(list):  # type: ignore[type-arg]
    """A batch with ids."""

    def __init__(self, ids: Any) -> None:
        super().__init__([torch.zeros(2, 4), torch.zeros(2, 2)])
        self.id = ids


class Mapped(Regression):
    def compute_forward(self, batch: Any, stage: Any) -> Any:
        raise MineError


class Cursed:
    """A batch whose ids cannot be read."""

    @property
    def id(self) -> Any:
        raise RuntimeError("CUDA error")


PADDED = PaddedBatch([{"id": f"utt{i}", "sig": torch.zeros(2)} for i in range(2)])
EIGHT = ", ".join(str(n) for n in range(8))


@pytest.mark.parametrize(
    ("batch", "shown"),
    [
        (Batch(["utt1", "utt2"]), ", with batch.id ['utt1', 'utt2']"),
        (Batch(list(range(100))), f", with batch.id [{EIGHT}, ...]"),
        (Batch(torch.arange(3)), ", with batch.id [0, 1, 2]"),
        (PADDED, ", with batch.id ['utt0', 'utt1']"),
        ({"id": ("a", "b"), "x": 1}, ", with batch.id ('a', 'b')"),
        ({"x": torch.zeros(2)}, ""),
        (torch.zeros(2), ""),
        (Cursed(), ""),
    ],
)
def test_the_ids_of_the_batch_are_shown_cut_short(batch: Any, shown: str) -> None:
    data = DataLoader([0, 1], batch_size=None, collate_fn=lambda _: batch)
    _, found = failed(by_fit, Mapped, data)
    assert found == [f"brain_lightning: in TRAIN, epoch 1, step 1{shown}"]


class Broken(Dataset[Any]):
    """A dataset with one example that raises."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        if index == self.at:
            raise MineError("bad example")
        return torch.zeros(4), torch.zeros(2)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("at", "batch"), [(0, 1), (9, 3)])
def test_an_error_of_the_loaders_names_the_batch(
    workers: int, at: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataLoader(Broken(at), batch_size=4, num_workers=workers)
    error, found = failed(by_fit, Failing, data)
    assert "bad example" in str(error)
    assert found == [f"brain_lightning: in TRAIN, epoch 1, fetching batch {batch}"]
    _, found = failed(by_evaluate, Failing, data)
    assert found == [f"brain_lightning: in TEST, fetching batch {batch}"]
    # If an iterator is garbage in a cycle, torch waits this long for its workers.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    del error
    gc.collect()


def test_an_error_of_the_transfer_names_the_batch() -> None:
    class Stuck(Batch):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            raise MineError

    class Moving(Regression):
        def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
            if self.step == 2:
                self.step = 1  # As before the batch, when it is moved.
                device = torch.device("meta")
                module.transfer_batch_to_device(Stuck(["utt1"]), device, 0)

    module = to_lightning(make(Moving))
    with pytest.raises(MineError) as caught:
        trainer_with().fit(module, loader())
    place = "TRAIN, epoch 1, moving batch 2, with batch.id ['utt1']"
    assert notes(caught.value) == [f"brain_lightning: in {place}"]


def test_a_fit_within_a_fit_names_both_stages() -> None:
    class Outer(Regression):
        def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
            inner = make(Failing)
            inner.at, inner.error = 4, MineError()
            by_fit(inner, loader())

    with pytest.raises(MineError) as caught:
        by_fit(make(Outer), loader())
    places = ["TRAIN, epoch 1, step 4", "TRAIN, epoch 1, step 1"]
    assert notes(caught.value) == [f"brain_lightning: in {place}" for place in places]


def test_an_error_that_is_raised_again_names_the_new_location_too() -> None:
    error = MineError()
    found: list[str] = []
    for step in (2, 4):
        _, found = failed(by_fit, at=step, error=error)
    places = [f"brain_lightning: in TRAIN, epoch 1, step {step}" for step in (2, 4)]
    assert found == places


class NoNotesError(Exception):
    """An error that does not accept notes."""

    __notes__ = None


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no notes")
def test_an_error_that_takes_no_notes_stays_as_it_is() -> None:
    _, found = failed(by_fit, at=2, error=NoNotesError())
    assert found == []


@pytest.mark.parametrize(
    "error", [StopIteration(1), KeyboardInterrupt(1), SystemExit(1), HookStoppedError(1)]
)
def test_what_is_no_error_stays_as_it_is(error: BaseException) -> None:
    _, found = failed(by_fit, at=2, error=error)
    assert found == []


def test_python_3_10_has_no_notes_and_logs(caplog: pytest.LogCaptureFixture) -> None:
    class OldError(Exception):
        """Hides ``add_note``, which errors do not have on Python 3.10."""

        def __getattribute__(self, name: str) -> Any:
            if name == "add_note":
                raise AttributeError(name)
            return super().__getattribute__(name)

    caplog.set_level(logging.ERROR)
    error = OldError("boom")
    versions.add_note(error, "in TRAIN")
    assert notes(error) == ["in TRAIN"]
    assert caplog.messages == ["OldError: in TRAIN"]
