"""y += S x for the outliers of a dense-and-sparse weight: the torch operator and its implementations.

    trapetum::sparse_add_(Tensor(a!) y, Tensor x, Tensor values, Tensor columns, Tensor starts) -> ()

It adds to what the codebook product left in y, so that a layer's product is the two in turn. `values`, `columns` and `starts`
are those of `trapetum.sparse.Outliers`. The kernels are `sparse_gemv.cu` and `sparse_gemv.c`; where they cannot run, torch
does.
"""

import ctypes
import functools

import torch
from torch import Tensor

from trapetum import build, cpu, cuda
from trapetum.launch import integer, kernel, pointer
from trapetum.sparse import Outliers

SOURCE = "sparse_gemv.cu"
CPU_SOURCE = "sparse_gemv.c"
_DTYPE_CODE = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_WARPS = 8  # a block of the CUDA kernel, one row each
_ENOUGH = 1 << 14  # entries that are worth more than one thread
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_LIBRARY = torch.library.Library("trapetum", "FRAGMENT")
_LIBRARY.define("sparse_add_(Tensor(a!) y, Tensor x, Tensor values, Tensor columns, Tensor starts) -> ()")


def _check(y: Tensor, x: Tensor, values: Tensor, columns: Tensor, starts: Tensor) -> int:
    """The rows of x; ValueError or TypeError for what a kernel would read past."""
    if x.dtype not in _DTYPE_CODE or y.dtype != x.dtype:
        raise TypeError(
            f"sparse_add takes x and y of one dtype, float16, bfloat16 or float32, not {x.dtype} and {y.dtype}."
        )
    out_features = starts.shape[0] - 1
    rows = y.numel() // out_features if out_features > 0 else 0
    fits = y.shape[-1:] == (out_features,) and x.shape[:-1] == y.shape[:-1]
    if not fits or not 1 <= rows <= cuda.MAX_ROWS or not y.is_contiguous():
        raise ValueError(
            f"sparse_add takes 1 to {cuda.MAX_ROWS} rows of x and as many contiguous rows of {out_features} outputs, not x "
            f"{list(x.shape)} and y {list(y.shape)}."
        )
    kinds = values.dtype, starts.dtype, columns.dtype in (torch.uint16, torch.int32)
    if kinds != (torch.float16, torch.int32, True) or values.shape != columns.shape:
        raise ValueError(
            f"the outliers must be float16 values, as many uint16 or int32 columns and int32 row starts, not {values.dtype} "
            f"{list(values.shape)}, {columns.dtype} {list(columns.shape)} and {starts.dtype}."
        )
    if (
        any(t.device != y.device or not t.is_contiguous() for t in (values, columns, starts))
        or x.device != y.device
    ):
        raise ValueError(
            f"x is on {x.device}, y on {y.device} and the outliers on {values.device}; they must be on one device, and the "
            "outliers contiguous."
        )
    return rows


def launch(
    y: Tensor, x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, pdl: bool = False
) -> Tensor:
    """y += S x by the CUDA kernel.

    Args:
        y: fp16, bf16 or fp32 [out_features] or [rows, out_features], contiguous, on a CUDA device.
        x: [in_features] or [rows, in_features] in y's dtype, 1 to `cuda.MAX_ROWS` rows.
        values: fp16 [entries].
        columns: uint16 or int32 [entries], each below in_features.
        starts: int32 [out_features + 1].
        pdl: let this launch overlap the kernel before it. Only where no kernel before it in the stream writes the outliers,
            which are read before the wait. Ignored below sm_90.

    Returns:
        y.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    rows = _check(y, x, values, columns, starts)
    x = x.contiguous()
    wide = int(columns.dtype == torch.int32)
    defines = (f"XTYPE={_DTYPE_CODE[x.dtype]}", f"ROWS={rows}", f"WIDE={wide}", f"WARPS={_WARPS}")
    function = kernel(SOURCE, "sparse_add", defines, y.get_device())
    arguments = [pointer(t) for t in (values, columns, starts, x, y)]
    arguments += [integer(x.shape[-1]), integer(y.shape[-1])]
    grid = (-(-y.shape[-1] // _WARPS), 1, 1)
    function.launch(grid, (32, _WARPS, 1), 0, arguments, pdl)
    return y


# --- CPU -----------------------------------------------------------------------------------------------------------


@functools.cache
def _load() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(build.compile_c(CPU_SOURCE)))
    except (build.BuildError, OSError):
        return None
    library.trapetum_sparse_add.argtypes = [_POINTER] * 5 + [_SIZE] + [_INT] * 3
    return library


def add_row(
    y: Tensor, x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, threads: int | None = None
) -> Tensor:
    """y += S x on the CPU for one row, without the torch dispatcher.

    Args:
        y: float32 [out_features], contiguous, read and written.
        x: float32 of in_features numbers, contiguous.
        values, columns, starts: as for `launch`, on the CPU; not checked.
        threads: how many; None for as many as the codebook product uses, and one where there is little to do.

    Returns:
        y, the same for any number of threads.
    """
    library, path = _load(), cpu.active_path()
    if library is None or path == "torch":
        return _add_torch(y, x, values, columns, starts)
    if threads is None:
        threads = cpu.threads().in_use if len(values) >= _ENOUGH else 1
    tensors = (tensor.data_ptr() for tensor in (values, columns, starts, x, y))
    wide = columns.dtype == torch.int32
    library.trapetum_sparse_add(*tensors, len(starts) - 1, wide, cpu.path_number(path), threads)
    return y


def _add_torch(y: Tensor, x: Tensor, values: Tensor, columns: Tensor, starts: Tensor) -> Tensor:
    """The same through torch, for any number of rows: each row's products, summed in order."""
    taken = x.reshape(-1, x.shape[-1]).float()[:, columns.long()] * values.float()
    sums = torch.segment_reduce(taken.T.contiguous(), "sum", offsets=starts.long(), axis=0, initial=0)
    flat = y.view(-1, y.shape[-1])
    flat.copy_(flat.float() + sums.T)
    return y


# --- the operator --------------------------------------------------------------------------------------------------


def _add_cuda(y, x, values, columns, starts):
    if cuda.available():
        launch(y, x, values, columns, starts)
        return
    _check(y, x, values, columns, starts)
    _add_torch(y, x, values, columns, starts)


def _add_cpu(y, x, values, columns, starts):
    rows = _check(y, x, values, columns, starts)
    flat, inputs = y.view(rows, -1), x.reshape(rows, -1).float().contiguous()
    sums = flat.float()  # y itself where it is float32
    for row, given in zip(sums, inputs, strict=True):
        add_row(row, given, values, columns, starts)
    if sums is not flat:
        flat.copy_(sums)


def _add_meta(y, x, values, columns, starts):
    pass


_LIBRARY.impl("sparse_add_", _add_cuda, "CUDA")
_LIBRARY.impl("sparse_add_", _add_cpu, "CPU")
_LIBRARY.impl("sparse_add_", _add_meta, "Meta")
sparse_add_ = torch.ops.trapetum.sparse_add_.default


def add(y: Tensor, x: Tensor, outliers: Outliers) -> Tensor:
    """y += S x through the operator, on any device; capturable in a CUDA graph.

    Args:
        y: [..., out_features] in x's dtype, contiguous: 1 to `cuda.MAX_ROWS` rows.
        x: [..., in_features], fp16, bf16 or fp32.
        outliers: S, on their device.

    Returns:
        y.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    if x.shape[-1] != outliers.in_features:
        raise ValueError(f"x has {x.shape[-1]} inputs a row, and the outliers are of {outliers.in_features}.")
    sparse_add_(y, x, outliers.values, outliers.columns, outliers.starts)
    return y


def reference(y: Tensor, x: Tensor, outliers: Outliers) -> Tensor:
    """y + S x in float64: slow, simple, and what the kernels are compared with; shapes as for `add`."""
    dense = torch.zeros(outliers.out_features, outliers.in_features, dtype=torch.float64, device=y.device)
    return y.double() + x.double() @ outliers.add_to(dense).T


def kernel_sha256(device_type: str) -> str:
    """SHA-256 of the source of the sparse product on `cuda` or `cpu`: what a measured record carries."""
    return build.source_sha256(SOURCE if device_type == "cuda" else CPU_SOURCE)
