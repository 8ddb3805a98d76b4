"""Names by which a recipe reaches entries of ``self.modules``: doctor follows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from brain_lightning.doctor import examine

RECIPE = """
import speechbrain as sb
import lost
from helper import run

class Own(sb.Brain):
    def __init__(self, *args):
        super().__init__(*args)
        self.mods = self.modules
        self.enc = self.modules.encoder

    def compute_forward(self, batch, stage):
        {}

    def of_modules(self, mods, x):
        return mods.encoder.special(x)
"""
# Its gradients are averaged, and its wrapper has all that is used.
SAFE = (
    "a, b = self.modules.a, self.modules.b; return a(b(batch))",
    "m = self.modules; return m.a(m['b'].parameters())",
    "a = self.modules.a.module if hasattr(self.modules.a, 'module') else self.modules.a; a.x",
    "print(self); torch.save(self.modules, batch)",
    "self.enc.eval()",
)
UNSAFE = (
    "a, b = self.modules.a, self.modules.b; return a.special(b(batch))",
    "m = self.modules; return m.a.special(batch)",
    "m = self.modules; return m['a'].layers[0]",
    "return (a := self.modules.a).special(batch)",
    "a = self.modules.a if stage else self.modules.b; return a.special(batch)",
    "a: object = self.modules.a; return a.special(batch)",
    "return self.mods.a.special(batch)",
    "return self.enc(batch)",
    "return dict(self.modules.items())['a'].special(batch)",
    "return [m.special(batch) for m in (self.modules.a, self.modules.b)]",
    "return run(self, batch)",
    "return run(batch, mods=self.modules)",
    "return self.of_modules(self.modules, batch)",
)
HELPER = """
def run(brain, x=None, mods=None):
    return special(brain.modules if mods is None else mods)

def special(mods):
    return mods.encoder.special()
"""


@pytest.mark.parametrize("is_safe", [True, False])
def test_names_are_followed_to_entries_of_modules(tmp_path: Path, is_safe: bool) -> None:
    (tmp_path / "helper.py").write_text(HELPER)
    path = tmp_path / "own.py"
    for body in SAFE if is_safe else UNSAFE:
        path.write_text("import torch" + RECIPE.format(body))
        (brain,) = examine(str(path)).brains
        assert any(text.startswith("ddp") for text in brain.strategies) == is_safe, body
        assert all("these functions" not in text for text in brain.strategies)


def test_what_is_given_the_modules_and_is_in_no_file_is_a_condition(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    for called in ("lost.run", "partial"):
        body = f"return {called}(self, batch)"
        path.write_text("from functools import partial" + RECIPE.format(body))
        (brain,) = examine(str(path)).brains
        assert brain.strategies[1].endswith(f"that its wrapper lacks: {called} (own.py:13)")
        assert brain.strategies[2].endswith(f"only by calling entries: {called} (own.py:13)")
