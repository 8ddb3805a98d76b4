"""Where doctor finds Brains: in packages, through names of all kinds, and in YAML."""

from __future__ import annotations

from pathlib import Path

import pytest

from brain_lightning.cli.main import main
from brain_lightning.doctor import examine
from brain_lightning.doctor.report import BrainReport

FILES = {
    "pack/__init__.py": "from pack.base import Base\nfrom .circle import *\n",
    "pack/circle.py": "from . import *\nfrom pack import *\nBase = Base.again\n",
    "pack/base.py": "import speechbrain as sb\n"
    "class Base(sb.Brain):\n    def fit_batch(self, b): return self.training_ctx\n",
    "pack/relative.py": "from .base import Base\nclass Relative(Base): ...\n",
    "pack/sub/deep.py": "from ..base import Base\nclass Deep(Base): ...\n",
    "dotted.py": "import pack as p\n"
    "class Dotted(p.base.Base):\n    def fit_batch(self, b): ...\n",
    "uses.py": "from pack import *\nbrain = Base()\n",
    "named.py": "raise SystemError('this would be run')\n",
    "star.py": "from speechbrain.core import *\nclass Star(Brain): ...\n",
    "alias.py": "import speechbrain\nMine = speechbrain.core.Brain\nclass Alias(Mine): ...\n",
    "mixin.py": "from speechbrain import Brain\n"
    "class Steps:\n    def fit_batch(self, b): ...\nclass Brain(Steps, Brain): ...\n",
    "lost.py": "from nowhere_at_all import LostBrain\nclass Lost(LostBrain): ...\n",
    "circle.py": "from pack.circle import Base\nfrom nothing import Other\n"
    "class C(Other): ...\nBase()\n",
    "h.yaml": "brain: !name:pack.relative.Relative\nenc: !new:torch.nn.Linear [1, !ref <n>]\n"
    "n: 1\nall: !new:torch.nn.ModuleList\n    - [!ref <enc>]\nmodules:\n    all: !ref <all>\n"
    "maker: !name:torch.nn.Linear\n",
    "hparams.py": "import speechbrain as sb\nclass H(sb.Brain):\n"
    "    def compute_forward(self, b, stage):\n"
    "        if stage != sb.Stage.TRAIN: self.hparams.enc(b)\n"
    "        return self.hparams.{}(b)\n",
}


def test_brains_are_found_wherever_they_come_from(tmp_path: Path) -> None:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)

    def brains(name: str, *hparams: str) -> list[BrainReport]:
        return examine(str(tmp_path / name), *(str(tmp_path / h) for h in hparams)).brains

    (relative,) = brains("pack/relative.py")
    assert (relative.name, relative.why) == ("Relative", "fit_batch is overridden (base.py:3)")
    assert [brain.name for brain in brains("pack/sub/deep.py")] == ["Deep"]
    (dotted,) = brains("dotted.py")
    # What its base does with precision is overridden, and never reached.
    assert dotted.overrides == {"fit_batch": "dotted.py:3"}
    assert "precision" not in dotted.arguments
    (used,) = brains("uses.py")
    assert (used.name, used.file, used.line) == ("Base", "pack/base.py", 2)
    (named,) = brains("named.py", "h.yaml")
    assert (named.name, named.file) == ("Relative", "pack/relative.py")
    assert [brain.name for brain in brains("star.py")] == ["Star"]
    assert [brain.name for brain in brains("alias.py")] == ["Alias"]
    (mixed,) = brains("mixin.py")
    assert mixed.updates == "manual"
    assert [brain.name for brain in brains("circle.py")] == ["Base"]


def test_hyperparameters_say_what_has_a_wrapper(tmp_path: Path) -> None:
    (tmp_path / "h.yaml").write_text(FILES["h.yaml"].replace("pack.", "nowhere."))
    for called, says in {"enc": "Call self.modules.all", "maker": ""}.items():
        path = tmp_path / f"{called}.py"
        path.write_text(FILES["hparams.py"].format(called))
        (alone,) = examine(str(path)).brains
        (brain,) = examine(str(path), str(tmp_path / "h.yaml")).brains
        assert not any(text.startswith("ddp") for text in alone.strategies)
        assert any(text.startswith("ddp") for text in brain.strategies) == (not says)
        assert [says in remark.says for remark in brain.remarks] == ([True] if says else [])


def test_a_brain_that_is_in_no_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lost.py"
    path.write_text(
        FILES["lost.py"] + "import nowhere as n\nclass Below(Lost): ...\n"
        "class Dotted(n.brains.TheirBrain): ...\nclass NoBrain(n.Other): ...\n"
    )
    report = examine(str(path))
    assert report.not_found == {"nowhere_at_all.LostBrain": 1, "nowhere.brains.TheirBrain": 5}
    assert report.not_examined == {"Lost": 2, "Below": 4, "Dotted": 5}
    assert main(["doctor", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "lost.py:1: no file with nowhere_at_all.LostBrain was found" in shown
    assert "add that folder to PYTHONPATH" in shown
    assert "lost.py:4: Below was not examined, because no file with its base" in shown
