"""Changes of a dense model that leave its function as it is, and make its weights easier or harder to quantize.

A decoder layer has four places where a linear map follows an elementwise or linear one, so that a scale can move from one
to the other; and between layers the stream may be turned by any orthogonal matrix:

    place     read by                   channels          divided out of
    qkv       q_proj, k_proj, v_proj    hidden            input_layernorm
    gate_up   gate_proj, up_proj        hidden            post_attention_layernorm
    o         o_proj                    kv_heads * dim    rows of v_proj: one scale for all query heads of a kv head
    down      down_proj                 intermediate      rows of up_proj

`scale_inputs` moves a scale, `fold_norms` and `rotate` fold norms and rotations into the weights, and `stress` makes a small
model as hard to quantize as a large one. All of it happens before quantization, in float64, and costs no decode time.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trapetum.architectures import require_supported

#: Place -> the linears of a decoder layer that read it, by their name in the layer.
PLACES: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "o": ("self_attn.o_proj",),
    "down": ("mlp.down_proj",),
}
_NORMS = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}
_PRODUCERS = {"o": "self_attn.v_proj", "down": "mlp.up_proj"}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")

#: Share of outlier channels and the median of their factors, for `stress`. 1 % is the share of AWQ's salient channels. The
#: factor was then chosen on the built-in model (first 16384 held-out tokens, window and stride 512, seeds 0 to 3), so that
#: 4-bit k-means by Lloyd steps from a linear start loses what was published for it on Llama-2-7B: about 12 % of perplexity.
#: Round-to-nearest, published at the same 12 %, then loses more than that, and exact k-means less; a factor of 32 makes exact
#: k-means lose it. The other direction was tried and left: a few larger columns cost exact k-means next to nothing.
SHARE, FACTOR = 0.01, 20.0

_CHUNK_WEIGHTS = 1 << 24
_Change = tuple[str, nn.Parameter, Tensor]  # name, parameter, its new value in its dtype or float64


@dataclass(frozen=True)
class Note:
    """What a change did.

    Attributes:
        text: one or two sentences for a log or a saved config.
        bytes_added: bytes that the model holds more than before.
    """

    text: str
    bytes_added: int = 0


# --- checks and writing --------------------------------------------------------------------------------------------


def _require_place(place: str) -> None:
    if place not in PLACES:
        raise ValueError(f"no place {place!r} in a decoder layer; choose one of {', '.join(PLACES)}.")


def _linear(block: nn.Module, name: str) -> nn.Linear:
    layer = block.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"{name} is a {type(layer).__name__}; change the dense model before it is quantized."
        )
    return layer


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a dense model of a supported architecture."""
    require_supported(model.config, "the model")
    blocks = list(model.model.layers)
    for block in blocks:
        for readers in PLACES.values():
            for name in readers:
                _linear(block, name)
    return blocks


def _write(changes: list[_Change]) -> None:
    """Cast the new values and put them in place, all or none."""
    cast = [(name, parameter, value.to(parameter.dtype)) for name, parameter, value in changes]
    for name, _, value in cast:
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"{name} would reach beyond {torch.finfo(value.dtype).max:g}, the largest {value.dtype}; use smaller factors "
                "or load the model in float32."
            )
    for _, parameter, value in cast:
        parameter.copy_(value)


# --- scales --------------------------------------------------------------------------------------------------------


def channels(block: nn.Module, place: str) -> int:
    """How many scales a place of a decoder layer takes.

    Raises:
        ValueError: no such place.
    """
    _require_place(place)
    if place in _PRODUCERS:
        return block.get_submodule(_PRODUCERS[place]).out_features
    return len(block.get_submodule(_NORMS[place]).weight)


def spread(block: nn.Module, place: str, scale: Tensor) -> Tensor:
    """The scale of every input of a place: that of `o` repeated for the query heads that share a kv head.

    Args:
        block: a decoder layer.
        place: a key of `PLACES`.
        scale: [channels(block, place)].

    Returns:
        [in_features] of the linears that read the place.
    """
    if place != "o":
        return scale
    readers = block.self_attn.o_proj.in_features // len(scale)
    heads = scale.unflatten(0, (-1, block.self_attn.head_dim))
    return heads.repeat_interleave(readers, 0).flatten()


def _require_scale(block: nn.Module, place: str, scale: Tensor) -> Tensor:
    expected = channels(block, place)
    if tuple(scale.shape) != (expected,):
        raise ValueError(f"place {place!r} takes {expected} scales, not {list(scale.shape)}.")
    scale = scale.detach().double()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError(
            f"the scales of place {place!r} run from {float(scale.min()):g} to {float(scale.max()):g}; each must be "
            "positive and finite."
        )
    return scale


def _reader_changes(block: nn.Module, place: str, scale: Tensor) -> Iterator[_Change]:
    inputs = spread(block, place, scale)
    for name in PLACES[place]:
        weight = _linear(block, name).weight
        yield f"{name}.weight", weight, weight.double() * inputs.to(weight.device)


def _producer_changes(block: nn.Module, place: str, scale: Tensor) -> Iterator[_Change]:
    if place in _NORMS:
        weight = block.get_submodule(_NORMS[place]).weight
        yield f"{_NORMS[place]}.weight", weight, weight.double() / scale.to(weight.device)
        return
    name = _PRODUCERS[place]
    layer = _linear(block, name)
    rows = scale.to(layer.weight.device)
    yield f"{name}.weight", layer.weight, layer.weight.double() / rows.unsqueeze(1)
    if layer.bias is not None:
        yield f"{name}.bias", layer.bias, layer.bias.double() / rows


@torch.no_grad()
def scale_inputs(block: nn.Module, place: str, scale: Tensor) -> None:
    """Multiply the input columns of a place's linears by a scale and divide it out of what makes these inputs, in place.

    The linears then see x / scale. Scales that are powers of two change no bit of the outputs in float32 and bfloat16 (in
    float16 weights below 6e-5 lose bits); others change them by the rounding of the weights' dtype.

    Args:
        block: a dense decoder layer of a supported architecture.
        place: a key of `PLACES`.
        scale: floating [channels(block, place)], positive.

    Raises:
        ValueError: no such place, wrong sizes, a scale that is not positive, a quantized layer, or a value that the
            weights' dtype cannot hold. Nothing is changed then.

    Source: Xiao et al., "SmoothQuant", arXiv:2211.10438; Lin et al., "AWQ", arXiv:2306.00978.
    """
    scale = _require_scale(block, place, scale)
    _write([*_reader_changes(block, place, scale), *_producer_changes(block, place, scale)])


# --- norms ---------------------------------------------------------------------------------------------------------


def _untie(model: nn.Module) -> int:
    """Give the head a weight of its own; the bytes that this adds, 0 if it had one."""
    head, embedding = model.lm_head, model.model.embed_tokens
    if head.weight is not embedding.weight:
        return 0
    head.weight = nn.Parameter(
        embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad
    )
    model.config.tie_word_embeddings = False
    return head.weight.nbytes


def _norm_changes(norm: nn.Module, readers: Mapping[str, nn.Linear]) -> Iterator[_Change]:
    for name, layer in readers.items():
        gain = norm.weight.double().to(layer.weight.device)
        yield f"{name}.weight", layer.weight, layer.weight.double() * gain
    yield "norm.weight", norm.weight, torch.ones_like(norm.weight, dtype=torch.float64)


def _untied_note(added: int) -> str:
    if not added:
        return ""
    return (
        f" The head was tied to the embedding and has its own {added} bytes now: memory, not decode time, since a step reads "
        "the head once either way."
    )


@torch.no_grad()
def fold_norms(model: nn.Module) -> Note:
    """Multiply the gain of every norm into the linears that read it and set it to 1, in place.

    A tied head gets a weight of its own, unless the last norm's gain is 1 already. Whatever was divided out of the two
    norms of a layer, by `scale_inputs` or `stress`, is undone by this.

    Args:
        model: a dense causal language model of a supported architecture.

    Returns:
        the note, with the bytes of an untied head.

    Raises:
        ModelError: an architecture or feature that is not supported.
        ValueError: a quantized layer, or a value that the weights' dtype cannot hold (load the model again after the
            latter: the layers before it are changed).
    """
    blocks, head = _blocks(model), _linear(model, "lm_head")
    for block in blocks:
        for place, norm in _NORMS.items():
            readers = {name: _linear(block, name) for name in PLACES[place]}
            _write(list(_norm_changes(block.get_submodule(norm), readers)))
    last = model.model.norm
    added = 0
    if not bool((last.weight == 1).all()):
        added = _untie(model)
        _write(list(_norm_changes(last, {"lm_head": head})))
    return Note("Norm gains are folded into the linears." + _untied_note(added), added)


# --- rotations -----------------------------------------------------------------------------------------------------


class _Turn:
    """A random orthogonal matrix Q of n = 2^k * m: signs, then Hadamard of size 2^k (x) an orthogonal one of size m.

    It is never built: `apply` costs n * (k + m) operations a vector. With m = 1 it is the randomized Hadamard transform.
    """

    def __init__(self, size: int, generator: torch.Generator):
        self._power = size & -size
        signs = torch.randint(0, 2, (size,), generator=generator)
        self._signs = (2 * signs - 1).double()
        rest = torch.randn(size // self._power, size // self._power, generator=generator, dtype=torch.float64)
        self._rest = torch.linalg.qr(rest).Q

    def apply(self, rows: Tensor) -> Tensor:
        """rows @ Q for floating [..., n], in the dtype of the rows, computed in float64 a part at a time."""
        flat = rows.reshape(-1, rows.shape[-1])
        parts = flat.split(max(1, _CHUNK_WEIGHTS // flat.shape[1]))
        return torch.cat([self._turned(part.double()).to(rows.dtype) for part in parts]).view(rows.shape)

    def _turned(self, rows: Tensor) -> Tensor:
        turned = (rows * self._signs.to(rows.device)).unflatten(1, (self._power, -1))
        turned = turned @ self._rest.to(rows.device)
        half = 1
        while half < self._power:
            low, high = turned.unflatten(1, (-1, 2, half)).unbind(2)
            turned = torch.stack([low + high, low - high], 2).flatten(1, 3)
            half *= 2
        return turned.flatten(1) * self._power**-0.5


def _columns(layer: nn.Linear, turn: _Turn, heads: int = 1) -> Tensor:
    """W Q: the layer reads a turned input, each of `heads` equal parts of it turned alike."""
    return turn.apply(layer.weight.unflatten(1, (heads, -1))).flatten(1)


def _rows(tensor: Tensor, turn: _Turn, heads: int = 1) -> Tensor:
    """Q^T W, or Q^T b: the layer writes a turned output."""
    parts = tensor.unflatten(0, (heads, -1)).movedim(1, -1)
    return turn.apply(parts).movedim(-1, 1).flatten(0, 1)


def _writer_changes(name: str, layer: nn.Linear, turn: _Turn, heads: int = 1) -> Iterator[_Change]:
    yield f"{name}.weight", layer.weight, _rows(layer.weight, turn, heads)
    if layer.bias is not None:
        yield f"{name}.bias", layer.bias, _rows(layer.bias, turn, heads)


def _turn_stream(block: nn.Module, turn: _Turn) -> None:
    for name in (*PLACES["qkv"], *PLACES["gate_up"]):
        layer = _linear(block, name)
        _write([(f"{name}.weight", layer.weight, _columns(layer, turn))])
    for name in _WRITERS:
        _write(list(_writer_changes(name, _linear(block, name), turn)))


def _turn_heads(block: nn.Module, generator: torch.Generator) -> None:
    """Turn the values of every head between v_proj and o_proj."""
    dim = block.self_attn.head_dim
    turn = _Turn(dim, generator)
    values, outputs = (_linear(block, f"self_attn.{name}") for name in ("v_proj", "o_proj"))
    _write(
        [
            *_writer_changes("self_attn.v_proj", values, turn, values.out_features // dim),
            ("self_attn.o_proj.weight", outputs.weight, _columns(outputs, turn, outputs.in_features // dim)),
        ]
    )


def _turn_ends(model: nn.Module, turn: _Turn) -> None:
    """Turn the rows of the embedding, and the head's unless it is the same tensor."""
    for name, layer in (("model.embed_tokens", model.model.embed_tokens), ("lm_head", model.lm_head)):
        if name == "lm_head" and layer.weight is model.model.embed_tokens.weight:
            continue
        _write([(f"{name}.weight", layer.weight, turn.apply(layer.weight))])


@torch.no_grad()
def rotate(model: nn.Module, seed: int = 0) -> Note:
    """Turn the residual stream, and the values inside every head, by random orthogonal matrices folded into the weights.

    Each input that a linear then reads is a mix of all, so no column of its weight stands out (incoherence). Norms are
    folded first, since a rotation passes a norm only where its gain is 1. Nothing is computed while decoding, and therefore
    the input of down_proj keeps its channels: the product that makes it is taken channel by channel and lets no rotation
    through. Nor are the outputs of q_proj, k_proj (rope), gate_proj and up_proj turned.

    Args:
        model: a dense causal language model of a supported architecture; changed in place.
        seed: of the rotations; the same on every device.

    Returns:
        the note, with the bytes of a head that had to be untied.

    Raises:
        ModelError: an architecture or feature that is not supported.
        ValueError: a quantized layer, or a value that the weights' dtype cannot hold (load the model again after the
            latter: the layers before it are changed).

    Source: incoherence: Chee et al., "QuIP", arXiv:2307.13304; folded rotations: Ashkboos et al., "QuaRot",
        arXiv:2404.00456, and Liu et al., "SpinQuant", arXiv:2405.16406 (whose learned ones this is not).
    """
    folded = fold_norms(model)
    generator = torch.Generator().manual_seed(seed)
    turn = _Turn(model.config.hidden_size, generator)
    _turn_ends(model, turn)
    for block in _blocks(model):
        _turn_stream(block, turn)
        _turn_heads(block, generator)
    text = f"Residual stream and heads are turned by seed {seed}, norms folded; the input of down_proj is not turned."
    return Note(text + _untied_note(folded.bytes_added), folded.bytes_added)


# --- stress --------------------------------------------------------------------------------------------------------

_SPREAD = 1.0  # standard deviation of the factors' binary logarithm


def _outliers(size: int, share: float, factor: float, generator: torch.Generator) -> Tensor:
    """Scales of `size` channels: 1, but for a random share of them, which shrink by log-normal powers of two."""
    count = max(1, round(share * size))
    scale = torch.ones(size, dtype=torch.float64)
    octaves = math.log2(factor) + _SPREAD * torch.randn(count, generator=generator, dtype=torch.float64)
    scale[torch.randperm(size, generator=generator)[:count]] = 2.0 ** -octaves.round().clamp_min(0)
    return scale


def _require_stress(share: float, factor: float) -> None:
    if not 0 < share < 1 or not 1 <= factor < math.inf:
        raise ValueError(
            f"share is {share:g} and factor {factor:g}; give a share of channels between 0 and 1 and a factor of at least 1."
        )


@torch.no_grad()
def stress(model: nn.Module, seed: int = 0, share: float = SHARE, factor: float = FACTOR) -> Note:
    """Give a model the outlier channels of large models without changing what it computes, in place.

    At all four places of each decoder layer a random share of the channels is chosen. Their inputs become larger by factors
    drawn from a log-normal distribution (median `factor`, a standard deviation of one octave, rounded to powers of two) and
    the columns that read them smaller by the same, so that all other columns stand out against them by `factor`. The weights
    that matter most are then those that the codebook of a row resolves least. In float32 and bfloat16 the function is the
    same to the bit; in float16 weights that come below 6e-5 lose bits.

    Methods that know the inputs see through it, and the mean squares of the inputs are enough for that. Large models are not
    made this way, so what such a method regains here is no forecast for them. `fold_norms` undoes it at two of the places.

    Args:
        model: a dense causal language model of a supported architecture.
        seed: of channels and factors.
        share: of the channels, at least one a place.
        factor: median of the factors, at least 1.

    Returns:
        the note.

    Raises:
        ModelError: an architecture or feature that is not supported.
        ValueError: share or factor out of range, a quantized layer, or a value that the weights' dtype cannot hold (load the
            model again after the latter: the layers before it are changed).

    Source: that a few input channels of large models are tens of times larger than the rest: Dettmers et al.,
        "LLM.int8()", arXiv:2208.07339; that about 1 % of the channels decides what rounding costs: Lin et al., "AWQ",
        arXiv:2306.00978.
    """
    _require_stress(share, factor)
    generator = torch.Generator().manual_seed(seed)
    for block in _blocks(model):
        for place in PLACES:
            scale_inputs(block, place, _outliers(channels(block, place), share, factor, generator))
    return Note(
        f"{share:.1%} of all input channels are outliers by a median factor of {factor:g}, seed {seed}."
    )
