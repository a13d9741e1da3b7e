"""Quantizers: from a dense weight matrix to codes and one codebook per output channel.

A method finds the codebook values of each row. They are then rounded to float16, as they are stored, and the codes are
chosen again for the rounded values, so that rounding never leaves a weight with its second-best code. A method that
chooses codes by more than distance returns them too, made for the rounded codebook. `METHODS` lists all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trapetum import formats, grids, kmeans
from trapetum.calibration import Statistics
from trapetum.formats import BITS, CodebookWeight
from trapetum.gptq import gptq
from trapetum.grids import GroupedWeight, group_rtn  # noqa: F401  (others take both from here)
from trapetum.lnq import lnq
from trapetum.quadratic import require_hessian, row_groups

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
#: The method whose weights are `trapetum.additive.AdditiveWeight`, not `CodebookWeight`.
ADDITIVE, ADDITIVE_CODES = "additive", 256
_LARGEST = torch.finfo(torch.float16).max
_CHUNK_WEIGHTS = 1 << 24

#: (weight float32 [rows, in], n_codes, statistics or None) -> (codebook [rows, n_codes] rising, codes uint8 [rows, in]
#: made for the codebook in float16, or None for the nearest), and from methods that log it what they minimised, step by step.
Fit = Callable[[Tensor, int, Statistics | None], tuple]


@dataclass(frozen=True)
class Method:
    """A way to choose codebooks.

    Attributes:
        description: one line for tables and `--help`.
        fit: see `Fit`.
        bits: bits per code that it supports.
        needs: of calibration: "" nothing, "moments" the mean square of each input, "hessian" the second moments of
            all pairs of inputs, "guided" the same weighted by the gradients of the loss, for groups of rows.
        transform: what the model goes through before its weights are quantized: "" nothing, "awq" or "rotation".
    """

    description: str
    fit: Fit
    bits: tuple[int, ...] = BITS
    needs: str = ""
    transform: str = ""

    @property
    def needs_calibration(self) -> bool:
        """Whether a step over the whole model comes before its weights."""
        return bool(self.needs or self.transform)

    @property
    def needs_hessian(self) -> bool:
        """Whether `fit` takes a Hessian; it then sees all rows of a layer at once."""
        return self.needs in ("hessian", "guided")


def _fit_rtn(weight, n_codes, statistics):
    return grids.row_uniform(weight, n_codes), None


def _fit_nf4(weight, n_codes, statistics):
    if n_codes != len(NF4):
        raise ValueError(
            f"nf4 has {len(NF4)} codes, not {n_codes}; leave n_codes out or use method 'kmeans'."
        )
    return weight.abs().amax(1, keepdim=True) * torch.tensor(NF4, device=weight.device), None


def _fit_lloyd(weight, n_codes, statistics):
    return kmeans.lloyd_1d(weight, grids.row_uniform(weight, n_codes), LLOYD_STEPS), None


def _fit_kmeans(weight, n_codes, statistics):
    return kmeans.kmeans_1d(weight, n_codes)[0], None


def _fit_kmeans_weighted(weight, n_codes, statistics):
    return kmeans.kmeans_1d(weight, n_codes, statistics.mean_square)[0], None


def _fit_awq(weight, n_codes, statistics):
    parts = row_groups(len(weight), len(statistics.hessian))
    return torch.cat([grids.clipped(weight[rows], n_codes, statistics.hessian[g]) for g, rows in parts]), None


def _fit_gptq(weight, n_codes, statistics):
    return gptq(weight, n_codes, statistics.hessian)


def _fit_lnq(weight, n_codes, statistics):
    fitted = lnq(weight, n_codes, statistics.hessian)
    return fitted.codebook, fitted.codes, fitted.objective


def _fit_additive(weight, n_codes, statistics):
    raise ValueError(
        "method 'additive' makes codebooks of whole matrices, which codes of one channel do not have; use "
        "trapetum.additive_fit.fit, or quantize a model with it."
    )


METHODS: dict[str, Method] = {
    "rtn": Method(
        "round to nearest on equal steps from each channel's smallest to its largest weight", _fit_rtn
    ),
    "nf4": Method("normal quantiles scaled by each channel's largest magnitude (QLoRA)", _fit_nf4, bits=(4,)),
    "lloyd": Method(f"{LLOYD_STEPS} Lloyd steps from equal steps, per channel", _fit_lloyd),
    "kmeans": Method("exact 1-D k-means per channel: the least squared weight error", _fit_kmeans),
    "kmeans-weighted": Method(
        "exact 1-D k-means with each input weighed by its mean square", _fit_kmeans_weighted, needs="moments"
    ),
    "awq": Method(
        "equal steps over a clipped range, after inputs with large activations are scaled up (AWQ)",
        _fit_awq,
        needs="hessian",
        transform="awq",
    ),
    "gptq-codebook": Method(
        "codebooks from weighted k-means, codes by error feedback (GPTQ)", _fit_gptq, needs="hessian"
    ),
    "lnq": Method(
        "codebooks and codes of least output error, by least squares and coordinate descent in turns (LNQ)",
        _fit_lnq,
        needs="hessian",
    ),
    "lnq-guided": Method(
        "lnq on second moments weighted by the gradients of the loss (GuidedQuant)", _fit_lnq, needs="guided"
    ),
    "rotation": Method(
        "exact 1-D k-means after rotations folded into the weights", _fit_kmeans, transform="rotation"
    ),
    ADDITIVE: Method(
        "sums of looked-up vectors of 8 weights, 2 or 4 codebooks a matrix (AQLM); better with calibration",
        _fit_additive,
        bits=(2, 4),
    ),
}
_ELSEWHERE = {
    "rtn-128": "rtn-128 keeps a scale and a zero point for each 128 inputs; this format stores one codebook a channel, so "
    "use trapetum.quantizers.group_rtn to measure it, or method 'rtn'."
}


def _require_scheme(bits: int, method: str, n_codes: int | None) -> int:
    if method in _ELSEWHERE:
        raise ValueError(_ELSEWHERE[method])
    if method not in METHODS:
        raise ValueError(f"no quantization method {method!r}; choose one of {', '.join(METHODS)}.")
    if bits not in METHODS[method].bits:
        known = ", ".join(map(str, METHODS[method].bits))
        raise ValueError(f"method {method!r} does not make {bits}-bit codes; it makes {known}.")
    if method == ADDITIVE:
        if n_codes not in (None, ADDITIVE_CODES):
            raise ValueError(
                f"n_codes is {n_codes}; additive codebooks have {ADDITIVE_CODES} entries, so leave it out."
            )
        return ADDITIVE_CODES
    if n_codes is not None and not 2 <= n_codes <= 2**bits:
        raise ValueError(f"n_codes is {n_codes}; {bits} bits hold 2 to {2**bits} codes.")
    return n_codes or 2**bits


def require_scheme(bits: int, method: str, n_codes: int | None = None) -> int:
    """Refuse a scheme that no weight could have.

    Returns:
        the number of codes: `n_codes`, or what the method makes by default.

    Raises:
        ValueError: an unknown method, or bits or a number of codes that it does not make.
    """
    found = _require_scheme(bits, method, n_codes)
    if method != ADDITIVE:  # the fit knows the rest
        one = Statistics(torch.ones(1, 1, 1), torch.ones(1), 1)
        quantize(torch.zeros(1, 1), bits, method, n_codes, one)
    return found


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


def _require_mean_square(mean_square: Tensor, weight: Tensor, name: str) -> Tensor:
    if mean_square.shape != weight.shape[1:]:
        raise ValueError(
            f"the input weights of {name} are {list(mean_square.shape)}; give one for each of {weight.shape[1]} inputs."
        )
    if not bool((mean_square.isfinite() & (mean_square >= 0)).all()):
        raise ValueError(
            f"the input weights of {name} hold NaN, infinite or negative values; check the calibration."
        )
    return mean_square.detach().to(weight.device, torch.float32)


def _require_statistics(
    given: Statistics | None, method: str, weight: Tensor, name: str
) -> Statistics | None:
    """What `method` may use of the statistics, checked, on the weight's device."""
    scheme = METHODS[method]
    if not scheme.needs:
        return None
    if given is None:
        raise ValueError(
            f"method {method!r} weighs inputs by their mean square and got none for {name}; calibrate, or use 'kmeans'."
        )
    mean_square = _require_mean_square(given.mean_square, weight, name)
    if not scheme.needs_hessian:
        return Statistics(None, mean_square, given.tokens)
    if given.hessian is None:
        raise ValueError(
            f"method {method!r} needs the Hessian of the inputs of {name}; calibrate for it, or use 'kmeans-weighted'."
        )
    require_hessian(given.hessian, weight.shape[1], name)
    return Statistics(given.hessian.detach().to(weight.device), mean_square, given.tokens)


def _quantize_rows(
    weight: Tensor, method: str, n_codes: int, statistics: Statistics | None
) -> tuple[Tensor, Tensor, list[float]]:
    weight = weight.to(torch.float32)
    codebook, codes, *logged = METHODS[method].fit(weight, n_codes, statistics)
    codebook = codebook.to(torch.float16)
    codes = kmeans.nearest(weight, codebook) if codes is None else codes
    return codes, codebook, logged[0] if logged else []


def quantize(
    weight: Tensor,
    bits: int,
    method: str = "kmeans",
    n_codes: int | None = None,
    statistics: Statistics | None = None,
    name: str = "weight",
    input_weight: Tensor | None = None,
    objective: list[float] | None = None,
) -> CodebookWeight:
    """Quantize a weight matrix, each output channel with its own codebook; the same input gives the same codes.

    A method's transform (`Method.transform`) is the caller's: it changes the model, here the weight is taken as it is.

    Args:
        weight: floating [out_features, in_features], finite, on CPU or CUDA.
        bits: bits per code, 2, 3, 4 or 8.
        method: a name of `METHODS`.
        n_codes: codebook entries, 2 to 2**bits; default 2**bits.
        statistics: of the layer's inputs, for the methods that need them; ignored by the others.
        name: what to call the tensor in an error.
        input_weight: floating [in_features], at least 0, the mean square of each input: short for statistics with
            nothing else.
        objective: gets what the method minimised, at its start and after each of its steps, if it tells.

    Returns:
        the codes and codebooks, on the weight's device.

    Raises:
        ValueError: NaN, infinity or more than float16 holds in the weight, an unknown method, sizes that do not fit, or
            statistics that are missing or damaged.
    """
    n_codes = _require_scheme(bits, method, n_codes)
    weight = weight.detach()
    _require_weight(weight, name)
    if statistics is None and input_weight is not None:
        statistics = Statistics(None, input_weight, 0)
    statistics = _require_statistics(statistics, method, weight, name)
    whole = METHODS[method].needs_hessian  # a Hessian belongs to a group of rows, which chunks would not keep
    rows = [weight] if whole else weight.split(max(1, _CHUNK_WEIGHTS // weight.shape[1]))
    parts = [_quantize_rows(part, method, n_codes, statistics) for part in rows]
    if objective is not None:
        objective += parts[0][2]  # only methods that see all rows at once log one
    codes, codebook = (torch.cat([part[i] for part in parts]) for i in (0, 1))
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
