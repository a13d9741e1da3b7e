"""The number of threads of CPU products, on a clock that the tests move."""

import warnings

import pytest
import torch

from trapetum import cpu
from trapetum.cpu_threads import Report, ThreadChoice

US = 1000


class Machine:
    """Products whose time depends on the threads; it counts what a product took, and what trials cost."""

    def __init__(self, us_by_count):
        self.us_by_count, self.now_ns, self.used = us_by_count, 0, []

    def clock(self):
        return self.now_ns

    def product(self, count):
        self.used.append(count)
        self.now_ns += int(self.us_by_count[count] * US)
        return count


def decode(choice, machine, tokens, available=2, keys=("qkv", "out", "up", "down")):
    """So many tokens of one layer; the products of a layer differ in size."""
    for _ in range(tokens):
        for key in keys:
            assert choice.run(machine.product, key, available) == machine.used[-1]


def test_all_threads_while_they_are_the_fastest():
    machine = Machine({2: 100, 1: 180})
    choice = ThreadChoice(machine.clock)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(choice, machine, 5000)
    lost_us = machine.used.count(1) * 80
    assert 0 < lost_us <= 0.0101 * machine.now_ns / US
    assert choice.report(2).in_use == 2 and choice.report(2).gain == pytest.approx(100 / 180)
    assert str(choice.report(2)) == "2 threads"


def test_fewer_threads_when_neighbours_are_busy_and_all_again_when_they_leave():
    machine = Machine({2: 900, 1: 300})
    choice = ThreadChoice(machine.clock)
    with pytest.warns(RuntimeWarning, match="3.00 times faster on 1 thread than on 2"):
        decode(choice, machine, 1000)
    assert choice.report(2).in_use == 1 and machine.used[-400:].count(1) > 380
    assert str(choice.report(2)) == "1 of 2 threads, because more were slower here (busy neighbours)"
    machine.us_by_count = {2: 100, 1: 180}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, not every time
        decode(choice, machine, 4000)
        assert choice.report(2).in_use == 2 and machine.used[-400:].count(2) > 380
        machine.us_by_count = {2: 900, 1: 300}
        decode(choice, machine, 4000)
    assert choice.report(2).in_use == 1


def test_a_gain_below_a_tenth_changes_nothing():
    machine = Machine({2: 105, 1: 100})
    choice = ThreadChoice(machine.clock)
    decode(choice, machine, 5000)
    assert choice.report(2).in_use == 2 and choice.report(2).trials > 20


def test_slow_calls_now_and_then_change_nothing():
    machine = Machine({2: 100, 1: 180})
    choice = ThreadChoice(machine.clock)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for turn in range(3000):
            machine.us_by_count[2] = 5000 if turn % 10 == 0 else 100
            decode(choice, machine, 1)
    assert choice.report(2).in_use == 2


def test_many_threads_are_halved_until_it_no_longer_helps():
    machine = Machine({8: 500, 4: 300, 2: 200, 1: 400})
    choice = ThreadChoice(machine.clock)
    with pytest.warns(RuntimeWarning):
        decode(choice, machine, 3000, available=8)
    assert choice.report(8).in_use == 2


def test_each_size_has_its_own_number_and_small_ones_say_nothing():
    machine = Machine({})
    choice = ThreadChoice(machine.clock)
    times = {"large": {2: 400, 1: 700}, "small": {2: 30, 1: 12}}

    def product(count):
        machine.us_by_count = times[size]
        return machine.product(count)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3000):
            for size in times:
                choice.run(product, size, 2)
    last = machine.used[-200:]
    assert last[0::2].count(2) > 95 and last[1::2].count(1) > 95
    assert choice.report(2).in_use == 2


def test_only_products_of_one_size_are_compared():
    machine = Machine({2: 100, 1: 180})
    choice = ThreadChoice(machine.clock)
    for size in range(20_000):
        choice.run(machine.product, size, 2)
    assert choice.report(2).trials == 0 and set(machine.used) == {2}
    decode(choice, machine, 1000)
    assert choice.report(2).trials > 0


def test_another_number_of_threads_begins_again():
    machine = Machine({4: 100, 2: 900, 1: 300})
    choice = ThreadChoice(machine.clock)
    with pytest.warns(RuntimeWarning):
        decode(choice, machine, 400)
    assert choice.report(4) == Report(4, 4, 0, None)
    decode(choice, machine, 10, available=4)
    assert machine.used[-40:].count(4) > 35 and choice.report(4).in_use == 4
    assert choice.report(2).in_use == 2


@pytest.mark.skipif(not cpu.available(), reason="the compiled kernel is missing: " + cpu.why_not())
def test_products_ask_for_their_threads(monkeypatch):
    counts = []

    class Spy(ThreadChoice):
        def run(self, call, key, available):
            counts.append((key, available))
            return call(1)

    monkeypatch.setattr(cpu, "_CHOICE", Spy())
    indices, codebook = torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 16).half()
    packed, before = cpu.pack(indices), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert cpu.gemv(torch.ones(64), packed, codebook, 64, 4).tolist() == [64.0] * 8
        cpu.gemv(torch.ones(64), packed, codebook, 64, 4, threads=2)  # told, so not asked
        torch.set_num_threads(1)
        cpu.gemv(torch.ones(64), packed, codebook, 64, 4)  # nothing to choose from
        assert cpu.threads().available == 1
    finally:
        torch.set_num_threads(before)
    assert counts == [((8, 64, 4, 0), 2)]
