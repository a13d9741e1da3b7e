"""How many threads a product on the CPU uses: all of them, or fewer while those are measured to be faster.

With busy neighbours every parallel region waits for the thread that the scheduler has put off, and one thread can
beat two; and a small product is over before a second thread has woken. Nothing announces either, so now and then a
product is timed with the number in use and the next one of the same size with another number, twice. All are products
that were wanted: only the time by which a trial was slower is lost, and the next trial waits until that is below 1 % of
the time passed. Each size has its own number. Results do not depend on the number of threads, so nothing but time
changes.
"""

import random
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

CALLS_BETWEEN_LOOKS = (8, 24)  # the clock is read now and then, at random: every size has its turn
OVERHEAD = 0.01
SHORTEST_GAP_NS = 2_000_000
TURNS = 4  # products of a comparison: ours, theirs, ours, theirs
TRIALS = 5  # a decision is the median of so many comparisons
MUST_WIN_BY = 1.10
PATIENCE = 2048  # calls to wait for the next products of the same size
PASSED_BY = 8  # looks left to sizes that have been compared less often
WORTH_SAYING_NS = 100_000  # shorter products on fewer threads are no sign of neighbours


@dataclass(frozen=True)
class Report:
    """Threads of the products of the size that takes longest.

    Attributes:
        available: how many they may use.
        in_use: how many they use.
        trials: comparisons made so far, of all sizes.
        gain: median of the last comparisons: time with `in_use` threads over time with the other number tried, below 1
            where `in_use` is the faster; None before the first.
    """

    available: int
    in_use: int
    trials: int
    gain: float | None

    def __str__(self) -> str:
        if self.in_use == self.available:
            return _threads(self.in_use)
        return f"{self.in_use} of {_threads(self.available)}, because more were slower here (busy neighbours)"


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


@dataclass
class _Size:
    """What is known of the products of one size."""

    available: int
    count: int
    longest_ns: int = 0
    trials: int = 0
    ratios: dict[int, deque[float]] = field(default_factory=dict)

    def other(self) -> int:
        """Half the threads in use and twice as many take turns, where both exist."""
        fewer, more = max(1, self.count // 2), min(2 * self.count, self.available)
        choices = [n for n in (fewer, more) if n != self.count]
        return choices[self.trials // TRIALS % len(choices)]

    def gain(self) -> float | None:
        last = self.ratios.get(self.other())
        return statistics.median(last) if last else None

    def judge(self, other: int, ratio: float) -> float | None:
        """Note a comparison; when it changes the number in use, return the gain."""
        ratios = self.ratios.setdefault(other, deque(maxlen=TRIALS))
        ratios.append(ratio)
        self.trials += 1
        gain = statistics.median(ratios)
        if len(ratios) < TRIALS or gain < (MUST_WIN_BY if other < self.count else 1.0):
            return None
        self.count = other
        self.ratios.clear()
        return gain


class ThreadChoice:
    """Runs products, and changes their number of threads when another one is at least 10 % faster.

    Args:
        clock_ns: nanoseconds that only rise; tests pass their own.
    """

    def __init__(self, clock_ns: Callable[[], int] = time.perf_counter_ns):
        self._clock = clock_ns
        self._warned, self._random = False, random.Random(0)
        self._begin_again(0)

    def _begin_again(self, available: int) -> None:
        self._available = available
        self._sizes: dict[Hashable, _Size] = {}
        self._until_look = self._due_ns = self._waited = self._passed = 0
        self._key: Hashable | None = None  # of the size that is being compared
        self._times: list[int] = []  # of its products, with the number in use and the other one in turn
        self._looking = False

    def report(self, available: int) -> Report:
        """What is in use, where `available` threads may be used."""
        if available != self._available or not self._sizes:
            return Report(available, available, 0, None)
        size = max(self._sizes.values(), key=lambda s: s.longest_ns)
        return Report(available, size.count, sum(s.trials for s in self._sizes.values()), size.gain())

    def run(self, call: Callable[[int], object], key: Hashable, available: int):
        """`call(threads)`, timed now and then.

        Args:
            call: computes a product with so many threads.
            key: products with equal keys do equal work.
            available: the most threads it may use; another number than before begins again.
        """
        if available != self._available:
            self._begin_again(available)
        size = self._sizes.get(key)
        count = size.count if size else available
        if not self._looking:
            self._until_look -= 1
            if self._until_look > 0:
                return call(count)
            self._until_look = self._random.randint(*CALLS_BETWEEN_LOOKS)
            if self._clock() < self._due_ns or self._passes_by(size):
                return call(count)
            self._looking, self._passed = True, 0
            self._key, self._times, self._waited = key, [], 0
        if key != self._key:
            self._wait()
            return call(count)
        return self._timed(call, size or self._sizes.setdefault(key, _Size(available, available)))

    def _passes_by(self, size: _Size | None) -> bool:
        """Whether to leave a comparison to a size that has had fewer; not for long, it may be gone for good."""
        fewest = min((s.trials for s in self._sizes.values()), default=0)
        self._passed += 1
        return size is not None and size.trials > fewest and self._passed <= PASSED_BY

    def _wait(self) -> None:
        self._waited += 1
        self._looking = self._waited <= PATIENCE

    def _timed(self, call, size: _Size):
        other = size.other()
        begin = self._clock()
        result = call(other if len(self._times) % 2 else size.count)
        end = self._clock()
        self._times.append(end - begin)
        if len(self._times) == TURNS:
            self._looking = False
            self._compare(size, other, end)
        return result

    def _compare(self, size: _Size, other: int, now_ns: int) -> None:
        """The fastest of each kind, so that a call that met an accident does not count."""
        ours, theirs, before = min(self._times[::2]), min(self._times[1::2]), size.count
        lost_ns = sum(max(0, t - ours) for t in self._times[1::2])
        self._due_ns = now_ns + max(SHORTEST_GAP_NS, int(lost_ns / OVERHEAD))
        size.longest_ns = max(size.longest_ns, min(ours, theirs))
        gain = size.judge(other, ours / max(1, theirs))
        if gain is not None and other < before and ours >= WORTH_SAYING_NS:
            self._warn(other, before, gain)

    def _warn(self, count: int, before: int, gain: float) -> None:
        if not self._warned:
            warnings.warn(
                f"Codebook products run {gain:.2f} times faster on {_threads(count)} than on {before} here (busy "
                f"neighbours), so {count} will be used, and more again once they are the faster.",
                RuntimeWarning,
                stacklevel=6,
            )
        self._warned = True
