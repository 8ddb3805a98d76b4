"""``brain-lightning tune``: what it finds, how it tells, and that it leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from brain_lightning.cli.main import main
from brain_lightning.loggers.rate_curve import write_rate_curve
from brain_lightning.trials import batch_size, learning_rate
from brain_lightning.trials.learning_rate import suggestion
from tests.support.scripts import QUIET, TOY, result, script

# SpeechBrain's own.
pytestmark = pytest.mark.filterwarnings("ignore")

HPARAMS = """
output_folder: results/tuned
small: 4
train_dataloader_opts:
    batch_size: !ref <small>
valid_dataloader_opts:
    batch_size: 4
G_lr: 0.02
g_class: !name:torch.optim.SGD
    lr: !ref <G_lr>
d_class: !name:torch.optim.SGD
    lr: 0.03
"""
RECIPE = """
import os
import sys
import torch
from hyperpyyaml import load_hyperpyyaml
import brain_lightning as bl


class Recipe(bl.Brain):
    def init_optimizers(self):
        self.g = self.hparams.g_class(self.modules.model.parameters())
        self.d = self.hparams.d_class(self.modules.model.parameters())
        self.optimizers_dict = {"g": self.g, "d": self.d}

    def compute_forward(self, batch, stage):
        return self.modules.model(batch)

    def compute_objectives(self, predictions, batch, stage):
        if len(batch) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return (predictions - 1).square().mean()

    def on_stage_end(self, stage, stage_loss, epoch=None):
        raise RuntimeError("trained")


class OwnLoop(Recipe):
    def fit(self, epoch_counter, train_set, **loader_kwargs):
        self.on_fit_start()
        loader = self.make_dataloader(train_set, bl.Stage.TRAIN, **loader_kwargs)
        for epoch in epoch_counter:
            self._fit_train(loader, epoch, False)


class OwnBatches(Recipe):
    def _fit_train(self, train_set, epoch, enable):
        for batch in train_set:
            self.fit_batch(batch)


if __name__ == "__main__":
    hparams_file, run_opts, overrides = bl.parse_arguments(sys.argv[1:])
    with open(hparams_file) as file:
        hparams = load_hyperpyyaml(file, overrides)
    os.makedirs(hparams["output_folder"])
    open(os.path.join(hparams["output_folder"], "prepared.txt"), "w").close()
    brain = KIND({"model": torch.nn.Linear(3, 1)}, None, hparams, run_opts)
    kwargs = {} if KIND is OwnLoop else {"progressbar": False}
    opts = hparams["train_dataloader_opts"]
    opts = opts if KIND is OwnLoop else {"train_loader_kwargs": opts}
    brain.fit(range(2), torch.rand(40, 3), **opts, **kwargs)
    print("went on")
"""


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search is tested elsewhere."""
    few = learning_rate.Search(1e-4, 10.0, 30)
    monkeypatch.setattr(learning_rate, "Search", lambda: few)
    one = batch_size.Search(steps_per_trial=1)
    monkeypatch.setattr(batch_size, "Search", lambda: one)


def recipe(folder: Path, kind: str = "Recipe") -> list[str]:
    (folder / "hparams.yaml").write_text(HPARAMS)
    text = RECIPE.replace("KIND", kind)
    return [script(folder, text), str(folder / "hparams.yaml")]


def tune(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[str], str]:
    """The lines that it prints, and the last one of the errors."""
    status = main(["tune", *words, *QUIET])
    out, err = capsys.readouterr()
    assert (status == 0) == ("brain-lightning: error: " not in err)
    return out.splitlines(), (err.splitlines() or [""])[-1]


def test_a_rate_is_suggested_that_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of SpeechBrain's Brain: the override, the picture, and no other file."""
    picture = tmp_path / "made" / "lr.png"
    lines, _ = tune(capsys, *TOY, f"--output={picture}", "--lr=0.0001")
    told, _, override = lines[-3:]
    assert told.endswith(" (current: 0.0001)")
    name, _, value = override.partition("=")
    assert (name, told.split()[2]) == ("--lr", value)
    with Image.open(picture) as image:
        assert min(image.size) > 300
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "cwd", picture.parent, picture]
    losses = []
    for word in ("--lr=0.0001", override):
        main(["run", *TOY, *QUIET, f"--output_folder={tmp_path}", word])
        losses.append(result(tmp_path)["loss"])
    assert losses[1] < losses[0] - 0.1


def test_what_each_optimizer_has_is_overridden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a key that is referred to, and by one within a section; the recipe ends there."""
    words = [*recipe(tmp_path), "lr", f"--output={tmp_path / 'lr.png'}"]
    lines, _ = tune(capsys, *words)
    assert "(current: 0.02, 0.03)" in lines[-3]
    value = lines[-3].split()[2]
    assert lines[-1] == f"--G_lr={value} --d_class.lr={value}"
    assert "went on" not in lines
    # They are overrides.
    assert "(current: 0.5)" in tune(capsys, *words, "--G_lr=0.5", "--d_class.lr=0.5")[0][-3]


@pytest.mark.parametrize("kind", ["Recipe", "OwnLoop"])
def test_the_largest_batch_for_which_there_is_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Of the training set, whose key it is, also where the recipe's own ``fit`` brings it."""
    lines, _ = tune(capsys, *recipe(tmp_path, kind), "batch")
    assert lines[-2:] == ["suggested batch_size: 8 (current: 4)", "--small=8"]
    assert not (tmp_path / "results").exists()
    folder = tmp_path / "given"
    tune(capsys, *recipe(tmp_path, kind), "batch", f"--output_folder={folder}")
    assert [path.name for path in folder.iterdir()] == ["prepared.txt"]


def test_a_value_that_no_key_has_is_told_alone(capsys: pytest.CaptureFixture[str]) -> None:
    lines, _ = tune(capsys, *TOY, "batch")
    # All there is.
    assert lines[-3:] == [
        "suggested batch_size: 24 (current: 4)",
        "no key of the hyperparameters file sets it. The value:",
        "24",
    ]


@pytest.mark.parametrize(
    ("kind", "words", "says"),
    [
        ("OwnBatches", ["batch"], "OwnBatches._fit_train is a custom loop"),
        ("Recipe", ["batch", "--test_only"], "nothing was searched: "),
        ("Recipe", ["sizes"], "tune cannot search for 'sizes'. Use lr or batch."),
        ("Recipe", ["--output=lr.jpg"], "--output=lr.jpg is not a PNG file"),
    ],
)
def test_what_cannot_be_searched_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, words: list[str], says: str
) -> None:
    assert says in tune(capsys, *recipe(tmp_path, kind), *words)[1]


def test_processes_of_torchrun_are_given_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    assert "Set --output_folder=" in tune(capsys, *recipe(tmp_path), "batch")[1]


def test_the_suggestion_is_where_the_loss_falls_fastest_by_factors(tmp_path: Path) -> None:
    rates = [10.0 ** (step / 10 - 6) for step in range(60)]
    # Of noise the difference of small rates makes much.
    noise = [1 + 1e-3 * (-1) ** step for step in range(60)]
    losses = [*noise[:40], *(1 - 0.04 * step for step in range(20))]
    assert suggestion(rates, losses) in rates[40:]
    by_difference = torch.gradient(torch.tensor(losses), spacing=[torch.tensor(rates)])[0]
    assert by_difference[11:-1].argmin() < 20
    for none in (noise, sorted(losses), losses[:5], [float("nan")] * 60):
        assert suggestion(rates[: len(none)], none) is None
    write_rate_curve(tmp_path / "lr.png", rates[:2], none[:2], None)
