"""Additive codebooks for a dense weight: residual k-means, then codebooks, scales and codes in turn.

    f = sum_o (w'_o - w_o)^T H (w'_o - w_o),    w'[o, 8g + j] = scale[o] * sum_c codebook[c, code[o, g, c], j]

H is the mean of x x^T over calibration tokens, with a ridge of 1 % of its mean diagonal; without statistics it is I. The
start is k-means of the groups of 8 weights, then of what the first codebook leaves, and so on (residual vector quantization).
Each iteration has three steps, none of which can raise f:

    scales      each row's least-squares factor
    codebooks   least squares over all entries at once, by conjugate gradients on the normal equations
    codes       group by group, the others fixed: sums grow codebook by codebook, the best few of them going on (a beam)

Additive quantization, its beam search and its least squares are from Babenko and Lempitsky, "Additive Quantization for Extreme
Vector Compression", CVPR 2014; the metric H, the scales and the alternation are those of AQLM (Egiazarian et al.,
arXiv:2401.06118), which carries its beam from group to group and takes gradient steps on the codebooks instead. Here a
beam ends with its group, and the next group sees the error that it left. The result is in float16, with codes chosen again
for the rounded values.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from trapetum.additive import ENTRIES, GROUP, N_CODEBOOKS, AdditiveWeight, dequantized

ITERATIONS, BEAM = 4, 8
RIDGE = 0.01  # of the mean diagonal of H: as GPTQ dampens it
_SAMPLE = 1 << 14  # groups of weights that k-means sees
_KMEANS_STEPS = 12
_CG_STEPS = 24
_CG_RESIDUAL = 1e-5
_BLOCK = 16  # groups between two products with H
_RISE, _NOTHING = 1e-4, 1e-7  # of f, and of f of zeros: what rounding of float32 sums may add to f
_LARGEST = torch.finfo(torch.float16).max
_CHUNK_WEIGHTS = 1 << 23
_CHUNK_SCORES = {
    "cpu": 1 << 20,
    "cuda": 1 << 26,
}  # of a beam search at once: what caches hold, or fills the device
_RUN = 16
_CHUNK_GROUPS = 1 << 16


class AdditiveFitError(ValueError):
    """A weight, its statistics or an argument that no additive codebooks can be fitted to; the message says why."""


@dataclass(frozen=True)
class Fitted:
    """What `fit` found.

    Attributes:
        weight: codes, codebooks and scales.
        objective: f after the start and after each step (scales, codebooks, codes, and again), in float32 codebooks and
            scales; divided by f of a weight of zeros.
        stored: the same for `weight`, whose codebooks and scales are float16.
    """

    weight: AdditiveWeight
    objective: list[float]
    stored: float


# --- the weight, its metric, and both a part at a time -------------------------------------------------------------


class _Part(NamedTuple):
    """Rows of a weight that share a Hessian: `rows` slice, `w` float32 [n, in], `h` float32 [in, in] or None for I."""

    rows: slice
    w: Tensor
    h: Tensor | None


def _times(error: Tensor, h: Tensor | None) -> Tensor:
    return error if h is None else error @ h


def _prepared(hessian: Tensor, device) -> Tensor:
    """[groups, in, in] with the ridge and a mean diagonal of 1; a Hessian of zeros becomes I."""
    hessian = hessian.to(device, torch.float32)
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)
    scaled = hessian / torch.where(mean > 0, mean, 1.0)[:, None, None]
    scaled.diagonal(dim1=1, dim2=2).add_(torch.where(mean > 0, RIDGE, 1.0)[:, None])
    return scaled


@dataclass
class _Problem:
    """A weight, its metric, and the present codes, codebooks and scales.

    Attributes:
        weight: float32 [out, in].
        hessian: float32 [groups, in, in] or None for I.
        codes: uint8 [out, in/8, n_codebooks].
        books: float32 [n_codebooks, 256, 8].
        scales: float32 [out].
        log: f after each step.
    """

    weight: Tensor
    hessian: Tensor | None
    codes: Tensor
    books: Tensor
    scales: Tensor
    log: list[float] = field(default_factory=list)

    def __post_init__(self):
        self._zero = sum(_form(part.w, part.h) for part in self.parts()) or 1.0

    def parts(self) -> Iterator[_Part]:
        """All rows, in parts of bounded size."""
        out, inputs = self.weight.shape
        most = max(1, _CHUNK_WEIGHTS // inputs)
        groups = 1 if self.hessian is None else len(self.hessian)
        for group in range(groups):
            first, end = (-(-(group + i) * out // groups) for i in (0, 1))
            for start in range(first, end, most):
                rows = slice(start, min(start + most, end))
                yield _Part(rows, self.weight[rows], None if self.hessian is None else self.hessian[group])

    def sums(self, rows: slice, books: Tensor | None = None) -> Tensor:
        """The looked-up sums, before the scale: float32 [n, in]."""
        books = self.books if books is None else books
        codes = self.codes[rows]
        total = books[0][codes[..., 0].long()]
        for c in range(1, len(books)):
            total += books[c][codes[..., c].long()]
        return total.flatten(1)

    def error(self, part: _Part) -> Tensor:
        """w' - w of a part."""
        return self.sums(part.rows) * self.scales[part.rows, None] - part.w

    def objective(self) -> float:
        """f, divided by f of a weight of zeros."""
        return sum(_form(self.error(part), part.h) for part in self.parts()) / self._zero


def _form(error: Tensor, h: Tensor | None) -> float:
    return float((error * _times(error, h)).sum(dtype=torch.float64))


# --- start ---------------------------------------------------------------------------------------------------------


def _spread_start(points: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
    """256 of the points, each drawn in proportion to its weighted distance from those before it (k-means++)."""
    chosen = torch.multinomial(weights, 1, generator=generator)
    distance = (points - points[chosen]).square().sum(1)
    for _ in range(ENTRIES - 1):
        chance = distance * weights
        chance += 1e-30 + 1e-12 * chance.max()  # fewer distinct points than entries: any will do
        last = torch.multinomial(chance, 1, generator=generator)
        chosen = torch.cat([chosen, last])
        distance = torch.minimum(distance, (points - points[last]).square().sum(1))
    return points[chosen].clone()


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid, int64 [n]."""
    squares = centroids.square().sum(1)
    parts = points.split(_CHUNK_GROUPS)
    return torch.cat([torch.addmm(squares, part, centroids.T, alpha=-2).min(1).indices for part in parts])


def _members_sum(codes: Tensor, values: Tensor) -> Tensor:
    """Sum of values [n, d] by code int64 [n]: [256, d]. On CUDA by products with one-hot rows, in a fixed order."""
    total = torch.zeros(ENTRIES, values.shape[1], dtype=values.dtype, device=values.device)
    if not values.is_cuda:
        return total.index_add_(0, codes, values)
    for some, rows in zip(codes.split(_CHUNK_GROUPS), values.split(_CHUNK_GROUPS), strict=True):
        one_hot = torch.zeros(len(some), ENTRIES, dtype=values.dtype, device=values.device)
        total += one_hot.scatter_(1, some.unsqueeze(1), 1.0).T @ rows
    return total


def _kmeans(points: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
    """256 centroids of weighted points [n, 8], by Lloyd's algorithm; an empty cluster stays where it is."""
    centroids = _spread_start(points, weights, generator)
    weighted = torch.cat([points * weights.unsqueeze(1), weights.unsqueeze(1)], 1)
    for _ in range(_KMEANS_STEPS):
        sums = _members_sum(_nearest(points, centroids), weighted)
        filled = sums[:, -1:] > 0
        centroids = torch.where(filled, sums[:, :-1] / torch.where(filled, sums[:, -1:], 1.0), centroids)
    return centroids


def _start_scales(weight: Tensor) -> Tensor:
    """Root mean square of each row, divided by that of all rows: about 1, and float16 holds it."""
    squares = weight.square().mean(1)
    mean = squares.mean()
    return (squares / mean).sqrt() if mean > 0 else torch.zeros_like(squares)


def _safe(scales: Tensor) -> Tensor:
    """The scales with 1 for 0: a row of zeros may have any code."""
    return torch.where(scales == 0, 1.0, scales)


def _residual_kmeans(
    weight: Tensor, scales: Tensor, n_codebooks: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Codebooks of a sample of the groups, and every group's code in each: [n, 256, 8] and uint8 [out, in/8, n]."""
    out, groups = weight.shape[0], weight.shape[1] // GROUP
    at = torch.randperm(out * groups, generator=generator, device=weight.device)[:_SAMPLE]
    rows = at // groups
    points = weight.view(-1, GROUP)[at] / _safe(scales)[rows, None]
    weights = scales[rows].square() + 1e-12
    books = []
    for _ in range(n_codebooks):
        books.append(_kmeans(points, weights, generator))
        points = points - books[-1][_nearest(points, books[-1])]
    codes = torch.empty(out, groups, n_codebooks, dtype=torch.uint8, device=weight.device)
    step = max(1, _CHUNK_WEIGHTS // weight.shape[1])
    for start in range(0, out, step):
        part = slice(start, start + step)
        left = (weight[part] / _safe(scales)[part, None]).view(-1, GROUP)
        for c, book in enumerate(books):
            code = _nearest(left, book)
            left = left - book[code]
            codes[part, :, c] = code.view(-1, groups).to(torch.uint8)
    return torch.stack(books), codes


# --- scales and codebooks ------------------------------------------------------------------------------------------


def _fit_scales(problem: _Problem) -> None:
    """Each row's least-squares scale; rows that no scale can help keep theirs."""
    for part in problem.parts():
        sums = problem.sums(part.rows)
        turned = _times(sums, part.h)
        square = (turned * sums).sum(1)
        fitted = (turned * part.w).sum(1) / torch.where(square > 0, square, 1.0)
        problem.scales[part.rows] = torch.where(square > 0, fitted, problem.scales[part.rows])


def _gathered(problem: _Problem, part: _Part, values: Tensor) -> Tensor:
    """The transpose of `sums` and scale: values [n, in] added up by code, [n_codebooks, 256, 8]."""
    scaled = (values * problem.scales[part.rows, None]).view(-1, GROUP)
    codes = problem.codes[part.rows].flatten(0, 1).long()
    return torch.stack([_members_sum(codes[:, c].contiguous(), scaled) for c in range(codes.shape[1])])


def _normal(problem: _Problem, books: Tensor) -> Tensor:
    """The normal equations' matrix times `books`."""
    total = torch.zeros_like(books)
    for part in problem.parts():
        dense = problem.sums(part.rows, books) * problem.scales[part.rows, None]
        total += _gathered(problem, part, _times(dense, part.h))
    return total


def _diagonal(problem: _Problem) -> Tensor:
    """That matrix' diagonal where no group meets another; 1 for an entry that no code names."""
    total = torch.zeros_like(problem.books)
    for part in problem.parts():
        alone = torch.ones_like(part.w[0]) if part.h is None else part.h.diagonal()
        total += _gathered(problem, part, problem.scales[part.rows, None] * alone)
    return torch.where(total > 0, total, 1.0)


def _downhill(problem: _Problem) -> Tensor:
    """Minus half of the gradient of f by the codebooks."""
    total = torch.zeros_like(problem.books)
    for part in problem.parts():
        total -= _gathered(problem, part, _times(problem.error(part), part.h))
    return total


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def _fit_codebooks(problem: _Problem) -> None:
    """Conjugate gradients from the present codebooks; f falls with every step."""
    diagonal, left = _diagonal(problem), _downhill(problem)
    found, toward = torch.zeros_like(left), left / diagonal
    slope = first = _dot(left, toward)
    for _ in range(_CG_STEPS):
        if slope <= _CG_RESIDUAL**2 * first or slope == 0:
            break
        turned = _normal(problem, toward)
        curve = _dot(toward, turned)
        if curve <= 0:
            break
        found += slope / curve * toward
        left -= slope / curve * turned
        before, slope = slope, _dot(left, left / diagonal)
        toward = left / diagonal + slope / before * toward
    problem.books += found


# --- codes ---------------------------------------------------------------------------------------------------------


def _least(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` least of each row, int64 [n, count], least first.

    They lie in the `count` of m/16 strided runs whose own least are least, so that only those are sorted.
    """
    n, m = scores.shape
    runs = m // _RUN
    if runs <= count:
        return scores.topk(count, largest=False).indices
    run = scores.view(n, _RUN, runs).amin(1).topk(count, largest=False).indices
    at = (run.unsqueeze(1) + runs * torch.arange(_RUN, device=run.device).view(1, -1, 1)).flatten(1)
    return at.gather(1, scores.gather(1, at).topk(count, largest=False).indices)


def _entries(books: Tensor, codes: Tensor) -> Tensor:
    return sum(books[c][codes[:, c]] for c in range(len(books)))


def _value(pull: Tensor, metric: Tensor, books: Tensor, codes: Tensor) -> Tensor:
    """v^T M v + 2 v^T t of each row: float32 [n]."""
    v = _entries(books, codes)
    return ((v @ metric + 2 * pull) * v).sum(1)


def _beam_search(pull: Tensor, metric: Tensor, books: Tensor, codes: Tensor, beam: int) -> Tensor:
    """The codes of one group of many rows: v = sum of entries, least v^T M v + 2 v^T t.

    The sum grows by one codebook after another, and the `beam` best partial sums go on. Where the old codes are better than
    what comes of it they stay.

    Args:
        pull: t, float32 [n, 8].
        metric: M, float32 [8, 8].
        books: float32 [n_codebooks, 256, 8].
        codes: int64 [n, n_codebooks], the old ones.
        beam: partial sums kept.

    Returns:
        int64 [n, n_codebooks].
    """
    n_books, n = len(books), len(codes)
    norms = torch.einsum("cki,ij,ckj->ck", books, metric, books)
    sums, value = (
        torch.zeros_like(pull).unsqueeze(1),
        torch.zeros_like(pull[:, :1]),
    )  # [n, kept, 8], [n, kept]
    kept = torch.zeros_like(codes).unsqueeze(1)  # [n, kept, n_codebooks]
    for c in range(n_books):
        slope = 2 * (sums @ metric + pull.unsqueeze(1))
        scores = torch.addmm(norms[c], slope.flatten(0, 1), books[c].T).view(n, -1, ENTRIES)
        scores = (scores + value.unsqueeze(-1)).flatten(1)
        best = _least(scores, beam if c + 1 < n_books else 1)
        value, parents, code = scores.gather(1, best), best // ENTRIES, best % ENTRIES
        kept = kept.gather(1, parents.unsqueeze(-1).expand(-1, -1, n_books))
        kept[..., c] = code
        sums = sums.gather(1, parents.unsqueeze(-1).expand(-1, -1, GROUP)) + books[c][code]
    better = _value(pull, metric, books, kept[:, 0]) < _value(pull, metric, books, codes)
    return torch.where(better.unsqueeze(1), kept[:, 0], codes)


def _searched(pull: Tensor, metric: Tensor, books: Tensor, codes: Tensor, beam: int) -> Tensor:
    """`_beam_search` in chunks of bounded memory."""
    step = max(1, _CHUNK_SCORES.get(pull.device.type, 1 << 24) // (beam * ENTRIES))
    parts = zip(pull.split(step), codes.split(step), strict=True)
    return torch.cat([_beam_search(t, metric, books, c, beam) for t, c in parts])


def _fit_codes_apart(problem: _Problem, part: _Part, beam: int) -> None:
    """Where H is I no group meets another: all at once."""
    codes = problem.codes[part.rows]
    target = (part.w / _safe(problem.scales)[part.rows, None]).view(-1, GROUP)
    metric = torch.eye(GROUP, device=target.device)
    found = _searched(-target, metric, problem.books, codes.flatten(0, 1).long(), beam)
    problem.codes[part.rows] = found.view(codes.shape).to(torch.uint8)


def _fit_codes_in_turn(problem: _Problem, part: _Part, beam: int) -> None:
    """Group after group, each against the error that the others leave."""
    error, scales = problem.error(part), _safe(problem.scales)[part.rows, None]
    codes, inputs = problem.codes[part.rows], part.w.shape[1]
    for start in range(0, inputs, _BLOCK * GROUP):
        block = slice(start, min(start + _BLOCK * GROUP, inputs))
        turned = error @ part.h[:, block]
        for first in range(start, block.stop, GROUP):
            group = slice(first, first + GROUP)
            metric, old = part.h[group, group], codes[:, first // GROUP].long()
            before = _entries(problem.books, old)
            pull = turned[:, first - start : first - start + GROUP] / scales - before @ metric
            new = _searched(pull, metric, problem.books, old, beam)
            moved = (_entries(problem.books, new) - before) * scales
            error[:, group] += moved
            turned += moved @ part.h[group, block]
            codes[:, first // GROUP] = new.to(torch.uint8)


def _fit_codes(problem: _Problem, beam: int) -> None:
    for part in problem.parts():
        (_fit_codes_apart if part.h is None else _fit_codes_in_turn)(problem, part, beam)


# --- what others call ----------------------------------------------------------------------------------------------


def _require_weight(weight: Tensor, name: str) -> None:
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise AdditiveFitError(
            f"{name} is {weight.dtype} {list(weight.shape)}; give a floating matrix [out_features, in_features]."
        )
    if weight.shape[1] % GROUP:
        raise AdditiveFitError(
            f"{name} has {weight.shape[1]} inputs; additive codebooks store groups of {GROUP}, so take another method or "
            "leave it dense."
        )
    bad = int((~weight.isfinite()).sum())
    if bad:
        raise AdditiveFitError(
            f"{name} holds {bad} NaN or infinite values among {weight.numel()}; repair the checkpoint."
        )
    largest = float(weight.abs().max())
    if largest > _LARGEST:
        raise AdditiveFitError(
            f"{name} reaches {largest:g}, beyond the {_LARGEST:g} that a float16 codebook holds; leave it dense."
        )


def _require_hessian(hessian: Tensor, weight: Tensor, name: str) -> None:
    out, inputs = weight.shape
    if hessian.dim() != 3 or hessian.shape[1:] != (inputs, inputs) or not 1 <= len(hessian) <= out:
        raise AdditiveFitError(
            f"the Hessian of {name} is {list(hessian.shape)}; {out} x {inputs} weights need [1 to {out}, {inputs}, {inputs}]."
        )
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    if not bool(hessian.isfinite().all()) or bool((diagonal < 0).any()):
        raise AdditiveFitError(
            f"the Hessian of {name} holds NaN or infinite values, or a negative one on its diagonal; check the calibration."
        )


def _require_numbers(n_codebooks: int, iterations: int, beam: int) -> None:
    if n_codebooks not in N_CODEBOOKS:
        raise AdditiveFitError(
            f"there are additive weights of 2 codebooks (2 bits) and 4 (4 bits), not of {n_codebooks}."
        )
    if iterations < 0 or not 1 <= beam <= ENTRIES:
        raise AdditiveFitError(
            f"iterations is {iterations} and beam {beam}; give at least 0 iterations and a beam of 1 to {ENTRIES}."
        )


def _note(problem: _Problem, step: str) -> None:
    """Log f, which no step may raise."""
    now = problem.objective()
    if problem.log and now > problem.log[-1] * (1 + _RISE) + _NOTHING:
        raise ArithmeticError(
            f"the {step} raised the objective from {problem.log[-1]:g} to {now:g}; the Hessian may be indefinite."
        )
    problem.log.append(now)


def _improve(problem: _Problem, beam: int) -> None:
    for name, step in (("scales", _fit_scales), ("codebooks", _fit_codebooks)):
        step(problem)
        _note(problem, name)
    _fit_codes(problem, beam)
    _note(problem, "codes")


def _rounded(problem: _Problem, beam: int, name: str) -> AdditiveWeight:
    """The weight as it is stored; scales and codes are fitted to the rounded codebooks."""
    problem.books = problem.books.half().float()
    _fit_scales(problem)
    problem.scales = problem.scales.half().float()
    if not bool(problem.books.isfinite().all() and problem.scales.isfinite().all()):
        raise AdditiveFitError(
            f"the codebooks of {name} exceed {_LARGEST:g}, the largest of float16; leave it dense."
        )
    _fit_codes(problem, beam)
    return AdditiveWeight(problem.codes, problem.books.half(), problem.scales.half())


@torch.no_grad()
def fit(
    weight: Tensor,
    n_codebooks: int = 2,
    hessian: Tensor | None = None,
    iterations: int = ITERATIONS,
    beam: int = BEAM,
    seed: int = 0,
    name: str = "weight",
) -> Fitted:
    """Fit additive codebooks; on one device the same input and seed give the same codes.

    Args:
        weight: floating [out_features, in_features], finite, in_features a multiple of 8; CPU or CUDA.
        n_codebooks: 2 (2 bits a weight) or 4 (4 bits).
        hessian: [groups, in_features, in_features], symmetric and not negative: the mean of x x^T over tokens, for `groups`
            equal runs of rows (row r belongs to r * groups // out_features). None for I.
        iterations: rounds of scales, codebooks and codes; 0 leaves the start and one choice of codes.
        beam: partial sums of a group that the search of codes keeps.
        seed: of the sample and the start.
        name: what to call the tensor in an error.

    Raises:
        AdditiveFitError: a shape, value or argument that does not fit.
        ArithmeticError: a step raised the objective.
    """
    _require_numbers(n_codebooks, iterations, beam)
    weight = weight.detach()
    _require_weight(weight, name)
    if hessian is not None:
        _require_hessian(hessian, weight, name)
        hessian = _prepared(hessian, weight.device)
    weight = weight.float().contiguous()
    scales = _start_scales(weight)
    generator = torch.Generator(weight.device).manual_seed(seed)
    books, codes = _residual_kmeans(weight, scales, n_codebooks, generator)
    problem = _Problem(weight, hessian, codes, books, scales)
    _note(problem, "start")
    for _ in range(iterations):
        _improve(problem, beam)
    stored = _rounded(problem, beam, name)
    return Fitted(stored, problem.log, problem.objective())


def weight_error(weight: Tensor, quantized: AdditiveWeight) -> float:
    """Relative squared error ||W - Q||^2 / ||W||^2 in float64, as `trapetum.quantizers.weight_error` of codebook weights.

    Raises:
        AdditiveFitError: the shapes differ.
    """
    if tuple(weight.shape) != (quantized.out_features, quantized.in_features):
        raise AdditiveFitError(
            f"the weight is {list(weight.shape)}, the quantized one [{quantized.out_features}, {quantized.in_features}]; "
            "compare the same layer."
        )
    lost = total = 0.0
    step = max(1, _CHUNK_WEIGHTS // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        dense = weight[rows].detach().double()
        restored = dequantized(
            quantized.codes[rows], quantized.codebooks, quantized.scales[rows], torch.float64
        )
        lost, total = lost + float((dense - restored).square().sum()), total + float(dense.square().sum())
    return lost / total if total else (float("inf") if lost else 0.0)
