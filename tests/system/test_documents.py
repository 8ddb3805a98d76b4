"""Every code block of every Markdown file does what it says: see documents.py."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import brain_lightning
from brain_lightning import Brain
from brain_lightning.compat.versions import SHARDS
from tests.support.documents import (
    OUTPUT,
    ROOT,
    SHELL,
    Block,
    Scratch,
    before,
    blocks_of,
    documents,
    is_excerpt,
    missing,
    table,
    trains,
)
from tests.support.processes import check_python
from tests.support.upstream import SPEECHBRAIN

PORTING = ROOT / "examples" / "porting"
BLOCKS = [block for document in documents() for block in blocks_of(document)]
# Excerpts are not run. The commands of the same document run their files.
EXCERPTS = [block for block in BLOCKS if block.source]
# What a block has in it that cannot run here, and why.
CANNOT_RUN = {
    "python3 -m venv": "makes an environment: .ci/run runs this very line",
}
if not SHARDS:
    FSDP2 = ("python memory.py", "strategy=fsdp2", "FSDP2Strategy")
    CANNOT_RUN |= dict.fromkeys(FSDP2, "FSDP2 needs torch 2.8")
if SPEECHBRAIN < "1.1" and not torch.cuda.is_available():
    UNEDITED = ("before/train.py", "porting/before", "results/before", "results/unedited")
    CANNOT_RUN |= dict.fromkeys(UNEDITED, "SpeechBrain 1.0 takes cuda:0, also without a GPU")


def of(*languages: str) -> Any:
    found = [b for b in BLOCKS if b.language in languages and b not in EXCERPTS]
    return pytest.mark.parametrize("block", found, ids=str)


def skip_what_cannot_run(block: Block) -> None:
    for text, reason in CANNOT_RUN.items():
        if text in block.text:
            pytest.skip(f"{block}: {reason}")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Scratch:
    return Scratch(tmp_path_factory.mktemp("scratch"))


def run(scratch: Scratch, block: Block) -> str:
    for each in (*before(block), block):
        if not any(text in each.text for text in CANNOT_RUN):
            done = scratch.run(each)
    assert done.returncode == 0, f"{block}\n{done.stdout}"
    return done.stdout


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    # test_layout.py reads the tree and the way of a batch.
    tested = {"python", "yaml", "diff", "tree", "batch", *SHELL, *OUTPUT}
    assert {block.language for block in BLOCKS} <= tested
    for text in CANNOT_RUN:
        assert any(text in block.text for block in BLOCKS), f"{text!r} is in no block any more"


@of("python")
def test_python_runs(block: Block) -> None:
    with warnings.catch_warnings():
        # Lightning advises about workers and loggers, as it would any reader.
        warnings.simplefilter("ignore")
        code = compile("\n" * block.line + block.text, block.document, "exec")
        exec(code, {"__name__": "document"})  # noqa: S102


@pytest.mark.parametrize("block", EXCERPTS, ids=str)
def test_an_excerpt_is_of_its_file(block: Block) -> None:
    assert block.source is not None
    assert is_excerpt(block.text, block.source.read_text())


def test_an_excerpt_may_leave_lines_out_where_it_says_so() -> None:
    code = 'def f():\n    """Does."""\n    a()\n    b()\n\n    c()\n'
    for shown in ("def f():\n    a()\n", "    a()\n    ...\n    c()\n", "    b()\n    c()\n"):
        assert is_excerpt(f"# f.py\n{shown}", code)
    for shown in ("def f():\n    b()\n", "    a()\n    c()\n", "    c()\n...\n    b()\n"):
        assert not is_excerpt(f"# f.py\n{shown}", code)


@of(*SHELL)
def test_a_shell_block_runs(block: Block, scratch: Scratch) -> None:
    skip_what_cannot_run(block)
    run(scratch, block)


@of(*OUTPUT)
def test_an_output_is_that_of_the_command_above_it(block: Block, scratch: Scratch) -> None:
    command = before(block)[-1]
    skip_what_cannot_run(command)
    real = run(scratch, command)
    assert not missing(block.text, real), f"{block}\n{real}"


def test_an_output_may_differ_in_its_numbers_alone() -> None:
    real = "epoch  1  loss 0.5\nepoch  2  loss 4.0e-02\nequal ef86bb20\n"
    assert not missing("epoch 8 loss 1.2\n...\nequal 064740ce", real)
    assert missing("equal 064740ce\nepoch 8 loss 1.2", real) == ["epoch # loss #"]
    assert missing("epoch 8 error 1.2", real) == ["epoch # error #"]


# They leave threads, and variables of the environment, behind.
SERVICES = {
    "WandbLogger": {"WANDB_MODE": "offline"}, "MLFlowLogger": {}, "FSDP2Strategy": {}
}  # fmt: skip


@of("yaml")
def test_yaml_is_of_a_brain_that_trains(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_what_cannot_run(block)
    for service, environment in SERVICES.items():
        if service in block.text:
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            code = (
                "import sys; from tests.support.documents import trains; trains(*sys.argv[1:])"
            )
            check_python("-c", code, block.text, ".", cwd=tmp_path)
            return
    trains(block.text, str(tmp_path))


@of("diff")
def test_a_diff_is_the_real_one(block: Block) -> None:
    names = re.match(r"--- (\S+)\n\+\+\+ (\S+)\n", block.text)
    if names is None:
        for sign in "-+":
            lines = (line for line in block.text.splitlines() if line[:1] in ("", " ", sign))
            compile("\n".join(line[1:] for line in lines), str(block), "exec")
        return
    sides = [
        (block.document.parent / name).read_text().splitlines(keepends=True)
        for name in names.groups()
    ]
    assert block.text == "".join(difflib.unified_diff(*sides, *names.groups(), n=1))


def test_the_ported_recipe_learns_the_same_bits(scratch: Scratch) -> None:
    shell = [b for b in blocks_of(PORTING / "README.md") if b.language in SHELL]
    compared = next(
        block
        for block in shell
        if "cmp results/before" in block.text and "results/after" in block.text
    )
    skip_what_cannot_run(compared)
    run(scratch, compared)
    learned = []
    for side in ("before", "after"):
        save = scratch.folder / "examples" / "porting" / "results" / side / "save"
        last = max(save.glob("CKPT*"))
        files = [last / f"{name}.ckpt" for name in ("encoder", "classifier", "optimizer")]
        learned.append([torch.load(file, weights_only=True) for file in files])
    theirs, ours = (list(tensors_in(states)) for states in learned)
    assert len(theirs) > 10
    assert all(torch.equal(one, other) for one, other in zip(theirs, ours, strict=True))


def tensors_in(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (dict, list)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors_in(value)


# --------------------------------------------------------------------------- tables


def rows(first: str) -> list[list[str]]:
    found = [row for document in documents() for row in table(document.read_text(), first)]
    assert len(found) > 10, f"no table begins with {first!r}"
    return found


def test_every_feature_names_its_test() -> None:
    for row in rows("Brain feature"):
        named = re.search(r"`(tests/[\w/]+\.py)`", row[-1])
        assert named, row
        assert (ROOT / named[1]).exists(), row


def test_every_trainer_argument_is_one_and_is_tested() -> None:
    others = (
        path for path in Path(__file__).parents[1].rglob("test_*.py") if path != Path(__file__)
    )
    tests = "".join(path.read_text() for path in others)
    known = [*inspect.signature(Trainer).parameters, *dir(Trainer)]
    for arguments, _ in rows("Trainer argument"):
        for name in re.findall(r"`(\w+)[^`]*`", arguments):
            assert name in known, name
            assert name in tests, name


def test_every_hook_is_one() -> None:
    for brain_side, lightning_side, *_ in rows("Brain method"):
        for name in re.findall(r"`(\w+)[^`]*`", brain_side):
            assert hasattr(Brain, name), name
        for name in re.findall(r"`(\w+)`", lightning_side):
            assert hasattr(LightningModule, name) or hasattr(Callback, name), name


def test_every_message_is_one_of_ours() -> None:
    said = set(messages())
    shown = [re.sub(r"\\(.)", r"\1", row[0].strip("`")) for row in rows("Message")]
    unknown = [text for text in shown if not is_among(text, said)]
    assert not unknown, "\n".join(unknown)


def test_an_ellipsis_stands_for_any_text() -> None:
    messages = {"modules[…] has no shape yet. Pass … to it."}
    assert is_among("… has no shape yet. ", messages)
    assert is_among("modules[…] has no shape yet. Pass …", messages)
    assert not is_among("… has no shape … now", messages)


def is_among(shown: str, messages: set[str]) -> bool:
    """Whether a message contains ``shown``, in which … stands for any text."""
    pieces = [re.escape(piece) for piece in shown.split("…")]
    pattern, longest = re.compile(".*".join(pieces)), max(shown.split("…"), key=len)
    return any(longest in message and pattern.search(message) for message in messages)


def messages() -> Iterator[str]:
    """Every text of the package, with … for what is filled in."""
    for path in Path(brain_lightning.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.JoinedStr, ast.Constant)):
                text = "".join(parts(node))
                yield re.sub(r"%[.\d]*[rsdf]", "…", text)


def parts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        for value in node.values:
            yield from parts(value)
    elif isinstance(node, ast.FormattedValue):
        yield "…"
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
