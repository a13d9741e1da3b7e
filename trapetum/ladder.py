"""The ladder of GPU kernels for one 4-bit codebook product: each rung changes one thing, and the dead ends stay runnable.

The sources are `kernels/ladder/<name>.cu`, and their headers draw the layouts; the last rung is the kernel that the
package itself uses. Every rung computes y = W x with W of 16 values a channel, x and y in fp16.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from trapetum import build, cuda, disassembly, formats
from trapetum.launch import integer, kernel, pointer

BITS, N_CODES = 4, 16
LANES, STEP = 32, 32  # channels a tile, and inputs that a lane takes with one load
PARTS = 4  # blocks that share a tile's inputs in dead_atomics
_PAIR_TABLE = N_CODES * N_CODES * LANES * 4  # bytes
_UNASKED = 48 * 1024  # bytes of shared memory that every launch may have
_STATIC_SHARED = 8192  # of a rung's shared memory, at most: the sums of the warps

ROW_LOADS = r"^LDG\.E\.U8\b"  # loads of codes in a disassembly: a byte of a row ...
TILE_LOADS = r"^LDG\.E\.NA\.128\b"  # ... or 16 bytes of a tile, which alone are kept out of L1


@dataclass(frozen=True)
class Rung:
    """One kernel of the ladder.

    Attributes:
        name: of the source without `.cu`.
        changed: what changed since the rung before, or since the rung that a dead end starts from.
        why: what that is meant to buy, or why a dead end lost.
        layout: "rows", codes as they are stored, or "tiles", as `trapetum.cuda.pack` arranges them.
        table_bytes: dynamic shared memory of the table.
        tiles: tiles of 32 channels that a block owns.
        warps: a block, at most.
        chains: "alone", and "pdl" where launches can overlap.
    """

    name: str
    changed: str
    why: str
    layout: str = "tiles"
    table_bytes: int = 0
    tiles: int = 1
    warps: int = 32
    chains: tuple[str, ...] = ("alone",)

    @property
    def source(self) -> str:
        """File name in `kernels/`."""
        return cuda.SOURCE if self.name == PRODUCT else f"ladder/{self.name}.cu"

    @property
    def function(self) -> str:
        """Name of the kernel in its source."""
        return "codebook_gemv" if self.name == PRODUCT else f"ladder_{self.name}"

    @property
    def method(self) -> str:
        """A record's method name, e.g. `ladder-a-scalar`."""
        return "ladder-" + self.name.replace("_", "-")

    @property
    def is_dead_end(self) -> bool:
        """Whether no later rung starts from this one."""
        return self.name.startswith("dead_")


PRODUCT = "g_tensor_cores"

RUNGS = (
    Rung(
        "a_scalar",
        "the start: a thread a channel, a byte a load, one lookup a weight",
        "the obvious program, and the one to be beaten",
        layout="rows",
        warps=1,
    ),
    Rung(
        "b_wide_loads",
        "tiles of 32 channels, 16 bytes a load, warps that share a row",
        "a warp's load is 512 bytes in a row, and enough of them are under way to fill the memory's latency",
    ),
    Rung(
        "c_pair_table",
        "a table of all 256 pairs: one lookup for two weights",
        "half the shifts, masks and reads of shared memory",
        table_bytes=_PAIR_TABLE,
    ),
    Rung(
        "d_mixed_sums",
        "chains of four products in fp16, then fp32",
        "one instruction multiplies two weights, and nothing is converted before",
        table_bytes=_PAIR_TABLE,
    ),
    Rung(
        "e_two_columns",
        "two channels a lane",
        "a read of x serves two channels; half as many blocks, each with two tables",
        table_bytes=2 * _PAIR_TABLE,
        tiles=2,
    ),
    Rung(
        "f_pdl",
        "one channel a lane again, two loads in flight, an aligned table, programmatic dependent launch",
        "codes are loaded and the table is built while the kernel before still runs",
        table_bytes=2 * _PAIR_TABLE,
        chains=("alone", "pdl"),
    ),
    Rung(
        PRODUCT,
        "sums on tensor cores, and a lookup's address from one byte-permute",
        "a tensor-core instruction does the work of four multiply-adds and eight conversions, and sums in fp32",
        chains=("alone", "pdl"),
    ),
)
DEAD_ENDS = (
    Rung(
        "dead_byte_permute",
        "from d: the table in registers, read by byte-permutes",
        "two permutes a weight cost more than half a shared read, and they share a pipe with the arithmetic",
    ),
    Rung(
        "dead_register_table",
        "from d: the table in a register array, chosen from by selects",
        "registers have no addresses: seven selects a weight, and the tests of its bits",
    ),
    Rung(
        "dead_atomics",
        "from d: inputs split over the grid, sums added in global memory",
        "y must be zeroed first, each part builds the table again, and the bits differ from run to run",
        table_bytes=_PAIR_TABLE,
        warps=8,
    ),
)
ALL = RUNGS + DEAD_ENDS


def find(name: str) -> Rung:
    """The rung called `name`.

    Raises:
        ValueError: there is none.
    """
    for rung in ALL:
        if rung.name == name:
            return rung
    raise ValueError(f"there is no rung {name!r}; the ladder has {', '.join(rung.name for rung in ALL)}.")


def pack(indices: Tensor, rung: Rung) -> Tensor:
    """Arrange indices as `rung` reads them.

    Args:
        indices: uint8 [out_features, in_features], each below 16.

    Returns:
        uint8: [out_features, ceil(in_features / 2)] in rows, or as `trapetum.cuda.pack` makes tiles.
    """
    if rung.layout == "tiles":
        return cuda.pack(indices, BITS)
    unused = torch.zeros(len(indices), N_CODES, dtype=torch.float16, device=indices.device)
    return formats.pack(indices, unused, BITS).codes


def shared_bytes(rung: Rung, in_features: int) -> int:
    """Dynamic shared memory of one block, in bytes: the table and the staged x.

    Beyond 48 KiB a launch has to ask for it. What the sums of the warps take counts towards these 48 KiB, but not towards the
    size that is asked for; so a block that comes near them asks for a little more than it needs.
    """
    if rung.layout == "rows":
        return 0
    steps = -(-in_features // STEP)
    parts = PARTS if rung.name == "dead_atomics" else 1
    needed = rung.table_bytes + 2 * STEP * -(-steps // parts)
    return needed if needed + _STATIC_SHARED <= _UNASKED else max(needed, _UNASKED + 16)


@cache
def _shared_limit(device: int) -> int:
    """The most dynamic shared memory that a block of any rung may have, in bytes."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 64 * 1024) - _STATIC_SHARED


def code_bytes(rung: Rung, in_features: int, out_features: int) -> int:
    """Bytes of the codes in the rung's layout."""
    if rung.layout == "rows":
        return out_features * -(-in_features // 2)
    return -(-out_features // LANES) * -(-in_features // STEP) * LANES * 16


def _require(rung: Rung, x: Tensor, codes: Tensor, codebook: Tensor) -> None:
    if x.dim() != 1 or x.dtype != torch.float16 or not x.is_cuda or not x.is_contiguous():
        raise ValueError(
            f"{rung.name} multiplies one contiguous row of torch.float16 on a CUDA device, not {x.dtype} "
            f"{list(x.shape)} on {x.device}."
        )
    if codebook.dim() != 2 or codebook.shape[1] != N_CODES or codebook.dtype != torch.float16:
        raise ValueError(
            f"{rung.name} takes a torch.float16 codebook [out_features, {N_CODES}], not {codebook.dtype} "
            f"{list(codebook.shape)}."
        )
    expected = code_bytes(rung, len(x), len(codebook))
    if codes.numel() * codes.element_size() != expected:
        raise ValueError(
            f"{rung.name} reads {expected} bytes of codes in {rung.layout} for {len(codebook)} x {len(x)} weights, and "
            f"these are {codes.numel() * codes.element_size()}; pack them for this rung."
        )
    limit = _shared_limit(x.get_device())
    needed = shared_bytes(rung, len(x))
    if rung.name != PRODUCT and needed > limit:
        raise ValueError(
            f"{rung.name} keeps the table and x of {len(x)} inputs in {needed} bytes of shared memory, and a block "
            f"here may have {limit}; choose fewer inputs."
        )


def gemv(
    rung: Rung, x: Tensor, codes: Tensor, codebook: Tensor, out: Tensor | None = None, pdl: bool = False
) -> Tensor:
    """y = W x with one rung, on the current stream.

    Args:
        rung: one of `ALL`.
        x: fp16 [in_features], contiguous, on a CUDA device.
        codes: uint8, as `pack` made them for this rung.
        codebook: fp16 [out_features, 16].
        out: where to write, [out_features], fp16 (fp32 for dead_atomics, which zeroes it first); made when None.
        pdl: let this launch overlap the kernel before it, where the rung can; as in `trapetum.cuda.gemv`.

    Returns:
        [out_features], fp16; fp32 from dead_atomics.

    Raises:
        ValueError: x, codes or codebook do not fit the rung, or x does not fit shared memory.
    """
    _require(rung, x, codes, codebook)
    pdl = pdl and "pdl" in rung.chains
    if rung.name == PRODUCT:
        return cuda.gemv(x, codes, codebook, len(x), BITS, out=out, pdl=pdl)
    atomics = rung.name == "dead_atomics"
    if out is None:
        out = torch.empty(len(codebook), dtype=torch.float32 if atomics else torch.float16, device=x.device)
    if atomics:
        out.zero_()
    steps = -(-len(x) // STEP)
    grid = (-(-len(codebook) // (LANES * rung.tiles)), PARTS if atomics else 1, 1)
    block = (LANES, min(rung.warps, steps), 1)
    arguments = [pointer(t) for t in (codes, codebook, x, out)] + [integer(len(x)), integer(len(codebook))]
    function = kernel(rung.source, rung.function, (), x.get_device())
    function.launch(grid, block, shared_bytes(rung, len(x)), arguments, pdl)
    return out


def defines(rung: Rung, shape: tuple[int, int] = (4096, 4096)) -> tuple[str, ...]:
    """What the rung's source is compiled with; only the last rung has variants, by (in_features, out_features)."""
    if rung.name != PRODUCT:
        return ()
    return f"BITS={BITS}", "XTYPE=0", "ROWS=1", *cuda.plan_for(*shape, BITS).defines


def inner_loop(rung: Rung, arch: str, shape: tuple[int, int] = (4096, 4096)) -> disassembly.Loop:
    """The machine instructions of the loop over the codes. Compiles if need be; needs no GPU.

    Args:
        arch: e.g. `sm_90`.
        shape: (in_features, out_features), for the last rung's launch shape.

    Raises:
        BuildError: the source cannot be compiled here.
        DisassemblyError: there is no nvdisasm.
    """
    cubin = build.compile_cuda(rung.source, arch, defines(rung, shape))
    code = disassembly.parse(disassembly.text_of(cubin.path))[rung.function]
    return disassembly.inner_loop(code, ROW_LOADS if rung.layout == "rows" else TILE_LOADS)


def why_not_counted() -> str:
    """Why instructions cannot be counted here, as one sentence; empty when they can."""
    why = disassembly.why_not()
    if not why:
        try:
            build.compile_cuda(RUNGS[0].source, "sm_90")
        except (build.BuildError, OSError) as error:
            why = str(error).splitlines()[0]
    return why
