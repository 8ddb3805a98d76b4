"""Checks what doctor says of recipes against their text, by other means than doctor's own.

``python -m tests.system.doctor_advice FOLDER`` runs doctor over every script in a folder that
has a Brain, alone and with each hyperparameters file. It looks up each line that is cited, and
for each thing that is called safe whatever in the source speaks against that. Where doctor
reads syntax trees, this reads text, line by line, so that the two are not wrong together.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from brain_lightning.doctor import examine
from brain_lightning.doctor.processes import MODULE_ATTRIBUTES
from brain_lightning.doctor.report import BrainReport
from brain_lightning.fsdp2.methods import METHODS

CLASS = re.compile(r"^class (\w+)\(([^)]*)\)\s*:", re.MULTILINE)
METHOD = re.compile(r"^(?:    @.*\n)*    (?:async )?def (\w+)", re.MULTILINE)
BRAIN = re.compile(r"^class \w+\([^)]*Brain\b[^)]*\)\s*:", re.MULTILINE)
ENTRY = r"self\.modules(?:\.\w+|\[[^\]\n]+\])"
IMPORT = re.compile(r"^from (\.*[\w.]*) import ([^(\n]+|\([^)]*\))", re.MULTILINE)
IMPORTED = re.compile(r"^from \w+ import .*Brain", re.MULTILINE)
WRAPPER_ASKED = re.compile(r"hasattr\([^)]*module|DistributedDataParallel|distributed_launch")
_folder = tempfile.TemporaryDirectory()
_wrapper: list[DistributedDataParallel] = []
# Loops, and some of the arguments that do not reach into one that is written anew.
REACHES = {
    "fit": {"max_epochs", "min_epochs", "max_steps", "max_time", "check_val_every_n_epoch"},
    "_fit_train": {"max_steps", "limit_train_batches", "precision"},
    "_fit_valid": {"limit_val_batches"},
    "evaluate": {"limit_test_batches"},
}


class Source:
    """The text of one Brain and of its bases, found by regular expressions.

    Args:
        path: The file that it is in.
        name: Its class.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.lines: list[tuple[Path, int, str]] = []
        self.defined: dict[str, str] = {}
        self.base = ""
        self._read(path, name, set())

    @property
    def text(self) -> str:
        return "\n".join(line for _, _, line in self.lines)

    def _read(self, path: Path, name: str, seen: set[tuple[Path, str]]) -> None:
        text = path.read_text(encoding="utf-8")
        found = next((m for m in CLASS.finditer(text) if m[1] == name), None)
        if found is None or (path, name) in seen:
            return
        seen.add((path, name))
        start = text[: found.start()].count("\n")
        body = text.splitlines()[start:]
        ends = [i for i, line in enumerate(body) if i and re.match(r"[^\s#)]", line)]
        body = body[: ends[0] if ends else None]
        own = _without_docstrings(body)
        self.lines += [(path, start + 1 + i, line) for i, line in enumerate(own)]
        whole = "\n".join(own)
        methods = list(METHOD.finditer(whole))
        ends = [*(method.start() for method in methods[1:]), len(whole)]
        for method, end in zip(methods, ends, strict=True):
            self.defined.setdefault(method[1], whole[method.start() : end])
        for base in re.findall(r"[\w.]+", found[2]):
            self._read_base(path, text, base, seen)

    def _read_base(
        self, path: Path, text: str, base: str, seen: set[tuple[Path, str]]
    ) -> None:
        last = base.rpartition(".")[2]
        if last == "Brain":
            self.base = "lightning" if "brain_lightning" in text else "speechbrain"
            return
        self._read(path, last, seen)
        for module, names in IMPORT.findall(text):
            beside = path.resolve().parent / (module.lstrip(".").replace(".", "/") + ".py")
            if re.search(rf"\b{last}\b", names) and beside.is_file():
                self._read(beside, last, seen)


def _without_docstrings(lines: list[str]) -> list[str]:
    """Lines as they were, those of docstrings and comments empty."""
    text = "\n".join(lines)
    blank = re.compile(r'^\s*[rf]?"""(?:.|\n)*?"""|^\s*#.*$|  #.*$', re.MULTILINE)
    return blank.sub(lambda found: "\n" * found[0].count("\n"), text).splitlines()


@dataclass(frozen=True)
class Contradiction:
    """What doctor says, and what the source says."""

    script: str
    brain: str
    claim: str
    seen: str


def check(
    script: Path, hparams: Path | None = None
) -> tuple[Counter[str], list[Contradiction]]:
    """Checks all that doctor says of a script.

    Args:
        script: The script.
        hparams: Its hyperparameters file.

    Returns:
        How many claims of each kind there were, and those that the source contradicts.
    """
    report = examine(str(script), None if hparams is None else str(hparams))
    counts, wrong = Counter[str](), []
    text = script.read_text(encoding="utf-8")
    names = [found[1] for found in CLASS.finditer(text) if BRAIN.match(found[0])]
    for name in names:
        counts["brains"] += 1
        if name not in [brain.name for brain in report.brains]:
            wrong.append(
                Contradiction(str(script), name, "no such Brain", "class in the text")
            )
    for brain in report.brains:
        for kind, claim, contradicted in claims(script, brain, hparams):
            counts[kind] += 1
            if contradicted:
                wrong.append(Contradiction(str(script), brain.name, claim, contradicted))
    return counts, wrong


def claims(
    script: Path, brain: BrainReport, hparams: Path | None = None
) -> Iterator[tuple[str, str, str]]:
    """Everything that a report claims.

    Args:
        script: The script.
        brain: What doctor says of one of its Brains.
        hparams: The hyperparameters file.

    Yields:
        A kind, a claim, and what contradicts it: empty where nothing does.
    """
    folder = script.resolve().parent
    source = Source(_file(script, folder, brain.file), brain.name)
    yield from _cited(script, folder, brain)
    for remark in brain.remarks:
        claim = f"{remark.file}:{remark.line}: {remark.about}: {remark.says}"
        yield "remarks", claim, _against_remark(source, script, folder, remark)
    script_text = script.read_text(encoding="utf-8")
    whole = re.sub(r"^\s*#.*$", "", script_text, flags=re.MULTILINE)
    for strategy in brain.strategies:
        yield "safe strategies", strategy, _against_strategy(source, strategy, hparams)
    for argument in brain.arguments:
        yield "safe arguments", argument, _against_argument(source, whole, argument)


def _file(script: Path, folder: Path, name: str) -> Path:
    return script if name == script.name else folder / name


def _cited(script: Path, folder: Path, brain: BrainReport) -> Iterator[tuple[str, str, str]]:
    """Each line that is cited has what is said to be there."""

    def at(location: str, pattern: str) -> str:
        file, _, line = location.rpartition(":")
        lines = _file(script, folder, file).read_text(encoding="utf-8").splitlines()
        there = lines[int(line) - 1]
        return "" if re.search(pattern, there) else f"{location} is {there.strip()!r}"

    where = f"{brain.file}:{brain.line}"
    yield "lines", f"class {brain.name}", at(where, rf"class {brain.name}\b")
    for name, location in brain.overrides.items():
        yield "lines", f"overrides {name}", at(location, rf"def {name}\b|\b{name} =")
    for use, locations in brain.uses.items():
        name = re.findall(r"\w+", use.removesuffix(" (private)"))[-1]
        for location in locations:
            yield "lines", f"uses {use}", at(location, rf"\b{name}\b")


def _window(source: Source, file: Path, line: int, length: int = 4) -> str:
    """The text around a line; a chain of attributes may be on several."""
    texts = file.read_text(encoding="utf-8").splitlines()
    return "\n".join(texts[max(0, line - length) : line + length])


def _against_remark(source: Source, script: Path, folder: Path, remark: object) -> str:
    """What a remark quotes from the source is there; what it misses is not."""
    about, says = remark.about, remark.says  # type: ignore[attr-defined]
    file = _file(script, folder, remark.file)  # type: ignore[attr-defined]
    line = remark.line  # type: ignore[attr-defined]
    here = _window(source, file, line)
    for quoted, other in re.findall(
        r"((?:self|\w+)\.[\w.'\[\]]+\w)(?: \(line (\d+)\))?", says
    ):
        name = re.findall(r"\w+", quoted)[-1]
        advised = re.search(
            rf"(?i)(call|within|by|to|step if|clip to) \S*{re.escape(quoted)}", says
        )
        place = _window(source, file, int(other)) if other else here
        if "modules" in quoted and not advised and not re.search(rf"\b{name}\b", place):
            return f"no {quoted} at {other or line}"
    step = source.defined.get("fit_batch", "") + source.defined.get("optimizers_step", "")
    absent = {
        "precision": ("training_ctx", "Mixed precision has no effect"),
        "gradient_clip_val": ("max_grad_norm", "It has no effect"),
        "accumulate_grad_batches": ("grad_accumulation_factor", "It has no effect"),
    }.get(about)
    if absent and says.startswith(absent[1]) and absent[0] in step:
        return f"{absent[0]} is in the step"
    if says.startswith("Validation stays in fp32") and "evaluation_ctx" in source.text:
        return "evaluation_ctx is read"
    if about in ("fit", "_fit_train", "_fit_valid", "evaluate") and not re.search(
        rf"def {about}\b|self\.{about}\(", here
    ):
        return f"no {about} at {line}"
    whole = script.read_text(encoding="utf-8")
    if about == "devices" and not re.search(r"ddp_init_group\(", whole):
        return "no ddp_init_group"
    return ""


def _against_strategy(source: Source, strategy: str, hparams: Path | None) -> str:
    lines = [line for _, _, line in source.lines]
    for index, line in enumerate(lines):
        before = "\n".join(lines[max(0, index - 6) : index + 1])
        guarded = bool(WRAPPER_ASKED.search(before))
        joined = re.sub(r"\n\s*", "", "\n".join(lines[index : index + 3]))
        if not re.search(r"self\.modules", line):
            continue
        if strategy == "one device":
            if re.search(rf"{ENTRY}\.module\b", joined) and not guarded:
                return line.strip()
        elif strategy.startswith("fsdp2"):
            if (unnamed := _part_called(joined, strategy)) and not _is_of_evaluation(
                source, line
            ):
                return f"{line.strip()}: {unnamed}"
        elif (found := _lacks(joined)) and not guarded:
            return f"{line.strip()}: {found}"
    if strategy != "one device":
        start = source.defined.get("on_fit_start", "super().on_fit_start")
        if "super().on_fit_start" not in start and "_wrap_distributed" not in source.text:
            return "on_fit_start wraps nothing"
        return "" if strategy.startswith("fsdp2") else _around(source, strategy, hparams)
    return ""


def _part_called(line: str, strategy: str) -> str:
    """What is called of an entry, and is neither known nor said to be named."""
    for path in re.findall(rf"{ENTRY}((?:\.\w+|\[\w+\])+)\(", line):
        name = path.removeprefix(".module").removeprefix(".")
        known = MODULE_ATTRIBUTES | {*METHODS, ""}
        if name.rpartition(".")[2] not in known and repr(name) not in strategy:
            return str(path)
    return ""


def _lacks(line: str) -> str:
    """The attribute of an entry that its wrapper lacks."""
    for name in re.findall(rf"{ENTRY}\.(\w+)", line):
        if not hasattr(wrapper(), name):
            return str(name)
    indexed = re.search(r"self\.modules\.\w+\[", line)
    return indexed[0] if indexed else ""


def _around(source: Source, strategy: str, hparams: Path | None) -> str:
    """A call in hparams of what is in modules, as far as text can say."""
    called = {
        name
        for _, _, line in source.lines
        for name in re.findall(r"self\.hparams\.(\w+)\(\s*[^)\s]", line)
        if not _is_of_evaluation(source, line)
    }
    if hparams is None:
        uses = re.search(r"self\.modules(\.(?!values|items|parameters|keys|train|eval)\w|\[)",
                         source.text)  # fmt: skip
        forward = source.defined.get("compute_forward", "")
        first = re.search(r"self\.hparams\.(\w+)\(\s*[^)\s]", forward)
        if first and not uses:
            return f"{first[0]}…, and nothing of modules"
        return (
            ""
            if not called or ", if no object of hparams" in strategy
            else f"calls {sorted(called)}"
        )
    text = hparams.read_text(encoding="utf-8")
    block = re.search(r"^modules:\s*\n((?:[ \t]+.*\n|\n)*)", text, re.MULTILINE)
    entries = set(re.findall(r"<(\w+)>", block[1])) if block else set()
    return f"calls {sorted(called & entries)} of modules" if called & entries else ""


def _is_of_evaluation(source: Source, line: str) -> bool:
    """Whether a line stands under no_grad, or a test for another stage than TRAIN."""
    method = next((text for text in source.defined.values() if line in text), "")
    before = method[: method.index(line)] if line in method else ""
    indent = len(line) - len(line.lstrip())
    for earlier in reversed(before.splitlines()):
        if earlier.strip() and len(earlier) - len(earlier.lstrip()) < indent:
            indent = len(earlier) - len(earlier.lstrip())
            if re.search(
                r"no_grad|!= (sb\.)?Stage\.TRAIN|== (sb\.)?Stage\.(VALID|TEST)", earlier
            ):
                return True
            if re.search(
                r"def (on_stage|evaluate|on_evaluate|on_fit|init_opt|__init__)", earlier
            ):
                return True
    return "no_grad" in before.split("def ")[0]


def _against_argument(source: Source, script: str, argument: str) -> str:
    """What the source has that a Trainer argument does not reach."""
    return (
        _against_loops(source, argument)
        or _against_step(source, argument)
        or _against_processes(source, script, argument)
    )


def _against_loops(source: Source, argument: str) -> str:
    for loop, reaches in REACHES.items():
        written = loop in source.defined and f"super().{loop}(" not in source.text
        if written and argument in reaches:
            return f"def {loop}"
    return ""


def _against_step(source: Source, argument: str) -> str:
    defined = source.defined
    own = defined.get("fit_batch", "")
    steps = own and ("super().fit_batch(" not in own or ".backward()" in own)
    others = "\n".join(text for name, text in defined.items() if name != "evaluate_batch")
    if argument == "precision":
        honours = r"self\.training_ctx|self\.precision[\s\S]*autocast|bfloat16_mix_prec"
        if steps and not re.search(honours, others):
            return "fit_batch computes outside self.training_ctx"
        honours = r"evaluation_ctx|super\(\)\.evaluate_batch"
        if "evaluate_batch" in defined and not re.search(honours, source.text):
            return "evaluate_batch computes outside self.evaluation_ctx"
    if argument == "gradient_clip_val" and (steps or "optimizers_step" in defined):
        clips = r"max_grad_norm|check_gradients\(\w|super\(\)\.optimizers_step"
        clips += "" if "optimizers_step" in defined else r"|self\.optimizers_step\("
        if not re.search(clips, others):
            return "its own step does not clip"
    if argument == "accumulate_grad_batches" and steps:
        return "fit_batch is the recipe's own"
    return ""


def _against_processes(source: Source, script: str, argument: str) -> str:
    group = bool(re.search(r"ddp_init_group\(", script))
    if argument == "devices" and group and source.base != "speechbrain":
        return "ddp_init_group"
    return ""


def wrapper() -> DistributedDataParallel:
    """A real wrapper, of the one process that this is."""
    if not _wrapper:
        file = Path(_folder.name) / "group"
        torch.distributed.init_process_group(
            "gloo", init_method=file.as_uri(), rank=0, world_size=1
        )
        _wrapper.append(DistributedDataParallel(torch.nn.Linear(1, 1)))
        torch.distributed.destroy_process_group()
    return _wrapper[0]


STEPS = """
import torch
from brain_lightning import Brain


class Steps(Brain):
    def compute_forward(self, batch, stage):
        return self.modules.model(batch[0])

    def compute_objectives(self, predictions, batch, stage):
        return (predictions - batch[1]).square().mean()

    def fit_batch(self, batch):
        with {context}:
            loss = self.compute_objectives(self.compute_forward(batch, None), batch, None)
        self.scaler.scale(loss).backward()
        if {window}:
            {clip}
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()
"""
# Each argument, and the code that heeds it, in place of what heeds nothing.
HEEDS: dict[str, tuple[Any, dict[str, str]]] = {
    "precision": ("bf16-mixed", {"context": "self.training_ctx"}),
    "gradient_clip_val": (
        0.01,
        {
            "clip": "torch.nn.utils.clip_grad_norm_(self.modules.parameters(), "
            "self.max_grad_norm)"
        },
    ),
    "accumulate_grad_batches": (
        2, {"window": "self.step % self.grad_accumulation_factor == 0"}
    ),
}  # fmt: skip


def check_by_running(folder: Path) -> list[Contradiction]:
    """Runs steps that heed an argument of the Trainer and steps that do not.

    Args:
        folder: Where to write them.

    Returns:
        Where doctor says of one that it has no effect and it has, or the other way around.
    """
    wrong = []
    plain = {"context": "torch.enable_grad()", "window": "True", "clip": "pass"}
    for argument, (value, heeding) in HEEDS.items():
        for parts in (plain, {**plain, **heeding}):
            script = folder / f"{argument}_{'plain' if parts is plain else 'heeding'}.py"
            script.write_text(STEPS.format(**parts))
            learned = [_learn(script, {}), _learn(script, {argument: value})]
            has_effect = not torch.equal(*learned)
            remarks = [
                r.says for r in examine(str(script)).brains[0].remarks if r.about == argument
            ]
            says_none = any("no effect" in says for says in remarks)
            if has_effect == says_none:
                seen = f"it has {'an' if has_effect else 'no'} effect when it runs"
                wrong.append(
                    Contradiction(script.name, "Steps", f"{argument}: {remarks}", seen)
                )
    return wrong


def _learn(script: Path, arguments: dict[str, Any]) -> torch.Tensor:
    """The weights that two epochs of four batches leave."""
    torch.manual_seed(0)
    make = runpy.run_path(str(script))["Steps"]
    inputs = torch.rand(16, 3)
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
    model = torch.nn.Linear(3, 1)
    before = model.weight.detach().clone()
    brain = make({"model": model}, lambda p: torch.optim.SGD(p, 0.1), None, {"device": "cpu"})
    loader = torch.utils.data.DataLoader(data, 4)
    quiet = {"enable_model_summary": False, "logger": False}
    brain.fit(range(1, 3), loader, progressbar=False, trainer={**quiet, **arguments})
    assert not torch.equal(before, model.weight), "nothing was learned"
    return model.weight.detach().clone()


def main() -> int:
    """Checks a folder, and prints counts and every contradiction.

    Returns:
        The exit status: 1 where there is a contradiction.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    total, wrong, scripts, runs = Counter[str](), [], 0, 0
    folder = parser.parse_args().folder
    for script in sorted(folder.rglob("*.py")):
        text = script.read_text(encoding="utf-8")
        if not (
            BRAIN.search(text) or re.search(r"^from \w+ import .*Brain", text, re.MULTILINE)
        ):
            continue
        scripts += 1
        files = sorted({*script.parent.glob("hparams/*.yaml"), *script.parent.glob("*.yaml")})
        for hparams in (None, *files):
            counts, found = check(script, hparams)
            total += counts
            wrong += found
            runs += 1
    wrong += check_by_running(Path(_folder.name))
    for found in dict.fromkeys(wrong):
        print(f"{found.script}: {found.brain}: {found.claim}\n    but {found.seen}")
    print(f"{scripts} scripts, {runs} times examined; {dict(total)}")
    print(f"{2 * len(HEEDS)} claims checked by running; contradictions: {len(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
