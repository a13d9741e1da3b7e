"""The torch operator `trapetum::codebook_gemv` and its implementations.

    codebook_gemv(Tensor x, Tensor codes, Tensor codebook, Tensor? bias, int in_features, int bits) -> Tensor

x has 1 to `cuda.MAX_ROWS` rows. `codes` are in the layout of the device that holds them (`to_layout`); `reference_gemv` is
the slow float64 twin that every implementation is tested against. Defined with `Library.define`/`impl`, which costs a quarter
of what `torch.library.custom_op` costs per call: at batch 1 a model makes hundreds of such calls a token.
"""

import torch

from trapetum import build, cpu, cuda
from trapetum.formats import CodebookWeight, pack

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LIBRARY = torch.library.Library("trapetum", "DEF")
_LIBRARY.define(
    "codebook_gemv(Tensor x, Tensor codes, Tensor codebook, Tensor? bias, int in_features, int bits) -> Tensor"
)


def _check(
    x: torch.Tensor, codes: torch.Tensor, codebook: torch.Tensor, bias, in_features: int, bits: int
) -> None:
    if x.shape[-1:] != (in_features,) or not 1 <= x.numel() // in_features <= cuda.MAX_ROWS:
        raise ValueError(
            f"codebook_gemv multiplies 1 to {cuda.MAX_ROWS} rows of {in_features} inputs, and x has shape "
            f"{list(x.shape)}; for more rows dequantize and use a matrix product (CodebookLinear does)."
        )
    if x.dtype not in _FLOATS:
        raise TypeError(f"codebook_gemv takes float16, bfloat16 or float32 activations, not {x.dtype}.")
    if codebook.dtype != torch.float16 or codebook.dim() != 2 or not 1 <= codebook.shape[1] <= 2**bits:
        raise ValueError(
            f"the codebook must be float16 [out_features, at least 1 and at most {2**bits}] for {bits} bits, "
            f"not {codebook.dtype} {list(codebook.shape)}."
        )
    if any(t.device != x.device for t in (codes, codebook, bias) if t is not None):
        raise ValueError(
            f"x is on {x.device}, the codes on {codes.device}, the codebook on {codebook.device}"
            f"{f' and the bias on {bias.device}' if bias is not None else ''}; move them to one device."
        )
    if codes.is_cuda:
        cuda.check_packed(codes, codebook.shape[0], in_features, bits)
    if bias is not None and (bias.shape != codebook.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(
            f"the bias must be {x.dtype} [{codebook.shape[0]}] like the output, not {bias.dtype} {list(bias.shape)}."
        )


def _gemv_cuda(x, codes, codebook, bias, in_features, bits):
    _check(x, codes, codebook, bias, in_features, bits)
    if not cuda.available():
        return torch.nn.functional.linear(x, dequantize(codes, codebook, in_features, bits, x.dtype), bias)
    bias = bias.contiguous() if bias is not None else None
    rows = x.contiguous().view(-1, in_features)
    y = cuda.gemv(rows, codes, codebook.contiguous(), in_features, bits, bias)
    return y.view(*x.shape[:-1], -1)


def _gemv_cpu(x, codes, codebook, bias, in_features, bits):
    _check(x, codes, codebook, bias, in_features, bits)
    rows = x.reshape(-1, in_features).float().contiguous()
    wide_bias = bias.float() if bias is not None else None
    y = [cpu.gemv(row, codes, codebook, in_features, bits, bias=wide_bias) for row in rows]
    return torch.stack(y).to(x.dtype).view(*x.shape[:-1], -1)


def _gemv_meta(x, codes, codebook, bias, in_features, bits):
    return x.new_empty(*x.shape[:-1], codebook.shape[0])


_LIBRARY.impl("codebook_gemv", _gemv_cuda, "CUDA")
_LIBRARY.impl("codebook_gemv", _gemv_cpu, "CPU")
_LIBRARY.impl("codebook_gemv", _gemv_meta, "Meta")
codebook_gemv = torch.ops.trapetum.codebook_gemv.default


def reference_gemv(x: torch.Tensor, weight: CodebookWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product in float64 from the stored codes: slow, simple, and what the kernels are compared with.

    Args:
        x: [in_features], any float dtype.
        weight: stored codes, on x's device.
        bias: [out_features] or None.

    Returns:
        float64 [out_features].
    """
    y = weight.dequantize(torch.float64) @ x.double()
    return y if bias is None else y + bias.double()


def to_layout(weight: CodebookWeight, device: torch.device | str) -> torch.Tensor:
    """The codes of `weight` on `device`, arranged as its kernel reads them (uint8)."""
    device = torch.device(device)
    indices = weight.to(device).indices()
    if device.type == "cuda":
        return cuda.pack(indices, weight.bits)
    return cpu.pack(indices, weight.bits)


def from_layout(codes: torch.Tensor, codebook: torch.Tensor, in_features: int, bits: int) -> CodebookWeight:
    """Undo `to_layout`: the stored form, on the same device."""
    out_features = codebook.shape[0]
    if codes.is_cuda:
        indices = cuda.unpack(codes, out_features, in_features, bits)
    else:
        indices = cpu.unpack(codes, out_features, in_features, bits)
    return pack(indices, codebook, bits)


def dequantize(
    codes: torch.Tensor,
    codebook: torch.Tensor,
    in_features: int,
    bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The dense matrix [out_features, in_features] in `dtype`, from codes in their device's layout."""
    if not codes.is_cuda:
        return cpu.dequantize(codes, codebook, in_features, bits, dtype)
    if cuda.available():
        return cuda.dequantize(codes, codebook, in_features, bits, dtype)
    indices = cuda.unpack(codes, codebook.shape[0], in_features, bits)
    return codebook.gather(1, indices.long()).to(dtype)


def kernel_sha256(device_type: str) -> str:
    """SHA-256 of the GEMV source that runs on `cuda` or `cpu`: what a measured record carries."""
    return build.source_sha256(cuda.SOURCE if device_type == "cuda" else cpu.SOURCE)
