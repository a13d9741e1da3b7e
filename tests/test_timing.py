"""Timing: spreads, how many copies make a rotation cold, interleaved rounds, threads, CUDA graphs."""

import time

import pytest
import torch

from trapetum import timing

MIB = 1 << 20


def test_spread_is_median_and_quantiles():
    spread = timing.Spread.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (spread.median, spread.p20, spread.p80, spread.n) == (3.5, 2.0, 5.0, 6)


def test_spread_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        timing.Spread.of([])


@pytest.mark.parametrize(
    "device, cache_mib, expected_mib",
    [("cuda", 50, 256), ("cuda", 126, 504), ("cpu", 32, 128), ("cpu", 200, 512), ("cpu", 1000, 1250)],
)
def test_rotation_exceeds_the_cache(device, cache_mib, expected_mib):
    assert timing.rotation_bytes(device, cache_mib * MIB) == expected_mib * MIB


def test_copies_cover_the_rotation_and_respect_memory():
    assert timing.copies_for(8 * MIB, "cpu", cache=32 * MIB, free=16 << 30) == 16
    assert timing.copies_for(900 * MIB, "cuda", cache=50 * MIB, free=16 << 30) == 2
    assert timing.copies_for(8 * MIB, "cpu", cache=32 * MIB, free=256 * MIB) == 8
    assert timing.copies_for(8 * MIB, "cpu", cache=32 * MIB, free=16 << 30, among=4) == 8
    with pytest.raises(MemoryError, match="choose a smaller shape"):
        timing.copies_for(8 * MIB, "cpu", cache=32 * MIB, free=12 * MIB)


def test_free_memory_honours_the_containers_limit(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert timing._container_available_bytes(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert timing._container_available_bytes(tmp_path) > 1 << 60
    assert 0 < timing.free_bytes("cpu") < 1 << 50


def test_rounds_are_interleaved_and_the_first_is_dropped():
    order = []
    cases = {name: [lambda name=name: order.append(name)] * 2 for name in "ab"}
    samples = timing.interleaved_us(cases, rounds=3, budget_s=60)
    assert "".join(order) == "aabb" * 4
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3}


def test_times_are_per_call_in_microseconds():
    samples = timing.interleaved_us({"nap": [lambda: time.sleep(0.005)] * 3}, rounds=3)
    assert 5000 <= min(samples["nap"]) < 50_000


def test_budget_ends_the_rounds_but_not_before_three():
    samples = timing.interleaved_us({"nap": [lambda: time.sleep(0.01)]}, rounds=100, budget_s=0.0)
    assert len(samples["nap"]) == 3


def test_warm_case_runs_once_untimed():
    count = []
    timing.interleaved_us({"w": timing.Case([lambda: count.append(1)] * 2, warm=True)}, rounds=1)
    assert len(count) == 2 * 3


def test_threads_are_set_for_the_case_and_restored():
    before, seen = torch.get_num_threads(), []
    case = timing.Case([lambda: seen.append(torch.get_num_threads())], threads=1)
    timing.interleaved_us({"one": case}, rounds=1)
    assert set(seen) == {1} and torch.get_num_threads() == before


def test_no_calls_is_refused_by_name():
    with pytest.raises(ValueError, match="'empty'"):
        timing.interleaved_us({"empty": []})


def test_fewer_threads_are_chosen_only_when_clearly_faster():
    assert timing.pick_threads({8: 100.0, 4: 95.0, 1: 300.0}) == 8
    assert timing.pick_threads({8: 900.0, 4: 500.0, 1: 400.0}) == 1
    assert timing.thread_choices(8) == [8, 4, 1] and timing.thread_choices(1) == [1]


def test_fastest_threads_measures_each_case():
    def slow_with_more():
        time.sleep(0.002 * torch.get_num_threads())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert timing.fastest_threads({"contended": [slow_with_more] * 2}) == {"contended": 1}
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graph_agrees_with_the_bytes_of_a_copy():
    source = torch.rand(64 * MIB, device="cuda")
    copies = [torch.empty_like(source) for _ in range(3)]
    samples = timing.cuda_graph_us(
        [lambda c=c: c.copy_(source) for c in copies], repeats=5, calls_per_graph=6
    )
    assert len(samples) == 5
    gbps = 2 * source.nbytes / min(samples) / 1e3
    assert 50 < gbps < 20_000
    assert torch.equal(copies[2], source)
