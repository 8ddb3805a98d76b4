"""What doctor says of modules in shards."""

from __future__ import annotations

from pathlib import Path

from brain_lightning.doctor import examine
from brain_lightning.doctor.report import BrainReport

RECIPE = """
import copy
import torch
import speechbrain as sb

class Own(sb.Brain):
    {}
"""
# What does not work with shards, and what doctor says of it.
UNSAFE = {
    "def compute_forward(self, x, stage): return self.modules.m.enc.proj(x)": (
        "not for self.modules.m.enc.proj. Set FSDP2Strategy(blocks=[...]) to its class"
    ),
    "def compute_forward(self, x, stage): return self.modules.m[0](x)": "self.modules.m[0]",
    "def compute_forward(self, x, stage): return self.hparams.inner(x)": "self.hparams.inner",
    "def compute_forward(self, x, stage): self.modules.m = x": "replaced is not sharded",
    "def on_fit_start(self): self.init_optimizers()": "Call self._wrap_distributed()",
    "def init_optimizers(self): self.modules.m.register_comm_hook(0, 0)": "is not supported",
    "def on_stage_start(self, *a): self.ema = copy.deepcopy(self.modules.m)": (
        "sharded module cannot be copied: copy.deepcopy(m)"
    ),
    "def __init__(self, m): super().__init__(m); self.o = torch.optim.Adam(m)": (
        "optimizer that is created before the modules are sharded is not supported: Adam"
    ),
    """def on_stage_end(self, *a):
        if sb.utils.distributed.if_main_process():
            torch.save(self.modules.m.state_dict(), "m.ckpt")""": (
        "if only the main process calls self.modules.m.state_dict"
    ),
}
# Known methods, .module, parts where weights are whole, and entries in hparams.
SAFE = (
    """def compute_forward(self, x, stage):
        if stage != sb.Stage.TRAIN:
            return self.modules.m.enc.proj(x)
        return self.modules.m.encode(x), self.modules.n.module(x)""",
    "def compute_forward(self, x, stage): return self.hparams.net(x), self.hparams.listed(x)",
    "def __init__(self, m): super().__init__(m); self.ema = copy.deepcopy(self.modules.m)",
    """def on_stage_end(self, *a):
        self.checkpointer.save_and_keep_only()
        if not sb.utils.distributed.if_main_process():
            self.modules.m.state_dict()""",
)
HPARAMS = """
inner: !new:torch.nn.Linear [1, 1]
listed: !new:torch.nn.Linear [1, 1]
net: !new:torch.nn.Sequential [!ref <inner>]
many: !new:torch.nn.ModuleList [[!ref <listed>]]
modules:
    m: !ref <net>
    n: !ref <many>
"""


def report_of(folder: Path, body: str, hparams: str = HPARAMS) -> BrainReport:
    (folder / "h.yaml").write_text(hparams)
    (folder / "own.py").write_text(RECIPE.format(body))
    (brain,) = examine(str(folder / "own.py"), str(folder / "h.yaml")).brains
    return brain


def of_shards(brain: BrainReport) -> list[str]:
    return [remark.says for remark in brain.remarks if "strategy=fsdp2" in remark.limits]


def test_what_modules_in_shards_do_not_stand_is_named(tmp_path: Path) -> None:
    for body, says in UNSAFE.items():
        brain = report_of(tmp_path, body)
        assert [says in said for said in of_shards(brain)] == [True], body
        assert not any(text.startswith("fsdp2") for text in brain.strategies), body
    optimizer = "adam: !new:torch.optim.Adam\n    params: []\n" + HPARAMS
    (said,) = of_shards(report_of(tmp_path, "pass", optimizer))
    assert "is not supported: adam. Create it in init_optimizers" in said


def test_what_can_be_sharded_is_said_to_be(tmp_path: Path) -> None:
    for body in SAFE:
        brain = report_of(tmp_path, body)
        assert of_shards(brain) == [], body
        assert brain.strategies[-1] == (
            "fsdp2 (shards each entry of modules, for models larger than one device)"
        ), body


def test_methods_that_are_not_known_are_to_be_named(tmp_path: Path) -> None:
    calls = "self.hparams.net.speak(x), self.modules.n.sing(x)"
    brain = report_of(tmp_path, f"def compute_forward(self, x, stage): {calls}")
    assert of_shards(brain) == []
    assert brain.strategies[-1].endswith("with FSDP2Strategy(methods=['sing', 'speak'])")
    says = next(r.says for r in brain.remarks if r.about == "strategy=fsdp2")
    assert says == (
        "Weights are gathered for forward, but not for self.modules.n.sing, "
        "self.hparams.net.speak. If the method uses weights, set "
        "FSDP2Strategy(methods=['sing', 'speak'])."
    )
