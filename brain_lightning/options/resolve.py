"""Resolves each run option: command line before hparams before default."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from brain_lightning.distributed.communication import is_launched
from brain_lightning.errors import RunOptionError, UnsupportedError
from brain_lightning.protocol import OURS_ALONE, is_value_of

from .run_options import CHOICES, RunOptions

logger = logging.getLogger(__name__)

DEPRECATED_PRECISIONS = {"auto_mix_prec": "fp16", "bfloat16_mix_prec": "bf16"}


def resolve_run_options(
    run_opts: RunOptions, hparams: Mapping[str, Any]
) -> tuple[dict[str, Any], frozenset[str]]:
    """Resolves the value of every run option (``speechbrain.Brain.__init__``).

    Args:
        run_opts: Options from the command line or from a plain dict.
        hparams: Hyperparameters of the recipe. A key with the name of a run option sets it.

    Returns:
        Values by name, and the names of the explicit options: those that the user set.

    Raises:
        RunOptionError: The value of an option is invalid.
        UnsupportedError: An option is not supported.
    """
    defaults = RunOptions().as_dict()
    on_command_line = run_opts.overridden_args
    values = {
        name: run_opts[name] if name in on_command_line else hparams.get(name, default)
        for name, default in defaults.items()
    }
    given = {*on_command_line} | {
        name
        for name in RunOptions.option_names()
        # With SpeechBrain's run_opts, hparams.update(run_opts) copies every default, and
        # overridden_args with them. In that case a default in hparams is not explicit.
        if name in hparams
        and ("overridden_args" not in hparams or hparams[name] != defaults[name])
    }
    if values["data_parallel_backend"]:
        raise UnsupportedError(
            f"run option data_parallel_backend={values['data_parallel_backend']!r} is not "
            "supported. Start one process per device, with torchrun or "
            "--trainer.devices=2."
        )
    _leave_to_recipe(values, given - on_command_line)
    _check_numbers(values)
    _translate_deprecated(values, given)
    _check_values(values)
    _choose_interval(values, given)
    values["distributed_launch"] = is_launched()
    return values, frozenset(given)


def _leave_to_recipe(values: dict[str, Any], in_hparams: Collection[str]) -> None:
    """Ignores hyperparameters of the recipe that only share their name with a run option."""
    for name in OURS_ALONE:
        if name in in_hparams and not is_value_of(name, values[name]):
            logger.warning(
                "hparams[%r]=%r is not a valid value of the run option of this name. It is "
                "taken for a hyperparameter of the recipe. To set the run option, use --%s on "
                "the command line.",
                name,
                values[name],
                name,
            )
            values[name] = getattr(RunOptions(), name)


def _check_numbers(values: Mapping[str, Any]) -> None:
    """Raises an error for a string in place of a number, such as a quoted number in YAML."""
    for name, default in RunOptions().as_dict().items():
        is_number = type(default) in (int, float)
        if (is_number or name == "optimizer_step_limit") and isinstance(values[name], str):
            raise RunOptionError(
                f"run option {name}={values[name]!r} is a string. Use a number without quotes."
            )


def _translate_deprecated(values: dict[str, Any], given: set[str]) -> None:
    """Sets ``precision`` from the deprecated flags."""
    for name, precision in DEPRECATED_PRECISIONS.items():
        if values[name]:
            logger.warning("--%s is deprecated. Use --precision=%s.", name, precision)
            values["precision"] = precision
            given.add("precision")


def _check_values(values: dict[str, Any]) -> None:
    for name, choices in CHOICES.items():
        if values[name] is None and name.endswith("precision"):
            values[name] = "fp32"
        if values[name] not in choices:
            raise RunOptionError(
                f"run option {name}={values[name]!r} is not supported. Use one of "
                f"{', '.join(choices)}."
            )
    if not values["progress_interval"] >= 0:
        raise RunOptionError(
            f"run option progress_interval={values['progress_interval']!r} must be a number "
            "of seconds, 0 or more. 0 shows a line after every batch."
        )
    patience = values["oom_patience"]
    if not is_value_of("oom_patience", patience):
        raise RunOptionError(
            f"run option oom_patience={patience!r} must be an integer, 0 or more. 0 ends the "
            "run at the first batch that runs out of memory."
        )
    factor = values["grad_accumulation_factor"]
    if factor < 1 or factor != int(factor):
        raise RunOptionError(
            f"run option grad_accumulation_factor={factor!r} must be an integer, 1 or more. "
            "1 makes an optimizer step after every batch."
        )


def _choose_interval(values: dict[str, Any], given: Collection[str]) -> None:
    """Lets explicit steps replace the default minutes. Raises an error if both are set."""
    minutes = values["ckpt_interval_minutes"]
    if values["ckpt_interval_steps"] <= 0 or minutes <= 0:
        return
    if "ckpt_interval_minutes" in given:
        raise RunOptionError(
            f"ckpt_interval_minutes={minutes} and ckpt_interval_steps="
            f"{values['ckpt_interval_steps']} exclude each other. Set one of them to 0."
        )
    values["ckpt_interval_minutes"] = 0
