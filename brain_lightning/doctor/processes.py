"""What keeps a recipe from running in several processes, or in one alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch.nn.parallel import DistributedDataParallel

from .meaning import OF_A_MODULE_DICT
from .method import EntryUse, HparamsCall, Location
from .modules import SPEECHBRAINS
from .remark import DDP, ONE_DEVICE, Remark, remark
from .source import BrainSource, RecipeSource

OF_A_MODULE = frozenset(dir(torch.nn.Module())) | {"device"}
OF_A_WRAPPER = frozenset(dir(DistributedDataParallel)) | {"module", "[]", ""}
# What every module has, and means something else of a wrapper: its names begin with "module.".
WITH_OTHER_NAMES = frozenset(
    {"state_dict", "load_state_dict", "get_submodule", "get_parameter", "get_buffer",
     "children", "named_children"}
)  # fmt: skip
SHOWN = 4
UNWRAP = "Use getattr(entry, 'module', entry)"
# What reads and changes of an entry come to where it is in a wrapper.
WRAPPED = "DistributedDataParallel, which an entry of modules with trainable parameters is in,"
OF_WRAPPERS: dict[str, Callable[[EntryUse], bool]] = {
    WRAPPED + f" has no attribute of it: {{}}. {UNWRAP}": lambda use: (
        use.attribute not in OF_A_MODULE | OF_A_WRAPPER
    ),
    WRAPPED + f" has another attribute of this name, or is no sequence: {{}}. {UNWRAP}": (
        lambda use: use.attribute in OF_A_WRAPPER - OF_A_MODULE - {"module"}
    ),
    WRAPPED + f" begins all names with 'module.': {{}}. {UNWRAP}": (
        lambda use: use.attribute in WITH_OTHER_NAMES
    ),
    WRAPPED + f" is set, and not the module in it: {{}}. {UNWRAP}": (
        lambda use: use.how == "set" and use.attribute in OF_A_MODULE
    ),
}


def process_remarks(brain: BrainSource, source: RecipeSource) -> Iterator[Remark]:
    """What a Brain does that its processes do not stand.

    Args:
        brain: The Brain.
        source: The recipe that it belongs to.

    Yields:
        Remarks.
    """
    if brain.is_own("on_fit_start") and "_wrap_distributed" not in brain.reads:
        says = "gradients would not be averaged: call self._wrap_distributed() in on_fit_start"
        yield remark(DDP, says, brain.methods["on_fit_start"])
    yield from _hparams_remarks(brain, source)
    yield from _wrapper_remarks(brain)
    yield from _group_remarks(brain, source)


def unread_functions(brain: BrainSource) -> list[str]:
    """Functions that are given the Brain or its modules, and are in no file.

    Args:
        brain: The Brain.

    Returns:
        Each once, with its line.
    """
    found = ((h.function, h.at) for method in brain.every() for h in method.unread
             if method.name != "__init__" and h.processes != "one")  # fmt: skip
    return [f"{name or 'a function'} ({at})" for name, at in dict(found).items()]


def depends_on_hparams(brain: BrainSource, source: RecipeSource) -> bool:
    """Whether it takes the hyperparameters to say that a Brain calls its modules in wrappers.

    Args:
        brain: The Brain.
        source: The recipe that it belongs to.

    Returns:
        True where it calls something in ``self.hparams`` that may be an entry of ``modules``.
    """
    return _entries(source) is None and bool(_computing(brain))


def _entries(source: RecipeSource) -> dict[str, str] | None:
    """Names in hparams that are in an entry of modules; None where that is not known."""
    hparams = source.hparams
    return None if hparams is None or hparams.modules is None else hparams.parts


def _computing(brain: BrainSource) -> list[HparamsCall]:
    """Calls that may compute what is learned from: a factory is given nothing."""
    return [
        call for call in brain.hparams_calls
        if (call.arguments and not call.method) or call.method == "forward"
    ]  # fmt: skip


def _hparams_remarks(brain: BrainSource, source: RecipeSource) -> Iterator[Remark]:
    parts = _entries(source)
    # A part of an entry may do by a method what its forward does not.
    calls = [c for c in brain.hparams_calls if c.method not in OF_A_MODULE - {"forward"}]
    found = [call for call in calls if call.is_entry or call.name in (parts or {})]
    if found:
        first = min(found, key=lambda call: call.at)
        listed = _listed([(call.text, call.at) for call in found])
        says = (
            f"gradients of what can be trained in modules would not be averaged: {listed}. "
            f"Call self.modules.{(parts or {}).get(first.name, first.name)}, for what is "
            "called in hparams has no wrapper"
        )
        yield remark(DDP, says, first.at)
    computing = _computing(brain)
    if parts is None and not found and computing and not brain.entries - OF_A_MODULE_DICT:
        names = list(dict.fromkeys(call.name for call in computing))
        more = f" or {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        listed = ", ".join(names[:SHOWN]) + more
        says = (
            f"gradients would not be averaged if hparams.{listed} is one of modules: call "
            f"self.modules.{names[0]}, for what is called in hparams has no wrapper"
        )
        yield remark(DDP, says, computing[0].at)


def _wrapper_remarks(brain: BrainSource) -> Iterator[Remark]:
    uses = [use for use in brain.entry_uses if use.processes != "one"]
    bare = [use for use in uses if use.how in ("read", "set")]
    for says, applies in OF_WRAPPERS.items():
        yield from _about_uses(DDP, says, filter(applies, bare))
    says = "an entry of modules that is replaced has no wrapper any more: {}"
    yield from _about_uses(DDP, says, (use for use in uses if use.how == "replace"))
    learning = {use.at for method in brain.learning for use in method.entry_uses}
    around = [use for use in uses if use.how == "around" and use.at in learning]
    says = (
        "gradients are averaged only if the entry of modules itself is called in the same "
        "step, and not what is in its wrapper: {}"
    )
    yield from _about_uses(
        DDP, says, (u for u in around if u.learns and u.attribute not in OF_A_MODULE)
    )
    kept = [use for use in uses if use.how == "kept" and use.at in learning and use.learns]
    says = (
        "gradients would not be averaged, for __init__ keeps an entry of modules before it is "
        "in its wrapper: {}. Read it from self.modules"
    )
    yield from _about_uses(
        DDP, says, (u for u in kept if u.attribute not in OF_A_MODULE - {"forward"})
    )
    says = "there is no wrapper in one process, and no .module: {}"
    alone = [u for u in bare if u.attribute == "module" and u.processes != "several"]
    yield from _about_uses(ONE_DEVICE, says, alone)


def _about_uses(about: str, says: str, uses: Iterable[EntryUse]) -> Iterator[Remark]:
    """One remark on all uses of a kind, in the order of their lines."""
    found = [(use.text, use.at) for use in uses]
    if found:
        yield remark(about, says.format(_listed(found)), min(at for _, at in found))


def _listed(found: Iterable[tuple[str, Location]]) -> str:
    """Texts and their lines, each text once, in the order of their lines."""
    ordered = sorted(found, key=lambda pair: pair[1])
    first = ordered[0][1]
    texts: dict[str, Location] = {}
    for text, at in ordered:
        texts.setdefault(text, at)
    shown = [_with_line(text, at, first) for text, at in list(texts.items())[:SHOWN]]
    rest = len(texts) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _with_line(text: str, at: Location, first: Location) -> str:
    if at == first:
        return text
    return f"{text} (line {at.line})" if at.file == first.file else f"{text} ({at})"


def _group_remarks(brain: BrainSource, source: RecipeSource) -> Iterator[Remark]:
    group = next((p for n, p in source.called.items() if n.endswith("ddp_init_group")), None)
    if group is not None and brain.base != SPEECHBRAINS:
        says = (
            "python train.py --trainer.devices=2 would wait for ever at SpeechBrain's "
            "ddp_init_group: leave it out, or start the processes by torchrun or "
            "brain-lightning run"
        )
        yield remark("devices", says, group)
