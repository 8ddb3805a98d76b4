"""Writes the checkpoint that is kept here, by real SpeechBrain.

``python -m tests.support.golden.make`` (from the project's root).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from tests.support.environment import (
    seed_everything,
)  # First: it makes SpeechBrain importable.

FOLDER = Path(__file__).parent


def main() -> None:
    import speechbrain
    from speechbrain.utils.checkpoints import Checkpointer
    from speechbrain.utils.epoch_loop import EpochCounter

    class Regression(speechbrain.Brain):
        def compute_forward(self, batch, stage):
            return self.modules.model(batch[0])

        def compute_objectives(self, predictions, batch, stage):
            return torch.nn.functional.mse_loss(predictions, batch[1])

    seed_everything(3)
    shutil.rmtree(FOLDER / "save", ignore_errors=True)
    model, counter = torch.nn.Linear(4, 2), EpochCounter(3)
    checkpointer = Checkpointer(FOLDER / "save", {"model": model, "counter": counter})
    brain = Regression(
        {"model": model},
        lambda p: torch.optim.Adam(p, 0.01),
        {},
        {"device": "cpu"},
        checkpointer,
    )
    data = torch.utils.data.TensorDataset(torch.randn(12, 4), torch.randn(12, 2))
    brain.fit(counter, data, progressbar=False, train_loader_kwargs={"batch_size": 4})
    checkpointer.save_checkpoint({"WER": 12.5, "epoch": 3}, name="golden")
    first, *_ = brain.optimizer.state_dict()["state"].values()
    expected = {
        "weight": model.weight.tolist(),
        "bias": model.bias.tolist(),
        "exp_avg": first["exp_avg"].tolist(),
        "epoch": counter.current,
        "optimizer_step": brain.optimizer_step,
        "WER": 12.5,
    }
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
