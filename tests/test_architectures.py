"""Every architecture and feature that is supported, from shards on disk to tokens; every one that is not, by sentence."""

import json
from dataclasses import replace

import pytest
import torch

from trapetum import architectures, models
from trapetum.checkpoint import ModelError
from trapetum.decode import Engine
from trapetum.models import QuantizeSpec
from trapetum.shapes import MODELS, Rope

PROMPT = [5, 9, 200, 31, 77, 2, 140]
SIZES = dict(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
    max_position_embeddings=512,
    initializer_range=0.2,  # spreads the logits, so that a rounding does not decide between two tokens
)
LLAMA_3_1 = Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 64).parameters()

#: name -> (model_type, fields of its config): the released models, with few layers and small matrices.
CASES = {
    "llama-2": ("llama", dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama-3": ("llama", dict(rope_parameters=Rope(500000.0).parameters())),
    "llama-3.1": ("llama", dict(rope_parameters=LLAMA_3_1)),
    "tinyllama": ("llama", dict(num_attention_heads=8, num_key_value_heads=1, rms_norm_eps=1e-5)),
    "mistral v0.1": ("mistral", dict(sliding_window=64)),
    "mistral v0.3": ("mistral", dict(sliding_window=None, rope_parameters=Rope(1e6).parameters())),
    "mistral with wide heads": ("mistral", dict(sliding_window=None, head_dim=32)),
    "qwen2 7B": ("qwen2", dict(tie_word_embeddings=False, rope_parameters=Rope(1e6).parameters())),
    "qwen2 0.5B": (
        "qwen2", dict(tie_word_embeddings=True, hidden_size=112, num_attention_heads=14, head_dim=8)
    ),
}  # fmt: skip


def dense(case: str, dtype=torch.float32):
    """A transformers model of the case with random weights, biases and norms."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, fields = CASES[case]
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SIZES | fields)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                parameter.dim() == 1
            ):  # transformers starts biases at 0 and norms at 1, which would prove little
                parameter.normal_(float("norm" in name), 0.3)
    return model.to(dtype).eval()


def written(case: str, folder, dtype=torch.float32) -> str:
    """The same as a directory of several shards."""
    dense(case, dtype).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    return str(folder)


def greedy(model, count, prompt=PROMPT):
    """transformers' own greedy tokens; the mask, because it would take a token 0 of the prompt for padding."""
    ids = torch.tensor([list(prompt)])
    how = dict(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("case", CASES)
def test_streamed_codes_speak_like_transformers_on_the_dequantized_weights(case, bits, tmp_path):
    loaded = models.load(written(case, tmp_path), quantize=QuantizeSpec(bits, "rtn"))
    made = Engine(loaded, "lean", max_context=64).generate(PROMPT, 24).tokens
    twin = models.dequantize_model(models.load(str(tmp_path), quantize=QuantizeSpec(bits, "rtn")).model)
    assert made == greedy(twin, 24)
    assert len(set(made)) > 4  # a model that says one thing would prove nothing


@pytest.mark.parametrize("case", CASES)
def test_dense_weights_speak_like_transformers(case):
    made = Engine(dense(case), "lean", max_context=64).generate(PROMPT, 24).tokens
    assert made == greedy(dense(case), 24) and len(set(made)) > 4


@pytest.mark.parametrize("case", ["llama-3.1", "qwen2 7B"])
def test_a_long_prompt_takes_the_way_of_many_rows(case):
    """The prefill of all rows at once, the rope scaling at work beyond its original context."""
    ids = torch.randint(256, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    assert Engine(dense(case), "lean", max_context=256).generate(ids, 8).tokens == greedy(dense(case), 8, ids)


#: name -> fields as the config.json of the hub spells them, from before transformers had `rope_parameters`.
OLD_SPELLINGS = {
    "llama-3.1": dict(
        rope_theta=500000.0,
        rope_scaling=dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
        torch_dtype="bfloat16",
        pretraining_tp=1,
    ),
    "mistral v0.1": dict(rope_theta=10000.0, sliding_window=64, torch_dtype="bfloat16"),
    "qwen2 7B": dict(
        rope_theta=1e6, sliding_window=131072, use_sliding_window=False, max_window_layers=28, torch_dtype="bfloat16"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OLD_SPELLINGS)
def test_configs_as_the_hub_spells_them(case, tmp_path):
    expected = models.load(written(case, tmp_path, torch.bfloat16), quantize=QuantizeSpec(4, "rtn"))
    now = json.loads((tmp_path / "config.json").read_text())
    new = {
        "rope_parameters",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "dtype",
    }
    old = {key: value for key, value in now.items() if key not in new} | OLD_SPELLINGS[case]
    (tmp_path / "config.json").write_text(json.dumps(old))
    loaded = models.load(str(tmp_path), quantize=QuantizeSpec(4, "rtn"))
    assert loaded.model.dtype == torch.bfloat16 and loaded.shape == expected.shape
    assert loaded.model.config.rope_parameters == expected.model.config.rope_parameters
    made = [Engine(m, "lean", max_context=64).generate(PROMPT, 12).tokens for m in (loaded, expected)]
    assert made[0] == made[1]


@pytest.mark.parametrize("case", CASES)
def test_codes_of_every_architecture_survive_saving(case, tmp_path):
    loaded = models.load(written(case, tmp_path / "dense"), quantize=QuantizeSpec(4, "rtn", lm_head=True))
    again = models.load(str(models.save(loaded.model, None, tmp_path / "codes")))
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)
    assert type(again.model) is type(loaded.model)
    assert again.shape == replace(loaded.shape, name=again.name, tied_embeddings=False)  # the head is codes
    assert again.model.generation_config.to_dict() == loaded.model.generation_config.to_dict()


@pytest.mark.parametrize("case", CASES)
def test_the_shape_counts_what_transformers_made(case):
    model = dense(case)
    shape = models.shape_of(model.config, case)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    again = architectures.empty_model(architectures.config_of(shape), torch.float32)
    made = {name: tuple(p.shape) for name, p in again.named_parameters()}
    assert made == {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_every_named_shape_makes_its_own_class(name):
    shape = MODELS[name]
    config = models.config_of(shape)
    model = architectures.empty_model(config, torch.float16)
    assert type(model).__name__.lower() == f"{shape.model_type}forcausallm"
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert config.max_position_embeddings == 131072 and config.rms_norm_eps == shape.norm_eps
    assert config.sliding_window == shape.sliding_window if shape.model_type == "mistral" else True
    stated = {key: config.rope_parameters[key] for key in shape.rope.parameters()}
    assert stated == shape.rope.parameters()
    found = {
        (n.rsplit(".", 1)[1], m.in_features, m.out_features, m.bias is not None)
        for n, m in model.model.named_modules()
        if isinstance(m, torch.nn.Linear)
    }
    assert found == {(n, i, o, n in shape.biases) for n, i, o in shape.linears()}
    assert not list(architectures.unknown_features(config))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("case", ["mistral v0.3", "qwen2 0.5B"])
def test_random_weights_of_an_architecture(case, bits):
    """Biases are random too, on the device, and not the norms' ones."""
    shape = models.shape_of(dense(case).config, case)
    model = models.random_model(shape, dtype=torch.float32, bits=bits)
    assert models.is_quantized(model) == (bits is not None)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    if shape.biases:
        bias = model.model.layers[0].self_attn.q_proj.bias
        assert 0.01 < float(bias.std()) < 0.03 and abs(float(bias.mean())) < 0.01
    assert torch.equal(model.model.norm.weight, torch.ones(shape.hidden))
    made = Engine(model, "lean", max_context=131072 if bits is None else 64)
    assert made.max_context == (131072 if bits is None else 64)
    assert made.generate(PROMPT, 4).tokens == greedy(models.dequantize_model(model), 4)


def test_random_weights_by_name_can_be_quantized_while_they_are_made():
    streamed = models.load("random:llama-tiny", quantize=QuantizeSpec(4, "lloyd", lm_head=True))
    whole = models.load("random:llama-tiny")
    report = models.quantize_model(whole.model, 4, "lloyd", lm_head=True, progress=False)
    assert streamed.report.errors == report.errors and streamed.kind == "random"
    one, other = streamed.model.state_dict(), whole.model.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_biases_that_an_architecture_cannot_have():
    tiny = MODELS["llama-tiny"]
    for change, words in (
        (dict(biases=("q_proj",)), "a llama has them on all linears"),
        (dict(biases=("q_proj",), model_type="mistral"), "a mistral has none"),
        (dict(model_type="qwen2"), "biases on nothing; a qwen2 has them on q_proj, k_proj, v_proj"),
    ):
        with pytest.raises(ValueError, match=words):
            models.config_of(replace(tiny, **change))
    whole = replace(
        tiny, biases=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    )
    config = models.config_of(whole)
    assert config.attention_bias and config.mlp_bias and models.shape_of(config, "").biases == whole.biases


def with_config(folder, **fields) -> str:
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "model.safetensors").write_bytes(b"")
    return str(folder)


@pytest.mark.parametrize("spec", [None, QuantizeSpec(4, "rtn")])
@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "qwen2_moe", "gemma2", "an-architecture-of-tomorrow"])
def test_other_architectures_are_named_beside_the_supported_ones(kind, spec, tmp_path):
    with pytest.raises(ModelError) as message:
        models.load(with_config(tmp_path, model_type=kind), quantize=spec)
    text = str(message.value)
    assert f"{kind!r}" in text and "llama, mistral, qwen2" in text and "\n" not in text


@pytest.mark.parametrize("spec", [None, QuantizeSpec(4, "rtn")])
@pytest.mark.parametrize(
    "fields",
    [
        dict(partial_rotary_factor=0.5),
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25)),
        dict(attn_logit_softcapping=50.0),
        dict(final_logit_softcapping=30.0),
        dict(logits_scaling=8.0),
        dict(use_qk_norm=True),
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_features_that_the_step_does_not_compute_are_named(fields, spec, tmp_path):
    with pytest.raises(ModelError, match="which the decode step does not compute") as message:
        models.load(with_config(tmp_path, model_type="llama", **(SIZES | fields)), quantize=spec)
    name = next(iter(fields))
    assert ("partial_rotary_factor = 0.25" if name == "rope_parameters" else name) in str(message.value)


def test_neutral_values_of_such_features_pass():
    from transformers import AutoConfig

    fields = dict(
        partial_rotary_factor=1.0, attn_logit_softcapping=None, logits_scaling=1.0, use_qk_norm=False
    )
    architectures.require_supported(AutoConfig.for_model("llama", **(SIZES | fields)), "plain")


def test_a_window_shorter_than_the_context_is_refused_by_the_own_step_only(tmp_path):
    loaded = models.load(written("mistral v0.1", tmp_path), quantize=QuantizeSpec(8, "rtn"))
    with pytest.raises(ValueError, match="sliding window of 64 tokens"):
        Engine(loaded, "lean", max_context=65)
    prompt = list(range(60))
    tree = Engine(loaded, "naive", max_context=100).generate(prompt, 10).tokens
    twin = models.dequantize_model(models.load(str(tmp_path), quantize=QuantizeSpec(8, "rtn")).model)
    assert tree == greedy(twin, 10, prompt)


def test_a_qwen2_with_windows_in_some_layers_is_refused_by_the_own_step():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    fields = SIZES | dict(use_sliding_window=True, sliding_window=32, max_window_layers=1)
    model = Qwen2ForCausalLM(Qwen2Config(**fields)).eval()
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="sliding window of 32"):
        Engine(model, "lean", max_context=64)


def test_a_model_that_did_not_come_through_load_is_refused_too():
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = SIZES | dict(head_dim=16)
    gemma = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma", **fields))
    with pytest.raises(ValueError, match="architecture 'gemma'; it knows llama, mistral, qwen2"):
        Engine(gemma, "lean", max_context=64)
    capped = dense("llama-2")
    capped.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="does not compute final_logit_softcapping = 30.0"):
        Engine(capped, "lean", max_context=64)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["naive", "cast_free", "graph"])
@pytest.mark.parametrize("case", CASES)
def test_gpu_streamed_codes_speak_like_the_dequantized_weights(case, stage, tmp_path):
    """In float32; where a rounding decides between two tokens, their logits are near."""
    loaded = models.load(written(case, tmp_path), "cuda", quantize=QuantizeSpec(4, "rtn"))
    made = Engine(loaded, stage, max_context=64).generate(PROMPT, 24).tokens
    twin = models.dequantize_model(models.load(str(tmp_path), "cuda", quantize=QuantizeSpec(4, "rtn")).model)
    with torch.inference_mode():
        logits = twin(torch.tensor([PROMPT + made], device="cuda")).logits[0, len(PROMPT) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(made, device="cuda")[:, None])[:, 0]
    assert float(((logits.max(-1).values - chosen) / logits.std(-1)).max()) < 0.02
    assert len(set(made)) > 4
