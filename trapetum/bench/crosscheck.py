"""Our timing beside Triton's, of the same kernel and shape in one process: what each of them measures.

graph               one CUDA graph of many calls over distinct weights, more than the cache holds; time of a replay / calls
do_bench            one call at a time between two events, over one and the same weight; the cache is overwritten before
                    each call, outside the events
do_bench_cudagraph  one CUDA graph of many calls over one and the same weight; nothing empties the cache
"""

import statistics
from collections.abc import Sequence

import torch

from trapetum import machine, timing
from trapetum.bench.multiply import make_product
from trapetum.bench.products import Product
from trapetum.bench.reading import cold_read_gbps
from trapetum.bench.recording import Recorder
from trapetum.records import Record

# What each timer does about the cache. Triton's two have words of their own, so that nobody takes them for ours.
CACHE = {"graph": "cold", "do_bench": "flushed", "do_bench_cudagraph": "repeated"}


def triton_missing(device: str = "auto") -> str:
    """Why Triton's timers cannot run here, as one sentence; empty when they can."""
    if machine.choose_device(device) != "cuda":
        return "Triton's do_bench times CUDA kernels: there is no GPU here to compare it on."
    try:
        from triton.testing import do_bench, do_bench_cudagraph  # noqa: F401
    except ImportError as error:
        return (
            f"Triton's timers cannot be imported ({error}); install the `triton` that this PyTorch asks for."
        )
    return ""


def compare_timers(
    device: str = "auto",
    shape: tuple[int, int] = (4096, 4096),
    methods: Sequence[str] = ("codebook", "linear-fp16"),
    profile: str = "quick",
) -> list[Record]:
    """Time one shape with our timer and with both of Triton's.

    Args:
        device: "auto" or "cuda".
        shape: (in_features, out_features).
        methods: of `bench.gemv`.
        profile: "smoke", "quick" or "full".

    Returns:
        `gemv_time` records in us; `config.timer` is a key of `CACHE` and `config.l2` its value.

    Raises:
        RuntimeError: there is no GPU or no Triton here.
        ArithmeticError: a product is wrong; nothing wrong is timed.
    """
    if why := triton_missing(device):
        raise RuntimeError(why)
    recorder = Recorder("cuda", profile)
    recorder.cold_read_gbps = cold_read_gbps(recorder)
    with torch.inference_mode():
        for method in methods:
            product = make_product(method, *shape, 4, "cuda")
            product.checked_error()
            for timer, samples in _times(product, recorder).items():
                _add(recorder, shape, product, timer, samples)
    return recorder.close()


def _times(product: Product, recorder: Recorder) -> dict[str, list[float]]:
    """Microseconds a call by timer."""
    from triton.testing import do_bench, do_bench_cudagraph

    copies = timing.copies_for(product.weight_bytes, "cuda", recorder.cache_bytes or None)
    calls = product.calls(copies)
    ours = timing.cuda_graph_us(calls, recorder.sizes.repeats)
    with torch.cuda.stream(torch.cuda.Stream()):  # older releases refuse to capture on the default stream
        theirs = {
            "do_bench": do_bench(calls[0], return_mode="all"),
            "do_bench_cudagraph": do_bench_cudagraph(calls[0], return_mode="all"),
        }
    return {"graph": ours, **{name: [1e3 * ms for ms in every] for name, every in theirs.items()}}


def _add(
    recorder: Recorder, shape: tuple[int, int], product: Product, timer: str, samples: list[float]
) -> None:
    config = {
        "in_features": shape[0],
        "out_features": shape[1],
        **product.config,
        "weight_bytes": product.weight_bytes,
        "l2": CACHE[timer],
        "chain": "alone",
        "timer": timer,
        "beside": "crosscheck",
    }
    if timer != "do_bench_cudagraph":  # its weights may come from the cache, so it implies no bandwidth
        config["bytes"] = product.weight_bytes + product.io_bytes
    recorder.add("gemv_time", samples, product.method, config, kernel_sha256=product.kernel_sha256)


def explain(found: Sequence[Record]) -> list[str]:
    """Sentences that compare the timers, with the numbers of `found`.

    Args:
        found: records of `compare_timers`.
    """
    sentences = []
    for method in dict.fromkeys(r.method for r in found):
        us = {r.config["timer"]: r for r in found if r.method == method}
        if us.keys() >= CACHE.keys():
            sentences += [_flushed(method, us), _repeated(method, us)]
    return [*sentences, *_ratios(found)]


def _flushed(method: str, us: dict[str, Record]) -> str:
    ours, theirs = us["graph"].value, us["do_bench"].value
    return (
        f"{method}: do_bench says {theirs:.2f} us, the graph {ours:.2f}. Both read the weights from memory. do_bench puts "
        f"two events around every single call, so its {theirs - ours:+.2f} us are the start and the end of a kernel that "
        "runs alone (its first loads wait, its last blocks drain, the flush's writes may still be on their way to memory, "
        "the events themselves); in the graph, as in a model, "
        "the next call's launch hides behind this one."
    )


def _repeated(method: str, us: dict[str, Record]) -> str:
    ours, theirs = us["graph"].value, us["do_bench_cudagraph"].value
    weights = us["graph"].config["weight_bytes"]
    cache = float(us["graph"].device.get("l2_bytes") or 0)
    if weights <= cache:
        why = f"its {weights / 1e6:.1f} MB stay in the {cache / 1e6:.0f} MB cache: it times the cache, not the memory"
    else:
        why = f"its {weights / 1e6:.1f} MB are more than the {cache / 1e6:.0f} MB cache, of which a part may still hit"
    return (
        f"{method}: do_bench_cudagraph says {theirs:.2f} us ({theirs / ours:.2f} times the graph over distinct weights). It "
        f"repeats one and the same weight without emptying the cache, and {why}."
    )


def _ratios(found: Sequence[Record]) -> list[str]:
    """How the speedup of the first method over the last depends on the timer."""
    methods = list(dict.fromkeys(r.method for r in found))
    if len(methods) < 2:
        return []
    value = {(r.method, r.config["timer"]): statistics.median(r.samples) for r in found}
    one, other = methods[0], methods[-1]
    said = [
        f"{value[other, t] / value[one, t]:.2f} ({t})"
        for t in CACHE
        if (one, t) in value and (other, t) in value
    ]
    return [f"{one} over {other}: {', '.join(said)} times as fast."] if said else []
