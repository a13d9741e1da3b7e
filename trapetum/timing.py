"""Time very short calls: CUDA graphs over rotated weights on a GPU, interleaved rounds on a CPU.

What makes a time wrong, and what is done about it here:

- Weights that stay in the cache: `copies_for` says over how many distinct copies to rotate (`cold`); a caller
  that passes one and the same call measures the cached case (`warm`).
- Launches from Python: on a GPU all calls are captured in one CUDA graph, and replays are queued back to
  back, so that the host is never waited for.
- A machine that changes under the measurement: on a CPU every round times every case once, so that all of
  them see the same neighbours; ratios of medians are then fair. The first round is dropped.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]

COLD_CACHES = 4  # rotate over at least this many times the cache ...
CPU_ROTATION_BYTES = 512 << 20  # ... but on a CPU not over more than this, unless the cache itself is larger
CPU_MARGIN = 1.25
GPU_FLOOR_BYTES = 256 << 20
MEMORY_SHARE = 0.25  # of the free memory, for the copies of one case
WARM_UP_S = 0.03
FEWER_MUST_WIN_BY = 1.10
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Spread:
    """Median and spread of some samples, in the samples' unit."""

    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Summarise samples.

        Raises:
            ValueError: there are none.
        """
        if not samples:
            raise ValueError("a spread needs at least one sample, but there is none.")
        ordered = sorted(samples)
        return cls(statistics.median(ordered), _quantile(ordered, 0.2), _quantile(ordered, 0.8), len(ordered))


def _quantile(ordered: Sequence[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def cache_bytes(device: str) -> int:
    """Bytes of the cache that a rotation has to exceed: L2 of the GPU, last level of the CPU."""
    from trapetum import machine

    return int(machine.describe(device).get("l2_bytes") or 32 << 20)


def free_bytes(device: str) -> int:
    """Bytes of memory that are free: on the GPU, or on the host (the container's limit counts)."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return min(_host_available_bytes(), _container_available_bytes())


def _host_available_bytes() -> int:
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 << 30


def _container_available_bytes(root: Path = Path("/sys/fs/cgroup")) -> int:
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        return int(limit) - used if limit != "max" else 1 << 62
    except (OSError, ValueError):
        return 1 << 62


def rotation_bytes(device: str, cache: int | None = None) -> int:
    """How many bytes of distinct weights make a rotation cold.

    Args:
        device: "cpu" or "cuda".
        cache: bytes of the cache; asked from the machine when None.

    Returns:
        on CUDA 4 times the L2, at least 256 MiB; on a CPU 4 times the last-level cache, but not over 512 MiB
        unless the cache is that large (a virtual machine may report its host's), then 1.25 times.
    """
    cache = cache_bytes(device) if cache is None else cache
    if device == "cuda":
        return max(COLD_CACHES * cache, GPU_FLOOR_BYTES)
    return int(max(CPU_MARGIN * cache, min(COLD_CACHES * cache, CPU_ROTATION_BYTES)))


def copies_for(
    nbytes: int, device: str, cache: int | None = None, free: int | None = None, among: int = 1
) -> int:
    """How many distinct copies of a weight to rotate over so that none is found in the cache.

    Args:
        nbytes: bytes of one copy.
        device: "cpu" or "cuda".
        cache: bytes of the cache (asked from the machine when None).
        free: bytes of free memory (asked when None); at most a quarter is used.
        among: how many cases of about the same bytes take turns in the same rounds. Then all of their weights pass
            through the cache before one is met again, so together they rotate over twice `rotation_bytes`.

    Returns:
        at least 2 copies; fewer than the rotation needs only where memory does not allow it.

    Raises:
        MemoryError: not even two copies fit.
    """
    free = free_bytes(device) if free is None else free
    share = min(1.0, 2 / among)
    wanted = max(2, math.ceil(share * rotation_bytes(device, cache) / nbytes))
    fitting = int(MEMORY_SHARE * free / among / nbytes)
    if fitting < 2 and free < 2 * nbytes:
        raise MemoryError(
            f"two copies of {nbytes / 1e9:.2f} GB do not fit the {free / 1e9:.2f} GB that are free "
            f"on {device}; choose a smaller shape."
        )
    return max(2, min(wanted, fitting))


def cuda_graph_us(calls: Sequence[Call], repeats: int = 15, calls_per_graph: int = 48) -> list[float]:
    """Time calls on the GPU by replaying one CUDA graph of all of them.

    Args:
        calls: distinct closures, one per copy of the weights (cold), or the same one (warm). Each must be
            capturable: no synchronisation, no allocation outside torch's allocator.
        repeats: number of timed replays.
        calls_per_graph: the calls are repeated in order until the graph holds at least this many.

    Returns:
        microseconds per call, one value per replay.

    Raises:
        ValueError: no calls.
    """
    if not calls:
        raise ValueError("nothing to time: the list of calls is empty.")
    every = list(calls) * math.ceil(calls_per_graph / len(calls))
    graph = _capture(every)
    _warm_up(graph)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 2)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    spans_ms = [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
    return [1e3 * ms / len(every) for ms in spans_ms[1:]]  # the first replay waited for the host


def _capture(calls: Sequence[Call]) -> "torch.cuda.CUDAGraph":
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in dict.fromkeys(calls):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _warm_up(graph: "torch.cuda.CUDAGraph") -> None:
    """Replay until the clocks have had time to rise."""
    end = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < end:
        graph.replay()
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Case:
    """One thing to time on a CPU.

    Attributes:
        calls: one closure per copy of the weights, or the same one several times (warm).
        threads: torch's and the kernel's number of threads; None leaves it as it is.
        warm: call once untimed before each turn, so that the weights are in the cache.
    """

    calls: Sequence[Call]
    threads: int | None = None
    warm: bool = False


def _wake_threads(threads: int | None) -> None:
    """Set the number of threads and make the pool run once, outside the timed part."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.ones(1 << 18).sum()


def _turn_us(case: Case) -> float:
    _wake_threads(case.threads)
    if case.warm:
        case.calls[0]()
    start = time.perf_counter_ns()
    for call in case.calls:
        call()
    return (time.perf_counter_ns() - start) / 1e3 / len(case.calls)


def interleaved_us(
    cases: Mapping[str, Case | Sequence[Call]], rounds: int = 11, budget_s: float = 10.0
) -> dict[str, list[float]]:
    """Time several cases on a CPU, every round each of them once, so that all meet the same neighbours.

    Args:
        cases: by name, a `Case` or just its calls.
        rounds: timed rounds; one more comes first and is dropped.
        budget_s: stop after the round that passes this many seconds (at least three timed rounds are made).

    Returns:
        by name, microseconds per call, one value per round; entry i of every list comes from the same round.

    Raises:
        ValueError: a case has no calls.
    """
    every = {name: case if isinstance(case, Case) else Case(case) for name, case in cases.items()}
    for name, case in every.items():
        if not case.calls:
            raise ValueError(f"nothing to time in {name!r}: its list of calls is empty.")
    samples: dict[str, list[float]] = {name: [] for name in every}
    end = time.perf_counter() + budget_s
    with using_threads(None):
        for turn in range(rounds + 1):
            for name, case in every.items():
                samples[name].append(_turn_us(case))
            if turn >= MIN_ROUNDS and time.perf_counter() > end:
                break
    return {name: values[1:] for name, values in samples.items()}


@contextmanager
def using_threads(threads: int | None):
    """Set torch's (and the kernel's) number of threads for a block; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def thread_choices(available: int | None = None) -> list[int]:
    """The thread counts worth trying, most first: all, half, one."""
    available = torch.get_num_threads() if available is None else available
    return sorted({available, max(1, available // 2), 1}, reverse=True)


def fastest_threads(
    cases: Mapping[str, Sequence[Call]], rounds: int = 2, budget_s: float = 2.0
) -> dict[str, int]:
    """Find for each case the number of threads that is fastest now.

    Busy neighbours can make two threads slower than one (each parallel region then waits for the scheduler),
    so the full count is kept only if no smaller one is at least 10 % faster.

    Returns:
        by name, the number of threads.
    """
    counts = thread_choices()
    trial = {(name, n): Case(calls, threads=n) for name, calls in cases.items() for n in counts}
    times = interleaved_us(trial, rounds, budget_s)
    best = {key: min(values) for key, values in times.items()}
    return {name: pick_threads({n: best[name, n] for n in counts}) for name in cases}


def pick_threads(us_by_count: Mapping[int, float]) -> int:
    """The full count, unless a smaller one is at least 10 % faster.

    Args:
        us_by_count: time by number of threads, in any unit.
    """
    full = max(us_by_count)
    fastest = min(us_by_count, key=us_by_count.get)
    return fastest if us_by_count[full] > FEWER_MUST_WIN_BY * us_by_count[fastest] else full
