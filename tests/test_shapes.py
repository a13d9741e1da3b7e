"""Model shapes against the parameter counts and byte counts that are known for them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trapetum import shapes
from trapetum.memory import cache_bytes, memory_estimate
from trapetum.shapes import FORMATS, MODELS


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.1-8b", 8_030_261_248),
        ("mistral-7b-v0.1", 7_241_732_096),
        ("mistral-7b", 7_248_023_552),
        ("qwen2-0.5b", 494_032_768),
        ("qwen2-7b", 7_615_616_512),
        ("tinyllama-1.1b", 1_100_048_384),
    ],
)
def test_parameters_of_released_models(name, parameters):
    assert MODELS[name].parameters == parameters


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-tiny", "builtin"])
def test_parameters_agree_with_transformers(name):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    shape = MODELS[name]
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied_embeddings,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    found = {
        (name.rsplit(".", 1)[1], m.in_features, m.out_features)
        for name, m in model.model.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    assert found == set(shape.linears())


def test_known_sizes_of_llama_2_7b():
    shape = MODELS["llama-2-7b"]
    assert shape.linear_weights == 6_476_005_376
    assert shape.kv_bytes(1) == 524_288
    assert shape.bytes_per_token("fp16") == 2 * (6_476_005_376 + 4096 * 32000 + 4096)
    codebooks = 32 * (6 * 4096 + 2 * 11008 - 4096) * 16 * 2
    fp16 = 2 * (4096 * 32000 + 4096)
    assert shape.bytes_per_token("codebook-4") == 6_476_005_376 // 2 + codebooks + fp16


def test_the_byte_bound_at_a_context_of_262_is_what_the_published_one_says():
    # 1.17 ms at 3190 GB/s, within the rounding of that figure.
    moved = MODELS["llama-2-7b"].bytes_per_token("codebook-4", context=262)
    assert moved / 3190e9 == pytest.approx(1.17e-3, rel=0.02)


def test_grouped_queries_shrink_the_cache():
    assert MODELS["llama-2-70b"].kv_bytes(4096) == 2 * 80 * 8 * 128 * 4096 * 2
    assert MODELS["llama-3-8b"].kv_bytes(1, bytes_per_value=1) == 65_536


def test_biases_are_counted_once_a_layer():
    shape = MODELS["qwen2-7b"]
    assert shape.biases == ("q_proj", "k_proj", "v_proj")
    assert shape.bias_weights == 28 * (28 * 128 + 2 * 4 * 128)
    assert shape.norm_weights == 57 * 3584
    assert MODELS["mistral-7b"].bias_weights == 0


def test_rope_of_the_released_models():
    assert MODELS["llama-2-7b"].rope.parameters() == {"rope_type": "default", "rope_theta": 10000.0}
    assert MODELS["llama-3-8b"].rope.parameters() == {"rope_type": "default", "rope_theta": 500000.0}
    assert MODELS["llama-3.1-8b"].rope.parameters() == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert MODELS["mistral-7b-v0.1"].sliding_window == 4096 and MODELS["mistral-7b"].sliding_window is None


@pytest.mark.parametrize(
    ("kv", "block"),
    [
        # 8 heads: 64 tokens x 128 channels of keys and of values, then scale and zero of 128 channels and 64 tokens
        ("int8", 8 * (2 * 64 * 128 + 128 * 4 + 64 * 4)),
        ("int4", 8 * (64 * 128 + 128 * 4 + 64 * 4)),
    ],
)
def test_a_quantized_cache_by_hand(kv, block):
    shape = MODELS["llama-3-8b"]
    assert shape.kv_block_bytes(kv) == block
    assert block == {"int8": 137_216, "int4": 71_680}[kv]
    token = 2 * 8 * 128 * 2
    assert shape.kv_bytes(0, kv=kv) == 0
    assert shape.kv_bytes(64, kv=kv) == 32 * 64 * token == shape.kv_bytes(64)
    assert shape.kv_bytes(65, kv=kv) == 32 * (block + token)
    assert shape.kv_bytes(200, kv=kv) == 32 * (3 * block + 8 * token)
    assert shape.kv_bytes(131072, kv=kv) == 32 * (2047 * block + 64 * token)


def test_what_a_quantized_cache_saves():
    shape = MODELS["llama-2-7b"]
    fp16 = shape.kv_bytes(131072)
    assert fp16 / shape.kv_bytes(131072, kv="int8") == pytest.approx(1.91, abs=0.01)  # 16 bits against 8.375
    assert fp16 / shape.kv_bytes(131072, kv="int4") == pytest.approx(3.66, abs=0.01)  # 16 bits against 4.375
    parts = shape.parts_per_token("codebook-4", 131072, kv="int4")
    assert parts["KV cache"] == shape.kv_bytes(131072, kv="int4")
    assert sum(parts.values()) == shape.bytes_per_token("codebook-4", 131072, kv="int4")
    saved = shape.bytes_per_token("codebook-4", 131072) - shape.bytes_per_token(
        "codebook-4", 131072, kv="int8"
    )
    assert saved == fp16 - shape.kv_bytes(131072, kv="int8")


@settings(deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.integers(0, 200_000))
def test_fewer_bits_of_cache_are_never_more_bytes(name, context):
    shape = MODELS[name]
    sizes = [shape.kv_bytes(context, kv=kv) for kv in shapes.KV_FORMATS]
    assert sizes == sorted(sizes, reverse=True)
    assert (len(set(sizes)) == 3) == (context > 64)


def test_the_built_in_model_fits_in_16_megabytes():
    shape = MODELS["builtin"]
    assert shape.head_dim == 32 and 2 * shape.parameters < 16e6
    assert shape.parameters == shape.linear_weights + 256 * 4096 + 15 * 256


def test_tied_embeddings_still_read_the_head():
    shape = MODELS["builtin"]
    assert shape.bytes_per_token("fp16") == 2 * (shape.linear_weights + shape.lm_head_weights + 256)


def test_output_head_format_is_its_own():
    shape = MODELS["llama-2-7b"]
    saved = shape.bytes_per_token("codebook-4") - shape.bytes_per_token("codebook-4", lm_head_fmt="int8")
    assert saved == 4096 * 32000 + 4096 - 2 * 32000 - 2


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from(sorted(FORMATS)))
def test_matrix_bytes_hold_the_weights_and_little_more(inputs, outputs, fmt):
    bits, n_codes = FORMATS[fmt]
    found = shapes.matrix_bytes(inputs, outputs, fmt)
    overhead = outputs * (1 + 2 * max(n_codes, 1))
    assert inputs * outputs * bits / 8 <= found <= inputs * outputs * bits / 8 + overhead


def test_fewer_bits_read_fewer_bytes():
    order = ["fp32", "fp16", "codebook-8", "codebook-4", "codebook-3", "codebook-2"]
    moved = [MODELS["llama-3-8b"].bytes_per_token(fmt) for fmt in order]
    assert moved == sorted(moved, reverse=True) and len(set(moved)) == len(moved)


@settings(deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.integers(0, 100_000))
def test_context_adds_its_cache_and_nothing_else(name, context):
    shape = MODELS[name]
    assert shape.bytes_per_token("fp16", context) - shape.bytes_per_token("fp16") == shape.kv_bytes(context)


def test_unknown_names_are_refused_with_the_choice():
    with pytest.raises(ValueError, match="format 'int5' is unknown; the formats are fp32"):
        shapes.matrix_bytes(1, 1, "int5")
    with pytest.raises(ValueError, match="no model shape 'gpt-2'; the shapes are llama-2-7b"):
        shapes.model("gpt-2")
    with pytest.raises(ValueError, match="cache format 'fp8' is unknown; the formats are fp16, int8, int4"):
        MODELS["builtin"].kv_bytes(10, kv="fp8")
    with pytest.raises(ValueError, match="a cache in fp16 has no blocks"):
        MODELS["builtin"].kv_block_bytes("fp16")
    with pytest.raises(ValueError, match="number of tokens, not -1"):
        MODELS["builtin"].bytes_per_token("fp16", -1)


def test_every_shape_has_a_source_and_quick_is_a_part():
    assert all(shape.source for shape in MODELS.values())
    assert set(shapes.QUICK_SHAPES) <= set(shapes.GEMV_SHAPES)
    assert len(set(shapes.GEMV_SHAPES)) == 13
    assert shapes.model("builtin") is MODELS["builtin"]


@pytest.mark.parametrize("fmt", ["fp16", "codebook-4"])
def test_parts_of_a_token_add_up(fmt):
    shape = MODELS["llama-2-7b"]
    parts = shape.parts_per_token(fmt, context=300)
    assert sum(parts.values()) == shape.bytes_per_token(fmt, 300)
    assert parts["KV cache"] == shape.kv_bytes(300)
    fp16 = shape.parts_per_token("fp16")
    assert fp16["attention weights"] + fp16["MLP weights"] == 2 * shape.linear_weights


# Memory


def test_the_memory_of_a_7b_by_hand():
    found = memory_estimate(MODELS["llama-2-7b"], 4, 1024)
    codes, books = 6_476_005_376 // 2, 32 * (5 * 4096 + 2 * 11008) * 16 * 2
    assert found == {
        "weights": codes + books + 2 * 65 * 4096,
        "embedding": 2 * 4096 * 32000,
        "output head": 2 * 4096 * 32000,
        "KV cache": 1024 * 524_288,
        "activations": 2 * (2 * 4096 + 3 * 4096 + 4096 + 11008) + 4 * 32000 + 2 * 2 * 1024 * 128,
        "prefill": 0,
    }
    assert 4.3e9 < sum(found.values()) < 4.4e9


@pytest.mark.parametrize(("kv", "values"), [("int8", 1), ("int4", 0.5)])
def test_a_quantized_cache_is_made_of_whole_blocks_and_the_latest_tokens(kv, values):
    shape = MODELS["llama-3-8b"]
    blocks = 16  # of 1000 tokens
    tokens = blocks * 64 * 8 * 128 * 2 * values
    scales = blocks * 8 * (128 + 64) * 4
    latest = 128 * 8 * 128 * 2 * 2
    assert cache_bytes(shape, 1000, kv) == 32 * (tokens + scales + latest)
    assert memory_estimate(shape, 4, 1000, kv)["KV cache"] == cache_bytes(shape, 1000, kv)
    assert cache_bytes(shape, 1000) == shape.kv_bytes(1008)


@pytest.mark.parametrize("kv", shapes.KV_FORMATS)
@pytest.mark.parametrize("context", [1, 16, 63, 64, 65, 200, 1000])
def test_the_cache_that_is_made_and_read_has_these_bytes(kv, context):
    torch = pytest.importorskip("torch")
    kv_cache = pytest.importorskip("trapetum.kv_cache")
    shape = MODELS["builtin"]
    cache = kv_cache.KvCache(kv, shape.kv_heads, shape.head_dim, context, torch.float16, "cpu")
    assert shape.layers * cache.nbytes == cache_bytes(shape, context, kv)
    coded = cache.coded(context)
    blocks = shape.kv_block_bytes(kv) * coded // 64 if coded else 0
    latest = (context - coded) * 2 * shape.kv_heads * shape.head_dim * 2
    assert shape.kv_bytes(context, kv=kv) == shape.layers * (blocks + latest)


def test_heads_tied_and_of_codes():
    tied, own = MODELS["qwen2-0.5b"], MODELS["llama-3-8b"]
    assert memory_estimate(tied, 4, 64)["output head"] == 0
    assert memory_estimate(tied, 4, 64, lm_head=True)["output head"] == 151936 * (896 // 2 + 32)
    assert memory_estimate(own, 4, 64)["output head"] == 2 * 4096 * 128256
    assert memory_estimate(own, None, 64, lm_head=True)["output head"] == 2 * 4096 * 128256
    assert memory_estimate(own, 3, 64, lm_head=True)["output head"] == 128256 * (4096 * 3 // 8 + 16)


def test_dense_memory_is_that_of_the_parameters():
    for shape in MODELS.values():
        found = memory_estimate(shape, None, 128)
        assert found["weights"] + found["embedding"] + found["output head"] == 2 * shape.parameters


def test_rows_and_prompts_take_room():
    shape = MODELS["llama-2-7b"]
    one, four = (memory_estimate(shape, 4, 1024, rows=rows)["activations"] for rows in (1, 4))
    assert four - one == 3 * (2 * (6 * 4096 + 11008) + 4 * 32000)
    dense, codes = (memory_estimate(shape, bits, 1024, prompt=100)["prefill"] for bits in (None, 4))
    assert dense == 2 * 100 * (2 * 4096 + 3 * 11008)
    assert codes - dense == 2 * 4096 * 2 * 11008  # gate and up, written out
    assert memory_estimate(shape, 4, 1024, prompt=1)["prefill"] == 0


def test_the_estimate_is_what_a_model_weighs():
    models = pytest.importorskip("trapetum.models")
    for name, bits, lm_head in (("llama-tiny", 4, False), ("llama-tiny", 8, True), ("builtin", 3, False)):
        model = models.load(f"random:{name}", dtype="fp16", bits=bits, lm_head=lm_head).model
        found = memory_estimate(MODELS[name], bits, 64, lm_head=lm_head)
        expected = found["weights"] + found["embedding"] + found["output head"]
        assert models.weight_bytes(model) == expected


def test_estimates_that_cannot_be_made():
    with pytest.raises(ValueError, match="5 bits per code are not supported; choose one of 8, 4, 3, 2"):
        memory_estimate(MODELS["builtin"], 5, 64)
    with pytest.raises(ValueError, match="the context is 0"):
        memory_estimate(MODELS["builtin"], 4, 0)
    with pytest.raises(ValueError, match="'fp8' is unknown"):
        memory_estimate(MODELS["builtin"], 4, 64, "fp8")
