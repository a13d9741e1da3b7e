"""What a card that was not measured would do, by the law of a card that was. Every number here is derived.

    T = t0 + e * max(bytes / BW, instructions)

t0 and e come from the fit, BW and the clock of the instructions from the datasheets; e is how many times longer the fitted
method takes than the longer of its two terms.
"""

from trapetum import law, law_terms, records
from trapetum.hardware import Gpu
from trapetum.law_terms import Work
from trapetum.records import Record
from trapetum.shapes import FORMATS, ModelShape


def excess(fit: law.Fit, gpu: Gpu, bytes_per_weight: float, work: Work | None) -> float:
    """How many times longer a fitted method takes a weight than the longer of its bytes and its instructions, at least 1.

    Args:
        fit: of the method on `gpu`.
        gpu: the card of the fit; its datasheet's bandwidth, SMs and clock count.
        bytes_per_weight: overhead included.
        work: of the method; None counts the bytes alone.
    """
    return max(
        1.0, law.floor_us(bytes_per_weight, fit.bandwidth_gbps) / _longer(gpu, bytes_per_weight, 1, work)[0]
    )


def _longer(gpu: Gpu, nbytes: float, weights: float, work: Work | None) -> tuple[float, str]:
    memory = law.floor_us(nbytes, gpu.bandwidth_gbps)
    instructions = law_terms.instructions_us(weights, work, gpu.sms, gpu.boost_ghz)
    return (instructions, "instructions") if instructions > memory else (memory, "bytes")


def gemv_on(gpu: Gpu, fit: law.Fit, fit_gpu: Gpu, of: Record, work: Work | None) -> Record:
    """The time of the product `of` on `gpu`, by its method's law on `fit_gpu`: t0 stays, the longer term moves.

    T = t0 + e * max(bytes / BW, instructions), with the datasheets' bandwidths and clocks, and e from `excess`. It stops
    holding where latency binds (e then moves with neither term) and where blocks do not fill the card.

    Args:
        of: a `gemv_time` record on `fit_gpu`, which says the shape; its value is not used.
        work: of the method.

    Returns:
        a derived `gemv_time` record in us, with `config.binds`: `bytes` or `instructions`.
    """
    weights = of.config["in_features"] * of.config["out_features"]
    times = excess(fit, fit_gpu, of.config["bytes"] / weights, work)
    longer, binds = _longer(gpu, of.config["bytes"], weights, work)
    t0 = max(fit.t0_us, 0.0)
    kept = ("in_features", "out_features", "bits", "n_codes", "bytes", "l2", "chain")
    return records.derived(
        "gemv_time", t0 + times * longer, of.method,
        {**{name: of.config[name] for name in kept if name in of.config}, "binds": binds},
        {"name": gpu.name, "arch": gpu.arch}, f"{gpu.source}; the fit on {fit_gpu.name}",
        f"{t0:.3g} us + {times:.3g} * {longer:.3g} us ({binds})",
    )  # fmt: skip


def speed_on(
    gpu: Gpu, shape: ModelShape, fmt: str, fit: law.Fit, fit_gpu: Gpu, context: int = 256, work: Work | None = None
) -> Record:  # fmt: skip
    """How fast `gpu` can decode `shape` if the law fitted on `fit_gpu` holds there.

    The linears of a token take `calls * t0 + e * max(bytes / BW, instructions)`, with the datasheet's bandwidth and clock
    of `gpu` and e from `excess` on `fit_gpu`; head and cache are bytes alone. An upper bound where norms, attention and
    launches outside the linears cost time, and wrong where latency binds. Without a published clock, or without
    `work`, the bytes alone count.

    Args:
        gpu, fit_gpu: the card asked for, and the one of the fit.
        shape, fmt, context: as for `ModelShape.bytes_per_token`.
        fit: of the products in `fmt` on `fit_gpu`.
        work: of the method.

    Returns:
        a derived `decode_speed` record in tok/s, with `config.binds`: `bytes` or `instructions`.

    Raises:
        ValueError: an unknown format.
    """
    parts = shape.parts_per_token(fmt, context)
    linear_bytes = parts["attention weights"] + parts["MLP weights"]
    other_bytes = sum(parts.values()) - linear_bytes
    times = excess(fit, fit_gpu, linear_bytes / shape.linear_weights, work)
    longer, binds = _longer(gpu, linear_bytes, shape.linear_weights, work)
    calls, t0 = shape.layers * 4 + 1, max(fit.t0_us, 0.0)  # qkv, o, gate and up, down; and the head
    other = law.floor_us(other_bytes, fit.bandwidth_gbps * gpu.bandwidth_gbps / fit_gpu.bandwidth_gbps)
    bits, n_codes = FORMATS[fmt]
    config = {
        "model": shape.name, "context": context, "batch": 1, "bits": bits, "n_codes": n_codes or None,
        "bytes": linear_bytes + other_bytes, "binds": binds,
    }  # fmt: skip
    return records.derived(
        "decode_speed", 1e6 / (calls * t0 + times * longer + other), "codebook" if n_codes else fmt, config,
        {"name": gpu.name, "arch": gpu.arch}, f"{gpu.source}; the fit on {fit_gpu.name}",
        f"1e6 / ({calls} * {t0:.3g} us + {times:.3g} * {longer:.4g} us ({binds}) + {other:.4g} us for "
        f"{other_bytes} bytes of head and cache)",
    )  # fmt: skip
