"""Compares each line of doctor's advice with the text that ``doctor_advice`` reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from brain_lightning.doctor import examine
from brain_lightning.doctor.remark import ARGUMENTS
from brain_lightning.doctor.report import PARALLEL
from tests.system.doctor_advice import check, check_by_running, claims

RECIPES = Path(__file__).parents[2] / "examples" / "porting"
GAN = """\
import speechbrain as sb
class GAN(sb.Brain):
    def fit_batch(self, batch):
        loss = self.modules.g.encode(batch)
        loss.backward()
        self.optimizer.step()
        return loss

    def evaluate_batch(self, batch, stage):
        return self.modules.g.module.encode(batch)

    def fit(self, counter, train_set):
        for epoch in counter:
            self._fit_train(train_set, epoch, False)
"""


def test_advice_is_what_the_text_says(tmp_path: Path) -> None:
    gan = tmp_path / "gan.py"
    gan.write_text(GAN)
    for script, hparams in (
        (RECIPES / "before/train.py", RECIPES / "before/hparams.yaml"),
        (RECIPES / "after/train.py", None),
        (gan, None),
    ):
        counts, wrong = check(script, hparams)
        assert counts["brains"] == 1
        assert counts["lines"] > 3
        assert wrong == []
    # If a report claims that everything is supported, each false claim is found.
    (report,) = examine(str(gan)).brains
    strategies = ["one device", PARALLEL]
    rosy = dataclasses.replace(
        report, arguments=list(ARGUMENTS), strategies=strategies, line=1
    )
    found = {claim for _, claim, contradicted in claims(gan, rosy) if contradicted}
    assert found >= {
        "class GAN", *strategies, "precision", "gradient_clip_val", "accumulate_grad_batches",
        "max_steps",
    }  # fmt: skip


def test_what_has_no_effect_has_none_when_it_runs(tmp_path: Path) -> None:
    assert check_by_running(tmp_path) == []
