"""What a Brain does by hand that run options and a Trainer do for others.

A ``fit_batch`` that is SpeechBrain's own step, written out with a clipping or an accumulation
of its own, is replaced by arguments that say the same. Everything else stays, and is named.
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

# The step of SpeechBrain's fit_batch, as ast.unparse writes it; what clips it, and how often.
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
# Hooks that SpeechBrain's fit_batch calls, and this one does not.
SKIPPED_HOOKS = frozenset({
    "on_fit_batch_start", "on_fit_batch_end", "optimizers_step", "check_gradients",
    "zero_grad", "freeze_optimizers", "check_loss_isfinite", "init_optimizers", "no_sync",
})  # fmt: skip
# With one of its own nobody knows what a Brain is given.
CONSTRUCTOR = "__init__"
# Run options among hyperparameters, which SpeechBrain's fit_batch reads and this one does not.
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
    "clips gradients by hand, which stays: max_grad_norm and Trainer(gradient_clip_val=...) "
    "do not change it"
)
ACCUMULATION = (
    "accumulates gradients by hand, which stays: grad_accumulation_factor and "
    "Trainer(accumulate_grad_batches=...) do not change it"
)
STOPPING = (
    "moves the epoch counter by hand, which stays: EpochCounterWithStopper or the Trainer's "
    "EarlyStopping would end the training"
)
GROUP = "init_process_group: take it out, for the Trainer starts the process group"


class WrittenOut(NamedTuple):
    """A ``fit_batch`` that is SpeechBrain's, and what takes its place in the YAML file.

    Attributes:
        method: The method.
        clip: ``gradient_clip_val`` of the Trainer, or None where a run option says it.
        factor: ``grad_accumulation_factor``, or None where it is there or nothing is
            accumulated.
    """

    method: cst.FunctionDef
    clip: str | None
    factor: str | None


def written_out_step(
    uses: Uses, tree: ast.Module, hparams: Sequence[Mapping[str, str]]
) -> WrittenOut | None:
    """Finds a ``fit_batch`` that a Trainer's arguments replace, with the same numbers.

    Args:
        uses: What was found in the file.
        tree: The file.
        hparams: The plain hyperparameters of each YAML file.

    Returns:
        None where there is none, or where the numbers may be others.
    """
    if not (len(uses.brains) == 1 and hparams and _stands_alone(uses.brains[0], uses)):
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
    # Nothing is clipped by hand: the default of max_grad_norm would clip.
    clip = _argument(norm, "max_grad_norm") if norm else "0"
    return WrittenOut(
        methods["fit_batch"], clip, _argument(factor, "grad_accumulation_factor")
    )


def _stands_alone(brain: cst.ClassDef, uses: Uses) -> bool:
    """Whether a Brain is no part of another and has hyperparameters to read them from."""
    is_subclassed = brain.name.value in uses.bases
    return len(brain.bases) == 1 and not is_subclassed and HPARAMS_PREFIX in _code(brain)


def remarks(uses: Uses, gone: cst.CSTNode | None) -> Iterator[tuple[int, str]]:
    """Names what stays.

    Args:
        uses: What was found in the file.
        gone: The method that does not stay.

    Returns:
        Lines, and what is done by hand there.
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
    """The conditions of its own on which an optimizer steps."""
    assigned = [cst.ensure_type(n, cst.Assign) for n in matchers.findall(method, ASSIGNS)]
    for each in matchers.findall(method, matchers.If()):
        condition = cst.ensure_type(each, cst.If)
        if ".step(" in _code(condition.body):
            test = _code(condition.test)
            # `should_step = self.step % ... == 0` comes first.
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
    """Its statements without a docstring, in one way of writing them."""
    tree = ast.parse(_code(method.with_changes(leading_lines=[]))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    if tree.decorator_list:
        return ""
    start = 1 if ast.get_docstring(tree) is not None else 0
    return "\n".join(ast.unparse(statement) for statement in tree.body[start:])


def _is_positive(
    name: str, values: Mapping[str, str], number: type[int] | type[float]
) -> bool:
    """Whether an argument is known to be a number above 0."""
    text = values.get(name.removeprefix(HPARAMS_PREFIX), "")
    try:
        return number(text if name.startswith(HPARAMS_PREFIX) else name) > 0
    except ValueError:
        return False


def _argument(name: str | None, option: str) -> str | None:
    """As it is written in YAML; None where the hyperparameter is the run option itself."""
    if name is None or name == HPARAMS_PREFIX + option:
        return None
    return (
        f"!ref <{name.removeprefix(HPARAMS_PREFIX)}>"
        if name.startswith(HPARAMS_PREFIX)
        else name
    )
