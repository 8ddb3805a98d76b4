"""Ports a HyperPyYAML file: tags are replaced where they stand, all else is left as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from brain_lightning.errors import RecipeError

from .equivalents import IN_YAML

TAG = re.compile(r"(new|name|apply):(.+)")


def port_yaml(text: str, path: str) -> str:
    """Replaces classes of SpeechBrain's by ours.

    Args:
        text: The file's text.
        path: The file, for an error.

    Returns:
        The text with other tags, and not one more change.

    Raises:
        RecipeError: It is no YAML.
    """
    # From the end: what was found keeps its place.
    for start, end, tag in reversed(list(_tags(text, path))):
        found = TAG.fullmatch(tag)
        if found and found[2] in IN_YAML:
            text = f"{text[:start]}!{found[1]}:{IN_YAML[found[2]]}{text[end:]}"
    return text


def included_files(text: str, path: str) -> list[str]:
    """The files that ``!include:`` names, relative to this one.

    Args:
        text: The file's text.
        path: The file, for an error.

    Returns:
        Their paths as they are written.

    Raises:
        RecipeError: It is no YAML.
    """
    tags = [tag for _, _, tag in _tags(text, path)]
    return [tag.removeprefix("include:") for tag in tags if tag.startswith("include:")]


def named_objects(text: str, path: str) -> list[tuple[int, str]]:
    """What of Python's a file makes, names or calls.

    Args:
        text: The file's text.
        path: The file, for an error.

    Returns:
        The line of each tag, and the dotted name in it.

    Raises:
        RecipeError: It is no YAML.
    """
    return [
        (text.count("\n", 0, start) + 1, found[2])
        for start, _, tag in _tags(text, path)
        if (found := TAG.fullmatch(tag))
    ]


def plain_values(text: str, path: str) -> dict[str, str]:
    """The hyperparameters of a file.

    Args:
        text: The file's text.
        path: The file, for an error.

    Returns:
        What each one is, as it is written; nothing for what is no plain value.

    Raises:
        RecipeError: It is no YAML.
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
    """Adds what a Trainer and a run option do in the place of a ``fit_batch``.

    Args:
        text: The file's text.
        clip: ``gradient_clip_val`` of the Trainer, as YAML.
        factor: ``grad_accumulation_factor``, as YAML.

    Returns:
        The text, with lines at its end.
    """
    lines = [] if factor is None else [f"grad_accumulation_factor: {factor}"]
    lines += [] if clip is None else ["trainer:", f"    gradient_clip_val: {clip}"]
    if not lines:
        return text
    line_end = "\r\n" if "\r\n" in text else "\n"
    end = "" if text.endswith("\n") else line_end
    return line_end.join([f"{text}{end}", *lines, ""])


def _tags(text: str, path: str) -> Iterator[tuple[int, int, str]]:
    """Each tag: where it begins, where it ends, and what follows its ``!``."""
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.TagToken):
                yield token.start_mark.index, token.end_mark.index, token.value[1]
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: {error}") from error
