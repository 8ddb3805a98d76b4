"""Runs an example: in this process, as a script, or on SpeechBrain by changing its imports."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.processes import run_python

EXAMPLES = Path(__file__).parents[3] / "examples"
# Replacements that make a recipe run on SpeechBrain.
IMPORTS = {
    "from brain_lightning import": "from speechbrain import",
    "brain_lightning.distributed": "speechbrain.utils.distributed",
    "brain_lightning.EpochCounter": "speechbrain.utils.epoch_loop.EpochCounter",
}


class Example:
    """One folder of ``examples``, with overrides that make its training short."""

    def __init__(self, name: str, *overrides: str) -> None:
        self.folder = EXAMPLES / name
        self.overrides = overrides

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Puts the folder of the script on the path, as Python does for a script."""
        helpers = {path.stem for path in self.folder.glob("*.py")} - {"train"}
        sys.path.insert(0, str(self.folder))
        try:
            yield
        finally:
            sys.path.remove(str(self.folder))
            for name in helpers:
                sys.modules.pop(name, None)

    def run(self, output: Path, folder: Path | None = None) -> Any:
        """Runs ``main`` in this process and returns its result."""
        folder = folder or self.folder
        arguments = [str(folder / "hparams.yaml"), *self.overrides, "--noprogressbar"]
        spec = importlib.util.spec_from_file_location("train", folder / "train.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with self.importable():
            spec.loader.exec_module(module)
            return module.main([*arguments, f"--output_folder={output}", "--device=cpu"])

    def ported(self, folder: Path) -> Path:
        """Writes the recipe for SpeechBrain to a new folder."""
        folder.mkdir()
        for name in ("train.py", "hparams.yaml"):
            text = (self.folder / name).read_text()
            for ours, theirs in IMPORTS.items():
                text = text.replace(ours, theirs)
            (folder / name).write_text(text)
        return folder

    def both_sides(self, tmp_path: Path) -> tuple[Any, Any]:
        """Returns the results of ``main`` on brain_lightning and on SpeechBrain."""
        theirs = self.run(tmp_path / "theirs", self.ported(tmp_path / "ported"))
        return self.run(tmp_path / "ours"), theirs

    def script(
        self, folder: Path, *overrides: str, real: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Runs the example as a script in another process."""
        files = [str(self.folder / name) for name in ("train.py", "hparams.yaml")]
        return run_python(*files, *self.overrides, *overrides, cwd=folder, real=real)
