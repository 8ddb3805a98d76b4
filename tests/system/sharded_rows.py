"""Rows of a recipes.tsv on two processes, in shards against DDP.

``SB_ROOT=CHECKOUT python -m tests.system.sharded_rows RECIPES [ROWS...]``

RECIPES has ``recipes.tsv`` and ``run_recipe.py``. With ``IMPL=brain_lightning:patch`` Brains
are SpeechBrain's own; ``TABLE`` is another table, ``KEEP`` a folder for what is written, and
``FLAGS`` is added to each row: with ``--max_grad_norm=1e9`` no gradient is clipped, by a norm
that adds up shards, and has another last digit than that of whole gradients.

Prints, of each row: the largest difference of a loss, of any stage or batch in either process,
and of a tensor in the checkpoints (relative where they are above 1); whether weights are equal
bit for bit at each end of a stage, and how many different ones there were; and which texts and
sounds differ, hypotheses and train logs among them. Where DDP leaves processes with different
weights, the recipe goes around it, and there is nothing to compare.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

STRATEGIES = ("ddp", "fsdp2")
PROCESSES = 2
TOLERANCE = 1e-6
# In place of flags of a row: one batch in each process is half of its window, and no update.
ADDED = {
    "cv_transformer": "--grad_accumulation_factor=1 --warmup_steps=2 --number_of_epochs=4"
}
# With the time, or the folder, of a run.
OF_A_RUN = ("log.txt", "env.log")
# As a loss is printed that nobody has rounded.
LONG_NUMBER = re.compile(rb"\d+\.\d{6,}")


class WholeWeights:
    """Copies of the parameters of a module, which all processes read.

    Of the memory of a tensor that ``numpy()`` was called on torch cannot let go.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        from brain_lightning.fsdp2.tensors import whole

        for name, tensor in self.module.named_parameters():
            yield name, whole(tensor).clone()

    def named_buffers(self) -> tuple[()]:
        """None: statistics of a batch are of each process, on the CPU."""
        return ()


def worker(recipes: str, strategy: str, folder: str, *words: str) -> None:
    """One process: what ``run_recipe.py`` does, with a strategy, and one folder for all."""
    recorder = load(Path(recipes), "run_recipe")
    substitute, digest = recorder.substitute, recorder.hash_modules

    def substitute_with_strategy(impl: str) -> Any:
        from brain_lightning.protocol import TrainerDefaults

        brain = substitute(impl)
        brain._lightning_defaults = TrainerDefaults({"strategy": strategy})
        return brain

    # What torchrun says of this process is meant.
    recorder.DROP_ENV = ()
    recorder.substitute = substitute_with_strategy
    recorder.hash_modules = lambda modules: digest(modules and WholeWeights(modules))
    recorder.tempfile = SimpleNamespace(mkdtemp=lambda prefix: f"{folder}/output")
    sys.argv = [
        "run_recipe.py", "--keep-output", "--max-seconds", "500",
        "--impl", os.environ.get("IMPL", "brain_lightning"),
        "--out", f"{folder}/rank{os.environ['RANK']}.json", *words,
    ]  # fmt: skip
    if len(words) == 1:
        # An example of SpeechBrain's, which makes no process group.
        torch.distributed.init_process_group("gloo")
    recorder.main()


def load(recipes: Path, name: str) -> ModuleType:
    """One of the scripts."""
    sys.path.insert(0, str(recipes))
    module = __import__(name)
    del sys.path[0]
    return module


def run(recipes: Path, row: dict[str, str], strategy: str, folder: Path) -> list[Any]:
    """Runs a row; what each process recorded."""
    recorder = load(recipes, "run_recipe")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "output").mkdir(parents=True)
    columns = (row["script"], row["hparams"], row["flags"], ADDED.get(row["name"], "-"))
    given = [word for column in columns for word in column.split() if word != "-"]
    if row["hparams"] != "-":
        given += ["--distributed_backend=gloo", *os.environ.get("FLAGS", "").split()]
    # The last of each name: a hyperparameter that is given twice is refused.
    given = list({word.partition("=")[0]: word for word in given}.values())
    words = recorder.fill_in(given, str(folder / "output"), os.environ["SB_ROOT"])
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}", "-m"]
    ended = subprocess.run(
        [
            sys.executable, "-m", *launcher, __spec__.name, "worker",
            recipes, strategy, folder, *words,
        ],
        env=os.environ | recorder.FIXED_ENV, timeout=600, text=True, capture_output=True,
    )  # fmt: skip
    (folder / "stderr").write_text(ended.stderr)
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
    for record in records:
        # An example of SpeechBrain's may not have learned enough, on half of its batches each.
        error = record["exception"]
        if error is not None and error["type"] != "AssertionError":
            raise RuntimeError(f"{strategy}: {error['type']}: {error['message']}")
    if len(records) < PROCESSES:
        raise RuntimeError(f"{strategy}: {ended.stderr}")
    return records


def losses(record: dict[str, Any]) -> list[tuple[Any, float | None]]:
    """All losses, and of what they are."""
    of_stages = [((s["stage"], s["epoch"]), s["stage_loss"]) for s in record["stage_ends"]]
    found = of_stages + record["batch_losses"] + record["evaluate_returns"]
    return [(of, None if loss is None else float(loss)) for of, loss in found]


def difference(first: Any, second: Any) -> float:
    """The largest difference of two numbers or tensors, relative where they are above 1."""
    if first is None or second is None:
        return 0.0 if first is second else float("inf")
    a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (first, second))
    off = (a - b).abs() / a.abs().clamp(min=1)
    return float(off.max()) if off.numel() else 0.0


def files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files by their names, in which a checkpoint has a number rather than its time."""
    checkpoints = sorted(path.name for path in folder.rglob("CKPT+*"))
    names = {name: f"CKPT#{number}" for number, name in enumerate(checkpoints)}
    return {
        "/".join(names.get(part, part) for part in path.relative_to(folder).parts): path
        for path in sorted(folder.rglob("*"))
        if path.suffix in suffixes and path.name not in OF_A_RUN
    }


def weights_off(first: Path, second: Path) -> float:
    """The largest difference of a tensor in the checkpoints that are left."""
    saved = [files(folder, (".ckpt",)) for folder in (first, second)]
    assert saved[0].keys() == saved[1].keys(), saved
    # Counters and schedulers are no archives, and texts.
    trees = [
        [torch.load(p, weights_only=False) for p in each.values() if zipfile.is_zipfile(p)]
        for each in saved
    ]
    values = [[x for x in tree_leaves(t) if isinstance(x, torch.Tensor)] for t in trees]
    assert len(values[0]) == len(values[1])
    return max((difference(a, b) for a, b in zip(*values, strict=True)), default=0.0)


def texts_that_differ(first: Path, second: Path) -> tuple[int, list[str]]:
    """How many texts and sounds there are, and which differ in more than digits of a loss."""
    found = [files(folder, (".txt", ".wav")) for folder in (first, second)]
    names = found[0].keys() | found[1].keys()
    differ = [n for n in sorted(names) if not same_text(*(each.get(n) for each in found))]
    return len(names), differ


def same_text(first: Path | None, second: Path | None) -> bool:
    """Whether two files are equal, byte by byte, but for numbers in full that are close."""
    if first is None or second is None:
        return False
    a, b = first.read_bytes(), second.read_bytes()
    numbers = zip(LONG_NUMBER.findall(a), LONG_NUMBER.findall(b), strict=False)
    close = all(difference(float(x), float(y)) <= TOLERANCE for x, y in numbers)
    return LONG_NUMBER.sub(b"", a) == LONG_NUMBER.sub(b"", b) and close


def compare(recipes: Path, row: dict[str, str], folder: Path) -> bool:
    """Runs a row both ways, prints its line; whether losses are close and texts equal."""
    try:
        runs = [run(recipes, row, strategy, folder / strategy) for strategy in STRATEGIES]
    except RuntimeError as error:
        print(row["name"], "failed", error, sep="\t", flush=True)
        return False
    of_ddp, of_shards = (
        [loss for record in records for loss in losses(record)] for records in runs
    )
    assert [of for of, _ in of_ddp] == [of for of, _ in of_shards]
    off = max(difference(a, b) for (_, a), (_, b) in zip(of_ddp, of_shards, strict=True))
    # By strategy and process.
    weights = [
        [[s["params_sha256"] for s in r["stage_ends"]] for r in records] for records in runs
    ]
    outputs = [folder / strategy / "output" for strategy in STRATEGIES]
    texts, unequal = texts_that_differ(*outputs)
    print(
        row["name"], f"{off:.1e}", f"{weights_off(*outputs):.1e}",
        "equal" if weights[0] == weights[1] else "close", len(set(weights[0][0])),
        "equal" if weights[0][0] == weights[0][1] else "different",
        unequal or f"{texts} equal", sep="\t", flush=True,
    )  # fmt: skip
    return off <= TOLERANCE and not unequal


def main(where: str, *names: str) -> int:
    recipes = Path(where).resolve()
    with open(os.environ.get("TABLE", recipes / "recipes.tsv"), newline="") as table:
        rows = list(csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE))
    print("row\tlosses\tcheckpoint\tweights\tupdated\tprocesses under DDP\ttexts and sounds")
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(os.environ.get("KEEP", folder))
        found = [
            compare(recipes, row, kept / row["name"])
            for row in rows
            if not names or row["name"] in names
        ]
    return 0 if found and all(found) else 1


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        worker(*sys.argv[2:])
    else:
        sys.exit(main(*sys.argv[1:]))
