"""Attention of the CUDA decode step: one launch of `kernels/decode_attention.cu`, and its float64 twin."""

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trapetum.cuda import room_of
from trapetum.kv_cache import KvCache
from trapetum.launch import integer, kernel, pointer

SOURCE = "decode_attention.cu"
HEAD_DIMS = (32, 64, 128)
MOST_QUERIES = 16  # of a key head and step: two tensor-core operands
MOST_SPLITS = 32
_STATS = 2
_WARPS_A_MULTIPROCESSOR = 8
_DTYPE_CODE = {torch.float16: 0, torch.bfloat16: 1}


def why_not(head_dim: int, group: int, rows: int, dtype: torch.dtype, capability=(9, 0)) -> str:
    """Why the kernel cannot do these sizes, as one sentence; empty when it can."""
    if head_dim not in HEAD_DIMS:
        return (
            f"its attention kernel has head dimensions of {', '.join(map(str, HEAD_DIMS))}, not {head_dim}."
        )
    if group * rows > MOST_QUERIES:
        most = MOST_QUERIES // group
        return (
            f"its attention kernel takes {MOST_QUERIES} queries of a key head a step, and {group} query heads a key head at "
            f"{rows} rows are {group * rows}; use at most {most} rows."
            if most
            else f"its attention kernel takes {MOST_QUERIES} query heads a key head, not {group}."
        )
    if dtype not in _DTYPE_CODE:
        return f"its attention kernel works in float16 or bfloat16, not {dtype}; load the model with dtype='fp16'."
    if dtype == torch.bfloat16 and capability < (8, 0):
        return "bfloat16 needs compute capability 8.0; load the model with dtype='fp16'."
    return ""


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention: query heads, key heads, width of a head, factor on the scores."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    @property
    def row(self) -> int:
        """Width of a row of q+k+v."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


class Attention:
    """Launches attention for one model, with the scratch that its layers share.

    Args:
        heads: sizes.
        rows: tokens a step.
        dtype: of activations, fp16 or bf16.
        device: index of the GPU.
        warps: a block.
        stages: pieces that a warp has on their way.
        splits: blocks of a key head at most; None for as many as the device holds of all heads at once.
    """

    def __init__(
        self,
        heads: Heads,
        rows: int,
        dtype: torch.dtype,
        device: int,
        warps: int = 4,
        stages: int = 2,
        splits: int | None = None,
    ):
        problem = why_not(heads.head_dim, heads.group, rows, dtype, torch.cuda.get_device_capability(device))
        if problem:
            raise ValueError(problem)
        self.heads, self.rows, self.warps, self.stages = heads, rows, warps, stages
        if self.shared_bytes(4) + 64 > room_of(device).a_block:
            self.stages = 1
        # All blocks at once, none in a second turn.
        wanted = _WARPS_A_MULTIPROCESSOR // warps * room_of(device).sms // heads.kv_heads
        self.splits = splits or min(MOST_SPLITS, max(1, wanted))
        slots = heads.group * rows * (heads.head_dim + _STATS)
        self.partial = torch.zeros(
            heads.kv_heads, self.splits, slots, dtype=torch.float32, device=f"cuda:{device}"
        )
        self.arrived = torch.zeros(heads.kv_heads, dtype=torch.int32, device=f"cuda:{device}")
        self._defines = (
            f"XTYPE={_DTYPE_CODE[dtype]}",
            f"HEAD_DIM={heads.head_dim}",
            f"GROUP={heads.group}",
            f"ROWS={rows}",
            f"WARPS={warps}",
            f"STAGES={self.stages}",
        )

    def shared_bytes(self, bits: int) -> int:
        """Dynamic shared memory of a block for a cache of so many bits."""
        dim = self.heads.head_dim
        slot = 64 * dim + (0 if bits == 16 else 4 * dim + 64 * (16 // bits))
        return self.warps * self.stages * slot

    def __call__(
        self,
        qkv: Tensor,
        cache: KvCache,
        position: Tensor,
        cos: Tensor,
        sin: Tensor,
        out: Tensor,
        pdl: bool = False,
    ) -> None:
        """Turn, store and attend.

        Args:
            qkv: [rows, (heads + 2 kv_heads) * head_dim], contiguous.
            cache: of this layer, written at `position` and on.
            position: int64 [1], cache slot of row 0. With `pdl` it must have been written before the kernel before this
                one began.
            cos, sin: [at least cache.context, head_dim] in qkv's dtype; the sine is negative in its first half.
            out: [rows, heads * head_dim], written.
            pdl: let this launch overlap the kernel before it.
        """
        sizes, device = self.heads, qkv.get_device()
        function = kernel(SOURCE, "decode_attention", (f"KV={cache.bits}", *self._defines), device)
        pointers = (qkv, cos, sin, position, cache.keys, cache.values, cache.key_codes, cache.value_codes)
        pointers += (cache.key_params, cache.value_params, out, self.partial, self.arrived)
        arguments = [pointer(t) for t in pointers]
        numbers = (sizes.heads, sizes.kv_heads, cache.places, cache.context, self.splits)
        arguments += [integer(v) for v in numbers]
        arguments += [(sizes.scale * math.log2(math.e), ctypes.c_float)]
        grid = (self.splits + (cache.bits < 16), sizes.kv_heads, 1)
        function.launch(grid, (32, self.warps, 1), self.shared_bytes(cache.bits), arguments, pdl)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rope on [..., head_dim] in the dtype of `heads`, rounded as transformers does; `sin` negative in its first half."""
    return heads * cos + heads.roll(heads.shape[-1] // 2, -1) * sin


def reference_attention(
    qkv: Tensor, sizes: Heads, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, position: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float64 for a cache that is given as what attention sees of it.

    Args:
        qkv: [rows, (heads + 2 kv_heads) * head_dim].
        sizes: of the heads.
        keys, values: [kv_heads, position, head_dim], the positions before this step.
        cos, sin: as for `Attention`.
        position: of row 0.

    Returns:
        out [rows, heads * head_dim] in float64, and this step's keys and values [kv_heads, rows, head_dim].
    """
    rows, kv_heads = len(qkv), sizes.kv_heads
    q, k, v = qkv.view(rows, -1, sizes.head_dim).split([sizes.heads, kv_heads, kv_heads], 1)
    at = slice(position, position + rows)
    q, k = (rotate(part, cos[at, None], sin[at, None]) for part in (q, k))
    fresh_keys, fresh_values = k.transpose(0, 1), v.transpose(0, 1)
    keys = torch.cat([keys.double(), fresh_keys.double()], 1).repeat_interleave(sizes.group, 0)
    values = torch.cat([values.double(), fresh_values.double()], 1).repeat_interleave(sizes.group, 0)
    scores = torch.einsum("rhd,hpd->hrp", q.double(), keys) * sizes.scale
    places = torch.arange(keys.shape[1], device=qkv.device)
    seen = places <= position + torch.arange(rows, device=qkv.device).unsqueeze(1)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("hrp,hpd->rhd", weights, values).reshape(rows, -1), fresh_keys, fresh_values
