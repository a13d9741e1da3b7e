"""Replace the linear layers of a model: dense to codebook (quantized, or random for timing) and back."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from trapetum import sparse
from trapetum.additive import GROUP
from trapetum.additive_linear import AdditiveLinear, additive_layer
from trapetum.calibration import Statistics, made_of
from trapetum.formats import CodebookWeight, pack
from trapetum.linear import CodebookLinear
from trapetum.quantizers import ADDITIVE, METHODS, quantize, require_scheme, weight_error

HEAD = "lm_head"
#: The layers that hold codes: with one codebook per output channel, and with additive ones.
CODED = (CodebookLinear, AdditiveLinear)
_RANDOM_STD = 0.02


@dataclass(frozen=True)
class Report:
    """What `quantize_model` did.

    Attributes:
        errors: relative squared weight error by layer name, ||W-Q||^2 / ||W||^2.
        seconds: wall time, calibration included.
        bits, n_codes, method: the scheme.
        output_errors: relative squared error of the outputs over the calibration tokens by layer name,
            trace(D H D^T) / trace(W H W^T) with D = W - Q and the plain Hessian H; empty without calibration.
        objectives: what the method minimized, after each of its steps, by layer name, where it tells.
        phases: seconds by phase of a calibrated run.
    """

    errors: dict[str, float]
    seconds: float
    bits: int
    n_codes: int
    method: str
    output_errors: dict[str, float] = field(default_factory=dict)
    objectives: dict[str, list[float]] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def mean_error(self) -> float:
        """Mean of the layers' relative squared errors."""
        return sum(self.errors.values()) / len(self.errors)

    @property
    def mean_output_error(self) -> float | None:
        """Mean of the layers' relative squared output errors, or None without calibration."""
        return sum(self.output_errors.values()) / len(self.output_errors) if self.output_errors else None


def linears(model: nn.Module, lm_head: bool = False) -> list[tuple[str, nn.Linear]]:
    """The dense linear layers of `model` by name, in order; the output head only if asked for."""
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return [(name, layer) for name, layer in found if lm_head or name != HEAD]


def codebook_layers(model: nn.Module) -> list[tuple[str, CodebookLinear]]:
    """The codebook layers of `model` by name, in order."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, CodebookLinear)]


def additive_layers(model: nn.Module) -> list[tuple[str, AdditiveLinear]]:
    """The additive layers of `model` by name, in order."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, AdditiveLinear)]


def coded_layers(model: nn.Module) -> list[tuple[str, CodebookLinear | AdditiveLinear]]:
    """The layers of `model` that hold codes of either kind, by name, in order."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, CODED)]


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of `model` holds codes."""
    return any(isinstance(layer, CODED) for layer in model.modules())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all distinct parameters and codebook weights; a tied embedding counts once, rope tables do not."""
    tensors = list(model.parameters())
    for _, layer in coded_layers(model):
        tensors += [tensor for tensor in layer.buffers()]
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors}.values())


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place that `name` has in `model`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _bias(layer: nn.Linear) -> Tensor | None:
    return layer.bias.detach() if layer.bias is not None else None


def require_outliers(method: str, outliers: float) -> None:
    """Refuse a share of outliers that no layer could keep apart; 0 is none.

    Raises:
        ValueError: out of range, or beside a method that has no place for them.
    """
    if not outliers:
        return
    sparse.require_share(outliers)
    if method == ADDITIVE:
        raise ValueError(
            f"outliers ({outliers:g} of the weights) are kept apart beside one codebook a channel, not beside additive ones; "
            "leave them out, or take another method."
        )


def require_groups(method: str, layers: Sequence[tuple[str, nn.Linear]]) -> None:
    """Refuse, before any layer is quantized, a method that cannot hold all of them.

    Raises:
        ValueError: additive codebooks, and a layer whose inputs are no multiple of 8.
    """
    odd = [(name, layer.in_features) for name, layer in layers if layer.in_features % GROUP]
    if method == ADDITIVE and odd:
        name, inputs = odd[0]
        raise ValueError(
            f"{name} has {inputs} inputs, and additive codebooks store groups of {GROUP}; take another method."
        )


def quantized_layer(
    weight: Tensor,
    bias: Tensor | None,
    bits: int,
    method: str,
    n_codes: int | None,
    statistics: Statistics | None = None,
    name: str = "layer",
    outliers: float = 0.0,
    objective: list[float] | None = None,
) -> tuple[CodebookLinear | AdditiveLinear, float]:
    """The layer of codes of one dense weight, and its relative squared weight error.

    Args:
        weight: floating [out_features, in_features].
        bias: [out_features], kept as it is, or None.
        bits, method, n_codes, statistics: as for `trapetum.quantizers.quantize`.
        name: the layer, for an error.
        outliers: share of the weights that is kept apart in float16 (`trapetum.sparse`); 0 for none.
        objective: gets what the method minimised, step by step, if it tells.

    Raises:
        ValueError: as `trapetum.quantizers.quantize` and `trapetum.sparse.split`.
    """
    require_outliers(method, outliers)
    if method == ADDITIVE:
        require_scheme(bits, method, n_codes)
        return additive_layer(weight, bias, bits, statistics, name, objective=objective)
    name = f"{name}.weight"
    if not outliers:
        quantized = quantize(weight, bits, method, n_codes, statistics, name=name, objective=objective)
        return CodebookLinear.from_weight(quantized, bias), float(weight_error(weight, quantized))
    rest, apart = sparse.split(weight, statistics, outliers, name)
    quantized = quantize(rest, bits, method, n_codes, statistics, name=name, objective=objective)
    quantized, apart = sparse.settle(quantized, apart, name)
    return CodebookLinear.from_weight(quantized, bias, apart), sparse.weight_error(weight, quantized, apart)


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    bits: int = 4,
    method: str = "kmeans",
    n_codes: int | None = None,
    lm_head: bool = False,
    calibration: Sequence[Tensor] | None = None,
    progress: bool = True,
    outliers: float = 0.0,
) -> Report:
    """Replace each `nn.Linear` by a `CodebookLinear`, in place and layer by layer, so that one layer at most is held twice.

    Args:
        model: a transformers causal language model.
        bits: bits per code (2, 3, 4, 8).
        method: a name of `trapetum.quantizers.METHODS`.
        n_codes: codebook entries per output channel; default 2**bits (of additive codebooks always 256).
        lm_head: quantize the output head too (a tied embedding keeps its dense weight).
        calibration: rows of token ids, for methods that weigh the inputs; additive codebooks take them or leave them.
        progress: show a progress bar.
        outliers: share of the weights of each layer that is kept apart in float16 (`trapetum.sparse`), 0 for none; chosen by
            size, and where there are statistics a ninth by what they add to the output.

    Raises:
        ValueError: unknown method, missing calibration, nothing to quantize, or a weight that is NaN or infinite (by name).
    """
    known = METHODS.get(method)
    if known is not None and (known.needs_calibration or calibration and method == ADDITIVE):
        from trapetum.quantizing import quantize_calibrated  # which is made of this module

        wanted = known.needs or method == ADDITIVE
        tokens = made_of(calibration) if wanted and calibration else None
        return quantize_calibrated(model, bits, method, tokens, n_codes, lm_head, progress, outliers=outliers)
    start, layers, errors = time.perf_counter(), linears(model, lm_head), {}
    if not layers:
        raise ValueError("the model has no dense linear layers left to quantize; load the dense checkpoint.")
    require_groups(method, layers)
    for name, layer in tqdm(layers, desc=f"quantize to {bits} bits", unit="layer", disable=not progress):
        made, errors[name] = quantized_layer(
            layer.weight.detach(), _bias(layer), bits, method, n_codes, name=name, outliers=outliers
        )
        replace(model, name, made)
    note_method(model, method)
    codes = require_scheme(bits, method, n_codes)
    return Report(errors, time.perf_counter() - start, bits, codes, method)


def note_method(model: nn.Module, method: str, described: dict | None = None) -> None:
    """Remember the method for `models.save`, on the model, where the codes are.

    Args:
        model: quantized.
        method: its name.
        described: how the codes were made, as JSON holds it: calibration, seed, versions.
    """
    model.trapetum_method = method
    model.trapetum_quantization = described or {"method": method}


def _normal_quantiles(n_codes: int) -> Tensor:
    middle = (torch.arange(n_codes, dtype=torch.float64) + 0.5) / n_codes
    return math.sqrt(2) * torch.erfinv(2 * middle - 1)


def random_weight(
    out_features: int, in_features: int, bits: int, generator: torch.Generator, n_codes: int | None = None
) -> CodebookWeight:
    """Random codes with a normal-quantile codebook (standard deviation 0.02), made on the generator's device.

    Speed does not depend on the codes, so timing needs no k-means.
    """
    device, n_codes = generator.device, n_codes or 2**bits
    values = (_RANDOM_STD * _normal_quantiles(n_codes)).to(device, torch.float16)
    codebook = values.expand(out_features, n_codes).contiguous()
    if n_codes == 2**bits and in_features * bits % 64 == 0:  # any 64 bits are a valid run of codes
        low, high = -(2**63), 2**63 - 1
        shape = (out_features, in_features * bits // 64)
        codes = torch.randint(low, high, shape, device=device, generator=generator).view(torch.uint8)
        return CodebookWeight(codes, codebook, in_features, bits)
    shape = (out_features, in_features)
    indices = torch.randint(n_codes, shape, dtype=torch.uint8, device=device, generator=generator)
    return pack(indices, codebook, bits)


@torch.no_grad()
def randomize_codes(
    model: nn.Module,
    bits: int = 4,
    seed: int = 0,
    lm_head: bool = False,
    n_codes: int | None = None,
    device: str | torch.device | None = None,
) -> None:
    """Replace each `nn.Linear` by a `CodebookLinear` of random codes, in place; for timing, not for reading.

    Args:
        model: the weights may still be on the meta device.
        bits: bits per code.
        seed: of the codes.
        lm_head: replace the output head too.
        n_codes: codebook entries per output channel; default 2**bits.
        device: where to make the codes; default the device of each weight.
    """
    generators: dict = {}
    for name, layer in linears(model, lm_head):
        place = torch.device(device if device is not None else layer.weight.device)
        if place not in generators:
            generators[place] = torch.Generator(place).manual_seed(seed)
        weight = random_weight(layer.out_features, layer.in_features, bits, generators[place], n_codes)
        replace(model, name, CodebookLinear.from_weight(weight, _bias(layer)))
    note_method(model, "random")


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace each layer of codes by the `nn.Linear` with the same values, in place: the dense twin.

    Args:
        model: a quantized model.
        dtype: of the dense weights; default the model's own.

    Returns:
        the same model.
    """
    dtype = dtype or next(model.parameters()).dtype
    for name, layer in coded_layers(model):
        replace(model, name, _dense(layer, dtype))
    return model


def _dense(layer: CodebookLinear | AdditiveLinear, dtype: torch.dtype) -> nn.Linear:
    has_bias = layer.bias is not None
    dense = nn.Linear(layer.in_features, layer.out_features, bias=has_bias, device="meta")
    dense.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
    if has_bias:
        dense.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return dense
