"""Times, errors and instructions per weight of the ladder of GPU kernels, all rungs in one process."""

import math
from collections.abc import Iterable, Sequence

import torch

from trapetum import cuda, timing
from trapetum.bench import multiply
from trapetum.bench.products import Product
from trapetum.bench.reading import cold_read_gbps
from trapetum.bench.recording import Recorder
from trapetum.build import source_sha256
from trapetum.disassembly import Loop
from trapetum.ladder import (
    ALL,
    BITS,
    N_CODES,
    PRODUCT,
    Rung,
    defines,
    find,
    gemv,
    inner_loop,
    pack,
    why_not_counted,
)
from trapetum.records import Record, derived, now_utc

CHECKED_CHANNELS = 256  # of each product, against float64
SHAPES = {"smoke": ((1024, 1024),), "quick": ((4096, 4096), (4096, 22016))}
SHAPES["full"] = (*SHAPES["quick"], (11008, 4096), (8192, 28672))


def ladder(
    device: str = "auto",
    shapes: Iterable[tuple[int, int]] | None = None,
    rungs: Sequence[str] | None = None,
    profile: str = "quick",
) -> list[Record]:
    """Time y = W x on every rung of the ladder, cold, and count the instructions of its inner loop.

    Args:
        device: "auto" or "cuda".
        shapes: (in_features, out_features); None for the profile's.
        rungs: names of `trapetum.ladder`; None for all, the dead ends among them.
        profile: "smoke", "quick" or "full".

    Returns:
        for each shape and rung an `output_error` (against float64) and `gemv_time` records in us, alone and, where the rung
        has it, in a chain of overlapping launches (`config.chain` "pdl"), with `config.beside` "ladder": these are no
        products of `bench.gemv`. Then, where nvdisasm is installed, what `ladder_instructions` counts.

    Raises:
        RuntimeError: the CUDA kernels cannot run here.
        ArithmeticError: a rung is wrong; nothing wrong is timed.
        ValueError: an unknown rung.
    """
    chosen = [find(name) for name in rungs] if rungs else list(ALL)
    recorder, shapes = Recorder(device, profile), list(shapes or SHAPES.get(profile, ()))
    if recorder.device != "cuda" or not cuda.available():
        raise RuntimeError(f"the ladder is one of GPU kernels, and {cuda.why_not() or 'the device is cpu.'}")
    recorder.cold_read_gbps = cold_read_gbps(recorder)
    with torch.inference_mode():
        for shape in shapes:
            for product in _products(chosen, *shape):
                _add_error(recorder, product, shape)
                _time(recorder, product, shape)
    return recorder.close() + ladder_instructions(recorder.machine["arch"], rungs, shapes)


def _products(chosen: Sequence[Rung], in_features: int, out_features: int) -> Iterable[Product]:
    """The same random weights and x for every rung, each in its own layout."""
    where = {"device": "cuda"}
    indices = torch.randint(0, N_CODES, (out_features, in_features), dtype=torch.uint8, **where)
    codebook = torch.randn(out_features, N_CODES, **where).sort(1).values / math.sqrt(in_features)
    codebook = codebook.half()
    x = torch.randn(in_features, **where).half()
    first = codebook[:CHECKED_CHANNELS].double().gather(1, indices[:CHECKED_CHANNELS].long())
    for rung in chosen:
        yield _product(rung, pack(indices, rung), codebook, x, (first @ x.double()).unsqueeze(0))


def _product(rung: Rung, codes, codebook, x, reference) -> Product:
    y_bytes = len(codebook) * (4 if rung.name == "dead_atomics" else 2)

    def bind(w, c, pdl=False):
        return lambda: gemv(rung, x, w, c, pdl=pdl)

    return Product(
        rung.method,
        (codes, codebook),
        bind,
        x.nbytes + y_bytes,
        {"bits": BITS, "n_codes": N_CODES, "beside": "ladder"},
        reference,
        torch.float16,
        source_sha256(rung.source),
        rung.chains,
    )


def _sizes(shape: tuple[int, int]) -> dict[str, int]:
    return {"in_features": shape[0], "out_features": shape[1]}


def _add_error(recorder: Recorder, product: Product, shape) -> None:
    config = {**_sizes(shape), **product.config}
    error = product.checked_error()
    recorder.add("output_error", [error], product.method, config, kernel_sha256=product.kernel_sha256)


def _time(recorder: Recorder, product: Product, shape) -> None:
    copies = timing.copies_for(product.weight_bytes, "cuda", recorder.cache_bytes or None)
    doubt = multiply.cold_doubt(product.weight_bytes * copies, recorder.cache_bytes, "cold")
    moved = product.weight_bytes + product.io_bytes
    for chain in product.chains:
        calls = product.calls(copies, **({"pdl": True} if chain == "pdl" else {}))
        samples = timing.cuda_graph_us(calls, recorder.sizes.repeats)
        how = {"bytes": moved, "l2": "cold", "chain": chain, "copies": copies}
        config = {**_sizes(shape), **product.config, **how}
        recorder.add("gemv_time", samples, product.method, config, doubt, kernel_sha256=product.kernel_sha256)
        del calls
    torch.cuda.empty_cache()


def ladder_instructions(
    arch: str = "sm_90",
    rungs: Sequence[str] | None = None,
    shapes: Sequence[tuple[int, int]] = ((4096, 4096),),
) -> list[Record]:
    """Count the machine instructions per weight of every rung, as `trapetum.disassembly.inner_loop` says. Needs no GPU.

    Args:
        arch: what to compile for, e.g. `sm_90`.
        rungs: names of `trapetum.ladder`; None for all.
        shapes: (in_features, out_features) that choose the last rung's launch shapes; each that occurs is counted once.

    Returns:
        derived `instructions_per_weight` records; `config.lookups_per_weight` counts the reads of shared memory among
        them. The last rung is there a second time as `codebook`, its name in `bench.gemv`. None where
        `trapetum.ladder.why_not_counted` says why.
    """
    chosen = [find(name) for name in rungs] if rungs else ALL
    if why_not_counted():
        return []
    made = []
    for rung in chosen:
        variants = {defines(rung, shape): shape for shape in reversed(shapes)}
        for variant, shape in variants.items():
            made += _counted(rung, arch, inner_loop(rung, arch, shape), " ".join(variant))
    return made


def _counted(rung: Rung, arch: str, loop: Loop, variant: str) -> list[Record]:
    config = {"bits": BITS, "n_codes": N_CODES, "rows": 1, "arch": arch, "variant": variant}
    config["lookups_per_weight"] = loop.mix(BITS).get("LDS", 0.0)
    methods = (rung.method, "codebook") if rung.name == PRODUCT else (rung.method,)
    return [
        derived(
            "instructions_per_weight",
            loop.per_weight(BITS),
            method,
            config,
            {"name": f"compiled for {arch}", "arch": arch},
            source=f"kernels/{rung.source}, disassembled",
            formula="instructions of one pass of the loop over the codes / weights that a thread loads in it",
            kernel_sha256=source_sha256(rung.source),
            utc=now_utc(),
        )
        for method in methods
    ]
