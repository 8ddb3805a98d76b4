"""``--trainer.help``."""

from __future__ import annotations

import inspect
import re

import pytest
from lightning.pytorch import Trainer

from brain_lightning import parse_arguments
from brain_lightning.cli.main import main
from brain_lightning.options.trainer_arguments import WIDTH, WITH_A_BRAIN, trainer_help
from tests.support.processes import check_python

ARGUMENTS = list(inspect.signature(Trainer).parameters)


def entries() -> dict[str, list[str]]:
    """Returns the lines below each argument."""
    blocks = [block.splitlines() for block in trainer_help().split("\n\n")[1:]]
    return {re.split("[.=]", name)[1]: lines for name, *lines in blocks}


def test_every_argument_is_described_at_the_width_of_a_terminal() -> None:
    assert list(entries()) == ARGUMENTS
    for name, lines in entries().items():
        assert re.match(r"    \S.{10,}", lines[0]), name
    assert all(len(line) <= WIDTH == 80 for line in trainer_help().splitlines())


def test_differences_with_a_brain_are_shown() -> None:
    # A name that Lightning removed would not be shown.
    assert set(WITH_A_BRAIN) <= set(ARGUMENTS)
    for name, lines in entries().items():
        text = " ".join(" ".join(lines).split())
        assert ("> " in text) == (name in WITH_A_BRAIN), name
        assert WITH_A_BRAIN.get(name, "") in text


@pytest.mark.parametrize(
    "line",
    [
        "--trainer.max_epochs=None",
        "--trainer.precision='32-true'",
        "--trainer.log_every_n_steps=50",
        "    Stop training once this number of epochs is reached.",
        "    Set to a positive integer to reload dataloaders every n epochs.",
    ],
)
def test_defaults_and_descriptions_are_lightnings(line: str) -> None:
    assert line in trainer_help().splitlines()


@pytest.mark.parametrize(
    "words", [["run", "nowhere.py", "--trainer.help"], ["verify", "--trainer.help"]]
)
def test_a_command_shows_it_before_it_reads_any_file(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    assert capsys.readouterr().out == trainer_help() + "\n"


def test_a_script_shows_it_too() -> None:
    script = "from brain_lightning import parse_arguments; parse_arguments(); print('built')"
    assert (
        check_python("-c", script, "nowhere.yaml", "--trainer.help") == trainer_help() + "\n"
    )


def test_the_help_of_a_script_mentions_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    assert "--trainer.help" in capsys.readouterr().out
