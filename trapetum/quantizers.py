"""Quantizers: from a dense weight matrix to codes and one codebook per output channel.

A method finds the codebook values of each row. They are then rounded to float16, as they are stored, and the codes are
chosen again for the rounded values, so that rounding never leaves a weight with its second-best code. A method that
chooses codes by more than distance returns them too, made for the rounded codebook. `METHODS` lists all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trapetum import formats, kmeans
from trapetum.formats import BITS, CodebookWeight

#: The 16 quantiles of a normal distribution that NF4 puts on [-1, 1].
#: Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
LLOYD_STEPS = 12
_LARGEST = torch.finfo(torch.float16).max
_CHUNK_WEIGHTS = 1 << 24

#: (weight float32 [rows, in], n_codes, input_weight float32 [in] or None) -> (codebook [rows, n_codes] rising, codes
#: uint8 [rows, in] or None for the nearest).
Fit = Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Method:
    """A way to choose codebooks.

    Attributes:
        description: one line for tables and `--help`.
        fit: see `Fit`.
        bits: bits per code that it supports.
        needs_calibration: whether it needs `input_weight`.
    """

    description: str
    fit: Fit
    bits: tuple[int, ...] = BITS
    needs_calibration: bool = False


def _uniform(weight: Tensor, n_codes: int) -> Tensor:
    """n_codes values at equal distances from the row's smallest to its largest."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    share = torch.arange(n_codes, dtype=torch.float32, device=weight.device) / max(1, n_codes - 1)
    return low * (1 - share) + high * share


def _fit_rtn(weight, n_codes, input_weight):
    return _uniform(weight, n_codes), None


def _fit_nf4(weight, n_codes, input_weight):
    if n_codes != len(NF4):
        raise ValueError(
            f"nf4 has {len(NF4)} codes, not {n_codes}; leave n_codes out or use method 'kmeans'."
        )
    return weight.abs().amax(1, keepdim=True) * torch.tensor(NF4, device=weight.device), None


def _fit_lloyd(weight, n_codes, input_weight):
    return kmeans.lloyd_1d(weight, _uniform(weight, n_codes), LLOYD_STEPS), None


def _fit_kmeans(weight, n_codes, input_weight):
    return kmeans.kmeans_1d(weight, n_codes)[0], None


def _fit_kmeans_weighted(weight, n_codes, input_weight):
    return kmeans.kmeans_1d(weight, n_codes, input_weight)[0], None


METHODS: dict[str, Method] = {
    "rtn": Method(
        "round to nearest on equal steps from each channel's smallest to its largest weight", _fit_rtn
    ),
    "nf4": Method("normal quantiles scaled by each channel's largest magnitude (QLoRA)", _fit_nf4, bits=(4,)),
    "lloyd": Method(f"{LLOYD_STEPS} Lloyd steps from equal steps, per channel", _fit_lloyd),
    "kmeans": Method("exact 1-D k-means per channel: the least squared weight error", _fit_kmeans),
    "kmeans-weighted": Method(
        "exact 1-D k-means with each input weighed by its mean square",
        _fit_kmeans_weighted,
        needs_calibration=True,
    ),
}


def _require_scheme(bits: int, method: str, n_codes: int | None) -> int:
    if method not in METHODS:
        raise ValueError(f"no quantization method {method!r}; choose one of {', '.join(METHODS)}.")
    if bits not in METHODS[method].bits:
        known = ", ".join(map(str, METHODS[method].bits))
        raise ValueError(f"method {method!r} does not make {bits}-bit codes; it makes {known}.")
    if n_codes is not None and not 2 <= n_codes <= 2**bits:
        raise ValueError(f"n_codes is {n_codes}; {bits} bits hold 2 to {2**bits} codes.")
    return n_codes or 2**bits


def _require_weight(weight: Tensor, name: str) -> None:
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(
            f"{name} is {weight.dtype} {list(weight.shape)}; give a floating matrix [out_features, in_features]."
        )
    nan, infinite = int(weight.isnan().sum()), int(weight.isinf().sum())
    if nan or infinite:
        raise ValueError(
            f"{name} holds {nan} NaN and {infinite} infinite values among {weight.numel()}; repair the checkpoint."
        )
    largest = float(weight.abs().max())
    if largest > _LARGEST:
        raise ValueError(
            f"{name} reaches {largest:g}, beyond the {_LARGEST:g} that a float16 codebook holds; leave it dense."
        )


def _require_input_weight(
    input_weight: Tensor | None, method: str, weight: Tensor, name: str
) -> Tensor | None:
    if not METHODS[method].needs_calibration:
        return None
    if input_weight is None:
        raise ValueError(
            f"method {method!r} weighs inputs by their mean square and got none for {name}; calibrate, or use 'kmeans'."
        )
    if input_weight.shape != weight.shape[1:]:
        raise ValueError(
            f"the input weights of {name} are {list(input_weight.shape)}; give one for each of {weight.shape[1]} inputs."
        )
    if not bool((input_weight.isfinite() & (input_weight >= 0)).all()):
        raise ValueError(
            f"the input weights of {name} hold NaN, infinite or negative values; check the calibration."
        )
    return input_weight.detach().to(weight.device, torch.float32)


def _quantize_rows(
    weight: Tensor, method: str, n_codes: int, input_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    weight = weight.to(torch.float32)
    codebook, codes = METHODS[method].fit(weight, n_codes, input_weight)
    codebook = codebook.to(torch.float16)
    return kmeans.nearest(weight, codebook) if codes is None else codes, codebook


def quantize(
    weight: Tensor,
    bits: int,
    method: str = "kmeans",
    n_codes: int | None = None,
    input_weight: Tensor | None = None,
    name: str = "weight",
) -> CodebookWeight:
    """Quantize a weight matrix, each output channel with its own codebook; the same input gives the same codes.

    Args:
        weight: floating [out_features, in_features], finite, on CPU or CUDA.
        bits: bits per code, 2, 3, 4 or 8.
        method: a name of `METHODS`.
        n_codes: codebook entries, 2 to 2**bits; default 2**bits.
        input_weight: floating [in_features], at least 0, e.g. the mean square of each input; used by the methods
            that need calibration, ignored by the others.
        name: what to call the tensor in an error.

    Returns:
        the codes and codebooks, on the weight's device.

    Raises:
        ValueError: NaN, infinity or more than float16 holds in the weight, an unknown method, or sizes that do not fit.
    """
    n_codes = _require_scheme(bits, method, n_codes)
    weight = weight.detach()
    _require_weight(weight, name)
    input_weight = _require_input_weight(input_weight, method, weight, name)
    rows = weight.split(max(1, _CHUNK_WEIGHTS // weight.shape[1]))
    parts = [_quantize_rows(part, method, n_codes, input_weight) for part in rows]
    codes, codebook = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return formats.pack(codes, codebook, bits)


def weight_error(weight: Tensor, quantized: CodebookWeight) -> float:
    """Relative squared error ||W - Q||^2 / ||W||^2 in float64; 0 is exact, 1 is what all zeros would give.

    A weight of zeros gives 0 when it is reproduced and infinity when it is not.

    Raises:
        ValueError: the shapes differ.
    """
    if tuple(weight.shape) != (quantized.out_features, quantized.in_features):
        raise ValueError(
            f"the weight is {list(weight.shape)}, the quantized one "
            f"[{quantized.out_features}, {quantized.in_features}]; compare the same layer."
        )
    squares = torch.zeros(2, dtype=torch.float64, device=weight.device)
    rows = max(1, _CHUNK_WEIGHTS // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        dense = weight[part].detach().double()
        restored = CodebookWeight(
            quantized.codes[part], quantized.codebook[part], quantized.in_features, quantized.bits
        ).dequantize(torch.float64)
        squares += torch.stack([(dense - restored).square().sum(), dense.square().sum()])
    lost, total = squares.tolist()
    return lost / total if total else (float("inf") if lost else 0.0)
