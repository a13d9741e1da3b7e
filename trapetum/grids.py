"""Uniform grids: values at equal distances, per channel, per clipped channel, per group of inputs."""

from typing import NamedTuple

import torch
from torch import Tensor

from trapetum.quadratic import full_precision

#: Shares of a row's range that a clipped grid tries, the whole range first.
CLIP_RATIOS = tuple(1 - step / 20 for step in range(12))
_GROUP_HEADER_BITS = 32  # fp16 scale and fp16 zero point


def uniform(low: Tensor, high: Tensor, n_codes: int) -> Tensor:
    """n_codes values at equal distances from low to high.

    Args:
        low, high: float32 [..., 1].

    Returns:
        float32 [..., n_codes], rising where low <= high.
    """
    share = torch.arange(n_codes, dtype=torch.float32, device=low.device) / max(1, n_codes - 1)
    return low * (1 - share) + high * share


def row_uniform(weight: Tensor, n_codes: int, clip: float = 1.0) -> Tensor:
    """A uniform grid over each row's range, both ends moved towards zero by the factor `clip`.

    Args:
        weight: float32 [rows, in].

    Returns:
        float32 [rows, n_codes], rising.
    """
    return uniform(clip * weight.amin(1, keepdim=True), clip * weight.amax(1, keepdim=True), n_codes)


def _snapped(weight: Tensor, grid: Tensor) -> Tensor:
    middle = ((grid[:, 1:] + grid[:, :-1]) / 2).contiguous()
    return grid.gather(1, torch.searchsorted(middle, weight.contiguous()))


def _output_error(weight: Tensor, grid: Tensor, hessian: Tensor) -> Tensor:
    difference = _snapped(weight, grid) - weight
    return ((difference @ hessian).double() * difference).sum(1)


def clipped(weight: Tensor, n_codes: int, hessian: Tensor) -> Tensor:
    """The uniform grid of each row whose clip ratio has the least output error.

    Args:
        weight: float32 [rows, in].
        n_codes: values a row.
        hessian: float32 [in, in] of the layer's inputs.

    Returns:
        float32 [rows, n_codes], rising, as float16 stores it.

    Source: the clip search of Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv:2306.00978; here per
        row on the quadratic form (w' - w)^T H (w' - w).
    """
    tried = [row_uniform(weight, n_codes, ratio).half().float() for ratio in CLIP_RATIOS]
    with full_precision():
        errors = torch.stack([_output_error(weight, grid, hessian) for grid in tried])
    best = errors.argmin(0)
    return torch.stack(tried)[best, torch.arange(len(weight), device=weight.device)]


class GroupedWeight(NamedTuple):
    """A weight after rounding in groups.

    Attributes:
        weight: float32 [rows, in], the values that decoding would give.
        bits_per_weight: codes, scales and zero points together.
    """

    weight: Tensor
    bits_per_weight: float


def group_rtn(weight: Tensor, bits: int, group: int = 128) -> GroupedWeight:
    """Round to nearest with a scale and a zero point for each group of inputs of each row.

    It is measured beside the codebooks; their format, one codebook a channel, cannot store it.

    Args:
        weight: floating [rows, in], finite.
        bits: per code, 1 to 8.
        group: consecutive inputs that share a float16 step and a float16 lowest value; the last group may be shorter.

    Raises:
        ValueError: bits or group out of range, or no matrix.
    """
    if not 1 <= bits <= 8 or group < 1 or weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"rounding in groups takes a matrix, 1 to 8 bits and groups of 1 or more inputs, not "
            f"{list(weight.shape)}, {bits} bits, groups of {group}."
        )
    weight = weight.detach().float()
    parts = [_round_group(part, 2**bits - 1) for part in weight.split(group, dim=1)]
    overhead = _GROUP_HEADER_BITS * len(parts) / weight.shape[1]
    return GroupedWeight(torch.cat(parts, 1), bits + overhead)


def _round_group(part: Tensor, largest: int) -> Tensor:
    low = part.amin(1, keepdim=True).half().float()
    step = ((part.amax(1, keepdim=True) - low) / largest).half().float()
    codes = torch.where(step > 0, (part - low) / step, 0.0).round().clamp(0, largest)
    return low + step * codes
