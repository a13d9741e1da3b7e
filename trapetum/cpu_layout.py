"""The layout of codes that `kernels/codebook_gemv.c` reads and draws in its header.

4-bit weights have the fast layout. 2- and 3-bit weights are widened to nibbles when packed: the results are right,
the memory read and the speed are those of 4 bits. 8-bit weights are plain row-major bytes.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

BITS = (2, 3, 4, 8)
_ROWS, _BLOCK, _PANEL = 4, 128, 32  # rows of a tile, inputs of a block, blocks of a panel


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `n`."""
    return -(-n // multiple) * multiple


def check_bits(bits: int) -> None:
    """Raise ValueError if there is no layout for so many bits."""
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; the CPU kernel has layouts for {', '.join(map(str, BITS))} bits.")


@functools.cache
def packed_bytes(out_features: int, in_features: int, bits: int) -> int:
    """Bytes of the packed codes: rows padded to 4 and inputs to 128 below 8 bits, no padding at 8."""
    if bits == 8:
        return out_features * in_features
    return round_up(out_features, _ROWS) * round_up(in_features, _BLOCK) // 2


def _panels(in_features: int) -> Iterator[tuple[int, int]]:
    """First block and one-past-last block of each panel."""
    blocks = round_up(in_features, _BLOCK) // _BLOCK
    return ((first, min(first + _PANEL, blocks)) for first in range(0, blocks, _PANEL))


def tile_rows(in_features: int, bits: int) -> int | None:
    """Rows after which the packed codes start afresh, so that the codes of layers with so many rows (or a multiple) can be
    put in a row; None where several panels, which are the outermost dimension, prevent it."""
    if bits == 8:
        return 1
    return _ROWS if in_features <= _PANEL * _BLOCK else None


def pack(indices: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Arrange codes for the kernel; the layout is drawn in `kernels/codebook_gemv.c`.

    Args:
        indices: uint8 [out_features, in_features], each below 2**bits.
        bits: 2, 3 (both widened to nibbles: right results, no speed gain), 4 or 8.

    Returns:
        uint8 [packed_bytes(out_features, in_features, bits)].

    Raises:
        ValueError: wrong dtype, shape or bits, or a code out of range.
    """
    check_bits(bits)
    if indices.dtype is not torch.uint8 or indices.dim() != 2 or 0 in indices.shape:
        raise ValueError(
            f"indices must be a non-empty uint8 [out_features, in_features]; "
            f"they are {indices.dtype} {list(indices.shape)}."
        )
    if int(indices.max()) >= 2**bits:
        raise ValueError(f"a code is {int(indices.max())}, but {bits}-bit codes end at {2**bits - 1}.")
    if bits == 8:
        return indices.contiguous().view(-1)
    rows, inputs = indices.shape
    padding = (0, round_up(inputs, _BLOCK) - inputs, 0, round_up(rows, _ROWS) - rows)
    nibbles = F.pad(indices, padding).view(-1, _ROWS, -(-inputs // _BLOCK), 4, 2, 16)
    lanes = nibbles[..., 0, :] | nibbles[..., 1, :] << 4  # [tile, row, block, byte of the lane, lane]
    groups = lanes.permute(0, 2, 1, 4, 3)
    return torch.cat([groups[:, first:last].reshape(-1) for first, last in _panels(inputs)])


def unpack(packed: torch.Tensor, out_features: int, in_features: int, bits: int = 4) -> torch.Tensor:
    """The codes that `pack` was given.

    Args:
        packed: uint8 [packed_bytes(out_features, in_features, bits)].

    Returns:
        uint8 [out_features, in_features].

    Raises:
        ValueError: wrong bits, or `packed` does not have the size that these features need.
    """
    check_packed(packed, out_features, in_features, bits)
    if bits == 8:
        return packed.view(out_features, in_features)
    tiles = round_up(out_features, _ROWS) // _ROWS
    sizes = [tiles * (last - first) * _ROWS * _BLOCK // 2 for first, last in _panels(in_features)]
    parts = [part.view(tiles, -1, _ROWS, 16, 4) for part in packed.split(sizes)]
    lanes = torch.cat(parts, dim=1).permute(0, 2, 1, 4, 3)
    nibbles = torch.stack((lanes & 15, lanes >> 4), dim=4)
    return nibbles.reshape(tiles * _ROWS, -1)[:out_features, :in_features].contiguous()


def check_packed(packed: torch.Tensor, out_features: int, in_features: int, bits: int) -> None:
    """Raise ValueError if `packed` is not the uint8 CPU tensor that such a weight has."""
    check_bits(bits)
    need = packed_bytes(out_features, in_features, bits)
    if packed.dtype is not torch.uint8 or packed.numel() != need or not packed.is_cpu:
        raise ValueError(
            f"packed codes of a {bits}-bit [{out_features}, {in_features}] weight must be {need} uint8 on the CPU; "
            f"they are {packed.numel()} {packed.dtype} on {packed.device}."
        )
