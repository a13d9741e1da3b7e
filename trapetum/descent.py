"""Sweeps over columns in which each weight takes its best code given all others: C on CPU, CUDA on a GPU, torch for both.

A sweep runs over at most `BLOCK` columns; what it changed reaches all other columns by one matrix product.
"""

import ctypes
import functools

import torch
from torch import Tensor

from trapetum.build import BuildError, compile_c
from trapetum.launch import integer, kernel, pointer

SOURCE, CUDA_SOURCE = "coordinate_descent.c", "coordinate_descent.cu"
BLOCK = 128
_WARPS = 16
_LANES = 32


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled C kernel and "", or None and the reason."""
    try:
        library = ctypes.CDLL(str(compile_c(SOURCE)))
    except (BuildError, OSError) as error:
        return None, str(error)
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    sizes = [size, number, number, size, size, size, number]
    library.trapetum_descent.argtypes = [pointer] * 4 + sizes + [pointer] * 2
    library.trapetum_descent.restype = None
    return library, ""


def _cuda_ready() -> bool:
    from trapetum import cuda

    return cuda.available()


# --- one sweep -----------------------------------------------------------------------------------------------------


def sweep_torch(
    slope: Tensor, feedback: Tensor, codebook: Tensor, codes: Tensor, scale: Tensor | None
) -> Tensor:
    """What the kernels compute, in float64 and column by column: see `sweep`."""
    target, feedback, book = slope.double(), feedback.double(), codebook.double()
    start = None
    if scale is not None:
        start = book.gather(1, codes.long())
        target, feedback = start + target * scale, feedback * scale
    middle = ((book[:, 1:] + book[:, :-1]) / 2).contiguous()
    step = torch.empty_like(target)
    for j in range(target.shape[1]):
        column = target[:, j : j + 1].contiguous()
        chosen = torch.searchsorted(middle, column)
        codes[:, j : j + 1] = chosen.to(torch.uint8)
        step[:, j : j + 1] = book.gather(1, chosen) - (column if start is None else start[:, j : j + 1])
        target[:, j + 1 :] += step[:, j : j + 1] * feedback[j, j + 1 :]
    return step.float()


def _sizes(slope: Tensor, feedback: Tensor, codebook: Tensor, codes: Tensor) -> tuple[int, ...]:
    return (*slope.shape, codebook.shape[1], slope.stride(0), feedback.stride(0), codes.stride(0))


def _sweep_c(
    slope: Tensor, feedback: Tensor, codebook: Tensor, codes: Tensor, scale: Tensor | None
) -> Tensor:
    step = torch.empty(slope.shape)
    inputs = [None if t is None else t.data_ptr() for t in (slope, feedback, codebook, scale)]
    sizes = (*_sizes(slope, feedback, codebook, codes), torch.get_num_threads())
    _library()[0].trapetum_descent(*inputs, *sizes, codes.data_ptr(), step.data_ptr())
    return step


def _sweep_cuda(
    slope: Tensor, feedback: Tensor, codebook: Tensor, codes: Tensor, scale: Tensor | None
) -> Tensor:
    step = torch.empty(slope.shape, device=slope.device)
    entries = 1 if codebook.shape[1] <= _LANES else 8
    inputs = [pointer(t) for t in (slope, feedback, codebook, scale)]
    sizes = [integer(size) for size in _sizes(slope, feedback, codebook, codes)]
    run = kernel(CUDA_SOURCE, "trapetum_descent", (f"ENTRIES={entries}",), slope.device.index)
    grid, block = (-(-len(slope) // _WARPS), 1, 1), (_LANES * _WARPS, 1, 1)
    run.launch(grid, block, 0, [*inputs, *sizes, pointer(codes), pointer(step)])
    return step


def _side_by_side(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


def sweep(slope: Tensor, feedback: Tensor, codebook: Tensor, codes: Tensor, scale: Tensor | None) -> Tensor:
    """Give each weight of a block, column after column, the code nearest to its target.

    Without a scale the target is `slope`, and a weight's step away from it, times `feedback`, moves the targets of the
    columns behind it. With one the target is the weight's value plus `slope * scale`, the step is taken from that value,
    and moves the other targets by `feedback * scale`.

    Args:
        slope: float32 [rows, width], width at most `BLOCK`.
        feedback: float32 [width, width]; read above the diagonal.
        codebook: float32 [rows, k], rising, k at most 256.
        codes: uint8 [rows, width]; overwritten; with a scale they hold the codes before.
        scale: float32 [width], contiguous, or None.
        (The rows of codes may lie at any distance, the codes of a row side by side.)

    Returns:
        float32 [rows, width], the steps: the new value less the target, or with a scale less the old value.
    """
    assert codes.stride(1) == 1 or codes.shape[1] == 1, "the kernels write the codes of a row side by side"
    arguments = _side_by_side(slope), _side_by_side(feedback), codebook.contiguous(), codes, scale
    if slope.is_cuda and _cuda_ready():
        return _sweep_cuda(*arguments)
    if slope.device.type == "cpu" and _library()[0] is not None:
        return _sweep_c(*arguments)
    return sweep_torch(*arguments)


# --- coordinate descent --------------------------------------------------------------------------------------------


def descend(hessian: Tensor, codebook: Tensor, codes: Tensor, gradient: Tensor, cycles: int) -> None:
    """Cyclic coordinate descent over the codes, in place: no step raises (w' - w)^T H (w' - w).

    Args:
        hessian: float32 [in, in], symmetric, its diagonal positive.
        codebook: float32 [rows, k], rising.
        codes: uint8 [rows, in]; overwritten.
        gradient: float32 [rows, in], (w' - w) H for these codes; overwritten.
        cycles: over all columns, at most; it ends where nothing moves.
    """
    # Along one weight the error is a parabola with its lowest point at w'_j - gradient_j / H_jj, and the code nearest to
    # it is best. A step d of weight j raises gradient_i by d * H_ji, so that the lowest point of weight i moves too.
    scale = -1 / hessian.diagonal()
    for _ in range(cycles):
        before = codes.clone()
        for first in range(0, codes.shape[1], BLOCK):
            at = slice(first, first + BLOCK)
            step = sweep(gradient[:, at], hessian[at, at], codebook, codes[:, at], scale[at])
            gradient.addmm_(step, hessian[at])
        if torch.equal(before, codes):
            return
