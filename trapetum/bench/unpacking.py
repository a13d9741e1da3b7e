"""Dequantize, dequantize-then-multiply against fused, and all products of one token."""

from collections.abc import Callable, Iterable, Sequence

import torch

from trapetum import cpu, cuda, timing
from trapetum.bench.multiply import make_product, methods_on
from trapetum.bench.products import N_CODES, NotPossible, Product, build, copies_of, expand_and_multiply
from trapetum.bench.reading import cold_read_gbps
from trapetum.bench.recording import Recorder
from trapetum.build import source_sha256
from trapetum.records import Record
from trapetum.shapes import ModelShape
from trapetum.shapes import model as model_shape

TRIAL_CALLS = 4  # of each case, to choose its number of threads
VARIANTS = {"cuda": ("naive", "tiled"), "cpu": ("rows",)}


def dequant(
    device: str = "auto",
    shapes: Iterable[tuple[int, int]] | None = None,
    bits: Sequence[int] | None = None,
    profile: str = "quick",
) -> list[Record]:
    """Time codes to dense weights, and the product that goes that way round.

    Args:
        device: "auto", "cpu" or "cuda".
        shapes: (in_features, out_features); None for the profile's.
        bits: of the codes; None for the profile's.
        profile: "smoke", "quick" or "full".

    Returns:
        `dequant_bandwidth` (GB/s; codes and codebooks read plus dense weights written) for each variant, and
        `gemv_time` (us) of `dequantize-linear` (dequantize, then a dense product) and of `codebook` (fused), cold.
        Bytes of the dense weights in between are in `config.dense_bytes`, not in `config.bytes`.
    """
    recorder = Recorder(device, profile)
    recorder.cold_read_gbps = cold_read_gbps(recorder)
    with torch.inference_mode():
        for shape in shapes or recorder.sizes.shapes:
            for b in bits or recorder.sizes.bits:
                _dequant_one(recorder, tuple(shape), b)
    return recorder.close()


def _dequant_one(recorder: Recorder, shape: tuple[int, int], bits: int) -> None:
    device = recorder.device
    dtype = torch.float16 if device == "cuda" else torch.float32
    product = build("codebook", *shape, bits, device)
    dense_bytes = shape[0] * shape[1] * torch.empty(0, dtype=dtype).element_size()
    cache = recorder.rotation_cache_bytes if device == "cpu" else recorder.cache_bytes or None
    few = timing.copies_for(product.weight_bytes + dense_bytes, device, cache)  # each with its dense tensor
    copies = timing.copies_for(product.weight_bytes, device, cache)
    sets = copies_of(product.tensors, copies)
    row = torch.randn(1, shape[0], device=device).to(dtype)
    multiply = expand_and_multiply(*shape, bits, device)
    calls = {
        "dequantize-linear": [multiply(row, *s) for s in sets],
        "codebook": [product.bind(*s) for s in sets],
    }
    for variant in VARIANTS[device]:
        expand = _expand(shape, bits, dtype, variant)
        calls[f"dequantize-{variant}"] = [expand(*s) for s in sets[:few]]
    samples, threads = _times(calls, recorder)
    base = {
        "in_features": shape[0],
        "out_features": shape[1],
        "bits": bits,
        "n_codes": N_CODES[bits],
        "l2": "cold",
        "chain": "alone",
        "beside": "dequantize-linear",  # timed in the rounds of that product, not in those of `gemv`
    }
    for name, us in samples.items():
        _add_dequant(
            recorder, name, us, product, dense_bytes, base | {"copies": len(calls[name])} | threads(name)
        )


def _add_dequant(recorder, name: str, us, product: Product, dense_bytes: int, base: dict) -> None:
    if name.startswith("dequantize-") and name != "dequantize-linear":
        moved = product.weight_bytes + dense_bytes
        config = {**base, "variant": name.removeprefix("dequantize-"), "bytes": moved}
        source = cuda.DEQUANTIZE_SOURCE if recorder.device == "cuda" else cpu.SOURCE
        sha = source_sha256(source)
        recorder.add(
            "dequant_bandwidth", [moved / 1e3 / t for t in us], "codebook", config, kernel_sha256=sha
        )
        return
    config = {**base, "path": product.config["path"], "bytes": product.weight_bytes + product.io_bytes}
    if name != "codebook":  # the dense weights in between may stay in the cache, so `bytes` leaves them out
        config |= {"path": "dequantize", "dense_bytes": dense_bytes}
    recorder.add("gemv_time", us, name, config, kernel_sha256=product.kernel_sha256)


def _expand(shape, bits: int, dtype, variant: str):
    """Bind weights to a call that writes them out densely, each to its own place (else a cache keeps it)."""

    def bind(w, c):
        out = torch.empty(shape[1], shape[0], dtype=dtype, device=w.device)
        if w.is_cuda:
            return lambda: cuda.dequantize(w, c, shape[0], bits, dtype, variant, out)
        return lambda: cpu.dequantize(w, c, shape[0], bits, dtype, out=out)

    return bind


def _threads_config(chosen: int) -> dict:
    available = torch.get_num_threads()
    return {
        "threads": chosen,
        "threads_available": available,
        "fewer_threads_faster": chosen < available,
    }


def _times(calls: dict, recorder: Recorder) -> tuple[dict[str, list[float]], Callable[[str], dict]]:
    """Times by name, and what config says of each one's threads (nothing on a GPU)."""
    size = recorder.sizes
    if recorder.device == "cuda":
        return {name: timing.cuda_graph_us(c, size.repeats) for name, c in calls.items()}, lambda name: {}
    chosen = timing.fastest_threads({name: c[:TRIAL_CALLS] for name, c in calls.items()}, 1)
    cases = {name: timing.Case(c, chosen[name]) for name, c in calls.items()}
    samples = timing.interleaved_us(cases, size.repeats, size.budget_s)
    return samples, lambda name: _threads_config(chosen[name])


def fused_shapes(shape: ModelShape) -> list[tuple[int, int, int]]:
    """(in_features, out_features, count) of one token's products: qkv, o, gate and up, down per layer; the head."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = [
        (shape.hidden, queries + 2 * keys),
        (queries, shape.hidden),
        (shape.hidden, 2 * shape.intermediate),
        (shape.intermediate, shape.hidden),
    ]
    return [(i, o, shape.layers) for i, o in layer] + [(shape.hidden, shape.vocab, 1)]


def gemv_chain(
    device: str = "auto",
    model: str | None = None,
    methods: Sequence[str] | None = None,
    bits: Sequence[int] | None = None,
    profile: str = "quick",
) -> list[Record]:
    """Time all products of one token, one after the other, every weight distinct.

    Args:
        device: "auto", "cpu" or "cuda".
        model: name of a shape, with or without "random:"; None for the profile's model.
        methods: None for all of the device's.
        bits: of the codebook weights; None for 4.
        profile: "smoke", "quick" or "full".

    Returns:
        `linears_time` records in us. A method whose weights do not fit the free memory is left out.
    """
    recorder = Recorder(device, profile)
    name = (model or recorder.sizes.model).removeprefix("random:")
    plan = _chain_plan(methods or methods_on(recorder.device), bits or (4,))
    with torch.inference_mode():
        for method, b in plan:
            _chain_one(recorder, name, method, b)
    return recorder.close()


def _chain_plan(names: Sequence[str], bits: Sequence[int]) -> list[tuple[str, int]]:
    return [(n, b) for n in names for b in (bits if n in ("codebook", "read") else (4,))]


def _chain_one(recorder: Recorder, name: str, method: str, bits: int) -> None:
    parts = fused_shapes(model_shape(name))
    try:
        products = [(make_product(method, i, o, bits, recorder.device), count) for i, o, count in parts]
    except NotPossible:
        return
    nbytes = sum(p.weight_bytes * count for p, count in products)
    if nbytes > 0.8 * timing.free_bytes(recorder.device):
        return
    first = products[0][0]
    for chain in first.chains:
        options = {"pdl": True} if chain == "pdl" else {}
        calls = _in_layer_order([(p.calls(count, **options), count) for p, count in products])
        config = {
            **first.config,
            "model": f"random:{name}",
            "calls": sum(count for _, count in products),
            "chain": chain,
            "l2": "cold",
            "bytes": nbytes + sum(p.io_bytes * count for p, count in products),
        }
        samples, threads = _token_us(calls, recorder)
        del calls
        config |= threads
        doubt = "" if nbytes > recorder.cache_bytes else f"All weights ({nbytes / 1e6:.0f} MB) fit the cache."
        sha = first.kernel_sha256
        recorder.add("linears_time", samples, first.method, config, doubt, kernel_sha256=sha)


def _in_layer_order(parts: list[tuple[list, int]]) -> list:
    """Layer after layer, then the head (the last part)."""
    *layer, (head, _) = parts
    return [calls[i] for i in range(layer[0][1]) for calls, _ in layer] + head


def _token_us(calls: list, recorder: Recorder) -> tuple[list[float], dict]:
    """Microseconds for all calls in a row, and what config says of the threads."""
    if recorder.device == "cuda":
        per_call = timing.cuda_graph_us(calls, recorder.sizes.repeats, len(calls))
        return [len(calls) * us for us in per_call], {}

    def token():
        for call in calls:
            call()

    samples, threads = _times({"token": [token]}, recorder)
    return samples["token"], threads("token")
