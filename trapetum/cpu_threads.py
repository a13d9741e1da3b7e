"""How many threads a product on the CPU uses: all of them, or fewer while those are measured to be faster.

With busy neighbours every parallel region waits for the thread that the scheduler has put off, and one thread can
beat two. Nothing announces that, so now and then a product is timed with the number in use and the next one of the
same size with another number. Both are products that were wanted: only the time by which the trial was slower is
lost, and the next trial waits until that is below 1 % of the time passed. Results do not depend on the number of
threads, so nothing but time changes.
"""

import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

CALLS_BETWEEN_LOOKS = 16  # the clock is read once in so many calls
OVERHEAD = 0.01
SHORTEST_GAP_NS = 2_000_000
TRIALS = 7  # a decision is the median of so many
MUST_WIN_BY = 1.10
PATIENCE = 2048  # calls to wait for a second product of the same size


@dataclass(frozen=True)
class Report:
    """Threads of the products.

    Attributes:
        available: how many they may use.
        in_use: how many they use.
        trials: comparisons made so far.
        gain: median of the last comparisons: time with `in_use` threads over time with the other number tried, below 1
            where `in_use` is the faster; None before the first.
    """

    available: int
    in_use: int
    trials: int
    gain: float | None

    def __str__(self) -> str:
        if self.in_use == self.available:
            return f"{self.in_use} threads"
        return f"{self.in_use} of {self.available} threads, because more were slower here (busy neighbours)"


class ThreadChoice:
    """Runs products, and changes their number of threads when another one is at least 10 % faster.

    Args:
        clock_ns: nanoseconds that only rise; tests pass their own.
    """

    def __init__(self, clock_ns: Callable[[], int] = time.perf_counter_ns):
        self._clock = clock_ns
        self._available = self._count = 0
        self._trials, self._warned = 0, False
        self._begin_again(0)

    def _begin_again(self, available: int) -> None:
        self._available = self._count = available
        self._ratios: dict[int, deque[float]] = {}
        self._calls = self._due_ns = 0
        self._first: tuple[Hashable, int] | None = None  # size and time of the product to compare with
        self._waited = 0
        self._looking = False

    def report(self, available: int) -> Report:
        """What is in use, where `available` threads may be used."""
        if available != self._available:
            return Report(available, available, self._trials, None)
        last = self._ratios.get(self._other())
        gain = statistics.median(last) if last else None
        return Report(available, self._count, self._trials, gain)

    def run(self, call: Callable[[int], object], key: Hashable, available: int):
        """`call(threads)`, timed now and then.

        Args:
            call: computes a product with so many threads.
            key: products with equal keys do equal work.
            available: the most threads it may use; another number than before begins again.
        """
        if available != self._available:
            self._begin_again(available)
        if not self._looking:
            self._calls += 1
            if self._calls % CALLS_BETWEEN_LOOKS or self._clock() < self._due_ns:
                return call(self._count)
            self._looking = True
        if self._first is None:
            return self._timed_first(call, key)
        if self._first[0] != key:
            self._wait()
            return call(self._count)
        return self._timed_second(call)

    def _timed_first(self, call, key):
        begin = self._clock()
        result = call(self._count)
        self._first, self._waited = (key, self._clock() - begin), 0
        return result

    def _wait(self) -> None:
        self._waited += 1
        if self._waited > PATIENCE:
            self._first, self._looking = None, False

    def _other(self) -> int:
        """Half the threads in use and twice as many take turns, where both exist."""
        fewer, more = max(1, self._count // 2), min(2 * self._count, self._available)
        choices = [n for n in (fewer, more) if n != self._count]
        return choices[self._trials // TRIALS % len(choices)]

    def _timed_second(self, call):
        other, (_, now_ns) = self._other(), self._first
        begin = self._clock()
        result = call(other)
        end = self._clock()
        lost_ns = max(0, end - begin - now_ns)
        self._due_ns = end + max(SHORTEST_GAP_NS, int(lost_ns / OVERHEAD))
        self._first, self._looking = None, False
        self._judge(other, now_ns / max(1, end - begin))
        return result

    def _judge(self, other: int, ratio: float) -> None:
        ratios = self._ratios.setdefault(other, deque(maxlen=TRIALS))
        ratios.append(ratio)
        self._trials += 1
        gain = statistics.median(ratios)
        if len(ratios) < TRIALS or gain < (MUST_WIN_BY if other < self._count else 1.0):
            return
        if other < self._count:
            self._warn(other, gain)
        self._count = other
        self._ratios.clear()

    def _warn(self, other: int, gain: float) -> None:
        if not self._warned:
            warnings.warn(
                f"Codebook products run {gain:.2f} times faster on {other} threads than on {self._count} here (busy "
                f"neighbours), so {other} are used from now on, and more again once they are the faster.",
                RuntimeWarning,
                stacklevel=4,
            )
        self._warned = True
