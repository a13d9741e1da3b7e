"""A few rows of x at once: from which number of rows on is it faster to write the dense weights out?

Speculative verification and short prompts multiply 2 to 32 rows with the same weights. The codebook kernel reads the
codes once for several rows; dense products read all the bytes once for any number of rows.
"""

from collections.abc import Iterable, Sequence

import torch

from trapetum import timing
from trapetum.bench.multiply import Say, cold_doubt, silent
from trapetum.bench.products import NotPossible, Product, Weights, copies_of, weights
from trapetum.bench.reading import cold_read_gbps
from trapetum.bench.recording import Recorder
from trapetum.records import Record

CUDA_BATCH = ("codebook", "dequantize-linear", "linear-fp16", "tinygemm-int4")
CPU_BATCH = (
    "codebook",
    "dequantize-linear",
    "dequantize-linear-bf16",
    "linear-fp32",
    "linear-bf16",
    "torch-int4",
)
Sets = dict[str, tuple[Weights, list]]  # by label: the weights, and their tensors in distinct memory
TRIAL_CALLS = 16  # of each case, to choose its number of threads


def small_batches(
    device: str = "auto",
    shapes: Iterable[tuple[int, int]] | None = None,
    rows: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    bits: Sequence[int] = (4,),
    profile: str = "quick",
    say: Say = silent,
) -> list[Record]:
    """Time Y = X W^T for several numbers of rows of X, cold, every method in the same process.

    Args:
        device: "auto", "cpu" or "cuda".
        shapes: (in_features, out_features); None for the profile's `batch_shapes`.
        rows: numbers of rows; None for the profile's.
        methods: None for `CUDA_BATCH` or `CPU_BATCH`.
        bits: of the codebook weights.
        profile: "smoke", "quick" or "full".
        say: called with a sentence about each product that is left out.

    Returns:
        `gemm_time` records in us (`gemv_time` for one row) with `config.rows`. Where a kernel takes fewer rows than there
        are, it is launched several times (`config.launches`): 8 rows at once on CUDA, one on a CPU.

    Raises:
        ArithmeticError: a product is wrong; nothing wrong is timed.
        ValueError: an unknown method, or rows below 1.
    """
    recorder = Recorder(device, profile)
    counts = tuple(rows or recorder.sizes.rows)
    if min(counts) < 1:
        raise ValueError(f"rows must be 1 or more, not {min(counts)}.")
    recorder.cold_read_gbps = cold_read_gbps(recorder)
    names = tuple(methods or (CUDA_BATCH if recorder.device == "cuda" else CPU_BATCH))
    with torch.inference_mode():
        for shape in shapes or recorder.sizes.batch_shapes:
            _shape(recorder, tuple(shape), counts, _plan(names, bits), say)
    return recorder.close()


def _plan(names: Sequence[str], bits: Sequence[int]) -> list[tuple[str, int]]:
    coded = ("codebook", "dequantize-linear", "dequantize-linear-bf16", "read")
    return [(name, b) for name in names for b in (bits if name in coded else (4,))]


def _shape(recorder: Recorder, shape, counts, plan, say: Say) -> None:
    """All row counts of one shape; the weights and their copies are made once."""
    sets = {}
    for name, bits in plan:
        try:
            matrix = weights(name, *shape, bits, recorder.device)
        except NotPossible as error:
            say(f"{name} left out at {shape[0]} x {shape[1]}: {error}")
            continue
        copies = _copies(recorder, matrix, len(plan))
        sets[matrix.label or matrix.method] = matrix, copies_of(matrix.tensors, copies)
    for rows in counts:
        _rows(recorder, rows, sets)


def _copies(recorder: Recorder, matrix: Weights, among: int) -> int:
    """How many copies make the rotation cold; on a CPU the methods take turns and share it."""
    nbytes = sum(t.nbytes for t in matrix.tensors)
    if recorder.device == "cuda":
        return timing.copies_for(nbytes, "cuda", recorder.cache_bytes or None)
    return timing.copies_for(nbytes, "cpu", recorder.rotation_cache_bytes, among=among)


def _rows(recorder: Recorder, rows: int, sets: Sets) -> None:
    products = {}
    for name, (matrix, _) in sets.items():
        products[name] = matrix.at(rows)
        products[name].checked_error()
    if recorder.device == "cuda":
        _time_cuda(recorder, rows, products, sets)
    else:
        _time_cpu(recorder, rows, products, sets)


def _time_cuda(recorder: Recorder, rows: int, products: dict[str, Product], sets: Sets) -> None:
    for name, product in products.items():
        for chain in product.chains:
            options = {"pdl": True} if chain == "pdl" else {}
            calls = [product.bind(*tensors, **options) for tensors in sets[name][1]]
            samples = timing.cuda_graph_us(calls, recorder.sizes.repeats)
            _add(recorder, rows, sets, name, product, samples, chain=chain)
            del calls
        torch.cuda.empty_cache()


def _time_cpu(recorder: Recorder, rows: int, products: dict[str, Product], sets: Sets) -> None:
    calls = {
        name: [product.bind(*tensors) for tensors in sets[name][1]] for name, product in products.items()
    }
    budget_s = recorder.sizes.budget_s / 2
    trial = {name: every[:TRIAL_CALLS] for name, every in calls.items()}
    threads = timing.fastest_threads(trial, 2, budget_s / 2)
    cases = {name: timing.Case(every, threads[name]) for name, every in calls.items()}
    samples = timing.interleaved_us(cases, recorder.sizes.repeats, budget_s)
    available = torch.get_num_threads()
    for name, us in samples.items():
        used = {"threads": threads[name], "threads_available": available}
        used["fewer_threads_faster"] = threads[name] < available
        _add(recorder, rows, sets, name, products[name], us, chain="alone", **used)


def _add(recorder: Recorder, rows: int, sets: Sets, name: str, product: Product, samples, **how) -> None:
    matrix, copies = sets[name]
    between = (
        [name] if recorder.device == "cuda" else sets
    )  # on a CPU all methods' copies pass before one comes again
    distinct = sum(len(sets[n][1]) * sum(t.nbytes for t in sets[n][0].tensors) for n in between)
    doubt = cold_doubt(distinct, recorder.cache_bytes, "cold")
    config = {
        "in_features": matrix.in_features,
        "out_features": matrix.out_features,
        "rows": rows,
        **product.config,
        "bytes": product.weight_bytes + product.io_bytes,
        "l2": "cold",
        "copies": len(copies),
        "beside": "batch",  # timed in the rounds of this comparison, not in those of `gemv`
        **how,
    }
    quantity = "gemv_time" if rows == 1 else "gemm_time"
    recorder.add(quantity, samples, product.method, config, doubt, kernel_sha256=product.kernel_sha256)
