"""The transformers side: `from_pretrained` on a directory that `trapetum quantize` wrote gives a `CodebookLinear` model.

Importing this module registers "trapetum" with transformers; `trapetum.register` does so at the right moment. Only what
transformers 5.0 and later have in common is used.
"""

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trapetum.linear import CodebookLinear

METHOD = "trapetum"


class TrapetumConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json.

    Attributes:
        bits: bits per code.
        n_codes: codebook entries per output channel.
        method: the quantizer that made the codes.
        modules_to_not_convert: names of linear layers that stayed dense.
        exceptions: {layer name: [bits, n_codes]} of layers with another scheme.
    """

    def __init__(
        self, bits=4, n_codes=None, method="kmeans", modules_to_not_convert=(), exceptions=None, **others
    ):
        self.quant_method = METHOD
        self.bits, self.n_codes, self.method = bits, n_codes or 2**bits, method
        self.modules_to_not_convert = list(modules_to_not_convert)
        self.exceptions = dict(exceptions or {})
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


class TrapetumQuantizer(HfQuantizer):
    """Puts empty `CodebookLinear` modules in place before transformers reads the stored codes into them."""

    requires_calibration = True  # transformers cannot quantize with it: `trapetum quantize` does

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)

    def _process_model_before_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        for name, layer in linears:
            if name not in config.modules_to_not_convert:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, _empty(layer, *config.scheme(name)))
        model.trapetum_method = config.method
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


def _empty(layer: nn.Linear, bits: int, n_codes: int) -> CodebookLinear:
    with torch.device(layer.weight.device):
        return CodebookLinear(
            layer.in_features,
            layer.out_features,
            bits,
            n_codes,
            bias=layer.bias is not None,
            dtype=layer.weight.dtype,
        )


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(TrapetumConfig)
    register_quantizer(METHOD)(TrapetumQuantizer)
