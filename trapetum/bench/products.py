"""The ways to compute y = W x with one row x: their weights, their calls, and how many bytes one call moves.

Weights, codes and activations are random, never zeros; every product is compared with float64 before it is timed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from trapetum import cpu, cuda
from trapetum.build import source_sha256

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
N_CODES = {8: 256, 4: 16, 3: 8, 2: 4}
INT4_GROUP = 128
CHECKED_ROWS = 256

CPU_METHODS = (
    "linear-fp32",
    "linear-bf16",
    "linear-fp16",
    "torch-int4",
    "codebook",
    "codebook-exact",
    "read",
)
CUDA_METHODS = ("linear-fp16", "linear-bf16", "mv-fp16", "tinygemm-int4", "codebook", "read")

# Relative L2 error against float64 above which a product counts as wrong and is not timed.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class NotPossible(ValueError):
    """A method cannot do this shape on this device; the message says why."""


@dataclass(frozen=True)
class Product:
    """One way to compute y = W x.

    Attributes:
        method: a record's method name.
        tensors: the weights, one copy; `clone` makes more.
        bind: `bind(*tensors, **options)` gives a call without arguments that computes y.
        io_bytes: bytes of x and y.
        config: what a record's config says beside the shape (bits, n_codes, path, ...).
        reference: float64 result for the first `CHECKED_ROWS` outputs, or None where nothing is computed.
        dtype: dtype of y.
        kernel_sha256: hash of our kernel's source, if ours.
        chains: "alone", and "pdl" where launches can overlap.
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
    label: str = field(default="")

    @property
    def weight_bytes(self) -> int:
        """Bytes of one copy of the weights, as stored."""
        return sum(t.nbytes for t in self.tensors)

    def calls(self, copies: int, **options) -> list[Callable[[], object]]:
        """Calls over `copies` distinct copies of the weights (the content is the same, the memory is not)."""
        sets = [self.tensors, *(tuple(t.clone() for t in self.tensors) for _ in range(copies - 1))]
        return [self.bind(*tensors, **options) for tensors in sets]

    def error(self) -> float | None:
        """Relative L2 error of the first outputs against float64, None where nothing is computed."""
        if self.reference is None:
            return None
        y = self.bind(*self.tensors)().reshape(-1)[: len(self.reference)].double()
        return float((y - self.reference).norm() / self.reference.norm())

    def checked_error(self) -> float | None:
        """`error`, refused when it is too large.

        Raises:
            ArithmeticError: the product is wrong, so its time would mean nothing.
        """
        error = self.error()
        if error is not None and not error <= TOLERANCE[self.dtype]:
            raise ArithmeticError(
                f"{self.method} is off by {error:.2g} against float64 (allowed {TOLERANCE[self.dtype]:g}); "
                "it is not timed."
            )
        return error


def build(method: str, in_features: int, out_features: int, bits: int, device: str) -> Product:
    """Make one product with random weights.

    Args:
        method: one of `CPU_METHODS` or `CUDA_METHODS`.
        bits: for codebook methods and `read`; ignored by the others.
        device: "cpu" or "cuda".

    Raises:
        NotPossible: this torch or this device cannot do the method at this shape.
        ValueError: the method is unknown on this device.
    """
    known = CUDA_METHODS if device == "cuda" else CPU_METHODS
    if method not in known:
        raise ValueError(f"method {method!r} is unknown on {device}; it is one of {', '.join(known)}.")
    if method in ("codebook", "codebook-exact", "read"):
        return _codebook(method, in_features, out_features, bits, device)
    if method in ("torch-int4", "tinygemm-int4"):
        return _int4(method, in_features, out_features, device)
    return _dense(method, in_features, out_features, device)


def _activation(in_features: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(in_features, device=device).to(dtype)


def _io_bytes(x: Tensor, out_features: int, y_dtype: torch.dtype) -> int:
    return x.nbytes + out_features * torch.empty(0, dtype=y_dtype).element_size()


def _dense(method: str, in_features: int, out_features: int, device: str) -> Product:
    kind, name = method.split("-")
    dtype = DTYPES[name]
    weight = (torch.randn(out_features, in_features, device=device) / math.sqrt(in_features)).to(dtype)
    x = _activation(in_features, dtype, device)
    row = x.unsqueeze(0)
    bind = {
        "linear": lambda w: lambda: F.linear(row, w),
        "mv": lambda w: lambda: torch.mv(w, x),
    }[kind]
    return Product(
        method,
        (weight,),
        bind,
        _io_bytes(x, out_features, dtype),
        {"bits": torch.finfo(dtype).bits},
        weight[:CHECKED_ROWS].double() @ x.double(),
        dtype,
    )


def _int4(method: str, in_features: int, out_features: int, device: str) -> Product:
    """PyTorch's own 4-bit product: groups of 128 inputs, a bf16 scale and zero each, bf16 activations."""
    if in_features % INT4_GROUP or out_features % 16:
        raise NotPossible(
            f"{method} needs in_features in multiples of {INT4_GROUP} and out_features of 16, "
            f"not {in_features} x {out_features}."
        )
    q = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, device=device)
    scales = torch.rand(in_features // INT4_GROUP, out_features, 2, device=device) * 0.01 + 0.001
    scales = scales.to(torch.bfloat16)
    x = _activation(in_features, torch.bfloat16, device)
    packed, multiply = _int4_operators(method, q)
    row = x.unsqueeze(0)
    return Product(
        method,
        (packed, scales),
        lambda w, s: lambda: multiply(row, w, INT4_GROUP, s),
        _io_bytes(x, out_features, torch.bfloat16),
        {"bits": 4, "group_size": INT4_GROUP},
        _int4_reference(q[:CHECKED_ROWS], scales[:, :CHECKED_ROWS], x),
        torch.bfloat16,
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


def _int4_reference(q: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    groups = (q.double() - 8).view(len(q), -1, INT4_GROUP)
    scale, zero = scales.double().unbind(-1)
    return (groups * scale.T[..., None] + zero.T[..., None]).flatten(1) @ x.double()


def _codebook(method: str, in_features: int, out_features: int, bits: int, device: str) -> Product:
    side = cuda if device == "cuda" else cpu
    if not side.available() and method == "read":
        raise NotPossible(side.why_not())
    if device == "cuda" and not cuda.available():
        raise NotPossible(cuda.why_not())
    n_codes = N_CODES[bits]
    indices = torch.randint(0, n_codes, (out_features, in_features), dtype=torch.uint8, device=device)
    codebook = torch.randn(out_features, n_codes, device=device).sort(1).values / math.sqrt(in_features)
    codebook = codebook.half()
    tensors = (side.pack(indices, bits), codebook)
    if method == "read":
        return _read(tensors, bits, device)
    first = codebook[:CHECKED_ROWS].double().gather(1, indices[:CHECKED_ROWS].long())
    dtype = torch.float16 if device == "cuda" else torch.float32
    x = _activation(in_features, dtype, device)
    bind, path = _codebook_bind(method, x, bits, device)
    return Product(
        "codebook",
        tensors,
        bind,
        _io_bytes(x, out_features, dtype),
        {"bits": bits, "n_codes": n_codes, "path": path},
        first @ x.double(),
        dtype,
        source_sha256(side.SOURCE),
        ("alone", "pdl") if device == "cuda" else ("alone",),
        label=f"{method}-{bits}",
    )


def _codebook_bind(method: str, x: Tensor, bits: int, device: str):
    """How to bind the weights, and which arithmetic it is."""
    n = len(x)
    if device == "cuda":
        return lambda w, c, pdl=False: lambda: cuda.gemv(x, w, c, n, bits, pdl=pdl), "table"
    exact = method == "codebook-exact" or bits == 8
    path = "torch" if cpu.active_path() == "torch" else "exact" if exact else "int16"
    return lambda w, c: lambda: cpu.gemv(x, w, c, n, bits, exact=exact), path


def _read(tensors: tuple[Tensor, ...], bits: int, device: str) -> Product:
    """Only read the bytes of the codes: the floor of every kernel that has to."""
    codes = tensors[0].view(-1)
    if device == "cuda":
        return Product(
            "read",
            (codes,),
            lambda w, pdl=False: lambda: cuda.read(w, pdl=pdl),
            0,
            {"bits": bits},
            kernel_sha256=source_sha256(cuda.READ_SOURCE),
            chains=("alone", "pdl"),
            label=f"read-{bits}",
        )
    sha = source_sha256(cpu.SOURCE)
    bind = lambda w: lambda: cpu.read_sum(w)  # noqa: E731
    return Product("read", (codes,), bind, 0, {"bits": bits}, kernel_sha256=sha, label=f"read-{bits}")
