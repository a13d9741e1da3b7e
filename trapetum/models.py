"""Get a model by name, and write a quantized one: hub id, local directory, the built-in model, or random weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from trapetum.checkpoint import OWNER, ModelError, quantization_config, save  # noqa: F401
from trapetum.paths import BUILTIN_MODEL
from trapetum.shapes import MODELS, ModelShape
from trapetum.swap import (  # noqa: F401  the whole life of a model can be had from here
    Report,
    dequantize_model,
    is_quantized,
    quantize_model,
    randomize_codes,
    weight_bytes,
)

#: `model_type` of the architectures that the decode loop of `trapetum.decode` knows.
ARCHITECTURES = ("llama", "mistral")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_RANDOM_CONTEXT = 8192


@dataclass(frozen=True)
class Loaded:
    """A model ready to run.

    Attributes:
        model: a transformers causal language model in eval mode, dense or with `CodebookLinear` layers.
        tokenizer: its tokenizer, or None (random weights, or a directory without one).
        name: as it was asked for.
        shape: sizes, for bytes per token.
        kind: "builtin", "hub", "directory" or "random".
    """

    model: Any
    tokenizer: Any
    name: str
    shape: ModelShape
    kind: str


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ModelError(f"no dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    return dtype


def shape_of(config, name: str) -> ModelShape:
    """The sizes of a transformers config as a `ModelShape`."""
    heads = config.num_attention_heads
    return ModelShape(
        name=name,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
        source="config.json",
    )


def config_of(shape: ModelShape, **overrides):
    """A `LlamaConfig` with the sizes of `shape`; rope and norm constants are transformers' defaults."""
    from transformers import LlamaConfig

    sizes = dict(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied_embeddings,
        max_position_embeddings=_RANDOM_CONTEXT,
    )
    return LlamaConfig(**(sizes | overrides))


@torch.no_grad()
def _materialize(model: nn.Module, device: str, seed: int) -> None:
    """Give every parameter that is still on the meta device random values on `device`: norms 1, the rest N(0, 0.02)."""
    generator = torch.Generator(device).manual_seed(seed)
    made: dict[int, tuple] = {}  # id of the meta parameter (kept alive): itself and its value
    for module in model.modules():
        for leaf, meta in list(module._parameters.items()):
            if meta is None or not meta.is_meta:
                continue
            if id(meta) not in made:
                value = torch.empty(meta.shape, dtype=meta.dtype, device=device)
                value = value.fill_(1) if meta.dim() == 1 else value.normal_(0, 0.02, generator=generator)
                made[id(meta)] = meta, nn.Parameter(value, requires_grad=False)
            module._parameters[leaf] = made[id(meta)][1]


def random_model(
    shape: ModelShape, device="cpu", dtype=torch.float16, bits=None, lm_head=False, seed=0, **config
):
    """A Llama with random weights, made on `device` in `dtype` tensor by tensor (never held twice).

    Args:
        shape: sizes.
        device: where to make the weights.
        dtype: of the dense weights and the activations.
        bits: random codes of so many bits in the linear layers; None for dense weights.
        lm_head: codes in the output head too.
        seed: of the weights.
        config: overrides for `LlamaConfig`.

    Returns:
        a `LlamaForCausalLM` in eval mode.
    """
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config_of(shape, **config)).to(dtype)
    model.tie_weights()
    if bits is not None:
        randomize_codes(model, bits, seed, lm_head=lm_head, device=device)
    _materialize(model, str(device), seed)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config).to(device)
    model.config.dtype = dtype
    return model.eval().requires_grad_(False)


def _random(name, device, dtype, bits, lm_head, seed) -> Loaded:
    shape_name = name.removeprefix("random:")
    if shape_name not in MODELS:
        raise ModelError(f"no model shape {shape_name!r}; random: takes one of {', '.join(MODELS)}.")
    shape = MODELS[shape_name]
    dtype = dtype or (torch.float16 if torch.device(device).type == "cuda" else torch.float32)
    return Loaded(random_model(shape, device, dtype, bits, lm_head, seed), None, name, shape, "random")


def _require_checkpoint(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json; give the directory of a transformers checkpoint.")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} holds no .safetensors file; trapetum does not open pickled weights (.bin, .pt), "
            "so save the model with safetensors first."
        )


def _require_supported(config, name: str) -> None:
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"{name} is a {config.model_type!r} model; trapetum runs these architectures: {', '.join(ARCHITECTURES)}."
        )
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method", OWNER) if isinstance(quantization, dict) else OWNER
    if method != OWNER:
        raise ModelError(
            f"{name} is quantized with {method!r}; load the checkpoint with its original weights."
        )


def _require_complete(missing, name: str) -> None:
    if missing:
        raise ModelError(
            f"{name} lacks {len(missing)} tensors, {min(missing)} among them; download or quantize it again."
        )


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _from_pretrained(source: str, name: str, dtype):
    """The config, model and tokenizer that transformers finds at `source` (a directory or a hub id)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import trapetum.hf  # noqa: F401  registers the quantizer

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    _require_supported(config, name)
    model, found = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=dtype or "auto",
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    _require_complete(found["missing_keys"], name)  # transformers would fill them with random numbers
    return config, model, _tokenizer(source)


def _tokenizer(source: str):
    from transformers import AutoTokenizer

    if Path(source).is_dir() and not (Path(source) / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _pretrained(source: str, name: str, kind: str, device, dtype) -> Loaded:
    config, model, tokenizer = _from_pretrained(source, name, dtype)
    model = model.eval().requires_grad_(False).to(device)
    return Loaded(model, tokenizer, name, shape_of(config, name), kind)


def _directory(folder: Path, name: str, kind: str, device, dtype) -> Loaded:
    _require_checkpoint(folder)
    try:
        return _pretrained(str(folder), name, kind, device, dtype)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{folder} cannot be loaded ({_first_sentence(error)}).") from error


def _hub(name: str, device, dtype) -> Loaded:
    try:
        return _pretrained(name, name, "hub", device, dtype)
    except ModelError:
        raise
    except Exception as error:  # the hub client raises its own, requests', httpx' and the system's errors
        raise ModelError(
            f"the Hugging Face hub did not give {name!r} ({_first_sentence(error)}); check the id and the network, "
            "or give a local directory, 'builtin', or 'random:SHAPE'."
        ) from error


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "/" not in name


def load(
    name: str,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    bits: int | None = None,
    lm_head: bool = False,
    seed: int = 0,
) -> Loaded:
    """Load a model by name.

    Args:
        name: "builtin", "random:llama-2-7b" (any of `shapes.MODELS`), a local directory (dense, or written by
            `save`), or a hub id.
        device: where to put it.
        dtype: of dense weights and activations, also "fp16", "bf16", "fp32"; default the checkpoint's, for random
            weights fp16 on CUDA and fp32 on the CPU.
        bits: for "random:" only: random codes of so many bits instead of dense weights.
        lm_head: for "random:" only: codes in the output head too.
        seed: of random weights.

    Raises:
        ModelError: not found, refused by the hub, not safetensors, or an unsupported architecture.
    """
    dtype = _dtype(dtype)
    if name.startswith("random:"):
        return _random(name, device, dtype, bits, lm_head, seed)
    if bits is not None:
        raise ModelError(f"bits={bits} is for random: shapes; load {name!r} and call quantize_model on it.")
    if name == "builtin":
        if not BUILTIN_MODEL.is_dir():
            raise ModelError(f"the built-in model is not in {BUILTIN_MODEL}; notebook 90 trains it.")
        return _directory(BUILTIN_MODEL, name, "builtin", device, dtype)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _directory(folder, name, "directory", device, dtype)
    if _looks_local(name):
        known = ", ".join(f"random:{shape}" for shape in MODELS)
        raise ModelError(
            f"no directory {name!r}, and it is not a hub id (owner/name), 'builtin', or one of {known}."
        )
    return _hub(name, device, dtype)
