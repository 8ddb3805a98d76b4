"""What works with each Brain of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from brain_lightning.brain.brain import Brain
from brain_lightning.protocol import MANUAL_HOOKS

from .loops import is_whole, loop_remarks
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
# Attributes of SpeechBrain's Brain whose use shows how a recipe steps.
STEPPING = ("scaler", "training_ctx", "no_sync", "optimizers_step", "check_gradients", "fit")
CALLS = ("backward", "clip_grad_norm_")
PARALLEL = "ddp (each entry of modules in its own DistributedDataParallel)"
SHARDED = "fsdp2 (each entry of modules in shards, for models larger than one device)"
IF_NAMED = ", with FSDP2Strategy(methods={})"
IF_NO_PART = (
    ", if nothing that it calls in hparams is a part of one of modules (doctor SCRIPT HPARAMS "
    "looks)"
)
IF_NO_ENTRY = (
    ", if nothing that it calls in hparams is one of modules (doctor SCRIPT HPARAMS looks)"
)
IF_CALLED = ", if what is given self or modules uses weights by calling entries alone: {}"
IF_READ = ", if what is given self or modules uses nothing that a wrapper lacks: {}"


@dataclass(frozen=True)
class BrainReport:
    """What works with one Brain of a recipe.

    Attributes:
        name: Its class.
        line: Where it begins.
        base: What it is a Brain of.
        overrides: Its hooks, and where they are.
        updates: ``automatic`` or ``manual``.
        why: Why so.
        uses: What else it touches of a Brain, and on which lines.
        strategies: Those that run it.
        arguments: Arguments of the Trainer that work as Lightning documents them.
        remarks: What does not work, what matters most first.
        callbacks_refused: Lightning's callbacks that it cannot have.
        file: The file that it is in.
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
    """What works with a recipe.

    Attributes:
        script: The script.
        brains: One report for each Brain in it, that it imports or that HPARAMS names.
        not_found: What it imports as a Brain and is in no file, and the line of each.
        not_examined: Its classes that are based on that, and the line of each.
    """

    script: str
    brains: list[BrainReport]
    not_found: dict[str, int]
    not_examined: dict[str, int]


def examine(script: str, hparams: str | None = None) -> Report:
    """Reads a script, and the files that its Brains come from.

    Args:
        script: The script.
        hparams: Its hyperparameters file: it may name Brains, and says what is in ``modules``.

    Returns:
        What works with it.

    Raises:
        RecipeError: A file cannot be read, or is no Python or YAML.
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
    """What it takes to shard its modules."""
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
    if not is_whole(brain):
        yield from process_remarks(brain, source)
        yield from [] if brain.is_own("_fit_train") else update_remarks(brain)
    yield from old_api_remarks(brain)


def _uses(brain: BrainSource) -> Iterator[tuple[str, list[Location]]]:
    yield from ((f"self.{n}", brain.reads[n]) for n in STEPPING if n in brain.reads)
    for owner, found in (("self", brain.reads), ("super()", brain.supers)):
        private = [name for name in found if name in HOOKS and name.startswith("_")]
        yield from ((f"{owner}.{name} (private)", found[name]) for name in private)
    if brain.unwraps:
        yield ".module", brain.unwraps
    yield from ((f"{n}()", brain.calls[n]) for n in CALLS if n in brain.calls)
