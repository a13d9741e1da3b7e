"""A directory that `checkpoint.save` wrote, as a model: read once, tensor by tensor, and checked on the way."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
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


def first_sentence(error: BaseException) -> str:
    """The type of an error and the start of what it says, on one line of at most some 200 characters."""
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


def dtype_of(folder: Path, fields: dict, asked: torch.dtype | None) -> torch.dtype:
    """The dtype of dense weights and activations: the one asked for, or the config's.

    Raises:
        ModelError: the config names no floating-point dtype.
    """
    stored = fields.get("dtype", fields.get("torch_dtype")) or "float32"
    if asked is None and stored not in _FLOATS:
        raise ModelError(
            f"{folder / CONFIG} has dtype {shown(str(stored))}; known are {', '.join(_FLOATS)}, so load it with one of them."
        )
    return asked or _FLOATS[stored]


@contextmanager
def buildable(folder: Path) -> Iterator[None]:
    """What transformers and torch raise about a config that no model can be made from becomes a `ModelError`."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # of many types, some of their own
        raise ModelError(
            f"{folder / CONFIG} describes no model that can be made ({first_sentence(error)}); copy it again."
        ) from error


def skeleton(folder: Path, fields: dict, dtype: torch.dtype, quantizer=None) -> nn.Module:
    """The model that a config.json describes, on the meta device.

    Args:
        folder: the directory.
        fields: of its config.json; `quantization_config` is not looked at.
        dtype: of dense weights and activations.
        quantizer: puts layers of codes in place; None leaves all linears dense.

    Raises:
        ModelError: an architecture or a feature that trapetum does not run.
    """
    from transformers import AutoConfig

    require_architecture(fields.get("model_type"), str(folder))
    _require_no_code(folder, fields)
    dense = {k: copy.deepcopy(v) for k, v in fields.items() if k != "quantization_config"}
    config = type(AutoConfig.for_model(fields["model_type"])).from_dict(dense)
    config.name_or_path = str(folder)
    require_supported(config, str(folder))
    model = empty_model(config, dtype)
    if quantizer is not None:
        quantizer.preprocess_model(model)
    return model


def finish(model: nn.Module, device: torch.device | str, quantizer=None) -> nn.Module:
    """A filled skeleton as a model that runs: head tied, rope tables computed, eval mode."""
    model.tie_weights()
    make_rope(model, device)
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    return model.eval().requires_grad_(False)


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
    quantizer = _quantizer(folder, fields)
    hashes = quantizer.quantization_config.sha256 if quantizer else None
    require_config(folder, fields, hashes)
    with Stored.of(folder) as stored:
        stored.require_hashes(hashes)
        return model_of(stored, fields, quantizer, device, dtype)


def model_of(
    stored: Stored, fields: dict, quantizer, device: torch.device | str, dtype: torch.dtype | None
) -> nn.Module:
    """The model whose files are open.

    Args:
        stored: the files.
        fields: of config.json beside them.
        quantizer: puts layers of codes into the empty model (`preprocess_model`, `postprocess_model`), or None.
        device, dtype: as for `read_model`.

    Raises:
        ModelError: as `read_model`.
    """
    folder = stored.where
    require_architecture(fields.get("model_type"), str(folder))
    dtype = dtype_of(folder, fields, dtype)
    stored.require_sizes(fields)
    with buildable(folder):
        model = skeleton(folder, fields, dtype, quantizer)
        stored.require_model(model)
        _fill(model, stored, device)
        return finish(model, device, quantizer)
