"""The scale search of AWQ: inputs with large activations get finer steps, at no cost while decoding.

For each place of a decoder layer, scales s_j = (root mean square of input j)^alpha multiply the columns of the weights that
read it and are divided out of what feeds them (`trapetum.equivalence.scale_inputs`). Of 20 exponents the one is kept whose
rounding error, as the outputs see it, is least: the sum over the place's linears of tr(D H D^T) / tr(W H W^T), with
D = Q(W s) / s - W and H of the unscaled inputs. Places are searched one after the other, in the order of `PLACES`.

What differs from the published search: the root of the mean square stands for the mean of |x|, since that is what
`Statistics` holds; the error is the form above instead of the difference of a whole attention or MLP output; and rounding
is per row, as the codebooks are, instead of per group.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv:2306.00978.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trapetum import equivalence, kmeans
from trapetum.calibration import Statistics
from trapetum.equivalence import PLACES
from trapetum.grids import row_uniform

#: The exponents that are tried; 0 leaves a place as it is.
ALPHAS = tuple(step / 20 for step in range(20))
_SMALLEST = (
    1e-4  # of a root mean square against the place's largest, so that an input that is always 0 has a scale
)


@dataclass(frozen=True)
class Scaled:
    """What `awq_block` did to a decoder layer.

    Attributes:
        statistics: of every linear that it was given, by the same names, in the scaled inputs' units.
        alphas: the exponent chosen at each place.
        errors: relative rounding error at each place without scales and with the chosen ones: the sum over the place's
            linears of tr(D H D^T) / tr(W H W^T).
    """

    statistics: dict[str, Statistics]
    alphas: dict[str, float]
    errors: dict[str, tuple[float, float]]

    @property
    def text(self) -> str:
        """The chosen exponents, for a log or a saved config."""
        return "awq alphas: " + ", ".join(f"{place} {alpha:.2f}" for place, alpha in self.alphas.items())


def scaled(statistics: Statistics, inputs: Tensor) -> Statistics:
    """Statistics of x / inputs from those of x.

    Args:
        statistics: of a linear's inputs.
        inputs: floating [in_features], positive.
    """
    inverse = inputs.to(statistics.mean_square.device, torch.float64).reciprocal()
    hessian = statistics.hessian
    if hessian is not None:
        inverse_there = inverse.to(hessian.device, torch.float32)
        hessian = hessian * inverse_there * inverse_there.unsqueeze(1)
    mean_square = (statistics.mean_square.double() * inverse.square()).float()
    return replace(statistics, hessian=hessian, mean_square=mean_square)


def _rounded(weight: Tensor, n_codes: int) -> Tensor:
    grid = row_uniform(weight, n_codes)
    return grid.gather(1, kmeans.nearest(weight, grid).long())


def _form(rows: Tensor, statistics: Statistics) -> Tensor:
    """tr(R H R^T) in float64, each group of rows with its own Hessian; of the diagonal alone where that is all there is."""
    if statistics.hessian is None:
        return (rows.double().square() * statistics.mean_square.to(rows.device)).sum()
    groups = len(statistics.hessian)
    of_row = torch.arange(len(rows), device=rows.device) * groups // len(rows)
    parts = (rows[of_row == group] for group in range(groups))
    hessians = statistics.hessian.to(rows.device)
    products = (((part @ h) * part).sum(dtype=torch.float64) for part, h in zip(parts, hessians, strict=True))
    return torch.stack(list(products)).sum()


def _error(weights: list[Tensor], known: list[Statistics], inputs: Tensor, n_codes: int) -> float:
    """The relative rounding error of a place's linears under a scale of their inputs."""
    total = 0.0
    for weight, statistics in zip(weights, known, strict=True):
        there = inputs.to(weight.device, torch.float32)
        difference = _rounded(weight * there, n_codes) / there - weight
        size = float(_form(weight, statistics))
        total += float(_form(difference, statistics)) / size if size > 0 else 0.0
    return total


def _magnitudes(block: nn.Module, place: str, known: list[Statistics]) -> Tensor:
    """Root mean square of what each scale of a place acts on, float64 [channels]; over the query heads that share it."""
    square = known[0].mean_square.double()
    count = equivalence.channels(block, place)
    if len(square) != count:
        dim = block.self_attn.head_dim
        square = square.unflatten(0, (count // dim, -1, dim)).mean(1).flatten()
    root = square.sqrt()
    largest = float(root.max())
    return root.clamp_min(_SMALLEST * largest) if largest > 0 else torch.ones_like(root)


def _scale(magnitudes: Tensor, alpha: float) -> Tensor:
    powers = magnitudes**alpha
    return powers / (powers.max() * powers.min()).sqrt()


def _search(
    block: nn.Module, place: str, known: list[Statistics], n_codes: int
) -> tuple[float, Tensor, tuple]:
    """The best exponent, its scales, and the errors without and with them."""
    weights = [block.get_submodule(name).weight.detach().float() for name in PLACES[place]]
    magnitudes = _magnitudes(block, place, known)
    scales = [_scale(magnitudes, alpha) for alpha in ALPHAS]
    errors = [_error(weights, known, equivalence.spread(block, place, s), n_codes) for s in scales]
    best = errors.index(min(errors))
    return ALPHAS[best], scales[best], (errors[0], errors[best])


def _names(statistics: Mapping[str, Statistics], place: str) -> list[str]:
    """The caller's names of a place's linears."""
    found = []
    for name in PLACES[place]:
        matching = [key for key in statistics if key == name or key.endswith(f".{name}")]
        if len(matching) != 1:
            raise ValueError(
                f"{len(matching)} of the {len(statistics)} statistics are of a {name}; give those of all "
                "linears of one decoder layer."
            )
        found += matching
    return found


def _require_sizes(block: nn.Module, statistics: Mapping[str, Statistics]) -> None:
    for place in PLACES:
        for name, key in zip(PLACES[place], _names(statistics, place), strict=True):
            inputs, known = block.get_submodule(name).in_features, len(statistics[key].mean_square)
            if inputs != known:
                raise ValueError(
                    f"{key} has {inputs} inputs, and its statistics are of {known}; calibrate this model."
                )


@torch.no_grad()
def awq_block(
    block: nn.Module, statistics: Mapping[str, Statistics], bits: int, n_codes: int | None = None
) -> Scaled:
    """Find scales for the four places of a decoder layer and fold them in, in place.

    Args:
        block: a dense decoder layer of a supported architecture.
        statistics: of the inputs of all its linears before any of this, by name in the layer ("mlp.up_proj") or in the
            model ("model.layers.3.mlp.up_proj"). Without a Hessian the error counts its diagonal only.
        bits: bits per code.
        n_codes: codes that rounding has; default 2**bits.

    Returns:
        the statistics after scaling, the exponents, and the errors.

    Raises:
        ValueError: statistics are missing or of other sizes, a quantized layer, or a scaled value that the weights' dtype
            cannot hold.
    """
    _require_sizes(block, statistics)
    after, alphas, errors = dict(statistics), {}, {}
    for place in PLACES:
        names = _names(statistics, place)
        alphas[place], scale, errors[place] = _search(
            block, place, [statistics[name] for name in names], n_codes or 2**bits
        )
        equivalence.scale_inputs(block, place, scale)
        inputs = equivalence.spread(block, place, scale)
        after |= {name: scaled(statistics[name], inputs) for name in names}
    return Scaled(after, alphas, errors)
