"""Loading, quantizing and saving models, and every sentence that refuses to."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from trapetum import models, swap
from trapetum.checkpoint import quantization_config, versions
from trapetum.linear import CodebookLinear


@pytest.fixture
def tiny():
    return models.load("random:llama-tiny", dtype=torch.float32).model


def logits(model, ids=((5, 9, 200, 3),)):
    with torch.inference_mode():
        return model(torch.tensor(ids)).logits


def assert_refused(message, *parts):
    text = str(message.value)
    assert all(part in text for part in parts), text
    assert "\n" not in text


def test_random_weights_repeat_and_differ_by_seed():
    first, again, other = (models.load("random:llama-tiny", seed=seed) for seed in (0, 0, 1))
    assert first.kind == "random" and first.tokenizer is None and first.shape.hidden == 64
    assert first.model.dtype == torch.float32
    weights = [loaded.model.model.layers[1].mlp.up_proj.weight for loaded in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], first.model.model.layers[0].mlp.up_proj.weight)
    assert torch.isfinite(logits(first.model)).all()
    assert not any(parameter.is_meta for parameter in first.model.parameters())


def test_random_model_is_the_one_transformers_would_build(tiny):
    """The rope tables were not lost on the meta device: the same weights in a model made the usual way agree."""
    from transformers import LlamaForCausalLM

    usual = LlamaForCausalLM(tiny.config)
    usual.load_state_dict(tiny.state_dict())
    torch.testing.assert_close(logits(tiny), logits(usual.eval()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_random_codes_need_no_dense_weights(bits):
    model = models.load("random:llama-tiny", bits=bits, dtype="bf16").model
    layers = dict(swap.codebook_layers(model))
    assert len(layers) == 2 * 7 and isinstance(model.lm_head, torch.nn.Linear)
    assert all(layer.bits == bits for layer in layers.values())
    values = layers["model.layers.0.mlp.up_proj"].dequantize()
    assert abs(float(values.std()) - 0.02) < 0.006 and abs(float(values.mean())) < 0.002
    assert model.dtype == torch.bfloat16 and torch.isfinite(logits(model)).all()


def test_random_head_can_be_codes_too():
    model = models.load("random:llama-tiny", bits=4, lm_head=True).model
    assert isinstance(model.lm_head, CodebookLinear)


def test_tied_embeddings_are_made_once():
    shape = models.shape_of(models.config_of(models.MODELS["llama-tiny"], tie_word_embeddings=True), "tied")
    model = models.random_model(shape, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = models.load("random:llama-tiny", dtype=torch.float32).model
    saved = untied.lm_head.weight.nbytes
    assert models.weight_bytes(untied) - models.weight_bytes(model) == saved


def test_quantize_replaces_every_linear_but_the_head(tiny, capsys):
    before = models.weight_bytes(tiny)
    report = models.quantize_model(tiny, bits=4, method="kmeans", progress=False)
    assert models.is_quantized(tiny) and len(report.errors) == 14 and report.n_codes == 16
    assert all(0 < error < 0.05 for error in report.errors.values()) and 0 < report.mean_error < 0.05
    assert report.seconds > 0
    assert models.weight_bytes(tiny) < before
    assert isinstance(tiny.lm_head, torch.nn.Linear)
    assert capsys.readouterr().err == ""


def test_more_bits_make_a_smaller_error():
    errors = []
    for bits in (2, 3, 4, 8):
        model = models.load("random:llama-tiny", dtype=torch.float32).model
        errors.append(models.quantize_model(model, bits, progress=False).mean_error)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-3


def test_quantized_model_equals_its_dense_twin(tiny):
    models.quantize_model(tiny, bits=4, progress=False, lm_head=True)
    quantized = logits(tiny)
    dense = models.dequantize_model(tiny)
    assert not models.is_quantized(dense) and isinstance(dense.lm_head, torch.nn.Linear)
    torch.testing.assert_close(logits(dense), quantized, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tiny, value):
    with torch.no_grad():
        tiny.model.layers[1].mlp.down_proj.weight[3, 4] = value
    with pytest.raises(ValueError) as message:
        models.quantize_model(tiny, progress=False)
    assert_refused(message, "model.layers.1.mlp.down_proj.weight")


def test_weighted_method_needs_and_uses_calibration(tiny):
    with pytest.raises(ValueError) as message:
        models.quantize_model(tiny, method="kmeans-weighted", progress=False)
    assert_refused(message, "kmeans-weighted", "calibration")
    assert not models.is_quantized(tiny)
    rows = [torch.randint(256, (40,)) for _ in range(3)]
    plain = models.load("random:llama-tiny", dtype=torch.float32).model
    weighted = models.quantize_model(tiny, bits=3, method="kmeans-weighted", calibration=rows, progress=False)
    unweighted = models.quantize_model(plain, bits=3, method="kmeans", progress=False)
    assert weighted.mean_error > unweighted.mean_error  # it minimizes another error than this one
    assert not any(module._forward_pre_hooks for module in tiny.modules())


def test_unknown_method_and_nothing_to_quantize(tiny):
    with pytest.raises(ValueError) as message:
        models.quantize_model(tiny, method="magic", progress=False)
    assert_refused(message, "'magic'", "kmeans")
    models.randomize_codes(tiny, lm_head=True)
    with pytest.raises(ValueError) as message:
        models.quantize_model(tiny, lm_head=True, progress=False)
    assert_refused(message, "no dense linear layers")


@pytest.mark.parametrize("bits,n_codes", [(4, 16), (3, 8), (8, 64)])
def test_save_and_load_round_trip(tiny, tmp_path, bits, n_codes):
    models.quantize_model(tiny, bits=bits, n_codes=n_codes, progress=False)
    before = logits(tiny)
    folder = models.save(tiny, None, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert set(config.pop("sha256")) == {"config", "weights"}
    assert config == {
        "quant_method": "trapetum",
        "bits": bits,
        "n_codes": n_codes,
        "method": "kmeans",
        "modules_to_not_convert": ["lm_head"],
        "written_by": versions(),
    }
    loaded = models.load(str(folder))
    assert loaded.kind == "directory" and loaded.tokenizer is None and loaded.model.dtype == torch.float32
    assert torch.equal(logits(loaded.model), before)
    assert loaded.shape.kv_heads == 2 and loaded.shape.vocab == 256
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_saving_after_decoding_writes_the_same(tiny, tmp_path):
    """Device layouts and stacked weights are an affair of the engine: the file does not see them."""
    from trapetum.decode import Engine

    models.quantize_model(tiny, bits=4, progress=False)
    first = models.save(tiny, None, tmp_path / "before")
    Engine(tiny, "lean").generate([1, 2, 3], 4)
    second = models.save(tiny, None, tmp_path / "after")
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_mixed_schemes_and_a_quantized_head_survive_saving(tiny, tmp_path):
    models.quantize_model(tiny, bits=4, progress=False)
    models.quantize_model(tiny, bits=8, lm_head=True, progress=False)
    assert quantization_config(tiny)["exceptions"] == {"lm_head": [8, 256]}
    again = models.load(str(models.save(tiny, None, tmp_path / "mixed"))).model
    assert again.lm_head.bits == 8 and again.model.layers[0].mlp.up_proj.bits == 4
    assert torch.equal(logits(again), logits(tiny))


def test_saving_dense_and_tied_models(tmp_path):
    shape = models.shape_of(models.config_of(models.MODELS["llama-tiny"], tie_word_embeddings=True), "tied")
    model = models.random_model(shape, dtype=torch.bfloat16)
    again = models.load(str(models.save(model, None, tmp_path / "tied"))).model
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert again.dtype == torch.bfloat16 and torch.equal(logits(again), logits(model))
    models.quantize_model(model, bits=4, progress=False)
    quantized = models.load(str(models.save(model, None, tmp_path / "tied-codes"))).model
    assert torch.equal(logits(quantized), logits(model))


def test_save_replaces_its_own_directory_and_no_other(tiny, tmp_path):
    models.randomize_codes(tiny)
    (tmp_path / "mine").mkdir()
    models.save(tiny, None, tmp_path / "mine")
    models.save(tiny, None, tmp_path / "mine")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(models.ModelError) as message:
        models.save(tiny, None, precious)
    assert_refused(message, "precious", "choose another")
    assert (precious / "thesis.txt").read_text() == "years"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "precious"]


def test_a_failed_save_leaves_the_old_model(tiny, tmp_path, monkeypatch):
    models.randomize_codes(tiny)
    folder = models.save(tiny, None, tmp_path / "model")
    before = sorted((p.name, p.read_bytes()) for p in folder.iterdir())

    class Tokenizer:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError):
        models.save(tiny, Tokenizer(), folder)
    assert sorted((p.name, p.read_bytes()) for p in folder.iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for retries
    with pytest.raises(models.ModelError) as message:
        models.load("trapetum-tests/no-such-model")
    assert_refused(message, "'trapetum-tests/no-such-model'", "local directory")


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    for name in ("./nowhere", "nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(models.ModelError) as message:
            models.load(name)
        assert_refused(message, repr(name), "random:llama-2-7b")
    with pytest.raises(models.ModelError) as message:
        models.load("random:gpt-5")
    assert_refused(message, "'gpt-5'", "llama-2-7b")
    with pytest.raises(models.ModelError) as message:
        models.load(str(tmp_path))
    assert_refused(message, "config.json")
    monkeypatch.setattr(models, "BUILTIN_MODEL", tmp_path / "none")
    with pytest.raises(models.ModelError) as message:
        models.load("builtin")
    assert_refused(message, "notebook 90")


def test_wrong_arguments():
    with pytest.raises(models.ModelError) as message:
        models.load("random:llama-tiny", dtype="fp12")
    assert_refused(message, "'fp12'", "bf16")
    with pytest.raises(models.ModelError) as message:
        models.load("builtin", bits=4)
    assert_refused(message, "bits=4", "quantize=QuantizeSpec(4)")


def write_config(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    return str(folder)


def test_unsupported_architecture_and_foreign_quantization(tmp_path):
    with pytest.raises(models.ModelError) as message:
        models.load(write_config(tmp_path, model_type="gpt2"))
    assert_refused(message, "'gpt2'", "llama", "mistral")
    foreign = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(models.ModelError) as message:
        models.load(write_config(tmp_path, model_type="llama", quantization_config=foreign))
    assert_refused(message, "'gptq'", "trapetum import")
    foreign = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(models.ModelError) as message:
        models.load(write_config(tmp_path, model_type="llama", quantization_config=foreign))
    assert_refused(message, "'bitsandbytes'", "original weights")


def test_pickled_weights_are_not_opened(tmp_path):
    write_config(tmp_path, model_type="llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(models.ModelError) as message:
        models.load(str(tmp_path))
    assert_refused(message, "safetensors", "pickled")


def test_truncated_weights_name_the_directory(tiny, tmp_path):
    folder = models.save(tiny, None, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(models.ModelError) as message:
        models.load(str(folder))
    assert_refused(message, str(folder))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tiny, tmp_path):
    folder = models.save(tiny, None, tmp_path / "gap")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(models.ModelError) as message:
        models.load(str(folder))
    assert_refused(message, "lacks 1 tensors", "model.layers.1.mlp.up_proj.weight")


@pytest.mark.gpu
def test_seven_billion_random_weights_are_made_once():
    torch.cuda.reset_peak_memory_stats()
    loaded = models.load("random:llama-2-7b", device="cuda")
    size = models.weight_bytes(loaded.model)
    assert size > 13e9 and torch.cuda.max_memory_allocated() < 1.1 * size


@pytest.mark.gpu
def test_a_saved_model_is_checked_on_its_way_to_the_gpu(tiny, tmp_path):
    models.quantize_model(tiny, bits=4, n_codes=11, progress=False)
    folder = models.save(tiny, None, tmp_path / "model")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = models.load(str(folder), device="cuda").model
    stored = {name: tensor.cpu() for name, tensor in loaded.state_dict().items()}
    assert all(tensor.is_cuda for tensor in loaded.state_dict().values())
    assert stored.keys() == tiny.state_dict().keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in tiny.state_dict().items())
    room = models.weight_bytes(loaded) + 2e6  # temporary sums of the checks
    assert torch.cuda.max_memory_allocated() - before < 1.2 * room
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(models.ModelError) as message:
        models.load(str(folder), device="cuda")
    assert_refused(message, "SHA-256")
