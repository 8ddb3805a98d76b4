"""Declares the run options: their names, meanings and defaults.

Names, meanings and defaults are those of ``speechbrain.utils.run_opts``. The description of
an option says so if its default differs.
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
from brain_lightning.protocol import OPTION_CHOICES

PRECISIONS = ("fp32", "fp16", "bf16")
# Options that accept a fixed set of values.
CHOICES = {
    "precision": PRECISIONS,
    "eval_precision": PRECISIONS,
    **OPTION_CHOICES,
}
# Fields that are not run options. They record what the user passed.
RECORDS = ("param_file", "overridden_args", "trainer")
# Options that --name=value cannot set.
NOT_ON_COMMAND_LINE = ("data_parallel_count", "distributed_launch", "tqdm_barcolor")


def documented(owner: object, section: str) -> dict[str, str]:
    """Returns the description of each argument or attribute in a Google-style docstring.

    Args:
        owner: A class or a function.
        section: ``Args`` or ``Attributes``.

    Returns:
        Descriptions by name, with their line breaks. Empty if Python runs with ``-OO``, which
        removes docstrings.
    """
    text = (inspect.getdoc(owner) or "").partition(f"{section}:\n")[2]
    # Names are indented by four columns and their descriptions by more.
    return dict(re.findall(r"^ {4}(\w+): ?(.+?)(?=^ {0,4}\S|\Z)", text, re.M | re.S))


@dataclass(frozen=True)
class RunOptions(Mapping[str, Any]):
    """Run options: how an experiment is run, as opposed to what the experiment is.

    The object is also a mapping, because recipes call ``hparams.update(run_opts)`` and read
    ``run_opts["device"]``. Every option can be read as a key. Iteration yields only the
    options that were set, so ``update`` does not overwrite other values of the YAML file.
    ``overridden_args`` holds the names of the options that were set. Only these take
    precedence over the same key in ``hparams``. ``--help`` shows the descriptions below.

    Attributes:
        test_only: Skip training and only evaluate.
        debug: Run a few batches of a few epochs to check that the recipe works.
        debug_batches: Number of batches per stage in debug mode.
        debug_epochs: Number of epochs in debug mode.
        debug_persistently: In debug mode, save checkpoints in the recipe's folder instead of
            a temporary one.
        device: Device to run on: cpu, cuda, cuda:1, ... If not set, each process uses its own
            GPU, or the CPU if there is no GPU.
        data_parallel_backend: Not supported. Use --trainer.devices=2 instead.
        data_parallel_count: Not supported.
        distributed_backend: Backend for communication between processes: nccl (GPU), gloo
            (CPU) or mpi.
        distributed_launch: Whether a launcher such as torchrun started this process. Read from
            the environment.
        find_unused_parameters: With several processes, allow parameters that get no gradient
            (DistributedDataParallel's find_unused_parameters).
        jit: Compile all modules with torch.jit.script.
        jit_module_keys: Names of the modules to compile with torch.jit.script.
        compile: Compile all modules with torch.compile.
        compile_module_keys: Names of the modules to compile with torch.compile.
        compile_mode: The mode argument of torch.compile: default, reduce-overhead or
            max-autotune.
        compile_using_fullgraph: Make torch.compile raise an error at a graph break.
        compile_using_dynamic_shape_tracing: Make torch.compile trace with dynamic shapes.
        precision: Precision of training: fp32, fp16 or bf16. fp16 needs a GPU.
        eval_precision: Precision of validation and test: fp32, fp16 or bf16.
        auto_mix_prec: Deprecated. Use --precision=fp16.
        bfloat16_mix_prec: Deprecated. Use --precision=bf16.
        max_grad_norm: Clip the gradient norm of each optimizer to this value. 0 or less
            disables clipping.
        skip_nonfinite_grads: If the gradient of a parameter has NaN or infinite values, drop
            it and update the other parameters. With clipping (max_grad_norm), all gradients
            of its optimizer are dropped.
        nonfinite_patience: Number of batches per epoch that may have a NaN or infinite loss.
            Their updates are skipped. The next such batch ends the run with an error.
        oom_patience: Number of batches per epoch that may run out of memory. All processes
            skip such a batch together. At the next such batch, the run is saved as it was
            before the batch, and ends with an error. If not set, the first such batch ends the
            run. Not an option of SpeechBrain.
        noprogressbar: Show no progress bar.
        progress: How to show progress: bar, plain (one line at a time, for log files) or auto
            (bar in a terminal or a notebook, plain elsewhere). Not an option of SpeechBrain.
        progress_interval: Seconds between two lines of --progress=plain. Not an option of
            SpeechBrain.
        ckpt_interval_minutes: Minutes between checkpoints within an epoch, if the Brain has a
            checkpointer. 0 disables them, which is the default of SpeechBrain 1.1.
        ckpt_interval_steps: Steps between checkpoints within an epoch. 0 disables them. If
            set, it replaces the default of ckpt_interval_minutes.
        shard_eval: With several processes, each process validates a part of the data.
            Validation is faster and its results are the same. Not an option of SpeechBrain.
        async_save: Write checkpoints in the background. Training waits only while tensors are
            copied, and on a GPU not even for that. Not an option of SpeechBrain.
        preflight: Before training, try the longest batches of each set and show the memory and
            the time that they need. Not an option of SpeechBrain.
        grad_accumulation_factor: Number of batches whose gradients are accumulated for one
            optimizer step.
        accumulate_by: What accumulated gradients are averaged over: batches or tokens. With
            tokens, the Brain's loss_weight(batch) returns the number of tokens of a batch.
            Not an option of SpeechBrain.
        optimizer_step_limit: Number of optimizer steps after which to validate and stop.
        tqdm_colored_bar: Color the progress bar.
        tqdm_barcolor: Color of the progress bar by stage.
        remove_vector_weight_decay: Apply no weight decay to vectors, such as biases and the
            weights of normalization layers.
        profile_training: Profile a few training steps with the PyTorch profiler.
        profile_warmup: Number of steps before the profile starts.
        profile_steps: Number of steps in the profile.
        log_config: YAML file that configures logging.
        param_file: Path of the HyperPyYAML file.
        overridden_args: Names of the options that were set.
        trainer: Arguments of Lightning's Trainer, as set by --trainer.devices=2.
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
        """Creates options from a plain mapping. Every key counts as set.

        Args:
            args_dict: Values by name of the option.

        Returns:
            The options.

        Raises:
            RunOptionError: A key is not the name of an option.
        """
        check_names("run option", args_dict, [f.name for f in dataclasses.fields(cls)])
        # SpeechBrain's own RunOptions record which options were set.
        given = frozenset(getattr(args_dict, "overridden_args", args_dict))
        return cls(**{**args_dict, "overridden_args": given - {"overridden_args"}})

    @classmethod
    def option_names(cls) -> list[str]:
        """Returns the names of the options, in the order of their fields."""
        return [f.name for f in dataclasses.fields(cls) if f.name not in RECORDS]

    @classmethod
    def on_command_line(cls) -> dict[str, str]:
        """Returns the help text of each option that ``--name=value`` can set."""
        texts = documented(cls, "Attributes")
        helps = {}
        for each in dataclasses.fields(cls):
            if each.name in cls.option_names() and each.name not in NOT_ON_COMMAND_LINE:
                # Flags are off by default, and None means "not set".
                shown = f" (default: {each.default})" if each.default else ""
                helps[each.name] = " ".join(texts.get(each.name, "").split()) + shown
        return helps

    def as_dict(self) -> dict[str, Any]:
        """Returns every option in a plain dictionary."""
        names = (f.name for f in dataclasses.fields(self))
        # An empty `trainer` must not overwrite the `trainer` of hparams.
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
    """Raises an error that suggests a known name if a name is not known.

    Args:
        kind: What the names refer to, for the message: "run option".
        names: Names to check.
        known: All known names.

    Raises:
        RunOptionError: A name is not known.
    """
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = (
                f"Did you mean {close[0]!r}?" if close else f"Use one of {', '.join(known)}."
            )
            raise RunOptionError(f"unknown {kind} {name!r}. {hint}")
