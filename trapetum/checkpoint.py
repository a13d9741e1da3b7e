"""Write a quantized model as a directory that transformers reads back.

`quantization_config` in its config.json says how the codes were made (`method`, and `recipe` where data or another
checkpoint was used), by which versions (`written_by`), and holds two hashes (`sha256`): of config.json itself, and of
all tensors' hashes, which stand in the header of the safetensors file.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

from trapetum import __version__, formats
from trapetum.quantizers import ADDITIVE
from trapetum.swap import HEAD, additive_layers, codebook_layers, coded_layers, linears

#: `quant_method` in config.json.
OWNER = "trapetum"


class ModelError(RuntimeError):
    """A model cannot be had, or a directory cannot be written; the message says which and what to do."""


def quantization_config(model: nn.Module) -> dict:
    """The `quantization_config` entry of config.json that describes the codebook layers of `model`.

    Raises:
        ModelError: some layers have one codebook a channel and others additive ones.
    """
    found = {name: (layer.bits, layer.n_codes) for name, layer in coded_layers(model)}
    common = max(set(found.values()), key=list(found.values()).count)
    config = {
        "quant_method": OWNER,
        "bits": common[0],
        "n_codes": common[1],
        "method": _method(model),
        "modules_to_not_convert": [name for name, _ in linears(model, lm_head=True)],
    }
    exceptions = {name: list(scheme) for name, scheme in found.items() if scheme != common}
    recipe = getattr(model, "trapetum_quantization", None) or {}
    recipe = {key: value for key, value in recipe.items() if key != "method"}
    config |= {"exceptions": exceptions} if exceptions else {}
    share = _outlier_share(model)
    config |= {"outliers": share} if share else {}
    return config | ({"recipe": recipe} if recipe else {}) | {"written_by": versions()}


def _method(model: nn.Module) -> str:
    """What made the codes; that of additive layers is said by the layers themselves, since it tells how to read them."""
    if additive_layers(model) and codebook_layers(model):
        raise ModelError(
            f"{additive_layers(model)[0][0]} has additive codebooks and {codebook_layers(model)[0][0]} one codebook a "
            "channel, and a directory holds one kind; quantize all of them in the same way."
        )
    return ADDITIVE if additive_layers(model) else getattr(model, "trapetum_method", "kmeans")


def _outlier_share(model: nn.Module) -> float:
    shares = {layer.outlier_share for _, layer in codebook_layers(model)} or {0.0}
    if len(shares) > 1:
        raise ModelError(
            f"the layers keep different shares of outliers apart ({', '.join(f'{s:g}' for s in sorted(shares))}), and a "
            "directory holds one; quantize all of them with the same."
        )
    return shares.pop()


def versions() -> dict[str, str]:
    """Of the libraries that write a directory."""
    others = ("torch", "transformers", "safetensors")
    return {"trapetum": __version__} | {name: importlib.metadata.version(name) for name in others}


def config_digest(fields: dict) -> str:
    """SHA-256 of a config.json by its contents, as 64 hexadecimal digits.

    Spaces and the order of keys do not count, nor does the `sha256` that stands in its `quantization_config`.
    """
    quantization = {k: v for k, v in fields["quantization_config"].items() if k != "sha256"}
    text = json.dumps(fields | {"quantization_config": quantization}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _dense_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything of the state dict that is not codes: own storage each, a tied head left out."""
    codes = {f"{name}.{part}" for name, _ in codebook_layers(model) for part in ("codes", "codebook")}
    tied = (
        set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    )
    state = {
        name: tensor.detach()
        for name, tensor in model.named_parameters(remove_duplicate=False)
        if name not in tied or tensor is not model.get_input_embeddings().weight
    }
    state |= {f"{name}.bias": m.bias for name, m in coded_layers(model) if m.bias is not None}
    for name, layer in additive_layers(model):
        state |= {f"{name}.{part}": tensor for part, tensor in layer.to_weight().tensors().items()}
    apart = {name: m.outliers.tensors() for name, m in codebook_layers(model) if m.outliers is not None}
    state |= {f"{name}.{part}": tensor for name, parts in apart.items() for part, tensor in parts.items()}
    return {name: tensor.clone().cpu() for name, tensor in state.items() if name not in codes}


def _write(model, tokenizer, folder: Path) -> None:
    weights = {name: layer.to_weight().to("cpu") for name, layer in codebook_layers(model)}
    hashed = formats.save(folder / "model.safetensors", weights, _dense_tensors(model))
    config = model.config.to_dict() | {
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "architectures": [type(model).__name__],
    }
    config.pop("quantization_config", None)
    coded = dict(coded_layers(model))
    if HEAD in coded:  # a head of codes has no weight that could be the embedding's
        config["tie_word_embeddings"] = False
    if coded:
        config["quantization_config"] = quantization_config(model)
        config = _as_json(config)
        digests = {"config": config_digest(config), "weights": hashed}
        config["quantization_config"]["sha256"] = digests
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _as_json(config: dict) -> dict:
    try:
        return json.loads(json.dumps(config))
    except TypeError as error:
        raise ModelError(
            f"config.json cannot hold what the model says of itself ({error}); set model.trapetum_quantization to plain "
            "texts, numbers, lists and dicts."
        ) from error


def require_replaceable(folder: Path) -> None:
    """Refuse a directory that holds something else than a model that was quantized here.

    Raises:
        ModelError: it does.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    config = folder / "config.json"
    if not config.is_file() or f'"quant_method": "{OWNER}"' not in config.read_text():
        raise ModelError(
            f"{folder} exists and is not a model that trapetum quantized; choose another directory."
        )


def _put(temporary: Path, folder: Path) -> None:
    old = temporary.with_name(temporary.name + ".old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def save(model: nn.Module, tokenizer, out_dir: str | os.PathLike) -> Path:
    """Write a model so that `load` and `AutoModelForCausalLM.from_pretrained` read it back; whole or not at all.

    Args:
        model: quantized (or dense) causal language model.
        tokenizer: written beside it unless None.
        out_dir: a new or empty directory, or one that holds a model quantized before, which is replaced.

    Returns:
        the directory.

    Raises:
        ModelError: the directory holds something else.
    """
    folder = Path(out_dir).expanduser().absolute()
    require_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _write(model, tokenizer, temporary)
        temporary.chmod(0o755)
        _put(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
