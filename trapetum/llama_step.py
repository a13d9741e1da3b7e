"""The own decode step for Llama-shaped models: what a token needs and nothing else.

A step multiplies by four stacked matrices a layer (q+k+v, o, gate+up, down) and by the head:

    x -> rmsnorm -> q,k,v -> rope -> cache -> attention -> o -> + -> rmsnorm -> gate,up -> silu*up -> down -> + -> x

It exists in two placements of one token in the cache: `Live` (position known to Python, the cache is sliced to the live
length: the `lean` stage) and `Padded` (position in device memory, the cache is read up to a bucket's length and masked, so
that the step can be captured in a CUDA graph: the `graph` stage). Query heads that share a key head are given to the
attention as so many query rows of that head, so grouped keys are neither copied nor read twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trapetum.architectures import ARCHITECTURES, unknown_features
from trapetum.projection import Nothing, project
from trapetum.swap import is_quantized

_FEW_ROWS = 32
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class UnsupportedModel(ValueError):
    """The own decode step does not know a feature of this model; the message names it."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer: products, norm weights [hidden], the cache [2, kv_heads, context, head_dim] and its halves.

    Without a cache of its own (None) the step can only prefill, and hands keys and values on.
    """

    qkv: Any
    out: Any
    gate_up: Any
    down: Any
    attention_norm: Tensor
    mlp_norm: Tensor
    cache: Tensor | None
    keys: Tensor | None
    values: Tensor | None


class Live:
    """One token at a position that Python knows; attention sees the cache up to it."""

    mask = None

    def __init__(self, step: "LlamaStep", position: int):
        self.cos, self.sin = step.cos[position], step.sin[position]
        self._position, self.length = position, position + 1

    def store(self, cache: Tensor, fresh: Tensor) -> None:
        """Write fresh keys and values [2, kv_heads, head_dim]."""
        cache.select(2, self._position).copy_(fresh)


class Padded:
    """One token at the position held in device memory; attention sees `length` places and masks the unwritten ones."""

    def __init__(self, step: "LlamaStep", length: int):
        self.cos, self.sin = (table.index_select(0, step.position) for table in (step.cos, step.sin))
        self.mask = (step.places[:length] <= step.position).view(1, 1, 1, length)
        self._position, self.length = step.position, length

    def store(self, cache: Tensor, fresh: Tensor) -> None:
        """Write fresh keys and values [2, kv_heads, head_dim]."""
        cache.index_copy_(2, self._position, fresh.unsqueeze(2))


def activation_dtype(model: nn.Module) -> torch.dtype:
    """The dtype between the products: the embedding's, but float32 where the CPU's codebook kernel, which takes it, runs."""
    weight = model.get_input_embeddings().weight
    return torch.float32 if weight.device.type == "cpu" and is_quantized(model) else weight.dtype


def _require_supported(config, max_context: int) -> None:
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedModel(
            f"the own decode step does not know the architecture {config.model_type!r}; it knows {', '.join(ARCHITECTURES)}."
        )
    features = " and ".join(unknown_features(config))
    if features:
        raise UnsupportedModel(f"the own decode step does not compute {features}; use the stage naive.")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        raise UnsupportedModel(
            f"rope scaling {rope!r} changes with the length; the own decode step knows {', '.join(_ROPE_TYPES)}, "
            "so use the stage naive."
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < max_context:
        raise UnsupportedModel(
            f"the model attends to a sliding window of {window} tokens; choose max_context <= {window}, not {max_context}."
        )


class LlamaStep:
    """A Llama-shaped model with its own decode step and static cache.

    The products are stacked where they can be; `model`'s weights become views of the stacked ones, so the module tree
    goes on working and nothing is held twice.

    Attributes:
        layers: what each decoder layer needs.
        cos, sin: rope tables [context, head_dim]; the sine has the sign of the half it multiplies.
        token, position: int64 [1] on the device, read and advanced by `advance`.
        without: parts that are left out for measurements: "attention", "norms", "sampling" (linears: `silenced`).
    """

    def __init__(self, model: nn.Module, max_context: int, cache: bool = True):
        config = model.config
        _require_supported(config, max_context)
        self._has_cache = cache
        self.without: frozenset[str] = frozenset()
        self.dtype, self._eps = activation_dtype(model), config.rms_norm_eps
        self.device = model.get_input_embeddings().weight.device
        self._fast_norm = self.device.type == "cpu" and self.dtype == torch.float32
        self._by_codes = is_quantized(model)
        attention = model.model.layers[0].self_attn
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim, self._scale = attention.head_dim, attention.scaling
        self.hidden, self.intermediate = config.hidden_size, config.intermediate_size
        self._group = self._heads // self._kv_heads
        self._turned = self._heads + self._kv_heads  # heads that rope turns: queries and keys
        self._embedding = model.get_input_embeddings().weight.detach()
        self.layers = [self._layer(block, max_context) for block in model.model.layers]
        self._norm = self._constant(model.model.norm.weight)
        self._activation = model.model.layers[0].mlp.act_fn
        self.head = project([model.lm_head], self.dtype)
        self._rotary = model.model.rotary_emb
        self.cos, self.sin = self.rope(max_context)
        self.token = torch.zeros(1, dtype=torch.long, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.places = torch.arange(max_context, device=self.device)

    @property
    def heads(self) -> tuple[int, int, int, float]:
        """Query heads, key heads, width of a head, factor on the scores."""
        return self._heads, self._kv_heads, self._head_dim, self._scale

    @property
    def constants(self) -> tuple[Tensor, Tensor, float]:
        """Embedding [vocab, hidden], weight of the last norm [hidden], eps of all norms."""
        return self._embedding, self._norm, self._eps

    def _constant(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype)

    def _layer(self, block, max_context: int) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        places = (2, self._kv_heads, max_context, self._head_dim)
        cache = torch.zeros(places, dtype=self.dtype, device=self.device) if self._has_cache else None
        return Layer(
            project([attention.q_proj, attention.k_proj, attention.v_proj], self.dtype),
            project([attention.o_proj], self.dtype),
            project([mlp.gate_proj, mlp.up_proj], self.dtype),
            project([mlp.down_proj], self.dtype),
            self._constant(block.input_layernorm.weight),
            self._constant(block.post_attention_layernorm.weight),
            cache,
            cache[:1] if self._has_cache else None,
            cache[1:] if self._has_cache else None,
        )

    @property
    def gated_by_silu(self) -> bool:
        """Whether the MLP's activation is SiLU."""
        probe = torch.linspace(-3, 3, 7)
        return torch.equal(self._activation(probe), F.silu(probe))

    @torch.no_grad()
    def rope(self, places: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [places, head_dim], the sine's first half negative.

        From transformers' own rotary module, so that every scaling it knows comes out the same.
        """
        positions = torch.arange(places, device=self.device).unsqueeze(0)
        like = torch.empty(1, dtype=self.dtype, device=self.device)
        cos, sin = (table[0].contiguous() for table in self._rotary(like, positions))
        sin[:, : self._head_dim // 2].neg_()
        return cos, sin

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        if "norms" in self.without:
            return x
        if self._fast_norm and x.shape[0] == 1:
            flat = x.view(-1)  # F.rms_norm is six operators on a CPU, and takes twice as long
            mean_square = torch.dot(flat, flat).item() / flat.shape[0]
            return torch.mul(x, weight).mul_((mean_square + self._eps) ** -0.5)
        return F.rms_norm(x, (x.shape[-1],), weight, self._eps)

    def _rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> None:
        """In place: heads * cos + (halves swapped) * sin, the sine's first half being negative."""
        swapped = heads.roll(self._head_dim // 2, -1)
        heads.mul_(cos).addcmul_(swapped, sin)

    def _attend(self, layer: Layer, qkv: Tensor, place) -> Tensor:
        if "attention" in self.without:
            return qkv[:, : self._heads * self._head_dim]
        heads = qkv.view(-1, self._head_dim)
        self._rotate(heads[: self._turned], place.cos, place.sin)
        place.store(layer.cache, heads[self._heads :].view(2, self._kv_heads, self._head_dim))
        query = heads[: self._heads].view(1, self._kv_heads, self._group, self._head_dim)
        keys, values = layer.keys.narrow(2, 0, place.length), layer.values.narrow(2, 0, place.length)
        attended = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=place.mask, scale=self._scale
        )
        return attended.reshape(1, -1)

    def _mlp(self, layer: Layer, product, down, x: Tensor) -> Tensor:
        gate, up = product(self._rms(x, layer.mlp_norm)).chunk(2, -1)
        return down(self._activation(gate).mul_(up))

    def _hidden(self, token: Tensor, place) -> Tensor:
        x = F.embedding(token, self._embedding).to(self.dtype)
        for layer in self.layers:
            qkv = layer.qkv(self._rms(x, layer.attention_norm))
            x = x + layer.out(self._attend(layer, qkv, place))
            x = x + self._mlp(layer, layer.gate_up, layer.down, x)
        return x

    def step(self, token: Tensor, place) -> Tensor:
        """Logits [1, vocab] after `token` [1] at `place` (`Live` or `Padded`)."""
        return self.head(self._rms(self._hidden(token, place), self._norm))

    def advance(self, length: int) -> None:
        """One step with token and position on the device, reading `length` places of the cache; capturable."""
        logits = self.step(self.token, Padded(self, length))
        if "sampling" not in self.without:
            self.token.copy_(logits.argmax(-1))
        self.position.add_(1)

    def _attend_rows(self, layer: Layer, qkv: Tensor, rows: int, keep=None) -> Tensor:
        heads = qkv.view(rows, -1, self._head_dim)
        self._rotate(heads[:, : self._turned], self.cos[:rows, None], self.sin[:rows, None])
        fresh = heads[:, self._heads :].view(rows, 2, self._kv_heads, self._head_dim).permute(1, 2, 0, 3)
        if layer.cache is not None:
            layer.cache[:, :, :rows] = fresh
        if keep is not None:
            keep(*fresh)
        keys, values = fresh[:, None].repeat_interleave(self._group, 2)
        query = heads[:, : self._heads].transpose(0, 1).unsqueeze(0)
        attended = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=self._scale)
        return attended[0].transpose(0, 1).reshape(rows, -1)

    def prefill(self, ids: Tensor) -> Tensor:
        """Fill the cache with a prompt.

        All rows go at once, and codebook weights are dequantized layer by layer. On the CPU that costs as much as dozens of
        single tokens, so a short prompt goes token by token there.

        Args:
            ids: int64 [n], n >= 1, on the device.

        Returns:
            logits [1, vocab] after the last token.
        """
        if len(ids) <= (_FEW_ROWS if self._by_codes else 1) and self.device.type == "cpu":
            for position in range(len(ids) - 1):
                self._hidden(ids[position : position + 1], Live(self, position))
            return self.step(ids[-1:], Live(self, len(ids) - 1))
        return self.prefill_rows(ids)

    def prefill_rows(self, ids: Tensor, keep: Sequence[Callable] | None = None) -> Tensor:
        """All rows of a prompt at once.

        Args:
            ids: int64 [n], n >= 1, on the device.
            keep: for each layer, what is called with its keys and values [kv_heads, n, head_dim]; None for nothing.

        Returns:
            logits [1, vocab] after the last token.
        """
        x = F.embedding(ids, self._embedding).to(self.dtype)
        for layer, kept in zip(self.layers, keep or [None] * len(self.layers), strict=True):
            qkv = layer.qkv.rows(self._rms(x, layer.attention_norm))
            x = x + layer.out.rows(self._attend_rows(layer, qkv, len(ids), kept))
            x = x + self._mlp(layer, layer.gate_up.rows, layer.down.rows, x)
        return self.head(self._rms(x[-1:], self._norm))

    def silenced(self) -> tuple[list[Layer], Any]:
        """Layers and head whose products do nothing, for the framework floor."""
        like = self.cos

        def mute(product):
            return Nothing(product.out_features, like)

        layers = [
            replace(
                layer,
                qkv=mute(layer.qkv),
                out=mute(layer.out),
                gate_up=mute(layer.gate_up),
                down=mute(layer.down),
            )
            for layer in self.layers
        ]
        return layers, mute(self.head)
