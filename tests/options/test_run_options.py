"""Run options from a command line, a dict and hparams, and their error messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import pytest
import speechbrain
import torch
from hyperpyyaml import load_hyperpyyaml

from brain_lightning import (
    Brain,
    BrainTypeError,
    RunOptionError,
    RunOptions,
    UnsupportedError,
    parse_arguments,
)
from brain_lightning.protocol import OURS_ALONE, OptionValues
from tests.support.brains import make
from tests.support.upstream import needs_speechbrain

COMMAND_LINES = [
    ["hparams.yaml"],
    ["hparams.yaml", "--device", "cuda:1", "--seed", "10"],
    ["hparams.yaml", "--device=cpu", "--debug", "--lr=0.1", "--data_folder=/data/a b"],
    ["hparams.yaml", "--max_grad_norm=-1.5", "--precision", "bf16", "--noprogressbar"],
    ["hparams.yaml", "--channels=[8,", "16]", "--ckpt_interval_steps=5"],
    ["hparams.yaml", "--jit_module_keys", "a", "b", "--batch_size=4"],
    ["--debug_batches=3", "hparams.yaml", "--grad_accumulation_factor=2"],
]


@needs_speechbrain("1.1")
@pytest.mark.parametrize("words", COMMAND_LINES, ids=" ".join)
def test_a_command_line_means_what_it_means_to_speechbrain(words: list[str]) -> None:
    file, theirs, their_overrides = speechbrain.parse_arguments(words)
    hparams_file, ours, overrides = parse_arguments(words)
    assert hparams_file == file
    assert overrides == their_overrides
    assert ours.overridden_args == theirs.overridden_args - {"param_file"}
    for name in ours.overridden_args | {"param_file"}:
        assert ours[name] == theirs[name]


def test_values_are_typed_on_the_command_line() -> None:
    words = ["--optimizer_step_limit=5", "--max_grad_norm=2", "--ckpt_interval_minutes=.5"]
    opts = parse_arguments(["h.yaml", *words]).run_opts
    assert opts.optimizer_step_limit == 5
    assert isinstance(opts.max_grad_norm, float)
    assert opts.ckpt_interval_minutes == 0.5


def test_an_override_may_hold_an_equals_sign() -> None:
    overrides = parse_arguments(["h.yaml", "--name=a=b", "--url", "http://x?y=z"]).overrides
    assert load_hyperpyyaml("name: 1\nurl: 2", overrides) == {
        "name": "a=b",
        "url": "http://x?y=z",
    }


SECTIONS = """
lr: 0.1
a.b: 1
optimizer: !new:collections.Counter
    lr: !ref <lr>
    decay: {rate: 2, steps: 3}
again: !ref <optimizer[decay][rate]>
merged:
    <<: {size: 1}
words: [a, b]
trainer: {max_epochs: 1}
"""


def test_one_key_within_a_section_is_overridden(tmp_path: Path) -> None:
    file = tmp_path / "h.yaml"
    file.write_text(SECTIONS, encoding="utf-8")
    words = [
        "--optimizer.decay.rate=5", "--lr", "0.2", "--optimizer.lr=!ref <lr> * 2", "--a.b=7",
        "--merged.size", "[1,", "2]", "--trainer.max_epochs=3",
    ]  # fmt: skip
    _, run_opts, overrides = parse_arguments([str(file), *words])
    found = load_hyperpyyaml(SECTIONS, overrides)
    assert found["optimizer"] == {"lr": 0.4, "decay": {"rate": 5, "steps": 3}}
    assert (found["lr"], found["again"], found["a.b"]) == (0.2, 5, 7)
    assert found["merged"] == {"size": [1, 2]}
    # Still an argument of the Trainer, not an override of the section.
    assert (run_opts.trainer, found["trainer"]) == ({"max_epochs": 3}, {"max_epochs": 1})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer.rate=1"], "unknown key of optimizer.*'rate'. Use one of lr, decay"),
        (["--optimiser.lr=1"], "'optimiser'. Did you mean 'optimizer'"),
        (["--lr.x=1"], "--lr.x: 'lr' of .*h.yaml is not a section"),
        (["--words.0=1"], "is not a section with keys"),
        (["--optimizer.decay=1", "--optimizer.decay.rate=2"], "are both set"),
        (["--optimizer.decay.rate=2", "--optimizer.decay=1"], "are both set"),
    ],
)
def test_an_unknown_key_of_a_section_raises_an_error(
    tmp_path: Path, words: list[str], message: str
) -> None:
    file = tmp_path / "h.yaml"
    file.write_text(SECTIONS, encoding="utf-8")
    with pytest.raises(RunOptionError, match=message):
        parse_arguments([str(file), *words])


def test_a_flag_may_have_a_value() -> None:
    opts = parse_arguments(["h.yaml", "--debug=true", "--test_only=false"]).run_opts
    assert (opts.debug, opts.test_only) == (True, False)
    with pytest.raises(RunOptionError, match="--debug=3"):
        parse_arguments(["h.yaml", "--debug=3"])


def test_trainer_arguments_are_read_as_yaml() -> None:
    words = ["--trainer.max_steps=5", "h.yaml", "--trainer.limit_val_batches", "0.5"]
    opts = parse_arguments([*words, "--lr=1"]).run_opts
    assert opts.trainer == {"max_steps": 5, "limit_val_batches": 0.5}
    assert Brain(run_opts=opts)._lightning.trainer_overrides == opts.trainer


def test_a_trainer_argument_without_a_value_raises_an_error() -> None:
    for words in (["h.yaml", "--trainer.devices"], ["h.yaml", "--trainer.=1"]):
        with pytest.raises(RunOptionError, match="needs a value"):
            parse_arguments(words)


def test_precedence_is_command_line_then_hparams_then_defaults() -> None:
    hparams = {"max_grad_norm": 1.0, "nonfinite_patience": 7, "trainer": {"max_steps": 1}}
    opts = parse_arguments(["h.yaml", "--max_grad_norm=2", "--trainer.devices=1"]).run_opts
    brain = Brain(hparams=hparams, run_opts=opts)
    assert (brain.max_grad_norm, brain.nonfinite_patience, brain.debug_batches) == (2.0, 7, 2)
    assert (brain._lightning.trainer_arguments, brain._lightning.trainer_overrides) == (
        {"max_steps": 1},
        {"devices": 1},
    )


def test_run_options_are_a_mapping() -> None:
    opts = parse_arguments(["h.yaml", "--device=cpu", "--ckpt_interval_steps=3"]).run_opts
    assert opts["device"] == "cpu"
    assert opts.get("nothing", 5) == 5
    assert "precision" in opts
    assert "device" in list(opts.keys())
    yaml: dict[str, Any] = {"precision": "bf16", "trainer": {"devices": 1}, "device": "cuda"}
    given = {"device": "cpu", "ckpt_interval_steps": 3}
    assert {**opts} == given
    for hparams in (yaml | given, {**yaml, **opts}, {**opts.as_dict(), **yaml}):
        brain = Brain(hparams=hparams, run_opts=opts)
        # Values of the YAML file stay, except for options that were given.
        assert (brain.precision, brain.device) == ("bf16", "cpu")
        assert brain._lightning.trainer_arguments == {"devices": 1}
        # The default minutes do not conflict with the steps.
        assert (brain.ckpt_interval_minutes, brain.ckpt_interval_steps) == (0, 3)


def test_arguments_of_launchers_are_not_overrides(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``torch.distributed.launch`` appends the rank. SpeechBrain 0.5 had a flag."""
    assert parse_arguments(["h.yaml", "--distributed_launch=False"]).overrides == ""
    assert caplog.text == ""
    assert parse_arguments(["h.yaml", "--distributed_launch"]).overrides == ""
    assert "--distributed_launch has no effect. Start the script with torchrun." in caplog.text
    caplog.clear()
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    words = [
        "h.yaml", "--distributed_launch", "--lr=2", "--local_rank=1", "--local-rank=1",
        "--distributed_launch=True", "--distributed_launch", "true",
    ]  # fmt: skip
    assert parse_arguments(words).overrides == "lr: 2"
    assert parse_arguments(["h.yaml", "--local_rank=3"]).overrides == "local_rank: 3"
    assert caplog.text == ""


def test_option_values_of_the_protocol_are_the_run_options_with_their_types() -> None:
    # These raise an error or are translated before a Brain exists. log_config belongs to the
    # recipe. Options that SpeechBrain does not have are in LightningSettings.
    others = {
        "data_parallel_backend", "data_parallel_count", "auto_mix_prec", "bfloat16_mix_prec",
        "log_config", *OURS_ALONE,
    }  # fmt: skip
    names = [name for name in RunOptions.option_names() if name not in others]
    declared = get_type_hints(RunOptions)
    expected = {name: declared[name] for name in names}
    # A Brain chooses a device if none was given.
    expected["device"] = str
    assert list(get_type_hints(OptionValues).items()) == list(expected.items())


def test_the_error_for_an_unknown_option_suggests_a_name() -> None:
    with pytest.raises(RunOptionError, match=r"'max_grad_nrom'. Did you mean 'max_grad_norm'"):
        Brain(run_opts={"max_grad_nrom": 1})
    with pytest.raises(RunOptionError, match=r"'xyz'. Use one of test_only, debug"):
        Brain(run_opts={"xyz": 1})


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (RunOptionError, r"'fp8' is not supported. Use one of fp32", {"precision": "fp8"}),
        (RunOptionError, r"fp16.*not supported on the CPU.*bf16", {"precision": "fp16"}),
        (RunOptionError, r"fp16.*not supported on the CPU", {"eval_precision": "fp16"}),
        (RunOptionError, r"fp16.*not supported on the CPU", {"auto_mix_prec": True}),
        (RunOptionError, r"1 or more", {"grad_accumulation_factor": 0}),
        (RunOptionError, r"exclude each other",
         {"ckpt_interval_minutes": 15, "ckpt_interval_steps": 5}),
        (UnsupportedError, r"--trainer\.devices=2", {"data_parallel_backend": True}),
        (RunOptionError, r"device 'cuda:99'", {"device": "cuda:99"}),
    ],
)  # fmt: skip
def test_unsupported_values_raise_an_error(
    error: type[Exception], words: str, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=words):
        make(**options)


def test_both_intervals_in_hparams_exclude_each_other_too() -> None:
    with pytest.raises(RunOptionError, match="exclude each other"):
        Brain(hparams={"ckpt_interval_minutes": 30, "ckpt_interval_steps": 5})


def test_deprecated_spellings_still_work(caplog: pytest.LogCaptureFixture) -> None:
    brain = make(bfloat16_mix_prec=True)
    assert brain.precision == "bf16"
    assert "Use --precision=bf16" in caplog.text


def test_the_rank_is_read_from_torchruns_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    brain = make()
    assert (brain.distributed_launch, brain.rank, brain.world_size) == (True, 1, 2)


@pytest.mark.parametrize("modules", [[1], {"model": "linear"}, "model"])
def test_modules_must_be_modules(modules: Any) -> None:
    with pytest.raises(BrainTypeError, match=r"must be a dict from names to torch\.nn"):
        Brain(modules=modules)


def test_an_opt_class_must_create_optimizers() -> None:
    with pytest.raises(BrainTypeError, match=r"an instance of SGD.*!name:torch\.optim\.Adam"):
        make(opt_class=torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1))


def test_every_option_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    shown = capsys.readouterr().out
    hidden = {"distributed_launch", "data_parallel_count", "tqdm_barcolor"}
    for name in set(RunOptions.option_names()) - hidden:
        assert f"--{name}" in shown
    assert all(RunOptions.on_command_line().values())


@needs_speechbrain("1.1")
def test_options_that_speechbrain_was_not_given_do_not_override_hparams() -> None:
    """A recipe may still use ``sb.parse_arguments``."""
    words = ["hparams.yaml", "--device=cpu", "--max_grad_norm=2.5"]
    _, run_opts, _ = speechbrain.parse_arguments(words)
    hparams = {"grad_accumulation_factor": 2, "max_grad_norm": 9.0}
    brain = Brain(hparams=hparams, run_opts=run_opts)
    assert brain.grad_accumulation_factor == 2
    assert brain.max_grad_norm == 2.5
    assert brain._lightning.explicit_options == {
        "device",
        "grad_accumulation_factor",
        "max_grad_norm",
    }
