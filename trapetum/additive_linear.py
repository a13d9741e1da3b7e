"""`AdditiveLinear`: an `nn.Linear` whose weight is additive codes, and the operator that multiplies one row by it.

    additive_gemv(Tensor x, Tensor codes, Tensor codebooks, Tensor scales, Tensor? bias, int in_features) -> Tensor

On a GPU the operator is the kernel of `trapetum.cuda_additive`, and codes are packed as it reads them. Elsewhere, and for
several rows, the dense weight is written out and multiplied: on a CPU one row costs more than a dense layer would.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trapetum import additive_fit, cuda, cuda_additive
from trapetum.additive import ENTRIES, GROUP, AdditiveWeight, dequantized, require_inputs
from trapetum.calibration import Statistics

_LIBRARY = torch.library.Library("trapetum", "FRAGMENT")
_LIBRARY.define(
    "additive_gemv(Tensor x, Tensor codes, Tensor codebooks, Tensor scales, Tensor? bias, int in_features) -> Tensor"
)
_ROWS, _PACKED = 3, 4  # dimensions of codes as they are stored, and as the kernel reads them


def _stored_codes(codes: Tensor, out_features: int, in_features: int, n_codebooks: int) -> Tensor:
    """uint8 [out, in/8, n_codebooks] of either layout."""
    if codes.dim() == _ROWS:
        return codes
    return cuda_additive.unpack(codes, out_features, in_features, n_codebooks)


def dequantize(
    codes: Tensor, codebooks: Tensor, scales: Tensor, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The dense matrix [out_features, in_features] in `dtype`, from codes in either layout."""
    stored = _stored_codes(codes, len(scales), in_features, len(codebooks))
    return dequantized(stored, codebooks, scales, dtype)


def _kernel_fits(codes: Tensor, codebooks: Tensor, scales: Tensor, in_features: int) -> bool:
    """Whether the kernel takes these codes here."""
    if codes.dim() != _PACKED or not cuda.available():
        return False
    room = cuda.room_of(codes.get_device())
    return cuda_additive.plan_for(len(scales), in_features, len(codebooks), room) is not None


def _require_one_row(x: Tensor, in_features: int) -> None:
    require_inputs(x, in_features)
    if x.numel() != in_features:
        raise ValueError(
            f"additive_gemv multiplies one row of {in_features} inputs, and x has shape {list(x.shape)}; for more rows "
            "dequantize and use a matrix product (AdditiveLinear does)."
        )


def _dense(x, codes, codebooks, scales, bias, in_features):
    _require_one_row(x, in_features)
    return F.linear(x, dequantize(codes, codebooks, scales, in_features, x.dtype), bias)


def _gemv_cuda(x, codes, codebooks, scales, bias, in_features):
    if not _kernel_fits(codes, codebooks, scales, in_features):
        return _dense(x, codes, codebooks, scales, bias, in_features)
    _require_one_row(x, in_features)
    y = cuda_additive.gemv(x.reshape(-1).contiguous(), codes, codebooks, scales, bias)
    return y.view(*x.shape[:-1], -1)


def _gemv_meta(x, codes, codebooks, scales, bias, in_features):
    return x.new_empty(*x.shape[:-1], scales.shape[0])


_LIBRARY.impl("additive_gemv", _gemv_cuda, "CUDA")
_LIBRARY.impl("additive_gemv", _dense, "CPU")
_LIBRARY.impl("additive_gemv", _gemv_meta, "Meta")
additive_gemv = torch.ops.trapetum.additive_gemv.default


class AdditiveLinear(nn.Module):
    """y = x W^T + b with W read from additive codes.

    One row of x (decode) goes through `trapetum::additive_gemv`; several rows (prefill) dequantize W and multiply.

    Attributes:
        codes: uint8 buffer [out_features, in_features/8, n_codebooks]; packed for the kernel where `layout` is "device".
        codebooks: float16 buffer [n_codebooks, 256, 8]; stays float16 when the module is cast.
        scales: float16 buffer [out_features]; stays float16 too.
        bias: [out_features] buffer or None.
        in_features, out_features: sizes; in_features is a multiple of 8.
        bits: codebooks, which is bits of codes a weight: 2 or 4.
        layout: "rows" (as stored) or "device" (packed, on a GPU from the first one-row call on).
        casts: run the kernel between two casts, to float32 and back: the `naive` decode stage.
    """

    n_codes = ENTRIES
    outliers, outlier_share = None, 0.0  # none are kept apart

    def __init__(self, in_features, out_features, n_codebooks=2, bias=False, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features, self.bits = in_features, out_features, n_codebooks
        self.layout, self.casts = "rows", False
        groups, half = in_features // GROUP, {"dtype": torch.float16, "device": device}
        codes = torch.zeros(out_features, groups, n_codebooks, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("codebooks", torch.zeros(n_codebooks, ENTRIES, GROUP, **half))
        self.register_buffer("scales", torch.zeros(out_features, **half))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_weight(cls, weight: AdditiveWeight, bias: Tensor | None = None) -> "AdditiveLinear":
        """A layer around stored codes, on their device.

        Args:
            weight: codes, codebooks and scales.
            bias: [out_features] in the dtype of the activations; None for the weight's own, if it has one.
        """
        layer = cls(weight.in_features, weight.out_features, weight.n_codebooks, device="meta")
        layer.codes, layer.codebooks, layer.scales = weight.codes, weight.codebooks, weight.scales
        bias = weight.bias if bias is None else bias
        layer.bias = bias.detach() if bias is not None else None
        return layer

    def to_weight(self) -> AdditiveWeight:
        """The weight in its stored form without the bias, checked, on the layer's device."""
        codes = _stored_codes(self.codes, self.out_features, self.in_features, self.bits)
        return AdditiveWeight(codes, self.codebooks, self.scales)

    def prepare(self) -> "AdditiveLinear":
        """Pack the codes as the kernel of their device reads them; does nothing the second time, or on a CPU."""
        if self.layout == "rows" and self.codes.is_cuda:
            self.codes, self.layout = cuda_additive.pack(self.codes), "device"
        return self

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out_features, in_features]."""
        return dequantize(self.codes, self.codebooks, self.scales, self.in_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in x's dtype.

        Raises:
            ValueError: x has another last dimension.
            TypeError: x is not float16, bfloat16 or float32.
        """
        require_inputs(x, self.in_features)
        if x.numel() != self.in_features:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.dequantize(x.dtype), bias)
        self.prepare()
        return self._gemv(x.float()).to(x.dtype) if self.casts else self._gemv(x)

    def _gemv(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return additive_gemv(x, self.codes, self.codebooks, self.scales, bias, self.in_features)

    @staticmethod
    def stackable(layers: Sequence["AdditiveLinear"]) -> bool:
        """Never: each layer has codebooks of its own, and a launch looks up in one set."""
        return False

    @staticmethod
    def projection(layers: Sequence["AdditiveLinear"], dtype: torch.dtype) -> "Additive":
        """The product of the own decode step (`trapetum.projection.project` asks for it)."""
        return Additive(layers[0], dtype)

    def _apply(self, fn, recurse=True):
        kept = {name: getattr(self, name) for name in ("codes", "codebooks", "scales")}
        super()._apply(fn, recurse)
        for name in ("codebooks", "scales"):  # .to(dtype), .half(), .float() are about activations
            if getattr(self, name).dtype != torch.float16:
                setattr(self, name, kept[name].to(getattr(self, name).device))
        if self.layout == "device" and not self.codes.is_cuda:
            stored = _stored_codes(kept["codes"], self.out_features, self.in_features, self.bits)
            self.codes, self.layout = stored.to(self.codes.device), "rows"
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
            f"in_features={self.in_features}, out_features={self.out_features}, n_codebooks={self.bits}, "
            f"bias={self.bias is not None}"
        )


class Additive:
    """The product of the own decode step with one additive layer, x and y in `dtype`.

    It has no `launch`: the fused kernels of a step have no additive form, so the stages fused and pdl refuse the model.
    """

    def __init__(self, layer: AdditiveLinear, dtype: torch.dtype):
        self._layer = layer.prepare()
        self._bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.out_features = layer.out_features

    def __call__(self, x: Tensor) -> Tensor:
        """[1, in_features] to [1, out_features]."""
        layer = self._layer
        return additive_gemv(x, layer.codes, layer.codebooks, layer.scales, self._bias, layer.in_features)

    def rows(self, x: Tensor) -> Tensor:
        """[rows, in_features] to [rows, out_features]."""
        if len(x) == 1:
            return self(x)
        return F.linear(x, self._layer.dequantize(x.dtype), self._bias)


def additive_layer(
    weight: Tensor,
    bias: Tensor | None,
    bits: int,
    statistics: Statistics | None = None,
    name: str = "layer",
    seed: int = 0,
    iterations: int = additive_fit.ITERATIONS,
    objective: list[float] | None = None,
) -> tuple[AdditiveLinear, float]:
    """The additive layer of one dense weight, and its relative squared weight error.

    Args:
        weight: floating [out_features, in_features].
        bias: [out_features], kept as it is, or None.
        bits: 2 or 4, as many codebooks.
        statistics: of the layer's inputs; without a Hessian the mean squares stand for one, without any the identity.
        name: the layer, for an error.
        seed, iterations: as for `additive_fit.fit`.
        objective: gets `Fitted.objective`.

    Raises:
        AdditiveFitError: as `additive_fit.fit`.
    """
    metric = None
    if statistics is not None:
        metric = statistics.hessian
        metric = statistics.mean_square.diag().unsqueeze(0) if metric is None else metric
    found = additive_fit.fit(weight, bits, metric, iterations, seed=seed, name=f"{name}.weight")
    if objective is not None:
        objective += found.objective
    return AdditiveLinear.from_weight(found.weight, bias), additive_fit.weight_error(weight, found.weight)
