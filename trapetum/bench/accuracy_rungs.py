"""The rungs of the accuracy ladder: each name a way to quantize a whole model in place, and what it can do."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from trapetum import quantizing, swap
from trapetum.calibration import Calibration
from trapetum.quantizers import ADDITIVE, METHODS, group_rtn
from trapetum.sparse import SHARE
from trapetum.swap import Report

SPARSE = "+sparse"
GROUP = 128
GROUPED = "rtn-128"


@dataclass(frozen=True)
class Rung:
    """One way to quantize at some bits.

    Attributes:
        method: as asked for, e.g. `lnq+sparse`.
        base: without the outliers: a name of `trapetum.quantizers.METHODS`, `rtn-128` or `additive`.
        bits: per code.
        outliers: share of weights kept apart, 0 for none.
    """

    method: str
    base: str
    bits: int
    outliers: float = 0.0

    @property
    def needs(self) -> str:
        """What it needs of calibration: "", "moments", "hessian" or "guided"."""
        if self.base == ADDITIVE:
            return "hessian"  # it can do without, and is better with it
        return METHODS[self.base].needs if self.base in METHODS else ""

    @property
    def transform(self) -> str:
        """What the model goes through before: "", "awq" or "rotation"."""
        return METHODS[self.base].transform if self.base in METHODS else ""

    @property
    def seeded(self) -> bool:
        """Whether another seed, of the calibration windows or of a rotation, gives other codes."""
        return bool(self.needs or self.outliers) or self.transform == "rotation"

    @property
    def config(self) -> dict:
        """What a record says of it."""
        scheme: dict = {"bits": self.bits}
        if self.base in METHODS and self.base != ADDITIVE:
            scheme["n_codes"] = 2**self.bits
        if self.base == GROUPED:
            scheme["group_size"] = GROUP
        return scheme | ({"outliers": self.outliers} if self.outliers else {})


def names() -> list[str]:
    """Every method of the ladder, without the sparse variants."""
    return [*METHODS, GROUPED]


def rung(method: str, bits: int) -> Rung | None:
    """A rung by name, or None where the method has no such bits.

    Raises:
        ValueError: no such method.
    """
    base = method.removesuffix(SPARSE)
    if base not in names() or (method != base and base in (GROUPED, ADDITIVE)):
        raise ValueError(
            f"no method {method!r} on the ladder; choose one of {', '.join(names())}, or of the codebook methods with {SPARSE}."
        )
    able = METHODS[base].bits if base in METHODS else range(1, 9)
    return Rung(method, base, bits, SHARE if method != base else 0.0) if bits in able else None


def rungs(methods: Sequence[str], bits: Sequence[int]) -> Iterator[Rung]:
    """All rungs that exist, by bits and then by method, in the order given.

    Raises:
        ValueError: as `rung`, before the first is made.
    """
    found = [rung(method, b) for b in bits for method in methods]
    return iter([one for one in found if one is not None])


def climb(model: nn.Module, step: Rung, calibration: Calibration) -> Report:
    """Quantize a dense model in place.

    Args:
        model: a dense causal language model.
        step: the rung.
        calibration: tokens for methods that need them; its seed is that of whatever else is random.

    Raises:
        ValueError: a weight that cannot be quantized.
    """
    if step.base == GROUPED:
        return _grouped(model, step)
    more = {"outliers": step.outliers} if step.outliers else {}
    tokens = calibration if step.seeded else None  # statistics cost time and change nothing
    return quantizing.quantize_calibrated(
        model, step.bits, step.base, calibration=tokens, progress=False, **more
    )


class GroupedLinear(nn.Linear):
    """A dense layer whose values were rounded in groups: for accuracy, not for speed.

    Attributes:
        stored_bytes: what codes, scales and zero points would take.
    """

    stored_bytes: float = 0.0


@torch.no_grad()
def _grouped(model: nn.Module, step: Rung) -> Report:
    start, errors = time.perf_counter(), {}
    for name, layer in swap.linears(model):
        weight, found = layer.weight.detach().float(), group_rtn(layer.weight, step.bits, GROUP)
        errors[name] = float((found.weight - weight).double().square().sum() / weight.double().square().sum())
        made = GroupedLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        made.weight = nn.Parameter(found.weight.to(layer.weight.dtype), requires_grad=False)
        made.bias = layer.bias
        made.stored_bytes = found.bits_per_weight * weight.numel() / 8
        swap.replace(model, name, made)
    return Report(errors, time.perf_counter() - start, step.bits, 2**step.bits, step.base)


def stored_bits(reference: nn.Module, model: nn.Module) -> float:
    """Bits a weight of the quantized linears with everything that quantizing added: codebooks, outliers, scales, untied heads.

    What is left dense counts 2 bytes a number, whatever the dtype it is scored in.

    Args:
        reference: the dense model.
        model: the same one, quantized.
    """
    linears = sum(layer.weight.numel() for _, layer in swap.linears(reference))
    rest = _stored_bytes(reference) - 2 * linears
    return 8 * (_stored_bytes(model) - rest) / linears


def _stored_bytes(model: nn.Module) -> float:
    """Bytes of all distinct stored tensors: dense parameters in 16 bits, quantized ones as they are."""
    grouped = [layer for layer in model.modules() if isinstance(layer, GroupedLinear)]
    apart = {layer.weight.data_ptr() for layer in grouped}
    dense = {p.data_ptr(): 2 * p.numel() for p in model.parameters() if p.is_floating_point()}
    kept = {name for name, _ in model.named_parameters()}
    state = model.state_dict()  # buffers that are computed anew, as rope tables are, are not in it
    codes = {(t.data_ptr(), t.nbytes): t.nbytes for name, t in state.items() if name not in kept}
    shared = sum(size for (at, _), size in codes.items() if at not in dense)
    return (
        sum(size for at, size in dense.items() if at not in apart)
        + shared
        + sum(layer.stored_bytes for layer in grouped)
    )
