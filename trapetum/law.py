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

# Between two devices a difference below these counts as none.
SAME_T0_US = 0.1
SAME_RATIO = 0.02

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


def _picked(n: int, n_boot: int, rng) -> np.ndarray:
    """Indices of resampled points [n_boot, n]."""
    return rng.integers(0, n, size=(n_boot, n))


def _drawn(times: np.ndarray, samples, n_boot: int, rng) -> np.ndarray:
    """For each draw a time of each point [n_boot, n]: the median of its resampled repeats, if there are any."""
    drawn = np.tile(times, (n_boot, 1))
    for point, repeats in enumerate(() if samples is None else samples):
        repeats = np.asarray(repeats, dtype=float)
        chosen = repeats[rng.integers(0, len(repeats), size=(n_boot, len(repeats)))]
        drawn[:, point] = np.median(chosen, axis=1)
    return drawn


def _line(sizes: np.ndarray, times: np.ndarray) -> tuple[float, float]:
    t0, slope = (float(x) for x in _lines(sizes, times))
    if not slope > 0:
        raise ValueError(
            f"the times do not grow with the bytes (slope {slope:.3g} us a byte): nothing to fit."
        )
    return t0, slope


def _check_samples(samples, n: int) -> None:
    if samples is not None and (len(samples) != n or any(len(repeats) == 0 for repeats in samples)):
        raise ValueError(f"each of the {n} points needs at least one sample.")


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
    _check_samples(samples, len(sizes))
    t0, slope = _line(sizes, times)
    rng = np.random.default_rng(seed)
    picked, drawn = _picked(len(sizes), n_boot, rng), _drawn(times, samples, n_boot, rng)
    t0s, slopes = _lines(sizes[picked], np.take_along_axis(drawn, picked, axis=1))
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


def leave_one_out(
    nbytes: Sequence[float], times_us: Sequence[float], groups: Sequence | None = None
) -> list[tuple[float, float]]:
    """For each point its measured time and the one predicted by a fit to all the others, in microseconds.

    Args:
        nbytes, times_us: as for `fit`.
        groups: what is left out together, one label a point (the shape, where several points have the same one);
            None leaves out single points.

    Raises:
        ValueError: fewer than three points or groups, or the others of some point cannot be fitted.
    """
    sizes, times = _checked(nbytes, times_us)
    groups = list(range(len(sizes))) if groups is None else list(groups)
    if len(groups) != len(sizes):
        raise ValueError(f"each of the {len(sizes)} points needs one group; got {len(groups)}.")
    if len(set(groups)) < 3:
        raise ValueError(f"leaving one out needs at least three points; got {len(set(groups))}.")
    found = []
    for size, time, group in zip(sizes, times, groups, strict=True):
        others = np.array([other != group for other in groups])
        law = fit(sizes[others], times[others], n_boot=1)
        found.append((float(time), float(law.predict(size))))
    return found


@dataclass(frozen=True)
class Shift:
    """How the law of one method moves from one device to another, fitted on the same sizes.

    Attributes:
        t0_us: fixed time on the second device less that on the first.
        ratio: bandwidth on the second device over that on the first.
        t0_interval, ratio_interval: 95 % bootstrap intervals.
        n: how many sizes both devices have.
    """

    t0_us: float
    ratio: float
    t0_interval: tuple[float, float]
    ratio_interval: tuple[float, float]
    n: int

    @property
    def t0_agrees(self) -> bool:
        """Whether the interval of the difference comes within 0.1 us of zero."""
        return self.t0_interval[0] - SAME_T0_US <= 0 <= self.t0_interval[1] + SAME_T0_US

    def moved(self, ratio: float) -> str:
        """`as` when the interval of the bandwidths' ratio comes within 2 % of `ratio`, else `less` or `more`."""
        low, high = self.ratio_interval
        margin = SAME_RATIO * ratio
        return "less" if high < ratio - margin else "more" if low > ratio + margin else "as"


def shift(
    nbytes: Sequence[float],
    first_us: Sequence[float],
    second_us: Sequence[float],
    first_samples: Sequence[Sequence[float]] | None = None,
    second_samples: Sequence[Sequence[float]] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Shift:
    """Fit the law on two devices and compare, with intervals from a bootstrap that draws the same sizes for both.

    What a size does to both devices alike (its number of blocks, its row length) cancels in the differences, so these
    intervals are narrower than the two fits' own; like theirs, they are too narrow with under about six sizes.

    Args:
        nbytes: bytes moved, one a point, the same on both devices.
        first_us, second_us: median times on the first and the second device, in microseconds.
        first_samples, second_samples: the repeats behind them.
        n_boot, seed: as for `fit`.

    Raises:
        ValueError: as `fit`, for either device.
    """
    (sizes, first), (_, second) = _checked(nbytes, first_us), _checked(nbytes, second_us)
    for samples in (first_samples, second_samples):
        _check_samples(samples, len(sizes))
    (t0_a, slope_a), (t0_b, slope_b) = _line(sizes, first), _line(sizes, second)
    rng = np.random.default_rng(seed)
    picked = _picked(len(sizes), n_boot, rng)
    drawn = [_drawn(first, first_samples, n_boot, rng), _drawn(second, second_samples, n_boot, rng)]
    (t0s_a, slopes_a), (t0s_b, slopes_b) = (
        _lines(sizes[picked], np.take_along_axis(times, picked, axis=1)) for times in drawn
    )
    good = np.isfinite(slopes_a) & np.isfinite(slopes_b) & (slopes_a > 0) & (slopes_b > 0)
    t0, ratio = t0_b - t0_a, slope_a / slope_b
    return Shift(
        t0_us=t0,
        ratio=ratio,
        t0_interval=_interval(np.append((t0s_b - t0s_a)[good], t0), t0),
        ratio_interval=_interval(np.append(slopes_a[good] / slopes_b[good], ratio), ratio),
        n=len(sizes),
    )


def memory_share(first_us: float, second_us: float, ratio: float) -> float:
    """The share of the time on the first device that shrank with the memory of the second: 1 is all of it, 0 none.

    Of `T = fixed + memory` on the first device and `fixed + memory / ratio` on the second it is `memory / T`. It holds for
    two devices that differ in their memory alone; above 1, or below 0, something else differed too, or noise did.

    Args:
        first_us, second_us: times of the same product.
        ratio: the second device's read bandwidth over the first's.

    Raises:
        ValueError: a value is not above zero, or the ratio is 1 (nothing to compare).
    """
    _positive(first_us=first_us, second_us=second_us, ratio=ratio)
    if ratio == 1:
        raise ValueError("the two devices read equally fast (ratio 1): nothing can be told from them.")
    return (1 - second_us / first_us) / (1 - 1 / ratio)
