"""What a person watches."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar

from .brains import Regression, loader, make


class Talking(Regression):
    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        super().on_stage_end(stage, stage_loss, epoch)
        print(f"\nend of {stage.name}")


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return captured.err + captured.out


def test_the_bar_shows_the_running_loss(capsys: pytest.CaptureFixture[str]) -> None:
    brain = make(Talking)
    losses = []
    hook = brain.on_stage_end
    brain.on_stage_end = lambda s, loss, e=None: (
        losses.append((s.name, loss)),
        hook(s, loss, e),
    )
    brain.fit(range(1), loader(), loader(), progressbar=True)
    bar = capsys.readouterr().err
    train_loss = dict(losses)["TRAIN"]
    assert "5/5" in bar
    assert f"train_loss={train_loss:.3g}"[:12] in bar


def test_it_is_closed_before_a_stage_ends(capfd: pytest.CaptureFixture[str]) -> None:
    class Looking(Regression):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            self.seen = [*getattr(self, "seen", []), capfd.readouterr().err]

    brain = make(Looking)
    brain.fit(range(1), loader(), loader(), progressbar=True)
    assert len(brain.seen) == 2
    for text in brain.seen:
        assert "100%" in text
        assert text.endswith("\n")


def test_it_is_coloured_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    make(noprogressbar=False, tqdm_colored_bar=True).fit(range(1), loader())
    assert "\x1b[32m" in capsys.readouterr().err
    make(noprogressbar=False).fit(range(1), loader())
    assert "\x1b[32m" not in capsys.readouterr().err


def test_without_a_bar_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    make().fit(range(1), loader(), loader())
    make(noprogressbar=False).fit(range(1), loader(), progressbar=False)
    make().evaluate(loader())
    assert shown(capsys) == ""


def test_a_bar_of_lightnings_takes_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    brain = make(noprogressbar=False)
    brain.fit(range(1), loader(), trainer={"callbacks": [TQDMProgressBar()]})
    text = shown(capsys)
    assert "Epoch 0" in text
    assert "train_loss" not in text
