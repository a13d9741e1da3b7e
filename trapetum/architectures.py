"""The architectures that the decode loop knows: what it reads from a config, what it makes one from, what it refuses."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trapetum.checkpoint import OWNER, ModelError
from trapetum.shapes import ModelShape

#: `model_type` of the architectures that the decode loop of `trapetum.decode` knows.
ARCHITECTURES = ("llama", "mistral", "qwen2")
#: Tokens that a model of random weights takes; it was trained for none.
RANDOM_CONTEXT = 131072

# Fields of a config that ask for arithmetic of which the decode step does none, and the value that asks for nothing.
_NEUTRAL = {
    "partial_rotary_factor": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "residual_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "use_qk_norm": False,
    "clip_qkv": None,
}
_QKV = ("q_proj", "k_proj", "v_proj")
_ATTENTION = (*_QKV, "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _biases(config) -> tuple[str, ...]:
    if config.model_type == "qwen2":
        return _QKV
    attention = _ATTENTION if getattr(config, "attention_bias", False) else ()
    return attention + (_MLP if getattr(config, "mlp_bias", False) else ())


def shape_of(config, name: str) -> ModelShape:
    """The sizes of a transformers config as a `ModelShape`; its rope is in the config, not here."""
    return ModelShape(
        name=name,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        vocab=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
        source="config.json",
        model_type=config.model_type,
        biases=_biases(config),
        max_positions=config.max_position_embeddings,
        sliding_window=getattr(config, "sliding_window", None),
        norm_eps=config.rms_norm_eps,
    )


def config_of(shape: ModelShape, **overrides):
    """The transformers config of a model of this shape, of the class that its `model_type` names.

    Args:
        shape: sizes.
        overrides: fields of the config; `max_position_embeddings` is `RANDOM_CONTEXT` unless given.

    Raises:
        ValueError: the shape has biases that its architecture cannot have.
    """
    from transformers import AutoConfig

    fields = dict(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied_embeddings,
        max_position_embeddings=RANDOM_CONTEXT,
        rope_parameters=shape.rope.parameters(),
        rms_norm_eps=shape.norm_eps,
    )
    own = {"mistral": _mistral_fields, "qwen2": _qwen2_fields}.get(shape.model_type, _llama_fields)(shape)
    return AutoConfig.for_model(shape.model_type, **(fields | own | overrides))


def _llama_fields(shape: ModelShape) -> dict:
    attention, mlp = "o_proj" in shape.biases, "down_proj" in shape.biases
    if shape.biases != (_ATTENTION if attention else ()) + (_MLP if mlp else ()):
        raise ValueError(
            f"{shape.name} has biases on {', '.join(shape.biases)}; a llama has them on all linears of the attention, of the "
            "MLP, or of neither."
        )
    return dict(attention_bias=attention, mlp_bias=mlp)


def _mistral_fields(shape: ModelShape) -> dict:
    if shape.biases:
        raise ValueError(f"{shape.name} has biases on {', '.join(shape.biases)}; a mistral has none.")
    return dict(sliding_window=shape.sliding_window)


def _qwen2_fields(shape: ModelShape) -> dict:
    if shape.biases != _QKV:
        raise ValueError(
            f"{shape.name} has biases on {', '.join(shape.biases) or 'nothing'}; a qwen2 has them on {', '.join(_QKV)}."
        )
    window = shape.sliding_window
    return dict(use_sliding_window=window is not None, sliding_window=window, max_window_layers=0)


def empty_model(config, dtype: torch.dtype) -> nn.Module:
    """The causal language model of `config` on the meta device, head tied where the config says so: no memory yet."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).to(dtype)
    model.tie_weights()
    model.config.dtype = dtype
    return model


def make_rope(model: nn.Module, device: torch.device | str) -> None:
    """Compute the rotary frequencies of a model that was made on the meta device."""
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config).to(device)


def unknown_features(config) -> Iterator[str]:
    """What the config asks for and the decode step does not do, as "field = value"."""
    rope = getattr(config, "rope_parameters", None) or {}
    for field, neutral in _NEUTRAL.items():
        value: Any = rope.get(field, getattr(config, field, neutral))
        if value is not None and value != neutral:
            yield f"{field} = {value}"


def require_architecture(model_type: str | None, name: str) -> None:
    """Refuse an architecture that the decode loop does not know.

    Raises:
        ModelError: naming it and those there are.
    """
    if model_type not in ARCHITECTURES:
        raise ModelError(
            f"{name} is a {model_type!r} model; trapetum runs these architectures: {', '.join(ARCHITECTURES)}."
        )


def require_supported(config, name: str) -> None:
    """Refuse what the decode loop does not know.

    Raises:
        ModelError: another architecture, a feature that changes the arithmetic, or foreign quantization.
    """
    require_architecture(config.model_type, name)
    features = list(unknown_features(config))
    if features:
        raise ModelError(
            f"{name} asks for {' and '.join(features)}, which the decode step does not compute; choose a model without."
        )
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method", OWNER) if isinstance(quantization, dict) else OWNER
    if method != OWNER:
        raise ModelError(
            f"{name} is quantized with {method!r}; load the checkpoint with its original weights."
        )
