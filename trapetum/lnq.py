"""LNQ: codebooks and codes that together have the least output error of a layer.

For a row w with codes P (one-hot [in, n_codes]) and codebook c, w' = P c, the error (w' - w)^T H (w' - w) is quadratic in c
for fixed P, so that the best codebook is the solution of a small linear system; for a fixed c the codes improve one at a
time. The two steps alternate, from the exact k-means with weights diag(H). A descent ends where no single code can change
for the better, and where it ends depends on where it starts: each row descends from its own codes and from those that
error feedback finds for its new codebook, and keeps the better end. Codebooks hold float16 values throughout, so the error
of what is stored is what was minimised, and no step ever raises it.

Sources: Kim et al., "GuidedQuant: Large Language Model Quantization via Exploiting End Loss Guidance", ICML 2025,
arXiv:2505.07004 (the alternation, and the Hessian weighted by the gradients of the end loss); the start is that of Kim et
al., "SqueezeLLM: Dense-and-Sparse Quantization", ICML 2024, arXiv:2306.07629; error feedback: see `trapetum.gptq`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trapetum.descent import descend
from trapetum.gptq import Feedback, feed_back, feedback, weighted_codebook
from trapetum.kmeans import nearest
from trapetum.quadratic import RIDGE, Form, fitting_threads, form, full_precision, require_hessian, row_groups

ITERATIONS, CYCLES = 3, 4
_LARGEST = torch.finfo(torch.float16).max
_DAMPING = 1e-6  # of the mean of the system's diagonal: holds codes that no weight has where they are
_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 27}  # elements of a one-hot matrix [rows * n_codes, in]
_ROUNDING = 1e-5  # of the error, and of its diagonal part: what float32 products may hide


@dataclass(frozen=True)
class Fitted:
    """Codebooks and codes of a layer.

    Attributes:
        codebook: float32 [rows, n_codes], rising, every value one of float16.
        codes: uint8 [rows, in].
        objective: sum over rows of (w' - w)^T H (w' - w), the ridge included: of the start, then after every half step.
    """

    codebook: Tensor
    codes: Tensor
    objective: list[float]


class NotMonotone(ArithmeticError):
    """The error rose by more than rounding explains: a fault in a kernel."""


# --- the codebook step ---------------------------------------------------------------------------------------------


def _split(hessian: Tensor) -> tuple[Tensor, ...]:
    """The Hessian as a sum of matrices for the product with a one-hot one.

    Three bfloat16 matrices hold every bit of a float32 one, a one-hot matrix is exact in bfloat16, and tensor cores sum in
    float32: three such products are as good as one in float32, and faster where there are tensor cores.
    """
    if not hessian.is_cuda or torch.cuda.get_device_capability(hessian.device) < (8, 0):
        return (hessian,)
    parts, rest = [], hessian
    for _ in range(3):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].float()
    return tuple(parts)


def _times(one_hot: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    if len(parts) == 1:
        return one_hot @ parts[0]
    products = [torch.mm(one_hot, part, out_dtype=torch.float32) for part in parts]
    return products[0].add_(products[1]).add_(products[2])


def _system(parts: tuple[Tensor, ...], codes: Tensor, gradient: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """P^T H P, float64 [rows, k, k], and -P^T H (w' - w), float64 [rows, k]."""
    levels = torch.arange(k, dtype=torch.uint8, device=codes.device).view(1, k, 1)
    one_hot = (codes.unsqueeze(1) == levels).to(parts[0].dtype)
    rows, _, inputs = one_hot.shape
    product = _times(one_hot.view(rows * k, inputs), parts).view(rows, k, inputs)
    one_hot = one_hot.float()
    matrix = torch.bmm(product, one_hot.mT).double()
    side = torch.bmm(one_hot, gradient.unsqueeze(2)).squeeze(2).double()
    return (matrix + matrix.mT) / 2, -side


def _solve(matrix: Tensor, side: Tensor) -> Tensor:
    """The change of each codebook that minimises the error, [rows, k]; rows without a solution hold NaN."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    damping = _DAMPING * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    damped = matrix + torch.diag_embed(damping.expand_as(diagonal))
    factor, failed = torch.linalg.cholesky_ex(damped)
    change = torch.cholesky_solve(side.unsqueeze(2), factor).squeeze(2)
    return change.masked_fill((failed != 0).unsqueeze(1), torch.nan)


def _better(codebook: Tensor, matrix: Tensor, side: Tensor) -> Tensor:
    """The codebook of least error in float16 values, or the old one of a row where that is no better."""
    wanted = (codebook + _solve(matrix, side)).clamp(-_LARGEST, _LARGEST).half().float()
    step = (wanted - codebook).double()
    gain = torch.einsum("ra,rab,rb->r", step, matrix, step) - 2 * (side * step).sum(1)
    return torch.where((gain < 0).unsqueeze(1), wanted, codebook)  # NaN is not below 0


def _sorted(codebook: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The codebooks rising, and the codes renamed so that every weight keeps its value."""
    codebook, order = codebook.sort(dim=1, stable=True)
    return codebook, order.argsort(dim=1).to(torch.uint8).gather(1, codes.long())


def _refit(
    parts: tuple[Tensor, ...], codebook: Tensor, codes: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """The codebook step for all rows, some at a time: new codebooks, and the codes in their names."""
    k, found = codebook.shape[1], []
    rows = max(1, _CHUNK.get(codes.device.type, _CHUNK["cpu"]) // (k * codes.shape[1]))
    for chunk in zip(codebook.split(rows), codes.split(rows), gradient.split(rows), strict=True):
        book, of, slope = chunk
        found.append(_sorted(_better(book, *_system(parts, of, slope, k)), of))
    codebooks, renamed = zip(*found, strict=True)
    return torch.cat(codebooks), torch.cat(renamed)


# --- the alternation -----------------------------------------------------------------------------------------------


class _State:
    """Codes and codebooks of a group of rows, with their residual w' - w and its product with H."""

    def __init__(self, weight: Tensor, hessian: Tensor, codebook: Tensor, codes: Tensor):
        self.weight, self.hessian, self.codebook, self.codes = weight, hessian, codebook, codes
        self.gradient = self.residual() @ hessian

    def residual(self) -> Tensor:
        return self.codebook.gather(1, self.codes.long()) - self.weight

    def errors(self) -> Tensor:
        return (self.residual().double() * self.gradient).sum(1)

    def descend(self, cycles: int) -> None:
        descend(self.hessian, self.codebook, self.codes, self.gradient, cycles)

    def take_better(self, other: "_State") -> None:
        """The rows of `other` where it errs less."""
        better = (other.errors() < self.errors()).unsqueeze(1)
        self.codebook = torch.where(better, other.codebook, self.codebook)
        self.codes = torch.where(better, other.codes, self.codes)
        self.gradient = torch.where(better, other.gradient, self.gradient)


def _refitted(state: _State, parts: tuple[Tensor, ...]) -> _State:
    codebook, codes = _refit(parts, state.codebook, state.codes, state.gradient)
    return _State(state.weight, state.hessian, codebook, codes)


def _descend(state: _State, of: Feedback | None, cycles: int) -> None:
    """From the state's own codes and, with `of`, from those of error feedback; each row keeps the better end."""
    state.descend(cycles)
    if of is not None:
        codes = feed_back(state.weight, state.codebook, of)
        other = _State(state.weight, state.hessian, state.codebook, codes)
        other.descend(cycles)
        state.take_better(other)


def _note(objective: list[float], state: _State) -> None:
    """Append the state's error, and prove that it did not rise."""
    value = float(state.errors().sum())
    alone = float((state.residual().square() * state.hessian.diagonal()).sum(dtype=torch.float64))
    if objective and not value <= objective[-1] + _ROUNDING * (objective[-1] + alone):
        raise NotMonotone(
            f"the error rose from {objective[-1]:.9g} to {value:.9g} in step {len(objective)}; a step may only lower it, "
            "so a kernel computes something else here: please report it."
        )
    objective.append(value)


def _fit_group(
    weight: Tensor, n_codes: int, of: Form, iterations: int, cycles: int, restart: bool
) -> tuple[Tensor, Tensor, list[float]]:
    codebook = weighted_codebook(weight, n_codes, of.hessian)
    state = _State(weight, of.hessian, codebook, nearest(weight, codebook))
    parts, back = _split(of.hessian), feedback(of.hessian) if restart else None
    objective: list[float] = []
    _note(objective, state)
    for _ in range(iterations):
        state.take_better(_refitted(state, parts))
        _note(objective, state)
        _descend(state, back, cycles)
        _note(objective, state)
    return state.codebook, state.codes, [value * of.scale for value in objective]


@torch.no_grad()
def lnq(
    weight: Tensor,
    n_codes: int,
    hessian: Tensor,
    iterations: int = ITERATIONS,
    cycles: int = CYCLES,
    ridge: float = RIDGE,
    restart: bool = True,
) -> Fitted:
    """Codebooks and codes of least output error, by alternating least squares and coordinate descent.

    The same input gives the same result on the same device (of over a million weights: with the same number of threads).

    Args:
        weight: floating [rows, in], finite, on CPU or CUDA; computed in float32.
        n_codes: entries of each row's codebook, 2 to 256.
        hessian: floating [groups, in, in], as `trapetum.calibration.Statistics` has it.
        iterations: codebook steps, each followed by a descent.
        cycles: of a descent over all columns, at most.
        ridge: added to the diagonal, as a share of its mean.
        restart: descend from the codes of error feedback too.

    Raises:
        ValueError: a Hessian of a wrong shape, with NaN or infinity, with a negative diagonal, or (with `restart`) not
            positive definite with its ridge.
        NotMonotone: the error rose, which a correct kernel cannot do.
    """
    weight = weight.detach().float()
    require_hessian(hessian, weight.shape[1])
    with full_precision(), fitting_threads(weight):
        parts = [
            _fit_group(
                weight[rows], n_codes, form(hessian[g].to(weight.device), ridge), iterations, cycles, restart
            )
            for g, rows in row_groups(len(weight), len(hessian))
        ]
    codebooks, codes, objectives = zip(*parts, strict=True)
    return Fitted(
        torch.cat(codebooks), torch.cat(codes), [sum(step) for step in zip(*objectives, strict=True)]
    )
