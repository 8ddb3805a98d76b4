"""doctor's remarks on custom loops, on wrappers, and on the API of SpeechBrain 0.5."""

from __future__ import annotations

from pathlib import Path

import pytest

from brain_lightning.cli.main import main
from brain_lightning.doctor import examine
from brain_lightning.doctor.remark import ARGUMENTS
from brain_lightning.doctor.report import BrainReport
from tests.support.scripts import script

HEAD = "import torch\nimport speechbrain as sb\nclass Own(sb.Brain):\n"
TAIL = "\nsb.utils.distributed.ddp_init_group({})\n"


def report_of(folder: Path, body: str) -> BrainReport:
    lines = ("    " + line for line in body.splitlines())
    (report,) = examine(script(folder, HEAD + "\n".join(lines) + TAIL)).brains
    return report


PARTS = """\
def fit(self, counter, train_set):
    self.on_fit_start()
    for epoch in counter:
        self.epoch(train_set, epoch)
def epoch(self, train_set, epoch):
    self._fit_train(train_set=train_set, epoch=epoch, enable=False)
"""
WHOLE = """\
def fit(self, counter, train_set):
    for batch in train_set:
        self.fit_batch(batch)
"""
AROUND = """\
def fit(self, *args):
    super().fit(*args)
def _fit_train(self, train_set, epoch, enable):
    super()._fit_train(train_set, epoch, enable)
def evaluate(self, *args):
    return sb.Brain.evaluate(self, *args)
"""
ANEW = """\
def _fit_train(self, train_set, epoch, enable):
    for batch in train_set:
        self.fit_batch(batch)
def _fit_valid(self, valid_set, epoch, enable):
    if epoch > 1:
        super()._fit_valid(valid_set, epoch, enable)
def evaluate(self, *args):
    return 0.0
"""


def test_own_loops_limit_what_a_trainer_reaches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = report_of(tmp_path, PARTS)
    assert (parts.remarks[0].about, parts.remarks[0].line) == ("fit", 4)
    assert "a stage of one Trainer" in parts.remarks[0].says
    assert not {"max_epochs", "max_steps", "max_time"} & set(parts.arguments)
    assert {"limit_train_batches", "precision", "callbacks"} <= set(parts.arguments)
    whole = report_of(tmp_path, WHOLE)
    assert "Trainer arguments and callbacks have no effect in it" in whole.remarks[0].says
    assert (whole.arguments, whole.strategies) == ([], ["one device"])
    around = report_of(tmp_path, AROUND)
    assert [remark.about for remark in around.remarks] == ["fit"]
    assert around.arguments == list(ARGUMENTS)
    anew = report_of(tmp_path, ANEW)
    assert [remark.about for remark in anew.remarks] == [
        "_fit_train",
        "_fit_valid",
        "evaluate",
    ]
    limited = {"max_steps", "limit_train_batches", "limit_test_batches", "callbacks"}
    assert not limited & set(anew.arguments)
    assert main(["doctor", str(tmp_path / "train.py")]) == 0
    text = capsys.readouterr().out
    assert "callbacks   supported outside the custom loop: all of" in text
    # The lines to change come before the supported arguments.
    assert text.index("_fit_train: Own._fit_train is overridden without") < text.index(
        "strategies"
    )
    assert {"max_epochs", "limit_val_batches", "logger"} <= set(anew.arguments)


WRAPPED = """\
def __init__(self, *args):
    self.modules.a.before_there_is_a_wrapper
def compute_forward(self, batch, stage):
    if hasattr(self.modules.a, "module"):
        scale = self.modules.a.module.scale
    else:
        scale = self.modules.a.scale
    getattr(self.modules.a, "module", self.modules.a).encode()
    self.modules.a.train().requires_grad_()
    return self.modules.a(batch) * scale
"""
# Lines that fail with a wrapper, and the remark on each.
UNSAFE = {
    "self.modules.w.model": "attributes of the entry: self.modules.w.model",
    "self.modules['w'].encode(batch)": "attributes of the entry: self.modules['w'].encode",
    "getattr(self.modules.w, 'x')": "attributes of the entry: getattr(self.modules.w, 'x')",
    "w = self.modules.w; w.model": "attributes of the entry: w.model",
    "[m.infer for m in self.modules.values()]": "attributes of the entry: m.infer",
    "self.modules.w[0](batch)": "is not a sequence: self.modules.w[0]",
    "len(self.modules.w)": "is not a sequence: self.modules.w.",
    "self.modules.w.load_state_dict({})": "prefixes all names with 'module.'",
    "self.modules.w.training = True": "is set on the wrapper only",
    "self.modules.w = batch": "replaced has no wrapper any more: self.modules.w",
    "self.hparams.modules['w'](batch)": "Gradients of entries of modules are not averaged",
}


def test_ddp_is_unsafe_where_a_wrapper_would_be_missed(tmp_path: Path) -> None:
    safe = report_of(tmp_path, WRAPPED)
    assert safe.remarks == []
    assert [text.split()[0] for text in safe.strategies] == ["one", "ddp", "fsdp2"]
    for line, says in UNSAFE.items():
        body = f"def compute_forward(self, batch, stage):\n    {line}"
        unsafe = report_of(tmp_path, body)
        assert not any(text.startswith("ddp") for text in unsafe.strategies), line
        assert says in unsafe.remarks[0].says, line
        assert (unsafe.remarks[0].line, unsafe.remarks[0].file) == (5, "train.py")
    alone = report_of(tmp_path, "def on_stage_end(self, *_):\n    self.modules.w.module.x")
    assert "no attribute .module: self.modules.w.module" in alone.remarks[0].says
    assert "one device" not in alone.strategies


OLD = """\
def fit_batch(self, batch):
    if self.auto_mix_prec:
        with torch.cuda.amp.autocast():
            loss = self.compute_forward(batch, None)
    {more}
    self.scaler.scale(loss).backward()
    if self.check_gradients(loss) and self.use_amp:
        self.optimizer.step()
"""


def test_what_is_of_speechbrain_05_is_named(tmp_path: Path) -> None:
    old = report_of(tmp_path, OLD.format(more="pass"))
    says = {remark.about: remark.says for remark in old.remarks}
    assert "TypeError since version 1.0" in says["check_gradients"]
    assert "loop lacks it since version 1.0" in says["use_amp"]
    assert says["precision"].startswith("bf16-mixed has no effect")
    # check_gradients(loss) clips, and both kinds of mixed precision are checked.
    assert "gradient_clip_val" in old.arguments
    both = "if self.bfloat16_mix_prec: loss = torch.autocast('cpu', torch.bfloat16)"
    assert "precision" in report_of(tmp_path, OLD.format(more=both)).arguments
    own = "def optimizers_step(self):\n    self.optimizer.step()\n"
    step = report_of(tmp_path, own + "def evaluate_batch(self, b, s):\n    return 0")
    assert not {"gradient_clip_val", "precision"} & set(step.arguments)
