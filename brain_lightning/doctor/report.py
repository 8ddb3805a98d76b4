"""The report on each Brain of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from brain_lightning.brain.brain import Brain
from brain_lightning.protocol import MANUAL_HOOKS

from .loops import has_custom_fit, loop_remarks
from .method import Location
from .processes import (
    depends_on_hparams,
    methods_to_name,
    process_remarks,
    unread_functions,
)
from .remark import ARGUMENTS, DDP, FSDP2, ONE_DEVICE, Remark
from .source import BrainSource, RecipeSource
from .updates import old_api_remarks, update_remarks

HOOKS = frozenset(
    name for name in dir(Brain) if callable(getattr(Brain, name)) and not name.startswith("__")
)
# Attributes of SpeechBrain's Brain that show how a recipe steps.
STEPPING = ("scaler", "training_ctx", "no_sync", "optimizers_step", "check_gradients", "fit")
CALLS = ("backward", "clip_grad_norm_")
PARALLEL = "ddp (one DistributedDataParallel per entry of modules)"
SHARDED = "fsdp2 (shards each entry of modules, for models larger than one device)"
IF_NAMED = ", with FSDP2Strategy(methods={})"
IF_NO_PART = (
    ", if no object of hparams that the Brain calls is part of an entry of modules (to check "
    "this, run doctor SCRIPT HPARAMS)"
)
IF_NO_ENTRY = (
    ", if no object of hparams that the Brain calls is an entry of modules (to check this, "
    "run doctor SCRIPT HPARAMS)"
)
IF_CALLED = (
    ", if these functions, which get self or modules, use weights only by calling entries: {}"
)
IF_READ = (
    ", if these functions, which get self or modules, read no attribute of an entry that its "
    "wrapper lacks: {}"
)


@dataclass(frozen=True)
class BrainReport:
    """The report on one Brain of a recipe.

    Attributes:
        name: Name of the class.
        line: First line of the class.
        base: ``SpeechBrain's Brain`` or ``brain_lightning's Brain``.
        overrides: Hooks that it overrides, with their locations.
        updates: ``automatic`` or ``manual``.
        why: Reason for ``updates``.
        uses: Other attributes and methods of Brain that it uses, with their locations.
        strategies: Strategies that it supports.
        arguments: Trainer arguments that work as Lightning documents them.
        remarks: Problems, the most important first.
        callbacks_refused: Lightning's callbacks that raise ``UnsupportedError`` with it.
        file: File that contains the class.
    """

    name: str
    line: int
    base: str
    overrides: dict[str, str]
    updates: str
    why: str
    uses: dict[str, list[str]]
    strategies: list[str]
    arguments: list[str]
    remarks: list[Remark]
    callbacks_refused: list[str]
    file: str


@dataclass(frozen=True)
class Report:
    """The report on a recipe.

    Attributes:
        script: Path of the script.
        brains: One report for each Brain in the script, or that it imports, or that HPARAMS
            names.
        not_found: Names that it imports as Brains and whose file was not found, with lines.
        not_examined: Classes with such a name as a base, with their lines.
    """

    script: str
    brains: list[BrainReport]
    not_found: dict[str, int]
    not_examined: dict[str, int]


def examine(script: str, hparams: str | None = None) -> Report:
    """Reads a script and the files of its Brains, and reports what works with them.

    Args:
        script: Path of the script.
        hparams: Path of its hyperparameters file, which may name Brains and has the entries
            of ``modules``.

    Returns:
        The report.

    Raises:
        RecipeError: A file cannot be read, or is not valid Python or YAML.
    """
    source = RecipeSource(script, hparams)
    brains = [_examine(brain, source) for brain in source.brains]
    return Report(script, brains, source.not_found, source.not_examined)


def _examine(brain: BrainSource, source: RecipeSource) -> BrainReport:
    overrides = {name: str(at) for name, at in brain.methods.items() if name in HOOKS}
    manual = [hook for hook in MANUAL_HOOKS if hook in overrides]
    remarks = list(_remarks(brain, source))
    limited = {name for remark in remarks for name in remark.limits}
    parallel = PARALLEL + (IF_NO_ENTRY if depends_on_hparams(brain, source) else "")
    if unread := unread_functions(brain):
        parallel += IF_READ.format(", ".join(unread))
    strategies = {ONE_DEVICE: ONE_DEVICE, DDP: parallel, FSDP2: _sharded(brain, source)}
    return BrainReport(
        name=brain.name,
        line=brain.location.line,
        base=brain.base,
        overrides=overrides,
        updates="manual" if manual else "automatic",
        why=_why(overrides),
        uses={name: [str(at) for at in sorted({*lines})] for name, lines in _uses(brain)},
        strategies=[text for name, text in strategies.items() if name not in limited],
        arguments=[name for name in ARGUMENTS if name not in limited],
        remarks=remarks,
        callbacks_refused=["GradientAccumulationScheduler"] if manual else [],
        file=brain.location.file,
    )


def _sharded(brain: BrainSource, source: RecipeSource) -> str:
    """Returns the text on ``fsdp2``, with the conditions under which it works."""
    text = SHARDED
    if methods := methods_to_name(brain, source):
        text += IF_NAMED.format(methods)
    if depends_on_hparams(brain, source):
        text += IF_NO_PART
    if unread := unread_functions(brain):
        text += IF_CALLED.format(", ".join(unread))
    return text


def _why(overrides: dict[str, str]) -> str:
    why = [f"{h} is overridden ({overrides[h]})" for h in MANUAL_HOOKS if h in overrides]
    return " and ".join(why) or "neither fit_batch nor optimizers_step is overridden"


def _remarks(brain: BrainSource, source: RecipeSource) -> Iterator[Remark]:
    yield from loop_remarks(brain)
    if not has_custom_fit(brain):
        yield from process_remarks(brain, source)
        yield from [] if brain.is_replaced("_fit_train") else update_remarks(brain)
    yield from old_api_remarks(brain)


def _uses(brain: BrainSource) -> Iterator[tuple[str, list[Location]]]:
    yield from ((f"self.{n}", brain.reads[n]) for n in STEPPING if n in brain.reads)
    for owner, found in (("self", brain.reads), ("super()", brain.supers)):
        private = [name for name in found if name in HOOKS and name.startswith("_")]
        yield from ((f"{owner}.{name} (private)", found[name]) for name in private)
    if brain.unwraps:
        yield ".module", brain.unwraps
    yield from ((f"{n}()", brain.calls[n]) for n in CALLS if n in brain.calls)
