"""examples/gan_digits: a custom ``fit_batch``; one import changes for SpeechBrain."""

from __future__ import annotations

from pathlib import Path

from tests.support.brains import same_state

from .example import Example

GAN = Example("gan_digits", "--number_of_epochs=16", "--draw_every=8")


def test_it_gives_the_same_numbers_on_speechbrain(tmp_path: Path) -> None:
    ours, theirs = GAN.both_sides(tmp_path)
    assert "speechbrain" in type(theirs).__mro__[1].__module__
    assert same_state(ours.modules, theirs.modules)
    assert ours.optimizer_step == theirs.optimizer_step == 16 * 28
    assert ours.legible == theirs.legible
    # Random images give 0.1.
    assert ours.legible > 0.5


def test_only_one_line_differs_on_speechbrain(tmp_path: Path) -> None:
    ported = GAN.ported(tmp_path / "ported")
    for name, expected in (("train.py", 1), ("hparams.yaml", 0)):
        lines = zip(
            (GAN.folder / name).read_text().splitlines(),
            (ported / name).read_text().splitlines(),
            strict=True,
        )
        assert sum(ours != theirs for ours, theirs in lines) == expected


def test_it_runs_as_a_script_and_draws(tmp_path: Path) -> None:
    done = GAN.script(tmp_path, "--seed=7")
    assert done.returncode == 0, done.stderr
    assert "epoch  16" in done.stdout
    assert "legible samples" in done.stdout
    pictures = {path.name for path in (tmp_path / "results" / "gan_digits" / "7").iterdir()}
    assert pictures == {"samples_008.png", "samples_016.png"}
