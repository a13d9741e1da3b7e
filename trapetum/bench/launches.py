"""What a launch costs inside a CUDA graph, and how many of them a token makes."""

import ctypes
from collections.abc import Callable

import torch

from trapetum import cuda, timing
from trapetum.bench.recording import Recorder
from trapetum.build import source_sha256
from trapetum.launch import kernel, pointer
from trapetum.records import Record

THREADS, IN_A_GRAPH = 256, 256


def add_launch_time(recorder: Recorder, pdl: bool) -> Record:
    """Record the time of a kernel that does nothing, one block a multiprocessor, in a graph of many such.

    Args:
        recorder: of a GPU.
        pdl: with programmatic edges between the launches.

    Returns:
        the `launch_time` record (us).
    """
    device, blocks = torch.cuda.current_device(), int(recorder.machine["sms"])
    buffer = torch.zeros(4, dtype=torch.int32, device="cuda")
    nothing = kernel(cuda.READ_SOURCE, "read_bytes", (), device)  # asked to read no bytes
    arguments = (pointer(buffer), (0, ctypes.c_uint64), pointer(buffer))

    def call() -> None:
        nothing.launch((blocks, 1, 1), (THREADS, 1, 1), 0, arguments, pdl)

    samples = timing.cuda_graph_us([call], recorder.sizes.repeats, IN_A_GRAPH)
    config = {"chain": "pdl" if pdl else "alone", "calls": IN_A_GRAPH, "blocks": blocks, "block": THREADS}
    sha = source_sha256(cuda.READ_SOURCE)
    return recorder.add("launch_time", samples, "nothing", config, kernel_sha256=sha)


def kernels_a_token(make: Callable[[int], object], few: int = 32, many: int = 64) -> float:
    """Kernels that run for one token, counted by torch's profiler, those inside graphs too.

    Args:
        make: makes so many tokens.
        few, many: two lengths; what a generation costs besides its tokens drops out of the difference.

    Returns:
        the number; 0 where none runs, or where the profiler sees none.
    """
    make(many)  # graphs are captured, with trial launches, before anything is counted
    counts = [_kernels(lambda n=n: make(n)) for n in (few, many)]
    return (counts[1] - counts[0]) / (many - few)


def _kernels(work: Callable[[], object]) -> int:
    """Kernels on the device during `work`; copies and fills are not counted. 0 where nothing can be traced."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as traced:
            work()
            torch.cuda.synchronize()
        events = traced.events()
    except (
        RuntimeError,
        AssertionError,
    ):  # no permission, no tracing library, or another profiler is at work
        return 0
    return sum(
        e.device_type == DeviceType.CUDA and not e.name.startswith(("Memcpy", "Memset")) for e in events
    )
