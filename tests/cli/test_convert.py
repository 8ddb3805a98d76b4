"""``brain-lightning convert``: the same weights, optimizer state and meta on every side."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml, resolve_references
from lightning.pytorch.callbacks import ModelCheckpoint
from speechbrain.inference.interfaces import Pretrained
from speechbrain.utils.checkpoints import Checkpointer as SpeechBrainCheckpointer
from torch import nn
from torch.utils.data import DataLoader

from brain_lightning import Brain, Checkpointer, EpochCounter, to_lightning
from brain_lightning.cli.convert import convert
from brain_lightning.cli.main import main
from tests.support.brains import Regression, loader, make, same_state, trainer_with

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


TONES = """\
features: 8
data_folder: !PLACEHOLDER
compute_features: !new:speechbrain.lobes.features.Fbank
    sample_rate: 8000
    n_mels: !ref <features>
normalize: !new:speechbrain.processing.features.InputNormalization
    norm_type: global
beside: !new:speechbrain.processing.features.InputNormalization
    norm_type: global
model: !new:speechbrain.nnet.containers.Sequential
    input_shape: [null, null, !ref <features>]
    linear: !name:speechbrain.nnet.linear.Linear
        n_neurons: 3
modules:
    compute_features: !ref <compute_features>
    normalize: !ref <normalize>
    model: !ref <model>
epoch_counter: !new:brain_lightning.EpochCounter
    limit: 2
scheduler: !new:speechbrain.nnet.schedulers.NewBobScheduler
    initial_value: 0.1
csv: !ref <data_folder>/train.csv
checkpointer: !new:brain_lightning.Checkpointer
    checkpoints_dir: SAVE
    recoverables:
        model: !ref <model>
        normalizer: !ref <normalize>
        beside: !ref <beside>
        scheduler: !ref <scheduler>
        counter: !ref <epoch_counter>
"""


class Tones(Brain):
    def compute_forward(self, batch: Any, stage: Any) -> Any:
        features = self.modules.compute_features(batch)
        lengths = torch.ones(len(batch))
        self.hparams.beside(features, lengths)
        return self.modules.model(self.modules.normalize(features, lengths))

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        return predictions.square().mean()

    def on_stage_end(self, stage: Any, stage_loss: Any, epoch: Any = None) -> None:
        self.checkpointer.save_checkpoint({"error": [0.5, 0.25, 0.75][epoch]}, name=f"{epoch}")


class Features(Pretrained):
    MODULES_NEEDED = ("compute_features", "normalize", "model")

    def forward(self, x: Any) -> Any:
        features = self.mods.compute_features(x)
        return self.mods.model(self.mods.normalize(features, torch.ones(len(x))))


def tones(folder: Path, resolved: bool) -> Tones:
    """A Brain that has trained, beside its hyperparameters, as written or as saved."""
    text = TONES.replace("SAVE", str(folder / "save"))
    hparams = load_hyperpyyaml(text, {"data_folder": "data"})
    brain = Tones(
        hparams["modules"], partial(torch.optim.SGD, lr=0.1), hparams,
        {"device": "cpu", "noprogressbar": True}, hparams["checkpointer"],
    )  # fmt: skip
    brain.fit(hparams["epoch_counter"], DataLoader(torch.randn(6, 4000), batch_size=2))
    if resolved:
        # What create_experiment_directory saves: every reference is an alias.
        text = resolve_references(text, {"data_folder": "data"}).read()
        assert "&id001" in text
    (folder / "hyperparams.yaml").write_text(text)
    return brain


@pytest.mark.filterwarnings("ignore")  # SpeechBrain's own
@pytest.mark.parametrize("resolved", [False, True])
def test_inference_gives_what_the_brain_gives(
    tmp_path: Path, resolved: bool, caplog: pytest.LogCaptureFixture
) -> None:
    brain = tones(tmp_path, resolved)
    folder = tmp_path / "inference"
    assert main(["convert", str(tmp_path / "save"), str(folder)]) == 0
    assert files(folder).keys() == {
        "beside.ckpt", "hyperparams.yaml", "model.ckpt", "normalizer.ckpt"
    }  # fmt: skip
    text = (folder / "hyperparams.yaml").read_text()
    for gone in ("checkpointer:", "scheduler:", "epoch_counter:", "csv:", "PLACEHOLDER"):
        assert gone not in text
    # Entries keep their names: what a Pretrained needs in its hparams is found there.
    assert re.findall(r"^\w+", text, re.M)[-6:] == [
        "compute_features", "normalize", "beside", "model", "modules", "pretrainer"
    ]  # fmt: skip
    assert caplog.messages[-1] == (
        "For inference: beside, model, normalizer. Left out: brain, brain_lightning, counter, "
        "optimizer, scheduler."
    )
    loaded = Features.from_hparams(str(folder), savedir=str(tmp_path / "cache"))
    brain.modules.eval()
    x = torch.randn(2, 4000)
    assert brain.modules.normalize.count > 0
    assert torch.equal(loaded.hparams.beside.glob_mean, brain.hparams.beside.glob_mean)
    assert torch.equal(loaded(x), brain.compute_forward(x, None))


@pytest.mark.parametrize(
    ("words", "name", "why"),
    [
        ([], "run2", "the newest of 3: WER 7.5, end-of-epoch True"),
        (["--min_key=WER"], "run1", "the lowest 'WER' of 3: WER 4.25, end-of-epoch True"),
        (["--max_key=WER"], "run0", "the highest 'WER' of 3: WER 9, end-of-epoch True"),
    ],
)
def test_a_key_chooses_the_checkpoint_and_it_is_told(
    tmp_path: Path, words: list[str], name: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    weights = nn.Linear(1, 1)
    checkpointer = Checkpointer(tmp_path / "save", {"model": weights})
    for number, error in enumerate([9, 4.25, 7.5]):
        weights.bias.data.fill_(error)
        checkpointer.save_checkpoint({"WER": error}, name=f"run{number}")
    target = tmp_path / "x.ckpt"
    caplog.clear()
    assert main(["convert", str(tmp_path / "save"), str(target), *words]) == 0
    assert caplog.messages == [f"{tmp_path / 'save' / f'CKPT+{name}'}, {why}"]
    bias = torch.load(target, weights_only=True)["state_dict"]["brain_modules.model.bias"]
    assert bias.item() == {"run0": 9, "run1": 4.25, "run2": 7.5}[name]
    caplog.clear()
    alone, back = tmp_path / "save" / "CKPT+run1", tmp_path / "CKPT+back"
    assert main(["convert", str(alone), str(tmp_path / "one.ckpt")]) == 0
    assert main(["convert", str(tmp_path / "one.ckpt"), str(back)]) == 0
    meta = "WER 4.25, end-of-epoch True"
    assert caplog.messages == [f"{alone}: {meta}", f"{tmp_path / 'one.ckpt'}: {meta}"]


@pytest.mark.parametrize(
    ("source", "key", "words"),
    [
        ("save", "--min_key=CER", "has the key 'CER'. Available keys: WER, end-of-epoch"),
        ("save", "--max_key=", "has the key ''"),
        ("save/CKPT+run", "--min_key=WER", "is a single checkpoint, and key 'WER' selects"),
        ("x.ckpt", "--max_key=WER", "is a single checkpoint, and key 'WER' selects"),
    ],
)
def test_a_key_that_chooses_nothing_is_refused(
    tmp_path: Path, source: str, key: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Linear(1, 1)
    saver = Checkpointer(tmp_path / "save", {"model": model})
    saver.save_checkpoint({"WER": 1.5}, name="run")
    torch.save({}, tmp_path / "x.ckpt")
    assert main(["convert", str(tmp_path / source), str(tmp_path / "CKPT+new"), key]) == 2
    assert words in capsys.readouterr().err


def test_two_keys_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(tmp_path), str(tmp_path / "x"), "--min_key=a", "--max_key=b"]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "--max_key: not allowed with argument --min_key" in capsys.readouterr().err
    with pytest.raises(ValueError, match="exclude each other"):
        convert(str(tmp_path), str(tmp_path / "x"), min_key="a", max_key="b")


MODULES = "modules: {model: !ref <model>}\n"
LINEAR = "model: !new:torch.nn.Linear {in_features: 1, out_features: 1}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "cannot be read"),
        ("model: 3\n", "has no `modules`, which from_hparams needs"),
        ("modules: {model: *nowhere}\n", "cannot be read: found undefined alias 'nowhere'"),
        ("modules: {}\n", "does not define 'model'"),
        (MODULES + "model: !new:torch.nn.Linear [!ref <size>, 1]\n", '"size" is not valid'),
        (MODULES + "model: !new:torch.nn.Linear [!PLACEHOLDER , 1]\n", "is a !PLACEHOLDER"),
        (MODULES + "model: !include:model.yaml\n", "No such file or directory"),
        (MODULES + "model: !ref <other>\nother: !ref <model>\n", "cannot be resolved"),
    ],
)
def test_hyperparameters_that_could_not_be_loaded_are_refused(
    tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Checkpointer(tmp_path / "save", {"model": nn.Linear(1, 1)}).save_checkpoint()
    (tmp_path / "hyperparams.yaml").write_text(text)
    before = sorted(tmp_path.iterdir())
    assert main(["convert", str(tmp_path / "save"), str(tmp_path / "inference")]) == 2
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_what_only_the_recipes_pretrainer_loads_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Checkpointer(tmp_path / "save", {"model": nn.Linear(1, 1)}).save_checkpoint()
    own = "pretrainer: !new:no.such.Pretrainer\n    loadables: {model: 1, lm: 2}\n"
    (tmp_path / "hyperparams.yaml").write_text(own + LINEAR + MODULES)
    assert main(["convert", str(tmp_path / "save"), str(tmp_path / "inference")]) == 0
    assert "The recipe's pretrainer also loads lm, which is not in" in caplog.text
    assert "no.such" not in (tmp_path / "inference" / "hyperparams.yaml").read_text()


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("nowhere", "x.ckpt", "nowhere is not a checkpoint, and contains none"),
        ("save", "taken", "taken exists already"),
        ("save", "folder", "hyperparams.yaml was not found. Set --hparams=FILE"),
        ("file.ckpt", "folder", "Give a name that begins with CKPT+"),
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
