"""The codebook GEMV on a CPU: the binding of `kernels/codebook_gemv.c` (its layout is packed by `cpu_layout`).

The kernel is compiled at first use and loaded with ctypes. torch is imported before that, so that both share one
OpenMP runtime and its threads. Without a compiler everything here still works through torch, slowly; `why_not` says so.

`TRAPETUM_CPU_PATH` (avx512vnni, avx512bw, avx2, neon, portable) forces one path for the life of the process.
A product uses torch's number of threads, or fewer while those are measured to be faster (`threads()` tells).
"""

import ctypes
import functools
import os
import time
from collections.abc import Iterator

import torch

from trapetum.build import BuildError, compile_c
from trapetum.cpu_layout import BITS, check_packed, pack, packed_bytes, unpack
from trapetum.cpu_threads import Report, ThreadChoice

__all__ = [
    "ARITHMETICS",
    "BITS",
    "PATHS",
    "SOURCE",
    "active_path",
    "available",
    "dequantize",
    "gemv",
    "has_openmp",
    "pack",
    "packed_bytes",
    "path_number",
    "paths",
    "read_bandwidth",
    "read_sum",
    "read_us",
    "threads",
    "unpack",
    "why_not",
]

SOURCE = "codebook_gemv.c"
PATHS = (
    "portable",
    "avx2",
    "avx512bw",
    "avx512vnni",
    "neon",
)  # the index is the number that the kernel knows
ARITHMETICS = ("int16", "exact", "int8")  # the same
_FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


# ------------------------------------------------------------------------------------------ the compiled library


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library and "", or None and the reason."""
    try:
        library = ctypes.CDLL(str(compile_c(SOURCE)))
    except (BuildError, OSError) as error:
        return None, str(error)
    sizes, product = [_SIZE, _SIZE], [_POINTER] * 3 + [_SIZE] + [_POINTER] * 2
    library.trapetum_gemv_packed.argtypes = product + sizes + [_INT] * 4
    library.trapetum_gemv_bytes.argtypes = product + sizes + [_INT] * 2
    library.trapetum_dequantize.argtypes = (
        [_POINTER] * 2 + [_SIZE, _POINTER] + [_INT] * 2 + sizes + [_INT] * 2
    )
    library.trapetum_read.argtypes = [_POINTER, _SIZE, _INT, _INT]
    library.trapetum_read.restype = ctypes.c_uint64
    return library, ""


def available() -> bool:
    """Whether the compiled kernel runs here (else torch does its work)."""
    return _load()[0] is not None


def why_not() -> str:
    """Why the compiled kernel is missing and what happens instead; "" when it is there."""
    reason = _load()[1]
    return reason and f"{reason} Codebook layers run through torch, many times slower."


def has_openmp() -> bool:
    """Whether the kernel was built with OpenMP; without it, it uses one thread."""
    return available() and bool(_load()[0].trapetum_has_openmp())


def paths() -> list[str]:
    """The kernel's paths that this processor runs, fastest first; empty without a compiler."""
    library = _load()[0]
    if library is None:
        return []
    return [PATHS[number] for number in reversed(range(len(PATHS))) if library.trapetum_runs(number)]


@functools.cache
def active_path() -> str:
    """The path in use: `$TRAPETUM_CPU_PATH` when set, else the fastest; "torch" without a compiler.

    Raises:
        ValueError: the variable names a path that does not exist or does not run here.
    """
    forced, usable = os.environ.get("TRAPETUM_CPU_PATH"), paths()
    if not forced:
        return usable[0] if usable else "torch"
    return PATHS[path_number(forced, "TRAPETUM_CPU_PATH=")]


@functools.cache
def path_number(path: str, said: str = "path=") -> int:
    """The kernels' number of a path.

    Raises:
        ValueError: there is no such path or it does not run here; the message begins with `said`.
    """
    if path not in PATHS:
        raise ValueError(f"{said}{path} is unknown; it is one of {', '.join(reversed(PATHS))}.")
    if path not in paths():
        usable = ", ".join(paths()) or f"none, because {_load()[1]}"
        raise ValueError(f"{said}{path} does not run on this machine; these do: {usable}")
    return PATHS.index(path)


# --------------------------------------------------------------------------------------------------- the product


def _check_weight(packed: torch.Tensor, codebook: torch.Tensor, in_features: int, bits: int) -> None:
    if codebook.dtype is not torch.float16 or codebook.dim() != 2 or not codebook.is_cpu:
        raise ValueError(
            f"codebook must be float16 [out_features, n_codes] on the CPU; "
            f"it is {codebook.dtype} {list(codebook.shape)} on {codebook.device}."
        )
    check_packed(packed, codebook.shape[0], in_features, bits)
    if not 1 <= codebook.shape[1] <= 2**bits:
        raise ValueError(f"codebook has {codebook.shape[1]} codes a row; {bits} bits allow 1 to {2**bits}.")


def _check_vectors(x, in_features: int, bias, out, out_features: int) -> None:
    one_row = x.numel() == in_features and x.dim() > 0 and x.shape[-1] == in_features
    if x.dtype is not torch.float32 or not one_row or not x.is_cpu:
        raise ValueError(
            f"x must be one row of {in_features} float32 on the CPU; it is {list(x.shape)} {x.dtype} on {x.device}."
        )
    if bias is not None:
        _check_output("bias", bias, out_features)
    if out is not None:
        _check_output("out", out, out_features)
        if not out.is_contiguous():
            raise ValueError(f"out must be contiguous; its stride is {out.stride(0)}.")


def _check_output(name: str, tensor: torch.Tensor, out_features: int) -> None:
    fits = tensor.dim() == 1 and tensor.shape[0] == out_features
    if tensor.dtype is not torch.float32 or not fits or not tensor.is_cpu:
        raise ValueError(
            f"{name} must be float32 [{out_features}] on the CPU; "
            f"it is {tensor.dtype} {list(tensor.shape)} on {tensor.device}."
        )


def _arithmetic_number(arithmetic: str | None, exact: bool) -> int:
    """The kernel's number of what `arithmetic` and `exact` ask for."""
    if arithmetic is None:
        return 1 if exact else 0
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic is {arithmetic!r}; it is one of {', '.join(ARITHMETICS)}.")
    if exact and arithmetic != "exact":
        raise ValueError(
            f"exact=True asks for fp32 arithmetic and arithmetic={arithmetic!r} for another; give one."
        )
    return ARITHMETICS.index(arithmetic)


_CHOICE = ThreadChoice()


def threads() -> Report:
    """How many threads products use now, of how many, and what was measured; see `cpu_threads.Report`."""
    return _CHOICE.report(torch.get_num_threads())


def gemv(
    x: torch.Tensor,
    packed: torch.Tensor,
    codebook: torch.Tensor,
    in_features: int,
    bits: int,
    exact: bool = False,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    path: str | None = None,
    arithmetic: str | None = None,
    threads: int | None = None,
) -> torch.Tensor:
    """y = W x + bias, with W read as codes.

    Args:
        x: float32 [in_features] (or any shape of one row), of any stride.
        packed: uint8 from `pack(indices, bits)`.
        codebook: float16 [out_features, n_codes], n_codes <= 2**bits.
        exact: the same as `arithmetic="exact"`.
        bias: float32 [out_features] or None.
        out: float32 [out_features] to be overwritten, or None for a new one.
        path: one of `paths()`; None for `active_path()`.
        arithmetic: "int16" (None: 15-bit fixed point), "int8" or "exact" (fp32). 8-bit weights are always exact.
        threads: how many; None for `torch.get_num_threads()`, or fewer while they are measured to be faster.

    Returns:
        float32 [out_features], the same for any number of threads. Relative L2 error at most 1e-4 with int16, 1e-6
        exact and, with Gaussian x and a codebook of 16 Gaussian values, 1e-2 with int8. A NaN or infinity in x gives
        NaN in fixed point.

    Raises:
        ValueError: a dtype, shape or device that does not fit, with what was given and what is needed.
    """
    _check_weight(packed, codebook, in_features, bits)
    out_features, n_codes = codebook.shape
    _check_vectors(x, in_features, bias, out, out_features)
    number = _arithmetic_number(arithmetic, exact)
    name = path or active_path()
    y = torch.empty(out_features) if out is None else out
    if name == "torch":
        return _gemv_torch(x, packed, codebook, in_features, bits, bias, y)
    x, packed, codebook = x.contiguous(), packed.contiguous(), codebook.contiguous()
    bias = bias if bias is None else bias.contiguous()
    product = x.data_ptr(), packed.data_ptr(), codebook.data_ptr(), n_codes
    rest = bias if bias is None else bias.data_ptr(), y.data_ptr(), in_features, out_features
    number_of_path, library = path_number(name), _load()[0]
    if bits == 8:
        kernel, options = library.trapetum_gemv_bytes, (number_of_path,)
    else:
        kernel, options = library.trapetum_gemv_packed, (bits, number_of_path, number)
    every = torch.get_num_threads()
    if threads is not None or every == 1:
        status = kernel(*product, *rest, *options, threads or every)
    else:
        key = (out_features, in_features, bits, number)
        status = _CHOICE.run(lambda count: kernel(*product, *rest, *options, count), key, every)
    if status:
        raise MemoryError(f"no memory to prepare an activation of {in_features} inputs.")
    return y


def _rows_torch(
    packed, codebook, in_features: int, bits: int, step: int = 512
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of rows and their float16 weights, by index_select on the flattened codebooks."""
    out_features, n_codes = codebook.shape
    indices = unpack(packed, out_features, in_features, bits)
    for first in range(0, out_features, step):
        rows = slice(first, min(first + step, out_features))
        base = torch.arange(rows.stop - first, dtype=torch.int32)[:, None] * n_codes
        flat = (indices[rows].to(torch.int32) + base).view(-1)
        yield rows, codebook[rows].reshape(-1).index_select(0, flat).view(-1, in_features)


def _gemv_torch(x, packed, codebook, in_features, bits, bias, y) -> torch.Tensor:
    for rows, weight in _rows_torch(packed, codebook, in_features, bits):
        torch.mv(weight.float(), x.reshape(-1), out=y[rows])
    return y if bias is None else y.add_(bias)


def dequantize(
    packed: torch.Tensor,
    codebook: torch.Tensor,
    in_features: int,
    bits: int,
    dtype: torch.dtype = torch.float32,
    path: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """W itself, for products with many rows of x.

    Args:
        packed, codebook, in_features, bits, path: as for `gemv`.
        dtype: float32 or float16 (both exact) or bfloat16 (rounded to nearest even).
        out: contiguous dtype [out_features, in_features] to be overwritten, or None for a new one; reusing one
            saves the page faults, which can take longer than the work.

    Returns:
        dtype [out_features, in_features].

    Raises:
        ValueError: as for `gemv`, or another dtype.
    """
    _check_weight(packed, codebook, in_features, bits)
    if dtype not in _FORMATS:
        raise ValueError(f"dtype is {dtype}; weights are dequantized to float32, float16 or bfloat16.")
    out_features, n_codes = codebook.shape
    weight = torch.empty(out_features, in_features, dtype=dtype) if out is None else out
    if weight.dtype is not dtype or weight.shape != (out_features, in_features) or not weight.is_contiguous():
        raise ValueError(
            f"out must be contiguous {dtype} [{out_features}, {in_features}]; "
            f"it is {weight.dtype} {list(weight.shape)} with strides {list(weight.stride())}."
        )
    name = path or active_path()
    if name == "torch":
        for rows, values in _rows_torch(packed, codebook, in_features, bits):
            weight[rows] = values.to(dtype)
        return weight
    packed, codebook = packed.contiguous(), codebook.contiguous()
    pointers = (packed.data_ptr(), codebook.data_ptr(), n_codes, weight.data_ptr())
    layout = (_FORMATS[dtype], bits, in_features, out_features)
    _load()[0].trapetum_dequantize(*pointers, *layout, path_number(name), torch.get_num_threads())
    return weight


# ----------------------------------------------------------------------------------------- read bandwidth probe


def read_sum(buffer: torch.Tensor, threads: int | None = None, path: str | None = None) -> int:
    """Sum of a contiguous CPU tensor taken as 64-bit words modulo 2**64 (a tail below 8 bytes is left out).

    Each thread reads one contiguous run, as in the GEMV; `threads` defaults to `torch.get_num_threads()`.
    """
    words, name = buffer.numel() * buffer.element_size() // 8, path or active_path()
    if name == "torch":
        return int(buffer.view(-1).view(torch.uint8)[: words * 8].view(torch.int64).sum()) % 2**64
    arguments = (path_number(name), threads or torch.get_num_threads())
    return _load()[0].trapetum_read(buffer.data_ptr(), words, *arguments)


def read_us(buffer: torch.Tensor, threads: int | None = None) -> float:
    """Microseconds to read `buffer` once (contiguous, on the CPU)."""
    begin = time.perf_counter_ns()
    read_sum(buffer, threads)
    return (time.perf_counter_ns() - begin) / 1e3


def read_bandwidth(nbytes: int = 2**30, threads: int | None = None, repeats: int = 9) -> list[float]:
    """Read bandwidth in GB/s (1e9 bytes), one sample a repeat after one that is not counted.

    Args:
        nbytes: size of the buffer; it should be several times the last-level cache.
        threads: None for `torch.get_num_threads()`.
    """
    buffer = torch.ones(nbytes // 8, dtype=torch.int64)
    times_us = [read_us(buffer, threads) for _ in range(repeats + 1)]
    return [buffer.nbytes / 1e3 / time_us for time_us in times_us[1:]]
