"""The key that sets a value, in YAML files such as those of recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from brain_lightning.options.value_keys import Keys, keys_of


def is_in_train(keys: Keys, tag: str) -> bool:
    return keys[0].startswith("train") or tag == "!name:Adam"


@pytest.mark.parametrize(
    ("text", "overrides", "found"),
    [
        ("size: 8", "", ["size"]),
        ("size: 8\nother: 8", "", ["size"]),
        ("size: 4", "size: 8", ["size"]),
        ("size: 4", "", []),
        ("base: 8\nsize: !ref <base>", "", ["base"]),
        ("first: 8\nbase: !ref <first>\nsize: !ref <base>", "", ["first"]),
        # A computed value is set at its own key.
        ("base: 4\nopts:\n    size: !ref <base> * 2", "", ["opts.size"]),
        ("opts:\n    base: 8\nsize: !ref <opts[base]>", "", ["size"]),
        ("valid:\n    size: 8\ntrain:\n    size: 8", "", ["train.size"]),
        ("size: 8\nAdam: !name:Adam\n    size: 8.0", "", ["Adam.size"]),
        ("all: &all\n    size: 8\ntrain:\n    <<: *all", "", ["train.size"]),
        # An override cannot set an element of a list.
        ("sizes:\n    - size: 8", "", []),
        ("size: eight", "", []),
        ("", "", []),
    ],
)
def test_a_key_is_found_by_its_name_and_value(
    tmp_path: Path, text: str, overrides: str, found: list[str]
) -> None:
    file = tmp_path / "hparams.yaml"
    file.write_text(text)
    assert keys_of(str(file), overrides, {8}, "size".__eq__, is_in_train) == found
