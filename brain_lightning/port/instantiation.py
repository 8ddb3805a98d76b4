"""Checks how a script creates its Brain, which decides whether its step can be replaced."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator

# The positional arguments of Brain, and the methods of a dict that change it.
ARGUMENTS = ("modules", "opt_class", "hparams", "run_opts", "checkpointer")
CHANGES = frozenset({"update", "pop", "popitem", "setdefault", "clear", "__setitem__"})
# Attributes of a Brain with which a script can change the training step.
STEP_ATTRIBUTES = frozenset({"optimizer", "fit_batch", "hparams"})


def is_plain(tree: ast.Module, brain: str, read: Collection[str]) -> bool:
    """Returns whether a Brain has one optimizer of all its modules, and unchanged hparams.

    Args:
        tree: Syntax tree of the script.
        brain: Name of the Brain class.
        read: Hyperparameters and run options that the script must not change after loading.

    Returns:
        False if this does not hold, or is not known.
    """
    nodes = list(ast.walk(tree))
    calls = [n for n in nodes if isinstance(n, ast.Call) and _name(n.func) == brain]
    uses = [n for n in nodes if isinstance(n, ast.Name) and n.id == brain]
    return (
        bool(calls)
        and len(calls) == len(uses)
        and not any(_sets(node, {*read, *STEP_ATTRIBUTES}) for node in nodes)
        and all(_is_plain_call(call, tree) for call in calls)
    )


def _sets(node: ast.AST, names: Collection[str]) -> bool:
    """Returns whether a node sets or deletes an attribute or a key of one of the names."""
    match node:
        case ast.Call(func=ast.Name(id="setattr" | "delattr" | "vars")):
            return True
        case ast.Attribute(attr=name, ctx=ast.Store() | ast.Del()):
            return name in names
        case ast.Subscript(slice=ast.Constant(value=key), ctx=ast.Store() | ast.Del()):
            return key in names
    return False


def _is_plain_call(call: ast.Call, tree: ast.Module) -> bool:
    if any(isinstance(n, ast.Starred) for n in call.args):
        return False
    given = dict(zip(ARGUMENTS, call.args, strict=False))
    given |= {keyword.arg or "**": keyword.value for keyword in call.keywords}
    if given.keys() - set(ARGUMENTS):
        return False
    hparams, run_opts = _name(given.get("hparams")), given.get("run_opts")
    around = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)
              and any(each is call for each in ast.walk(n))]  # fmt: skip
    arguments = {n.arg for each in around for n in ast.walk(each) if isinstance(n, ast.arg)}
    return (
        _takes_all(given.get("opt_class"), hparams)
        and not arguments & {hparams, _name(run_opts)}
        and _is_loaded(tree, hparams, "load_hyperpyyaml")
        and (run_opts is None or _is_loaded(tree, _name(run_opts), "parse_arguments"))
    )


def _takes_all(opt_class: ast.expr | None, hparams: str) -> bool:
    """Returns whether an optimizer is created with all parameters that Brain passes to it."""
    match opt_class:
        case ast.Subscript(value=ast.Name(id=name)):
            return name == hparams
        case ast.Attribute():
            return ast.unparse(opt_class).startswith("torch.optim.")
        case ast.Lambda(
            args=ast.arguments(args=[ast.arg(arg=given)]),
            body=ast.Call(args=[ast.Name(id=first), *_]) as body,
        ):
            others = [n for n in ast.walk(body) if _name(n) == given]
            return first == given and len(others) == 1
    return False


def _is_loaded(tree: ast.Module, name: str, function: str) -> bool:
    """Returns whether a name holds the result of a function, changed only by literal keys."""
    given = {
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store)
    }
    if not given or given - {*_assigned(tree, function)}:
        return False
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=it), attr=method)):
                is_changed = it == name and method in CHANGES
            case ast.Subscript(value=ast.Name(id=it), ctx=ast.Store() | ast.Del(), slice=key):
                is_changed = it == name and not isinstance(key, ast.Constant)
            case _:
                is_changed = False
        if is_changed:
            return False
    return True


def _assigned(tree: ast.Module, function: str) -> Iterator[ast.AST]:
    """Yields the targets to which a function's result is assigned."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign(
                targets=[target],
                value=ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called)),
            ) if called == function:
                yield from ast.walk(target)


def _name(node: ast.AST | None) -> str:
    return node.id if isinstance(node, ast.Name) else ""
