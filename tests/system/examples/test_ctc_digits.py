"""examples/ctc_digits: runs as a script, and on SpeechBrain after a change of imports."""

from __future__ import annotations

from pathlib import Path

from tests.support.brains import same_state

from .example import Example

CTC = Example(
    "ctc_digits",
    *["--number_of_epochs=2", "--train_lines", "48", "--valid_lines=20", "--test_lines=20"],
)


def test_it_gives_the_same_numbers_on_speechbrain(tmp_path: Path) -> None:
    (ours, our_loss), (theirs, their_loss) = CTC.both_sides(tmp_path)
    assert "speechbrain" in type(theirs).__mro__[1].__module__
    assert our_loss == their_loss
    assert ours.history == theirs.history
    assert vars(ours.digit_errors) == vars(theirs.digit_errors)
    assert same_state(ours.modules, theirs.modules)


def test_it_runs_as_a_script(tmp_path: Path) -> None:
    done = CTC.script(tmp_path, "--seed=7", real=True)
    assert done.returncode == 0, done.stderr
    assert "epoch  2" in done.stdout
    assert "epoch  3" not in done.stdout
    assert "test digit error rate" in done.stdout
    assert "train_loss=" in done.stderr
    assert (tmp_path / "results" / "ctc_digits" / "7" / "curves.png").stat().st_size > 10_000


def test_it_runs_in_two_processes_with_the_validation_shared_out(tmp_path: Path) -> None:
    done = CTC.script(tmp_path, "--trainer.devices=2", "--shard_eval")
    assert done.returncode == 0, done.stderr
    # The second process prints nothing. Its counts are added to the counts of the first.
    assert done.stdout.count("epoch  2") == done.stdout.count("test digit error rate") == 1
    assert "is not merged over ranks" not in done.stderr


def test_no_scan_is_in_two_of_the_sets() -> None:
    with CTC.importable():
        import digit_lines

    sets = {name: digit_lines.load_split(name)[0] for name in digit_lines.SPLITS}
    scans = [tuple(scan.flatten().tolist()) for images in sets.values() for scan in images]
    assert len(scans) == 1797
    assert len(set(scans)) == len(scans)
