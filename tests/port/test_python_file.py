"""Of a Python file a port changes what it has to, and not one byte more."""

from __future__ import annotations

import pytest

from brain_lightning.port.python_file import port_python

# What is written on the left becomes what is written on the right.
CASES = {
    "an alias, of which other uses stay": (
        """\
# Comments   stay, with all their   spaces.
import torch
import speechbrain as sb
from speechbrain.utils.distributed import run_on_main

class Toy( sb.core.Brain ):   # here too
    def compute_objectives(self, p, batch, stage: sb.Stage):
        if ( stage!=sb.Stage.TRAIN ): pass
        return sb.nnet.losses.mse_loss(p, batch)
isinstance(Toy, sb.Brain)
""",
        """\
# Comments   stay, with all their   spaces.
import torch
import speechbrain as sb
from speechbrain.utils.distributed import run_on_main

from brain_lightning import Brain, Stage

class Toy( Brain ):   # here too
    def compute_objectives(self, p, batch, stage: Stage):
        if ( stage!=Stage.TRAIN ): pass
        return sb.nnet.losses.mse_loss(p, batch)
isinstance(Toy, Brain)
""",
    ),
    "an import that nobody needs any more, and one that nobody needed": (
        "import os\nimport speechbrain as sb\n\nclass Toy(sb.Brain): pass\n",
        "import os\nfrom brain_lightning import Brain\n\nclass Toy(Brain): pass\n",
    ),
    "names that are imported, some of them ours": (
        """\
from speechbrain.core import (
    Brain as Base,
    create_experiment_directory,  # stays
    Stage,
)
from speechbrain.utils.distributed import ddp_init_group, run_on_main

class Toy(Base):
    def compute_forward(self, batch, stage):
        return run_on_main(create_experiment_directory) and stage == Stage.TRAIN
class Other(Base):
    pass
ddp_init_group(run_opts)
""",
        """\
from speechbrain.core import (
    create_experiment_directory,  # stays
)
from speechbrain.utils.distributed import run_on_main

from brain_lightning import Brain as Base, Stage

class Toy(Base):
    def compute_forward(self, batch, stage):
        return run_on_main(create_experiment_directory) and stage == Stage.TRAIN
class Other(Base):
    pass
""",
    ),
    "a whole line of names, joined by what was an attribute": (
        "from speechbrain.core import Brain  # ours\nimport speechbrain as sb\n"
        "class Toy(Brain):\n\tx = (sb.Stage).TRAIN\n\ty = sb.utils\n",
        "from brain_lightning import Brain, Stage  # ours\nimport speechbrain as sb\n"
        "class Toy(Brain):\n\tx = (Stage).TRAIN\n\ty = sb.utils\n",
    ),
    "modules by other names, and classes that are made": (
        """\
from speechbrain import core
import speechbrain.utils.epoch_loop as loop
from speechbrain.utils.checkpoints import Checkpointer
class Toy(core.Brain): pass
Checkpointer("save", {"counter": loop.EpochCounter(2)})
""",
        """\
from brain_lightning import Brain, Checkpointer, EpochCounter
class Toy(Brain): pass
Checkpointer("save", {"counter": EpochCounter(2)})
""",
    ),
    "the process group, and the comment that is about it": (
        """\
import speechbrain as sb
class Toy(sb.Brain): pass
if __name__ == "__main__":
    # CLI:
    hparams_file, run_opts, overrides = sb.parse_arguments(argv)

    # create ddp_group with the right communication protocol
    sb.utils.distributed.ddp_init_group(run_opts)

    # Load the YAML file
    with open(hparams_file) as fin:
        if run_opts:
            sb.utils.distributed.ddp_init_group(run_opts)
""",
        """\
from brain_lightning import Brain, parse_arguments
class Toy(Brain): pass
if __name__ == "__main__":
    # CLI:
    hparams_file, run_opts, overrides = parse_arguments(argv)

    # Load the YAML file
    with open(hparams_file) as fin:
        if run_opts:
            pass
""",
    ),
    "a name that is taken": (
        "import speechbrain as sb\nclass Brain(sb.Brain):\n    x = sb.Stage, sb.nnet\n",
        "import speechbrain as sb\n\n"
        "import brain_lightning\nfrom brain_lightning import Stage\n"
        "class Brain(brain_lightning.Brain):\n    x = Stage, sb.nnet\n",
    ),
    "imports within a function; an argument of the same name": (
        """\
def make(sb):
    from speechbrain.core import Brain, AMPConfig
    class Toy(Brain): pass
    return sb.Stage, AMPConfig
""",
        """\
def make(sb):
    from speechbrain.core import AMPConfig
    from brain_lightning import Brain
    class Toy(Brain): pass
    return sb.Stage, AMPConfig
""",
    ),
    "an import that comes after the first use": (
        """\
import speechbrain as sb
class Toy(sb.Brain): pass
from speechbrain.core import Stage
sb.nnet
""",
        """\
import speechbrain as sb

from brain_lightning import Brain
class Toy(Brain): pass
from brain_lightning import Stage
sb.nnet
""",
    ),
    "a function that imports the name itself, later": (
        """\
import speechbrain as sb
class Toy(sb.Brain):
    def compute_forward(self, batch, stage):
        if stage == sb.Stage.TRAIN: pass
        from speechbrain import Stage
""",
        """\
from brain_lightning import Brain
import brain_lightning
class Toy(Brain):
    def compute_forward(self, batch, stage):
        if stage == brain_lightning.Stage.TRAIN: pass
        from brain_lightning import Stage
""",
    ),
    "a name and another one for it": (
        """\
from speechbrain import (  # names
    Stage as S,  # its stage
)
from speechbrain.core import Brain, Stage
class Toy(Brain):
    x = S, Stage
""",
        """\
from brain_lightning import (  # names
    Stage as S, Brain, Stage,  # its stage
)
class Toy(Brain):
    x = S, Stage
""",
    ),
    "a type that is written as a text": (
        "import speechbrain as sb\nclass Toy(sb.Brain):\n    stage: 'sb.Stage'\n",
        "import speechbrain as sb\n\nfrom brain_lightning import Brain\n"
        "class Toy(Brain):\n    stage: 'sb.Stage'\n",
    ),
    "other line ends, and none at the end": (
        "import speechbrain as sb\r\nclass Toy(sb.Brain):\r\n\tx = 1\r\n# end",
        "from brain_lightning import Brain\r\nclass Toy(Brain):\r\n\tx = 1\r\n# end",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_ours_has_takes_its_place(case: str) -> None:
    before, after = CASES[case]
    ported = port_python(before)
    assert ported.text == after
    assert "Toy" in ported.brains or "Brain" in ported.brains
    assert not ported.remarks
    compile(ported.text, case, "exec")
    # A port is ported already.
    again = port_python(after)
    assert (again.text, again.brains) == (after, ported.brains)


BRAIN_METHODS = (
    "from speechbrain import Brain\nclass A(Brain):\n  def fit_batch(self, b):\n    "
)
REMARKS = {
    "from speechbrain.core import *\n": (1, "import * cannot be ported"),
    "from library import Base\nclass A(Base):\n    def compute_forward(self): ...": (
        2, "A seems to be a Brain by its methods, and the file of its base Base is not in",
    ),
    "import speechbrain as sb\ncore = sb.core\n"
    "class A(core.Brain):\n    def fit_batch(self): ...": (
        3, "its base core.Brain is not in",
    ),
    "from library.base import OtherBrain as B\n"
    "class A(B):\n    def on_stage_end(self): ...\nB()": (
        1, "library.base.OtherBrain seems to be a Brain by its name, and its file is not in",
    ),
    "import library\nlibrary.a.OtherBrain()\nclass A(library.a.OtherBrain): ...": (
        2, "library.a.OtherBrain seems to be a Brain by its name",
    ),
    "from library import Base\nclass A(Base):\n    def on_stage_end(self): ...": (
        2, "A seems to be a Brain by its methods",
    ),
    "from speechbrain.utils.distributed import ddp_init_group\nf(ddp_init_group)": (
        2, "Remove ddp_init_group",
    ),
    "import speechbrain as sb\nx = sb.nnet\nsb.core.Brain = x": (
        3, "speechbrain.core.Brain = ... is left unchanged. It does not change brain_",
    ),
    BRAIN_METHODS + "clip_grad_norm_(self.modules.parameters(), self.hparams.clip)": (
        4, "Custom gradient clipping is left unchanged.",
    ),
    BRAIN_METHODS + "if self.step % self.hparams.every == 0: self.optimizer.step()": (
        4, "Custom gradient accumulation is left unchanged.",
    ),
    BRAIN_METHODS + "ready = self.step % 4 == 0\n    if ready: self.optimizers_step.step()": (
        5, "Custom gradient accumulation is left unchanged.",
    ),
    BRAIN_METHODS + "self.hparams.epoch_counter.current = self.hparams.epoch_counter.limit": (
        4, "A custom change of the epoch counter is left unchanged.",
    ),
    BRAIN_METHODS + "torch.distributed.init_process_group('gloo')": (
        4, "Remove init_process_group",
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", REMARKS)
def test_what_stays_is_named(text: str) -> None:
    line, says = REMARKS[text]
    [(found, said)] = port_python(text).remarks
    assert found == line
    assert says in said


def test_what_is_about_something_else_is_left_alone() -> None:
    assert port_python("").text == ""
    ported = port_python(
        "import speechbrain as sb\nclass Toy(sb.Brain): pass\ndef main():\n"
        "    # Read it.\n    sb.utils.distributed.ddp_init_group(1)\n    read()\n"
    )
    assert ported.text.endswith("def main():\n    # Read it.\n    read()\n")
    monkeypatched = "import speechbrain as sb\nsb.Brain.fit_batch = mine\nsb.Brain = other\n"
    assert port_python(monkeypatched).text.endswith(
        "\nBrain.fit_batch = mine\nsb.Brain = other\n"
    )


def test_what_run_options_and_the_trainer_reach_is_not_named() -> None:
    ported = port_python(
        "from speechbrain import Brain\nfrom beside import Base\n"
        "class A(Brain):\n  def fit_batch(self, b):\n"
        "    clip_grad_norm_(self.modules.parameters(), self.max_grad_norm)\n"
        "    should_step = self.step % self.grad_accumulation_factor == 0\n"
        "    if should_step: self.optimizer.step()\n"
        "    if self.step % self.hparams.log_interval == 0: self.log(b)\n"
        "class B(Base):\n  def compute_forward(self, b, s): ...\n"
        "class C(B):\n  def compute_forward(self, b, s): ...\n",
        local=["beside"],
    )
    assert not ported.remarks
