"""Times of y = W x for every method, cold and warm, in one process."""

from collections.abc import Callable, Iterable, Sequence

import torch

from trapetum import timing
from trapetum.bench import peers
from trapetum.bench.products import CPU_METHODS, CUDA_METHODS, NotPossible, Product, build
from trapetum.bench.reading import cold_read_gbps, note_cpu_read
from trapetum.bench.recording import Recorder
from trapetum.records import Record

WARM_CALLS = 8  # calls of one and the same weight in a warm turn on a CPU
TRIAL_CALLS = (
    32  # to choose the threads: where neighbours are busy, each call on too many waits for the scheduler
)
_WITH_BITS = ("codebook", "codebook-int8", "codebook+sparse", "read")


Say = Callable[[str], object]


def silent(_sentence: str) -> None:
    """Say nothing about what is left out."""


def methods_on(device: str) -> tuple[str, ...]:
    """The methods that `gemv` times on "cpu" or "cuda", without other people's packages (`bench.peers`)."""
    return CUDA_METHODS if device == "cuda" else CPU_METHODS


def make_product(method: str, in_features: int, out_features: int, bits: int, device: str) -> Product:
    """One product of this package or, on CUDA, of a peer; raises as `products.build` and `peers.build`."""
    if device == "cuda" and method in peers.PEERS:
        return peers.build(method, in_features, out_features, device)
    return build(method, in_features, out_features, bits, device)


def gemv(
    device: str = "auto",
    shapes: Iterable[tuple[int, int]] | None = None,
    methods: Sequence[str] | None = None,
    bits: Sequence[int] | None = None,
    l2: Sequence[str] = ("cold", "warm"),
    profile: str = "quick",
    say: Say = silent,
) -> list[Record]:
    """Time y = W x with one row x, every method in the same process.

    Args:
        device: "auto", "cpu" or "cuda".
        shapes: (in_features, out_features); None for the profile's.
        methods: None for all of the device's (`methods_on(device)`) and, on CUDA, the peers that are installed. Only timed when
            asked for: "codebook+sparse", with 0.45 % of the weights apart (`bench.with_outliers.method_of` for other shares).
        bits: of the codebook weights; None for the profile's.
        l2: "cold" (distinct weights, more than the cache holds), "warm" (one weight again and again).
        profile: "smoke", "quick" or "full".
        say: called with a sentence about each product that is left out.

    Returns:
        `gemv_time` records in us, and one `output_error` (against float64) per method and shape. A method that cannot
        do a shape is left out.

    Raises:
        ArithmeticError: a product is wrong; nothing wrong is timed.
        ValueError: an unknown method.
    """
    recorder = Recorder(device, profile)
    if recorder.device == "cuda":
        recorder.cold_read_gbps = cold_read_gbps(recorder)
    run = _shape_cuda if recorder.device == "cuda" else _shape_cpu
    with torch.inference_mode():
        for shape in shapes or recorder.sizes.shapes:
            run(recorder, tuple(shape), _plan(recorder, methods, bits), tuple(l2), say)
    return recorder.close()


def _plan(
    recorder: Recorder, names: Sequence[str] | None, bits: Sequence[int] | None
) -> list[tuple[str, int]]:
    """Which (method, bits) to time; the exact CPU path is timed at 4 bits or the first."""
    wanted = tuple(bits or recorder.sizes.bits)
    plan = []
    others = peers.installed() if recorder.device == "cuda" else ()
    for name in names or (*methods_on(recorder.device), *others):
        every = wanted if name.split("@")[0] in _WITH_BITS else (4 if 4 in wanted else wanted[0],)
        plan += [(name, b) for b in every]
    return plan


def _built(plan, shape: tuple[int, int], device: str, say: Say) -> Iterable[Product]:
    for name, bits in plan:
        try:
            yield make_product(name, *shape, bits, device)
        except NotPossible as error:
            say(_left_out(name, shape, error))


def _left_out(name: str, shape: tuple[int, int], error: Exception) -> str:
    return f"{name} left out at {shape[0]} x {shape[1]}: {peers.reason(error)}"


def _config(product: Product, shape: tuple[int, int], **more) -> dict:
    sizes = {"in_features": shape[0], "out_features": shape[1]}
    return {**sizes, **product.config, "bytes": product.weight_bytes + product.io_bytes, **more}


def _add_error(recorder: Recorder, product: Product, shape: tuple[int, int]) -> None:
    error = product.checked_error()
    if error is not None:
        config = {"in_features": shape[0], "out_features": shape[1], **product.config}
        sha = product.kernel_sha256
        recorder.add("output_error", [error], product.method, config, kernel_sha256=sha)


# CUDA


def _shape_cuda(recorder: Recorder, shape, plan, l2, say: Say = silent) -> None:
    for product in _built(plan, shape, "cuda", say):
        try:
            _add_error(recorder, product, shape)
            for temperature in l2:
                _time_cuda(recorder, product, shape, temperature)
        except Exception as error:
            if product.method not in peers.PEERS:
                raise
            say(_left_out(product.method, shape, error))


def _time_cuda(recorder: Recorder, product: Product, shape, temperature: str) -> None:
    copies = 1
    if temperature == "cold":
        copies = timing.copies_for(product.weight_bytes, "cuda", recorder.cache_bytes or None)
    for chain in product.chains:
        calls = product.calls(copies, **({"pdl": True} if chain == "pdl" else {}))
        samples = timing.cuda_graph_us(calls, recorder.sizes.repeats)
        config = _config(product, shape, l2=temperature, chain=chain, copies=copies)
        doubt = cold_doubt(product.weight_bytes * copies, recorder.cache_bytes, temperature)
        recorder.add("gemv_time", samples, product.method, config, doubt, kernel_sha256=product.kernel_sha256)
        del calls
    torch.cuda.empty_cache()


def cold_doubt(distinct_bytes: int, cache_bytes: int, temperature: str) -> str:
    """Why a rotation over `distinct_bytes` is not cold, or ""; a warm measurement is not doubted."""
    if temperature == "warm" or distinct_bytes >= cache_bytes:
        return ""
    return (
        f"The rotation covered {distinct_bytes / 1e6:.0f} MB of distinct weights, less than the cache of "
        f"{cache_bytes / 1e6:.0f} MB: not cold."
    )


# CPU


def _shape_cpu(recorder: Recorder, shape, plan, l2, say: Say = silent) -> None:
    products = {p.label or p.method: p for p in _built(plan, shape, "cpu", say)}
    for product in products.values():
        _add_error(recorder, product, shape)
    calls = _rotations(products, l2, recorder.rotation_cache_bytes)
    budget_s = recorder.sizes.budget_s
    trial = {name: c[:TRIAL_CALLS] for name, c in calls.items()}
    threads = timing.fastest_threads(trial, 1, budget_s / 2)
    cases = {}
    for name, rotation in calls.items():
        for temperature in l2:
            once = rotation if temperature == "cold" else rotation[:1] * WARM_CALLS
            cases[name, temperature] = timing.Case(once, threads[name], temperature == "warm")
    samples = timing.interleaved_us(cases, recorder.sizes.repeats, budget_s)
    _set_ceiling(recorder, products, samples)
    distinct = sum(products[name].weight_bytes * len(c) for name, c in calls.items())
    for (name, temperature), us in samples.items():
        product, case = products[name], cases[name, temperature]
        config = _config(
            product,
            shape,
            l2=temperature,
            chain="alone",
            copies=len(case.calls) if temperature == "cold" else 1,
            threads=case.threads,
            threads_available=torch.get_num_threads(),
            fewer_threads_faster=case.threads < torch.get_num_threads(),
        )
        doubt = cold_doubt(distinct, recorder.cache_bytes, temperature)
        recorder.add("gemv_time", us, product.method, config, doubt, kernel_sha256=product.kernel_sha256)


def _rotations(products: dict[str, Product], l2, cache: int | None) -> dict[str, list]:
    """Calls over distinct copies; all methods together stay within a quarter of the free memory."""
    free = timing.free_bytes("cpu")

    def copies(product: Product) -> int:
        if "cold" not in l2:
            return 1
        return timing.copies_for(product.weight_bytes, "cpu", cache, free, among=len(products))

    return {name: product.calls(copies(product)) for name, product in products.items()}


def _set_ceiling(recorder: Recorder, products, samples) -> None:
    """The gate's ceiling: the best of a large read, made once a process, and the reads of these very rounds.

    The reads of the rounds alone are no ceiling where shapes are small: a call's fixed cost is in them.
    """
    cold_read_gbps(recorder)
    for (name, temperature), us in samples.items():
        if products[name].method == "read" and temperature == "cold":
            recorder.cold_read_gbps = note_cpu_read(products[name].weight_bytes / 1e3 / min(us))
    recorder.cold_read_gbps = recorder.cold_read_gbps or cold_read_gbps(recorder)
