"""1-D k-means of many rows at once: the codebook with the least squared error, for each output channel.

In one dimension the optimum is found exactly, by dynamic programming over the sorted values: `kernels/kmeans.c` does that
on CPU. With `bins`, and on CUDA, the program runs over a few hundred places where a cut may lie, and Lloyd steps over
all values follow. The places hold equal shares of (weight * gap^2)^(1/3), the density in which optimal codes lie (Panter
and Dite, 1951), so that outliers get places of their own; equally full bins would leave them together.
"""

import ctypes
import functools

import torch
from torch import Tensor

from trapetum.build import BuildError, compile_c
from trapetum.launch import integer, kernel, pointer

SOURCE, CUDA_SOURCE = "kmeans.c", "kmeans.cu"
MAX_CODES = 256
MAX_BINS = 1024
LLOYD_STEPS = 8
_EQUAL_COUNT = 0.25  # share of a bin's size that counts values alike: bounds the largest bin
_THREADS = 256
_CHUNK_VALUES = 1 << 22
_CHUNK_PAIRS = 1 << 24


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled C kernel and "", or None and the reason."""
    try:
        library = ctypes.CDLL(str(compile_c(SOURCE)))
    except (BuildError, OSError) as error:
        return None, str(error)
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.trapetum_kmeans.argtypes = [pointer] * 2 + [size] * 3 + [number] * 2 + [pointer] * 3
    return library, ""


def exact_available() -> bool:
    """Whether the exact C kernel can be compiled and loaded here."""
    return _library()[0] is not None


def why_not_exact() -> str:
    """Why the exact C kernel is missing and what happens instead; "" when it is there."""
    reason = _library()[1]
    return reason and f"{reason} k-means runs over bins in torch, near the optimum and slower."


# --- checks --------------------------------------------------------------------------------------------------------


def _require(values: Tensor, k: int, bins: int | None) -> None:
    if values.dim() != 2 or not values.is_floating_point() or 0 in values.shape:
        raise ValueError(f"k-means takes floating [rows, n] values, not {values.dtype} {list(values.shape)}.")
    if not 1 <= k <= MAX_CODES:
        raise ValueError(f"k is {k}; k-means makes 1 to {MAX_CODES} codes.")
    if bins is not None and not k <= bins <= MAX_BINS:
        raise ValueError(f"bins is {bins}; give {k} (one per code) to {MAX_BINS}, or None.")


def _finite(values: Tensor, what: str) -> Tensor:
    values = values.detach().to(torch.float32)
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{bad} of {values.numel()} {what} are NaN or infinite in float32; k-means needs numbers."
        )
    return values


def _usable(weights: Tensor | None, values: Tensor) -> Tensor | None:
    """Checked float32 weights, [n] or [rows, n]; rows that weigh nothing get equal weights."""
    if weights is None:
        return None
    if weights.shape not in (values.shape, values.shape[1:]):
        raise ValueError(
            f"the weights are {list(weights.shape)}, the values {list(values.shape)}; give one weight each."
        )
    weights = _finite(weights.to(values.device), "weights")
    if bool((weights < 0).any()):
        raise ValueError(
            f"the smallest weight is {float(weights.min()):g}; k-means needs weights of at least 0."
        )
    return torch.where(weights.sum(-1, keepdim=True) > 0, weights, 1.0)


# --- the exact optimum, in C ---------------------------------------------------------------------------------------


def _exact(values: Tensor, k: int, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, n = values.shape
    values, weights = values.contiguous(), None if weights is None else weights.contiguous()
    centroids, codes = torch.empty(rows, k), torch.empty(rows, n, dtype=torch.uint8)
    error = torch.empty(rows, dtype=torch.float64)
    stride = n if weights is not None and weights.dim() == 2 else 0
    weights_at = None if weights is None else weights.data_ptr()
    sizes = (stride, rows, n, k, torch.get_num_threads())
    outputs = (centroids.data_ptr(), codes.data_ptr(), error.data_ptr())
    if _library()[0].trapetum_kmeans(values.data_ptr(), weights_at, *sizes, *outputs):
        raise MemoryError(
            f"k-means ran out of memory with {n} values a row and {k} codes; use fewer threads."
        )
    return centroids, codes, error


# --- bins and Lloyd steps, in torch and CUDA -----------------------------------------------------------------------


class _Rows:
    """Sorted rows around their mean, with prefix sums, as float64.

    Attributes:
        x: [rows, n] sorted values less the row's mean.
        mean: [rows, 1].
        weight, moment: [rows, n + 1] prefix sums of w and of w*x.
    """

    def __init__(self, values: Tensor, weights: Tensor | None):
        x, order = values.sort(dim=1)
        ones = torch.ones((), dtype=torch.float64, device=x.device)
        w = (ones if weights is None else weights.gather(1, order).double()).expand(x.shape)
        self.mean = ((w * x).sum(1) / w.sum(1)).unsqueeze(1)
        self.x, self.w = x - self.mean, w
        self.weight, self.moment = _prefix(w), _prefix(w * self.x)


def _prefix(terms: Tensor) -> Tensor:
    return torch.nn.functional.pad(terms.cumsum(1), (1, 0))


def _edges(rows: _Rows, bins: int) -> Tensor:
    """Where a cut may lie: int64 [rows, edges], from 0 to n; every place when n <= bins."""
    count, n = rows.x.shape
    if n <= bins:
        return torch.arange(n + 1, device=rows.x.device).expand(count, -1)
    share = (rows.x.diff(dim=1).square() * (rows.w[:, 1:] + rows.w[:, :-1])).pow(1 / 3)
    share = share / share.sum(1, keepdim=True).clamp_min(1e-300) * (1 - _EQUAL_COUNT) + _EQUAL_COUNT / (n - 1)
    reached = _prefix(share)
    wanted = reached[:, -1:] * torch.arange(1, bins, device=rows.x.device) / bins
    inner = torch.searchsorted(reached, wanted).clamp_(1, n - 1)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=n)


def _bounds_of(cuts: list[Tensor], edges: Tensor) -> Tensor:
    """Follow the cuts back from the last edge: first value of each cluster, int64 [rows, k + 1]."""
    place = torch.full_like(edges[:, :1], edges.shape[1] - 1)
    bounds = [edges[:, -1:]]
    for cut in reversed(cuts):
        place = cut.gather(1, place)
        bounds.insert(0, edges.gather(1, place))
    return torch.cat([edges[:, :1], *bounds], 1)


def _solve_torch(rows: _Rows, edges: Tensor, k: int) -> Tensor:
    """What `kernels/kmeans.cu` computes, every cut of every layer compared: centroids around the mean [rows, k]."""
    weight, moment = rows.weight.gather(1, edges), rows.moment.gather(1, edges)
    w = weight.unsqueeze(2) - weight.unsqueeze(1)  # [rows, end, start]
    s = moment.unsqueeze(2) - moment.unsqueeze(1)
    pairs = torch.where(w > 0, s.square() / w, 0.0)
    pairs.masked_fill_(torch.ones_like(pairs[0], dtype=torch.bool).triu(), -torch.inf)
    gain, cuts = pairs[:, :, 0], []
    for _ in range(1, k):
        gain, cut = (gain.unsqueeze(1) + pairs).max(2)
        cuts.append(cut)
    bounds = _bounds_of(cuts, edges)
    start = rows.x.gather(1, bounds[:, :-1].clamp_max(rows.x.shape[1] - 1))
    return _lloyd(rows, _means(rows, bounds, start), LLOYD_STEPS)


def _means(rows: _Rows, bounds: Tensor, old: Tensor) -> Tensor:
    """Mean of each cluster; one of no weight keeps its old centroid."""
    weight, moment = rows.weight.gather(1, bounds).diff(dim=1), rows.moment.gather(1, bounds).diff(dim=1)
    return torch.where(weight > 0, moment / weight, old)


def _lloyd(rows: _Rows, centroids: Tensor, steps: int) -> Tensor:
    n, before = rows.x.shape[1], None
    for _ in range(steps):
        middle = (centroids[:, 1:] + centroids[:, :-1]) / 2
        inner = torch.searchsorted(rows.x, middle, right=True)
        bounds = torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=n)
        if before is not None and torch.equal(bounds, before):
            break
        centroids, before = _means(rows, bounds, centroids), bounds
    return centroids


def _solve_cuda(rows: _Rows, edges: Tensor, k: int) -> Tensor:
    device, (count, n), bins = edges.device, rows.x.shape, edges.shape[1] - 1
    edges = edges.to(torch.int32).contiguous()
    cuts = torch.empty(count, k, bins + 1, dtype=torch.int16, device=device)
    centroids = torch.empty(count, k, dtype=torch.float64, device=device)
    tensors = (rows.x, rows.weight, rows.moment, edges)
    sizes = (n, bins, k, LLOYD_STEPS)
    arguments = [*map(pointer, tensors), *map(integer, sizes), pointer(cuts), pointer(centroids)]
    shared_bytes = 8 * (4 * (bins + 1) + MAX_CODES) + 4 * (bins + 1 + MAX_CODES + 1)
    solve = kernel(CUDA_SOURCE, "trapetum_kmeans", (), device.index)
    solve.launch((count, 1, 1), (_THREADS, 1, 1), shared_bytes, arguments)
    return centroids


def _cuda_ready(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    from trapetum import cuda

    return cuda.available()


def _chunks(values: Tensor, weights: Tensor | None, rows: int):
    for part, start in zip(values.split(rows), range(0, len(values), rows), strict=True):
        if weights is not None:
            yield part, weights[start : start + rows] if weights.dim() == 2 else weights.expand_as(part)
        else:
            yield part, None


def _squared_error(values: Tensor, weights: Tensor | None, centroids: Tensor, codes: Tensor) -> Tensor:
    difference = (values - centroids.gather(1, codes.long())).double().square()
    return (difference if weights is None else difference * weights).sum(1)


def _binned(values: Tensor, k: int, weights: Tensor | None, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    n = values.shape[1]
    used, places = min(k, n), min(bins, n) + 1
    ready, found = _cuda_ready(values.device), []
    budget = _CHUNK_VALUES // n if ready else min(_CHUNK_VALUES // n, _CHUNK_PAIRS // places**2)
    for part, w in _chunks(values, weights, max(1, budget)):
        rows = _Rows(part, w)
        solve = _solve_cuda if ready else _solve_torch
        centroids = (solve(rows, _edges(rows, bins), used) + rows.mean).float().cummax(1).values
        centroids = torch.nn.functional.pad(centroids, (0, k - used), mode="replicate")
        codes = nearest(part, centroids)
        found.append((centroids, codes, _squared_error(part, w, centroids, codes)))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


# --- what others call ----------------------------------------------------------------------------------------------


def nearest(values: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid of each value, the lower one on a tie.

    Args:
        values: floating [rows, n].
        centroids: floating [rows, k], rising, k <= 256.

    Returns:
        uint8 [rows, n].
    """
    centroids = centroids.double()
    middle = ((centroids[:, 1:] + centroids[:, :-1]) / 2).contiguous()
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    rows = max(1, _CHUNK_VALUES // values.shape[1])
    for start in range(0, len(values), rows):
        part = slice(start, start + rows)
        codes[part] = torch.searchsorted(middle[part], values[part].double().contiguous(), out_int32=True)
    return codes


def lloyd_1d(values: Tensor, start: Tensor, steps: int) -> Tensor:
    """Lloyd's algorithm: `steps` times assign to the nearest centroid and take means; an empty cluster stays.

    Args:
        values: floating [rows, n], finite.
        start: floating [rows, k], rising.
        steps: at most this many; stops where nothing moves.

    Returns:
        float32 [rows, k], rising.
    """
    values = _finite(values, "values")
    found = []
    for part, centroids in zip(
        *(t.split(max(1, _CHUNK_VALUES // values.shape[1])) for t in (values, start)), strict=True
    ):
        rows = _Rows(part, None)
        found.append(
            (_lloyd(rows, centroids.double() - rows.mean, steps) + rows.mean).float().cummax(1).values
        )
    return torch.cat(found)


def kmeans_1d(
    values: Tensor, k: int, weights: Tensor | None = None, bins: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k centroids a row with the least sum of weight * (value - nearest centroid)^2.

    On CPU the result is the optimum, unless `bins` is given or there is no C compiler; on CUDA it is the optimum
    when n <= bins. Sums are float64 around the row's mean, so a row whose largest value exceeds the spread of the
    rest more than about 1e6 times loses precision there. The same input gives the same output, whatever the threads.

    Args:
        values: floating [rows, n], computed in float32, finite; CPU or CUDA.
        k: codes, 1 to 256. A row with fewer distinct values repeats its last centroid.
        weights: floating [rows, n], or [n] for all rows, at least 0; None for all 1. A row of zeros counts as ones.
        bins: places for a cut, k to 1024; None for the optimum on CPU, and for 512 (1024 above 64 codes) on CUDA.

    Returns:
        centroids float32 [rows, k], rising; index of the nearest uint8 [rows, n]; error float64 [rows].

    Raises:
        ValueError: wrong shape or dtype, NaN or infinity, negative weights, k or bins out of range.
    """
    _require(values, k, bins)
    values = _finite(values, "values")
    weights = _usable(weights, values)
    if bins is None and values.device.type == "cpu" and exact_available():
        return _exact(values, k, weights)
    return _binned(values, k, weights, bins or (512 if k <= 64 else MAX_BINS))
