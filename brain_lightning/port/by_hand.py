"""Finds code of a Brain that run options and Trainer arguments can replace.

If a ``fit_batch`` is SpeechBrain's training step with custom clipping or accumulation, it is
replaced by the equivalent arguments. Other such code stays, and gets a remark.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import libcst as cst
from libcst import matchers

from .instantiation import is_plain
from .uses import Uses

# SpeechBrain's training step, as ast.unparse writes it, with clipping and accumulation.
STEP = re.compile(
    r"""
    (?P<outputs>\w+)\ =\ self\.compute_forward\((?P<batch>\w+),\ [\w.]*Stage\.TRAIN\)\n
    (?P<loss>\w+)\ =\ self\.compute_objectives\(
        (?P=outputs),\ (?P=batch),\ [\w.]*Stage\.TRAIN\)\n
    (?: (?P=loss)\.backward\(\)\n
      | \((?P=loss)\ /\ (?P<factor>[\w.]+)\)\.backward\(\)\n
        if\ self\.step\ %\ (?P=factor)\ ==\ 0:\n )
    (?: \ *[\w.]*clip_grad_norm_\(self\.modules\.parameters\(\),\ (?P<norm>[\w.]+)\)\n )?
    \ *self\.optimizer\.step\(\)\n
    (?P<indent>\ *)self\.optimizer\.zero_grad\(\)\n
    return\ (?P=loss)\.detach\(\)(?:\.cpu\(\))?
    """,
    re.VERBOSE,
)
# Hooks that SpeechBrain's fit_batch calls, and that STEP does not call.
SKIPPED_HOOKS = frozenset({
    "on_fit_batch_start", "on_fit_batch_end", "optimizers_step", "check_gradients",
    "zero_grad", "freeze_optimizers", "check_loss_isfinite", "init_optimizers", "no_sync",
})  # fmt: skip
# If a Brain overrides it, the arguments of the Brain are not known.
CONSTRUCTOR = "__init__"
# Run options in hparams that SpeechBrain's fit_batch reads, and that STEP does not read.
READ_BY_DEFAULT = frozenset({
    "max_grad_norm", "grad_accumulation_factor", "precision", "auto_mix_prec",
    "bfloat16_mix_prec", "nonfinite_patience", "skip_nonfinite_grads", "trainer",
})  # fmt: skip
HPARAMS_PREFIX = "self.hparams."
CLIPS = matchers.Name("clip_grad_norm_") | matchers.Name("clip_grad_value_")
POSITION = matchers.Name("limit") | matchers.Name("current")
ASSIGNS = matchers.Assign(targets=[matchers.AssignTarget(matchers.Name())])
OWN_WINDOW = re.compile(r"self\.step % (?!self\.grad_accumulation_factor\b)")
CLIPPING = (
    "Custom gradient clipping is left unchanged. max_grad_norm and "
    "Trainer(gradient_clip_val=...) have no effect on it."
)
ACCUMULATION = (
    "Custom gradient accumulation is left unchanged. grad_accumulation_factor and "
    "Trainer(accumulate_grad_batches=...) have no effect on it."
)
STOPPING = (
    "A custom change of the epoch counter is left unchanged. To end the training early, use "
    "EpochCounterWithStopper or the Trainer's EarlyStopping."
)
GROUP = "Remove init_process_group, because the Trainer initializes the process group."


class ReplaceableStep(NamedTuple):
    """A ``fit_batch`` that matches ``STEP``, and the YAML arguments that replace it.

    Attributes:
        method: The method.
        clip: ``gradient_clip_val`` of the Trainer, or None if ``max_grad_norm`` sets it.
        factor: ``grad_accumulation_factor``, or None if the YAML file has it already or
            nothing is accumulated.
    """

    method: cst.FunctionDef
    clip: str | None
    factor: str | None


def replaceable_step(
    uses: Uses, tree: ast.Module, hparams: Sequence[Mapping[str, str]]
) -> ReplaceableStep | None:
    """Finds a ``fit_batch`` that arguments can replace with bitwise identical results.

    Args:
        uses: Uses of SpeechBrain in the file.
        tree: Syntax tree of the file.
        hparams: Plain hyperparameters of each YAML file.

    Returns:
        The method and the arguments. None if there is no such method, or if the results may
        differ.
    """
    if not (len(uses.brains) == 1 and hparams and _is_only_brain(uses.brains[0], uses)):
        return None
    methods = {method.name.value: method for method in _methods(uses.brains[0])}
    found = STEP.fullmatch(_body(methods["fit_batch"])) if "fit_batch" in methods else None
    if (
        found is None
        or (SKIPPED_HOOKS | {CONSTRUCTOR}) & methods.keys()
        or bool(found["indent"]) != bool(found["factor"])
    ):
        return None
    norm, factor = found["norm"], found["factor"]
    read = {name.removeprefix(HPARAMS_PREFIX) for name in (norm, factor) if name}
    if not is_plain(tree, uses.brains[0].name.value, READ_BY_DEFAULT | read):
        return None
    for values in hparams:
        if (READ_BY_DEFAULT & values.keys()) - read:
            return None
        if norm and not _is_positive(norm, values, float):
            return None
        if factor and not _is_positive(factor, values, int):
            return None
    # Without clipping in STEP, 0 disables the clipping by the default of max_grad_norm.
    clip = _argument(norm, "max_grad_norm") if norm else "0"
    return ReplaceableStep(
        methods["fit_batch"], clip, _argument(factor, "grad_accumulation_factor")
    )


def _is_only_brain(brain: cst.ClassDef, uses: Uses) -> bool:
    """Returns whether a Brain has no subclass and one base, and reads ``self.hparams``."""
    is_subclassed = brain.name.value in uses.bases
    return len(brain.bases) == 1 and not is_subclassed and HPARAMS_PREFIX in _code(brain)


def remarks(uses: Uses, gone: cst.CSTNode | None) -> Iterator[tuple[int, str]]:
    """Finds custom code that a port leaves unchanged.

    Args:
        uses: Uses of SpeechBrain in the file.
        gone: The method that the port removes, if any.

    Yields:
        Line and text of each remark.
    """
    for brain in uses.brains:
        for method in _methods(brain):
            if method is not gone:
                yield from _remarks_on(method, uses)


def _remarks_on(method: cst.FunctionDef, uses: Uses) -> Iterator[tuple[int, str]]:
    for call in matchers.findall(method, matchers.Call()):
        function = cst.ensure_type(call, cst.Call).func
        code = _code(call)
        if _ends(function, CLIPS) and "self.max_grad_norm" not in code:
            yield uses.line(call), CLIPPING
        if _ends(function, matchers.Name("init_process_group")):
            yield uses.line(call), GROUP
    if method.name.value == "fit_batch":
        yield from ((uses.line(each), ACCUMULATION) for each in _windows(method))
    for each in matchers.findall(
        method, matchers.AssignTarget(matchers.Attribute(attr=POSITION))
    ):
        if "epoch_counter." in _code(each):
            yield uses.line(each), STOPPING


def _windows(method: cst.FunctionDef) -> Iterator[cst.CSTNode]:
    """Yields the custom conditions under which an optimizer steps."""
    assigned = [cst.ensure_type(n, cst.Assign) for n in matchers.findall(method, ASSIGNS)]
    for each in matchers.findall(method, matchers.If()):
        condition = cst.ensure_type(each, cst.If)
        if ".step(" in _code(condition.body):
            test = _code(condition.test)
            # The condition may be assigned before: `should_step = self.step % ... == 0`.
            test += " ".join(
                _code(n.value) for n in assigned if _code(n.targets[0].target) in test
            )
            if OWN_WINDOW.search(test):
                yield condition


def _ends(function: cst.CSTNode, name: matchers.BaseMatcherNode) -> bool:
    return matchers.matches(
        function.attr if isinstance(function, cst.Attribute) else function, name
    )


def _methods(brain: cst.ClassDef) -> list[cst.FunctionDef]:
    return [part for part in brain.body.body if isinstance(part, cst.FunctionDef)]


def _code(node: cst.CSTNode) -> str:
    return cst.Module([]).code_for_node(node)


def _body(method: cst.FunctionDef) -> str:
    """Returns the statements of a method without its docstring, in a normalized form."""
    tree = ast.parse(_code(method.with_changes(leading_lines=[]))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    if tree.decorator_list:
        return ""
    start = 1 if ast.get_docstring(tree) is not None else 0
    return "\n".join(ast.unparse(statement) for statement in tree.body[start:])


def _is_positive(
    name: str, values: Mapping[str, str], number: type[int] | type[float]
) -> bool:
    """Returns whether an argument is known to be a number above 0."""
    text = values.get(name.removeprefix(HPARAMS_PREFIX), "")
    try:
        return number(text if name.startswith(HPARAMS_PREFIX) else name) > 0
    except ValueError:
        return False


def _argument(name: str | None, option: str) -> str | None:
    """Returns an argument as YAML, or None if the hyperparameter is the run option itself."""
    if name is None or name == HPARAMS_PREFIX + option:
        return None
    return (
        f"!ref <{name.removeprefix(HPARAMS_PREFIX)}>"
        if name.startswith(HPARAMS_PREFIX)
        else name
    )
