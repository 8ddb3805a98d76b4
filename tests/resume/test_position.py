"""SpeechBrain's LoopedLoader: a pass over its loader continues over several epochs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import speechbrain
import torch
from lightning.pytorch.utilities import CombinedLoader
from speechbrain.dataio.dataloader import LoopedLoader
from speechbrain.utils import checkpoints, epoch_loop
from torch import nn
from torch.utils.data import DataLoader, Dataset

from brain_lightning import Brain, patch_speechbrain, to_lightning
from tests.support.brains import all_equal, sgd, trainer_with, weights
from tests.support.resuming import Cut

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)`"),
    # SpeechBrain's Checkpointer saves it.
    pytest.mark.filterwarnings("ignore:Trying to load checkpoint from"),
]


class Noisy(Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return torch.full((4,), float(index)), torch.rand(2)


class Hooks:
    """Records its batches, and interrupts the run at a given batch."""

    modules: Any
    hparams: Any
    step: int
    cut: tuple[int, int] | None = None

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        x, y = batch if isinstance(batch[0], torch.Tensor) else batch[0]
        self.hparams.seen.append(x[:, 0].tolist())
        return self.modules.model(x / 10 + torch.rand_like(x)), y

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        return nn.functional.mse_loss(*predictions)

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        if (self.hparams.epoch_counter.current, self.step) == self.cut:
            raise Cut


class Ours(Hooks, Brain):
    """Brain of brain_lightning."""


class Patched(Hooks, speechbrain.Brain):
    """Brain of SpeechBrain."""


def fit(cls: Any, folder: Path, seed: int, cut: Any = None, together: bool = False) -> Any:
    torch.manual_seed(0)
    counter, model = epoch_loop.EpochCounter(4), nn.Linear(4, 2)
    workers = int(cls is Patched and not together)
    torch.manual_seed(seed)
    looped = LoopedLoader(DataLoader(Noisy(), 2, shuffle=True, num_workers=workers), 3)
    saver = checkpoints.Checkpointer(
        folder, {"counter": counter, "model": model, "looped": looped}
    )
    hparams = {"epoch_counter": counter, "seen": []}
    options = {"device": "cpu", "noprogressbar": True, "ckpt_interval_steps": 1}
    brain = cls({"model": model}, sgd, hparams, options, saver)
    brain.cut = cut
    data = [looped, DataLoader(Noisy(), 4, shuffle=True)] if together else looped
    with patch_speechbrain(), nullcontext() if cut is None else pytest.raises(Cut):
        trainer_with(max_epochs=-1).fit(to_lightning(brain), CombinedLoader(data, "min_size"))
    # Ends the workers of the loader.
    looped.iterator = None
    return brain, looped


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
@pytest.mark.parametrize("cls", [Ours, Patched])
def test_a_looped_loader_resumes_where_it_was(
    tmp_path: Path, cls: Any, together: bool
) -> None:
    whole, all_of_it = fit(cls, tmp_path / "whole", 1, together=together)
    assert len(whole.hparams.seen) == 4 * 3
    if not together:
        # The batches of SpeechBrain's own loop: all of the data, repeatedly.
        first = sorted(x for batch in whole.hparams.seen[:5] for x in batch)
        assert first == list(range(10))
    # At the end of the first pass, and between two epochs.
    for cut in ((2, 3), (4, 1)):
        folder = tmp_path / str(cut)
        fit(cls, folder, 1, cut, together)
        resumed, looped = fit(cls, folder, 77, together=together)
        seen = resumed.hparams.seen
        assert len(seen) == (4 - cut[0]) * 3 + 3 - cut[1] + 1
        assert seen == whole.hparams.seen[-len(seen) :], cut
        assert all_equal(weights(whole), weights(resumed))
        assert looped.total_steps == all_of_it.total_steps
        assert looped.total_samples == all_of_it.total_samples
