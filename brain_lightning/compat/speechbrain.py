"""Access to SpeechBrain's classes and objects, without importing SpeechBrain.

An object of a SpeechBrain class can exist only if its module has been loaded.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from brain_lightning.errors import UnsupportedError
from brain_lightning.protocol import (
    PARTS,
    BrainProtocol,
    LightningSettings,
    TrainerDefaults,
    has_own,
    hparam,
    is_value_of,
    trainer_arguments,
)
from brain_lightning.references import calls_super
from brain_lightning.temporary import TemporaryAttributes

from .load_hooks import LOAD_HOOK, device_of, loading_to, takes_device, without_device
from .versions import run_option_defaults

# Attributes of recurrent layers that sample dropout masks in advance, as LiGRU does: how many
# masks were used, and the batch size. Another batch size samples new masks.
COUNTERS = ("drop_mask_cnt", "batch_size")


def _loaded(module: str, name: str) -> Any:
    """Returns an attribute of a SpeechBrain module, or None if the module is not loaded."""
    return getattr(sys.modules.get(f"speechbrain.{module}"), name, None)


def _is_a(obj: object, module: str, name: str) -> bool:
    return isinstance(obj, _loaded(module, name) or ())


def metrics_code() -> list[Any]:
    """Returns the functions whose results recipes report directly, such as ``wer_summary``."""
    names = [f"speechbrain.utils.{each}" for each in ("edit_distance", "metric_stats")]
    values = [each for name in names for each in vars(sys.modules.get(name, object)).values()]
    own = [each for each in values if getattr(each, "__module__", None) in names]
    return [vars(each) if isinstance(each, type) else each for each in own]


def is_main_process_alone() -> bool:
    """Returns whether other processes wait for a function that only the main process calls."""
    return bool(_loaded("utils.distributed", "MAIN_PROC_ONLY"))


def brain_class() -> Any:
    """Returns SpeechBrain's own Brain class, or None if it is not loaded."""
    return _loaded("core", "Brain")


def is_speechbrains(brain: object) -> bool:
    """Returns whether ``brain`` is an instance of SpeechBrain's Brain class."""
    return _is_a(brain, "core", "Brain")


def calls_ours(brain: BrainProtocol, hook: str) -> bool:
    """Returns whether a hook is ``brain_lightning.Brain``'s or calls it through ``super()``.

    Args:
        brain: The Brain.
        hook: Name of a method of Brain.
    """
    if is_speechbrains(brain):
        return False
    return not has_own(brain, hook) or calls_super(brain, hook)


def add_attributes(brain: Any) -> None:
    """Adds to a SpeechBrain Brain, once, the attributes of ``brain_lightning.Brain``.

    Args:
        brain: Any Brain. A ``brain_lightning.Brain`` is not changed.

    Raises:
        UnsupportedError: The Brain is set to use DataParallel.
    """
    if not is_speechbrains(brain):
        return
    settings = vars(brain).get("_lightning") or _new_settings(brain)
    # The defaults of the patch that is active now.
    defaults = getattr(type(brain), "_lightning_defaults", TrainerDefaults())
    settings.trainer_overrides = defaults.overrides
    settings.trainer_callbacks = defaults.callbacks
    brain._lightning = settings


def _new_settings(brain: Any) -> LightningSettings:
    if brain.data_parallel_backend:
        raise UnsupportedError(
            "run option data_parallel_backend=True is not supported. Start one process per "
            "device, with torchrun or --trainer.devices=2."
        )
    # SpeechBrain stores only the values of run options, and not which were set.
    defaults = run_option_defaults(sys.modules["speechbrain.core"])
    of_any_brain = (
        "accumulate_by",
        "oom_patience",
        "preflight",
        "progress",
        "progress_interval",
    )
    found = {name: hparam(brain, name) for name in of_any_brain}
    return LightningSettings(
        _loaded("core", "Stage"),
        explicit_options=frozenset(
            name
            for name, default in defaults.items()
            if getattr(brain, name, default) != default
        ),
        trainer_arguments=trainer_arguments(hparam(brain, "trainer")),
        counts_valid_steps="valid_step" not in vars(brain),
        **{name: value for name, value in found.items() if is_value_of(name, value)},
    )


def set_processes(brain: Any, rank: int, world_size: int) -> None:
    """Sets the rank of a Brain and the number of processes.

    Args:
        brain: Any Brain. SpeechBrain's Brain reads its ``rank`` in ``make_dataloader``.
        rank: Rank of the process.
        world_size: Number of processes.
    """
    brain._lightning.rank, brain._lightning.world_size = rank, world_size
    if is_speechbrains(brain):
        # A recipe may define a read-only property of this name.
        with contextlib.suppress(AttributeError):
            brain.rank = rank


def redirect_parts(
    brain: object, parts_of: Callable[[Any], Any], temporary: TemporaryAttributes
) -> None:
    """Makes SpeechBrain's ``_fit_train`` and ``_fit_valid`` run stages of a Trainer run.

    Args:
        brain: Brain that runs. For a ``brain_lightning.Brain`` nothing is changed.
        parts_of: Returns the stages of a Brain's run, or None if there is no run.
        temporary: Records the changes, to undo them after the run.
    """
    if not is_speechbrains(brain):
        return
    for name, stage in PARTS.items():
        original = getattr(brain_class(), name)
        temporary.override(brain_class(), name, _redirected(original, stage, parts_of))


def _redirected(
    original: Callable[..., Any], stage: str, parts_of: Callable[[Any], Any]
) -> Callable[..., Any]:
    @functools.wraps(original)
    def run_part(self: Any, *args: Any, **kwargs: Any) -> None:
        parts = parts_of(self)
        if parts is None or not getattr(parts, f"may_{stage}"):
            # Another Brain may run SpeechBrain's own loop at the same time.
            original(self, *args, **kwargs)
        else:
            getattr(parts, stage)(*args, **kwargs)

    return run_part


def is_looped_loader(obj: object) -> bool:
    """Returns whether ``obj`` is SpeechBrain's LoopedLoader."""
    return _is_a(obj, "dataio.dataloader", "LoopedLoader")


def is_saveable_loader(obj: object) -> bool:
    """Returns whether SpeechBrain's Checkpointer can save the position of a loader."""
    return is_looped_loader(obj) or _is_a(obj, "dataio.dataloader", "SaveableDataLoader")


def recovered_position(loader: Any) -> int:
    """Returns the number of batches that a recovered SaveableDataLoader must skip.

    Args:
        loader: Any loader.
    """
    return getattr(loader, "_speechbrain_recovery_skip_to", None) or 0


def clear_position(loader: Any) -> None:
    """Makes a SaveableDataLoader start at its first batch when it is iterated.

    Args:
        loader: Any loader. Other loaders are not changed.
    """
    if is_saveable_loader(loader) and not is_looped_loader(loader):
        loader._speechbrain_recovery_skip_to = None


def track_iterator(loader: Any, iterator: Any, position: int) -> None:
    """Makes a SaveableDataLoader save the position of an iterator that it did not create.

    Args:
        loader: Any loader. Other loaders are not changed.
        iterator: Iterator of a copy of the loader.
        position: Number of batches before the iterator's first batch.
    """
    if is_saveable_loader(loader) and not is_looped_loader(loader):
        clear_position(loader)
        loader._speechbrain_iterator = iterator
        iterator._num_yielded = position


def is_checkpointer(obj: object) -> bool:
    """Returns whether ``obj`` is SpeechBrain's Checkpointer."""
    return _is_a(obj, "utils.checkpoints", "Checkpointer")


def redirect_recovery(
    checkpointer: object, recover: Callable[..., Any], temporary: TemporaryAttributes
) -> None:
    """Replaces ``recover_if_possible`` of one of SpeechBrain's Checkpointers.

    Args:
        checkpointer: The Checkpointer. An override in its class may call the replaced method.
        recover: Called with SpeechBrain's own bound method and the arguments.
        temporary: Records the changes, to undo them after the run.
    """
    checkpointer_class: Any = _loaded("utils.checkpoints", "Checkpointer")
    original = checkpointer_class.recover_if_possible

    def recover_if_possible(self: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        own = functools.partial(original, self)
        with loading_to(device):
            if self is not checkpointer:
                return own(*args, **kwargs)
            return recover(own, *args, **kwargs)

    temporary.override(checkpointer_class, "recover_if_possible", recover_if_possible)


def accept_devices(temporary: TemporaryAttributes) -> None:
    """Makes SpeechBrain's checkpoints and Pretrainer accept a ``device``, as in 0.5.

    States are loaded to the CPU and copied to the device of their object. A load hook with an
    argument ``device`` gets the device.

    Args:
        temporary: Records the changes, to undo them after the run.
    """
    checkpoints: Any = sys.modules.get("speechbrain.utils.checkpoints")
    if checkpoints is None or takes_device(checkpoints.Checkpointer.load_checkpoint):
        return
    owner = checkpoints.Checkpointer
    for name in ("recover_if_possible", "load_checkpoint"):
        temporary.override(owner, name, _with_device(getattr(owner, name)))
    if (pretrainer := _loaded("utils.parameter_transfer", "Pretrainer")) is not None:
        collected = _with_device(pretrainer.load_collected)
        temporary.override(pretrainer, "load_collected", collected)
    average = _with_device(checkpoints.average_checkpoints)
    temporary.override(checkpoints, "average_checkpoints", average)
    for name, arguments in {"loader": LOAD_HOOK, "transfer": LOAD_HOOK[:2]}.items():
        mark = getattr(checkpoints, f"mark_as_{name}")
        temporary.override(checkpoints, f"mark_as_{name}", _marking(mark, *arguments))


# Custom hooks of a Checkpointer and of a Pretrainer, with the arguments of the hooks.
CUSTOM_HOOKS = {"custom_load_hooks": LOAD_HOOK, "custom_hooks": LOAD_HOOK[:2]}


@functools.cache
def _with_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with an additional last argument ``device``."""
    own = inspect.signature(function)
    device = inspect.Parameter("device", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    signature = own.replace(parameters=[*own.parameters.values(), device])

    @functools.wraps(function)
    def with_device(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        to = given.arguments.pop("device", None)
        # The first argument is a Checkpointer or a list of checkpoints.
        brain = getattr(args[0], "recoverables", {}).get("brain")
        with loading_to(to, device_of(brain)), TemporaryAttributes() as temporary:
            for name, arguments in CUSTOM_HOOKS.items():
                hooks = getattr(args[0], name, None)
                if isinstance(hooks, dict):
                    adapted = {n: without_device(h, *arguments) for n, h in hooks.items()}
                    temporary.set(args[0], name, adapted)
            return function(*given.args, **given.kwargs)

    with_device.__signature__ = signature  # type: ignore[attr-defined]
    return with_device


def _marking(mark: Callable[..., Any], *arguments: str) -> Callable[..., Any]:
    """Returns a decorator of hooks that also accepts hooks with a ``device``."""

    @functools.wraps(mark)
    def marking(method: Callable[..., Any]) -> Callable[..., Any]:
        return mark(without_device(method, *arguments))  # type: ignore[no-any-return]

    return marking


def dataloader_maker(dataset: object, checkpointer: object, looped: bool) -> Any:
    """Returns SpeechBrain's ``make_dataloader`` if objects of SpeechBrain need it.

    Args:
        dataset: A dataset. A ``DynamicItemDataset`` needs SpeechBrain's padding.
        checkpointer: A Checkpointer. SpeechBrain's needs a loader that it can save.
        looped: Whether a LoopedLoader is requested.

    Returns:
        The function, or None if a plain DataLoader is enough.
    """
    padded = _is_a(dataset, "dataio.dataset", "DynamicItemDataset")
    if padded or looped or is_checkpointer(checkpointer):
        return _loaded("dataio.dataloader", "make_dataloader")
    return None


def default_hooks(kind: str) -> dict[type, Any]:
    """Returns the hooks that classes registered with SpeechBrain's Checkpointer.

    Args:
        kind: SAVE, LOAD or TRANSFER.

    Returns:
        SpeechBrain's own table, or an empty one if it is not loaded.
    """
    return _loaded("utils.checkpoints", f"DEFAULT_{kind}_HOOKS") or {}


def state_savers() -> list[Any]:
    """Returns SpeechBrain's hooks that write a ``state_dict``, the default hook first."""
    names = ("torch_save", "torch_save_once_per_node")
    return [_loaded("utils.checkpoints", name) for name in names]


# Classes whose own hooks save or recover too little: see checkpoints/hooks.py.
_REPAIRED = {
    ("speechbrain.utils.epoch_loop", "EpochCounter"): "counter",
    ("speechbrain.utils.epoch_loop", "EpochCounterWithStopper"): "stopper",
    ("speechbrain.nnet.schedulers", "InverseSquareRootScheduler"): "steps",
}


def repaired_kind(cls: type) -> str | None:
    """Returns the kind of file that replaces the file of SpeechBrain's own hooks.

    Args:
        cls: Any class.

    Returns:
        The kind, or None if the hooks of the class itself are used.
    """
    return _REPAIRED.get((cls.__module__, cls.__name__))
