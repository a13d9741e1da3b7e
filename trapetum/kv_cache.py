"""The cache of the CUDA decode step: 16-bit, or quantized to 8 or 4 bits, in the layout that its attention kernel reads.

Keys are quantized by channel over groups of 64 positions, values by token (Liu et al., KIVI, ICML 2024, arXiv:2402.02750):
keys have channels that lie far out, values do not. The latest positions stay 16-bit until their group is certain.
`kernels/decode_attention.cu` pictures the layouts; what is here in PyTorch is for a prompt and for tests.
"""

import torch
from torch import Tensor

KINDS = {"fp16": 16, "int8": 8, "int4": 4}
QUANTUM = 64  # positions that share a key channel's scale
RING = 128  # positions that stay 16-bit where the cache is quantized
TILE = 16
_PARAMS = torch.float16


def _padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


# --- codes -----------------------------------------------------------------------------------------------------------


def quantize(values: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of `values` between the least and the largest along `dim`, rounded as the kernel does.

    Args:
        values: fp16 or bf16.
        dim: along which a scale and a zero are shared.
        bits: 8 or 4.

    Returns:
        codes (uint8, shaped like `values`), and fp16 scale and zero with `dim` kept at size 1: value = code * scale + zero.
    """
    wide = values.float()
    low, high = wide.amin(dim, keepdim=True), wide.amax(dim, keepdim=True)
    levels = 2**bits - 1
    zero, scale = low.to(_PARAMS), ((high - low) / levels).to(_PARAMS)
    codes = ((wide - zero.float()) / scale.float()).round().clamp(0, levels)
    return torch.where(scale > 0, codes, torch.zeros(())).to(torch.uint8), scale, zero


def _order(share: int, lane: Tensor, mine: Tensor, bits: int) -> Tensor:
    """Place in a tile of element `mine` of the `share` elements that a lane has: vectors of 16 bytes, [vector][lane]."""
    vector = min(share, 128 // bits)
    return (mine // vector * 32 + lane) * vector + mine % vector


def key_places(head_dim: int, bits: int) -> Tensor:
    """Place in a tile of each element of its keys: int64 [16 positions, head_dim]."""
    p, d = torch.arange(TILE).unsqueeze(1), torch.arange(head_dim)
    e = d % 8
    mine = 8 * (d // 32) + (e // 2 + 4 * (e % 2) if bits == 4 else e)
    lane = 4 * (2 * (p // 4) + p % 2) + d % 32 // 8
    share = head_dim // 4
    return _order(share, lane, mine, bits) + p // 2 % 2 * share * 32


def value_places(head_dim: int, bits: int) -> Tensor:
    """Place in a tile of each element of its values: int64 [16 positions, head_dim]."""
    p, d = torch.arange(TILE).unsqueeze(1), torch.arange(head_dim)
    b, e = d % 2, p % 4
    mine = 8 * (d // 16) + (2 * b + e // 2 + 4 * (e % 2) if bits == 4 else 4 * b + e)
    return _order(head_dim // 2, 4 * (d % 16 // 2) + p // 4, mine, bits)


def _to_bytes(codes: Tensor, bits: int) -> Tensor:
    return codes[..., ::2] | codes[..., 1::2] << 4 if bits == 4 else codes


def _from_bytes(packed: Tensor, bits: int) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2) if bits == 4 else packed


def _arranged(values: Tensor, places: Tensor, bits: int) -> Tensor:
    """[heads, n, head_dim], n whole tiles, to [heads, tiles, elements of a tile], two of 4 bits in a byte."""
    tiles = values.unflatten(1, (-1, TILE)).flatten(-2)
    row = torch.empty_like(tiles)
    row[..., places.flatten().to(values.device)] = tiles
    return _to_bytes(row, bits)


def _in_order(stored: Tensor, places: Tensor, bits: int) -> Tensor:
    """Undo `_arranged`."""
    tiles = _from_bytes(stored, bits)[..., places.flatten().to(stored.device)]
    return tiles.unflatten(-1, tuple(places.shape)).flatten(1, 2)


# --- the cache -------------------------------------------------------------------------------------------------------


class KvCache:
    """Keys and values of one decoder layer.

    Args:
        kind: "fp16" (the activations' 16-bit dtype), "int8" or "int4".
        kv_heads, head_dim: key heads and the width of each.
        context: positions; rounded up to whole groups.
        dtype: of the activations, fp16 or bf16.
        device: where it is kept.

    Attributes:
        keys, values: [kv_heads, places / 16, 16 * head_dim]: everything, or a ring of `RING`.
        key_codes, value_codes: uint8 [kv_heads, context / 16, bytes of 16 positions]; None for "fp16".
        key_params: fp16 [kv_heads, context / 64, 2, head_dim] scale and zero; value_params: [kv_heads, context / 4, 2, 4].

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, kind: str, kv_heads: int, head_dim: int, context: int, dtype: torch.dtype, device):
        if kind not in KINDS:
            raise ValueError(f"the cache can be {', '.join(KINDS)}, not {kind!r}.")
        self.bits, self.kv_heads, self.head_dim = KINDS[kind], kv_heads, head_dim
        self.context = _padded(context, TILE if self.bits == 16 else QUANTUM)
        self.places = self.context if self.bits == 16 else RING

        def zeros(*shape, dtype):
            return torch.zeros(kv_heads, *shape, dtype=dtype, device=device)

        self.keys, self.values = (zeros(self.places // TILE, TILE * head_dim, dtype=dtype) for _ in range(2))
        self.key_codes = self.value_codes = self.key_params = self.value_params = None
        if self.bits < 16:
            tile = TILE * head_dim * self.bits // 8
            self.key_codes, self.value_codes = (
                zeros(self.context // TILE, tile, dtype=torch.uint8) for _ in range(2)
            )
            self.key_params = zeros(self.context // QUANTUM, 2, head_dim, dtype=_PARAMS)
            self.value_params = zeros(self.context // 4, 2, 4, dtype=_PARAMS)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        names = ("keys", "values", "key_codes", "value_codes", "key_params", "value_params")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def store(self, keys: Tensor, values: Tensor) -> None:
        """Begin with a prompt's keys (turned by rope) and values: [kv_heads, n, head_dim] each, n >= 1."""
        n = keys.shape[1]
        if self.bits == 16:
            self._store_plain(keys, values, 0)
            return
        whole = n // QUANTUM * QUANTUM
        if whole:
            self._store_codes(keys[:, :whole], values[:, :whole])
        first = max(
            0, whole - QUANTUM
        )  # the step reads the last group in 16 bits while it may be quantizing it
        self._store_plain(keys[:, first:], values[:, first:], first)

    def _store_plain(self, keys: Tensor, values: Tensor, first: int) -> None:
        """From position `first`, a whole tile's, on."""
        room = _padded(keys.shape[1], TILE) - keys.shape[1]
        places = torch.arange(first, first + keys.shape[1] + room, TILE, device=keys.device) // TILE
        for stored, fresh, order in ((self.keys, keys, key_places), (self.values, values, value_places)):
            padded = torch.nn.functional.pad(fresh, (0, 0, 0, room))
            stored[:, places % (self.places // TILE)] = _arranged(padded, order(self.head_dim, 16), 16)

    def _store_codes(self, keys: Tensor, values: Tensor) -> None:
        heads, n, d = keys.shape
        codes, scale, zero = quantize(keys.unflatten(1, (-1, QUANTUM)), 2, self.bits)
        arranged = _arranged(codes.view(heads, n, d), key_places(d, self.bits), self.bits)
        self.key_codes[:, : n // TILE] = arranged
        self.key_params[:, : n // QUANTUM] = torch.cat([scale, zero], 2)
        codes, scale, zero = quantize(values, 2, self.bits)
        self.value_codes[:, : n // TILE] = _arranged(codes, value_places(d, self.bits), self.bits)
        params = torch.stack([scale, zero], 1).view(heads, 2, n // 4, 4)
        self.value_params[:, : n // 4] = params.transpose(1, 2)

    def coded(self, position: int, rows: int = 1) -> int:
        """Positions that a step of `rows` tokens from `position` on reads from their codes."""
        return 0 if self.bits == 16 else max(0, position - rows) // QUANTUM * QUANTUM

    def read(self, length: int, coded: int = 0) -> tuple[Tensor, Tensor]:
        """What attention sees of the first `length` positions: float32 keys and values [kv_heads, length, head_dim].

        Args:
            length: positions.
            coded: how many of them are read from their codes.
        """
        d, tiles = self.head_dim, self.places // TILE
        places = torch.arange(coded // TILE, -(-length // TILE), device=self.keys.device) % tiles
        keys = _in_order(self.keys[:, places], key_places(d, 16), 16)[:, : length - coded].float()
        values = _in_order(self.values[:, places], value_places(d, 16), 16)[:, : length - coded].float()
        if not coded:
            return keys, values
        key_codes = _in_order(self.key_codes[:, : coded // TILE], key_places(d, self.bits), self.bits)
        value_codes = _in_order(self.value_codes[:, : coded // TILE], value_places(d, self.bits), self.bits)
        scale, zero = self.key_params[:, : coded // QUANTUM].float().repeat_interleave(QUANTUM, 1).unbind(2)
        params = self.value_params[:, : coded // 4].float().transpose(1, 2).reshape(-1, 2, coded, 1)
        return (
            torch.cat([key_codes.float() * scale + zero, keys], 1),
            torch.cat([value_codes.float() * params[:, 0] + params[:, 1], values], 1),
        )
