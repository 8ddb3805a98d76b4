"""Errors of load hooks are raised unchanged: the checkpoint is not called damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import speechbrain
import torch
from speechbrain.utils.checkpoints import Checkpointer as SpeechBrainCheckpointer
from torch import nn

import brain_lightning
from brain_lightning import Checkpointer, CheckpointError, patch_speechbrain
from brain_lightning.errors import DamagedCheckpointError, UnsafeCheckpointError
from tests.support.brains import Regression, all_equal, loader, weights
from tests.support.states import State, recovered, saved

CHECKPOINTERS = {"ours": Checkpointer, "speechbrain": SpeechBrainCheckpointer}
LEAVE = "checkpointer.custom_load_hooks['{}'] = lambda *_: None"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "save"


def notes_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


def without_checksums(folder: Path) -> None:
    """Removes the checksums, which SpeechBrain does not write."""
    for path in folder.glob("*/checksums.yaml"):
        path.unlink()


# ------------------------------------------------------------- a number of classes changed


def classify(
    base: Any, checkpointer: Any, folder: Path, classes: int, leave: tuple[str, ...] = ()
) -> Any:
    """Recovers the last checkpoint, trains an epoch, and saves."""

    class Classifies(base):  # type: ignore[misc]
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            return self.modules.classifier(self.modules.encoder(batch[0]))

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            return nn.functional.cross_entropy(predictions, batch[1])

        def on_fit_start(self) -> None:
            super().on_fit_start()
            self.recovered = self.modules.encoder.weight.detach().clone()

        def on_stage_end(self, *_: Any) -> None:
            self.checkpointer.save_checkpoint()

    nets = {"encoder": nn.Linear(3, 4), "classifier": nn.Linear(4, classes)}
    saves = checkpointer(folder, nets)
    for name in leave:
        saves.custom_load_hooks[name] = lambda *_: None
    data = torch.utils.data.TensorDataset(torch.rand(4, 3), torch.randint(0, 3, (4,)))
    options = {"device": "cpu", "noprogressbar": True}
    brain = Classifies(nets, torch.optim.Adam, {}, options, saves)
    brain.fit(range(1, 2), data)
    return brain


@pytest.mark.filterwarnings("ignore:.*'?brain_lightning'?")
@pytest.mark.parametrize("patched", [False, True], ids=["ours", "patched"])
@pytest.mark.parametrize("writer", CHECKPOINTERS)
@pytest.mark.parametrize("reader", CHECKPOINTERS)
def test_a_class_count_that_changed_is_told_and_the_rest_can_be_recovered(
    folder: Path, patched: bool, writer: str, reader: str
) -> None:
    base = speechbrain.Brain if patched else brain_lightning.Brain
    with patch_speechbrain():
        first = classify(base, CHECKPOINTERS[writer], folder, 3)
        with pytest.raises(RuntimeError, match="size mismatch for weight") as caught:
            classify(base, CHECKPOINTERS[reader], folder, 5)
        leave = ("classifier", "optimizer")
        second = classify(base, CHECKPOINTERS[reader], folder, 5, leave)
    assert type(caught.value) is RuntimeError
    assert "damaged" not in str(caught.value) + notes_of(caught.value)
    assert torch.equal(second.recovered, first.modules.encoder.weight)
    assert second.modules.classifier.weight.shape == (5, 4)
    assert second.optimizer_step == 2 * 4
    if reader == "ours":
        (path,) = [
            p for p in folder.glob("*/classifier.ckpt") if str(p) in notes_of(caught.value)
        ]
        told = f"'classifier' could not be recovered from {path}. Recovered before it: 'encod"
        assert told in notes_of(caught.value)
        assert "checkpointer.ignore_mismatched_sizes = ['classifier']" in notes_of(
            caught.value
        )


def test_parts_of_another_shape_are_left_out_where_they_are_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Parameters are left out with their optimizer state, only while their shapes differ."""

    def brain_of(classes: int) -> Any:
        model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, classes)))
        head = nn.Linear(4, classes)
        named = ["model.1", "head"]
        checkpointer = Checkpointer(
            folder, {"model": model, "head": head}, ignore_mismatched_sizes=named
        )
        modules = {"model": model, "head": head}
        options = {"device": "cpu", "noprogressbar": True}
        return Classes(modules, torch.optim.Adam, None, options, checkpointer)

    class Classes(Regression):
        def compute_forward(self, batch: Any, stage: Any) -> Any:
            return self.modules.model(batch[0]) + self.modules.head(batch[0])

        def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
            return predictions.square().mean()

        def on_fit_start(self) -> None:
            super().on_fit_start()
            self.found = weights(self)
            self.steps = [float(s["step"]) for s in self.optimizer.state.values()]

        def on_stage_end(self, *_: Any) -> None:
            self.checkpointer.save_checkpoint()

    first, second, third = brain_of(3), brain_of(5), brain_of(5)
    first.fit(range(1), loader())
    second.fit(range(1), loader())
    assert all_equal(second.found[:2], weights(first)[:2])
    assert second.steps == [5.0, 5.0]
    assert [p.shape[0] for p in second.found[2:]] == [5, 5, 5, 5]
    left = "model.1.0.weight is not loaded: its shape is (5, 3), but (3, 3) in the"
    assert left in caplog.text
    assert not all_equal(second.found, weights(second))
    third.fit(range(1), loader())
    assert all_equal(third.found, weights(second))
    assert third.steps == [10.0, 10.0, 5.0, 5.0, 5.0, 5.0]


def test_an_optimizer_of_other_parameters_is_not_named(folder: Path) -> None:
    nets = {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}
    optimizers = {
        f"of_{name}": torch.optim.SGD(net.parameters(), 1.0) for name, net in nets.items()
    }
    Checkpointer(folder, {**nets, **optimizers}).save_checkpoint()
    other = {**nets, **optimizers, "a": nn.Linear(2, 1)}
    other["of_a"] = torch.optim.SGD(other["a"].parameters(), 1.0)
    with pytest.raises(RuntimeError, match="size mismatch") as caught:
        Checkpointer(folder, other).recover_if_possible()
    assert "ignore_mismatched_sizes = ['a']" in notes_of(caught.value)
    other["a"] = nn.Linear(1, 1, bias=False)
    other["of_a"] = torch.optim.SGD(other["a"].parameters(), 1.0)
    with pytest.raises(RuntimeError, match="Unexpected key") as caught:
        Checkpointer(folder, other).recover_if_possible()
    assert LEAVE.format("of_a") in notes_of(caught.value)
    assert "of_b" not in notes_of(caught.value)
    assert "Recovered before it: nothing." in notes_of(caught.value)


# --------------------------------------------------------------------------- other errors


class Failing:
    """Its load hook raises its own error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def load(self, path: Path, end_of_epoch: bool) -> None:
        raise self.error


ERRORS = [KeyError("n_steps"), ValueError("a number of another kind"), TypeError("no dict")]


@pytest.mark.parametrize("checksums", [True, False], ids=["ours", "speechbrain"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_of_a_hook_is_raised_as_it_is(
    folder: Path, checksums: bool, error: Exception
) -> None:
    """The checkpoint is not skipped, because the previous one would raise the same error."""
    state = saved(folder, 1, 2)
    if not checksums:
        without_checksums(folder)
    state.checkpointer.custom_load_hooks["counter"] = lambda *_: Failing(error).load(*_[1:])
    with pytest.raises(type(error)) as caught:
        state.checkpointer.recover_if_possible()
    assert caught.value is error
    path = folder / "CKPT+2" / "counter.ckpt"
    note = notes_of(error)
    assert f"'counter' could not be recovered from {path}" in note
    assert "Recovered before it: 'model', 'optimizer'." in note
    assert ("may also have been truncated by a kill" in note) is not checksums


def test_a_file_without_a_checksum_that_cannot_be_read_is_skipped(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(folder, 1, 2)
    without_checksums(folder)
    path = folder / "CKPT+2" / "counter.ckpt"
    path.write_bytes(b"\xff\xfe\xfd")
    assert recovered(folder) == {1.0}
    assert f"{path} cannot be read" in caplog.text
    (folder / "CKPT+1" / "counter.ckpt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged\. To start"):
        recovered(folder)


def test_one_with_checksums_is_not_damaged_whatever_its_hook_says(folder: Path) -> None:
    state = saved(folder, 1)
    state.checkpointer.custom_load_hooks["counter"] = lambda *_: Failing(EOFError()).load(
        *_[1:]
    )
    with pytest.raises(EOFError):
        state.checkpointer.recover_if_possible()


def test_what_would_run_code_is_not_called_damaged(folder: Path) -> None:
    state = saved(folder)
    state.checkpointer.custom_save_hooks["optimizer"] = lambda _, path: torch.save(
        {"state": Path("x")}, path
    )
    state.checkpointer.save_checkpoint(name="1")
    with pytest.raises(UnsafeCheckpointError, match="would run code when loaded") as caught:
        recovered(folder)
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_those_that_were_not_asked_for_are_not_called_damaged(folder: Path) -> None:
    state = State(folder, size=8)
    state.checkpointer.save_checkpoint(name="whole")
    state.checkpointer.save_checkpoint({"WER": 1.0}, name="best")
    path = folder / "CKPT+best" / "model.ckpt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        CheckpointError, match=r"requested .* ckpt_predicate leaves out 1 other"
    ):
        state.checkpointer.recover_if_possible(min_key="WER")
    assert state.checkpointer.recover_if_possible() is not None
