"""How much memory a model takes while it decodes, part by part, before it is loaded. No torch."""

from trapetum.shapes import FORMATS, KV_BLOCK, ModelShape, matrix_bytes, require_kv

_HALF = 2  # bytes of an fp16 or bf16 number
_FLOAT = 4
_NARROW = 1 << 16  # inputs that a 2-byte column can name
_TILE = 16  # tokens that a 16-bit cache is rounded up to
_RING = 128  # tokens that a quantized cache also holds in 16 bits
#: Tokens whose products are added to the sums of calibration at once.
AT_ONCE = 8192
_ONE_HOT = 1 << 27  # entries of the one-hot matrix that a codebook step holds at most, on a GPU


def cache_bytes(shape: ModelShape, context: int, kv: str = "fp16") -> int:
    """Bytes of a cache made for `context` tokens.

    A quantized cache is made of whole blocks of `KV_BLOCK` tokens, scales and zero points included, and a layer's 128 latest
    tokens in fp16, where a block waits until it is certain. `trapetum.kv_cache` allocates exactly this.

    Args:
        shape: the model.
        context: tokens that it must hold.
        kv: a key of `trapetum.shapes.KV_FORMATS`.

    Raises:
        ValueError: `kv` is unknown.
    """
    if require_kv(kv) == 16:
        return shape.kv_bytes(-(-context // _TILE) * _TILE)
    blocks = -(-context // KV_BLOCK)
    return shape.layers * blocks * shape.kv_block_bytes(kv) + shape.kv_bytes(_RING)


def outlier_bytes(inputs: int, outputs: int, share: float) -> int:
    """Bytes of values, columns and row starts of the share that a matrix keeps apart, as `trapetum.sparse` stores them."""
    if not share:
        return 0
    entry = _HALF + (_HALF if inputs <= _NARROW else _FLOAT)
    return entry * max(1, round(share * outputs * inputs)) + 4 * (outputs + 1)


def _matrix(inputs: int, outputs: int, fmt: str, outliers: float) -> int:
    return matrix_bytes(inputs, outputs, fmt) + outlier_bytes(inputs, outputs, outliers)


def _linear_bytes(shape: ModelShape, fmt: str, outliers: float) -> int:
    layer = sum(_matrix(inputs, outputs, fmt, outliers) for _, inputs, outputs in shape.linears())
    return shape.layers * layer + _HALF * (shape.bias_weights + shape.norm_weights)


def _head_bytes(shape: ModelShape, fmt: str, lm_head: bool, outliers: float) -> int:
    if lm_head:
        return _matrix(shape.hidden, shape.vocab, fmt, outliers)
    return 0 if shape.tied_embeddings else _HALF * shape.lm_head_weights


def _qkv(shape: ModelShape) -> int:
    return (shape.heads + 2 * shape.kv_heads) * shape.head_dim


def _step_bytes(shape: ModelShape, context: int, rows: int) -> int:
    """Two residual streams, the four products of a layer, logits, and the two rope tables."""
    attended = shape.heads * shape.head_dim
    halves = 2 * shape.hidden + _qkv(shape) + attended + shape.intermediate
    return rows * (_HALF * halves + _FLOAT * shape.vocab) + 2 * _HALF * context * shape.head_dim


def _prefill_bytes(shape: ModelShape, dense: bool, prompt: int) -> int:
    """What all tokens of a prompt at once need: the widest product with its input, and its weight written out dense."""
    if prompt <= 1:
        return 0
    widest = max(_qkv(shape), 2 * shape.intermediate)
    numbers = prompt * (2 * shape.hidden + widest + shape.intermediate)
    return _HALF * (numbers + (0 if dense else shape.hidden * widest))


def memory_estimate(
    shape: ModelShape,
    bits: int | None,
    context: int,
    kv: str = "fp16",
    lm_head: bool = False,
    rows: int = 1,
    prompt: int = 0,
    outliers: float = 0.0,
) -> dict[str, int]:
    """Bytes that a 16-bit or codebook model takes while it decodes, by part; their sum is the expected peak.

    Args:
        shape: the model.
        bits: of the codes of the linears, or None for dense 16-bit weights.
        context: tokens that the cache is made for.
        kv: format of the cache, a key of `trapetum.shapes.KV_FORMATS`.
        lm_head: codes in the output head too.
        rows: tokens fed at once in a step.
        prompt: tokens of a prompt that goes through the layers at once; 0 leaves the prefill out.
        outliers: share of the weights kept apart in fp16 beside codes (`trapetum.sparse`); 0 for none.

    Returns:
        "weights" (linears with codebooks and biases, norms), "embedding", "output head" (0 where it is the embedding),
        "KV cache" (scales included), "activations" (one step's buffers and the rope tables) and "prefill". The CUDA
        context, libraries and what an allocator holds in reserve are not counted, nor is padding to whole tiles of a
        kernel's layout, which shapes of released models do not need.

    Raises:
        ValueError: no such bits or cache format, or a context below 1.
    """
    fmt = "fp16" if bits is None else f"codebook-{bits}"
    if fmt not in FORMATS:
        known = ", ".join(name.removeprefix("codebook-") for name in FORMATS if name.startswith("codebook-"))
        raise ValueError(f"{bits} bits per code are not supported; choose one of {known}, or None for fp16.")
    if context < 1:
        raise ValueError(f"the context is {context}; a cache holds at least 1 token.")
    return {
        "weights": _linear_bytes(shape, fmt, outliers if bits else 0.0),
        "embedding": _HALF * shape.embedding_weights,
        "output head": _head_bytes(shape, fmt, lm_head and bits is not None, outliers),
        "KV cache": cache_bytes(shape, context, kv),
        "activations": _step_bytes(shape, context, rows),
        "prefill": _prefill_bytes(shape, bits is None, prompt),
    }


def _layer_hessians(shape: ModelShape, groups: int) -> int:
    """Of one decoder layer: plain ones shared by linears with one input, guided ones of each linear."""
    inputs = {name: size for name, size, _ in shape.linears()}
    plain = sum(inputs[name] ** 2 for name in ("q_proj", "o_proj", "gate_proj", "down_proj"))
    return _FLOAT * (plain + groups * sum(size**2 for size in inputs.values()))


def calibration_bytes(
    shape: ModelShape,
    tokens: int,
    longest: int,
    groups: int = 0,
    itemsize: int = _HALF,
    lm_head: bool = False,
) -> dict[str, int]:
    """Bytes that `trapetum.quantizing` takes while it calibrates and quantizes a model, by part.

    For Llama-2-7B with 128 x 2048 tokens, guided with 4 groups, in 16 bits, that is 13.5 GB of model, 2.1 of hidden states,
    4.2 of Hessians, 1.5 of inputs that are added to them at once, 1.8 for one sequence and 7.1 for one layer: 30.3 GB on the
    GPU, and 0.9 GB of token weights on the host.

    Args:
        shape: the model.
        tokens: of all sequences.
        longest: tokens of the longest sequence.
        groups: of output rows, where the method is guided; 0 where it is not.
        itemsize: bytes of an activation.
        lm_head: the output head is quantized too.

    Returns:
        "model" (16 bits a parameter); "hidden states" of all sequences; "Hessians" of one decoder layer, or of the head where
        it is larger; "inputs" of one decoder layer's linears, twice, and the widest in float32, twice; "one sequence" (its
        hidden states before every layer, what one layer keeps for its gradients, and logits with their gradient:
        *estimated*); "one layer" (twice the Hessian and six times the weight of its largest linear, and four one-hot
        matrices of LNQ at 16 codes, float32: *estimated*); "token weights" (kept on the host).
    """
    linears = shape.linears()
    head = _FLOAT * (1 + groups) * shape.hidden**2 if lm_head else 0
    kept = shape.layers * shape.hidden if groups else shape.hidden
    graph = (8 if groups else 2) * (shape.hidden + shape.intermediate)
    logits = 3 * _FLOAT * shape.vocab if groups or lm_head else 0
    largest = max(
        2 * max(1, groups) * i * i + 6 * i * o + 4 * min(_ONE_HOT, 16 * i * o) for _, i, o in linears
    )
    waiting = min(tokens, max(AT_ONCE, longest))
    inputs = 2 * shape.hidden + shape.heads * shape.head_dim + shape.intermediate
    return {
        "model": _HALF * shape.parameters,
        "hidden states": tokens * shape.hidden * itemsize,
        "Hessians": max(_layer_hessians(shape, groups), head),
        "inputs": waiting * (2 * inputs * itemsize + 2 * _FLOAT * max(i for _, i, _ in linears)),
        "one sequence": longest * ((kept + graph) * itemsize + logits),
        "one layer": _FLOAT * largest,
        "token weights": _FLOAT * groups * tokens * (shape.layers * len(linears) + lm_head),
    }
