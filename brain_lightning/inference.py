"""The part of a recipe's hyperparameters that inference needs."""

from __future__ import annotations

import re

from .errors import RecipeError

PRETRAINER = """
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
{loadables}
"""


def write_inference_yaml(text: str, modules: list[str]) -> str:
    """Cuts a recipe's HyperPyYAML down to its modules, and adds what loads them.

    Data, optimizers, loggers and the like are left out with everything that only
    they refer to.

    Args:
        text: The recipe's file.
        modules: Names of the recoverables that are modules.

    Returns:
        The file for ``from_hparams``: ``modules``, ``pretrainer``, and what they refer to.

    Raises:
        RecipeError: There are no ``modules`` in it, or a recoverable is not named.
    """
    blocks = _blocks(text)
    if "modules" not in blocks:
        raise RecipeError("the hyperparameters have no `modules`, which from_hparams needs")
    recoverables = {name: _reference(name, blocks) for name in modules}
    needed = _needed({"modules", *recoverables.values()}, blocks)
    loadables = "\n".join(f"        {n}: !ref <{key}>" for n, key in recoverables.items())
    kept = "".join(block for name, block in blocks.items() if name in needed)
    return kept + PRETRAINER.format(loadables=loadables)


def _blocks(text: str) -> dict[str, str]:
    """The entries at the top, each with its lines."""
    parts = re.split(r"^(?=[A-Za-z_]\w*\s*:)", text, flags=re.MULTILINE)
    return {part.split(":")[0].strip(): _ended(part) for part in parts if ":" in part}


def _ended(block: str) -> str:
    return block if block.endswith("\n") else f"{block}\n"


def _reference(name: str, blocks: dict[str, str]) -> str:
    """The entry that a recoverable stands for: what the checkpointer says, or its name."""
    said = re.search(
        rf"^\s+{re.escape(name)}\s*:\s*!ref\s*<(\w+)>", blocks.get("checkpointer", ""), re.M
    )
    key = said[1] if said else name
    if key not in blocks:
        raise RecipeError(
            f"the hyperparameters do not say what {name!r} is: name it in `checkpointer`, "
            "recoverables, or have an entry of that name"
        )
    return key


def _needed(names: set[str], blocks: dict[str, str]) -> set[str]:
    found: set[str] = set()
    while names - found:
        found |= names
        used = {ref for name in found for ref in re.findall(r"<(\w+)", blocks.get(name, ""))}
        names = used & blocks.keys()
    return found
