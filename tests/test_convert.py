"""``brain-lightning convert``: the same weights, optimizer state and meta on every side."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from speechbrain.inference.interfaces import Pretrained
from speechbrain.utils.checkpoints import Checkpointer as SpeechBrainCheckpointer
from torch import nn

from brain_lightning import Checkpointer, EpochCounter, to_lightning
from brain_lightning.cli import main

from .brains import Regression, loader, make, same_state, trainer_with

YAML = """\
# A recipe's file.
seed: 3
__set_seed: !apply:torch.manual_seed [!ref <seed>]
output_folder: results
train_logger: !new:no.such.Logger
    save_file: !ref <output_folder>/log.txt
features: 4
hidden: !ref <features> * 2
encoder: !new:torch.nn.Linear
    in_features: !ref <features>
    out_features: !ref <hidden>
head: !new:torch.nn.Linear
    in_features: !ref <hidden>
    out_features: 2
modules:
    encoder: !ref <encoder>
    head: !ref <head>
model: !new:torch.nn.ModuleList
    - [!ref <encoder>, !ref <head>]
checkpointer: !new:speechbrain.utils.checkpoints.Checkpointer
    checkpoints_dir: !ref <output_folder>/save
    recoverables:
        net: !ref <model>
        counter: !ref <counter>
counter: !new:no.such.Counter
"""


def trained(folder: Path) -> dict[str, Any]:
    """Recoverables of a run, saved."""
    counter = EpochCounter(2)
    checkpointer = Checkpointer(folder, {"counter": counter})
    brain = make(opt_class=lambda p: torch.optim.Adam(p, 0.01), checkpointer=checkpointer)
    checkpointer.add_recoverable("model", brain.modules.model)
    brain.fit(counter, loader())
    checkpointer.save_checkpoint({"WER": 4.5, "epoch": 2}, name="run")
    return checkpointer.recoverables


def files(directory: Path) -> dict[str, Any]:
    return {path.name: path.stat().st_size for path in directory.iterdir()}


def test_there_and_back_everything_is_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, back = tmp_path / "save" / "CKPT+run", tmp_path / "back" / "CKPT+back"
    objects = trained(tmp_path / "save")
    assert main(["convert", str(source), str(tmp_path / "x.ckpt")]) == 0
    assert main(["convert", str(tmp_path / "x.ckpt"), str(back)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "x.ckpt"), str(back)]
    assert files(source).keys() == files(back).keys()
    for name in files(source):
        if name not in ("CKPT.yaml", "checksums.yaml", "counter.ckpt", "brain.ckpt"):
            one, other = (torch.load(d / name, weights_only=True) for d in (source, back))
            assert str(one) == str(other), name
    original = Checkpointer(source.parent).find_checkpoint()
    assert original is not None
    for cls in (Checkpointer, SpeechBrainCheckpointer):
        counter = EpochCounter(2)
        checkpointer = cls(back.parent, {"counter": counter})
        adam = partial(torch.optim.Adam, lr=0.01)
        new = make(opt_class=adam, checkpointer=checkpointer)
        checkpointer.add_recoverable("model", new.modules.model)
        new.on_fit_start()
        assert checkpointer.find_checkpoint(min_key="WER").meta == original.meta
        assert same_state(new.modules.model, objects["model"])
        assert str(new.optimizer.state_dict()) == str(objects["optimizer"].state_dict())
        assert (counter.current, new.optimizer_step) == (2, 10)


def test_a_converted_file_is_loaded_by_lightning(tmp_path: Path) -> None:
    objects = trained(tmp_path / "save")
    # The folder: its newest checkpoint.
    assert main(["convert", str(tmp_path / "save"), str(tmp_path / "x.ckpt")]) == 0
    brain = make()
    type(to_lightning(brain)).load_from_checkpoint(tmp_path / "x.ckpt", brain=brain)
    assert same_state(brain.modules.model, objects["model"])
    other = make()
    trainer_with().test(
        to_lightning(other), loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False
    )
    assert same_state(other.modules.model, objects["model"])


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_file_that_lightning_saved_becomes_a_checkpoint(tmp_path: Path) -> None:
    brain = make(Regression)
    saver = ModelCheckpoint(tmp_path / "lightning", filename="x")
    trainer = trainer_with(saver, enable_checkpointing=True)
    trainer.fit(to_lightning(brain), loader(), loader())
    target = tmp_path / "save" / "CKPT+x"
    assert main(["convert", str(tmp_path / "lightning" / "x.ckpt"), str(target)]) == 0
    new = make()
    new.init_optimizers()
    objects = {"model": new.modules.model, "optimizer": new.optimizer}
    for checkpointer in (Checkpointer, SpeechBrainCheckpointer):
        new.modules.model.weight.data.zero_()
        assert checkpointer(target.parent, objects).recover_if_possible().meta["epoch"] == 2
        assert same_state(new.modules.model, brain.modules.model)


class Net(Pretrained):
    MODULES_NEEDED = ("encoder", "head")

    def forward(self, x: Any) -> Any:
        return self.mods.head(self.mods.encoder(x))


@pytest.mark.filterwarnings("ignore")  # SpeechBrain's own
def test_from_hparams_loads_the_folder_for_inference(tmp_path: Path) -> None:
    net = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 2)])
    counter = EpochCounter(1)
    folder = tmp_path / "results" / "save"
    Checkpointer(folder, {"net": net, "counter": counter}).save_checkpoint()
    (tmp_path / "results" / "hyperparams.yaml").write_text(YAML)
    assert main(["convert", str(folder), str(tmp_path / "inference")]) == 0
    assert files(tmp_path / "inference").keys() == {"net.ckpt", "hyperparams.yaml"}
    text = (tmp_path / "inference" / "hyperparams.yaml").read_text()
    assert "no.such" not in text
    loaded = Net.from_hparams(str(tmp_path / "inference"), savedir=str(tmp_path / "cache"))
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), net[1](net[0](x)))


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("nowhere", "x.ckpt", "nowhere is no checkpoint, and holds none"),
        ("save", "taken", "taken is there already"),
        ("save", "folder", "hyperparams.yaml is not there: give the recipe's file"),
        ("file.ckpt", "folder", "give a target such as"),
    ],
)
def test_mistakes_are_told(
    tmp_path: Path, source: str, target: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "save")
    (tmp_path / "taken").mkdir()
    torch.save({}, tmp_path / "file.ckpt")
    assert main(["convert", str(tmp_path / source), str(tmp_path / target)]) == 2
    assert words in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "save")
    (tmp_path / "save" / "CKPT+run" / "counter.ckpt").write_text("9")
    assert main(["convert", str(tmp_path / "save"), str(tmp_path / "x.ckpt")]) == 2
    assert "counter.ckpt was changed" in capsys.readouterr().err
    assert not (tmp_path / "x.ckpt").exists()
