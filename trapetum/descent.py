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
    library.trapetum_descent.argtypes = [pointer] * 4 + [size, number, number, size, number] + [pointer] * 2
    library.trapetum_descent.restype = None
    return library, ""


def _cuda_ready() -> bool:
    from trapetum import cuda

    return cuda.available()


# --- one sweep -----------------------------------------------------------------------------------------------------


def sweep_torch(
    target: Tensor, feedback: Tensor, codebook: Tensor, codes: Tensor, old: Tensor | None
) -> Tensor:
    """What the kernels compute, in float64 and column by column: see `sweep`."""
    target, feedback, book = target.double(), feedback.double(), codebook.double()
    middle = ((book[:, 1:] + book[:, :-1]) / 2).contiguous()
    change = torch.empty_like(target)
    for j in range(target.shape[1]):
        chosen = torch.searchsorted(middle, target[:, j : j + 1].contiguous())
        codes[:, j] = chosen[:, 0].to(torch.uint8)
        change[:, j] = (book.gather(1, chosen) - (target if old is None else old.double())[:, j : j + 1])[
            :, 0
        ]
        target[:, j + 1 :] += change[:, j : j + 1] * feedback[j, j + 1 :]
    return change.float()


def _sweep_c(target: Tensor, feedback: Tensor, codebook: Tensor, codes: Tensor, old: Tensor | None) -> Tensor:
    change = torch.empty_like(target)
    (rows, width), k = target.shape, codebook.shape[1]
    inputs = (target, feedback, codebook, old)
    _library()[0].trapetum_descent(
        *(None if t is None else t.data_ptr() for t in inputs),
        *(rows, width, k, codes.stride(0), torch.get_num_threads()),
        *(codes.data_ptr(), change.data_ptr()),
    )
    return change


def _sweep_cuda(
    target: Tensor, feedback: Tensor, codebook: Tensor, codes: Tensor, old: Tensor | None
) -> Tensor:
    change = torch.empty_like(target)
    (rows, width), k = target.shape, codebook.shape[1]
    entries = 1 if k <= _LANES else 8
    inputs = [pointer(t) for t in (target, feedback, codebook, old)]
    sizes = [integer(size) for size in (rows, width, k, codes.stride(0))]
    run = kernel(CUDA_SOURCE, "trapetum_descent", (f"ENTRIES={entries}",), target.device.index)
    grid, block = (-(-rows // _WARPS), 1, 1), (_LANES * _WARPS, 1, 1)
    run.launch(grid, block, 0, [*inputs, *sizes, pointer(codes), pointer(change)])
    return change


def sweep(target: Tensor, feedback: Tensor, codebook: Tensor, codes: Tensor, old: Tensor | None) -> Tensor:
    """Give each weight of a block, column after column, the code nearest to its target.

    The step that a weight takes, times `feedback`, moves the targets of the columns behind it.

    Args:
        target: float32 [rows, width], width at most `BLOCK`.
        feedback: float32 [width, width]; read above the diagonal.
        codebook: float32 [rows, k], rising, k at most 256.
        codes: uint8 [rows, width], rows at any distance; overwritten.
        old: float32 [rows, width], the values that the steps start from; None for the targets.

    Returns:
        float32 [rows, width], the steps: the new value less the old one.
    """
    arguments = [t if t is None else t.contiguous() for t in (target, feedback, codebook)]
    old = None if old is None else old.contiguous()
    if target.is_cuda and _cuda_ready():
        return _sweep_cuda(*arguments, codes, old)
    if target.device.type == "cpu" and _library()[0] is not None:
        return _sweep_c(*arguments, codes, old)
    return sweep_torch(*arguments, codes, old)


# --- coordinate descent --------------------------------------------------------------------------------------------


def _descend_block(
    hessian: Tensor, codebook: Tensor, codes: Tensor, gradient: Tensor, columns: slice
) -> None:
    # Along one weight the error is a parabola with its lowest point at w'_j - gradient_j / H_jj; of the codes the
    # nearest to it is best. A step d of weight j moves gradient_i by d * H_ji, so the lowest point of weight i by
    # -d * H_ji / H_ii.
    old = codebook.gather(1, codes[:, columns].long())
    scale = -1 / hessian.diagonal()[columns]
    target = torch.addcmul(old, gradient[:, columns], scale)
    change = sweep(target, hessian[columns, columns] * scale, codebook, codes[:, columns], old)
    gradient.addmm_(change, hessian[columns])


def descend(hessian: Tensor, codebook: Tensor, codes: Tensor, gradient: Tensor, cycles: int) -> None:
    """Cyclic coordinate descent over the codes, in place: no step raises (w' - w)^T H (w' - w).

    Args:
        hessian: float32 [in, in], symmetric, its diagonal positive.
        codebook: float32 [rows, k], rising.
        codes: uint8 [rows, in]; overwritten.
        gradient: float32 [rows, in], (w' - w) H for these codes; overwritten.
        cycles: over all columns, at most; it ends where nothing moves.
    """
    for _ in range(cycles):
        before = codes.clone()
        for first in range(0, codes.shape[1], BLOCK):
            _descend_block(hessian, codebook, codes, gradient, slice(first, first + BLOCK))
        if torch.equal(before, codes):
            return
