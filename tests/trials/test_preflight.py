"""A preflight tries the longest batches, and does not change the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from speechbrain.dataio.dataset import DynamicItemDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from brain_lightning import Brain, PreflightError, UnsupportedError, to_lightning
from brain_lightning.trials import preflight
from brain_lightning.trials.memory import measured_usage
from tests.parity.sides import SPEECHBRAIN
from tests.support.brains import Regression, all_equal, loader, make, trainer_with, weights
from tests.trials import tried

# Number of frames that fit into memory: 80 seconds with 100 frames per second.
MEMORY = 8 * 1000


SEEN: list[tuple[str, int]] = []
UPDATES: list[bool] = []


class Recognizer(Brain):
    """Has memory for a limited number of padded frames, and records its batches."""

    # A global, because a trial restores attributes of the Brain and of its class.
    seen = property(lambda self: SEEN)
    updates = property(lambda self: UPDATES)

    def compute_forward(self, batch: Any, stage: Any) -> Tensor:
        frames = batch.sig.data
        self.seen.append((stage.name, frames.shape[1]))
        if frames.numel() > MEMORY:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.modules.model(frames.unsqueeze(-1).expand(-1, -1, 4)).mean(1)

    def compute_objectives(self, predictions: Tensor, batch: Any, stage: Any) -> Tensor:
        return predictions.square().mean()

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        self.updates.append(should_step)


def utterances(*seconds: float) -> DynamicItemDataset:
    rows = {f"utt{n}": {"duration": each} for n, each in enumerate(seconds)}
    data = DynamicItemDataset(rows, output_keys=["id", "sig"])
    data.add_dynamic_item(
        lambda each: torch.ones(round(each * 100)), takes="duration", provides="sig"
    )
    return data


SHORT = (2.5, 1, 5, 3)
LOADER = {"batch_size": 4, "shuffle": True}


def fit(train: Any, valid: Any, trainer: Any = None, **options: Any) -> Any:
    brain = make(Recognizer, preflight=True, **options)
    brain.seen.clear()
    brain.updates.clear()
    before = weights(brain)
    try:
        brain.fit(range(1, 3), train, valid, train_loader_kwargs=LOADER, trainer=trainer)
    except PreflightError as error:
        assert all_equal(before, weights(brain))
        return brain, str(error)
    assert not all_equal(before, weights(brain))
    return brain, ""


def test_a_batch_that_does_not_fit_raises_before_the_first_epoch() -> None:
    planted = utterances(*SHORT, 2, 40, 3, 1)
    brain, message = fit(planted, utterances(*SHORT))
    assert message.startswith(
        "preflight: out of memory with the longest batch in TRAIN, "
        "with ids ['utt5', 'utt2', 'utt3', 'utt6'], lengths [40.0, 5.0, 3.0, 3.0], "
        "sig.data (4, 4000), sig.lengths (4,) = [1.0, 0.125, 0.075, 0.075]: "
        "CUDA out of memory. Tried to allocate 2.00 GiB. Make batches smaller"
    )
    assert brain.seen == [("TRAIN", 4000)]
    assert not hasattr(brain, "events")
    clean, noisy = DataLoader(utterances(1)), DataLoader(utterances(40, 90))
    for each in (clean, noisy):
        each.collate_fn = brain.make_dataloader(
            utterances(1), brain.stage_type.VALID
        ).collate_fn
    brain, message = fit(utterances(*SHORT), {"clean": clean, "noisy": noisy})
    assert "the longest batch in VALID noisy, with ids ['utt1'], lengths [90.0]" in message
    assert brain.seen == [("TRAIN", 500)] * 2 + [("VALID", 100), ("VALID", 9000)]


def test_the_table_of_a_preflight(capsys: pytest.CaptureFixture[str]) -> None:
    train = utterances(*SHORT, *SHORT)
    # The first epoch does not validate, so Lightning would create this DataLoader later.
    seldom = {"check_val_every_n_epoch": 2}
    brain, message = fit(train, utterances(3, 7), seldom, grad_accumulation_factor=2)
    assert message == ""
    # One update, and one update of two batches, with the gradients of the first in memory.
    assert brain.seen[:4] == [("TRAIN", 500)] * 3 + [("VALID", 700)]
    assert brain.updates[:3] == [True, False, True]
    assert len(brain.seen) == 4 + 2 * 2 + 2
    head, train, valid, last = capsys.readouterr().out.splitlines()
    assert head == "preflight  chosen by  examples  longest  peak memory  seconds"
    assert train.split()[:4] == ["TRAIN", "duration", "4", "5"]
    assert valid.split()[:4] == ["VALID", "duration", "1", "7"]
    assert last == "The peak memory is the memory of the process."


def test_ranks_try_the_same_number_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch has collectives, and ranks may have different numbers of longest batches."""
    monkeypatch.setattr(preflight, "gather", lambda value: [value, 2])
    brain, _ = fit(utterances(*SHORT), None)
    assert brain.seen[:5] == [("TRAIN", 500)] * 5
    assert len(brain.seen) == 2 * 2 + 2


def test_an_error_names_its_batch() -> None:
    data = utterances(1, 9)
    data.add_dynamic_item(lambda each: 1 / (each < 9), takes="duration", provides="ratio")
    data.set_output_keys(["id", "sig", "ratio"])
    with pytest.raises(ZeroDivisionError) as raised:
        fit(data, None)
    notes = "".join(raised.value.__notes__)
    assert "brain_lightning: in the preflight, in TRAIN, with ids ['utt1', 'utt0']" in notes


class OwnFit(Regression):
    def fit(self, *args: Any, **kwargs: Any) -> None:
        self.on_fit_start()
        self._fit_train(loader(), 1, False)


def test_a_fit_that_selects_its_loaders_raises() -> None:
    with pytest.raises(
        UnsupportedError, match="not supported for OwnFit, because its overridden fit"
    ):
        make(OwnFit, preflight=True).fit(range(1), loader())


class Watched:
    """Records the state before and after a preflight."""

    def __init__(self, brain: Any, folder: Path, train: Any) -> None:
        self._preflight, self._arguments = preflight.preflight, (brain, folder, train)
        self.seen: list[Any] = []

    def __call__(self, *args: Any) -> Any:
        self.seen.append(tried.everything(*self._arguments))
        try:
            return self._preflight(*args)
        finally:
            self.seen.append(tried.everything(*self._arguments))


@pytest.mark.parametrize(
    "kind", [{}, tried.GAN, {"side": SPEECHBRAIN}], ids=["ours", "gan", "speechbrain"]
)
def test_it_has_no_side_effects(
    tmp_path: Path, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(name: str, asked: bool) -> list[Tensor]:
        folder = tmp_path / name
        brain, (train, valid) = tried.make(folder, **kind), tried.loaders()
        # SpeechBrain's Brain does not have this run option.
        brain.hparams.preflight = asked
        module = to_lightning(brain)
        if "side" not in kind:
            brain._lightning.preflight = asked
        watched = Watched(brain, folder, train)
        monkeypatch.setattr(preflight, "preflight", watched)
        trainer_with(max_epochs=2).fit(module, train, valid)
        monkeypatch.undo()
        assert watched.seen[::2] == watched.seen[1::2]
        assert len(watched.seen) == 2 * asked
        return weights(brain)

    assert all_equal(trained("asked", True), trained("not", False))


class Peak(Callback):
    """Measures the peak memory of an epoch."""

    peak = 0

    def on_train_epoch_start(self, *_: Any) -> None:
        self.measured = measured_usage("cpu")
        self.usage = self.measured.__enter__()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.measured.__exit__(None, None, None)
        self.peak = self.usage.peak


class Wide(Recognizer):
    def compute_forward(self, batch: Any, stage: Any) -> Tensor:
        frames = batch.sig.data.unsqueeze(-1).expand(-1, -1, 4)
        return self.modules.model(nn.functional.relu(frames.repeat(1, 1, 1000)[..., :4]))


def test_its_peak_equals_the_peak_of_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    original = preflight.preflight
    monkeypatch.setattr(
        preflight, "preflight", lambda *args: found.extend(original(*args)) or found
    )
    peak = Peak()
    brain = make(Wide, preflight=True)
    data = utterances(1, 2, 40, 3, 35)
    brain.fit(
        range(1),
        data,
        train_loader_kwargs={"batch_size": 2, "shuffle": True},
        trainer={"callbacks": [peak]},
    )
    (tried_one,) = found
    assert abs(tried_one.peak - peak.peak) < 0.1 * peak.peak
