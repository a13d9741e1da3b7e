"""A model quantized by torchao's public `quantize_`, in each of the ways of torchao's own list of decode speeds.

torchao moves and drops its configurations between releases. Each way here is asked for under the names it has had; one that the
installed release no longer has ends as one sentence.
Source: https://github.com/pytorch/ao, torchao/quantization/README.md, and https://docs.pytorch.org/ao
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata

import torch
from torch import Tensor, nn

from trapetum import swap
from trapetum.bench.products import NotPossible


@dataclass(frozen=True)
class Way:
    """One way to quantize.

    Attributes:
        quantize: `quantize(model, step)` changes the model; `step()` decodes a token, for ways that choose by timing.
        dtype: "bf16" or "fp16", of the dense model and the activations.
        config: what a record says: bits, group_size, ...
    """

    quantize: Callable[[nn.Module, Callable[[], object]], None]
    dtype: str
    config: dict


def version() -> str:
    """The installed release, or "" where there is none."""
    try:
        return metadata.version("torchao")
    except metadata.PackageNotFoundError:
        return ""


def require_installed() -> None:
    """Refuse where there is no torchao.

    Raises:
        NotPossible: it is not installed.
    """
    if not version():
        raise NotPossible("torchao is not installed (pip install -e '.[peers]').")


def _have(what: str, *places: str):
    """The first of `places` ("module:name") that this release has.

    Raises:
        NotPossible: it has none; `what` is named.
    """
    for place in places:
        module, _, name = place.partition(":")
        try:
            return getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise NotPossible(f"torchao {version()} has no {what} (looked for {', '.join(places)}).")


def _quantize(model: nn.Module, config) -> None:
    _have("quantize_", "torchao.quantization:quantize_", "torchao:quantize_")(model, config)


def _int8_weights(model: nn.Module, _step) -> None:
    _quantize(model, _have("int8 weight-only", "torchao.quantization:Int8WeightOnlyConfig")())


def _int8_dynamic(model: nn.Module, _step) -> None:
    name = "torchao.quantization:Int8DynamicActivationInt8WeightConfig"
    _quantize(model, _have("int8 dynamic activation", name)())


def _int4_weights(model: nn.Module, _step) -> None:
    make = _have("int4 weight-only", "torchao.quantization:Int4WeightOnlyConfig")
    try:
        config = make(group_size=64, int4_packing_format="tile_packed_to_4d")
    except TypeError:  # releases before that argument had tinygemm's layout as their default
        config = make(group_size=64)
    _quantize(model, config)


def _fp6(model: nn.Module, _step) -> None:
    places = ("torchao.quantization:FPXWeightOnlyConfig", "torchao.quantization:fpx_weight_only")
    moved = "torchao.prototype.quantization:FPXWeightOnlyConfig"
    _quantize(model, _have("fp6", *places, moved)(3, 2))


def _autoquant(model: nn.Module, step) -> None:
    """Let it time its candidates on the shapes of one decoded token."""
    places = ("torchao:autoquant", "torchao.quantization:autoquant")
    made = _have("autoquant", *places)(model, manual=True)
    step()
    made.finalize_autoquant()


def prune_two_of_four(weight: Tensor) -> Tensor:
    """`weight` [out, in] with the two smallest of every four inputs set to zero."""
    fours = weight.unflatten(-1, (-1, 4))
    kept = fours.abs().topk(2, -1).indices
    return torch.zeros_like(fours).scatter(-1, kept, fours.gather(-1, kept)).flatten(-2)


def _sparse(model: nn.Module, _step) -> None:
    """2:4: half of every four weights, by size. The head stays dense."""
    places = ("torchao.sparsity:semi_sparse_weight", "torchao.sparsity:SemiSparseWeightConfig")
    config = _have("2:4 sparsity", *places)()
    apply = _have("sparsify_", "torchao.sparsity:sparsify_")
    layers = dict(swap.linears(model))
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.copy_(prune_two_of_four(layer.weight))
    apply(model, config, filter_fn=lambda _, name: name in layers)


WAYS = {
    "torchao-int8wo": Way(_int8_weights, "bf16", {"bits": 8}),
    "torchao-int8dq": Way(_int8_dynamic, "bf16", {"bits": 8, "activations": "int8"}),
    "torchao-int4wo-64": Way(_int4_weights, "bf16", {"bits": 4, "group_size": 64}),
    "torchao-fp6": Way(_fp6, "fp16", {"bits": 6}),
    "torchao-autoquant": Way(_autoquant, "bf16", {"bits": None}),  # it chooses a layer at a time
    "torchao-sparse-24": Way(_sparse, "bf16", {"bits": 16, "sparsity": "2:4", "lm_head": "bf16"}),
}


def quantize(method: str, model: nn.Module, step: Callable[[], object]) -> None:
    """Quantize `model` in place.

    Args:
        method: a key of `WAYS`.
        model: dense, in the way's dtype, on the device that it will run on.
        step: decodes a token with `model`; called only by ways that choose by timing.

    Raises:
        NotPossible: torchao is not installed, or this release no longer has the way.
    """
    require_installed()
    with torch.no_grad():
        WAYS[method].quantize(model, step)
