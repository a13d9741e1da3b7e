"""The layout of codes that `kernels/codebook_gemv.c` reads and draws in its header.

4-, 3- and 2-bit codes are stored in 4, 3 and 2 bits, in blocks of 128, 512 and 256 inputs. 8-bit codes are plain
row-major bytes.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

BITS = (2, 3, 4, 8)
_ROWS, _PANEL_INPUTS = 4, 4096  # rows of a tile, inputs of a panel
_BLOCK_INPUTS = {4: 128, 3: 512, 2: 256}
_COLUMN = {4: 2, 3: 8, 2: 4}  # codes in a byte column of a block; three bytes make the column at 3 bits


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `n`."""
    return -(-n // multiple) * multiple


def check_bits(bits: int) -> None:
    """Raise ValueError if there is no layout for so many bits."""
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; the CPU kernel has layouts for {', '.join(map(str, BITS))} bits.")


@functools.cache
def packed_bytes(out_features: int, in_features: int, bits: int) -> int:
    """Bytes of the packed codes: below 8 bits rows are padded to 4 and inputs to 128 (4 bits), 512 (3) or 256 (2)."""
    if bits == 8:
        return out_features * in_features
    return round_up(out_features, _ROWS) * round_up(in_features, _BLOCK_INPUTS[bits]) * bits // 8


def _panels(in_features: int, bits: int) -> Iterator[tuple[int, int]]:
    """First block and one-past-last block of each panel."""
    blocks = round_up(in_features, _BLOCK_INPUTS[bits]) // _BLOCK_INPUTS[bits]
    panel = _PANEL_INPUTS // _BLOCK_INPUTS[bits]
    return ((first, min(first + panel, blocks)) for first in range(0, blocks, panel))


def tile_rows(in_features: int, bits: int) -> int | None:
    """Rows after which the packed codes start afresh, so that the codes of layers with so many rows (or a multiple) can be
    put in a row; None where several panels, which are the outermost dimension, prevent it."""
    if bits == 8:
        return 1
    return _ROWS if in_features <= _PANEL_INPUTS else None


def pack(indices: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Arrange codes for the kernel; the layout is drawn in `kernels/codebook_gemv.c`.

    Args:
        indices: uint8 [out_features, in_features], each below 2**bits.
        bits: 2, 3, 4 or 8.

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
    block = _BLOCK_INPUTS[bits]
    padding = (0, round_up(inputs, block) - inputs, 0, round_up(rows, _ROWS) - rows)
    tiles = _to_columns(F.pad(indices, padding), bits)
    groups = _join(tiles, bits).permute(0, 2, 1, 3, 4)  # [tile, block, row, register, byte column]
    return torch.cat([groups[:, first:last].reshape(-1) for first, last in _panels(inputs, bits)])


def _to_columns(indices: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, inputs] to [tile, row of the tile, block, byte column, code of the column]."""
    steps, per_column = _BLOCK_INPUTS[bits] // 128, _COLUMN[bits]
    rows, inputs = indices.shape
    words = indices.view(rows // _ROWS, _ROWS, inputs // (128 * steps), steps, 2, 4, 16)  # step, s, j, lane
    lanes = words.permute(0, 1, 2, 6, 4, 3, 5)  # lane, s, then the codes of a word in order
    return lanes.reshape(*words.shape[:3], 64, per_column)


def _from_columns(columns: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo `_to_columns`."""
    steps, (tiles, _, blocks) = _BLOCK_INPUTS[bits] // 128, columns.shape[:3]
    words = columns.reshape(tiles, _ROWS, blocks, 16, 2, steps, 4).permute(0, 1, 2, 5, 4, 6, 3)
    return words.reshape(tiles * _ROWS, blocks * 128 * steps)


def _join(columns: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., byte column, code] to bytes [..., register, byte column]."""
    c = columns.unbind(-1)
    if bits == 4:
        return (c[0] | c[1] << 4).unsqueeze(-2)
    if bits == 2:
        return (c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6).unsqueeze(-2)
    last = c[6] | c[7] << 3  # C holds its bits 0 and 1, B 2 and 3, A 4 and 5
    tops = (last >> 4, last >> 2 & 3, last & 3)
    return torch.stack([c[2 * k] | c[2 * k + 1] << 3 | tops[k] << 6 for k in range(3)], -2)


def _split(registers: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo `_join`."""
    r = registers.unbind(-2)
    if bits != 3:
        return torch.stack([r[0] >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], -1)
    pairs = [register >> shift & 7 for register in r for shift in (0, 3)]
    last = r[0] >> 6 << 4 | r[1] >> 6 << 2 | r[2] >> 6
    return torch.stack((*pairs, last & 7, last >> 3), -1)


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
    tiles, block_bytes = round_up(out_features, _ROWS) // _ROWS, _BLOCK_INPUTS[bits] * bits // 8
    sizes = [tiles * (last - first) * _ROWS * block_bytes for first, last in _panels(in_features, bits)]
    parts = [part.view(tiles, -1, _ROWS, block_bytes // 64, 64) for part in packed.split(sizes)]
    registers = torch.cat(parts, dim=1).permute(0, 2, 1, 3, 4)
    indices = _from_columns(_split(registers, bits), bits)
    return indices[:out_features, :in_features].contiguous()


def check_packed(packed: torch.Tensor, out_features: int, in_features: int, bits: int) -> None:
    """Raise ValueError if `packed` is not the uint8 CPU tensor that such a weight has."""
    check_bits(bits)
    need = packed_bytes(out_features, in_features, bits)
    if packed.dtype is not torch.uint8 or packed.numel() != need or not packed.is_cpu:
        raise ValueError(
            f"packed codes of a {bits}-bit [{out_features}, {in_features}] weight must be {need} uint8 on the CPU; "
            f"they are {packed.numel()} {packed.dtype} on {packed.device}."
        )
