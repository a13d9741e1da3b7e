"""The CUDA side of the codebook kernels: their packed layout, their launch shapes, and a function for each."""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch

from trapetum.launch import integer, kernel, pointer

SOURCE = "codebook_gemv.cu"
DEQUANTIZE_SOURCE = "codebook_dequantize.cu"
READ_SOURCE = "read_bandwidth.cu"

LANES = 32
STEP = {8: 16, 4: 32, 3: 128, 2: 64}  # inputs a step; the layout is pictured in kernels/codebook_gemv.cu
TABLE_BYTES = {8: 256 * 128, 4: 256 * 128, 3: 64 * 128, 2: 16 * 128}
_DTYPE_CODE = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_MINIMUM_CAPABILITY = (7, 5)


def why_not() -> str:
    """Why CUDA kernels cannot run here, as one sentence; empty when they can."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return "PyTorch finds no CUDA device." if built else "this PyTorch is a build without CUDA."
    capability = torch.cuda.get_device_capability()
    if capability < _MINIMUM_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}; "
            "the kernels need 7.5 or newer."
        )
    try:
        import cupy  # noqa: F401
        from cuda.bindings import driver, nvrtc  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed; install it with `pip install 'trapetum[gpu]'`."
    return ""


@cache
def available() -> bool:
    """Whether the CUDA kernels can run: a device of capability 7.5 or newer, CuPy and cuda-bindings."""
    return not why_not()


# --- packed layout -------------------------------------------------------------------------------------------------


def steps_for(in_features: int, bits: int) -> int:
    """How many steps of the packed layout hold `in_features` inputs."""
    return -(-in_features // STEP[bits])


def _tiles(indices: torch.Tensor, bits: int) -> torch.Tensor:
    """[out, in] -> zero-padded [tiles, steps, 32 lanes, STEP] of int32."""
    out_features, in_features = indices.shape
    step, steps = STEP[bits], steps_for(in_features, bits)
    rows = -(-out_features // LANES) * LANES
    padded = torch.zeros(rows, steps * step, dtype=torch.uint8, device=indices.device)
    padded[:out_features, :in_features] = indices
    return padded.view(rows // LANES, LANES, steps, step).permute(0, 2, 1, 3)


def _pack_bytes(tiles: torch.Tensor, bits: int) -> torch.Tensor:
    per_byte = 8 // bits
    fields = tiles.reshape(*tiles.shape[:3], 16, per_byte)
    packed = torch.zeros(fields.shape[:-1], dtype=torch.uint8, device=tiles.device)
    for k in range(per_byte):
        packed |= fields[..., k] << (bits * k)
    return packed.unsqueeze(2)


def _pack_three(tiles: torch.Tensor) -> torch.Tensor:
    fields = tiles.reshape(*tiles.shape[:3], 4, 16, 2).to(torch.int32)
    pairs = fields[..., 0] | fields[..., 1] << 3  # [tiles, steps, lanes, 4 groups, 16 pairs] of 6 bits
    words = torch.zeros(*pairs.shape[:4], 3, dtype=torch.int32, device=tiles.device)
    for k in range(15):
        words[..., k // 5] |= pairs[..., k] << (6 * (k % 5))
    for w in range(3):
        words[..., w] |= (pairs[..., 15] >> (2 * w) & 3) << 30
    vectors = words.reshape(*words.shape[:3], 3, 4).permute(0, 1, 3, 2, 4).contiguous()
    return vectors.view(torch.uint8)


def pack(indices: torch.Tensor, bits: int) -> torch.Tensor:
    """Arrange indices as `codebook_gemv.cu` reads them.

    Args:
        indices: uint8 [out_features, in_features], each below 2**bits.
        bits: 8, 4, 3 or 2.

    Returns:
        uint8 [ceil(out/32), steps, vectors, 32, 16], zero in the padding.
    """
    tiles = _tiles(indices, bits)
    return (_pack_three(tiles) if bits == 3 else _pack_bytes(tiles, bits)).contiguous()


def _unpack_three(packed: torch.Tensor) -> torch.Tensor:
    tiles, steps = packed.shape[:2]
    words = packed.contiguous().view(torch.int32).permute(0, 1, 3, 2, 4).reshape(tiles, steps, LANES, 4, 3)
    pairs = [words[..., k // 5] >> (6 * (k % 5)) & 63 for k in range(15)]
    upper = [words[..., w] >> 30 & 3 for w in range(3)]
    pairs.append(upper[0] | upper[1] << 2 | upper[2] << 4)
    fields = torch.stack(pairs, -1)
    return torch.stack([fields & 7, fields >> 3 & 7], -1).to(torch.uint8).reshape(tiles, steps, LANES, 128)


def unpack(packed: torch.Tensor, out_features: int, in_features: int, bits: int) -> torch.Tensor:
    """Undo `pack`: uint8 [out_features, in_features]."""
    if bits == 3:
        tiles = _unpack_three(packed)
    else:
        fields = [packed >> (bits * k) & (2**bits - 1) for k in range(8 // bits)]
        tiles = torch.stack(fields, -1).reshape(*packed.shape[:2], LANES, STEP[bits])
    rows = tiles.permute(0, 2, 1, 3).reshape(packed.shape[0] * LANES, -1)
    return rows[:out_features, :in_features].contiguous()


# --- launches ------------------------------------------------------------------------------------------------------


@cache
def _limits(device: int) -> tuple[int, int]:
    """Multiprocessors, and the most dynamic shared memory a block may ask for, in bytes."""
    properties = torch.cuda.get_device_properties(device)
    optin = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
    return properties.multi_processor_count, optin - 4096  # the kernel's own static shared memory


def shared_bytes_for(in_features: int, bits: int) -> int:
    """Dynamic shared memory of one `codebook_gemv` block, in bytes.

    The pair table lies at a multiple of its size, and x in front of it where it fits, else behind it.
    """
    x_bytes, table_bytes = 2 * steps_for(in_features, bits) * STEP[bits], TABLE_BYTES[bits]
    return 2 * table_bytes + (0 if x_bytes <= table_bytes - 6144 else x_bytes)


def fits(in_features: int, bits: int, device: int = 0) -> bool:
    """Whether x of `in_features` and the table fit one block's shared memory on this device."""
    return shared_bytes_for(in_features, bits) <= _limits(device)[1]


@dataclass(frozen=True)
class Plan:
    """A launch shape of `codebook_gemv`: warps a block, and steps a warp has in flight."""

    warps: int
    ahead: int

    @property
    def defines(self) -> tuple[str, str]:
        """What the source is compiled with."""
        return f"WARPS={self.warps}", f"AHEAD={self.ahead}"


# Where every multiprocessor gets at most one block, that block alone must keep enough loads in flight; where it
# gets several, smaller ones overlap each other's start and end. Chosen from a sweep over 7 shapes on an H100.
_ONE_BLOCK_EACH = {8: Plan(32, 2), 4: Plan(32, 2), 3: Plan(32, 1), 2: Plan(32, 2)}
_SEVERAL_EACH = {8: Plan(16, 3), 4: Plan(16, 3), 3: Plan(8, 2), 2: Plan(8, 4)}


def plan_for(out_features: int, bits: int, sms: int) -> Plan:
    """The launch shape for a matrix of `out_features` on a device of `sms` multiprocessors."""
    several = -(-out_features // LANES) > sms
    return (_SEVERAL_EACH if several else _ONE_BLOCK_EACH)[bits]


def gemv(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    in_features: int,
    bits: int,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    pdl: bool = False,
    plan: Plan | None = None,
) -> torch.Tensor:
    """y = dequantized @ x + bias, decoded inside the multiply.

    Args:
        x: fp16, bf16 or fp32 [in_features], contiguous, on a CUDA device.
        codes: uint8, as `pack` made it.
        codebook: fp16 [out_features, n_codes].
        in_features: inputs without padding.
        bits: 8, 4, 3 or 2.
        bias: [out_features] in x's dtype, or None.
        out: where to write, [out_features] in x's dtype; made when None.
        pdl: let this launch overlap the kernel before it. Only where no kernel before it in the stream writes `codes`,
            `codebook`, since those are read before the wait. Ignored below sm_90.
        plan: launch shape; None picks by shape and device.

    Returns:
        [out_features] in x's dtype.
    """
    device = x.get_device()
    out_features, n_codes = codebook.shape
    steps = steps_for(in_features, bits)
    plan = plan or plan_for(out_features, bits, _limits(device)[0])
    function = kernel(
        SOURCE, "codebook_gemv", (f"BITS={bits}", f"XTYPE={_DTYPE_CODE[x.dtype]}", *plan.defines), device
    )
    if out is None:
        out = torch.empty(out_features, dtype=x.dtype, device=x.device)
    arguments = [pointer(t) for t in (codes, codebook, x, bias, out)]
    arguments += [integer(v) for v in (in_features, out_features, steps, n_codes)]
    grid, block = (-(-out_features // LANES), 1, 1), (LANES, min(plan.warps, steps), 1)
    function.launch(grid, block, shared_bytes_for(in_features, bits), arguments, pdl)
    return out


_TILED_WARPS, _STEPS_A_WARP = 4, 4


def dequantize(
    codes: torch.Tensor,
    codebook: torch.Tensor,
    in_features: int,
    bits: int,
    dtype: torch.dtype = torch.float16,
    variant: str = "tiled",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write the dense matrix: [out_features, in_features] of `dtype`.

    Args:
        variant: `naive` (one thread an element) or `tiled` (contiguous reads and writes); the sources say how.
    """
    device = codes.get_device()
    out_features, n_codes = codebook.shape
    defines = (f"BITS={bits}", f"WTYPE={_DTYPE_CODE[dtype]}")
    function = kernel(DEQUANTIZE_SOURCE, f"dequantize_{variant}", defines, device)
    if out is None:
        out = torch.empty(out_features, in_features, dtype=dtype, device=codes.device)
    steps = steps_for(in_features, bits)
    arguments = [pointer(t) for t in (codes, codebook, out)]
    arguments += [integer(v) for v in (in_features, out_features, steps, n_codes)]
    if variant == "naive":
        function.launch((-(-out.numel() // 256), 1, 1), (256, 1, 1), 0, arguments)
        return out
    tile_bytes = _TILED_WARPS * LANES * (STEP[bits] + 2) * out.element_size()
    shared_bytes = 2**bits * LANES * 2 + tile_bytes
    grid = (-(-steps // (_TILED_WARPS * _STEPS_A_WARP)), -(-out_features // LANES), 1)
    function.launch(grid, (LANES, _TILED_WARPS, 1), shared_bytes, [*arguments, integer(_STEPS_A_WARP)])
    return out


@cache
def _sink(device: int) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=f"cuda:{device}")


def read(buffer: torch.Tensor, pdl: bool = False) -> None:
    """Read `buffer` once (contiguous, a multiple of 16 bytes): the read-only floor at these bytes."""
    device = buffer.get_device()
    vectors = buffer.numel() * buffer.element_size() // 16
    function = kernel(READ_SOURCE, "read_bytes", (), device)
    blocks = max(1, min(2 * _limits(device)[0], -(-vectors // 1024)))  # the fastest of a sweep on an H100
    arguments = [pointer(buffer), (vectors, ctypes.c_uint64), pointer(_sink(device))]
    function.launch((blocks, 1, 1), (1024, 1, 1), 0, arguments, pdl)
