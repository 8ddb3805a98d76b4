"""Ports a HyperPyYAML file: replaces tags in place, and leaves all other text unchanged."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from brain_lightning.errors import RecipeError

from .equivalents import IN_YAML

TAG = re.compile(r"(new|name|apply):(.+)")


def port_yaml(text: str, path: str) -> str:
    """Replaces classes of SpeechBrain by those of brain_lightning.

    Args:
        text: Text of the file.
        path: Path of the file, for error messages.

    Returns:
        The text with replaced tags and no other change.

    Raises:
        RecipeError: The text is not valid YAML.
    """
    # In reverse order, so that the positions of earlier tags stay valid.
    for start, end, tag in reversed(list(_tags(text, path))):
        found = TAG.fullmatch(tag)
        if found and found[2] in IN_YAML:
            text = f"{text[:start]}!{found[1]}:{IN_YAML[found[2]]}{text[end:]}"
    return text


def included_files(text: str, path: str) -> list[str]:
    """Returns the files that ``!include:`` names.

    Args:
        text: Text of the file.
        path: Path of the file, for error messages.

    Returns:
        Paths as written in the file, relative to its folder.

    Raises:
        RecipeError: The text is not valid YAML.
    """
    tags = [tag for _, _, tag in _tags(text, path)]
    return [tag.removeprefix("include:") for tag in tags if tag.startswith("include:")]


def named_objects(text: str, path: str) -> list[tuple[int, str]]:
    """Returns the Python objects that a file creates, names or calls.

    Args:
        text: Text of the file.
        path: Path of the file, for error messages.

    Returns:
        The line of each tag, and the full name in it.

    Raises:
        RecipeError: The text is not valid YAML.
    """
    return [
        (text.count("\n", 0, start) + 1, found[2])
        for start, _, tag in _tags(text, path)
        if (found := TAG.fullmatch(tag))
    ]


def plain_values(text: str, path: str) -> dict[str, str]:
    """Returns the hyperparameters of a file.

    Args:
        text: Text of the file.
        path: Path of the file, for error messages.

    Returns:
        The value of each key as written in the file, empty if it is not a plain value.

    Raises:
        RecipeError: The text is not valid YAML.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: {error}") from error
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return {
        key.value: value.value if isinstance(value, yaml.ScalarNode) else ""
        for key, value in pairs
    }


def with_step(text: str, clip: str | None, factor: str | None) -> str:
    """Adds the arguments that replace a ``fit_batch``.

    Args:
        text: Text of the file.
        clip: ``gradient_clip_val`` of the Trainer as YAML, or None.
        factor: ``grad_accumulation_factor`` as YAML, or None.

    Returns:
        The text with the arguments at its end.
    """
    lines = [] if factor is None else [f"grad_accumulation_factor: {factor}"]
    lines += [] if clip is None else ["trainer:", f"    gradient_clip_val: {clip}"]
    if not lines:
        return text
    line_end = "\r\n" if "\r\n" in text else "\n"
    end = "" if text.endswith("\n") else line_end
    return line_end.join([f"{text}{end}", *lines, ""])


def _tags(text: str, path: str) -> Iterator[tuple[int, int, str]]:
    """Yields the start and the end of each tag, and the text after its ``!``."""
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.TagToken):
                yield token.start_mark.index, token.end_mark.index, token.value[1]
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: {error}") from error
