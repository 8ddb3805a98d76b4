"""Two gloo processes under torchrun, SpeechBrain and ours, compared bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import own_loops
from tests.parity.sides import Record, assert_equal, assert_moved
from tests.support.processes import TORCHRUN, check_python

from . import scenarios


def of(records: list[dict[Any, Any]], scenario: Any, side: str = "brain_lightning") -> Any:
    """The records of both ranks, which have the same weights after every stage."""
    found = [record[side, scenario.__name__] for record in records]
    for record in found:
        assert isinstance(record, Record), record
    # Each process may evaluate by itself: one may have more stages.
    for one, other in zip(*(record.tensors for record in found), strict=False):
        for name in one:
            # Statistics of a BatchNorm on the CPU are each process's own.
            if "running_" not in name and not name.endswith(".mean"):
                assert torch.equal(one[name], other[name]), f"{name} differs between ranks"
    return found


@pytest.mark.parametrize("scenario", scenarios.SHARED, ids=lambda scenario: scenario.__name__)
def test_same_bits_in_same_order_on_every_rank(records: Any, scenario: Any) -> None:
    theirs = of(records, scenario, "speechbrain")
    for rank, ours in enumerate(of(records, scenario)):
        assert_equal(ours, theirs[rank])
        if len(ours.tensors) > 1:
            assert_moved(ours)


ON_BOTH = [("brain_lightning", each) for each in own_loops.IN_TWO_PROCESSES]
ON_BOTH += [("patched", each) for each in own_loops.PATTERNS]


@pytest.mark.parametrize(
    ("side", "scenario"), ON_BOTH, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_loop_of_ones_own_on_every_rank(records: Any, side: str, scenario: Any) -> None:
    theirs = of(records, scenario, "speechbrain")
    for rank, ours in enumerate(of(records, scenario, side)):
        assert_equal(ours, theirs[rank])
        if len(ours.tensors) > 1:
            assert_moved(ours)


@pytest.mark.parametrize("scenario", own_loops.ENDED, ids=lambda scenario: scenario.__name__)
def test_a_loop_of_ones_own_that_the_trainer_ends(records: Any, scenario: Any) -> None:
    theirs = of(records, scenario, "speechbrain")
    for rank, ours in enumerate(of(records, scenario)):
        assert_equal(ours, theirs[rank], random=False)
        assert ours.results[0] > 0


@pytest.mark.gpu
def test_batchnorm_is_synchronized_on_gpus(tmp_path: Path) -> None:
    torchrun = (*TORCHRUN[:-1], "--nproc_per_node=1")
    worker = ("-m", "tests.system.distributed.worker", str(tmp_path), "nccl")
    check_python(*torchrun, *worker, real=True)
    records = torch.load(tmp_path / "rank0.pt", weights_only=False)
    name = scenarios.batchnorm_on_a_gpu.__name__
    assert_equal(records["brain_lightning", name], records["speechbrain", name])
    assert records["brain_lightning", name].results == ["SyncBatchNorm"]


def test_what_processes_decide_in_a_batch_is_one_collective(records: Any) -> None:
    for record in of(records, scenarios.one_collective_a_batch):
        assert record.results == [{1}, {1}, {1}]


def test_windows_of_unequal_batches_are_one_batch(records: Any) -> None:
    for record in of(records, scenarios.accumulated_by_tokens):
        # It has compared its weights with those of one process.
        assert_moved(record)


def test_each_rank_has_data_of_its_own(records: Any) -> None:
    one, other = of(records, scenarios.gan)
    assert one.stage_losses != other.stage_losses


@pytest.mark.parametrize(
    "scenario", [scenarios.gan_on_the_users_trainer, scenarios.automatic_on_the_users_trainer]
)
def test_a_trainer_with_strategy_ddp_keeps_ranks_equal(records: Any, scenario: Any) -> None:
    for record in of(records, scenario):
        assert_moved(record)
        # 10 of 20 items for each rank, in batches of 4; epochs are numbered by the Brain.
        steps, epoch = record.results[-1]
        assert (steps, epoch) == ((18, 3) if "gan" in scenario.__name__ else (9, 3))


def test_all_ranks_find_the_same_before_training(records: Any) -> None:
    one, other = of(records, scenarios.searched_before_training)
    rates, size = one.results
    assert [rates, size] == other.results
    assert len(rates["loss"]) > 10
    # All items of each rank.
    assert size == 20


def test_the_trainer_shares_out_the_data(records: Any) -> None:
    one, other = of(records, scenarios.automatic_on_the_users_trainer)
    assert one.results[:9] != other.results[:9]
    assert sum(map(len, one.results[:3])) == 10


def test_the_trainer_leaves_the_data_alone_if_told_to(records: Any) -> None:
    for record in of(records, scenarios.the_loaders_as_they_are):
        assert sum(event[0] == "fetch" for event in record.events) == 2 * 2 * (5 + 1)
    told, other = (record.results for record in of(records, scenarios.the_loaders_as_they_are))
    assert "no distributed sampler: each of the 2 processes trains on the full" in str(told)
    assert not [each for each in other if "distributed sampler" in str(each)]


def test_names_in_a_checkpoint_are_those_of_one_process(records: Any) -> None:
    for record in of(records, scenarios.names_in_a_checkpoint):
        names, nonzero = record.results[-2:]
        assert "brain_modules.encoder.0.weight" in names
        assert not any("module." in name.removeprefix("brain_modules.") for name in names)
        assert not any(nonzero)


def test_batchnorm_stays_local_on_the_cpu_with_a_warning(records: Any) -> None:
    for record in of(records, scenarios.batchnorm_stays_local):
        assert [message for message in record.results if "'model' has a BatchNorm" in message]
        assert_moved(record)


def test_a_module_that_is_called_around_its_wrapper_is_told_once(records: Any) -> None:
    for rank_records in records:
        record = rank_records["brain_lightning", "called_around_its_wrapper"]
        (message,) = record.results
        assert "'encoder' is called without its DistributedDataParallel" in message
        assert "self.modules.encoder(...)" in message


@pytest.mark.parametrize(
    "scenario", [scenarios.nan_on_one_rank, scenarios.nan_on_one_rank_of_a_fit_batch_of_0_5]
)
def test_every_rank_skips_what_is_not_finite_on_one(records: Any, scenario: Any) -> None:
    for record in of(records, scenario):
        assert record.results == [(4, 1)]
        assert all(w.isfinite().all() for w in record.tensors[-1].values())


def test_a_window_that_ends_with_what_is_not_finite_keeps_ranks_equal(records: Any) -> None:
    one, other = of(records, scenarios.nan_on_one_rank_ends_a_window)
    assert one.results == other.results == [(4, 1)]
    assert_moved(one)
    weights = [name for name in one.tensors[-1] if name.startswith("model.")]
    assert weights
    assert all(torch.equal(one.tensors[-1][n], other.tensors[-1][n]) for n in weights)


def test_every_rank_raises_when_the_patience_of_one_is_exhausted(records: Any) -> None:
    for record in of(records, scenarios.patience_exhausted_by_one_rank):
        assert record.results == [(2, "NonFiniteLossError")]


def test_what_the_main_process_reports_is_known_to_all(records: Any) -> None:
    for record in of(records, scenarios.reported_by_the_main_process):
        assert record.results == [9.0]


def test_what_evaluate_leaves_alone_differs_between_ranks(records: Any) -> None:
    one, other = of(records, scenarios.statistics_are_kept_by_evaluate)
    assert one.results[0] == one.results[2]
    assert one.results != other.results


def test_a_batch_sampler_is_shared_out_once(records: Any) -> None:
    mine = of(records, scenarios.a_batch_sampler)
    for own, users in zip(
        mine, of(records, scenarios.a_batch_sampler_on_the_users_trainer), strict=True
    ):
        assert own.stage_losses == users.stage_losses


def test_a_batch_sampler_of_the_users_is_refused_in_words(records: Any) -> None:
    for record in of(records, scenarios.a_batch_sampler_that_cannot_be_shared_out):
        assert "the batch sampler Batches cannot be split" in record.results[0]


def test_a_saveable_loader_is_saved_by_the_one_that_is_iterated(records: Any) -> None:
    for record in of(records, scenarios.a_saveable_loader):
        assert record.results[-1] == ("SaveableDataLoader", False, 3)


def test_a_strategy_instance_can_be_used_again(records: Any) -> None:
    for record in of(records, scenarios.a_strategy_instance_used_again):
        first, second = record.results
        assert second < first


def test_what_is_unfrozen_on_the_way_is_averaged_from_then_on(records: Any) -> None:
    for record in of(records, scenarios.unfrozen_when_a_stage_starts):
        moved = [key for key in record.tensors[-1] if key.startswith("encoder.module")]
        assert moved
        assert_moved(record)


def test_names_stay_clean_where_modules_are_compiled_and_wrapped_twice(records: Any) -> None:
    for record in of(records, scenarios.compiled_and_fitted_twice):
        layers = ("input", "layers.0.linear", "layers.0.norm", "output")
        names = {f"brain_modules.model.{n}.{w}" for n in layers for w in ("weight", "bias")}
        assert set(record.results[-1]) == names


def test_shards_of_different_lengths_end_the_run_before_the_epoch(records: Any) -> None:
    for record in of(records, scenarios.shards_of_different_lengths):
        ((name, message, step),) = record.results
        assert (name, step) == ("UnequalDataError", 0)
        assert "have 3, 4 training batches, in order of rank" in message
        assert "drop_last=True" in message
        assert not any(event[0] == "on_stage_start" for event in record.events)


def test_an_epoch_of_streams_ends_for_all_with_the_shortest(records: Any) -> None:
    one, other = of(records, scenarios.streams_of_different_lengths)
    assert one.results[-1] == other.results[-1] == 2 * 4
    assert "after batch 4. The epoch ends on all ranks" in one.results[0]
    assert_moved(one)
    for record in of(records, scenarios.a_stream_without_anything_on_one_rank):
        stages = [event for event in record.results[0] if event[0].startswith("on_stage")]
        assert [hook for hook, _ in stages] == ["on_stage_start", "on_stage_end"] * 2


def test_a_validation_that_is_shared_out_finds_the_same_numbers(records: Any) -> None:
    whole = [
        r for r in of(records, scenarios.a_whole_validation)[0].results if type(r) is tuple
    ]
    batches = []
    for record in of(records, scenarios.a_validation_that_is_shared_out):
        found = [result for result in record.results if type(result) is tuple]
        batches.append([result for result in record.results if type(result) is int])
        assert len(found) == len(whole) == 2
        for (rates, ids, losses), (expected, all_ids, _) in zip(found, whole, strict=True):
            assert rates[0] == pytest.approx(expected[0], abs=1e-9)
            # Of the same lists in the same order.
            assert rates[1:] == expected[1:]
            assert ids == all_ids
            assert len(ids) == losses == 101
    # 13 batches, the last one of five: each is evaluated once.
    assert [len(each) for each in batches] == [2 * 7, 2 * 6]
    assert sum(map(sum, batches)) == 2 * 101


def test_a_process_without_a_batch_waits_for_the_others(records: Any) -> None:
    one, other = of(records, scenarios.more_processes_than_batches)
    assert one.results == other.results
    # Three sets: the first and the last are one batch, and the same.
    assert len(one.results) == 2 * 3
    assert one.results[::3] == pytest.approx(one.results[2::3])


def test_what_the_main_process_does_alone(records: Any) -> None:
    main, other = (record.results for record in of(records, scenarios.on_the_main_process))
    assert main[:3] == [(3, 0), ([], 1), ("OSError", "the disk is full")]
    assert other[:2] == [(3, 0), ([4], 1)]
    assert other[2][0] == "MainProcessError"
    assert "fail failed on the main process: OSError('the disk is full')" in other[2][1]
    # What cannot be sent fails everywhere too.
    assert main[3][0] in ("AttributeError", "PicklingError")
    assert other[3][0] == "MainProcessError"


def test_statistics_that_count_with_tensors_and_begin_late(records: Any) -> None:
    for rank, record in enumerate(of(records, scenarios.counted_with_tensors)):
        told = [result for result in record.results if isinstance(result, str)]
        assert all("self.count has changed during the validation" in each for each in told)
        # A process without a batch has counted nothing.
        assert len(told) == 3 - rank
        found = [result for result in record.results if not isinstance(result, str)]
        assert found == [(20, 20), (20, 20), (15, 15)]


def test_a_limit_is_a_remedy_for_different_lengths(records: Any) -> None:
    for record in of(records, scenarios.limited_to_the_same_length):
        assert record.results == [3]


def test_processes_that_lightning_starts_do_the_same(records: Any, tmp_path: Path) -> None:
    check_python("-m", "tests.system.distributed.launched", str(tmp_path))
    for rank, torchruns in enumerate(of(records, scenarios.one_module)):
        launched = torch.load(tmp_path / f"launched{rank}.pt", weights_only=False)
        assert_equal(launched, torchruns)
