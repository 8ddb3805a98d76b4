"""Checks what prevents a recipe from running in several processes, or in a single one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch.nn.parallel import DistributedDataParallel

from brain_lightning.fsdp2.methods import METHODS

from .meaning import MODULE_DICT_ATTRIBUTES
from .method import EntryUse, HparamsCall, Location
from .modules import SPEECHBRAIN
from .remark import DDP, FSDP2, ONE_DEVICE, Remark, remark
from .source import BrainSource, RecipeSource

MODULE_ATTRIBUTES = frozenset(dir(torch.nn.Module())) | {"device"}
WRAPPER_ATTRIBUTES = frozenset(dir(DistributedDataParallel)) | {"module", "[]", ""}
# Attributes of modules that give other names on a wrapper, which adds the prefix "module.".
PREFIXED_NAMES = frozenset(
    {"state_dict", "load_state_dict", "get_submodule", "get_parameter", "get_buffer",
     "children", "named_children"}
)  # fmt: skip
OPTIMIZERS = {
    name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)
} | {"opt_class"}
SHOWN = 4
UNWRAP = "Use getattr(entry, 'module', entry)."
# Remarks on reads and changes of an entry that is wrapped, and the uses that each is about.
WRAPPED = "DistributedDataParallel wraps each entry of modules with trainable parameters"
WRAPPER_REMARKS: dict[str, Callable[[EntryUse], bool]] = {
    WRAPPED + f", and lacks the attributes of the entry: {{}}. {UNWRAP}": lambda use: (
        use.attribute not in MODULE_ATTRIBUTES | WRAPPER_ATTRIBUTES
    ),
    WRAPPED
    + f". It has another attribute of this name, or is not a sequence: {{}}. {UNWRAP}": (
        lambda use: use.attribute in WRAPPER_ATTRIBUTES - MODULE_ATTRIBUTES - {"module"}
    ),
    WRAPPED + f", and prefixes all names with 'module.': {{}}. {UNWRAP}": (
        lambda use: use.attribute in PREFIXED_NAMES
    ),
    WRAPPED + f". The attribute is set on the wrapper only: {{}}. {UNWRAP}": (
        lambda use: use.how == "set" and use.attribute in MODULE_ATTRIBUTES
    ),
}


def process_remarks(brain: BrainSource, source: RecipeSource) -> Iterator[Remark]:
    """Checks what fails if a Brain runs in several processes.

    Args:
        brain: The Brain.
        source: The recipe that it belongs to.

    Yields:
        Remarks.
    """
    if brain.is_replaced("on_fit_start") and "_wrap_distributed" not in brain.reads:
        says = "Gradients are not averaged. Call self._wrap_distributed() in on_fit_start."
        yield remark(DDP, says, brain.methods["on_fit_start"], DDP, FSDP2)
    yield from _hparams_remarks(brain, source)
    yield from _wrapper_remarks(brain)
    yield from _shard_remarks(brain, source)
    yield from _group_remarks(brain, source)


def unread_functions(brain: BrainSource) -> list[str]:
    """Returns the functions that get the Brain or its modules, and whose file was not found.

    Args:
        brain: The Brain.

    Returns:
        Each function once, with its line.
    """
    found = ((h.function, h.at) for method in brain.every() for h in method.unread
             if method.name != "__init__" and h.processes != "one")  # fmt: skip
    return [f"{name or 'a function'} ({at})" for name, at in dict(found).items()]


def depends_on_hparams(brain: BrainSource, source: RecipeSource) -> bool:
    """Returns whether the hyperparameters file decides if a Brain bypasses wrappers.

    Args:
        brain: The Brain.
        source: The recipe that it belongs to.

    Returns:
        True if the Brain calls an object of ``self.hparams`` that may be an entry of
        ``modules``, and the entries are not known.
    """
    return _entries(source) is None and bool(_computing(brain))


def _entries(source: RecipeSource) -> dict[str, str] | None:
    """Returns the hparams that are part of an entry of modules, or None if not known."""
    hparams = source.hparams
    return None if hparams is None or hparams.modules is None else hparams.parts


def _computing(brain: BrainSource) -> list[HparamsCall]:
    """Returns the calls that may compute the loss. A call without arguments is a factory."""
    return [
        call for call in brain.hparams_calls
        if (call.arguments and not call.method) or call.method == "forward"
    ]  # fmt: skip


def _hparams_remarks(brain: BrainSource, source: RecipeSource) -> Iterator[Remark]:
    parts = _entries(source)
    # A method of a part may compute something that its entry's forward does not compute.
    calls = [c for c in brain.hparams_calls if c.method not in MODULE_ATTRIBUTES - {"forward"}]
    found = [call for call in calls if call.is_entry or call.name in (parts or {})]
    if found:
        first = min(found, key=lambda call: call.at)
        listed = _listed([(call.text, call.at) for call in found])
        says = (
            f"Gradients of entries of modules are not averaged, because self.hparams bypasses "
            f"their wrappers: {listed}. Call "
            f"self.modules.{(parts or {}).get(first.name, first.name)}."
        )
        yield remark(DDP, says, first.at)
    computing = _computing(brain)
    if (
        parts is None
        and not found
        and computing
        and not brain.entries - MODULE_DICT_ATTRIBUTES
    ):
        names = list(dict.fromkeys(call.name for call in computing))
        more = f" or {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        listed = " or ".join(names[:SHOWN]) + more
        says = (
            f"Gradients are not averaged if hparams.{listed} is an entry of modules, because "
            f"self.hparams bypasses its wrapper. Call self.modules.{names[0]}."
        )
        yield remark(DDP, says, computing[0].at)


def _wrapper_remarks(brain: BrainSource) -> Iterator[Remark]:
    uses = [use for use in brain.entry_uses if use.processes != "one"]
    bare = [use for use in uses if use.how in ("read", "set")]
    for says, applies in WRAPPER_REMARKS.items():
        yield from _about_uses(DDP, says, filter(applies, bare))
    says = "An entry of modules that is replaced has no wrapper any more: {}."
    yield from _about_uses(DDP, says, (use for use in uses if use.how == "replace"))
    says = "An entry of modules that is replaced is not sharded: {}."
    yield from _about_uses(FSDP2, says, (use for use in uses if use.how == "replace"))
    learning = {use.at for method in brain.learning for use in method.entry_uses}
    around = [use for use in uses if use.how == "around" and use.at in learning]
    says = (
        "This call bypasses the wrapper of an entry of modules: {}. Gradients are averaged "
        "only if the same step also calls the entry itself."
    )
    yield from _about_uses(
        DDP, says, (u for u in around if u.learns and u.attribute not in MODULE_ATTRIBUTES)
    )
    kept = [use for use in uses if use.how == "kept" and use.at in learning and use.learns]
    says = (
        "Gradients are not averaged, because __init__ stores an entry of modules before it is "
        "wrapped: {}. Read the entry from self.modules."
    )
    yield from _about_uses(
        DDP, says, (u for u in kept if u.attribute not in MODULE_ATTRIBUTES - {"forward"})
    )
    says = "In a single process an entry has no wrapper, and no attribute .module: {}."
    alone = [u for u in bare if u.attribute == "module" and u.processes != "several"]
    yield from _about_uses(ONE_DEVICE, says, alone)


def methods_to_name(brain: BrainSource, source: RecipeSource) -> list[str]:
    """Returns the methods of entries that may need ``FSDP2Strategy(methods=...)``.

    These are methods that a training step calls, and that are not in its defaults.

    Args:
        brain: The Brain.
        source: The recipe that it belongs to.

    Returns:
        Names of the methods.
    """
    return sorted({name for name, _, _ in _methods(brain, source)})


def _methods(brain: BrainSource, source: RecipeSource) -> Iterator[tuple[str, str, Location]]:
    known = MODULE_ATTRIBUTES | {*METHODS, "", "[]"}
    for use in _part_calls(brain):
        if "." not in use.attribute and use.attribute not in known:
            yield use.attribute, use.text, use.at
    hparams = source.hparams
    entries = set() if hparams is None else hparams.parts.keys() - hparams.inner
    for call in brain.hparams_calls:
        if call.name in entries and "." not in call.method and call.method not in known:
            yield call.method, call.text, call.at


def _part_calls(brain: BrainSource) -> list[EntryUse]:
    """Returns the calls of methods and parts of entries in the training step."""
    learning = {use.at for method in brain.learning for use in method.entry_uses}
    return [
        use for use in brain.entry_uses
        if use.how == "part" and use.learns and use.at in learning and use.processes != "one"
    ]  # fmt: skip


def _shard_remarks(brain: BrainSource, source: RecipeSource) -> Iterator[Remark]:
    """Checks what fails if the modules of a Brain are sharded."""
    if methods := list(_methods(brain, source)):
        listed = _listed([(text, at) for _, text, at in methods])
        says = (
            f"Weights are gathered for forward, but not for {listed}. If the method uses "
            f"weights, set FSDP2Strategy(methods={methods_to_name(brain, source)})."
        )
        at = min(at for _, _, at in methods)
        yield Remark(FSDP2, says, at.line, at.file)
    parts = [(use.text, use.at) for use in _part_calls(brain) if _is_of_a_part(use.attribute)]
    inner = set() if source.hparams is None else source.hparams.inner
    parts += [(call.text, call.at) for call in _computing(brain) if call.name in inner]
    yield from _about_shards(
        "Weights of a submodule are gathered while its entry of modules is called, but not "
        "for {}. Set FSDP2Strategy(blocks=[...]) to its class, or make it an entry.", parts,
    )  # fmt: skip
    after = [method for method in brain.every() if method.name != "__init__"]
    yield from _about_shards(
        "Collecting a state is a collective operation. The run hangs if only the main process "
        "calls {}. Call it on all ranks.", (each for m in after for each in m.on_main),
    )  # fmt: skip
    copies = [h for m in after for h in m.handovers if h.function.endswith("deepcopy")]
    yield from _about_shards(
        "A sharded module cannot be copied: {}. Copy it in __init__.",
        ((f"{h.function}({', '.join(h.given.values())})", h.at) for h in copies),
    )
    hooks = brain.calls.get("register_comm_hook", [])
    says = "{} is not supported."
    yield from _about_shards(says, (("register_comm_hook", at) for at in hooks))
    yield from _optimizer_remarks(brain, source)


def _is_of_a_part(path: str) -> bool:
    *owners, name = path.split(".")
    return path == "[]" or (bool(owners) and name not in MODULE_ATTRIBUTES - {"forward"})


def _optimizer_remarks(brain: BrainSource, source: RecipeSource) -> Iterator[Remark]:
    early = [method for method in brain.every() if method.name == "__init__"]
    found = [
        (name, at) for method in early for name, places in method.calls.items()
        for at in places if name in OPTIMIZERS
    ]  # fmt: skip
    hparams = source.hparams
    if hparams is not None:
        file = source.show(hparams.path)
        found += [(name, Location(file, at)) for name, at in hparams.optimizers.items()]
    yield from _about_shards(
        "An optimizer that is created before the modules are sharded is not supported: {}. "
        "Create it in init_optimizers.", found,
    )  # fmt: skip


def _about_shards(says: str, found: Iterable[tuple[str, Location]]) -> Iterator[Remark]:
    if found := list(found):
        yield remark(FSDP2, says.format(_listed(found)), min(at for _, at in found))


def _about_uses(about: str, says: str, uses: Iterable[EntryUse]) -> Iterator[Remark]:
    """Yields one remark on all uses of a kind, in the order of their lines."""
    found = [(use.text, use.at) for use in uses]
    if found:
        yield remark(about, says.format(_listed(found)), min(at for _, at in found))


def _listed(found: Iterable[tuple[str, Location]]) -> str:
    """Returns texts with their lines, each text once, in the order of their lines."""
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
    if group is not None and brain.base != SPEECHBRAIN:
        says = (
            "python train.py --trainer.devices=2 hangs at SpeechBrain's ddp_init_group. "
            "Remove the call, or start the processes with torchrun or brain-lightning run."
        )
        yield remark("devices", says, group)
