"""The decode step as five kernels a layer, all of this package: nothing of PyTorch runs between one token and the next.

    next_token -> x
    each layer:  qkv (norm, product) | attention (rope, cache, split softmax) | out (product, + x)
                 gate_up (norm, product, silu *) | down (product, + x)
    head (norm, product) -> next_token

Every buffer is made once, so the launches can be captured in a CUDA graph, or written down and made by another program
(`trapetum.export`). With `pdl` each kernel is launched while the one before it runs: it loads its weights, then waits. All of
them let the next one start only after their own wait, so when a kernel begins, the kernel before the one before it has
finished; attention relies on that when it reads the cache and the position early.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from trapetum import cuda_attention, cuda_token
from trapetum.cuda_attention import Attention, Heads
from trapetum.kv_cache import KvCache
from trapetum.llama_step import LlamaStep, UnsupportedModel
from trapetum.projection import WithOutliers

PARTS = ("linears", "attention", "norms", "sampling")
_WARPS, _WARPS_LONG, _LONG = (
    4,
    8,
    4096,
)  # of an attention block: larger ones stream a long cache faster, smaller ones start sooner


def _require_kernels(llama: LlamaStep, rows: int) -> None:
    layers = llama.layers
    products = [p for layer in layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    if any(isinstance(product, WithOutliers) for product in [*products, llama.head]):
        raise UnsupportedModel(
            "the fused step has no kernel for outliers kept apart in fp16; use the stage graph."
        )
    if not all(hasattr(product, "launch") for product in [*products, llama.head]):
        raise UnsupportedModel(
            "some layers cannot be stacked (their output sizes are no multiples of 32) or have weights of another kind, which "
            "the fused step has no kernel for; use the stage graph."
        )
    heads, kv_heads, width, _ = llama.heads
    capability = torch.cuda.get_device_capability(llama.device)
    problem = cuda_attention.why_not(width, heads // kv_heads, rows, llama.dtype, capability)
    if problem:
        raise UnsupportedModel(f"the fused step cannot run this model: {problem}")
    if llama.hidden % 8 or llama.intermediate % 32:
        raise UnsupportedModel(
            f"the fused step needs a hidden size that is a multiple of 8 and an intermediate size that is one of 32, not "
            f"{llama.hidden} and {llama.intermediate}; use the stage graph."
        )
    if len({type(product) for layer in layers for product in (layer.gate_up, layer.down)}) > 1:
        raise UnsupportedModel(
            "the fused step needs codes in all of gate, up and down or in none of them; use the stage graph."
        )
    if not llama.gated_by_silu:
        raise UnsupportedModel("the fused step multiplies by silu(gate) only; use the stage graph.")


class FusedStep:
    """One token (or a token and drafts) of a Llama-shaped model on one GPU.

    Args:
        llama: the products, made without a cache of its own.
        max_context: tokens of prompt and answer together.
        kv: "fp16", "int8" or "int4": how the cache is kept.
        rows: tokens fed a step; beyond the first they are drafts by prompt lookup.
        pdl: let each kernel overlap the one before it.

    Attributes:
        state: token, position and history on the device.
        without: parts of the step, of `PARTS`, that are left out (for measurements).

    Raises:
        UnsupportedModel: a size or a kind of layer that the kernels do not have.
    """

    def __init__(
        self, llama: LlamaStep, max_context: int, kv: str = "fp16", rows: int = 1, pdl: bool = False
    ):
        _require_kernels(llama, rows)
        self._llama, self._rows, self._pdl = llama, rows, pdl
        self.without: frozenset[str] = frozenset()
        self._heads = Heads(*llama.heads)
        self._embedding, self._norm, self._eps = llama.constants
        index = self._embedding.get_device()
        warps = _WARPS if max_context < _LONG else _WARPS_LONG
        self._attention = Attention(self._heads, rows, llama.dtype, index, warps)
        sizes = self._heads.kv_heads, self._heads.head_dim, max_context + rows, llama.dtype, llama.device
        self.caches = [KvCache(kv, *sizes) for _ in llama.layers]
        self._cos, self._sin = llama.rope(self.caches[0].context)
        self.state = cuda_token.State.make(max_context + rows, rows, llama.device)

        def buffer(width):
            return torch.zeros(rows, width, dtype=llama.dtype, device=llama.device)

        self._x, self._middle = buffer(llama.hidden), buffer(llama.hidden)
        self._qkv, self._attended = buffer(self._heads.row), buffer(self._heads.heads * self._heads.head_dim)
        self._gated = buffer(llama.intermediate * llama.layers[0].gate_up.factors)
        self.logits = buffer(llama.head.out_features)

    # What a generation calls

    def start(self, ids: Tensor) -> None:
        """Prefill the prompt `ids` (int64 [n], on the device), choose its next token and load the first x."""
        logits = self._llama.prefill_rows(ids, [cache.store for cache in self.caches])
        self.state.reset(ids, logits.argmax(-1))
        self.embed()

    def embed(self) -> None:
        """x from the tokens: once before the first step."""
        cuda_token.embed(self.state, self._embedding, self._x)

    def advance(self) -> None:
        """Launch one step on the current stream."""
        for layer, cache in zip(self._llama.layers, self.caches, strict=True):
            self._product(layer.qkv, self._x, self._qkv, norm=layer.attention_norm)
            if "attention" not in self.without:
                place = self.state.position, self._cos, self._sin
                self._attention(self._qkv, cache, *place, self._attended, self._pdl)
            self._product(layer.out, self._attended, self._middle, residual=self._x)
            gate, down = layer.gate_up.gate_options
            self._product(layer.gate_up, self._middle, self._gated, norm=layer.mlp_norm, **gate)
            self._product(layer.down, self._gated, self._x, residual=self._middle, **down)
        self._product(self._llama.head, self._x, self.logits, norm=self._norm)
        if "sampling" not in self.without:
            cuda_token.next_token(self.logits, self.state, self._embedding, self._x, self._pdl)

    def _product(self, product, x: Tensor, out: Tensor, norm: Tensor | None = None, **fused) -> None:
        if "linears" in self.without:
            return
        if norm is not None and "norms" not in self.without:
            fused |= {"norm": norm, "eps": self._eps}
        product.launch(x, out, self._pdl, **fused)

    # What others need to know

    def tensors(self) -> dict[str, Tensor]:
        """Every buffer that a launch points into, by name: `weights.*`, `state.*`, `scratch.*`."""
        named = {"weights.embedding": self._embedding, "weights.norm": self._norm}
        named |= {"weights.cos": self._cos, "weights.sin": self._sin}
        for number, (layer, cache) in enumerate(zip(self._llama.layers, self.caches, strict=True)):
            named |= _layer_tensors(f"layers.{number}", layer, cache)
        named |= {f"weights.head.{n}": t for n, t in self._llama.head.tensors().items()}
        state = vars(self.state).items()
        named |= {f"state.{name}": value for name, value in state if isinstance(value, Tensor)}
        attention = self._attention
        scratch = dict(x=self._x, middle=self._middle, qkv=self._qkv, attended=self._attended)
        scratch |= dict(gated=self._gated, logits=self.logits)
        scratch |= dict(partial=attention.partial, arrived=attention.arrived)
        return named | {f"scratch.{name}": tensor for name, tensor in scratch.items()}

    @property
    def launches(self) -> int:
        """Kernels a token, those left out not counted."""
        linears = 0 if "linears" in self.without else 4 * len(self.caches) + 1
        attention = 0 if "attention" in self.without else len(self.caches)
        return linears + attention + ("sampling" not in self.without)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return sum(cache.nbytes for cache in self.caches)


def _layer_tensors(prefix: str, layer, cache: KvCache) -> Iterable[tuple[str, Tensor]]:
    named = {
        f"weights.{prefix}.attention_norm": layer.attention_norm,
        f"weights.{prefix}.mlp_norm": layer.mlp_norm,
    }
    for name in ("qkv", "out", "gate_up", "down"):
        product = getattr(layer, name)
        named |= {f"weights.{prefix}.{name}.{n}": t for n, t in product.tensors().items()}
    return named | {f"state.{prefix}.{name}": tensor for name, tensor in cache.tensors().items()}
