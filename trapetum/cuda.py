"""The CUDA side of the codebook kernels: their packed layout, their launch shapes, and a function for each."""

import ctypes
from functools import cache

import torch

from trapetum import build, plans
from trapetum.gemv_plans import LANES, STEP, Plan, Room, memory, plan_for
from trapetum.launch import integer, kernel, pointer

SOURCE = "codebook_gemv.cu"
DEQUANTIZE_SOURCE = "codebook_dequantize.cu"
READ_SOURCE = "read_bandwidth.cu"

MAX_ROWS = 8  # of x in one launch
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
    return build.why_not()


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


def _pairs(tiles: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., STEP] -> [..., STEP/2]: two indices in one byte, the first in its low bits."""
    pairs = tiles.unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << bits


def _pack_two(tiles: torch.Tensor) -> torch.Tensor:
    halves = _pairs(tiles, 2).unflatten(-1, (4, 2, 4))  # [..., word, half of a byte, byte]
    return halves[..., 0, :] | halves[..., 1, :] << 4


def _pack_three(tiles: torch.Tensor) -> torch.Tensor:
    words = _pairs(tiles, 3).unflatten(-1, (4, 4, 4))  # [..., group, word, byte]
    fourth = words[..., 3, :]
    return torch.stack([words[..., v, :] | (fourth >> (2 * v) & 3) << 6 for v in range(3)], -2)


def pack(indices: torch.Tensor, bits: int) -> torch.Tensor:
    """Arrange indices as `codebook_gemv.cu` reads them.

    Args:
        indices: uint8 [out_features, in_features], each below 2**bits.
        bits: 8, 4, 3 or 2.

    Returns:
        uint8 [ceil(out/32), steps, vectors, 32, 16], zero in the padding.

    Raises:
        ValueError: wrong dtype, shape or bits, or a code out of range.
    """
    _check_bits(bits)
    if indices.dtype != torch.uint8 or indices.dim() != 2 or 0 in indices.shape:
        raise ValueError(
            f"the codes must be a non-empty uint8 [out_features, in_features], not {indices.dtype} {list(indices.shape)}."
        )
    if int(indices.max()) >= 2**bits:
        raise ValueError(f"a code is {int(indices.max())}, but {bits}-bit codes end at {2**bits - 1}.")
    tiles = _tiles(indices, bits)
    if bits == 8:
        lanes = tiles
    elif bits == 4:
        lanes = _pairs(tiles, 4)
    else:
        lanes = (_pack_three if bits == 3 else _pack_two)(tiles)
    vectors = lanes.reshape(*tiles.shape[:3], -1, 16)  # [tiles, steps, lanes, vectors, 16]
    return vectors.transpose(2, 3).contiguous()


def _unpack_three(words: torch.Tensor) -> torch.Tensor:
    words = words.unflatten(-1, (4, 3, 4))
    fourth = sum((words[..., v, :] >> 6) << (2 * v) for v in range(3))
    return torch.cat([words & 63, fourth.unsqueeze(-2)], -2).flatten(-3)


def _unpack_two(words: torch.Tensor) -> torch.Tensor:
    words = words.unflatten(-1, (4, 4))
    return torch.stack([words & 15, words >> 4], -2).flatten(-3)


def _check_bits(bits: int) -> None:
    if bits not in STEP:
        raise ValueError(
            f"bits is {bits}; the CUDA kernels have layouts for {', '.join(map(str, sorted(STEP)))} bits."
        )


def check_packed(packed: torch.Tensor, out_features: int, in_features: int, bits: int) -> None:
    """Raise ValueError if `packed` is not what `pack` makes of such a weight: the kernel would read past its end."""
    _check_bits(bits)
    need = (-(-out_features // LANES), steps_for(in_features, bits), STEP[bits] * bits // 128, LANES, 16)
    if packed.dtype != torch.uint8 or packed.shape != need:
        raise ValueError(
            f"packed codes of a {bits}-bit [{out_features}, {in_features}] weight must be uint8 {list(need)} as "
            f"cuda.pack makes them, not {packed.dtype} {list(packed.shape)}."
        )
    if not packed.is_contiguous() or packed.data_ptr() % 16:
        raise ValueError(
            f"packed codes must be contiguous and start at a multiple of 16 bytes; their strides are "
            f"{list(packed.stride())} and they start {packed.data_ptr() % 16} bytes behind one, so clone them."
        )


def unpack(packed: torch.Tensor, out_features: int, in_features: int, bits: int) -> torch.Tensor:
    """Undo `pack`: uint8 [out_features, in_features].

    Raises:
        ValueError: `packed` is not of such a weight.
    """
    check_packed(packed, out_features, in_features, bits)
    lanes = packed.transpose(2, 3).flatten(-2)  # [tiles, steps, lanes, bytes]
    if bits != 8:
        pairs = {4: lambda p: p, 3: _unpack_three, 2: _unpack_two}[bits](lanes)
        lanes = torch.stack([pairs & (2**bits - 1), pairs >> bits], -1).flatten(-2)
    rows = lanes.transpose(1, 2).reshape(packed.shape[0] * LANES, -1)
    return rows[:out_features, :in_features].contiguous()


# --- launches ------------------------------------------------------------------------------------------------------


@cache
def room_of(device: int) -> Room:
    """The `Room` of the CUDA device with this index."""
    properties = torch.cuda.get_device_properties(device)
    a_block = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
    whole = getattr(properties, "shared_memory_per_multiprocessor", a_block)
    return Room(properties.multi_processor_count, a_block, whole)


@cache
def _tuned_for(device: int) -> tuple[str, str]:
    """What a stored launch shape belongs to: the device and the kernel's source."""
    properties = torch.cuda.get_device_properties(device)
    capability = properties.major, properties.minor
    name = plans.device_name(properties.name, properties.multi_processor_count, capability)
    return name, build.source_sha256(SOURCE)


def plan_key(device: int, in_features: int, out_features: int, bits: int, rows: int = 1) -> plans.Key:
    """Under what the tuned launch shape of a product is stored (`trapetum tune`)."""
    return plans.Key(*_tuned_for(device), in_features, out_features, bits, rows)


def _plan(x: torch.Tensor, in_features: int, out_features: int, bits: int, rows: int) -> Plan:
    """The tuned launch shape if there is one (they are tuned in fp16), or the default."""
    device, wide = x.get_device(), x.dtype == torch.float32
    tuned = None if wide else plans.load_as(Plan, plan_key(device, in_features, out_features, bits, rows))
    return tuned or plan_for(in_features, out_features, bits, rows * (1 + wide), room_of(device))


def _check_fused(x: torch.Tensor, in_features: int, norm: torch.Tensor | None, paired: bool) -> None:
    named = "a norm" if norm is not None else "two factors"
    if x.dtype == torch.float32 or in_features % 8 or x.data_ptr() % 16:
        raise ValueError(
            f"a product with {named} takes float16 or bfloat16 x of a multiple of 8 inputs at a multiple of 16 bytes, not "
            f"{in_features} inputs in {x.dtype}."
        )
    if norm is None:
        return
    if paired or norm.shape != (in_features,) or norm.dtype != x.dtype or norm.data_ptr() % 16:
        raise ValueError(
            f"the norm's weight must be {x.dtype} [{in_features}] at a multiple of 16 bytes for an x of one factor, not "
            f"{norm.dtype} {list(norm.shape)}."
        )


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
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    silu: bool = False,
    paired: bool = False,
    late: bool = False,
) -> torch.Tensor:
    """y = x @ dequantized.T + bias + residual, decoded inside the multiply.

    Args:
        x: fp16, bf16 or fp32 [in_features] or [rows, in_features] with 1 to `MAX_ROWS` rows, contiguous, on a CUDA device.
        codes: uint8, as `pack` made it.
        codebook: fp16 [out_features, n_codes].
        in_features: inputs without padding.
        bits: 8, 4, 3 or 2.
        bias: [out_features] in x's dtype, or None.
        out: where to write, [out_features] or [rows, out_features] in x's dtype; made when None.
        pdl: let this launch overlap the kernel before it. Only where no kernel before it in the stream writes `codes`,
            `codebook`, since those are read before the wait. Ignored below sm_90.
        plan: launch shape; None picks by shape and device.
        residual: what is added to the result, shaped like it and in x's dtype, or None.
        norm: weight [in_features] of an RMS norm that x goes through first, in x's dtype (fp16 or bf16), or None.
        eps: of the norm.
        silu: the first half of the weight's rows are gates, whose results go through SiLU (fp16 and bf16).
        paired: x is [rows, 2 * in_features], and what is multiplied is its first half times its second: as a product with
            `silu` leaves it.
        late: with `pdl`, let the next kernel start only once the one before this has finished.

    Returns:
        [out_features], or [rows, out_features] for a two-dimensional x, in x's dtype.

    Raises:
        ValueError: more rows than a launch takes, a plan that does not fit, or a norm or factors that the kernel cannot do.
    """
    device = x.get_device()
    out_features, n_codes = codebook.shape
    rows = x.numel() // (in_features * (1 + paired))
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"one launch multiplies 1 to {MAX_ROWS} rows of x, not {rows}.")
    plan = plan or _plan(x, in_features, out_features, bits, rows)
    if silu and x.dtype == torch.float32:
        raise ValueError("a product with SiLU takes float16 or bfloat16 x, not float32.")
    if norm is not None or paired:
        _check_fused(x, in_features, norm, paired)
    staged, limit = rows * (2 if x.dtype == torch.float32 else 1), room_of(device).a_block
    panel, shared_bytes = memory(plan, in_features, bits, staged, limit)
    if not panel:
        raise ValueError(
            f"{plan} with {rows} rows needs more than the {limit} bytes of shared memory a block has here."
        )
    what = (f"BITS={bits}", f"XTYPE={_DTYPE_CODE[x.dtype]}", f"ROWS={rows}", *plan.defines)
    extras = {"NORM=1": norm is not None, "SILU=1": silu, "PAIRED=1": paired, "LATE=1": late}
    function = kernel(SOURCE, "codebook_gemv", (*what, *(name for name, on in extras.items() if on)), device)
    if out is None:
        out = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype, device=x.device)
    arguments = [pointer(t) for t in (codes, codebook, x, bias, residual, out)]
    sizes = (in_features, out_features, steps_for(in_features, bits), n_codes)
    arguments += [integer(v) for v in (*sizes, plan.rounds(in_features, bits), panel)]
    arguments += [pointer(norm), (eps, ctypes.c_float)]
    grid = (-(-out_features // plan.channels), 1, 1)
    function.launch(grid, (LANES, plan.warps, 1), shared_bytes, arguments, pdl)
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
    blocks = max(1, min(2 * room_of(device).sms, -(-vectors // 1024)))  # the fastest of a sweep on an H100
    arguments = [pointer(buffer), (vectors, ctypes.c_uint64), pointer(_sink(device))]
    function.launch((blocks, 1, 1), (1024, 1, 1), 0, arguments, pdl)
