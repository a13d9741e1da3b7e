"""Get a model by name, and write a quantized one: hub id, local directory, the built-in model, or random weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from trapetum.aqlm import is_aqlm, read_aqlm
from trapetum.architectures import (  # noqa: F401
    ARCHITECTURES,
    config_of,
    empty_model,
    make_rope,
    require_architecture,
    require_supported,
    shape_of,
)
from trapetum.checkpoint import OWNER, ModelError, quantization_config, save  # noqa: F401
from trapetum.memory import memory_estimate  # noqa: F401
from trapetum.paths import BUILTIN_MODEL
from trapetum.reading import first_sentence, read_model
from trapetum.shapes import MODELS, ModelShape
from trapetum.shards import INDEX, SINGLE, files_of
from trapetum.stored import is_ours, read_config
from trapetum.streaming import QuantizeSpec, fill, load_quantized, random_values, require_streamable
from trapetum.swap import (  # noqa: F401  the whole life of a model can be had from here
    Report,
    dequantize_model,
    is_quantized,
    quantize_model,
    randomize_codes,
    weight_bytes,
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
#: `quant_method` of the formats that `trapetum.imports` reads.
IMPORTABLE = ("gptq", "awq", "aqlm")
_SMALL_FILES = ("config.json", "generation_config.json", INDEX, "tokenizer*", "special_tokens_map.json") + (
    "added_tokens.json", "chat_template*", "vocab.json", "merges.txt"
)  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A model ready to run.

    Attributes:
        model: a transformers causal language model in eval mode, dense or with `CodebookLinear` layers.
        tokenizer: its tokenizer, or None (random weights, or a directory without one).
        name: as it was asked for.
        shape: sizes, for bytes per token.
        kind: "builtin", "hub", "directory" or "random".
        report: what was quantized while loading, or None.
    """

    model: Any
    tokenizer: Any
    name: str
    shape: ModelShape
    kind: str
    report: Report | None = None


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ModelError(f"no dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    return dtype


def random_model(
    shape: ModelShape, device="cpu", dtype=torch.float16, bits=None, lm_head=False, seed=0, **config
):
    """A model with random weights, made on `device` in `dtype` tensor by tensor (never held twice).

    Args:
        shape: sizes and architecture.
        device: where to make the weights.
        dtype: of the dense weights and the activations.
        bits: random codes of so many bits in the linear layers; None for dense weights.
        lm_head: codes in the output head too.
        seed: of the weights.
        config: overrides for the config, as `config_of` takes them.

    Returns:
        a transformers causal language model of the shape's architecture, in eval mode.
    """
    model = empty_model(config_of(shape, **config), dtype)
    if bits is not None:
        randomize_codes(model, bits, seed, lm_head=lm_head, device=device)
    fill(model, random_values(device, seed))
    make_rope(model, device)
    return model.eval().requires_grad_(False)


def _random(name, device, dtype, bits, lm_head, seed, spec, progress) -> Loaded:
    shape_name = name.removeprefix("random:")
    if shape_name not in MODELS:
        raise ModelError(f"no model shape {shape_name!r}; random: takes one of {', '.join(MODELS)}.")
    shape = MODELS[shape_name]
    dtype = dtype or (torch.float16 if torch.device(device).type == "cuda" else torch.float32)
    if spec is None:
        model = random_model(shape, device, dtype, bits, lm_head, seed)
        return Loaded(model, None, name, shape, "random")
    model = empty_model(config_of(shape), dtype)
    report = fill(model, random_values(device, seed), spec, progress)
    make_rope(model, device)
    return Loaded(model.eval().requires_grad_(False), None, name, shape, "random", report)


def _require_checkpoint(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json; give the directory of a transformers checkpoint.")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} holds no .safetensors file; trapetum does not open pickled weights (.bin, .pt), "
            "so save the model with safetensors first."
        )


def _require_complete(missing, name: str) -> None:
    if missing:
        raise ModelError(
            f"{name} lacks {len(missing)} tensors, {min(missing)} among them; download or quantize it again."
        )


def require_own(fields: dict, name: str) -> None:
    """Refuse, by its config.json, a checkpoint of a format that must be imported first.

    Raises:
        ModelError: with the command that imports it.
    """
    quantization = fields.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method in IMPORTABLE:
        raise ModelError(
            f"{name} is quantized with {method!r}; convert it once with `trapetum import DIR OUT` (of a hub model, the "
            "downloaded directory) and load OUT."
        )


def _config(source: str, name: str):
    """The config that transformers finds at `source` (a directory or a hub id), of a supported architecture."""
    from transformers import AutoConfig, PreTrainedConfig

    import trapetum.hf  # noqa: F401  registers the quantizer

    fields, _ = PreTrainedConfig.get_config_dict(source)
    require_own(fields, name)
    require_architecture(fields.get("model_type"), name)  # before a class is sought that may not exist
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    require_supported(config, name)
    return config


def _from_pretrained(source: str, name: str, dtype):
    """The config, model and tokenizer that transformers finds at `source` (a directory or a hub id)."""
    from transformers import AutoModelForCausalLM

    config = _config(source, name)
    model, found = AutoModelForCausalLM.from_pretrained(
        source,
        config=config,
        dtype=dtype or "auto",
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    _require_complete(found["missing_keys"], name)  # transformers would fill them with random numbers
    return config, model, tokenizer_of(source)


def tokenizer_of(source: str):
    """The tokenizer of a directory or hub model, or None where a directory holds none."""
    from transformers import AutoTokenizer

    if Path(source).is_dir() and not (Path(source) / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _pretrained(source: str, name: str, kind: str, device, dtype) -> Loaded:
    config, model, tokenizer = _from_pretrained(source, name, dtype)
    model = model.eval().requires_grad_(False).to(device)
    return Loaded(model, tokenizer, name, shape_of(config, name), kind)


def _quantized(folder: Path, config, name: str, kind: str, device, dtype, spec, progress) -> Loaded:
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{name} is quantized already; load it as it is, or quantize the dense checkpoint.")
    with _one_sentence(folder):  # before the long part
        tokenizer, generation = tokenizer_of(str(folder)), generation_config_of(folder)
    model, report = load_quantized(folder, config, device, dtype, spec, progress)
    model.generation_config = generation
    return Loaded(model, tokenizer, name, shape_of(config, name), kind, report)


def generation_config_of(folder: Path):
    """What a directory says of generation, in a file of its own or in config.json."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


@contextmanager
def _one_sentence(folder: Path) -> Iterator[None]:
    """What transformers and the system raise about a directory becomes a `ModelError`."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{folder} cannot be loaded ({first_sentence(error)}).") from error


def _stored(folder: Path, fields: dict, name: str, kind: str, device, dtype) -> Loaded:
    return _ready(read_model(folder, fields, device, dtype), folder, name, kind)


def aqlm_model(
    folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Loaded:
    """An AQLM checkpoint directory of the 2x8 or 4x8 scheme, with `AdditiveLinear` layers of the stored codes.

    Args:
        folder: with config.json and safetensors.
        device: where to put it.
        dtype: of activations and dense weights; None for the stored one.

    Raises:
        ModelError: another scheme, or a directory that is not what its config.json says; the message says where.
    """
    folder = Path(folder)
    _require_checkpoint(folder)
    fields = read_config(folder)
    if not is_aqlm(fields):
        raise ModelError(f"{folder} is no AQLM checkpoint; its config.json names no quant_method 'aqlm'.")
    return _ready(read_aqlm(folder, fields, device, dtype), folder, str(folder), "directory")


def _ready(model, folder: Path, name: str, kind: str) -> Loaded:
    with _one_sentence(folder):
        model.generation_config = generation_config_of(folder)
        return Loaded(model, tokenizer_of(str(folder)), name, shape_of(model.config, name), kind)


def _is_ours(folder: Path, fields: dict, name: str) -> bool:
    """`is_ours`; of a file that cannot be read, what the config alone rules out is said first."""
    try:
        return is_ours(folder, fields)
    except ModelError as damage:
        try:
            _config(str(folder), name)
        except ModelError:
            raise
        except (
            Exception
        ):  # transformers makes no config of it either, in whatever way: the damage is what counts
            pass
        raise damage


def _directory(folder: Path, name: str, kind: str, device, dtype, spec, progress) -> Loaded:
    _require_checkpoint(folder)
    fields = read_config(folder)
    if spec is None and is_aqlm(fields):
        return _ready(read_aqlm(folder, fields, device, dtype), folder, name, kind)
    require_own(fields, name)
    require_architecture(fields.get("model_type"), name)
    if spec is None and _is_ours(folder, fields, name):
        return _stored(folder, fields, name, kind, device, dtype)
    with _one_sentence(folder):
        if spec is None:
            return _pretrained(str(folder), name, kind, device, dtype)
        config = _config(str(folder), name)
    return _quantized(folder, config, name, kind, device, dtype, spec, progress)


@contextmanager
def _hub_sentence(name: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # the hub client raises its own, requests', httpx' and the system's errors
        raise ModelError(
            f"the Hugging Face hub did not give {name!r} ({first_sentence(error)}); check the id and the network, "
            "or give a local directory, 'builtin', or 'random:SHAPE'."
        ) from error


def _download(name: str) -> tuple[Path, Any]:
    """A hub model's config, tokenizer and safetensors, nothing else: the snapshot's directory and the config.

    The small files come first, so that an unsupported model costs no download, and the index says which of the
    repository's safetensors files are the model's.
    """
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=list(_SMALL_FILES)))
    config = _config(str(folder), name)
    weights = sorted(set(files_of(folder).values())) if (folder / INDEX).is_file() else [SINGLE]
    snapshot_download(name, revision=folder.name, allow_patterns=weights)
    return folder, config


def _hub(name: str, device, dtype, spec, progress) -> Loaded:
    with _hub_sentence(name):
        if spec is None:
            return _pretrained(name, name, "hub", device, dtype)
        folder, config = _download(name)
    return _quantized(folder, config, name, "hub", device, dtype, spec, progress)


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "/" not in name


def load(
    name: str,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    bits: int | None = None,
    lm_head: bool = False,
    seed: int = 0,
    quantize: QuantizeSpec | None = None,
    progress: bool = False,
) -> Loaded:
    """Load a model by name.

    With `quantize` the weights are read tensor by tensor, and each linear is quantized on `device` before the next is
    read: memory peaks near the quantized size plus one dense layer, and the codes are those of `quantize_model` on the
    model loaded dense.

    A directory that trapetum wrote is checked as it is read, each tensor once (`trapetum.stored`): hashes, shapes, dtypes,
    finite values, codes within their codebooks. No pickled weights are opened, whatever their name.

    Args:
        name: "builtin", "random:llama-2-7b" (any of `shapes.MODELS`), a local directory (dense, or written by
            `save`), or a hub id.
        device: where to put it.
        dtype: of dense weights and activations, also "fp16", "bf16", "fp32"; default the checkpoint's, for random
            weights fp16 on CUDA and fp32 on the CPU.
        bits: for "random:" only: random codes of so many bits instead of dense weights.
        lm_head: for "random:" with `bits`: codes in the output head too.
        seed: of random weights.
        quantize: how to quantize while loading; None loads what is stored.
        progress: show a progress bar while quantizing.

    Raises:
        ModelError: not found, refused by the hub, not safetensors, damaged, or an unsupported architecture.
        ValueError: a scheme or method that cannot quantize while loading, or a weight that cannot be quantized (by name).
    """
    dtype = _dtype(dtype)
    _require_one_way(name, bits, quantize)
    if name.startswith("random:"):
        return _random(name, device, dtype, bits, lm_head, seed, quantize, progress)
    if name == "builtin":
        if not BUILTIN_MODEL.is_dir():
            raise ModelError(f"the built-in model is not in {BUILTIN_MODEL}; notebook 90 trains it.")
        return _directory(BUILTIN_MODEL, name, "builtin", device, dtype, quantize, progress)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _directory(folder, name, "directory", device, dtype, quantize, progress)
    if _looks_local(name):
        known = ", ".join(f"random:{shape}" for shape in MODELS)
        raise ModelError(
            f"no directory {name!r}, and it is not a hub id (owner/name), 'builtin', or one of {known}."
        )
    return _hub(name, device, dtype, quantize, progress)


def _require_one_way(name: str, bits: int | None, spec: QuantizeSpec | None) -> None:
    if bits is not None and not name.startswith("random:"):
        raise ModelError(
            f"bits={bits} is for random: shapes; load {name!r} with quantize=QuantizeSpec({bits})."
        )
    if bits is not None and spec is not None:
        raise ModelError(f"bits={bits} makes random codes and quantize makes real ones; give one of the two.")
    if spec is not None:
        require_streamable(spec)
