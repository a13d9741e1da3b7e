"""The transformers side: `from_pretrained` on a directory that `trapetum quantize` wrote gives a `CodebookLinear` model.

Importing this module registers "trapetum" with transformers; `trapetum.register` does so at the right moment. Only what
transformers 5.0 and later have in common is used.

Where transformers says which files it is about to read, these are checked first, as `trapetum.load` checks them (hashes,
names, shapes, dtypes, finite codebooks, codes in range), which reads them once more than needed. What its hooks leave
unchecked: that the files are still the same when transformers opens them a moment later, sizes in a hostile config.json
before the empty model is made from them, and dense weights that are not finite. `trapetum.load` checks these too.
"""

from pathlib import Path

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trapetum import sparse, stored
from trapetum.additive import GROUP, N_CODEBOOKS
from trapetum.additive_linear import AdditiveLinear
from trapetum.formats import BITS
from trapetum.linear import CodebookLinear
from trapetum.quantizers import ADDITIVE, ADDITIVE_CODES
from trapetum.swap import note_method

METHOD = "trapetum"


class TrapetumConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json.

    Attributes:
        bits: bits per code; of additive layers the number of codebooks, 2 or 4.
        n_codes: codebook entries per output channel; of additive layers 256 a codebook.
        method: the quantizer that made the codes. With "additive" all layers are `AdditiveLinear`, otherwise `CodebookLinear`.
        modules_to_not_convert: names of linear layers that stayed dense.
        exceptions: {layer name: [bits, n_codes]} of layers with another scheme.
        outliers: share of the weights that every codebook layer keeps apart in float16; 0 for none.
        recipe: what the codes were made from: calibration text with its hash, sequences, length, seed, groups; or the
            checkpoint that they were imported from. None for methods without data.
        written_by: versions of the libraries that wrote the directory, or None.
        sha256: {"config", "weights"}: hashes of config.json and of the tensors' hashes, or None in old directories. What
            transformers writes itself holds no hashes.

    Raises:
        ValueError: an unknown field, or one of another type or range.
    """

    def __init__(
        self,
        bits=4,
        n_codes=None,
        method="kmeans",
        modules_to_not_convert=(),
        exceptions=None,
        outliers=0.0,
        recipe=None,
        written_by=None,
        sha256=None,
        **others,
    ):
        self.quant_method = METHOD
        self.method = _typed("method", method, str)
        checked = _additive_scheme if self.method == ADDITIVE else _scheme
        self.bits, self.n_codes = checked("quantization_config", bits, n_codes)
        self.modules_to_not_convert = list(
            _typed("modules_to_not_convert", modules_to_not_convert, (list, tuple))
        )
        exceptions = _typed("exceptions", exceptions or {}, dict)
        self.exceptions = {name: list(checked(name, *_pair(name, e))) for name, e in exceptions.items()}
        self.outliers = _share(outliers)
        if self.outliers and self.method == ADDITIVE:
            raise ValueError(
                f"quantization_config has outliers {self.outliers:g} beside additive codebooks; quantize the model again."
            )
        self.recipe = _typed("recipe", recipe, (dict, type(None)))
        self.written_by = _typed("written_by", written_by, (dict, type(None)))
        self.sha256 = _typed("sha256", sha256, (dict, type(None)))
        others.pop("quant_method", None)
        if others:
            raise ValueError(
                f"quantization_config has fields that this version of trapetum does not know: {', '.join(sorted(others))}; "
                "quantize the model again or update trapetum."
            )

    def scheme(self, name: str) -> tuple[int, int]:
        """(bits, n_codes) of the layer `name`."""
        bits, n_codes = self.exceptions.get(name, (self.bits, self.n_codes))
        return bits, n_codes

    def to_dict(self) -> dict:
        """For config.json, without what holds only for the files that were read."""
        fields = super().to_dict()
        gone = {"sha256", "written_by"} | ({"recipe"} if self.recipe is None else set())
        gone |= set() if self.outliers else {"outliers"}
        return {name: value for name, value in fields.items() if name not in gone}


def _typed(field: str, value, kinds):
    if not isinstance(value, kinds):
        raise ValueError(
            f"quantization_config has {field} of type {type(value).__name__}; quantize the model again."
        )
    return value


def _pair(name: str, value) -> tuple:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(
            f"quantization_config has an exception for {name!r} that is not [bits, n_codes]; quantize the model again."
        )
    return tuple(value)


def _scheme(name: str, bits, n_codes) -> tuple[int, int]:
    if type(bits) is not int or bits not in BITS:
        known = ", ".join(map(str, BITS))
        raise ValueError(
            f"{name!r} has {str(bits)[:20]!r} bits; known are {known}, so quantize the model again."
        )
    n_codes = 2**bits if n_codes is None else n_codes
    if type(n_codes) is not int or not 1 <= n_codes <= 2**bits:
        raise ValueError(
            f"{name!r} has {str(n_codes)[:20]!r} codes; {bits} bits hold 1 to {2**bits}, so quantize the model again."
        )
    return bits, n_codes


def _additive_scheme(name: str, bits, n_codes) -> tuple[int, int]:
    if type(bits) is not int or bits not in N_CODEBOOKS or n_codes not in (None, ADDITIVE_CODES):
        raise ValueError(
            f"{name!r} has {str(bits)[:20]!r} bits and {str(n_codes)[:20]!r} codes; additive layers have 2 or 4 bits and "
            f"{ADDITIVE_CODES} codes a codebook, so quantize the model again."
        )
    return bits, ADDITIVE_CODES


def _share(outliers) -> float:
    if type(outliers) not in (int, float) or not 0 <= outliers <= sparse.MOST:
        raise ValueError(
            f"quantization_config has outliers {str(outliers)[:20]!r}; a share is 0 to {sparse.MOST:g}, so quantize the model "
            "again."
        )
    return float(outliers)


class TrapetumQuantizer(HfQuantizer):
    """Puts empty `CodebookLinear` or `AdditiveLinear` modules in place before transformers reads the stored codes into them."""

    requires_calibration = True  # transformers cannot quantize with it: `trapetum quantize` does

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        config = self.quantization_config
        linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        for name, layer in linears:
            if name not in config.modules_to_not_convert:
                parent, _, leaf = name.rpartition(".")
                if config.method == ADDITIVE:
                    made = _empty_additive(name, layer, config.scheme(name)[0])
                else:
                    made = _empty(layer, *config.scheme(name), config.outliers)
                setattr(model.get_submodule(parent), leaf, made)
        note_method(model, config.method, {"method": config.method} | (config.recipe or {}))
        if checkpoint_files:
            stored.check(model, [Path(file) for file in checkpoint_files], config.sha256)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        return model

    def _dequantize(self, model, dtype=None):
        from trapetum.swap import dequantize_model

        return dequantize_model(model, dtype)

    def is_serializable(self, *args, **kwargs) -> bool:
        """Codes can be written back with `save_pretrained`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def _empty(layer: nn.Linear, bits: int, n_codes: int, outliers: float) -> CodebookLinear:
    with torch.device(layer.weight.device):
        return CodebookLinear(
            layer.in_features,
            layer.out_features,
            bits,
            n_codes,
            bias=layer.bias is not None,
            dtype=layer.weight.dtype,
            outliers=outliers,
        )


def _empty_additive(name: str, layer: nn.Linear, n_codebooks: int) -> AdditiveLinear:
    if layer.in_features % GROUP:
        raise ValueError(
            f"{name} has {layer.in_features} inputs, and additive codebooks store groups of {GROUP}; config.json and weights "
            "are of two models."
        )
    with torch.device(layer.weight.device):
        return AdditiveLinear(
            layer.in_features,
            layer.out_features,
            n_codebooks,
            bias=layer.bias is not None,
            dtype=layer.weight.dtype,
        )


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(TrapetumConfig)
    register_quantizer(METHOD)(TrapetumQuantizer)
