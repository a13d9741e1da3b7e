"""A directory that `checkpoint.save` wrote, as a model: read once, tensor by tensor, and checked on the way."""

import copy
from pathlib import Path

import torch
from torch import nn

from trapetum.architectures import (
    empty_model,
    make_rope,
    require_architecture,
    require_supported,
)
from trapetum.checkpoint import ModelError
from trapetum.formats import FormatError
from trapetum.stored import CONFIG, Stored, put, require_config
from trapetum.tensor_files import DTYPES, shown

_FLOATS = {str(DTYPES[name]).removeprefix("torch."): DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _quantizer(folder: Path, fields: dict):
    """The transformers quantizer of a directory, or None where it is dense."""
    from trapetum.hf import TrapetumConfig, TrapetumQuantizer

    if fields.get("quantization_config") is None:
        return None
    try:
        config = TrapetumConfig(**fields["quantization_config"])
    except (TypeError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG}: {error}") from error
    return TrapetumQuantizer(config, pre_quantized=True)


def _require_no_code(folder: Path, fields: dict) -> None:
    """A repository's name as the attention would have transformers fetch a kernel from the hub."""
    for field in _ATTENTION:
        if "/" in str(fields.get(field)):
            raise ModelError(
                f"{folder / CONFIG} names a downloaded attention kernel ({field}); delete that line, trapetum runs its own."
            )


def _dtype(folder: Path, fields: dict, asked: torch.dtype | None) -> torch.dtype:
    stored = fields.get("dtype", fields.get("torch_dtype")) or "float32"
    if asked is None and stored not in _FLOATS:
        raise ModelError(
            f"{folder / CONFIG} has dtype {shown(str(stored))}; known are {', '.join(_FLOATS)}, so load it with one of them."
        )
    return asked or _FLOATS[stored]


def _skeleton(folder: Path, fields: dict, dtype: torch.dtype, quantizer) -> nn.Module:
    from transformers import AutoConfig

    dense = {k: copy.deepcopy(v) for k, v in fields.items() if k != "quantization_config"}
    config = type(AutoConfig.for_model(fields["model_type"])).from_dict(dense)
    config.name_or_path = str(folder)
    require_supported(config, str(folder))
    model = empty_model(config, dtype)
    if quantizer is not None:
        quantizer.preprocess_model(model)
    return model


def _finish(model: nn.Module, quantizer, device) -> None:
    model.tie_weights()
    make_rope(model, device)
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)


def _fill(model: nn.Module, stored: Stored, device) -> None:
    for name, module, parts in stored.read(model):
        try:
            put(module, parts, device)
        except FormatError as error:
            raise ModelError(f"{stored.where}, {name}: {error}") from error


def read_model(
    folder: Path, fields: dict, device: torch.device | str, dtype: torch.dtype | None
) -> nn.Module:
    """A directory that trapetum wrote as a model in eval mode.

    Args:
        folder: the directory.
        fields: of its config.json, from `stored.read_config`.
        device: where to put it; each module goes there as soon as it is checked.
        dtype: of activations and dense weights; None for the stored one.

    Raises:
        ModelError: anything is missing, changed, of another model, or not what it should be; one sentence says what.
    """
    require_architecture(fields.get("model_type"), str(folder))
    _require_no_code(folder, fields)
    quantizer = _quantizer(folder, fields)
    hashes = quantizer.quantization_config.sha256 if quantizer else None
    require_config(folder, fields, hashes)
    dtype = _dtype(folder, fields, dtype)
    with Stored.of(folder) as stored:
        stored.require_hashes(hashes)
        stored.require_sizes(fields)
        try:
            model = _skeleton(folder, fields, dtype, quantizer)
            stored.require_model(model)
            _fill(model, stored, device)
            _finish(model, quantizer, device)
        except ModelError:
            raise
        except (
            Exception
        ) as error:  # transformers and torch raise many types for a config that they cannot build
            raise ModelError(
                f"{folder / CONFIG} describes no model that can be made ({_first_sentence(error)}); copy it again."
            ) from error
    return model.eval().requires_grad_(False)
