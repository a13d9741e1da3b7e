"""Dense GEMVs of our own on a CPU, in fp32, fp16 and int8: the binding of `kernels/dense_gemv.c`.

They have the structure of the codebook GEMV and nothing to look up, so that the law of bytes can be read off one
family of kernels. Models use PyTorch's products; nothing but measurements runs these.
"""

import ctypes
import functools

import torch
import torch.nn.functional as F

from trapetum import cpu
from trapetum.build import BuildError, compile_c

SOURCE = "dense_gemv.c"
KINDS = ("fp32", "fp16", "int8")  # the index is the number that the kernel knows
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
_ROWS, _BLOCK_BYTES, _PANEL_INPUTS = 4, 64, 4096
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and "", or None and the reason."""
    try:
        library = ctypes.CDLL(str(compile_c(SOURCE)))
    except (BuildError, OSError) as error:
        return None, str(error)
    library.trapetum_dense_gemv.argtypes = [_POINTER] * 5 + [_SIZE] * 2 + [_INT] * 3
    return library, ""


def available() -> bool:
    """Whether the compiled kernels run here (else torch does their work)."""
    return _load()[0] is not None


def why_not() -> str:
    """Why the compiled kernels are missing; "" when they are there."""
    return _load()[1]


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; dense weights are {', '.join(KINDS)}.")


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _block_inputs(kind: str) -> int:
    return _BLOCK_BYTES // _DTYPES[kind].itemsize


@functools.cache
def packed_shape(out_features: int, in_features: int, kind: str) -> tuple[int, int]:
    """Rows padded to 4 and inputs padded to a block of 64 bytes: what the packed weight holds."""
    return _round_up(out_features, _ROWS), _round_up(in_features, _block_inputs(kind))


def _panels(width: int) -> list[tuple[int, int]]:
    return [(first, min(first + _PANEL_INPUTS, width)) for first in range(0, width, _PANEL_INPUTS)]


def pack(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Round a matrix to a width and arrange it for the kernel.

    Args:
        weight: floating-point [out_features, in_features] on the CPU.
        kind: "fp32", "fp16" or "int8" (symmetric, one scale a row: largest magnitude / 127).

    Returns:
        the packed weight, one dimension of the kind's dtype, in the layout drawn in `kernels/dense_gemv.c`; and the
        scales, float32 [out_features], or None where there are none.

    Raises:
        ValueError: an unknown kind, or a weight that is not such a matrix.
    """
    _check_kind(kind)
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point() or not weight.is_cpu:
        raise ValueError(
            f"weight must be a non-empty floating-point [out_features, in_features] on the CPU; "
            f"it is {weight.dtype} {list(weight.shape)} on {weight.device}."
        )
    scale = None
    if kind == "int8":
        scale = (weight.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        weight = (weight.float() / scale[:, None]).round()
    rows, width = packed_shape(*weight.shape, kind)
    padded = F.pad(weight.to(_DTYPES[kind]), (0, width - weight.shape[1], 0, rows - weight.shape[0]))
    tiles = padded.view(rows // _ROWS, _ROWS, width)
    return torch.cat([_interleave(tiles[..., a:b], kind) for a, b in _panels(width)]), scale


def _interleave(panel: torch.Tensor, kind: str) -> torch.Tensor:
    """[tile, row, input] to one dimension, the rows' blocks side by side."""
    blocks = panel.reshape(panel.shape[0], _ROWS, -1, _block_inputs(kind))
    return blocks.transpose(1, 2).reshape(-1)


def unpack(
    packed: torch.Tensor, scale: torch.Tensor | None, in_features: int, out_features: int, kind: str
) -> torch.Tensor:
    """The weight as it is stored, float32 [out_features, in_features]."""
    _check_packed(packed, scale, in_features, out_features, kind)
    rows, width = packed_shape(out_features, in_features, kind)
    sizes = [rows * (b - a) for a, b in _panels(width)]
    parts = [
        p.view(rows // _ROWS, -1, _ROWS, _block_inputs(kind)).transpose(1, 2) for p in packed.split(sizes)
    ]
    whole = torch.cat([p.reshape(rows, -1) for p in parts], 1)[:out_features, :in_features].float()
    return whole if scale is None else whole * scale[:, None]


def _check_packed(packed, scale, in_features: int, out_features: int, kind: str) -> None:
    _check_kind(kind)
    rows, width = packed_shape(out_features, in_features, kind)
    if packed.dtype is not _DTYPES[kind] or packed.numel() != rows * width or not packed.is_cpu:
        raise ValueError(
            f"packed must be {rows * width} {_DTYPES[kind]} on the CPU for {kind} [{out_features}, {in_features}]; "
            f"it is {packed.numel()} {packed.dtype} on {packed.device}."
        )
    if (scale is None) == (kind == "int8"):
        raise ValueError(f"{kind} weights have {'scales' if kind == 'int8' else 'no scales'}.")


def gemv(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor | None,
    in_features: int,
    out_features: int,
    kind: str,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    path: str | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """y = W x + bias with fp32 activations and sums.

    Args:
        x: float32 [in_features].
        packed, scale: from `pack(weight, kind)`.
        kind: "fp32", "fp16" or "int8".
        bias: float32 [out_features] or None.
        out: float32 [out_features], contiguous, to be overwritten, or None for a new one.
        path: one of `cpu.paths()`; None for `cpu.active_path()`.
        threads: None for `torch.get_num_threads()`.

    Returns:
        float32 [out_features], the same for any number of threads. Relative L2 error of the stored weight's product at
        most 1e-6.

    Raises:
        ValueError: a kind, dtype or shape that does not fit, with what was given and what is needed.
    """
    _check_packed(packed, scale, in_features, out_features, kind)
    vectors = {"x": (x, in_features), "scale": (scale, out_features), "bias": (bias, out_features)}
    for name, (vector, size) in (vectors | {"out": (out, out_features)}).items():
        _check_vector(name, vector, size)
    name = path or cpu.active_path()
    y = torch.empty(out_features) if out is None else out
    if name == "torch" or not available():
        torch.mv(unpack(packed, scale, in_features, out_features, kind), x, out=y)
        return y if bias is None else y.add_(bias)
    pointers = [None if t is None else t.data_ptr() for t in (x, packed.contiguous(), scale, bias, y)]
    how = (KINDS.index(kind), cpu.path_number(name), threads or torch.get_num_threads())
    if _load()[0].trapetum_dense_gemv(*pointers, in_features, out_features, *how):
        raise MemoryError(f"no memory to prepare an activation of {in_features} inputs.")
    return y


def _check_vector(name: str, vector: torch.Tensor | None, size: int) -> None:
    if vector is None:
        return
    fits = vector.shape == (size,) and vector.dtype is torch.float32 and vector.is_cpu
    if not fits or not vector.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous float32 [{size}] on the CPU; it is {vector.dtype} {list(vector.shape)} "
            f"on {vector.device} with strides {list(vector.stride())}."
        )
