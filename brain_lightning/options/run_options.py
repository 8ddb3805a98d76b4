"""The run options of an experiment: what each means, and its default.

Names, meanings and defaults are those of ``speechbrain.utils.run_opts``; where
a default differs the field says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from brain_lightning.errors import RunOptionError

PRECISIONS = ("fp32", "fp16", "bf16")
# Options that take one of a few words.
CHOICES = {
    "precision": PRECISIONS,
    "eval_precision": PRECISIONS,
    "progress": ("auto", "bar", "plain"),
}
# SpeechBrain's own Brain has none of these.
OURS_ALONE = ("async_save", "progress", "progress_interval", "shard_eval")
# Fields that are no option of the experiment but a record of how they were given.
RECORDS = ("param_file", "overridden_args", "trainer")


def option(default: Any, help_text: str) -> Any:
    """Declares a field of ``RunOptions`` that ``--name=value`` sets.

    Args:
        default: Its value where nobody gives one.
        help_text: What it does, shown by ``--help``.

    Returns:
        A dataclass field.
    """
    return field(default=default, metadata={"help": help_text})


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
    data_parallel_count: int = -1  # Not supported.
    distributed_backend: str = option("nccl", "nccl, gloo or mpi.")
    distributed_launch: bool = False  # Set by torchrun's environment, never by hand.
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
    # The bar's colour in each stage.
    tqdm_barcolor: dict[str, str] = field(
        default_factory=lambda: {"train": "GREEN", "valid": "MAGENTA", "test": "CYAN"}
    )
    remove_vector_weight_decay: bool = option(
        False, "No weight decay for vectors, such as biases and norms."
    )
    profile_training: bool = option(False, "Profile training steps.")
    profile_warmup: int = option(5, "Steps before the profile starts.")
    profile_steps: int = option(5, "Steps in the profile.")
    log_config: str | None = option(None, "A YAML file that configures logging.")
    # The HyperPyYAML file.
    param_file: str = ""
    overridden_args: frozenset[str] = frozenset()
    # Arguments of Lightning's Trainer, --trainer.devices=2.
    trainer: dict[str, Any] = field(default_factory=dict)

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
        check_names("run option", args_dict, [f.name for f in dataclasses.fields(cls)])
        # SpeechBrain's own RunOptions know which of theirs were given.
        given = frozenset(getattr(args_dict, "overridden_args", args_dict))
        given -= {"overridden_args"}
        return cls(**{**args_dict, "overridden_args": given})

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of the options, in the order of their fields."""
        return [f.name for f in dataclasses.fields(cls) if f.name not in RECORDS]

    @classmethod
    def on_command_line(cls) -> dict[str, str]:
        """The help of each option that ``--name=value`` sets."""
        return {f.name: f.metadata["help"] for f in dataclasses.fields(cls) if f.metadata}

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
        names = [f.name for f in dataclasses.fields(self)]
        return names if self.trainer else [name for name in names if name != "trainer"]


def check_names(kind: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Refuses a name that is not known, with a guess at what was meant.

    Args:
        kind: What each should be a name of.
        names: The names.
        known: Those that there are.

    Raises:
        RunOptionError: One is unknown.
    """
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = (
                f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"
            )
            raise RunOptionError(f"unknown {kind} {name!r}: {hint}")
