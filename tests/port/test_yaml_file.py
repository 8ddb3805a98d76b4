"""A port changes only the tags of a YAML file."""

from __future__ import annotations

import pytest

from brain_lightning.errors import RecipeError
from brain_lightning.port.yaml_file import included_files, plain_values, port_yaml

YAML = """\
# !new:speechbrain.utils.checkpoints.Checkpointer is named in a comment.
lr:    0.004   # with its layout
text: "!new:speechbrain.utils.epoch_loop.EpochCounter"
!ref <lr>: kept
counter: &counter !new:speechbrain.utils.epoch_loop.EpochCounter  # and this
    limit: !ref <epochs>
stopper: !new:speechbrain.utils.epoch_loop.EpochCounterWithStopper {limit: 1}
saver: [!name:speechbrain.utils.checkpoints.Checkpointer , *counter]
other: !new:speechbrain.utils.checkpoints.CheckpointerOfMine
models: !include:models/enhance.yaml\r
logger: !new:speechbrain.utils.train_logger.FileTrainLogger
"""
TAGS = {
    "&counter !new:speechbrain.utils.epoch_loop.EpochCounter ":
        "&counter !new:brain_lightning.EpochCounter ",
    " !new:speechbrain.utils.epoch_loop.EpochCounterWithStopper":
        " !new:brain_lightning.EpochCounterWithStopper",
    "!name:speechbrain.utils.checkpoints.Checkpointer ":
        "!name:brain_lightning.Checkpointer ",
}  # fmt: skip


def test_classes_that_ours_has_are_replaced_where_they_stand() -> None:
    expected = YAML
    for before, after in TAGS.items():
        assert expected.count(before) == 1
        expected = expected.replace(before, after)
    assert port_yaml(YAML, "hparams.yaml") == expected
    assert port_yaml(expected, "hparams.yaml") == expected


def test_what_a_file_includes_and_has_is_read() -> None:
    assert included_files(YAML, "hparams.yaml") == ["models/enhance.yaml"]
    values = plain_values(YAML, "hparams.yaml")
    assert values["lr"] == "0.004"
    assert values["counter"] == ""


def test_what_is_no_yaml_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"hparams\.yaml: while parsing"):
        plain_values("a: [1", "hparams.yaml")
