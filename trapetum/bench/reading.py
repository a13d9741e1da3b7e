"""Read bandwidth: the ceiling of everything else."""

import torch

from trapetum import cpu, cuda, timing
from trapetum.bench.recording import Recorder
from trapetum.build import source_sha256
from trapetum.records import Record

_BLOCK = 1 << 20
_known_gbps: dict[str, float] = {}  # what a cold read reached in this process, by device


def _buffer(nbytes: int, device: str) -> torch.Tensor:
    """Random words; the block repeats, since making so many random numbers would take longer than the reading."""
    block = torch.randint(-(2**62), 2**62, (min(_BLOCK, nbytes // 8),), dtype=torch.int64, device=device)
    return block.repeat(-(-nbytes // block.nbytes))[: nbytes // 8]


def cuda_read_us(nbytes: int, repeats: int) -> list[float]:
    """Microseconds to read `nbytes` of device memory once, one sample a replay.

    Raises:
        RuntimeError: the CUDA kernels cannot run here.
    """
    if not cuda.available():
        raise RuntimeError(f"the read bandwidth cannot be measured: {cuda.why_not()}")
    buffer = _buffer(nbytes, "cuda")
    return timing.cuda_graph_us([lambda: cuda.read(buffer)], repeats, calls_per_graph=4)


def cpu_read_us(nbytes: int, rounds: int) -> dict[int, list[float]]:
    """Microseconds to read `nbytes` of memory once, by number of threads, rounds interleaved."""
    buffer = _buffer(nbytes, "cpu")
    reads = {n: timing.Case([lambda: cpu.read_sum(buffer)], threads=n) for n in timing.thread_choices()}
    return timing.interleaved_us(reads, rounds, budget_s=5.0)


def _samples_gbps(recorder: Recorder) -> tuple[int, dict[int, list[float]]]:
    """Bytes of the buffer, and GB/s by number of threads (0: a GPU); also remembers the ceiling."""
    size = recorder.sizes
    if recorder.device == "cuda":
        nbytes, times = size.read_bytes, {0: cuda_read_us(size.read_bytes, size.repeats)}
    else:
        nbytes = max(size.read_bytes, timing.rotation_bytes("cpu", recorder.cache_bytes or None))
        times = cpu_read_us(nbytes, size.repeats)
    samples = {threads: [nbytes / 1e3 / us for us in every] for threads, every in times.items()}
    _remember(recorder.device, samples)
    return nbytes, samples


def _remember(device: str, samples: dict[int, list[float]]) -> None:
    if device == "cuda":
        _known_gbps[device] = timing.Spread.of(samples[0]).median
    else:
        best = max(gbps for every in samples.values() for gbps in every)
        _known_gbps[device] = max(best, _known_gbps.get(device, 0.0))


def cold_read_gbps(recorder: Recorder) -> float:
    """What a cold read reaches on this device, measured once per process, in GB/s: the gate's ceiling.

    Returns:
        on a GPU the median. On a CPU the best sample so far: neighbours take bandwidth away by the minute, and the
        gate asks what the memory can do, not what it did on average.
    """
    if recorder.device not in _known_gbps:
        _samples_gbps(recorder)
    return _known_gbps[recorder.device]


def note_cpu_read(gbps: float) -> float:
    """Take a cold read of other rounds into account; returns the ceiling in GB/s."""
    _remember("cpu", {0: [gbps]})
    return _known_gbps["cpu"]


def bandwidth(device: str = "auto", profile: str = "quick") -> list[Record]:
    """Measure the read bandwidth of the device's memory.

    Args:
        device: "auto", "cpu" or "cuda".
        profile: "smoke", "quick" or "full".

    Returns:
        `read_bandwidth` records in GB/s: one on a GPU; on a CPU one per number of threads, the fastest last
        (`config.fastest`).

    Raises:
        RuntimeError: the CUDA kernels cannot run here.
    """
    recorder = Recorder(device, profile)
    nbytes, samples = _samples_gbps(recorder)
    side, source = (cuda, cuda.READ_SOURCE) if recorder.device == "cuda" else (cpu, cpu.SOURCE)
    sha = source_sha256(source) if side.available() else None
    order = sorted(samples, key=lambda threads: timing.Spread.of(samples[threads]).median)
    for threads in order:
        config = {"bytes": nbytes, "l2": "cold", "chain": "alone", "fastest": threads == order[-1]}
        if recorder.device == "cpu":
            available = {"threads": threads, "threads_available": max(order)}
            config |= {**available, "path": cpu.active_path()}
        recorder.add("read_bandwidth", samples[threads], "read", config, kernel_sha256=sha)
    return recorder.close()
