"""AQLM checkpoints as models: directories of the 2x8 and 4x8 schemes, whose layers become `AdditiveLinear` to the bit.

config.json says `quant_method` "aqlm" and its scheme; each quantized layer has the tensors

    codes       int8 (an index modulo 256) or uint8 [out, in/8, n]
    codebooks   float [n, 256, 1, 8]
    scales      float [out, 1, 1, 1]

Source: Egiazarian et al., arXiv:2401.06118; the fields of `transformers.AqlmConfig`. Codebooks and scales that float16 does
not hold exactly are refused.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from trapetum import additive
from trapetum.additive import ENTRIES, GROUP, N_CODEBOOKS
from trapetum.additive_linear import AdditiveLinear
from trapetum.checkpoint import ModelError
from trapetum.quantizers import ADDITIVE
from trapetum.reading import model_of
from trapetum.stored import CONFIG, Parts, Stored
from trapetum.swap import linears, note_method, replace
from trapetum.tensor_files import FormatError, shown

METHOD = "aqlm"
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")  # old checkpoints store what the config says already
_SCHEME = ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size")
_FIXED = [8, GROUP, 1]  # of the scheme, after the first
_FLOATS = ("F16", "BF16", "F32")
_BYTES = ("I8", "U8")


def is_aqlm(fields: dict) -> bool:
    """Whether a config.json says that the checkpoint is one of AQLM."""
    quantization = fields.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == METHOD


def _require_scheme(where: Path, config: dict) -> int:
    """The number of codebooks of a scheme that `AdditiveLinear` has."""
    asked = {name: config.get(name) for name in _SCHEME}
    codebooks, *others = asked.values()
    if type(codebooks) is not int or codebooks not in N_CODEBOOKS or others != _FIXED:
        said = ", ".join(f"{name} {shown(str(value))}" for name, value in asked.items())
        raise ModelError(
            f"{where} asks for the AQLM scheme {said}; trapetum multiplies with 2 or 4 codebooks of 8 bits for groups of 8 "
            "inputs and 1 output (2x8 and 4x8), so take a checkpoint of these."
        )
    return codebooks


def _dense_names(where: Path, config: dict) -> set[str]:
    names = config.get("linear_weights_not_to_quantize") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"{where} has a linear_weights_not_to_quantize that is no list of names; download it again."
        )
    return {name.removesuffix(".weight") for name in names}


class _Scheme:
    """Puts empty additive layers in place of the linears that a config.json says are quantized."""

    def __init__(self, where: Path, fields: dict):
        config = fields["quantization_config"]
        self._where = where
        self._codebooks, self._dense = _require_scheme(where, config), _dense_names(where, config)

    def preprocess_model(self, model: nn.Module) -> None:
        """Change the model, which is on the meta device."""
        chosen = [(name, layer) for name, layer in linears(model, lm_head=True) if name not in self._dense]
        for name, layer in chosen:
            self._require_groups(name, layer)
            sizes = layer.in_features, layer.out_features, self._codebooks
            dtype = layer.weight.dtype
            made = AdditiveLinear(*sizes, bias=layer.bias is not None, device="meta", dtype=dtype)
            replace(model, name, made)
        scheme = dict(zip(_SCHEME, (self._codebooks, *_FIXED), strict=True))
        note_method(model, ADDITIVE, {"imported": {"quant_method": METHOD} | scheme})

    def _require_groups(self, name: str, layer: nn.Linear) -> None:
        if layer.in_features % GROUP:
            raise ModelError(
                f"{self._where} quantizes {name} with {layer.in_features} inputs in groups of {GROUP}; config.json and weights "
                "are of two models."
            )

    def postprocess_model(self, model: nn.Module) -> None:
        """Nothing is left to do."""


def _exactly_half(name: str, values: Tensor) -> Tensor:
    half = values.half()
    changed = int(((half.to(values.dtype) != values) & values.isfinite()).sum())
    if changed:
        raise FormatError(
            f"{changed} of {values.numel()} values of {name} are not exact in float16, which additive layers hold them in; "
            "take a checkpoint with float16 codebooks and scales."
        )
    return half


class _Files(Stored):
    """The files of an AQLM checkpoint: additive layers are stored in its shapes."""

    def __init__(self, paths: list[Path]):
        super().__init__(paths)
        self.files = {name: file for name, file in self.files.items() if not _COMPUTED.search(name)}

    def _require_entry(self, name: str, tensor: Tensor, exact: bool) -> None:
        if not exact:
            return super()._require_entry(name, tensor, exact)
        entry = self.files[name].entries[name]
        part = name.rpartition(".")[2]
        shapes = {"codebooks": (len(tensor), ENTRIES, 1, GROUP), "scales": (len(tensor), 1, 1, 1)}
        shape, dtypes = shapes.get(part, tuple(tensor.shape)), _FLOATS if part in shapes else _BYTES
        if entry.shape != shape or entry.dtype not in dtypes:
            raise ModelError(
                f"{self.files[name].path} holds {name} as {entry.dtype} {list(entry.shape)}, and config.json asks for "
                f"{' or '.join(dtypes)} {list(shape)}; config.json and weights are of two models."
            )
        return None

    def _parts(self, prefix: str, module: nn.Module, leaves: list[str]) -> Parts:
        if not isinstance(module, AdditiveLinear):
            return super()._parts(prefix, module, leaves)
        try:
            stored = {leaf: self.files[f"{prefix}.{leaf}"].read(f"{prefix}.{leaf}") for leaf in leaves}
            floats = {leaf: _exactly_half(leaf, stored[leaf]) for leaf in ("codebooks", "scales")}
            weight = additive.from_tensors({"codes": stored["codes"], **floats})
        except FormatError as error:
            raise ModelError(f"{self.where}, {prefix}: {error}") from error
        return weight.tensors() | ({"bias": stored["bias"]} if "bias" in stored else {})


def read_aqlm(
    folder: Path, fields: dict, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """An AQLM directory as a model in eval mode, read tensor by tensor.

    Args:
        folder: with config.json and safetensors.
        fields: of its config.json, from `stored.read_config`.
        device: where to put it.
        dtype: of activations and dense weights; None for the stored one.

    Raises:
        ModelError: another scheme, or files that are missing, damaged, inexact in float16 or of another model.
    """
    scheme = _Scheme(folder / CONFIG, fields)
    with _Files.of(folder) as stored:
        return model_of(stored, fields, scheme, device, dtype)
