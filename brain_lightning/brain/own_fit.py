"""Runs an overridden ``fit`` on one Trainer, and the stages that this ``fit`` calls."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer

from brain_lightning.compat import speechbrain
from brain_lightning.errors import UnsupportedError
from brain_lightning.module.to_lightning import to_lightning
from brain_lightning.protocol import PARTS, BrainProtocol
from brain_lightning.references import referenced
from brain_lightning.stages.epochs import make_stoppable
from brain_lightning.stages.run import Run
from brain_lightning.temporary import TemporaryAttributes

from . import own_trainer as trainers

logger = logging.getLogger(__name__)

# A placeholder for the Trainer's data. Each call of _fit_train and _fit_valid passes its data.
# It is long, because Lightning raises an error if limit_train_batches=0.1 is below one batch.
_NO_DATA = range(1_000_000)


def run_part(brain: BrainProtocol, part: str, data: Any, epoch: Any, enable: bool) -> None:
    """Runs one stage, in the current run of the Brain, or in a new run if there is none.

    Args:
        brain: The Brain.
        part: ``train`` or ``valid``.
        data: Iterable over batches.
        epoch: The number of the epoch.
        enable: Whether to show a progress bar.
    """
    parts = Run.parts_of(brain)
    if parts is not None and getattr(parts, f"may_{part}"):
        getattr(parts, part)(data, epoch, enable)
        return
    speechbrain.add_attributes(brain)
    settings, is_within = brain._lightning, Run.is_running(brain)
    trainer = None if is_within else settings.trainer_of_parts
    if trainer is None:
        trainer = trainers.trainer_for(brain, None)
    if not is_within:
        settings.trainer_of_parts = trainer
    _fit_on_trainer(brain, trainer, lambda: run_part(brain, part, data, epoch, enable))


def on_trainer(fit: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an overridden ``fit`` run on one Trainer.

    A ``fit`` that calls neither ``_fit_train`` nor ``_fit_valid`` runs unchanged.

    Args:
        fit: The ``fit`` method of a subclass of Brain.

    Returns:
        The method to use in its place.
    """

    @functools.wraps(fit)
    def own_fit(self: BrainProtocol, *args: Any, **kwargs: Any) -> Any:
        return _run_own_fit(fit, self, args, kwargs)

    own_fit.is_on_trainer = True  # type: ignore[attr-defined]
    return own_fit


def is_on_trainer(fit: Callable[..., Any], default: Callable[..., Any]) -> bool:
    """Whether a ``fit`` runs on a Trainer.

    Args:
        fit: The ``fit`` method of a Brain class.
        default: The ``fit`` method that is not overridden.
    """
    return fit is default or hasattr(fit, "is_on_trainer")


def _run_own_fit(
    fit: Callable[..., Any], brain: BrainProtocol, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    parts = Run.parts_of(brain)
    if parts is not None and parts.may_train:
        # The fit of a subclass called the fit of its base class.
        return fit(brain, *args, **kwargs)
    trainer = None
    if "trainer" not in inspect.signature(fit).parameters:
        trainer = kwargs.pop("trainer", None)
    names = referenced(brain, ["fit"])
    if names & PARTS.keys():
        return _fit_by_parts(fit, brain, args, kwargs, trainer)
    if "fit" not in names:
        _warn_of_whole_loop(type(brain).__name__)
    with TemporaryAttributes() as temporary:
        if trainer is not None:
            speechbrain.add_attributes(brain)
            temporary.set(brain._lightning, "trainer_arguments", trainer)
        return fit(brain, *args, **kwargs)


@functools.cache
def _warn_of_whole_loop(brain: str) -> None:
    logger.warning(
        "%s.fit is a custom loop that calls neither _fit_train nor super().fit. It runs "
        "unchanged, and the Trainer has no effect in it: no limits, callbacks, loggers, "
        "devices or precision. Call self._fit_train and self._fit_valid to use the Trainer.",
        brain,
    )


def _fit_by_parts(
    fit: Callable[..., Any],
    brain: BrainProtocol,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    trainer: Any,
) -> Any:
    bound = inspect.signature(fit).bind(brain, *args, **kwargs)
    bound.apply_defaults()
    validates = bound.arguments.get("valid_set", _NO_DATA) is not None
    counter = bound.arguments.get("epoch_counter")
    running = trainers.trainer_for(brain, trainer)
    _check_validations(running, type(brain).__name__)
    with TemporaryAttributes() as temporary:
        if isinstance(counter, Iterable):
            stoppable = make_stoppable(counter, lambda: _is_over(brain), temporary)
            bound.arguments["epoch_counter"] = stoppable
        else:
            counter = None
        own_fit = functools.partial(fit, *bound.args, **bound.kwargs)
        return _fit_on_trainer(brain, running, own_fit, counter, validates)


def _check_validations(trainer: Any, brain: str) -> None:
    """Raises if the Trainer sets when to validate, because the custom loop decides that."""
    for name in ("val_check_interval", "check_val_every_n_epoch"):
        value = getattr(trainer, name, 1)
        if value != 1:
            raise UnsupportedError(
                f"Trainer({name}={value}) is not supported with {brain}, because its custom "
                "fit decides when to validate. Remove the argument, and call _fit_valid in "
                "fit."
            )


def _is_over(brain: BrainProtocol) -> bool:
    parts = Run.parts_of(brain)
    return parts is not None and parts.is_over()


def _fit_on_trainer(
    brain: BrainProtocol,
    trainer: Trainer,
    own_fit: Callable[[], Any],
    epoch_counter: Any = None,
    validates: bool = True,
) -> Any:
    results: list[Any] = []
    module = to_lightning(
        brain, epoch_counter=epoch_counter, own_fit=lambda: results.append(own_fit())
    )
    module.is_of_fit = True
    valid_data = _NO_DATA if validates else None
    trainers.run(trainer, module, lambda: trainer.fit(module, _NO_DATA, valid_data))
    # The list is empty if the Trainer ended an endless loop.
    return results[0] if results else None
