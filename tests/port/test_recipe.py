"""A recipe is its script, the files its Brains come from, and its YAML files."""

from __future__ import annotations

from pathlib import Path

import pytest

from brain_lightning.errors import RecipeError
from brain_lightning.port.recipe import port_recipe

SCRIPT = """\
import sys
import speechbrain as sb
from base import Base
from tools.metrics import rate
from prepare import prepare
class Toy(Base):
    def compute_forward(self, batch, stage):
        return stage == sb.Stage.TRAIN
run_opts = sb.parse_arguments(sys.argv[1:])
"""
BASE = "import speechbrain as sb\nfrom .inner import x\nclass Base(sb.Brain): pass\n"
INNER = "import speechbrain as sb\ndef x(stage): return stage is sb.Stage.TRAIN\n"
YAML = "included: !include:more/model.yaml\nclip: 0.1\nevery: 2\n"
COUNTER = "counter: !new:speechbrain.utils.epoch_loop.EpochCounter {limit: 1}\n"
# SpeechBrain's fit_batch, with a clipping and an accumulation of its own.
STEP = """\
import torch
import speechbrain as sb
class Toy(sb.Brain):
    def compute_forward(self, batch, stage):
        return batch
    def fit_batch(self, batch):
        '''Fits.'''
        out = self.compute_forward(batch, sb.Stage.TRAIN)
        loss = self.compute_objectives(out, batch, sb.Stage.TRAIN)
        (loss / self.hparams.every).backward()
        if self.step % self.hparams.every == 0:
            torch.nn.utils.clip_grad_norm_(self.modules.parameters(), self.hparams.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach().cpu()
def data(hparams):
    hparams["loader"] = {"batch_size": 2}
if __name__ == "__main__":
    file, run_opts, overrides = sb.parse_arguments([])
    with open(file) as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    brain = Toy({}, lambda p: torch.optim.SGD(p, 0.1), hparams, run_opts=run_opts)
"""
BOTH = "grad_accumulation_factor: !ref <every>\ntrainer:\n    gradient_clip_val: !ref <clip>\n"
CLIP = "torch.nn.utils.clip_grad_norm_(self.modules.parameters(), self.hparams.clip)"


def written(folder: Path, **texts: str) -> Path:
    files = {"train.py": SCRIPT, "hparams.yaml": YAML, "more/model.yaml": COUNTER}
    files |= {name.replace("_in_", "/") + ".py": text for name, text in texts.items()}
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder / "train.py"


def test_files_that_its_brains_come_from_are_ported_too(tmp_path: Path) -> None:
    script = written(
        tmp_path, base_in___init__=BASE, base_in_inner=INNER, tools_in_metrics="rate = 1\n",
        prepare="import speechbrain\nBrain = 'no Stage'\n", unrelated=BASE,
    )  # fmt: skip
    recipe = port_recipe(script, [tmp_path / "hparams.yaml"])
    assert (recipe.outcome, recipe.remarks) == ("completely", [])
    assert recipe.brains == ["Base"]
    found = {str(each.path.relative_to(tmp_path)): each for each in recipe.changes}
    changed = {name for name, each in found.items() if each.before != each.after}
    assert changed == {"train.py", "base/__init__.py", "base/inner.py", "more/model.yaml"}
    # What the script needs beside it.
    assert found.keys() - changed == {"tools/metrics.py", "prepare.py", "hparams.yaml"}
    assert "class Base(Brain)" in found["base/__init__.py"].after
    assert "stage == Stage.TRAIN" in found["train.py"].after
    # Stage equals ours, and is another one.
    assert found["base/inner.py"].after == (
        "from brain_lightning import Stage\ndef x(stage): return stage is Stage.TRAIN\n"
    )


def test_what_has_no_brain_stays_whole(tmp_path: Path) -> None:
    script = written(tmp_path)
    recipe = port_recipe(script, [tmp_path / "hparams.yaml"])
    assert recipe.outcome == "not at all"
    assert all(each.before == each.after for each in recipe.changes)
    assert str(recipe.remarks[0]).startswith(
        f"{script}:6: Toy seems to be a Brain by its methods"
    )
    script.write_text("import speechbrain as sb\nsb.parse_arguments([])\n")
    assert str(port_recipe(script).remarks[0]).endswith(
        ":1: There is no subclass of Brain, so there is nothing to port."
    )


@pytest.mark.parametrize(
    ("old", "new", "section"),
    [
        ("", "", BOTH),
        # A Brain without hyperparameters could not read it.
        ("self.hparams.", "", None),
        ("self.hparams.clip)", "0.5)", "grad_accumulation_factor: !ref <every>\ntrainer:\n"
                                       "    gradient_clip_val: 0.5\n"),
        # Without it max_grad_norm would clip.
        (CLIP, "pass", None),
        (f"            {CLIP}\n", "", "grad_accumulation_factor: !ref <every>\ntrainer:\n"
                                      "    gradient_clip_val: 0\n"),
        # Not SpeechBrain's step.
        ("loss.detach()", "2 * loss.detach()", None),
        ("sb.Stage.TRAIN)\n        loss", "sb.Stage.VALID)\n        loss", None),
        ("self.modules.parameters()", "self.modules.a.parameters()", None),
        ("            self.optimizer.zero_grad", "        self.optimizer.zero_grad", None),
        ("(sb.Brain)", "(Mixin, sb.Brain)", None),
        ("class Toy", "class More(Toy):\n    pass\nclass Toy", None),
        ("def compute_forward", "def on_fit_batch_end", None),
        ("self.hparams.every", "self.hparams.missing", None),
        ("self.hparams.clip", "self.hparams.included", None),
        # An optimizer of all of its modules' parameters.
        ("lambda p: torch.optim.SGD(p, 0.1)", "hparams['opt']", BOTH),
        ("lambda p: torch.optim.SGD(p, 0.1)", "torch.optim.Adam", BOTH),
        ("SGD(p,", "SGD(model.parameters(),", None),
        ("SGD(p,", "SGD([x for x in p if x.ndim],", None),
        ("lambda p: torch.optim.SGD(p, 0.1)", "choose(hparams)", None),
        ("def fit", "def on_fit_start(self): self.optimizer, a = 1, 2\n    def fit",
         None),
        # The hyperparameters and run options that were loaded, all of them.
        ("hparams, run_opts=", "{**hparams}, run_opts=", None),
        ("run_opts=run_opts", "run_opts={'max_grad_norm': 1}", None),
        ("hparams, run_opts=run_opts", "hparams, **run_opts", None),
        ('hparams["loader"]', 'hparams["clip"]', None),
        ("    brain =", "    hparams.update(clip=1)\n    brain =", None),
        ("    brain =", "    run_opts = {}\n    brain =", None),
        ("    brain =", "    make(Toy)\n    brain =", None),
        ('if __name__ == "__main__":', "def main(hparams):", None),
        ("    brain = Toy", "    brain = Other", None),
        ("def compute_forward", "def __init__", None),
    ],
)  # fmt: skip
def test_a_step_by_hand_that_is_speechbrains_own_becomes_arguments(
    tmp_path: Path, old: str, new: str, section: str | None
) -> None:
    script = written(tmp_path)
    script.write_text(STEP.replace(old, new) if old else STEP)
    recipe = port_recipe(script, [tmp_path / "hparams.yaml"])
    python, yaml, _ = (change.after for change in recipe.changes)
    if section is None:
        assert (recipe.outcome, yaml) == ("partly", YAML)
        assert "def fit_batch" in python
    else:
        assert (recipe.outcome, yaml) == ("completely", f"{YAML}\n{section}")
        assert "def fit_batch" not in python
    # Without the YAML file it is not known.
    assert "def fit_batch" in port_recipe(script).changes[0].after


@pytest.mark.parametrize("more", ["max_grad_norm: 5.0", "precision: bf16", "trainer: {}"])
def test_a_step_by_hand_stays_where_run_options_would_change_it(
    tmp_path: Path, more: str
) -> None:
    script = written(tmp_path)
    script.write_text(STEP)
    (tmp_path / "hparams.yaml").write_text(f"{YAML}{more}\n")
    assert port_recipe(script, [tmp_path / "hparams.yaml"]).outcome == "partly"


def test_brains_that_yaml_alone_names_are_named(tmp_path: Path) -> None:
    script = written(tmp_path, base=BASE.replace("from .inner import x\n", ""))
    script.write_text("import speechbrain as sb\nsb.parse_arguments([])\n")
    hparams = tmp_path / "hparams.yaml"
    hparams.write_text(
        "a: 1\nb: !new:base.Base\nc: !name:library.OtherBrain {}\nd: !new:base.Other\n"
        "e: !new:brain_lightning.Brain\n"
    )
    recipe = port_recipe(script, [hparams])
    assert [str(each).partition(" is left unchanged, ")[0] for each in recipe.remarks] == [
        f"{hparams}:2: The Brain base.Base", f"{hparams}:3: The Brain library.OtherBrain",
    ]  # fmt: skip
    # One that the script imports is ported.
    script.write_text("import base\n")
    recipe = port_recipe(script, [hparams])
    assert [each.line for each in recipe.remarks] == [3]


def test_a_byte_order_mark_and_line_ends_stay(tmp_path: Path) -> None:
    script = written(tmp_path)
    hparams = tmp_path / "hparams.yaml"
    script.write_bytes(f"\ufeff{STEP}".encode())
    text = "\ufeffclip: 0.1\r\nevery: 2\r\nc: !new:speechbrain.utils.epoch_loop.EpochCounter"
    hparams.write_bytes(text.encode())
    recipe = port_recipe(script, [hparams])
    python, yaml = (change.after for change in recipe.changes)
    assert python.startswith("\ufeffimport torch\n")
    assert "def fit_batch" not in python
    after = "\ufeffclip: 0.1\r\nevery: 2\r\nc: !new:brain_lightning.EpochCounter\r\n\r\n"
    assert yaml == after + BOTH.replace("\n", "\r\n")


def test_what_is_no_python_is_refused(tmp_path: Path) -> None:
    script = written(tmp_path)
    script.write_text("class A(:")
    with pytest.raises(RecipeError, match=r"train\.py, line 1"):
        port_recipe(script)
