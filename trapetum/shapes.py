"""Shapes of the models and matrices in the workbook, and the bytes that one decoded token reads. No torch.

A decode step at batch 1 reads every weight of every linear layer once, the output head, one row of the embedding and
the keys and values of the context so far. `ModelShape.bytes_per_token` counts these; norms (under 0.1 %) and
activations (in cache) are left out, biases (under 0.1 %) with them.

A quantized cache (`KV_FORMATS`) is laid out in blocks of 64 tokens: keys share a scale and a zero point per channel and
block, values per token and key head; the latest 1 to 64 tokens are still read in fp16.
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


#: Bits of a cached key or value.
KV_FORMATS = {"fp16": 16, "int8": 8, "int4": 4}
#: Tokens in a block of a quantized cache.
KV_BLOCK = 64
_SCALE_AND_ZERO_BYTES = 4  # two fp16 numbers


def require_kv(kv: str) -> int:
    """Bits of a value in the cache format `kv`.

    Raises:
        ValueError: `kv` is not a key of `KV_FORMATS`.
    """
    if kv not in KV_FORMATS:
        raise ValueError(f"the cache format {kv!r} is unknown; the formats are {', '.join(KV_FORMATS)}.")
    return KV_FORMATS[kv]


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
class Rope:
    """Rotary positions, as transformers' `rope_parameters` has them.

    Attributes:
        theta: base of the wavelengths.
        kind: "default" or "llama3".
        factor, low_freq_factor, high_freq_factor, original_context: of "llama3": waves longer than
            original_context / low_freq_factor tokens are stretched by `factor`, those shorter than
            original_context / high_freq_factor are left alone, and those between are blended.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def parameters(self) -> dict[str, float | int | str]:
        """The fields that transformers wants for this kind."""
        plain = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind == "default":
            return plain
        return plain | {
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_context,
        }


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
        model_type: transformers' name of the architecture.
        biases: the linears of a layer that have a bias.
        rope: rotary positions.
        max_positions: tokens that the model was made for.
        sliding_window: tokens that a token attends to, itself included, or None for all.
        norm_eps: the constant under the root of the norms.
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
    model_type: str = "llama"
    biases: tuple[str, ...] = ()
    rope: Rope = Rope()
    max_positions: int = 4096
    sliding_window: int | None = None
    norm_eps: float = 1e-6

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
    def bias_weights(self) -> int:
        """Biases of all linears of all layers."""
        return self.layers * sum(outputs for name, _, outputs in self.linears() if name in self.biases)

    @property
    def norm_weights(self) -> int:
        """Weights of the norms: two a layer and the last."""
        return (2 * self.layers + 1) * self.hidden

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
        """All parameters: linears with their biases, embedding, output head unless tied, norms."""
        head = 0 if self.tied_embeddings else self.lm_head_weights
        linears = self.linear_weights + self.bias_weights
        return linears + self.embedding_weights + head + self.norm_weights

    def kv_block_bytes(self, kv: str) -> int:
        """Bytes of a block of `KV_BLOCK` tokens in one layer of a quantized cache, scales and zero points included.

        Raises:
            ValueError: `kv` is unknown or not quantized.
        """
        bits = require_kv(kv)
        if bits == 16:
            raise ValueError(f"a cache in {kv} has no blocks; ask kv_bytes.")
        values = 2 * KV_BLOCK * self.head_dim * bits // 8
        scales = (self.head_dim + KV_BLOCK) * _SCALE_AND_ZERO_BYTES
        return self.kv_heads * (values + scales)

    def kv_bytes(self, context: int, bytes_per_value: int = 2, kv: str = "fp16") -> int:
        """Bytes of the keys and values of `context` tokens, read in full by each decode step.

        Holds for attention over exactly the live context; a padded static cache read in full costs more.

        Args:
            context: tokens.
            bytes_per_value: width of a value that is not quantized (the latest tokens of a quantized cache too).
            kv: a key of `KV_FORMATS`.

        Raises:
            ValueError: `kv` is unknown.
        """
        blocks = max(0, context - 1) // KV_BLOCK if require_kv(kv) < 16 else 0
        quantized = self.layers * blocks * self.kv_block_bytes(kv) if blocks else 0
        rest = context - blocks * KV_BLOCK
        return quantized + 2 * self.layers * self.kv_heads * self.head_dim * rest * bytes_per_value

    def bytes_per_token(self, fmt: str, context: int = 0, lm_head_fmt: str = "fp16", kv: str = "fp16") -> int:
        """Bytes that one decode step at batch 1 must read: linears, output head, one embedding row, live KV cache.

        Args:
            fmt: format of the linears, a key of `FORMATS`; codebooks are counted.
            context: tokens in the KV cache (for a generation use the mean).
            lm_head_fmt: format of the output head and the embedding, which stay unquantized unless asked.
            kv: format of the KV cache, a key of `KV_FORMATS`.

        Raises:
            ValueError: a format is unknown, or the context is negative.
        """
        return sum(self.parts_per_token(fmt, context, lm_head_fmt, kv).values())

    def parts_per_token(
        self, fmt: str, context: int = 0, lm_head_fmt: str = "fp16", kv: str = "fp16"
    ) -> dict[str, int]:
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
            "KV cache": self.kv_bytes(context, kv=kv),
        }


def _shape(name, hidden, layers, intermediate, heads, kv_heads, vocab, source, **more) -> ModelShape:
    sizes = (hidden, layers, intermediate, heads, kv_heads, hidden // heads, vocab)
    return ModelShape(name, *sizes, source=source, **more)


_LLAMA_2 = "Touvron et al., Llama 2 (arXiv:2307.09288), and the released config.json"
_LLAMA_3 = (
    "Grattafiori et al., The Llama 3 Herd of Models (arXiv:2407.21783), table 3, and the released config.json"
)
_MISTRAL = "Jiang et al., Mistral 7B (arXiv:2310.06825), table 1, and the released config.json of"
_QWEN2 = "Yang et al., Qwen2 Technical Report (arXiv:2407.10671), table 1, and the released config.json"
_TINYLLAMA = "Zhang et al., TinyLlama (arXiv:2401.02385), and the released config.json"
_OURS = "this project"

_LLAMA_3_ROPE = Rope(500000.0)
_LLAMA_3_1_ROPE = Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
_MILLION = Rope(1000000.0)
_QKV = ("q_proj", "k_proj", "v_proj")
_LONG = 131072

MODELS = {
    shape.name: shape
    for shape in (
        _shape("llama-2-7b", 4096, 32, 11008, 32, 32, 32000, _LLAMA_2, norm_eps=1e-5),
        _shape("llama-2-13b", 5120, 40, 13824, 40, 40, 32000, _LLAMA_2, norm_eps=1e-5),
        _shape("llama-2-70b", 8192, 80, 28672, 64, 8, 32000, _LLAMA_2, norm_eps=1e-5),
        _shape(
            "llama-3-8b", 4096, 32, 14336, 32, 8, 128256, _LLAMA_3,
            rope=_LLAMA_3_ROPE, max_positions=8192, norm_eps=1e-5,
        ),
        _shape(
            "llama-3.1-8b", 4096, 32, 14336, 32, 8, 128256, _LLAMA_3,
            rope=_LLAMA_3_1_ROPE, max_positions=_LONG, norm_eps=1e-5,
        ),
        _shape(
            "mistral-7b", 4096, 32, 14336, 32, 8, 32768, f"{_MISTRAL} v0.3: no sliding window",
            model_type="mistral", rope=_MILLION, max_positions=32768, norm_eps=1e-5,
        ),
        _shape(
            "mistral-7b-v0.1", 4096, 32, 14336, 32, 8, 32000, f"{_MISTRAL} v0.1: a sliding window",
            model_type="mistral", max_positions=32768, sliding_window=4096, norm_eps=1e-5,
        ),
        _shape(
            "qwen2-0.5b", 896, 24, 4864, 14, 2, 151936, _QWEN2,
            model_type="qwen2", tied_embeddings=True, biases=_QKV, rope=_MILLION, max_positions=_LONG,
        ),
        _shape(
            "qwen2-7b", 3584, 28, 18944, 28, 4, 152064, _QWEN2,
            model_type="qwen2", biases=_QKV, rope=_MILLION, max_positions=_LONG,
        ),
        _shape(
            "tinyllama-1.1b", 2048, 22, 5632, 32, 4, 32000, _TINYLLAMA, max_positions=2048, norm_eps=1e-5
        ),
        _shape(
            "llama-0.9b", 2048, 16, 5632, 32, 8, 32000, f"{_OURS}: fits the memory of a laptop and no cache"
        ),
        _shape("llama-tiny", 64, 2, 160, 4, 2, 256, f"{_OURS}: for tests"),
        _shape(
            "builtin", 256, 7, 768, 8, 4, 4096, f"{_OURS}: the model in data/model",
            tied_embeddings=True, max_positions=512, norm_eps=1e-5,
        ),
        _shape(
            "builtin-40m", 512, 12, 1536, 8, 4, 4096, f"{_OURS}: python -m trapetum.builtin --shape builtin-40m",
            tied_embeddings=True, max_positions=512, norm_eps=1e-5,
        ),
    )
}  # fmt: skip


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
