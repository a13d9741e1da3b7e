"""`CodebookLinear`: an `nn.Linear` whose weight is codes, one codebook per output channel and, where wanted, outliers apart."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trapetum import cuda, ops, sparse
from trapetum.formats import CodebookWeight
from trapetum.sparse import Outliers
from trapetum.sparse_product import sparse_add_


class CodebookLinear(nn.Module):
    """y = x W^T + b with W read from its codes.

    One row of x (decode) goes through `trapetum::codebook_gemv`, with outliers `trapetum::sparse_add_` too; several rows
    (prefill) dequantize W and multiply.

    Attributes:
        codes: uint8 buffer; `layout` says how it is arranged.
        codebook: float16 buffer [out_features, n_codes]; stays float16 when the module is cast.
        bias: [out_features] buffer or None.
        outlier_share: of the weights, kept apart in float16 (`trapetum.sparse`); 0 for none.
        outlier_values, outlier_columns, outlier_rows: buffers, the parts of `Outliers` by their names in a file, or None.
        in_features, out_features, bits: sizes.
        layout: "rows" (the stored form of `trapetum.formats`) or "device" (the kernel's own, from the first call on).
        casts: run the kernel between two casts, to float32 and back: the `naive` decode stage.
    """

    def __init__(
        self,
        in_features,
        out_features,
        bits=4,
        n_codes=None,
        bias=False,
        device=None,
        dtype=None,
        outliers: float = 0.0,
    ):
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.layout, self.casts = "rows", False
        row_bytes = -(-in_features * bits // 8)
        codes = torch.zeros(out_features, row_bytes, dtype=torch.uint8, device=device)
        codebook = torch.zeros(out_features, n_codes or 2**bits, dtype=torch.float16, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("codebook", codebook)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)
        self.outlier_share = outliers
        parts = sparse.empty(outliers, out_features, in_features, device) if outliers else None
        self._set_outliers(parts)

    def _set_outliers(self, outliers: Outliers | None) -> None:
        parts = outliers.tensors() if outliers is not None else dict.fromkeys(sparse.PARTS)
        for name, tensor in parts.items():
            self.register_buffer(name, tensor)

    @classmethod
    def from_weight(
        cls, weight: CodebookWeight, bias: Tensor | None = None, outliers: Outliers | None = None
    ) -> "CodebookLinear":
        """A layer around stored codes, on their device.

        Args:
            weight: codes and codebooks.
            bias: [out_features] in the dtype of the activations, or None.
            outliers: what is kept apart beside these codes, as `sparse.settle` leaves it, or None.
        """
        layer = cls(weight.in_features, weight.out_features, weight.bits, weight.n_codes, device="meta")
        layer.codes, layer.codebook = weight.codes, weight.codebook
        layer.bias = bias.detach() if bias is not None else None
        if outliers is not None:
            layer.outlier_share = outliers.share
            layer._set_outliers(outliers)
        return layer

    @property
    def n_codes(self) -> int:
        """Codebook entries per output channel."""
        return self.codebook.shape[1]

    @property
    def outliers(self) -> Outliers | None:
        """What is kept apart beside the codes."""
        if not self.outlier_share:
            return None
        parts = (getattr(self, name) for name in sparse.PARTS)
        return Outliers(*parts, self.in_features, self.outlier_share)

    def to_weight(self) -> CodebookWeight:
        """The codes in their stored form, on the layer's device; `outliers` are beside them."""
        if self.layout == "device":
            return ops.from_layout(self.codes, self.codebook, self.in_features, self.bits)
        return CodebookWeight(self.codes, self.codebook, self.in_features, self.bits)

    def prepare(self) -> "CodebookLinear":
        """Arrange the codes as the kernel of their device reads them; does nothing the second time."""
        if self.layout == "rows":
            self.codes = ops.to_layout(self.to_weight(), self.codes.device)
            self.layout = "device"
        return self

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out_features, in_features]."""
        if self.layout == "device":
            dense = ops.dequantize(self.codes, self.codebook, self.in_features, self.bits, dtype)
        else:
            dense = self.to_weight().dequantize(dtype)
        return self.outliers.add_to(dense) if self.outlier_share else dense

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in x's dtype.

        Raises:
            ValueError: x has another last dimension, or is not of a floating-point dtype.
        """
        if x.shape[-1:] != (self.in_features,) or not x.is_floating_point():
            raise ValueError(
                f"this layer takes floating-point [..., {self.in_features}], and x is {x.dtype} {list(x.shape)}."
            )
        rows = x.numel() // self.in_features
        if rows != 1 and not (x.is_cuda and 1 <= rows <= cuda.MAX_ROWS):
            return F.linear(x, self.dequantize(x.dtype), self.bias)
        self.prepare()
        if not self.casts:
            return self._gemv(x, self.bias)
        return self._gemv(x.float(), self.bias.float() if self.bias is not None else None).to(x.dtype)

    def _gemv(self, x, bias):
        y = ops.codebook_gemv(x, self.codes, self.codebook, bias, self.in_features, self.bits)
        if self.outlier_share:
            sparse_add_(y, x, self.outlier_values, self.outlier_columns, self.outlier_rows)
        return y

    def _apply(self, fn, recurse=True):
        codes, codebook, values = self.codes, self.codebook, self.outlier_values
        super()._apply(fn, recurse)
        if self.codebook.dtype != torch.float16:  # .to(dtype), .half(), .float() are about activations
            self.codebook = codebook.to(self.codebook.device)
        if values is not None and self.outlier_values.dtype != torch.float16:
            self.outlier_values = values.to(self.outlier_values.device)
        if self.layout == "device" and self.codes.device.type != codes.device.type:
            stored = ops.from_layout(codes, codebook, self.in_features, self.bits)
            self.codes, self.layout = stored.codes.to(self.codes.device), "rows"
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout == "device":
            destination[prefix + "codes"] = self.to_weight().codes

    def _load_from_state_dict(self, *args, **kwargs):
        if self.layout == "device":
            self.codes, self.layout = self.to_weight().codes, "rows"
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"n_codes={self.n_codes}, bias={self.bias is not None}"
            + (f", outliers={self.outlier_share:g}" if self.outlier_share else "")
        )
