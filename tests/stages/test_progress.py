"""Progress bars and progress lines."""

from __future__ import annotations

import io
import logging
import re
import sys
from typing import Any

import pytest
import speechbrain
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from speechbrain.utils.logger import format_order_of_magnitude
from torch import nn
from torch.utils.data import DataLoader

from brain_lightning import EpochCounter, RunOptionError, parse_arguments, to_lightning
from brain_lightning.callback.lightning_bars import last_epoch
from brain_lightning.loggers.console import abbreviated
from tests.support.brains import Regression, loader, make, trainer_with
from tests.support.processes import run_python
from tests.support.upstream import needs_lightning

RATE = r"\[[\d:]+<[\d:]+, +[\d.]+it/s, "


class Remembering(Regression):
    """Records the losses of its stages in ``losses``."""

    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        super().on_stage_end(stage, stage_loss, epoch)
        self.losses = [*getattr(self, "losses", []), (stage.name, epoch, stage_loss)]


class Reports:
    """A train logger of a recipe."""

    def log_stats(self, stats_meta: Any, valid_stats: Any) -> None:
        pass


class Reporting(Regression):
    def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
        if stage.name == "VALID":
            self.hparams.train_logger.log_stats({"epoch": epoch}, valid_stats={"WER": 12.5})


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return captured.err + captured.out


def with_bar(cls: Any = Remembering, **run_opts: Any) -> Any:
    return make(cls, noprogressbar=False, progress="bar", **run_opts)


def lines_of(text: str) -> list[str]:
    """Returns the lines that a terminal shows at the end."""
    return [line.split("\r")[-1] for line in text.split("\n") if line.strip()]


# ------------------------------------------------------------------------- the bar


def test_each_bar_ends_with_the_average_loss_of_its_stage(
    capfd: pytest.CaptureFixture[str],
) -> None:
    brain = with_bar()
    brain.fit(range(1, 3), loader(), loader())
    brain.evaluate(loader())
    lines = lines_of(capfd.readouterr().err)
    assert len(lines) == len(brain.losses) == 5
    for line, (stage, epoch, loss) in zip(lines, brain.losses, strict=True):
        name = f"{stage}: 100%" if epoch is None else f"{stage} epoch {epoch}: 100%"
        assert line.startswith(name)
        assert re.search(rf"5/5 {RATE}{stage.lower()}_loss={loss:.3g}\]$", line), line


@pytest.mark.parametrize("progress", ["bar", "plain"])
def test_a_pass_that_is_cut_short_shows_what_was_done(
    progress: str, capfd: pytest.CaptureFixture[str]
) -> None:
    limits = {"limit_train_batches": 3, "limit_val_batches": 2}
    brain = make(Remembering, noprogressbar=False, progress=progress)
    brain.fit(range(1), loader(), loader(), trainer=limits)
    train, valid = lines_of(capfd.readouterr().err)
    assert "3/5" in train
    assert "2/5" in valid
    assert f"train_loss={brain.losses[0][2]:.3g}]" in train
    assert f"valid_loss={brain.losses[1][2]:.3g}]" in valid


def test_it_is_closed_before_a_stage_ends(capfd: pytest.CaptureFixture[str]) -> None:
    class Looking(Regression):
        def on_stage_end(self, stage: Any, stage_loss: float, epoch: Any = None) -> None:
            self.seen = [*getattr(self, "seen", []), capfd.readouterr().err]

    brain = with_bar(Looking)
    brain.fit(range(1), loader(), loader())
    assert len(brain.seen) == 2
    for text in brain.seen:
        assert "100%" in text
        assert text.endswith("\n")


def test_it_is_coloured_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with_bar(tqdm_colored_bar=True).fit(range(1), loader())
    assert "\x1b[32m" in capsys.readouterr().err
    with_bar().fit(range(1), loader())
    assert "\x1b[32m" not in capsys.readouterr().err


def test_without_a_bar_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in ("auto", "bar", "plain"):
        make(progress=progress).fit(range(1), loader(), loader())
        make(noprogressbar=False, progress=progress).fit(range(1), loader(), progressbar=False)
        make(progress=progress).evaluate(loader())
    assert shown(capsys) == ""


def test_a_bar_begins_no_pass(capfd: pytest.CaptureFixture[str]) -> None:
    """Workers start and seeds are drawn at the first batch, as without a bar."""

    class Counting(DataLoader[Any]):
        begun = 0

        def __iter__(self) -> Any:
            Counting.begun += 1
            return super().__iter__()

    data = Counting(loader().dataset, batch_size=4)
    with_bar().evaluate(data)
    assert Counting.begun == 1


# -------------------------------------------------------------------- in log files


def test_where_nobody_watches_there_are_whole_lines(
    capfd: pytest.CaptureFixture[str],
) -> None:
    brain = make(Remembering, noprogressbar=False)
    brain.fit(range(1, 3), loader(), loader())
    brain.evaluate(loader())
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 5
    for line, (stage, epoch, loss) in zip(lines, brain.losses, strict=True):
        name = stage if epoch is None else f"{stage} epoch {epoch}"
        line_is = rf"{name}: 100% 5/5 {RATE}{stage.lower()}_loss={loss:.3g}\]"
        assert re.fullmatch(line_is, line), line


def test_a_line_after_every_batch_where_the_interval_is_none(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Noisy(Regression):
        def on_fit_batch_end(self, *args: Any) -> None:
            # If a recipe writes between bars, no progress line is added.
            torch.manual_seed(0)
            from tqdm import tqdm

            tqdm.write("hello", file=sys.stderr)

    brain = make(Noisy, noprogressbar=False, progress="plain", progress_interval=0)
    brain.fit(range(1, 2), loader())
    lines = capfd.readouterr().err.splitlines()
    found = [line[:22] for line in lines if line != "hello"]
    # The last batch is shown once, at the end of the stage.
    batches = [f"TRAIN epoch 1: {20 * n:>3}% {n}/" for n in (1, 2, 3, 4, 5)]
    assert found == batches
    assert lines.count("hello") == 5


def test_a_stream_has_no_end_to_show(capfd: pytest.CaptureFixture[str]) -> None:
    brain = make(noprogressbar=False, progress="plain")

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(loader().dataset)

    brain.fit(range(1, 2), DataLoader(Stream(), batch_size=4))
    assert "TRAIN epoch 1: 5it [00:00, " in capfd.readouterr().err


class Stderr(io.StringIO):
    """A standard error with a given ``isatty``, which may be None."""

    def __init__(self, isatty: Any) -> None:
        super().__init__()
        self.isatty = isatty  # type: ignore[method-assign]


@pytest.mark.parametrize(("isatty", "bar"), [(True, True), (False, False), (None, False)])
def test_auto_looks_for_a_terminal(
    isatty: bool | None, bar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    brain = make(noprogressbar=False)
    stderr = Stderr(None if isatty is None else lambda: isatty)
    monkeypatch.setattr(sys, "stderr", stderr)
    brain.fit(range(1), loader())
    assert ("\r" in stderr.getvalue()) == bar
    assert "100%" in stderr.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_speechbrain_brain_has_the_defaults(capfd: pytest.CaptureFixture[str]) -> None:
    class Theirs(speechbrain.Brain):
        compute_forward = Regression.compute_forward
        compute_objectives = Regression.compute_objectives

    brain = Theirs({"model": nn.Linear(4, 2)}, torch.optim.SGD, run_opts={"device": "cpu"})
    module = to_lightning(brain, progressbar=True)
    trainer_with(max_epochs=1).fit(module, loader())
    assert "TRAIN epoch 1: 100% 5/5 [" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"progress": "tqdm"},
            "progress='tqdm' is not supported. Use one of auto, bar, plain",
        ),
        ({"progress_interval": -1}, "must be a number of seconds, 0 or more"),
        ({"progress_interval": "10"}, "is a string"),
    ],
)
def test_other_words_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(RunOptionError, match=re.escape(says)):
        make(**options)


def test_the_command_line_chooses(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["hparams.yaml", "--progress=plain", "--progress_interval", "2.5"]
    options = parse_arguments(words).run_opts
    assert (options.progress, options.progress_interval) == ("plain", 2.5)
    with pytest.raises(SystemExit) as end:
        parse_arguments(["hparams.yaml", "--progress=tqdm"])
    assert end.value.code == 2
    assert "auto" in capsys.readouterr().err


# ------------------------------------------------------------------- in a notebook

NOTEBOOK = """
import sys, types
shell = types.ModuleType("ipykernel.zmqshell")
sys.modules["ipykernel.zmqshell"] = shell
ipython = types.ModuleType("IPython")
ipython.get_ipython = lambda: shell
sys.modules["IPython"] = ipython
{ipywidgets}
import brain_lightning.stages.progress as progress
print(progress.LossBar.__mro__[2].__module__, progress.is_watched())
print(progress.LossLines.__mro__[2].__module__)
"""
WIDGETS = """
html, display = types.ModuleType("html"), types.ModuleType("IPython.display")
display.display = None
widgets = types.ModuleType("ipywidgets")
widgets.HTML = widgets.FloatProgress = widgets.HBox = object
widgets.version_info = widgets.__version__ = "8.0.0"
sys.modules |= {"ipywidgets": widgets, "IPython.display": display}
"""


@pytest.mark.parametrize(
    ("ipywidgets", "bar"),
    [
        (WIDGETS, "tqdm.notebook True"),
        # Without widgets, a text bar is shown, without a warning.
        ("sys.modules['ipywidgets'] = None", "tqdm.std False"),
    ],
)
def test_a_notebook_has_its_own_bar(ipywidgets: str, bar: str) -> None:
    code = NOTEBOOK.format(ipywidgets=ipywidgets)
    # A new process, because a fork has already imported these modules.
    done = run_python("-W", "error::UserWarning", "-c", code, real=True)
    assert done.stdout.split("\n")[:2] == [bar, "tqdm.std"], done.stderr
    assert "IProgress" not in done.stderr


# ---------------------------------------------------------------- Lightning's bars


def lightnings(cls: Any, found: list[dict[str, Any]]) -> Any:
    """A Lightning progress bar that records its metrics."""

    class Bar(cls):
        def get_metrics(self, *args: Any) -> Any:
            metrics = super().get_metrics(*args)
            found.append(metrics)
            return metrics

    return Bar()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "bar_class",
    [TQDMProgressBar, pytest.param(RichProgressBar, marks=needs_lightning("2.5.3"))],
)
@pytest.mark.parametrize("own_trainer", [True, False])
def test_a_bar_of_lightnings_replaces_ours_and_shows_the_same(
    bar_class: Any, own_trainer: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    brain = make(
        Reporting, noprogressbar=False, hparams={"train_logger": Reports()}, progress="bar"
    )
    bar = bar_class()
    if own_trainer:
        brain.fit(EpochCounter(2), loader(), loader(), trainer={"callbacks": [bar]})
    else:
        trainer = trainer_with(bar, enable_progress_bar=True)
        trainer.fit(to_lightning(brain, epoch_counter=EpochCounter(2)), loader(), loader())
    text = " ".join(shown(capfd).split())
    assert "Epoch 2/2" in text
    assert "TRAIN" not in text
    assert "train_loss" in text
    assert "valid_loss" in text
    assert re.search(r"valid_WER[:=] ?12\.5", text)
    assert "Epoch 1/-2" not in text
    # No method of brain_lightning is left on the bar.
    assert "get_metrics" not in vars(bar)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightnings_bar_shows_the_loss_while_it_runs(
    capfd: pytest.CaptureFixture[str],
) -> None:
    averages: list[float] = []

    class Averages(Regression):
        def update_average(self, loss: Any, avg_loss: float) -> float:
            averages.append(super().update_average(loss, avg_loss))
            return averages[-1]

    make(Averages).fit(range(1), loader(), trainer={"callbacks": [TQDMProgressBar()]})
    text = capfd.readouterr().out
    for average in averages:
        assert f"train_loss={average:.3g}" in text


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("counter", "max_epochs", "last"),
    [
        (range(5), -1, 4),
        (EpochCounter(7), -1, 7),
        (EpochCounter(7), 3, 3),
        (iter(range(1, 9)), -1, None),
        (iter(range(1, 9)), 3, 3),
        (["a", "b"], 9, "b"),
    ],
)
def test_the_last_epoch_is_the_counters_or_the_trainers(
    counter: Any, max_epochs: int, last: Any
) -> None:
    lasts: list[Any] = []

    class Asking(Regression):
        def on_stage_start(self, stage: Any, epoch: Any = None) -> None:
            lasts.append(last_epoch(trainer, module.run.epochs))

    trainer = trainer_with(max_epochs=max_epochs)
    module = to_lightning(make(Asking), epoch_counter=counter)
    trainer.fit(module, loader())
    assert set(lasts) == {last}


# ------------------------------------------------------------------------- logging

PLAIN_SCRIPT = """
import logging, sys
import torch
from brain_lightning import Brain
{configuration}
Brain({{"model": torch.nn.Linear(100, 100)}}, run_opts={{"device": "cpu"}})
"""
COUNTS = """\
* Total Number of Trainable Parameters: 10.1k
* Total Number of Parameters: 10.1k
* Trainable Parameters represent 100.0000% of the total size.
"""


@pytest.mark.parametrize(
    ("configuration", "prefix"),
    [
        ("", "brain_lightning.brain.base - Brain Model Statistics:\n"),
        # SpeechBrain's loggers log INFO, independent of the level of the root logger.
        ("logging.basicConfig(format='mine: %(message)s')", "mine: Brain Model Statistics:\n"),
        ("import os; os.environ['SB_LOG_LEVEL'] = 'WARNING'", None),
        ("logging.getLogger('brain_lightning').setLevel('ERROR')", None),
        ("from lightning.pytorch.utilities import rank_zero_only as r; r.rank = 1", None),
    ],
)
def test_a_person_sees_the_parameter_counts_once(configuration: str, prefix: str) -> None:
    script = PLAIN_SCRIPT.format(configuration=configuration)
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ("" if prefix is None else prefix + COUNTS)


@pytest.mark.parametrize(
    "parameters", [[], [(3, False)], [(3, True)], [(10, True), (1234567, False)]]
)
def test_parameters_are_counted_in_speechbrains_words(
    parameters: list[tuple[int, bool]], caplog: pytest.LogCaptureFixture
) -> None:
    class Same(Regression):
        pass

    class Theirs(speechbrain.Brain):
        pass

    caplog.set_level(logging.INFO)
    said = []
    for brain_class in (Same, Theirs):
        modules: dict[str, nn.Module] = {}
        for number, (size, trainable) in enumerate(parameters):
            modules[str(number)] = module = nn.Module()
            module.weight = nn.Parameter(torch.zeros(size), trainable)
        caplog.clear()
        brain_class(modules, run_opts={"device": "cpu"})
        records = [r for r in caplog.records if "aram" in r.getMessage()]
        said.append([(r.levelname, r.getMessage()) for r in records])
    ours, theirs = said
    assert ours == [(level, text.replace("Theirs", "Same")) for level, text in theirs]
    assert "Model Statistics" in ours[-1][1]


@pytest.mark.parametrize("number", [1, 999, 1000, 1049, 123456, 10**6 - 1, 10**9, 10**30])
def test_large_numbers_are_abbreviated_as_speechbrains(number: int) -> None:
    assert abbreviated(number) == format_order_of_magnitude(number)
