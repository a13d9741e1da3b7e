"""Every stage gives transformers' greedy tokens; the engine's sentences; the framework floor."""

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

from trapetum import decode, models
from trapetum.checkpoint import ModelError
from trapetum.decode import DecodeError, Engine, Generation, last_engine, stages
from trapetum.decoders import LeanDecoder, bucket_for
from trapetum.linear import CodebookLinear
from trapetum.llama_step import UnsupportedModel
from trapetum.paths import BUILTIN_MODEL
from trapetum.projection import Apart, Codebook, CodebookCpu, Dense, project
from trapetum.swap import random_weight

PROMPT = [5, 9, 200, 31, 77, 2, 140]
CPU_STAGES = ("naive", "cast_free", "lean")


def tiny(dtype=torch.float32, device="cpu", bits=None, seed=0, lm_head=False, **config):
    shape = models.MODELS["llama-tiny"]
    model = models.random_model(shape, device, dtype, seed=seed, **config)
    with torch.no_grad():  # spread the logits, so that a rounding does not decide between two tokens
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    if bits:
        models.quantize_model(model, bits, method="rtn", lm_head=lm_head, progress=False)
    return model


def greedy(model, prompt, count):
    """transformers' own greedy tokens."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("stage", CPU_STAGES)
@pytest.mark.parametrize("bits", [None, 8, 4, 3, 2])
def test_tokens_equal_those_of_transformers_on_the_same_weights(stage, bits):
    made = Engine(tiny(bits=bits), stage).generate(PROMPT, 24)
    expected = greedy(models.dequantize_model(tiny(bits=bits)), PROMPT, 24)
    assert made.tokens == expected
    assert len(set(expected)) > 4  # a model that says one thing would prove nothing


@pytest.mark.parametrize("stage", CPU_STAGES)
@pytest.mark.parametrize("length", [1, 2, 50])
def test_prompts_of_any_length(stage, length):
    prompt = torch.randint(256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    assert Engine(tiny(bits=4), stage).generate(prompt, 6).tokens == greedy(
        models.dequantize_model(tiny(bits=4)), prompt, 6
    )


VARIANTS = {
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "one query a key": dict(num_key_value_heads=4),
    "one key for all": dict(num_key_value_heads=1),
    "wide heads": dict(head_dim=32),
    "large epsilon": dict(rms_norm_eps=2.0),
    "llama-3 rope": dict(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "yarn": dict(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [None, 4])
def test_lean_knows_the_variants_of_the_architecture(variant, bits):
    config = VARIANTS[variant]
    model = tiny(bits=bits, seed=3, **config)
    expected = greedy(models.dequantize_model(tiny(bits=bits, seed=3, **config)), PROMPT, 16)
    assert Engine(model, "lean").generate(PROMPT, 16).tokens == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stage", CPU_STAGES)
def test_16_bit_checkpoints_run_at_every_stage(dtype, stage):
    """Codebook layers work in float32 on the CPU: the float32 twin is what the stages without casts must follow."""
    model = tiny(dtype, bits=4)
    made = Engine(model, stage).generate(PROMPT, 8).tokens
    assert not model.model.embed_tokens._forward_hooks and not model.lm_head._forward_pre_hooks
    twin = models.dequantize_model(tiny(dtype, bits=4), torch.float32)
    head = twin.lm_head.weight.detach().clone()
    twin = twin.float()
    assert torch.equal(twin.lm_head.weight, head.float())
    expected = greedy(twin, PROMPT, 8)
    agreeing = sum(a == b for a, b in zip(made, expected, strict=True))
    assert agreeing == 8 or stage == "naive" and made[0] == expected[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dense_16_bit_logits_follow_transformers(dtype):
    model = tiny(dtype)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[:, -1].float()
        engine = Engine(model, "lean")
        made = engine._decoder.llama.prefill(torch.tensor(PROMPT)).float()
    assert (made - expected).norm() / expected.norm() < 0.03


def test_a_mistral_and_its_window():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        sliding_window=128,
        initializer_range=0.2,
    )
    model = MistralForCausalLM(config).eval()
    expected = greedy(model, PROMPT, 12)
    assert Engine(model, "lean", max_context=128).generate(PROMPT, 12).tokens == expected
    with pytest.raises(UnsupportedModel, match="window of 128"):
        Engine(model, "lean", max_context=512)


def test_rope_that_changes_with_the_length_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedModel, match="'dynamic'"):
        Engine(tiny(rope_parameters=rope), "lean")


@pytest.mark.skipif(
    not (BUILTIN_MODEL / "config.json").is_file(), reason="the built-in model is not trained yet"
)
@pytest.mark.parametrize("stage", CPU_STAGES)
@pytest.mark.parametrize("bits", [None, 4])
def test_the_builtin_model_speaks_alike_at_every_stage(stage, bits):
    loaded = models.load("builtin", dtype=torch.float32)
    prompt = loaded.tokenizer("Return the number of").input_ids
    if bits:
        models.quantize_model(loaded.model, bits, method="rtn", progress=False)
    made = Engine(loaded, stage).generate(prompt, 32).tokens
    assert made == greedy(models.dequantize_model(loaded.model), prompt, 32)


def test_tokens_stream_and_a_stop_token_ends_the_text():
    engine, seen = Engine(tiny(bits=4), "lean"), []
    whole = engine.generate(PROMPT, 20, on_token=seen.append)
    assert seen == whole.tokens and len(whole.token_s) == 19 and whole.ttft_s > 0
    assert whole.tokens_per_s == pytest.approx(19 / sum(whole.token_s))
    stop = whole.tokens[7]
    cut = engine.generate(PROMPT, 20, eos=stop).tokens
    assert cut == whole.tokens[: whole.tokens.index(stop) + 1]
    assert engine.generate(torch.tensor([PROMPT]), 20, eos=[stop, 999]).tokens == cut
    assert engine.generate(PROMPT, 1).token_s == []


def test_an_engine_forgets_the_sequence_before():
    engine = Engine(tiny(bits=4), "lean")
    first = engine.generate(PROMPT, 10).tokens
    engine.generate(list(range(60)), 30)
    assert engine.generate(PROMPT, 10).tokens == first


def test_speed_of_a_single_token_is_not_a_number():
    assert Generation([1], 0.1, []).tokens_per_s != Generation([1], 0.1, []).tokens_per_s


@pytest.mark.parametrize("stage", CPU_STAGES)
def test_refusals(stage):
    engine = Engine(tiny(), stage, max_context=32)
    cases = [
        (([], 4), "the prompt is empty"),
        ((PROMPT, 0), "0 new tokens"),
        (([5, 256], 4), "token 256 is not in the vocabulary of 256"),
        (([-1, 25], 4), "token -1"),
        ((PROMPT, 26), "context of 33, and the engine has 32"),
    ]
    for arguments, words in cases:
        with pytest.raises(DecodeError, match=words):
            engine.generate(*arguments)
    assert len(engine.generate(PROMPT, 25).tokens) == 25  # up to the last place


def test_the_models_own_limit_bounds_the_context():
    engine = Engine(tiny(max_position_embeddings=48), "lean", max_context=1024)
    assert engine.max_context == 48
    with pytest.raises(DecodeError, match="the model ends at 48"):
        engine.generate(PROMPT, 100)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(kv="fp8"), "kept in fp16, int8, int4, not 'fp8'"),
        (dict(kv="int8"), "a cache in int8 and steps of 1 rows need the stage fused or pdl, not 'lean'"),
        (dict(rows=0), "1 to 8 rows, not 0"),
        (dict(rows=9), "1 to 8 rows, not 9"),
        (dict(rows=4), "steps of 4 rows need the stage fused or pdl"),
        (dict(max_context=1), "a context of 1 has no room for a prompt and an answer"),
    ],
)
def test_options_that_an_engine_cannot_have(options, words):
    with pytest.raises(DecodeError, match=words):
        Engine(tiny(), "lean", **options)


@pytest.mark.parametrize("stage", CPU_STAGES)
def test_sampling_needs_a_fused_stage(stage):
    with pytest.raises(DecodeError, match=f"'{stage}' is greedy; sampling needs the stage fused or pdl"):
        Engine(tiny(), stage).generate(PROMPT, 4, temperature=0.7)


@pytest.mark.parametrize("stage", CPU_STAGES)
def test_only_fused_stages_have_a_step_of_their_own(stage):
    engine = Engine(tiny(bits=4), stage)
    assert engine.step is None and engine.steps == 0
    engine.generate(PROMPT, 4)
    assert engine.steps == 0


def test_a_model_on_two_devices_is_refused():
    model = tiny()
    model.lm_head = torch.nn.Linear(64, 256, device="meta")
    with pytest.raises(DecodeError, match="spread over cpu, meta; move it to one device"):
        Engine(model, "lean")


def test_stages_of_devices():
    assert stages("cpu") == CPU_STAGES and stages("cuda:0") == (
        *("naive", "cast_free", "graph", "fused", "pdl"),
    )
    with pytest.raises(DecodeError, match="'graph' on cpu"):
        Engine(tiny(), "graph")
    with pytest.raises(DecodeError, match="cast_free"):
        Engine(tiny(), "fast")


@pytest.mark.parametrize("stage", CPU_STAGES)
@pytest.mark.parametrize("bits", [None, 4])
def test_without_linears_and_back(stage, bits):
    engine = Engine(tiny(bits=bits), stage)
    before = engine.generate(PROMPT, 10).tokens
    with engine.without("linears") as floor:
        assert floor.generate(PROMPT, 5).tokens == [0] * 5
    assert engine.generate(PROMPT, 10).tokens == before


@pytest.mark.parametrize("stage", CPU_STAGES)
def test_parts_that_a_stage_does_not_have(stage):
    engine = Engine(tiny(bits=4), stage)
    parts = {"naive": ("linears", "casts"), "cast_free": ("linears",), "lean": engine.parts}
    assert engine.parts == parts[stage] and "linears" in engine.parts
    wrong = "casts" if stage == "lean" else "attention"
    words = f"{stage!r} cannot leave out {wrong!r}; it can leave out {', '.join(engine.parts)}"
    with pytest.raises(DecodeError, match=words), engine.without("linears", wrong):
        pass
    assert "casts" not in Engine(tiny(), "naive").parts  # dense weights have none


def test_what_is_left_out_inside_is_left_out_beside_what_is_already():
    engine = Engine(tiny(bits=4), "lean")
    before = engine.generate(PROMPT, 10).tokens
    with engine.without("attention"):
        alone = engine.generate(PROMPT, 10).tokens
        with engine.without("norms"):
            both = engine.generate(PROMPT, 10).tokens
        assert engine.generate(PROMPT, 10).tokens == alone
    with engine.without("norms", "attention"):
        assert engine.generate(PROMPT, 10).tokens == both
    assert engine.generate(PROMPT, 10).tokens == before != alone != both


# --- memory that does not suffice ------------------------------------------------------------------------------------


def test_a_context_that_no_host_holds():
    model = tiny(bits=4, max_position_embeddings=10**13)
    with pytest.raises(
        DecodeError, match=f"a context of {10**13} at the stage 'lean' needs about"
    ) as refused:
        Engine(model, "lean", max_context=10**13)
    cache = 2 * 2 * 2 * 16 * 4 * 10**13  # layers, keys and values, heads, width, bytes
    assert f"{cache / 1e9:.2f} GB of it for the fp16 cache" in str(refused.value)
    assert str(refused.value).endswith("choose a shorter max_context, or weights of fewer bits.")
    assert len(Engine(model, "lean").generate(PROMPT, 4).tokens) == 4


class Large:
    """Stands for a tensor that was made before memory ran out."""


def without_memory(made):
    def fail(*_):
        tensor = Large()
        made.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 EiB.")

    return fail


def test_nothing_is_held_by_an_engine_that_did_not_fit(monkeypatch):
    made = []
    monkeypatch.setattr(decode, "LeanDecoder", without_memory(made))
    with pytest.raises(DecodeError, match="a context of 64 .* more than are free on cpu") as refused:
        Engine(tiny(bits=4), "lean", max_context=64)
    gc.collect()
    assert made[0]() is None
    assert refused.value.__context__ is None and refused.value.__cause__ is None


@pytest.mark.parametrize("what", ["prepare", "_first", "step_times"])
def test_memory_that_runs_out_later_is_said_too_and_the_engine_goes_on(what, monkeypatch):
    engine, made = Engine(tiny(bits=4), "lean", max_context=64), []
    before = engine.generate(PROMPT, 4).tokens
    with monkeypatch.context() as patched:
        patched.setattr(LeanDecoder, what, without_memory(made))
        words = "64 and a prompt of 7 tokens" if what == "_first" else "context of 64 at the stage 'lean'"
        with pytest.raises(DecodeError, match=words):
            engine.step_times(8, 2) if what == "step_times" else engine.generate(PROMPT, 4)
    gc.collect()
    assert made[0]() is None and engine.generate(PROMPT, 4).tokens == before


def test_an_error_at_the_end_of_a_failed_capture_counts_as_lack_of_memory(monkeypatch):
    def fail(*_):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(LeanDecoder, "prepare", fail)
    with pytest.raises(DecodeError, match="needs about"):
        Engine(tiny(), "lean").generate(PROMPT, 4)


def test_other_errors_stay_what_they_are(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(LeanDecoder, "prepare", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Engine(tiny(), "lean").generate(PROMPT, 4)


class Replayed:
    """A decoder like the fused one, whose step may be told to choose no token."""

    parts = ("linears", "sampling")

    def __init__(self, *_):
        self.step = self
        self.without = frozenset()

    def prepare(self, prompt, count):
        raise AssertionError("a step that chooses no token would never end")


def as_on_a_card(monkeypatch):
    monkeypatch.setattr(decode, "stages", lambda device: decode.STAGES)
    monkeypatch.setattr(decode, "FusedDecoder", Replayed)


@pytest.mark.parametrize("stage", ["fused", "pdl"])
def test_a_step_that_chooses_no_token_cannot_generate(stage, monkeypatch):
    as_on_a_card(monkeypatch)
    engine = Engine(tiny(), stage)
    engine.step.without = frozenset({"sampling"})
    with pytest.raises(DecodeError, match="no token is ever chosen, so there is nothing to generate"):
        engine.generate(PROMPT, 4)


def test_drafts_are_verified_greedily(monkeypatch):
    as_on_a_card(monkeypatch)
    with pytest.raises(DecodeError, match="4 rows .* cannot sample at temperature 0.5; make it with rows=1"):
        Engine(tiny(), "pdl", rows=4).generate(PROMPT, 4, temperature=0.5)


@pytest.mark.parametrize(("kv", "cure"), [("fp16", "'int8' or 'int4'"), ("int8", "'int4'"), ("int4", None)])
def test_smaller_caches_are_a_cure_where_there_are_any(kv, cure, monkeypatch):
    as_on_a_card(monkeypatch)
    monkeypatch.setattr(decode, "FusedDecoder", without_memory([]))
    with pytest.raises(DecodeError, match=f"for the {kv} cache") as refused:
        Engine(tiny(torch.float16), "fused", 1024, kv)
    assert (f"kv={cure}" in str(refused.value)) if cure else ("kv=" not in str(refused.value))


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_stacking_holds_nothing_twice_and_the_tree_goes_on(bits):
    model = tiny(bits=bits)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        before = model(ids).logits
    engine = Engine(model, "lean")
    attention = model.model.layers[0].self_attn
    parts = [getattr(p, "codes", None) if bits else p.weight for p in (attention.q_proj, attention.k_proj)]
    assert parts[0].untyped_storage().data_ptr() == parts[1].untyped_storage().data_ptr()
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, before)
    again = Engine(model, "lean")
    stacked = [e._decoder.llama.layers[0].qkv for e in (engine, again)]
    name = "_codes" if bits else "_weight"
    assert getattr(stacked[0], name).data_ptr() == getattr(stacked[1], name).data_ptr()
    assert engine.generate(PROMPT, 6).tokens == again.generate(PROMPT, 6).tokens


@pytest.mark.parametrize("sizes", [(64, 32), (8, 4), (7, 5)])
@pytest.mark.parametrize("in_features", [64, 5000])
@pytest.mark.parametrize("bits,n_codes", [(4, 16), (3, 8), (8, 256), (8, 64)])
def test_stacked_products_equal_single_ones(sizes, in_features, bits, n_codes):
    generator = torch.Generator().manual_seed(1)
    weights = [random_weight(size, in_features, bits, generator, n_codes) for size in sizes]
    x = torch.randn(3, in_features)
    single = [CodebookLinear.from_weight(weight) for weight in weights]
    stacked = project([CodebookLinear.from_weight(weight) for weight in weights], torch.float32)
    expected = torch.cat([layer(x[:1]) for layer in single], -1)
    assert torch.equal(stacked(x[:1]), expected) and stacked.out_features == sum(sizes)
    many = torch.cat([F.linear(x, weight.dequantize()) for weight in weights], -1)
    torch.testing.assert_close(stacked.rows(x), many, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_stacked_stays_apart():
    model = tiny(bits=4)
    attention = model.model.layers[0].self_attn
    dense = torch.nn.Linear(64, 32, bias=False)
    assert isinstance(project([attention.q_proj, dense], torch.float32), Apart)
    assert isinstance(project([attention.q_proj, attention.k_proj], torch.float32), CodebookCpu)
    assert isinstance(project([attention.q_proj, attention.k_proj], torch.float16), Codebook)
    assert isinstance(project([dense], torch.float32), Dense)


def test_buckets_are_powers_of_two_up_to_the_end():
    assert [bucket_for(length, 1000) for length in (1, 128, 129, 256, 600, 1000)] == [
        128,
        128,
        256,
        256,
        1000,
        1000,
    ]
    assert bucket_for(40, 64) == 64


def test_model_errors_are_of_one_kind():
    assert issubclass(ModelError, RuntimeError) and models.ModelError is ModelError


# --- on a GPU ------------------------------------------------------------------------------------------------------

CUDA_STAGES = ("naive", "cast_free", "graph")


def assert_greedy(model, prompt, tokens, tolerance):
    """Each token is what the dense float32 twin would choose, or within `tolerance` of its best logit."""
    ids = torch.tensor([prompt + tokens], device=model.device)
    with torch.inference_mode():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(tokens, device=model.device)[:, None])[:, 0]
    behind = (logits.max(-1).values - chosen) / logits.std(-1)
    assert float(behind.max()) < tolerance, behind.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("stage", CUDA_STAGES)
@pytest.mark.parametrize("bits", [None, 8, 4, 3, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_tokens_are_greedy_on_the_dequantized_weights(stage, bits, dtype):
    made = Engine(tiny(dtype, "cuda", bits), stage).generate(PROMPT, 64).tokens
    twin = models.dequantize_model(tiny(dtype, "cuda", bits), torch.float32).float()
    assert_greedy(twin, PROMPT, made, tolerance=0.05 if dtype == torch.float16 else 0.3)
    assert len(set(made)) > 4


@pytest.mark.gpu
@pytest.mark.parametrize("stage", CUDA_STAGES)
@pytest.mark.parametrize("bits", [None, 4])
def test_gpu_tokens_equal_those_of_transformers_in_float32(stage, bits):
    made = Engine(tiny(torch.float32, "cuda", bits), stage).generate(PROMPT, 48).tokens
    twin = models.dequantize_model(tiny(torch.float32, "cuda", bits))
    if bits is None:
        assert made == greedy(twin, PROMPT, 48)
    assert_greedy(twin, PROMPT, made, tolerance=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_the_graph_equals_the_same_step_launch_by_launch(bits):
    """Bit for bit, logits and cache, over a bucket's edge."""
    engine = Engine(tiny(torch.float16, "cuda", bits), "graph", max_context=512)
    decoder, prompt = engine._decoder, list(range(100))
    outcomes = []
    for capture in (True, False):
        decoder.capture = capture
        for layer in decoder.llama.layers:
            layer.cache.zero_()
        tokens = engine.generate(prompt, 60).tokens
        outcomes.append((tokens, [layer.cache[:, :, :159].clone() for layer in decoder.llama.layers]))
    assert outcomes[0][0] == outcomes[1][0]
    assert all(torch.equal(a, b) for a, b in zip(outcomes[0][1], outcomes[1][1], strict=True))
    assert sorted(decoder._graphs) == [128, 256]


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_gpu_graph_knows_the_variants(variant):
    config = VARIANTS[variant]
    made = Engine(tiny(torch.float32, "cuda", None, 3, **config), "graph").generate(PROMPT, 24).tokens
    assert made == greedy(tiny(torch.float32, "cuda", None, 3, **config), PROMPT, 24)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", CUDA_STAGES)
def test_gpu_without_linears_and_back(stage):
    engine = Engine(tiny(torch.float16, "cuda", 4), stage)
    before = engine.generate(PROMPT, 10).tokens
    with engine.without("linears") as floor:
        assert floor.generate(PROMPT, 5).tokens == [0] * 5
    assert engine.generate(PROMPT, 10).tokens == before


@pytest.mark.gpu
def test_gpu_without_casts_the_cache_goes_on_growing():
    from transformers import DynamicCache

    engine = Engine(tiny(torch.float16, "cuda", 4), "naive")
    before = engine.generate(PROMPT, 10).tokens
    with engine.without("casts"):
        assert isinstance(engine._decoder._cache(), DynamicCache)
        assert len(engine.generate(PROMPT, 10).tokens) == 10
    assert engine.generate(PROMPT, 10).tokens == before


@pytest.mark.gpu
def test_gpu_stop_token_and_stream():
    engine, seen = Engine(tiny(torch.float16, "cuda", 4), "graph"), []
    whole = engine.generate(PROMPT, 40, on_token=seen.append).tokens
    assert seen == whole and len(whole) == 40
    stop = whole[9]
    cut = engine.generate(PROMPT, 40, eos=stop).tokens
    assert cut == whole[: whole.index(stop) + 1]
    assert engine.generate(PROMPT, 40).tokens == whole
    assert engine.generate(PROMPT[:1], 3).tokens == engine.generate(PROMPT[:1], 3).tokens


def test_the_last_stage_that_can_run_a_model_is_found():
    assert last_engine(tiny()).stage == "lean"
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    engine = last_engine(tiny(rope_parameters=rope), 64)
    assert engine.stage == "cast_free"
    assert engine.generate(PROMPT, 6).tokens == greedy(tiny(rope_parameters=rope), PROMPT, 6)
    with pytest.raises(DecodeError, match="int8"):
        last_engine(tiny(), 64, kv="int8")


@pytest.mark.gpu
def test_gpu_a_model_that_the_fused_stages_refuse_runs_as_a_graph():
    engine = last_engine(tiny(torch.float16, "cuda", 4), 64)  # heads of 16
    assert engine.stage == "graph" and len(engine.generate(PROMPT, 6).tokens) == 6
    with pytest.raises(UnsupportedModel, match="16"):
        last_engine(tiny(torch.float16, "cuda", 4), 64, kv="int8")
