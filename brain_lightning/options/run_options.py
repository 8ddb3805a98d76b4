"""The run options of an experiment: what each means, and its default.

Names, meanings and defaults are those of ``speechbrain.utils.run_opts``; where
a default differs the field says so.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from brain_lightning.errors import RunOptionError
from brain_lightning.protocol import WORDS

PRECISIONS = ("fp32", "fp16", "bf16")
# Options that take one of a few words.
CHOICES = {
    "precision": PRECISIONS,
    "eval_precision": PRECISIONS,
    **WORDS,
}
# Fields that are no option of the experiment but a record of how they were given.
RECORDS = ("param_file", "overridden_args", "trainer")
# Options that --name=value does not set.
NOT_ON_COMMAND_LINE = ("data_parallel_count", "distributed_launch", "tqdm_barcolor")


def documented(owner: object, section: str) -> dict[str, str]:
    """What a docstring in Google style says of each argument or attribute.

    Args:
        owner: A class or a function.
        section: ``Args`` or ``Attributes``.

    Returns:
        Texts by name, with their line breaks; none where Python has stripped the docstrings.
    """
    text = (inspect.getdoc(owner) or "").partition(f"{section}:\n")[2]
    # Names are indented by four columns, their descriptions by more.
    return dict(re.findall(r"^ {4}(\w+): ?(.+?)(?=^ {0,4}\S|\Z)", text, re.M | re.S))


@dataclass(frozen=True)
class RunOptions(Mapping[str, Any]):
    """How to run an experiment, apart from what the experiment is.

    Also a mapping, for recipes do ``hparams.update(run_opts)`` and
    ``run_opts["device"]``: it has every option, and yields those that were given, so that
    what the YAML file sets stays. An option counts as given where ``overridden_args``
    names it; only then it outranks the same key in ``hparams``. What ``--help``
    shows are the texts below.

    Attributes:
        test_only: Skip training; only evaluate.
        debug: Run a few batches of a few epochs to see whether it runs.
        debug_batches: Batches per stage in debug mode.
        debug_epochs: The epoch after which debug mode stops.
        debug_persistently: In debug mode keep checkpoints where they belong, not in a
            temporary folder.
        device: cpu, cuda, cuda:1… (default: this rank's GPU where there is one, else the CPU)
        data_parallel_backend: Not supported: see --trainer.devices.
        data_parallel_count: Not supported.
        distributed_backend: nccl, gloo or mpi.
        distributed_launch: Set by torchrun's environment, never by hand.
        find_unused_parameters: Let distributed training look for parameters that got no
            gradient.
        jit: Compile all modules with torch.jit.script.
        jit_module_keys: The modules to compile with jit.
        compile: Compile all modules with torch.compile.
        compile_module_keys: The modules to compile with torch.compile.
        compile_mode: default, reduce-overhead or max-autotune.
        compile_using_fullgraph: Refuse graph breaks when compiling.
        compile_using_dynamic_shape_tracing: Trace with dynamic shapes when compiling.
        precision: Training precision: fp32, fp16 or bf16.
        eval_precision: Validation and test precision: fp32, fp16 or bf16.
        auto_mix_prec: Deprecated: --precision=fp16.
        bfloat16_mix_prec: Deprecated: --precision=bf16.
        max_grad_norm: Clip each optimizer's gradient norm to this value; 0 or less disables.
        skip_nonfinite_grads: Drop the gradients that are not finite, parameter by parameter.
        nonfinite_patience: Non-finite losses to forgive per epoch; their updates are skipped.
        oom_patience: Batches to skip in an epoch for want of memory, on all processes
            together; the next one ends the run, which is saved before it and resumes exactly.
            Without it the first one ends the run (SpeechBrain has no such option).
        noprogressbar: Show no progress bar.
        progress: bar, or plain: whole lines, for log files; auto: a bar in a terminal or a
            notebook, lines elsewhere (SpeechBrain has no such option).
        progress_interval: Seconds between the lines of --progress=plain (SpeechBrain has no
            such option).
        ckpt_interval_minutes: Minutes between checkpoints within an epoch, with a
            checkpointer; 0 disables (SpeechBrain 1.1: 0).
        ckpt_interval_steps: Steps between checkpoints within an epoch; given, it replaces the
            minutes.
        shard_eval: In several processes each validates a part of the data: the same numbers,
            sooner.
        async_save: Write checkpoints in the background; training waits only while tensors are
            copied, and on a GPU not even then (SpeechBrain has no such option).
        preflight: Try the longest batches of each set before training, and show the memory and
            the seconds that they take (SpeechBrain has no such option).
        grad_accumulation_factor: Batches whose gradients make one update.
        accumulate_by: What gradients are the mean over: batches, or tokens, of which the
            Brain's loss_weight(batch) says how many a batch has (SpeechBrain has no such
            option).
        optimizer_step_limit: Updates after which to stop, with a validation at the end.
        tqdm_colored_bar: Colour the progress bar.
        tqdm_barcolor: The bar's colour in each stage.
        remove_vector_weight_decay: No weight decay for vectors, such as biases and norms.
        profile_training: Profile training steps.
        profile_warmup: Steps before the profile starts.
        profile_steps: Steps in the profile.
        log_config: A YAML file that configures logging.
        param_file: The HyperPyYAML file.
        overridden_args: Names of the options that were given.
        trainer: Arguments of Lightning's Trainer, --trainer.devices=2.
    """

    test_only: bool = False
    debug: bool = False
    debug_batches: int = 2
    debug_epochs: int = 2
    debug_persistently: bool = False
    device: str | None = None
    data_parallel_backend: bool = False
    data_parallel_count: int = -1
    distributed_backend: str = "nccl"
    distributed_launch: bool = False
    find_unused_parameters: bool = False
    jit: bool = False
    jit_module_keys: list[str] | None = None
    compile: bool = False
    compile_module_keys: list[str] | None = None
    compile_mode: str = "default"
    compile_using_fullgraph: bool = False
    compile_using_dynamic_shape_tracing: bool = False
    precision: str = "fp32"
    eval_precision: str = "fp32"
    auto_mix_prec: bool = False
    bfloat16_mix_prec: bool = False
    max_grad_norm: float = 5.0
    skip_nonfinite_grads: bool = False
    nonfinite_patience: int = 3
    oom_patience: int | None = None
    noprogressbar: bool = False
    progress: str = "auto"
    progress_interval: float = 10
    ckpt_interval_minutes: float = 15
    ckpt_interval_steps: int = 0
    shard_eval: bool = False
    async_save: bool = False
    preflight: bool = False
    grad_accumulation_factor: int = 1
    accumulate_by: str = "batches"
    optimizer_step_limit: int | None = None
    tqdm_colored_bar: bool = False
    tqdm_barcolor: dict[str, str] = field(
        default_factory=lambda: {"train": "GREEN", "valid": "MAGENTA", "test": "CYAN"}
    )
    remove_vector_weight_decay: bool = False
    profile_training: bool = False
    profile_warmup: int = 5
    profile_steps: int = 5
    log_config: str | None = None
    param_file: str = ""
    overridden_args: frozenset[str] = frozenset()
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
        return cls(**{**args_dict, "overridden_args": given - {"overridden_args"}})

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of the options, in the order of their fields."""
        return [f.name for f in dataclasses.fields(cls) if f.name not in RECORDS]

    @classmethod
    def on_command_line(cls) -> dict[str, str]:
        """The help of each option that ``--name=value`` sets."""
        names = [name for name in cls.option_names() if name not in NOT_ON_COMMAND_LINE]
        texts = documented(cls, "Attributes")
        return {name: " ".join(texts.get(name, "").split()) for name in names}

    def as_dict(self) -> dict[str, Any]:
        """A plain dictionary of every option."""
        names = (f.name for f in dataclasses.fields(self))
        # An empty `trainer` must not overwrite the one in hparams.
        return {n: getattr(self, n) for n in names if n != "trainer" or self.trainer}

    def __getitem__(self, key: str) -> Any:
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        names = (f.name for f in dataclasses.fields(self))
        return (name for name in names if name in self.overridden_args)

    def __len__(self) -> int:
        return sum(1 for _ in self)


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
