"""The law of batch-1 decode: a matrix-vector product takes a fixed time plus its bytes over a bandwidth.

    T = t0 + bytes / BW

All formulas here are in bytes, microseconds and GB/s (1e9 bytes a second). Each says where it stops holding. numpy
only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ACTIVATION_BYTES = 2  # x and y of a GEMV are 16-bit unless told otherwise
_CODE_BYTES = 2  # codebook entries are fp16
_BYTES_PER_US_OF_GBPS = 1e3  # 1 GB/s = 1e3 bytes a microsecond

# Stored bits of a dense weight; "codebook-4" and its like are parsed.
_DENSE_BITS = {"fp32": 32, "tf32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "int8": 8}


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be above zero, not {value}.")


def codebook_bytes(in_features: int, out_features: int, bits: int, n_codes: int | None = None) -> int:
    """Bytes of a weight stored as codes into one fp16 codebook an output channel.

    Holds for codes packed without gaps in a row, rows padded to whole bytes; a kernel's own layout may pad more.

    Args:
        in_features, out_features: the matrix.
        bits: bits of a code.
        n_codes: entries of a codebook; None for all that `bits` can name.

    Raises:
        ValueError: a size is not positive, or `n_codes` does not fit in `bits`.
    """
    _positive(in_features=in_features, out_features=out_features, bits=bits)
    n_codes = 2**bits if n_codes is None else n_codes
    if not 1 <= n_codes <= 2**bits:
        raise ValueError(f"{n_codes} codes do not fit in {bits} bits; at most {2**bits} do.")
    return out_features * (-(-in_features * bits // 8) + _CODE_BYTES * n_codes)


def bits_per_weight(in_features: int, out_features: int, bits: int, n_codes: int | None = None) -> float:
    """Bits a weight of the codebook format, its codebooks included, e.g. 4.0625 for 4 bits at 4096 x 4096.

    The overhead is `16 * n_codes / in_features`: small only where `in_features` is far above `n_codes`.
    """
    return 8 * codebook_bytes(in_features, out_features, bits, n_codes) / (in_features * out_features)


def _weight_bytes(in_features: int, out_features: int, method: str | int) -> int:
    name = str(method).removeprefix("linear-").removeprefix("mv-")
    if name in _DENSE_BITS:
        return in_features * out_features * _DENSE_BITS[name] // 8
    bits = name.removeprefix("codebook-")
    if not (bits.isdigit() and int(bits) in (2, 3, 4, 8)):
        known = ", ".join([*_DENSE_BITS, "codebook-8", "codebook-4", "codebook-3", "codebook-2"])
        raise ValueError(
            f"the weight format {method!r} is unknown; give one of {known}, or the bits of a code."
        )
    return codebook_bytes(in_features, out_features, int(bits))


def gemv_bytes(
    in_features: int, out_features: int, method: str | int, activation_bytes: int = _ACTIVATION_BYTES
) -> int:
    """Bytes that a matrix-vector product must move: weights with their codebooks, the input once, the output once.

    The least there is: it counts no re-read. The input is re-read by every block of a kernel, from cache as long as it
    fits there, and split-K kernels also write and read partial sums.

    Args:
        in_features, out_features: the matrix.
        method: `fp32`, `fp16`, `bf16`, `fp8`, `int8` (also as `linear-fp16`, `mv-fp16`), `codebook-4` and so on, or the
            bits of a code (2, 3, 4, 8). Scales of fp8 and int8 are not counted.
        activation_bytes: bytes of one input or output value.
    """
    _positive(in_features=in_features, out_features=out_features, activation_bytes=activation_bytes)
    return _weight_bytes(in_features, out_features, method) + activation_bytes * (in_features + out_features)


def arithmetic_intensity(flops: float, nbytes: float) -> float:
    """Floating-point operations for each byte moved. A batch-1 fp16 GEMV has 1, a 4-bit one nearly 4."""
    _positive(bytes=nbytes)
    return flops / nbytes


def ridge(peak_flops: float, bandwidth: float) -> float:
    """The intensity in flop/byte above which arithmetic binds, not memory.

    Args:
        peak_flops: flop/s of the unit in use (tensor cores and plain cores have different ridges).
        bandwidth: bytes/s.
    """
    _positive(peak_flops=peak_flops, bandwidth=bandwidth)
    return peak_flops / bandwidth


def roofline(intensity: float, peak: float, bandwidth: float) -> float:
    """The attainable flop/s at an arithmetic intensity: the lower of `peak` and `intensity * bandwidth`.

    An upper bound. It knows neither launches (small work), nor instructions other than flops (decoding codes), nor
    latency (too few loads in flight), and it takes memory and arithmetic to overlap perfectly.

    Args:
        intensity: flop/byte.
        peak: flop/s.
        bandwidth: bytes/s.
    """
    _positive(intensity=intensity, peak=peak, bandwidth=bandwidth)
    return min(peak, intensity * bandwidth)


def floor_us(nbytes: float, bandwidth_gbps: float) -> float:
    """The least time in microseconds to move `nbytes` at `bandwidth_gbps`.

    Holds for bytes that come from memory: from a warm cache the time may be less. No launch or latency is in it.
    """
    _positive(bandwidth_gbps=bandwidth_gbps)
    return nbytes / (bandwidth_gbps * _BYTES_PER_US_OF_GBPS)


def gbps(nbytes: float, time_us: float) -> float:
    """Bandwidth in GB/s of `nbytes` moved in `time_us` microseconds."""
    _positive(time_us=time_us)
    return nbytes / time_us / _BYTES_PER_US_OF_GBPS


def mbu(nbytes: float, time_us: float, bandwidth_gbps: float) -> float:
    """Model bandwidth utilisation: the share (0 to 1) of `bandwidth_gbps` that moving `nbytes` in `time_us` used.

    Above 1 only when bytes came from a cache, or when the bytes or the bandwidth are wrong. Say which bandwidth it is
    taken from: the datasheet's or a measured read.
    """
    _positive(bandwidth_gbps=bandwidth_gbps)
    return gbps(nbytes, time_us) / bandwidth_gbps


def time_shares(
    nbytes: float, time_us: float, t0_us: float, bandwidth_gbps: float
) -> tuple[float, float, float]:
    """Where the time of one product went: its fixed time, its bytes at `bandwidth_gbps`, and the rest, as shares of 1.

    The rest is work per weight, latency, or a memory that was slower just then; negative when bytes came from a cache.
    A negative `t0_us` (a fit may give one) counts as zero.
    """
    _positive(time_us=time_us)
    fixed = max(t0_us, 0.0) / time_us
    memory = floor_us(nbytes, bandwidth_gbps) / time_us
    return fixed, memory, 1 - fixed - memory


def weights_per_clock(bits: float, bandwidth_gbps: float, sms: int, clock_ghz: float) -> float:
    """Weights that each SM must decode and multiply a clock to keep up with memory: 26 on an H100 SXM at 4 bits.

    Args:
        bits: stored bits of a weight.
        bandwidth_gbps: of the memory.
        sms: multiprocessors (or cores).
        clock_ghz: their clock.
    """
    _positive(bits=bits, bandwidth_gbps=bandwidth_gbps, sms=sms, clock_ghz=clock_ghz)
    return bandwidth_gbps / (bits / 8) / (sms * clock_ghz)


@dataclass(frozen=True)
class Fit:
    """The law `T = t0 + bytes / BW` fitted to measurements.

    Holds inside the range of sizes it was fitted on, for one method on one device. It fails where another term binds:
    instructions (decoding cost in proportion to weights, which the fit takes for a lower bandwidth), a cache that holds
    part of the bytes (below its size), or too few blocks to fill the device (the small shapes).

    Attributes:
        t0_us: fixed time in microseconds.
        bandwidth_gbps: slope in GB/s.
        t0_interval, bandwidth_interval: 95 % bootstrap intervals.
        n: how many sizes were fitted.
        residual_us: the largest absolute difference between a measured and a fitted time, in microseconds.
    """

    t0_us: float
    bandwidth_gbps: float
    t0_interval: tuple[float, float]
    bandwidth_interval: tuple[float, float]
    n: int
    residual_us: float

    def predict(self, nbytes):
        """Microseconds for `nbytes` (a number, or an array of them)."""
        return self.t0_us + nbytes / (self.bandwidth_gbps * _BYTES_PER_US_OF_GBPS)


def _checked(nbytes: Sequence[float], times_us: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    sizes, times = np.asarray(nbytes, dtype=float), np.asarray(times_us, dtype=float)
    if sizes.ndim != 1 or sizes.shape != times.shape:
        raise ValueError(f"each size needs one time: got shapes {sizes.shape} and {times.shape}.")
    usable = np.isfinite(sizes) & np.isfinite(times) & (sizes > 0) & (times > 0)
    if not usable.all():
        bad = int(np.argmin(usable))
        raise ValueError(
            f"point {bad} is {sizes[bad]} bytes in {times[bad]} us; both must be finite and above zero."
        )
    if len(np.unique(sizes)) < 2:
        raise ValueError(f"a line needs two different sizes; got {len(np.unique(sizes))}.")
    return sizes, times


def _lines(sizes: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of the relative error along the last axis: intercepts (us) and slopes (us a byte).

    Each point weighs 1/time^2, so that a small shape counts as much as a large one. NaN where all sizes are equal.
    """
    weights = 1 / times**2
    total = weights.sum(-1, keepdims=True)
    mean_size = (weights * sizes).sum(-1, keepdims=True) / total
    mean_time = (weights * times).sum(-1, keepdims=True) / total
    spread = (weights * (sizes - mean_size) ** 2).sum(-1)
    together = (weights * (sizes - mean_size) * (times - mean_time)).sum(-1)
    flat = spread <= 1e-20 * (weights * sizes**2).sum(-1)
    slopes = np.where(flat, np.nan, together / np.where(flat, 1, spread))
    return mean_time[..., 0] - slopes * mean_size[..., 0], slopes


def _resampled(times: np.ndarray, samples, n_boot: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Indices of resampled points [n_boot, n], and for each a time [n_boot, n] resampled from its repeats."""
    picked = rng.integers(0, len(times), size=(n_boot, len(times)))
    if samples is None:
        return picked, times[picked]
    drawn = np.empty((n_boot, len(times)))
    for point, repeats in enumerate(samples):
        repeats = np.asarray(repeats, dtype=float)
        chosen = repeats[rng.integers(0, len(repeats), size=(n_boot, len(repeats)))]
        drawn[:, point] = np.median(chosen, axis=1)
    return picked, np.take_along_axis(drawn, picked, axis=1)


def _interval(values: np.ndarray, at_least: float) -> tuple[float, float]:
    """The central 95 % of the finite `values`, widened if need be to hold the estimate itself."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(min(low, at_least)), float(max(high, at_least))


def fit(
    nbytes: Sequence[float],
    times_us: Sequence[float],
    samples: Sequence[Sequence[float]] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Fit:
    """Fit `T = t0 + bytes / BW`, minimising the relative error, with bootstrap intervals.

    The bootstrap resamples the sizes, and within each size its repeats if they are given. With few sizes (under about
    six) the intervals are too narrow: they cannot know about shapes that were not measured.

    Args:
        nbytes: bytes moved, one a point.
        times_us: the median time of each point, in microseconds.
        samples: the repeats behind each median, in microseconds.
        n_boot: bootstrap draws.
        seed: of the draws; the same seed gives the same intervals.

    Raises:
        ValueError: fewer than two different sizes, sizes and times that do not match, values not above zero, or times
            that do not grow with the bytes (then there is no bandwidth to speak of).
    """
    sizes, times = _checked(nbytes, times_us)
    if samples is not None and (len(samples) != len(sizes) or any(len(repeats) == 0 for repeats in samples)):
        raise ValueError(f"each of the {len(sizes)} points needs at least one sample.")
    t0, slope = (float(x) for x in _lines(sizes, times))
    if not slope > 0:
        raise ValueError(
            f"the times do not grow with the bytes (slope {slope:.3g} us a byte): nothing to fit."
        )
    picked, drawn = _resampled(times, samples, n_boot, np.random.default_rng(seed))
    t0s, slopes = _lines(sizes[picked], drawn)
    good = np.isfinite(slopes) & (slopes > 0)
    bandwidth = 1 / (slope * _BYTES_PER_US_OF_GBPS)
    return Fit(
        t0_us=t0,
        bandwidth_gbps=bandwidth,
        t0_interval=_interval(np.append(t0s[good], t0), t0),
        bandwidth_interval=_interval(
            np.append(1 / (slopes[good] * _BYTES_PER_US_OF_GBPS), bandwidth), bandwidth
        ),
        n=len(sizes),
        residual_us=float(np.abs(t0 + slope * sizes - times).max()),
    )


def leave_one_out(nbytes: Sequence[float], times_us: Sequence[float]) -> list[tuple[float, float]]:
    """For each point its measured time and the one predicted by a fit to all the others, in microseconds.

    Raises:
        ValueError: fewer than three points, or the others of some point cannot be fitted.
    """
    sizes, times = _checked(nbytes, times_us)
    if len(sizes) < 3:
        raise ValueError(f"leaving one out needs at least three points; got {len(sizes)}.")
    found = []
    for left_out in range(len(sizes)):
        others = np.arange(len(sizes)) != left_out
        law = fit(sizes[others], times[others], n_boot=1)
        found.append((float(times[left_out]), float(law.predict(sizes[left_out]))))
    return found
