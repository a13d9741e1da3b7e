"""The ways to compute y = W x with one row x or a few: their weights, their calls, and how many bytes one call moves.

Weights, codes and activations are random, never zeros; every product is compared with float64 before it is timed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from trapetum import cpu, cuda
from trapetum.build import source_sha256

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
N_CODES = {8: 256, 4: 16, 3: 8, 2: 4}
INT4_GROUP = 128
CHECKED_OUTPUTS = 256

CPU_METHODS = (
    "linear-fp32",
    "linear-bf16",
    "linear-fp16",
    "torch-int4",
    "codebook",
    "codebook-exact",
    "codebook-int8",
    "own-fp32",
    "own-fp16",
    "own-int8",
    "read",
)
_ADDITIVE = ("additive-2x8", "additive-4x8")
CUDA_METHODS = (
    "linear-fp16",
    "linear-bf16",
    "mv-fp16",
    "mv-bf16",
    "tinygemm-int4",
    "codebook",
    *_ADDITIVE,
    "read",
)
_EXPANDED = ("dequantize-linear", "dequantize-linear-bf16")  # not timed unless asked for
_WITH_OUTLIERS = "codebook+sparse"  # the same, with a share behind an @ where it is not 0.45 %
_CODED = ("codebook", "codebook-exact", "codebook-int8", *_EXPANDED, "read")
ROWS_A_LAUNCH = 8  # of x, in one call of the CUDA codebook kernel; the CPU's takes one

# Relative L2 error against float64 above which a product counts as wrong and is not timed.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
INT8_TOLERANCE = 2e-2  # codes multiplied in int8 arithmetic


class NotPossible(ValueError):
    """A method cannot do this shape on this device; the message says why."""


@dataclass(frozen=True)
class Product:
    """One way to compute y = W x, or Y = X W^T for a few rows of x.

    Attributes:
        method: a record's method name.
        tensors: the weights, one copy; `clone` makes more.
        bind: `bind(*tensors, **options)` gives a call without arguments that computes y.
        io_bytes: bytes of x and y.
        config: what a record's config says beside the shape (bits, n_codes, path, ...).
        reference: float64 [rows of x, up to `CHECKED_OUTPUTS`], the first outputs; None where nothing is computed.
        dtype: dtype of y.
        kernel_sha256: hash of our kernel's source, if ours.
        chains: "alone", and "pdl" where launches can overlap.
        tolerance: of `error`, where it is not the dtype's.
    """

    method: str
    tensors: tuple[Tensor, ...]
    bind: Callable[..., Callable[[], object]]
    io_bytes: int
    config: dict
    reference: Tensor | None = None
    dtype: torch.dtype = torch.float32
    kernel_sha256: str | None = None
    chains: tuple[str, ...] = ("alone",)
    label: str = ""
    tolerance: float | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of one copy of the weights, as stored."""
        return sum(t.nbytes for t in self.tensors)

    def calls(self, copies: int, **options) -> list[Callable[[], object]]:
        """Calls over `copies` distinct copies of the weights (the content is the same, the memory is not)."""
        return [self.bind(*tensors, **options) for tensors in copies_of(self.tensors, copies)]

    def error(self) -> float | None:
        """Relative L2 error of the first outputs against float64, None where nothing is computed."""
        if self.reference is None:
            return None
        rows, outputs = self.reference.shape
        y = self.bind(*self.tensors)().reshape(rows, -1)[:, :outputs].double()
        return float((y - self.reference).norm() / self.reference.norm())

    def checked_error(self) -> float | None:
        """`error`, refused when it is too large.

        Raises:
            ArithmeticError: the product is wrong, so its time would mean nothing.
        """
        error = self.error()
        allowed = self.tolerance or TOLERANCE[self.dtype]
        if error is not None and not error <= allowed:
            raise ArithmeticError(
                f"{self.method} is off by {error:.2g} against float64 (allowed {allowed:g}); it is not timed."
            )
        return error


def copies_of(tensors: tuple[Tensor, ...], copies: int) -> list[tuple[Tensor, ...]]:
    """`tensors` themselves and clones of them, `copies` sets in all."""
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(copies - 1))]


@dataclass(frozen=True)
class Weights:
    """One random matrix as a method stores it; `at` gives its products with random activations.

    Attributes:
        method, tensors, config, kernel_sha256, chains, label, tolerance: as in `Product`.
        in_features, out_features: of the matrix.
        multiply: `multiply(x, *tensors, **options)` with x [rows, in_features] gives a call that computes the product.
        dtype: of x and y; None where nothing is computed.
        head: float64 [up to `CHECKED_OUTPUTS`, in_features], the first outputs' weights as stored.
        most_rows: of x, or None for any number.
        rows_a_launch: where more rows take several launches of the kernel, how many each takes.
    """

    method: str
    tensors: tuple[Tensor, ...]
    in_features: int
    out_features: int
    multiply: Callable[..., Callable[[], object]]
    config: dict
    dtype: torch.dtype | None = None
    head: Tensor | None = None
    kernel_sha256: str | None = None
    chains: tuple[str, ...] = ("alone",)
    label: str = ""
    most_rows: int | None = None
    rows_a_launch: int | None = None
    tolerance: float | None = None

    def at(self, rows: int = 1) -> Product:
        """The product with `rows` rows of random activations.

        Raises:
            NotPossible: the method takes fewer rows.
        """
        if self.most_rows and rows > self.most_rows:
            raise NotPossible(f"{self.method} takes {self.most_rows} row of x at most, not {rows}.")
        x, moved, reference = self._activation(rows)
        launches = -(-rows // self.rows_a_launch) if self.rows_a_launch else 1
        return Product(
            self.method,
            self.tensors,
            lambda *tensors, **options: self.multiply(x, *tensors, **options),
            moved,
            self.config | ({"launches": launches} if launches > 1 else {}),
            reference,
            self.dtype or torch.float32,
            self.kernel_sha256,
            self.chains,
            self.label,
            self.tolerance,
        )

    def _activation(self, rows: int) -> tuple[Tensor | None, int, Tensor | None]:
        """x, the bytes of x and y, and the first outputs in float64."""
        if self.dtype is None:
            return None, 0, None
        x = torch.randn(rows, self.in_features, device=self.tensors[0].device).to(self.dtype)
        moved = (x.numel() + rows * self.out_features) * x.element_size()
        return x, moved, x.double() @ self.head.T


def weights(method: str, in_features: int, out_features: int, bits: int, device: str) -> Weights:
    """Make one method's random weights.

    Args:
        method: one of `CPU_METHODS` or `CUDA_METHODS`; or `dequantize-linear` (write the dense matrix, then multiply), which
            is fp16 on CUDA and fp32 on a CPU, or `dequantize-linear-bf16`; or `codebook+sparse` (`bench.with_outliers`).
        bits: for codebook methods and `read`; ignored by the others.
        device: "cpu" or "cuda".

    Raises:
        NotPossible: this torch or this device cannot do the method at this shape.
        ValueError: the method is unknown on this device.
    """
    known = CUDA_METHODS if device == "cuda" else CPU_METHODS
    if method.startswith(_WITH_OUTLIERS):
        from trapetum.bench import with_outliers

        return with_outliers.weights(method, in_features, out_features, bits, device)
    if method not in (*known, *_EXPANDED):
        raise ValueError(f"method {method!r} is unknown on {device}; it is one of {', '.join(known)}.")
    if method in _CODED:
        return _coded(method, in_features, out_features, bits, device)
    if method in ("torch-int4", "tinygemm-int4"):
        return _int4(method, in_features, out_features, device)
    if method in _ADDITIVE:
        from trapetum.bench import additive_product

        return additive_product.weights(method, in_features, out_features, device)
    if method.startswith("own-"):
        from trapetum.bench import own_products

        return own_products.weights(method, in_features, out_features)
    return _dense(method, in_features, out_features, device)


def build(method: str, in_features: int, out_features: int, bits: int, device: str, rows: int = 1) -> Product:
    """Make one product: random weights, as `weights`, and `rows` rows of random activations.

    Raises:
        NotPossible, ValueError: as `weights` and `Weights.at`.
    """
    return weights(method, in_features, out_features, bits, device).at(rows)


def _dense(method: str, in_features: int, out_features: int, device: str) -> Weights:
    kind, name = method.split("-")
    dtype = DTYPES[name]
    weight = (torch.randn(out_features, in_features, device=device) / math.sqrt(in_features)).to(dtype)
    multiply = {
        "linear": lambda x, w: lambda: F.linear(x, w),
        "mv": lambda x, w: partial(torch.mv, w, x[0]),
    }[kind]
    return Weights(
        method,
        (weight,),
        in_features,
        out_features,
        multiply,
        {"bits": torch.finfo(dtype).bits},
        dtype,
        weight[:CHECKED_OUTPUTS].double(),
        most_rows=1 if kind == "mv" else None,
    )


def _int4(method: str, in_features: int, out_features: int, device: str) -> Weights:
    """PyTorch's own 4-bit product: groups of 128 inputs, a bf16 scale and zero each, bf16 activations."""
    if in_features % INT4_GROUP or out_features % 16:
        raise NotPossible(
            f"{method} needs in_features in multiples of {INT4_GROUP} and out_features of 16, "
            f"not {in_features} x {out_features}."
        )
    q = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, device=device)
    scales = torch.rand(in_features // INT4_GROUP, out_features, 2, device=device) * 0.01 + 0.001
    scales = scales.to(torch.bfloat16)
    packed, multiply = _int4_operators(method, q)
    return Weights(
        method,
        (packed, scales),
        in_features,
        out_features,
        lambda x, w, s: lambda: multiply(x, w, INT4_GROUP, s),
        {"bits": 4, "group_size": INT4_GROUP},
        torch.bfloat16,
        _int4_head(q[:CHECKED_OUTPUTS], scales[:, :CHECKED_OUTPUTS]),
    )


def _int4_operators(method: str, q: Tensor):
    aten = torch.ops.aten
    try:
        if method == "torch-int4":
            return aten._convert_weight_to_int4pack_for_cpu(q.int(), 1), aten._weight_int4pack_mm_for_cpu
        pairs = q[:, ::2] << 4 | q[:, 1::2]
        return aten._convert_weight_to_int4pack(pairs.contiguous(), 8), aten._weight_int4pack_mm
    except (AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise NotPossible(f"this PyTorch ({torch.__version__}) has no {method} here: {reason}") from error


def _int4_head(q: Tensor, scales: Tensor) -> Tensor:
    groups = (q.double() - 8).view(len(q), -1, INT4_GROUP)
    scale, zero = scales.double().unbind(-1)
    return (groups * scale.T[..., None] + zero.T[..., None]).flatten(1)


def _coded(method: str, in_features: int, out_features: int, bits: int, device: str) -> Weights:
    side = cuda if device == "cuda" else cpu
    if not side.available() and (method == "read" or device == "cuda"):
        raise NotPossible(side.why_not())
    n_codes = N_CODES[bits]
    indices = torch.randint(0, n_codes, (out_features, in_features), dtype=torch.uint8, device=device)
    codebook = torch.randn(out_features, n_codes, device=device).sort(1).values / math.sqrt(in_features)
    codebook = codebook.half()
    tensors = (side.pack(indices, bits), codebook)
    if method == "read":
        return _read(tensors, in_features, out_features, bits, device)
    head = codebook[:CHECKED_OUTPUTS].double().gather(1, indices[:CHECKED_OUTPUTS].long())
    dtype = torch.float16 if device == "cuda" else torch.float32
    dtype = torch.bfloat16 if method.endswith("bf16") else dtype
    multiply, path = _coded_multiply(method, in_features, out_features, bits, device, dtype)
    fused = method not in _EXPANDED
    return Weights(
        "codebook" if method == "codebook-exact" else method,
        tensors,
        in_features,
        out_features,
        multiply,
        {"bits": bits, "n_codes": n_codes, "path": path},
        dtype,
        head,
        source_sha256(side.SOURCE if fused or device == "cpu" else cuda.DEQUANTIZE_SOURCE),
        ("alone", "pdl") if fused and device == "cuda" else ("alone",),
        label=f"{method}-{bits}",
        rows_a_launch=(ROWS_A_LAUNCH if device == "cuda" else 1) if fused else None,
        tolerance=INT8_TOLERANCE if path == "int8" else None,
    )


def _coded_multiply(method: str, in_features: int, out_features: int, bits: int, device: str, dtype):
    """How to multiply with codes, and which arithmetic it is."""
    if method in _EXPANDED:
        return expand_and_multiply(in_features, out_features, bits, device, dtype), "dequantize"
    if device == "cuda":
        return _multiply_cuda(in_features, out_features, bits), "table"
    exact = method == "codebook-exact" or bits == 8
    arithmetic = "exact" if exact else "int8" if method == "codebook-int8" else "int16"
    path = "torch" if cpu.active_path() == "torch" else arithmetic
    return _multiply_cpu(in_features, out_features, bits, arithmetic), path


def _multiply_cuda(in_features: int, out_features: int, bits: int):
    """Up to `ROWS_A_LAUNCH` rows in one launch, more in several."""

    def multiply(x: Tensor, w: Tensor, c: Tensor, pdl: bool = False):
        if len(x) <= ROWS_A_LAUNCH:
            rows = x[0] if len(x) == 1 else x
            return lambda: cuda.gemv(rows, w, c, in_features, bits, pdl=pdl)
        y = torch.empty(len(x), out_features, dtype=x.dtype, device=x.device)
        parts = list(zip(x.split(ROWS_A_LAUNCH), y.split(ROWS_A_LAUNCH), strict=True))

        def every():
            for rows, out in parts:
                cuda.gemv(rows, w, c, in_features, bits, out=out, pdl=pdl)
            return y

        return every

    return multiply


def _multiply_cpu(in_features: int, out_features: int, bits: int, arithmetic: str):
    """One row a call of the kernel, on the threads that torch is set to: which are best is measured outside."""

    def one(row: Tensor, w: Tensor, c: Tensor, out: Tensor | None = None) -> Tensor:
        count = torch.get_num_threads()
        return cpu.gemv(row, w, c, in_features, bits, out=out, arithmetic=arithmetic, threads=count)

    def multiply(x: Tensor, w: Tensor, c: Tensor):
        if len(x) == 1:
            return partial(one, x[0], w, c)
        y = torch.empty(len(x), out_features)
        parts = list(zip(x, y, strict=True))

        def every():
            for row, out in parts:
                one(row, w, c, out)
            return y

        return every

    return multiply


def expand_and_multiply(
    in_features: int, out_features: int, bits: int, device: str, dtype: torch.dtype | None = None
):
    """`multiply(x, codes, codebook)`: write the dense weights, then multiply with them.

    Args:
        dtype: of x and of the dense matrix; None for fp16 on CUDA and fp32 on a CPU. All calls share one matrix, as the
            layers of a model would.
    """
    dtype = dtype or (torch.float16 if device == "cuda" else torch.float32)
    out = torch.empty(out_features, in_features, dtype=dtype, device=device)
    if device == "cpu":
        return lambda x, w, c: lambda: F.linear(x, cpu.dequantize(w, c, in_features, bits, dtype, out=out))
    return lambda x, w, c: lambda: F.linear(x, cuda.dequantize(w, c, in_features, bits, dtype, "tiled", out))


def _read(
    tensors: tuple[Tensor, ...], in_features: int, out_features: int, bits: int, device: str
) -> Weights:
    """Only read the bytes of the codes: the floor of every kernel that has to."""
    codes = tensors[0].view(-1)
    on_gpu = device == "cuda"

    def multiply(_x, w, pdl=False):
        return (lambda: cuda.read(w, pdl=pdl)) if on_gpu else lambda: cpu.read_sum(w)

    return Weights(
        "read",
        (codes,),
        in_features,
        out_features,
        multiply,
        {"bits": bits},
        kernel_sha256=source_sha256(cuda.READ_SOURCE if on_gpu else cpu.SOURCE),
        chains=("alone", "pdl") if on_gpu else ("alone",),
        label=f"read-{bits}",
    )
