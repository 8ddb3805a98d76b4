"""examples/sharded: with FSDP2 each process holds one half, and the losses equal DDP's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from brain_lightning.compat.versions import SHARDS
from tests.support.processes import check_python

from .example import EXAMPLES


@pytest.mark.skipif(not SHARDS, reason="torch 2.8 shards")
def test_each_process_holds_a_half_and_learns_the_same(tmp_path: Path) -> None:
    files = [str(EXAMPLES / "sharded" / name) for name in ("memory.py", "hparams.yaml")]
    short = ["--hidden=64", "--train_lines=32", "--device=cpu", "--noprogressbar"]
    shown = check_python(*files, *short, cwd=tmp_path)
    held = {
        strategy: [float(size) for size in re.findall(r"rank \d ([\d.]+)", line)]
        for strategy, line in re.findall(r"^(ddp|fsdp2) +(.*)$", shown, re.MULTILINE)
    }
    assert held["ddp"][0] == held["ddp"][1] > 1
    assert max(held["fsdp2"]) < 0.55 * held["ddp"][0]
    in_ddp, in_shards = re.findall(r"^epoch .*$", shown, re.MULTILINE)
    assert in_ddp == in_shards
