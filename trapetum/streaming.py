"""Fill a model that is still on the meta device, one tensor after another, and quantize its linears on the way.

At no time is more of the model dense than what stays dense (embedding, norms, biases, an unquantized head) and the one
layer that is being quantized.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from trapetum.architectures import empty_model, make_rope
from trapetum.checkpoint import ModelError
from trapetum.linear import CodebookLinear
from trapetum.quantizers import METHODS, require_scheme
from trapetum.shards import Shards
from trapetum.swap import (
    HEAD,
    Report,
    linears,
    note_method,
    quantized_layer,
    replace,
    require_groups,
    require_outliers,
)

_EMBEDDING = "model.embed_tokens.weight"
_HEAD_WEIGHT = f"{HEAD}.weight"
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")  # old checkpoints store what the config says already

#: (name, meta tensor, kept) -> its value in the meta tensor's shape and dtype; `kept`: it stays in the model as it is.
Read = Callable[[str, Tensor, bool], Tensor]


@dataclass(frozen=True)
class QuantizeSpec:
    """How to quantize a model while it is loaded.

    Attributes:
        bits: bits per code (2, 3, 4, 8).
        method: a name of `trapetum.quantizers.METHODS` that needs no calibration.
        n_codes: codebook entries per output channel; default 2**bits.
        lm_head: quantize the output head too (a tied embedding keeps its dense weight).
        outliers: share of the weights of each layer that is kept apart in float16 (`trapetum.sparse`); 0 for none.
    """

    bits: int = 4
    method: str = "kmeans"
    n_codes: int | None = None
    lm_head: bool = False
    outliers: float = 0.0


def require_streamable(spec: QuantizeSpec) -> None:
    """Refuse, before anything is read, a scheme that does not exist or a method that needs the whole model.

    Raises:
        ValueError: either of these.
    """
    method = METHODS.get(spec.method)
    if method is not None and method.needs_calibration:
        free = ", ".join(name for name, other in METHODS.items() if not other.needs_calibration)
        why = "needs calibration on" if method.needs else "changes"
        how = "give tokens (--calibrate, or quantize_model on the dense model)"
        raise ValueError(
            f"method {spec.method!r} {why} the whole model and cannot quantize while loading; "
            f"{how if method.needs else 'use quantize_model on the dense model'}, or use one of {free}."
        )
    require_scheme(spec.bits, spec.method, spec.n_codes)
    require_outliers(spec.method, spec.outliers)


class _Filling:
    """One pass over a model; a parameter that two modules share is read once."""

    def __init__(
        self, model: nn.Module, read: Read, spec: QuantizeSpec | None, told: Callable[[int], object]
    ):
        self._model, self._read, self._spec, self._told = model, read, spec, told
        chosen = linears(model, spec.lm_head) if spec else ()
        self._chosen = {name for name, _ in chosen}
        self._made: dict[
            int, tuple[Tensor, nn.Parameter]
        ] = {}  # the meta tensor is kept, so its id is not given again
        self.errors: dict[str, float] = {}

    def run(self) -> None:
        for name, module in list(self._model.named_modules()):
            if name in self._chosen:
                self._quantize(name, module)
            else:
                self._keep(name, module)

    def _take(self, name: str, meta: Tensor, kept: bool) -> Tensor:
        if id(meta) in self._made:
            return self._made[id(meta)][1]
        value = self._read(name, meta, kept)
        self._told(meta.nbytes)
        return value

    def _parameter(self, name: str, meta: Tensor) -> nn.Parameter:
        value = self._take(name, meta, True)
        if not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
            self._made[id(meta)] = meta, value
        return value

    def _keep(self, name: str, module: nn.Module) -> None:
        prefix = f"{name}." if name else ""
        for leaf, meta in list(module._parameters.items()):
            if meta is not None and meta.is_meta:
                module._parameters[leaf] = self._parameter(prefix + leaf, meta)
        if isinstance(module, CodebookLinear) and module.bias is not None and module.bias.is_meta:
            module.bias = self._take(prefix + "bias", module.bias, True)

    def _quantize(self, name: str, layer: nn.Linear) -> None:
        spec = self._spec
        weight = self._take(f"{name}.weight", layer.weight, False).detach()
        bias = None if layer.bias is None else self._take(f"{name}.bias", layer.bias, True)
        made, self.errors[name] = quantized_layer(
            weight, bias, spec.bits, spec.method, spec.n_codes, name=name, outliers=spec.outliers
        )
        replace(self._model, name, made)


@torch.no_grad()
def fill(
    model: nn.Module, read: Read, spec: QuantizeSpec | None = None, progress: bool = False
) -> Report | None:
    """Give every parameter that is on the meta device its value, in the order of the modules.

    Args:
        model: from `architectures.empty_model`.
        read: makes or loads a value; called once for each tensor, a shared one once.
        spec: quantize the linears as they come; None leaves all dense.
        progress: show a progress bar in bytes.

    Returns:
        what was quantized, or None.

    Raises:
        ValueError: a weight that cannot be quantized (by name).
    """
    if spec:
        require_groups(spec.method, linears(model, spec.lm_head))
    start = time.perf_counter()
    total = sum(p.nbytes for p in model.parameters() if p.is_meta)
    what = f"read and quantize to {spec.bits} bits" if spec else "read"
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not progress) as bar:
        filling = _Filling(model, read, spec, bar.update)
        filling.run()
    if spec is None:
        return None
    note_method(model, spec.method)
    codes = require_scheme(spec.bits, spec.method, spec.n_codes)
    return Report(filling.errors, time.perf_counter() - start, spec.bits, codes, spec.method)


def random_values(device: torch.device | str, seed: int) -> Read:
    """A `Read` of random weights: norms 1, the rest N(0, 0.02), the same for the same seed and device type."""
    generator = torch.Generator(device).manual_seed(seed)

    def read(name: str, like: Tensor, kept: bool) -> Tensor:
        value = torch.empty(like.shape, dtype=like.dtype, device=device)
        if like.dim() == 1 and not name.endswith("bias"):
            return value.fill_(1)
        return value.normal_(0, 0.02, generator=generator)

    return read


def stored_values(shards: Shards, device: torch.device | str) -> Read:
    """A `Read` of a checkpoint's tensors, moved to `device` and cast as transformers would cast them.

    Raises:
        ModelError: (when called) a file cannot be read, or a tensor that is kept holds NaN or infinity.
    """

    def read(name: str, like: Tensor, kept: bool) -> Tensor:
        stored = shards.read(name, device)
        value = stored.to(like.dtype)
        if kept and not bool(value.isfinite().all()):
            raise ModelError(f"{name} holds NaN or infinite values in {value.dtype}; download it again.")
        mapped = value is stored and value.device.type == "cpu"
        return value.clone() if kept and mapped else value

    return read


def _require_tensors(shards: Shards, model: nn.Module, folder) -> None:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    optional = {name for name in shards.entries if _COMPUTED.search(name)}
    if model.config.tie_word_embeddings:
        shapes.pop(_HEAD_WEIGHT, None)
        optional.add(_HEAD_WEIGHT)
    shards.require(shapes, optional)
    if model.config.tie_word_embeddings and _HEAD_WEIGHT in shards.entries:
        if not shards.equal(_HEAD_WEIGHT, _EMBEDDING):
            raise ModelError(
                f"{folder} ties the output head to the embedding and holds another {_HEAD_WEIGHT}; set "
                "tie_word_embeddings to false in its config.json if the head is its own."
            )


def load_quantized(
    folder, config, device: torch.device | str, dtype: torch.dtype | None, spec: QuantizeSpec, progress: bool
) -> tuple[nn.Module, Report]:
    """A checkpoint directory as a quantized model, read tensor by tensor.

    The codes are those that loading it dense and calling `quantize_model` gives.

    Args:
        folder: path of a directory with safetensors.
        config: its transformers config, of a supported architecture.
        device: where each layer is quantized and the model stays.
        dtype: of activations and of what stays dense; default the config's, else the stored one.
        spec: the scheme.
        progress: show a progress bar.

    Raises:
        ModelError: the checkpoint is incomplete, damaged, or of another model than its config.
        ValueError: a weight that cannot be quantized (by name).
    """
    shards = Shards(folder)
    model = empty_model(config, dtype or config.dtype or shards.dtype())
    _require_tensors(shards, model, folder)
    report = fill(model, stored_values(shards, device), spec, progress)
    make_rope(model, device)
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # dense layers of many sizes were here
    return model.eval().requires_grad_(False), report
