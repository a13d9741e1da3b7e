"""The CUDA side of additive codebooks: packed layout, launch shapes, and the product of one row."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trapetum import cuda
from trapetum.additive import ENTRIES, GROUP, AdditiveWeight, dense_product, require_inputs
from trapetum.gemv_plans import LANES, Room
from trapetum.launch import integer, kernel, pointer

SOURCE = "additive_gemv.cu"
STEP_GROUPS = {2: 8, 4: 4}  # groups of 8 inputs in a lane's 16 bytes, by number of codebooks
_TABLE_AT, _ZERO_BYTES = 2048, 256  # as in additive_gemv.cu
_SYSTEM_BYTES = 1024  # of a block's shared memory that the system takes, from sm_80 on
_MOST_VECTORS = 2**31
_DTYPE_CODE = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


# --- packed layout -------------------------------------------------------------------------------------------------


def steps_for(in_features: int, n_codebooks: int) -> int:
    """How many steps of the packed layout hold `in_features` inputs."""
    return -(-in_features // (GROUP * STEP_GROUPS[n_codebooks]))


def pack(codes: Tensor) -> Tensor:
    """Arrange codes as `additive_gemv.cu` reads them.

    Args:
        codes: uint8 [out_features, groups, 2 or 4], as in `AdditiveWeight`.

    Returns:
        uint8 [ceil(out/32), steps, 32, 16], zero in the padding.
    """
    out_features, groups, n_codebooks = codes.shape
    step = STEP_GROUPS[n_codebooks]
    tiles, steps = -(-out_features // LANES), -(-groups // step)
    padded = torch.zeros(tiles * LANES, steps * step, n_codebooks, dtype=torch.uint8, device=codes.device)
    padded[:out_features, :groups] = codes
    return padded.view(tiles, LANES, steps, step * n_codebooks).transpose(1, 2).contiguous()


def unpack(packed: Tensor, out_features: int, in_features: int, n_codebooks: int) -> Tensor:
    """Undo `pack`: uint8 [out_features, in_features/8, n_codebooks]."""
    rows = packed.transpose(1, 2).reshape(packed.shape[0] * LANES, -1, n_codebooks)
    return rows[:out_features, : in_features // GROUP].contiguous()


# --- launch shapes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A launch shape of `additive_gemv`.

    Attributes:
        warps: a block; they split the inputs.
        ahead: steps that a warp has in flight.
        channels: output channels a warp works on at once, 32 or 64.
        copies: of a codebook in shared memory: 8 is free of conflicts; 4 and 2 take less memory and more reads.
        blocks: that a multiprocessor should hold, where their shared memory fits.
    """

    warps: int
    ahead: int
    channels: int = 32
    copies: int = 8
    blocks: int = 1

    def defines(self, n_codebooks: int, dtype: torch.dtype) -> tuple[str, ...]:
        """What the source is compiled with."""
        names = ("warps", "ahead", "channels", "copies", "blocks")
        return (
            f"CODEBOOKS={n_codebooks}",
            f"XTYPE={_DTYPE_CODE[dtype]}",
            *(f"{name.upper()}={getattr(self, name)}" for name in names),
        )


def shared_bytes_for(plan: Plan, n_codebooks: int, in_features: int) -> int:
    """Dynamic shared memory of one block, in bytes: table, x, and two rounds of the warps' sums."""
    table = n_codebooks * ENTRIES * 2 * GROUP * plan.copies
    x_bytes = steps_for(in_features, n_codebooks) * STEP_GROUPS[n_codebooks] * GROUP * 2
    warps = min(plan.warps, steps_for(in_features, n_codebooks))
    return _TABLE_AT + table + _ZERO_BYTES + x_bytes + 2 * 4 * warps * plan.channels


def _copies(n_codebooks: int) -> tuple[int, ...]:
    """The numbers of copies that the kernel has, most first: an entry of the table is 256 or 128 bytes."""
    return tuple(n for n in (8, 4, 2) if n * n_codebooks >= 8)


def fitting(plan: Plan, n_codebooks: int, in_features: int, room: Room) -> Plan | None:
    """`plan` with as many copies, of those it asks for, as a block's shared memory holds; None if none fits."""
    for copies in _copies(n_codebooks):
        smaller = replace(plan, copies=min(copies, plan.copies))
        if shared_bytes_for(smaller, n_codebooks, in_features) <= room.a_block:
            return smaller
    return None


def resident(plan: Plan, n_codebooks: int, in_features: int, room: Room) -> int:
    """How many of the plan's blocks a multiprocessor can hold, by shared memory, up to `plan.blocks`."""
    one = shared_bytes_for(plan, n_codebooks, in_features) + _SYSTEM_BYTES
    return max(1, min(plan.blocks, room.a_multiprocessor // one))


def plan_for(out_features: int, in_features: int, n_codebooks: int, room: Room) -> Plan | None:
    """The launch shape for a matrix on a device, or None where its x does not fit beside the smallest table.

    Tiles of 64 channels load x once for two channels of a lane; they are taken where they do not leave multiprocessors idle
    in the last turn that 32 would fill.
    """
    turns = {channels: channels * -(-out_features // (channels * room.sms)) for channels in (32, 64)}
    return fitting(Plan(16, 2, channels=64 if turns[64] <= turns[32] else 32), n_codebooks, in_features, room)


def candidates(n_codebooks: int) -> tuple[Plan, ...]:
    """Launch shapes worth timing; none of them spills registers."""
    one_block = (Plan(32, 1), Plan(32, 2), Plan(16, 2), Plan(16, 3), Plan(16, 2, channels=64))
    several = (Plan(16, 2, blocks=2), Plan(8, 3, blocks=3), Plan(8, 2, channels=64, blocks=2))
    return one_block if n_codebooks == 4 else one_block + several


def fits(weight: AdditiveWeight, room: Room) -> bool:
    """Whether the kernel can multiply with this weight on a device with this `Room`."""
    return plan_for(weight.out_features, weight.in_features, weight.n_codebooks, room) is not None


# --- products ------------------------------------------------------------------------------------------------------


def _require_plan(plan: Plan | None, n_codebooks: int, in_features: int, room: Room) -> None:
    if plan is None:
        raise ValueError(
            f"{in_features} inputs and {n_codebooks} codebooks do not fit in the {room.a_block} bytes of shared memory "
            "that a block may have here; use `multiply`, which takes the dense path then."
        )
    needed = shared_bytes_for(plan, n_codebooks, in_features)
    if needed > room.a_block:
        raise ValueError(
            f"{plan} needs {needed} bytes of shared memory for {in_features} inputs and {n_codebooks} codebooks, and a "
            f"block may have {room.a_block} here; choose fewer copies."
        )


def _require_like(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device) -> None:
    if (
        tensor.dtype != dtype
        or tuple(tensor.shape) != shape
        or tensor.device != device
        or not tensor.is_contiguous()
    ):
        raise ValueError(
            f"{name} must be a contiguous {dtype} {list(shape)} on {device}, not {tensor.dtype} {list(tensor.shape)} on "
            f"{tensor.device}{'' if tensor.is_contiguous() else ', not contiguous'}."
        )


def _require_operands(x, packed, codebooks, scales, bias, out) -> None:
    in_features, out_features, n_codebooks = x.numel(), scales.numel(), len(codebooks)
    require_inputs(x, in_features)
    if n_codebooks not in STEP_GROUPS or in_features % GROUP:
        raise ValueError(
            f"x has {in_features} inputs and there are {n_codebooks} codebooks; the kernel takes multiples of {GROUP} "
            "inputs and 2 or 4 codebooks."
        )
    vectors = (-(-out_features // LANES), steps_for(in_features, n_codebooks), LANES)
    if vectors[0] * vectors[1] * LANES >= _MOST_VECTORS:
        raise ValueError(
            f"{out_features} x {in_features} weights are too many for one launch; split the matrix by outputs."
        )
    _require_like("the packed codes", packed, (*vectors, 16), torch.uint8, x.device)
    _require_like("the codebooks", codebooks, (n_codebooks, ENTRIES, GROUP), torch.float16, x.device)
    _require_like("the scales", scales, (out_features,), torch.float16, x.device)
    _require_like("x", x, tuple(x.shape), x.dtype, x.device)
    for name, tensor in (("the bias", bias), ("out", out)):
        if tensor is not None:
            _require_like(name, tensor, (out_features,), x.dtype, x.device)


def gemv(
    x: Tensor,
    packed: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
    plan: Plan | None = None,
) -> Tensor:
    """y = W x + bias by the kernel, one row of x.

    fp16 activations are taken as they are; bf16 and fp32 are rounded to fp16 after a scale that brings their largest
    into [1, 2).

    Args:
        x: fp16, bf16 or fp32 [in_features], contiguous, on a CUDA device.
        packed: uint8, as `pack` made it.
        codebooks: fp16 [2 or 4, 256, 8].
        scales: fp16 [out_features].
        bias: [out_features] in x's dtype, or None.
        out: where to write, [out_features] in x's dtype; made when None.
        pdl: let this launch overlap the kernel before it. Only where no kernel before it in the stream writes anything but
            `x` and `out`, since the rest is read before the wait. Ignored below sm_90.
        plan: launch shape; None picks by shape and device.

    Returns:
        [out_features] in x's dtype.

    Raises:
        ValueError, TypeError: operands do not fit each other, or not the device's shared memory.
    """
    _require_operands(x, packed, codebooks, scales, bias, out)
    in_features, out_features, n_codebooks = x.numel(), scales.numel(), len(codebooks)
    device, steps = x.get_device(), packed.shape[1]
    room = cuda.room_of(device)
    plan = plan or plan_for(out_features, in_features, n_codebooks, room)
    _require_plan(plan, n_codebooks, in_features, room)
    function = kernel(SOURCE, "additive_gemv", plan.defines(n_codebooks, x.dtype), device)
    if out is None:
        out = torch.empty(out_features, dtype=x.dtype, device=x.device)
    arguments = [pointer(t) for t in (packed, codebooks, scales, x, bias, out)]
    arguments += [integer(v) for v in (in_features, out_features, steps)]
    items = -(-out_features // plan.channels)
    blocks = min(items, room.sms * resident(plan, n_codebooks, in_features, room))
    shared_bytes = shared_bytes_for(plan, n_codebooks, in_features)
    function.launch((blocks, 1, 1), (LANES, min(plan.warps, steps), 1), shared_bytes, arguments, pdl)
    return out


def multiply(x: Tensor, weight: AdditiveWeight, packed: Tensor | None = None) -> Tensor:
    """x @ W^T + bias: the kernel for one row on a GPU that can, else `dense_product`.

    Args:
        x: [..., in_features] in fp16, bf16 or fp32, on the weight's device.
        weight: what to multiply with.
        packed: `pack(weight.codes)`, kept between calls; None packs anew.

    Returns:
        [..., out_features] in x's dtype.

    Raises:
        ValueError, TypeError: x does not fit the weight.
    """
    require_inputs(x, weight.in_features)
    one_row = x.numel() == weight.in_features
    if not (one_row and x.is_cuda and cuda.available() and fits(weight, cuda.room_of(x.get_device()))):
        return dense_product(x, weight)
    packed = pack(weight.codes) if packed is None else packed
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    y = gemv(x.reshape(-1).contiguous(), packed, weight.codebooks, weight.scales, bias)
    return y.view(*x.shape[:-1], -1)
