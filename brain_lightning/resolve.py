"""Who decides about a run option: the command line, then hparams, then the default."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from .errors import BrainTypeError, RunOptionError, UnsupportedError
from .run_options import DEFAULT_CKPT_INTERVAL_MINUTES, PRECISIONS, RunOptions

logger = logging.getLogger(__name__)

# Options that are not built yet, and what to do instead.
UNSUPPORTED = {
    "data_parallel_backend": "use --trainer.devices=N",
    "profile_training": "use --trainer.profiler=pytorch",
}
DEPRECATED_PRECISIONS = {"auto_mix_prec": "fp16", "bfloat16_mix_prec": "bf16"}


def resolve_run_options(
    run_opts: RunOptions | Mapping[str, Any] | None, hparams: Mapping[str, Any]
) -> dict[str, Any]:
    """The value of every run option (``speechbrain.Brain.__init__``).

    Args:
        run_opts: Those of the command line, or a plain dict.
        hparams: A key that names a run option sets it.

    Returns:
        Values by name, with ``trainer``, the Trainer or its arguments.

    Raises:
        RunOptionError: An option is unknown or its value makes no sense.
        UnsupportedError: An option cannot be honoured.
    """
    if not isinstance(run_opts, RunOptions):
        run_opts = RunOptions.from_dictionary(run_opts or {})
    values = {
        name: run_opts[name]
        if name in run_opts.overridden_args
        else hparams.get(name, default)
        for name, default in RunOptions().items()
    }
    _refuse_unsupported(values)
    _translate_deprecated(values)
    _check_values(values)
    _choose_interval(values, run_opts, hparams)
    values["distributed_launch"] = _is_launched()
    values["trainer"] = _trainer_arguments(run_opts, hparams)
    return values


def given_options(
    values: Mapping[str, Any],
    run_opts: RunOptions | Mapping[str, Any] | None,
    hparams: Mapping[str, Any],
) -> frozenset[str]:
    """The options whose value somebody chose.

    Args:
        values: The value of each option.
        run_opts: What it was resolved from.
        hparams: A value there counts where it is not the default, for
            ``hparams.update(run_opts)`` brings every default along.

    Returns:
        Their names.
    """
    opts = (
        run_opts
        if isinstance(run_opts, RunOptions)
        else RunOptions.from_dictionary(run_opts or {})
    )
    defaults = RunOptions()
    chosen = {
        n for n in RunOptions.option_names() if n in hparams and values[n] != defaults[n]
    }
    deprecated = {"precision"} if any(values[n] for n in DEPRECATED_PRECISIONS) else set()
    return opts.overridden_args | chosen | deprecated


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    for name, remedy in UNSUPPORTED.items():
        if values[name]:
            raise UnsupportedError(
                f"run option {name}={values[name]!r} is not supported: {remedy}"
            )


def _translate_deprecated(values: dict[str, Any]) -> None:
    for name, precision in DEPRECATED_PRECISIONS.items():
        if values[name]:
            logger.warning("--%s is deprecated: use --precision=%s", name, precision)
            values["precision"] = precision


def _check_values(values: dict[str, Any]) -> None:
    for name in ("precision", "eval_precision"):
        if values[name] is None:
            values[name] = "fp32"
        if values[name] not in PRECISIONS:
            raise RunOptionError(
                f"run option {name}={values[name]!r} is not one of {', '.join(PRECISIONS)}"
            )
    factor = values["grad_accumulation_factor"]
    if factor < 1 or factor != int(factor):
        raise RunOptionError(
            f"run option grad_accumulation_factor={factor!r} must be a whole number of 1 or "
            "more: 1 updates after every batch"
        )


def _choose_interval(
    values: dict[str, Any], run_opts: RunOptions, hparams: Mapping[str, Any]
) -> None:
    """Steps, where given, replace the default minutes; both given is a mistake."""
    minutes = values["ckpt_interval_minutes"]
    if values["ckpt_interval_steps"] <= 0 or minutes <= 0:
        return
    # hparams.update(run_opts) brings every default along: a default there was not asked for.
    asked_for = "ckpt_interval_minutes" in run_opts.overridden_args or (
        "ckpt_interval_minutes" in hparams and minutes != DEFAULT_CKPT_INTERVAL_MINUTES
    )
    if asked_for:
        raise RunOptionError(
            f"ckpt_interval_minutes={minutes} and ckpt_interval_steps="
            f"{values['ckpt_interval_steps']} exclude each other: set one of them to 0"
        )
    values["ckpt_interval_minutes"] = 0


def _is_launched() -> bool:
    """Whether torchrun, or the like, started this process."""
    launched = "RANK" in os.environ and "LOCAL_RANK" in os.environ
    if launched and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UnsupportedError(
            f"training on {os.environ['WORLD_SIZE']} processes is not supported yet: "
            "start one process, without torchrun"
        )
    return launched


def _trainer_arguments(run_opts: RunOptions, hparams: Mapping[str, Any]) -> Any:
    """``hparams["trainer"]``, each argument of the command line in its place."""
    from_hparams = hparams.get("trainer") or {}
    if isinstance(from_hparams, Mapping):
        return {**from_hparams, **run_opts.trainer}
    if run_opts.trainer:
        raise BrainTypeError(
            f"--trainer.{next(iter(run_opts.trainer))} cannot change hparams['trainer'], "
            f"which is {from_hparams!r}: make it a dict of Trainer arguments"
        )
    return from_hparams
