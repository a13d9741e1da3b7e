"""The CUDA side of dense products in a decode step: `kernels/dense_decode.cu`, its launch shapes, and a function for it.

A weight is what nn.Linear holds. The extras (norm, residual, gates) are those of `cuda.gemv`, so that a step in fp16 has
the structure of a step with codebooks.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trapetum.cuda import MAX_ROWS, room_of
from trapetum.gemv_plans import H100, LANES, Room
from trapetum.launch import integer, kernel, pointer

SOURCE = "dense_decode.cu"
STEP = 64  # inputs a step
_DTYPE_CODE = {torch.float16: 0, torch.bfloat16: 1}
_SYSTEM_BYTES = 1024  # that CUDA keeps of every block's shared memory
_PITCH_PAD = 32  # values between staged rows, as in dense_decode.cu
_TENSOR_BF16 = (8, 0)  # the first compute capability whose tensor cores take bf16


# --- launch shapes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A launch shape of `dense_decode`.

    Attributes:
        warps: a block; they split the inputs.
        ahead: steps of 64 inputs that a warp has in flight.
        octets: rows of the weight that a block works on at once, by eights.
        blocks: blocks a multiprocessor in the grid, which stay and take one tile after another.
        fit: blocks whose registers a multiprocessor holds at once; one more than `blocks` leaves the next kernel a place.
        tensor: multiply on tensor cores, else with fp32 FMA.
    """

    warps: int
    ahead: int
    octets: int = 1
    blocks: int = 2
    fit: int = 2
    tensor: bool = True

    @property
    def defines(self) -> tuple[str, ...]:
        """What the source is compiled with."""
        named = {"WARPS": self.warps, "AHEAD": self.ahead, "OCTETS": self.octets, "BLOCKS": self.fit}
        return tuple(f"{name}={value}" for name, value in named.items()) + (f"TENSOR={int(self.tensor)}",)

    def rounds(self, in_features: int) -> int:
        """Turns that all warps take through the inputs."""
        return -(-in_features // (STEP * self.warps * self.ahead))

    def tiles(self, out_features: int, gated: bool) -> int:
        """Tiles of the weight; a gated one holds as many gates as ups."""
        return -(-out_features // (8 * self.octets // (2 if gated else 1)))

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of the weight that a multiprocessor waits for at once."""
        return self.blocks * self.warps * self.ahead * self.octets * 2 * 16 * LANES


def memory(plan: Plan, in_features: int, rows: int, norm: bool, limit: int) -> tuple[int, int]:
    """Rounds whose x a block holds at once (0: not even one fits), and its dynamic shared memory in bytes.

    Args:
        rows: of x.
        norm: whether x is normalised, whose weight is then staged too.
        limit: bytes a block may ask for.
    """
    staged = rows + norm
    sums = 2 * 4 * plan.warps * rows * 8 * plan.octets
    fixed = sums + 4 * rows * (plan.warps + 1) + 2 * staged * _PITCH_PAD
    round_bytes = 2 * staged * plan.warps * plan.ahead * STEP
    panel = min(max(0, limit - fixed) // round_bytes, plan.rounds(in_features))
    return panel, fixed + round_bytes * panel


def fits(plan: Plan, in_features: int, rows: int, norm: bool, room: Room) -> bool:
    """Whether `plan.blocks` blocks, with all of x each, fit a multiprocessor."""
    panel, shared = memory(plan, in_features, rows, norm, room.a_block)
    held = plan.blocks * (shared + _SYSTEM_BYTES) <= room.a_multiprocessor
    return panel == plan.rounds(in_features) and held


def _wanted(in_features: int, rows: int, plain: bool, tensor: bool) -> Iterator[Plan]:
    """Launch shapes that need less and less shared memory; the last fits every device."""
    steps = -(-in_features // STEP)
    if plain:
        yield Plan(8, 1, 1, 2, 1, tensor)
    elif not tensor:
        yield Plan(8, min(2, -(-steps // 8)), 1, 2, 1, False)
    elif steps < 8:
        yield Plan(steps, 1, 1, 4, 4)
    else:
        if rows <= 2:
            yield Plan(8, min(8, -(-steps // 8)), 1, 2, 2)
        fit = 3 if rows <= 4 else 2  # of more rows, 80 registers would spill
        yield Plan(8, min(4, -(-steps // 8)), 1, 2, fit)
        yield Plan(16, min(4, -(-steps // 16)), 1, 1, 1)
    yield (
        Plan(16, 2, 2 if tensor and not plain else 1, 1, 1, tensor) if tensor else Plan(8, 2, 1, 1, 1, False)
    )
    yield Plan(8, 1, 1, 1, 1, tensor)


def plan_for(
    in_features: int,
    out_features: int,
    rows: int = 1,
    norm: bool = False,
    room: Room = H100,
    aligned: bool = True,
    tensor: bool = True,
) -> Plan:
    """The launch shape of a product before any tuning: 64 to 128 KiB in flight a multiprocessor, where x leaves room
    for two blocks.

    Args:
        rows: of x.
        norm: whether x is normalised.
        aligned: whether rows of the weight can be read by 16 bytes.
        tensor: whether tensor cores take the dtype.
    """
    usable = [
        p for p in _wanted(in_features, rows, not aligned, tensor) if fits(p, in_features, rows, norm, room)
    ]
    in_panels = (
        p
        for p in _wanted(in_features, rows, not aligned, tensor)
        if p.blocks == 1 and memory(p, in_features, rows, norm, room.a_block)[0]
    )
    return usable[0] if usable else next(in_panels)


def candidates(
    in_features: int, out_features: int, rows: int = 1, norm: bool = False, room: Room = H100
) -> list[Plan]:
    """Launch shapes worth timing beside the default: 32 to 128 KiB in flight, all of x staged once, no spills."""
    shapes = [Plan(8, a, 1, b, 3) for a in (2, 3, 4) for b in (2, 3)]
    shapes += [Plan(8, a, 1, b, 2) for a in (6, 8) for b in (1, 2)]
    shapes += [Plan(8, a, 2, b, 2) for a in (2, 3, 4) for b in (1, 2)]
    shapes += [Plan(16, 2, 1, b, 2) for b in (1, 2)]
    shapes += [Plan(16, 4, 1, 1, 1), Plan(16, 2, 2, 1, 1), Plan(4, 4, 1, 4, 6), Plan(4, 4, 1, 6, 6)]
    default = plan_for(in_features, out_features, rows, norm, room)
    deep = -(-in_features // STEP)  # more steps in flight than a row has are loads of nothing
    return [
        p
        for p in shapes
        if p != default and p.warps * p.ahead <= 2 * deep and fits(p, in_features, rows, norm, room)
    ]


# --- launch --------------------------------------------------------------------------------------------------------


def _check_weight(x: Tensor, weight: Tensor, gated: bool) -> None:
    if x.dtype not in _DTYPE_CODE or weight.dtype != x.dtype:
        raise TypeError(
            f"a dense product takes float16 or bfloat16 x and a weight of the same dtype, not {x.dtype} and {weight.dtype}."
        )
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_contiguous():
        raise ValueError(
            f"the weight must be a contiguous, non-empty [out_features, in_features], not {list(weight.shape)} with "
            f"strides {list(weight.stride())}."
        )
    if x.dim() not in (1, 2) or x.shape[-1] != weight.shape[1] or not x.is_contiguous():
        raise ValueError(
            f"x must be a contiguous [{weight.shape[1]}] or [rows, {weight.shape[1]}], not {list(x.shape)} with strides "
            f"{list(x.stride())}."
        )
    if not 1 <= x.numel() // x.shape[-1] <= MAX_ROWS:
        raise ValueError(f"one launch multiplies 1 to {MAX_ROWS} rows of x, not {x.numel() // x.shape[-1]}.")
    if gated and weight.shape[0] % 2:
        raise ValueError(f"a gated weight has as many ups as gates, not {weight.shape[0]} rows in all.")


def _check_like(name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor is None:
        return
    if tensor.shape != shape or tensor.dtype != x.dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {x.dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)} with strides "
            f"{list(tensor.stride())}."
        )


def _check_devices(x: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move one to the other's.")
    if x.device.type != "cuda":
        raise ValueError(f"x is on {x.device}, but this product runs on a CUDA device; move it there.")


def _aligned(in_features: int, *tensors: Tensor | None) -> bool:
    """Whether all rows can be read by 16 bytes."""
    return in_features % 8 == 0 and all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    plan: Plan | None = None,
) -> Tensor:
    """y = x @ weight.T + bias + residual in one kernel, sums in fp32.

    Args:
        x: fp16 or bf16 [in_features] or [rows, in_features] with 1 to `MAX_ROWS` rows, contiguous, on a CUDA device.
        weight: [out_features, in_features] in x's dtype, contiguous; [2 * out_features, in_features] when gated. Rows that
            cannot be read by 16 bytes (in_features no multiple of 8) take a slow path.
        bias: one value a row of the weight in x's dtype, or None.
        out: where to write, shaped like the result and in x's dtype; made when None.
        pdl: let this launch overlap the kernel before it. Only where no kernel still running writes `weight` or `norm`, which
            are read before the wait. Ignored below sm_90. The next kernel may start once the one before this has finished.
        residual: what is added to the result, shaped like it and in x's dtype, or None. May be `out`.
        norm: weight [in_features] of an RMS norm that x goes through first, in x's dtype, or None.
        eps: of the norm.
        gated: the weight's rows are gates, then as many ups, and y = silu(gate) * up.
        plan: launch shape; None picks by shape and device.

    Returns:
        [out_features], or [rows, out_features] for a two-dimensional x, in x's dtype.

    Raises:
        TypeError: a dtype that the kernel does not have.
        ValueError: shapes, strides or devices that do not go together, or a plan that does not fit.
    """
    _check_weight(x, weight, gated)
    weight_rows, in_features = weight.shape
    out_features, rows = weight_rows // (2 if gated else 1), x.numel() // in_features
    shape = (*x.shape[:-1], out_features)
    _check_like("bias", bias, (weight_rows,), x)
    _check_like("norm", norm, (in_features,), x)
    _check_like("residual", residual, shape, x)
    _check_like("out", out, shape, x)
    _check_devices(x, weight=weight, bias=bias, residual=residual, norm=norm, out=out)
    device, aligned = x.get_device(), _aligned(in_features, x, weight, norm)
    tensor = x.dtype == torch.float16 or torch.cuda.get_device_capability(device) >= _TENSOR_BF16
    room = room_of(device)
    plan = plan or plan_for(in_features, out_features, rows, norm is not None, room, aligned, tensor)
    plan = replace(plan, tensor=plan.tensor and tensor)
    panel, shared_bytes = memory(plan, in_features, rows, norm is not None, room.a_block)
    if not panel:
        raise ValueError(
            f"{plan} with {rows} rows needs more than the {room.a_block} bytes of shared memory a block has here."
        )
    what = (f"XTYPE={_DTYPE_CODE[x.dtype]}", f"ROWS={rows}", f"GATED={int(gated)}", f"ALIGNED={int(aligned)}")
    function = kernel(SOURCE, "dense_decode", (*what, *plan.defines), device)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    tiles = plan.tiles(out_features, gated)
    arguments = [pointer(t) for t in (weight, x, norm, bias, residual, out)] + [(eps, ctypes.c_float)]
    arguments += [integer(v) for v in (in_features, out_features, tiles, plan.rounds(in_features), panel)]
    grid = (min(tiles, plan.blocks * room.sms), 1, 1)
    function.launch(grid, (LANES, plan.warps, 1), shared_bytes, arguments, pdl)
    return out
