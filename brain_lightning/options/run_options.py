"""The run options of an experiment: what each means, and how it is read from a command line.

Names, meanings and defaults are those of ``speechbrain.utils.run_opts``; where
a default differs the field says so.
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NamedTuple, NoReturn, get_type_hints

import yaml

from brain_lightning.errors import RunOptionError

PRECISIONS = ("fp32", "fp16", "bf16")
# Options that take one of a few words.
CHOICES = {
    "precision": PRECISIONS,
    "eval_precision": PRECISIONS,
    "progress": ("auto", "bar", "plain"),
}
TRAINER_PREFIX = "--trainer."
TRAINER_HELP = f"{TRAINER_PREFIX}help"
# Fields that are no option of the experiment but a record of how they were given.
RECORDS = ("param_file", "overridden_args", "trainer")


def option(default: Any, help_text: str, *, on_command_line: bool = True) -> Any:
    """Declares a field of ``RunOptions``.

    Args:
        default: Its value where nobody gives one; a dict is copied.
        help_text: What it does, shown by ``--help``.
        on_command_line: Whether ``--name=value`` sets it.

    Returns:
        A dataclass field.
    """
    metadata = {"help": help_text, "on_command_line": on_command_line}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunOptions(Mapping[str, Any]):
    """How to run an experiment, apart from what the experiment is.

    Also a mapping, for recipes do ``hparams.update(run_opts)`` and
    ``run_opts["device"]``. An option counts as given where ``overridden_args``
    names it; only then it outranks the same key in ``hparams``.
    """

    test_only: bool = option(False, "Skip training; only evaluate.")
    debug: bool = option(False, "Run a few batches of a few epochs to see whether it runs.")
    debug_batches: int = option(2, "Batches per stage in debug mode.")
    debug_epochs: int = option(2, "The epoch after which debug mode stops.")
    debug_persistently: bool = option(
        False, "In debug mode keep checkpoints where they belong, not in a temporary folder."
    )
    device: str | None = option(
        None, "cpu, cuda, cuda:1… (default: this rank's GPU where there is one, else the CPU)"
    )
    data_parallel_backend: bool = option(False, "Not supported: see --trainer.devices.")
    data_parallel_count: int = option(-1, "Not supported.", on_command_line=False)
    distributed_backend: str = option("nccl", "nccl, gloo or mpi.")
    distributed_launch: bool = option(
        False, "Set by torchrun's environment, never by hand.", on_command_line=False
    )
    find_unused_parameters: bool = option(
        False, "Let distributed training look for parameters that got no gradient."
    )
    jit: bool = option(False, "Compile all modules with torch.jit.script.")
    jit_module_keys: list[str] | None = option(None, "The modules to compile with jit.")
    compile: bool = option(False, "Compile all modules with torch.compile.")
    compile_module_keys: list[str] | None = option(
        None, "The modules to compile with torch.compile."
    )
    compile_mode: str = option("default", "default, reduce-overhead or max-autotune.")
    compile_using_fullgraph: bool = option(False, "Refuse graph breaks when compiling.")
    compile_using_dynamic_shape_tracing: bool = option(
        False, "Trace with dynamic shapes when compiling."
    )
    precision: str = option("fp32", "Training precision: fp32, fp16 or bf16.")
    eval_precision: str = option("fp32", "Validation and test precision: fp32, fp16 or bf16.")
    auto_mix_prec: bool = option(False, "Deprecated: --precision=fp16.")
    bfloat16_mix_prec: bool = option(False, "Deprecated: --precision=bf16.")
    max_grad_norm: float = option(
        5.0, "Clip each optimizer's gradient norm to this value; 0 or less disables."
    )
    skip_nonfinite_grads: bool = option(
        False, "Drop the gradients that are not finite, parameter by parameter."
    )
    nonfinite_patience: int = option(
        3, "Non-finite losses to forgive per epoch; their updates are skipped."
    )
    noprogressbar: bool = option(False, "Show no progress bar.")
    progress: str = option(
        "auto",
        "bar, or plain: whole lines, for log files; auto: a bar in a terminal or a notebook, "
        "lines elsewhere (SpeechBrain has no such option).",
    )
    progress_interval: float = option(
        10, "Seconds between the lines of --progress=plain (SpeechBrain has no such option)."
    )
    ckpt_interval_minutes: float = option(
        15,
        "Minutes between checkpoints within an epoch, with a checkpointer; 0 disables "
        "(SpeechBrain 1.1: 0).",
    )
    ckpt_interval_steps: int = option(
        0, "Steps between checkpoints within an epoch; given, it replaces the minutes."
    )
    shard_eval: bool = option(
        False,
        "In several processes each validates a part of the data: the same numbers, sooner.",
    )
    async_save: bool = option(
        False,
        "Write checkpoints in the background; training waits only while tensors are copied "
        "(SpeechBrain has no such option).",
    )
    grad_accumulation_factor: int = option(1, "Batches whose gradients make one update.")
    optimizer_step_limit: int | None = option(
        None, "Updates after which to stop, with a validation at the end."
    )
    tqdm_colored_bar: bool = option(False, "Colour the progress bar.")
    tqdm_barcolor: dict[str, str] = option(
        {"train": "GREEN", "valid": "MAGENTA", "test": "CYAN"},
        "The bar's colour in each stage.",
        on_command_line=False,
    )
    remove_vector_weight_decay: bool = option(
        False, "No weight decay for vectors, such as biases and norms."
    )
    profile_training: bool = option(False, "Profile training steps.")
    profile_warmup: int = option(5, "Steps before the profile starts.")
    profile_steps: int = option(5, "Steps in the profile.")
    log_config: str | None = option(None, "A YAML file that configures logging.")
    param_file: str = option("", "The HyperPyYAML file.", on_command_line=False)
    overridden_args: frozenset[str] = field(default=frozenset())
    trainer: dict[str, Any] = option(
        {}, "Arguments of Lightning's Trainer, --trainer.devices=2.", on_command_line=False
    )

    @classmethod
    def from_dictionary(cls, args_dict: Mapping[str, Any]) -> RunOptions:
        """Makes options of a plain mapping, each key counting as given.

        Args:
            args_dict: Values by name.

        Returns:
            The options.

        Raises:
            RunOptionError: A key names no option.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for key in args_dict:
            if key not in names:
                raise RunOptionError(unknown("run option", key, names))
        # SpeechBrain's own RunOptions know which of theirs were given.
        given = frozenset(getattr(args_dict, "overridden_args", args_dict))
        given -= {"overridden_args"}
        return cls(**{**args_dict, "overridden_args": given})

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of the options, in the order of their fields."""
        return [f.name for f in dataclasses.fields(cls) if f.name not in RECORDS]

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary with the same keys and values."""
        return dict(self)

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys():
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    def _keys(self) -> list[str]:
        # An empty `trainer` must not overwrite the one in hparams on hparams.update(run_opts).
        records = ["param_file", "overridden_args"] + (["trainer"] if self.trainer else [])
        return self.option_names() + records


def unknown(kind: str, name: str, names: Sequence[str]) -> str:
    """Says that a name is not known, with a guess at what was meant.

    Args:
        kind: What it should have been a name of.
        name: The name.
        names: Those that are known.

    Returns:
        A message.
    """
    close = get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(names)}"
    return f"unknown {kind} {name!r}: {hint}"


# SpeechBrain's own Brain has none of these.
OURS_ALONE = ("async_save", "progress", "progress_interval", "shard_eval")


class Arguments(NamedTuple):
    """What a command line says: see ``parse_arguments``."""

    hparams_file: str
    run_opts: RunOptions
    overrides: str


def parse_arguments(arg_list: Sequence[str] | None = None) -> Arguments:
    """Reads a recipe's command line, as ``speechbrain.parse_arguments``.

    ``--a=b`` and ``--a b`` are the same, and a flag may be given as ``--debug``
    or ``--debug=true``. What names no run option is an override of the YAML
    file; what starts with ``--trainer.`` is an argument of Lightning's Trainer,
    its value read as YAML.

    Args:
        arg_list: The words of the command line; ``sys.argv[1:]`` if not given.

    Returns:
        The hyperparameters file, the run options, and the overrides as YAML
        text for ``load_hyperpyyaml``.
    """
    words = list(sys.argv[1:] if arg_list is None else arg_list)
    trainer, words = split_trainer(words)
    parsed, rest = _parser().parse_known_args(_expand_flags(words))
    given = vars(parsed)
    hparams_file = given.pop("param_file")
    run_opts = RunOptions(
        **given,
        param_file=hparams_file,
        trainer=trainer,
        overridden_args=frozenset(given) | ({"trainer"} if trainer else set()),
    )
    return Arguments(hparams_file, run_opts, _overrides_to_yaml(rest))


def _parser() -> ArgumentParser:
    # Options nobody gives stay out of the result: what is there was given.
    parser = ArgumentParser(
        description="Run a SpeechBrain experiment",
        epilog=f"Arguments of Lightning's Trainer: {TRAINER_HELP} lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("param_file", help="A hyperparameters file in HyperPyYAML.")
    types = get_type_hints(RunOptions)
    for f in dataclasses.fields(RunOptions):
        if f.metadata.get("on_command_line"):
            parser.add_argument(
                f"--{f.name}",
                default=SUPPRESS,
                help=f.metadata["help"],
                **_argument(f.name, types[f.name]),
            )
    return parser


def _argument(name: str, hint: Any) -> dict[str, Any]:
    if hint is bool:
        return {"action": "store_true"}
    if hint == list[str] | None:
        return {"nargs": "*"}
    if name in CHOICES:
        return {"choices": CHOICES[name]}
    return {"type": next(t for t in (int, float, str) if t is hint or hint == t | None)}


def _expand_flags(words: Sequence[str]) -> list[str]:
    """``--debug=true`` becomes ``--debug``, ``--debug=false`` nothing."""
    flags = {f"--{n}" for n, hint in get_type_hints(RunOptions).items() if hint is bool}
    expanded = []
    for word in words:
        name, has_value, value = word.partition("=")
        if name not in flags or not has_value:
            expanded.append(word)
        elif _truth(name, value):
            expanded.append(name)
    return expanded


def _truth(name: str, value: str) -> bool:
    truth = _from_yaml(name, value)
    if not isinstance(truth, bool):
        raise RunOptionError(f"{name}={value}: a flag is true or false, or stands alone")
    return truth


def split_trainer(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Takes ``--trainer.devices=2`` and ``--trainer.devices 2`` out of a command line.

    Args:
        words: The words of the command line.

    Returns:
        Arguments of the Trainer, and the other words.

    Raises:
        RunOptionError: One has no value, or one that is not YAML.
        SystemExit: ``--trainer.help`` is among them, and was shown.
    """
    if TRAINER_HELP in words:
        _show_trainer_help()
    trainer: dict[str, Any] = {}
    rest: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if not word.startswith(TRAINER_PREFIX):
            rest.append(word)
            continue
        name, has_value, value = word.removeprefix(TRAINER_PREFIX).partition("=")
        if not has_value:
            value = next(remaining, "")
        if not name or not value or value.startswith("--"):
            raise RunOptionError(f"{word}: give it a value, as in --trainer.devices=2")
        trainer[name] = _from_yaml(word, value)
    return trainer, rest


def _show_trainer_help() -> NoReturn:
    # Lightning is needed here, and not for a command line.
    from .trainer_arguments import trainer_help

    print(trainer_help())  # noqa: T201
    raise SystemExit(0)


def _from_yaml(word: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RunOptionError(f"{word}: {value!r} is not YAML: {error}") from error


def _overrides_to_yaml(words: Sequence[str]) -> str:
    """``--a=b`` and ``--a b`` become lines ``a: b`` (``RunOptions._convert_to_yaml``)."""
    lines: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            lines.append(f"{name}: {value}".rstrip())
        elif lines:
            lines[-1] += f" {word}"
        else:
            raise RunOptionError(f"{word!r} belongs to no option: overrides are --name=value")
    return "\n".join(lines)
