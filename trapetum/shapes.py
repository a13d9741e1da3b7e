"""Shapes of the models and matrices in the workbook, and the bytes that one decoded token reads. No torch.

A decode step at batch 1 reads every weight of every linear layer once, the output head, one row of the embedding and
the keys and values of the context so far. `ModelShape.bytes_per_token` counts these; norms (under 0.1 %) and
activations (in cache) are left out.
"""

from dataclasses import dataclass

_CODE_BYTES = 2  # a codebook entry is fp16

# Bits of a stored weight, and entries of the codebook that each output channel carries (0: none).
FORMATS = {
    "fp32": (32, 0),
    "fp16": (16, 0),
    "bf16": (16, 0),
    "int8": (8, 0),
    "codebook-8": (8, 256),
    "codebook-4": (4, 16),
    "codebook-3": (3, 8),
    "codebook-2": (2, 4),
}


def matrix_bytes(in_features: int, out_features: int, fmt: str = "fp16") -> int:
    """Bytes that one weight matrix takes as stored.

    A row of codes is padded to whole bytes; codebooks (fp16, one an output channel) are counted, and for `int8` one
    fp16 scale an output channel.

    Args:
        in_features, out_features: the matrix.
        fmt: a key of `FORMATS`.

    Raises:
        ValueError: `fmt` is unknown.
    """
    if fmt not in FORMATS:
        raise ValueError(f"the format {fmt!r} is unknown; the formats are {', '.join(FORMATS)}.")
    bits, n_codes = FORMATS[fmt]
    overhead = _CODE_BYTES * (1 if fmt == "int8" else n_codes)
    return out_features * (-(-in_features * bits // 8) + overhead)


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a Llama-family model.

    Attributes:
        name: e.g. `llama-2-7b`.
        hidden, layers, intermediate: width of the residual stream, number of layers, width of the MLP.
        heads, kv_heads, head_dim: query heads, key and value heads, width of a head.
        vocab: rows of the embedding.
        tied_embeddings: whether the output head is the embedding.
        source: where the dimensions were taken from.
    """

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied_embeddings: bool = False
    source: str = ""

    def linears(self) -> list[tuple[str, int, int]]:
        """The linear layers of one decoder layer as (name, in_features, out_features), in the order they run."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            ("q_proj", self.hidden, queries),
            ("k_proj", self.hidden, keys),
            ("v_proj", self.hidden, keys),
            ("o_proj", queries, self.hidden),
            ("gate_proj", self.hidden, self.intermediate),
            ("up_proj", self.hidden, self.intermediate),
            ("down_proj", self.intermediate, self.hidden),
        ]

    @property
    def linear_weights(self) -> int:
        """Weights of all linears of all layers, without the output head."""
        return self.layers * sum(inputs * outputs for _, inputs, outputs in self.linears())

    @property
    def lm_head_weights(self) -> int:
        """Weights that the output head reads for a token; with tied embeddings these are the embedding's."""
        return self.hidden * self.vocab

    @property
    def embedding_weights(self) -> int:
        """Weights of the embedding table."""
        return self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        """All parameters: linears, embedding, output head unless tied, and two norms a layer plus the last."""
        head = 0 if self.tied_embeddings else self.lm_head_weights
        return self.linear_weights + self.embedding_weights + head + (2 * self.layers + 1) * self.hidden

    def kv_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """Bytes of the keys and values of `context` tokens, read in full by each decode step.

        Holds for attention over exactly the live context; a padded static cache read in full costs more.
        """
        return 2 * self.layers * self.kv_heads * self.head_dim * context * bytes_per_value

    def bytes_per_token(self, fmt: str, context: int = 0, lm_head_fmt: str = "fp16") -> int:
        """Bytes that one decode step at batch 1 must read: linears, output head, one embedding row, live KV cache.

        Args:
            fmt: format of the linears, a key of `FORMATS`; codebooks are counted.
            context: tokens in the KV cache, kept in fp16 (for a generation use the mean).
            lm_head_fmt: format of the output head and the embedding, which stay unquantized unless asked.

        Raises:
            ValueError: a format is unknown, or the context is negative.
        """
        return sum(self.parts_per_token(fmt, context, lm_head_fmt).values())

    def parts_per_token(self, fmt: str, context: int = 0, lm_head_fmt: str = "fp16") -> dict[str, int]:
        """The bytes of `bytes_per_token` by part: attention, MLP, output head, embedding row, KV cache.

        Raises:
            ValueError: as `bytes_per_token`.
        """
        if context < 0:
            raise ValueError(f"the context is a number of tokens, not {context}.")
        sizes = {name: matrix_bytes(inputs, outputs, fmt) for name, inputs, outputs in self.linears()}
        attention = sum(sizes[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
        return {
            "attention weights": self.layers * attention,
            "MLP weights": self.layers * (sum(sizes.values()) - attention),
            "output head": matrix_bytes(self.hidden, self.vocab, lm_head_fmt),
            "embedding row": matrix_bytes(self.hidden, 1, lm_head_fmt),
            "KV cache": self.kv_bytes(context),
        }


def _llama(name, hidden, layers, intermediate, heads, kv_heads, vocab, source, tied=False) -> ModelShape:
    return ModelShape(
        name,
        hidden,
        layers,
        intermediate,
        heads,
        kv_heads,
        hidden // heads,
        vocab,
        tied_embeddings=tied,
        source=source,
    )


_LLAMA_2 = "Touvron et al., Llama 2 (arXiv:2307.09288), and the released config.json"
_LLAMA_3 = (
    "Grattafiori et al., The Llama 3 Herd of Models (arXiv:2407.21783), table 3, and the released config.json"
)
_OURS = "this project"

MODELS = {
    shape.name: shape
    for shape in (
        _llama("llama-2-7b", 4096, 32, 11008, 32, 32, 32000, _LLAMA_2),
        _llama("llama-2-13b", 5120, 40, 13824, 40, 40, 32000, _LLAMA_2),
        _llama("llama-2-70b", 8192, 80, 28672, 64, 8, 32000, _LLAMA_2),
        _llama("llama-3-8b", 4096, 32, 14336, 32, 8, 128256, _LLAMA_3),
        _llama(
            "llama-0.9b", 2048, 16, 5632, 32, 8, 32000, f"{_OURS}: fits the memory of a laptop and no cache"
        ),
        _llama("llama-tiny", 64, 2, 160, 4, 2, 256, f"{_OURS}: for tests"),
        _llama("builtin", 256, 7, 768, 8, 4, 4096, f"{_OURS}: the model in data/model", tied=True),
    )
}


def model(name: str) -> ModelShape:
    """The shape called `name`.

    Raises:
        ValueError: there is none of that name; the message lists those there are.
    """
    if name not in MODELS:
        raise ValueError(f"there is no model shape {name!r}; the shapes are {', '.join(MODELS)}.")
    return MODELS[name]


# Matrices of the GEMV benchmark, (in_features, out_features): Llama-family layers, fused ones, and a small one.
GEMV_SHAPES = (
    (3072, 768),
    (4096, 4096),
    (4096, 11008),
    (11008, 4096),
    (4096, 12288),
    (4096, 22016),
    (8192, 8192),
    (8192, 28672),
    (28672, 8192),
    (4096, 14336),
    (14336, 4096),
    (4096, 1024),
    (5120, 13824),
)

# The few that a quick run times.
QUICK_SHAPES = ((3072, 768), (4096, 4096), (11008, 4096), (4096, 11008), (8192, 28672))
