"""The output error of a layer as a quadratic form of its weights: (w' - w)^T H (w' - w), H the second moments of its inputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 0.01
#: Up to so many weights one thread is faster: thousands of short parallel regions wait, above all beside other programs.
_ONE_THREAD = 1 << 20


class Form(NamedTuple):
    """A Hessian made fit for arithmetic.

    Attributes:
        hessian: float32 [in, in], symmetric, its diagonal positive and 1 + ridge in the mean.
        scale: what the given one was divided by.
    """

    hessian: Tensor
    scale: float


def require_hessian(hessian: Tensor, inputs: int, name: str = "the weight") -> None:
    """Refuse a Hessian that is none.

    Args:
        hessian: [groups, inputs, inputs].
        inputs: of the layer.
        name: of the layer's weight, for the error.

    Raises:
        ValueError: a wrong shape, NaN or infinity, or a negative value on a diagonal.
    """
    if hessian.dim() != 3 or hessian.shape[1:] != (inputs, inputs) or not len(hessian):
        raise ValueError(
            f"the Hessian of {name} is {list(hessian.shape)}; give [groups, {inputs}, {inputs}], one or more groups."
        )
    bad = int((~hessian.isfinite()).sum())
    if bad:
        raise ValueError(f"the Hessian of {name} holds {bad} NaN or infinite values; check the calibration.")
    lowest = float(hessian.diagonal(dim1=1, dim2=2).min())
    if lowest < 0:
        raise ValueError(
            f"the Hessian of {name} has {lowest:g} on its diagonal, a mean of squares; check the calibration."
        )


def row_groups(rows: int, groups: int) -> list[tuple[int, slice]]:
    """The rows of each group that has any: row r belongs to group r * groups // rows.

    Returns:
        (group, its rows), in order.
    """
    starts = [-(-group * rows // groups) for group in range(groups + 1)]
    return [(g, slice(a, b)) for g, (a, b) in enumerate(zip(starts, starts[1:], strict=False)) if a < b]


def form(hessian: Tensor, ridge: float = RIDGE) -> Form:
    """Scale to a mean diagonal of 1, make symmetric, and add `ridge` to the diagonal.

    The ridge gives an input that was never seen (H_jj = 0) a weight of its own; a Hessian of zeros becomes the identity.

    Args:
        hessian: floating [in, in], checked by `require_hessian`.
        ridge: share of the mean of the diagonal, above 0.
    """
    hessian = hessian.float()
    scale = float(hessian.diagonal().double().mean())
    if scale < torch.finfo(torch.float32).tiny:
        return Form(torch.eye(len(hessian), device=hessian.device), 0.0)
    scaled = (hessian + hessian.mT).mul_(0.5 / scale)
    scaled.diagonal().add_(ridge)
    return Form(scaled, scale)


@contextmanager
def full_precision() -> Iterator[None]:
    """Within this context products of float32 are no TF32, and bfloat16 ones are summed in float32, whatever is allowed."""
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), matmul.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        matmul.allow_bf16_reduced_precision_reduction = before[1]


@contextmanager
def fitting_threads(weight: Tensor) -> Iterator[None]:
    """Within this context a small weight on the CPU is worked on by one thread, whose result depends on no thread count."""
    before = torch.get_num_threads()
    if weight.device.type == "cpu" and weight.numel() <= _ONE_THREAD:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
