"""The same model several times over: dense in each dtype, then with codebook weights; one in memory at a time."""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from trapetum import models, swap, timing
from trapetum.models import DTYPES, Loaded
from trapetum.shapes import MODELS

DENSE = tuple(DTYPES)
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Refuse = Callable[[str, dict, str], None]


@dataclass(frozen=True)
class Variant:
    """A model with one kind of weights.

    Attributes:
        method: "fp32", "fp16", "bf16" or "codebook".
        loaded: the model.
        config: what a record's config says of it: model, bits, n_codes, linears, dtype.
    """

    method: str
    loaded: Loaded
    config: dict

    @property
    def token_weight_bytes(self) -> int:
        """Bytes of weights read for one token: all but the rows of the embedding that are not looked up."""
        model = self.loaded.model
        embedding = model.get_input_embeddings().weight
        tied = model.get_output_embeddings().weight is embedding if _dense_head(model) else False
        return swap.weight_bytes(model) - (0 if tied else embedding.nbytes)

    @property
    def _width(self) -> int:
        """Bytes of an activation."""
        return torch.finfo(activation_dtype(self)).bits // 8

    def kv_name(self, kv: str = "fp16") -> str:
        """How the cache is kept in words that hold on every device: the activations' dtype, "int8" or "int4"."""
        return NAMES[activation_dtype(self)] if kv == "fp16" else kv

    def token_bytes(self, context: float, kv: str = "fp16") -> int:
        """Bytes moved for one token at `context` cached tokens: weights, and the cache as it is kept."""
        return int(self.token_weight_bytes + self.loaded.shape.kv_bytes(context, self._width, kv))

    def estimate_bytes(self, context: int, kv: str = "fp16", rows: int = 1, prompt: int = 0) -> int:
        """Bytes that a decode up to `context` tokens should need, from the shape alone; with fp32 activations the weights
        as they are and the cache."""
        shape = self.loaded.shape
        if self._width == 2:
            bits = self.config["bits"] if self.config["linears"] == "codebook" else None
            coded_head = self.config.get("lm_head") == "codebook"
            apart = self.config.get("outliers", 0.0)
            parts = models.memory_estimate(shape, bits, context, kv, coded_head, rows, prompt, apart)
            return sum(parts.values())
        return swap.weight_bytes(self.loaded.model) + int(shape.kv_bytes(context, self._width, kv))


def _dense_head(model) -> bool:
    return isinstance(model.get_output_embeddings(), torch.nn.Linear)


def activation_dtype(variant: Variant) -> torch.dtype:
    """The dtype that the cache is kept in."""
    from trapetum.llama_step import activation_dtype as of_model

    return of_model(variant.loaded.model)


def best_16_bit(shape, rounds: int = 5) -> str:
    """Which of "fp16" and "bf16" this CPU multiplies faster, tried cold on the model's widest product.

    Cold, because out of the cache the order of the two can be the other way round.
    """
    copies = timing.copies_for(2 * shape.intermediate * shape.hidden, "cpu", among=2)
    weight, cases = torch.randn(shape.intermediate, shape.hidden), {}
    for name in ("fp16", "bf16"):
        w, x = weight.to(DTYPES[name]), torch.randn(1, shape.hidden).to(DTYPES[name])
        distinct = [w, *(w.clone() for _ in range(copies - 1))]
        cases[name] = [lambda x=x, w=w: F.linear(x, w) for w in distinct]
    times = timing.interleaved_us(cases, rounds)
    return min(times, key=lambda name: timing.Spread.of(times[name]).median)


def default_methods(device: str, name: str, profile: str) -> tuple[str, ...]:
    """What a decode compares: on a GPU fp16 and codebook; on a CPU fp32, the faster 16-bit dtype, codebook.

    The full profile on a CPU takes both 16-bit dtypes.
    """
    if device == "cuda":
        return ("fp16", "codebook")
    if profile == "full":
        return ("fp32", "fp16", "bf16", "codebook")
    return ("fp32", "16-bit", "codebook")


def variants(
    name: str,
    device: str,
    methods: Sequence[str],
    bits: Sequence[int],
    lm_head: bool = False,
    refuse: Refuse | None = None,
) -> Iterator[Variant]:
    """Load the model once per method, give the one before back first.

    Args:
        name: as for `models.load`.
        device: "cpu" or "cuda".
        methods: "fp32", "fp16", "bf16", "16-bit" (the faster on this CPU), "codebook".
        bits: of the codebook weights, one variant each.
        lm_head: codes in the output head too.
        refuse: called with the method, its config and a sentence where random weights of a shape do not fit the free
            memory, and the next variant is taken; None raises.

    Raises:
        ValueError: an unknown method.
        ModelError: the model cannot be had.
        MemoryError: it does not fit, and there is no `refuse`.
    """
    unknown = [m for m in methods if m not in (*DENSE, "16-bit", "codebook")]
    if unknown:
        raise ValueError(
            f"method {unknown[0]!r} is unknown; a decode knows {', '.join(DENSE)}, 16-bit and codebook."
        )
    dense = [m for m in methods if m != "codebook"]
    last = yield from _dense_variants(name, device, dense, refuse)
    for b in bits if "codebook" in methods else ():
        if not _refused(name, device, "codebook", b, refuse):
            yield codebook_variant(name, device, last, b, lm_head)
        forget()


def _dense_variants(
    name: str, device: str, methods: Sequence[str], refuse: Refuse | None
) -> Iterator[Variant]:
    """Yield the dense ones; return the last dtype's name, which the codebook variant's other weights then have."""
    loaded, last = None, None
    for method in methods:
        if method == "16-bit":
            shape = loaded.shape if loaded else models.load(name, device, "bf16").shape
            method = best_16_bit(shape)
        last = method
        if loaded is None and _refused(name, device, method, torch.finfo(DTYPES[method]).bits, refuse):
            continue
        loaded = _dense(name, device, method, loaded)
        config = {"model": name, "bits": torch.finfo(DTYPES[method]).bits, "linears": "dense"}
        yield Variant(method, loaded, {**config, "dtype": method})
        forget()
    return last


def _refused(name: str, device: str, method: str, bits: int, refuse: Refuse | None) -> bool:
    """Whether random weights of a shape do not fit the free memory, after `refuse` was told so."""
    shape = MODELS.get(name.removeprefix("random:")) if name.startswith("random:") else None
    if shape is None:
        return False
    codes = bits if method == "codebook" else None
    need = 4 * shape.parameters if method == "fp32" else sum(models.memory_estimate(shape, codes, 1).values())
    free = timing.free_bytes(device)
    if need <= free:
        return False
    error = f"{shape.name} in {bits} bits takes {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on {device}."
    if refuse is None:
        raise MemoryError(error)
    linears = "codebook" if method == "codebook" else "dense"
    refuse(method, {"model": name, "bits": bits, "linears": linears}, error)
    return True


def _dense(name: str, device: str, method: str, before: Loaded | None) -> Loaded:
    """Random weights are converted from the variant before (making new ones takes longer); others are loaded."""
    if before is None or before.kind != "random":
        return models.load(name, device, method)
    before.model.to(DTYPES[method])
    before.model.config.dtype = DTYPES[method]
    return before


def codebook_variant(
    name: str, device: str, dtype: str | None = None, bits: int = 4, lm_head: bool = False
) -> Variant:
    """The model with codes in its linear layers.

    Args:
        name, device, bits, lm_head: as for `variants`.
        dtype: of what stays dense; None for fp16 on a GPU and bf16 on a CPU.
    """
    dtype = dtype or ("fp16" if device == "cuda" else "bf16")
    if name.startswith("random:"):
        loaded = models.load(name, device, dtype, bits=bits, lm_head=lm_head)
    else:
        loaded = models.load(name, device, dtype)
        if not swap.is_quantized(loaded.model):
            swap.quantize_model(loaded.model, bits, lm_head=lm_head, progress=False)
    _, layer = next(iter(swap.coded_layers(loaded.model)))
    linears = "additive" if swap.additive_layers(loaded.model) else "codebook"
    config = {"model": name, "bits": layer.bits, "n_codes": layer.n_codes, "linears": linears}
    if layer.outlier_share:
        config["outliers"] = layer.outlier_share
    return Variant(
        "codebook", loaded, {**config, "dtype": dtype, "lm_head": "codebook" if lm_head else dtype}
    )


def forget() -> None:
    """Give memory back that nothing refers to any more, so that the next peak is the next run's own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
