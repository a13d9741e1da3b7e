"""Models of additive layers: quantized, decoded at every stage, saved and loaded; AQLM directories read or refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from trapetum import additive, cuda_additive, models, swap
from trapetum.additive_linear import AdditiveLinear, additive_gemv, additive_layer
from trapetum.bench.variants import codebook_variant
from trapetum.calibration import Statistics, made_of
from trapetum.checkpoint import ModelError
from trapetum.cli import app
from trapetum.decode import Engine, last_engine
from trapetum.decoders import FusedDecoder
from trapetum.llama_step import UnsupportedModel
from trapetum.models import QuantizeSpec, aqlm_model
from trapetum.quantizing import quantize_calibrated

gpu = pytest.mark.gpu
PROMPT = [5, 9, 200, 31, 77, 2, 140]
SHAPE = models.MODELS["llama-tiny"]


def dense(dtype=torch.float32, device="cpu", seed=0, **config):
    model = models.random_model(SHAPE, device, dtype, seed=seed, **config)
    with torch.no_grad():  # spread the logits, so that a rounding does not decide between two tokens
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def coded(n_codebooks=2, dtype=torch.float32, device="cpu", seed=0, **config):
    """A model of random additive layers."""
    model, generator = dense(dtype, "cpu", seed, **config), torch.Generator().manual_seed(seed)
    for name, layer in swap.linears(model):
        weight = additive.random(layer.out_features, layer.in_features, n_codebooks, generator)
        made = AdditiveLinear.from_weight(weight, None if layer.bias is None else layer.bias.detach())
        swap.replace(model, name, made)
    return model.to(device)


def shallow():
    """A model of one decoder layer, which is sooner quantized."""
    return dense(num_hidden_layers=1)


def logits(model, ids=PROMPT):
    with torch.inference_mode():
        return model(torch.tensor([ids], device=model.device)).logits[0]


# --- one layer -----------------------------------------------------------------------------------------------------


def random_layer(out=20, inputs=40, n_codebooks=2, bias=True, device="cpu"):
    generator = torch.Generator(device).manual_seed(1)
    return AdditiveLinear.from_weight(additive.random(out, inputs, n_codebooks, generator, bias))


@pytest.mark.parametrize("shape", [(40,), (1, 40), (3, 40), (2, 1, 40), (0, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_layer_multiplies_by_its_dense_weight(shape, dtype):
    layer, x = random_layer(), torch.randn(shape).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 20)
    expected = F.linear(x.double(), layer.dequantize(torch.float64), layer.bias.double())
    assert torch.allclose(y.double(), expected, rtol=2e-2, atol=2e-2)
    layer.casts = True
    assert layer(x).dtype == dtype and torch.allclose(layer(x).double(), expected, rtol=2e-2, atol=2e-2)


def test_casts_are_about_activations():
    layer = random_layer().to(torch.bfloat16)
    assert layer.codebooks.dtype == layer.scales.dtype == torch.float16 and layer.bias.dtype == torch.bfloat16
    before = random_layer()
    assert torch.equal(layer.codebooks, before.codebooks) and torch.equal(layer.scales, before.scales)


def test_a_state_dict_holds_the_stored_form():
    layer, other = random_layer(), AdditiveLinear(40, 20, 2, bias=True)
    state = layer.state_dict()
    assert set(state) == {"codes", "codebooks", "scales", "bias"}
    other.load_state_dict(state)
    assert torch.equal(other.dequantize(), layer.dequantize()) and torch.equal(other.bias, layer.bias.float())
    assert other.to_weight().bits_per_weight == layer.to_weight().bits_per_weight


def test_the_operator_has_a_shape_without_data_and_refuses_more_rows():
    layer = random_layer()
    parts = layer.codes, layer.codebooks, layer.scales, None, 40
    meta = additive_gemv(torch.empty(1, 40, device="meta"), *parts)
    assert meta.shape == (1, 20) and meta.is_meta
    with pytest.raises(ValueError, match=r"one row of 40 inputs, and x has shape \[2, 40\]"):
        additive_gemv(torch.zeros(2, 40), *parts)
    with pytest.raises(ValueError, match="40 inputs"):
        layer(torch.zeros(1, 39))
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        layer(torch.zeros(1, 40, dtype=torch.int64))


def test_mean_squares_stand_for_a_hessian_that_is_not_there():
    weight = torch.randn(512, 32, generator=torch.Generator().manual_seed(0))
    loud = torch.ones(32)
    loud[:4] = 100
    plain, _ = additive_layer(weight, None, 2, iterations=1)
    log = []
    weighed, error = additive_layer(weight, None, 2, Statistics(None, loud, 10), iterations=1, objective=log)
    assert len(log) == 4 and log[-1] < log[0]
    lost = [(made.dequantize() - weight)[:, :4].square().sum() for made in (plain, weighed)]
    assert lost[1] < 0.7 * lost[0]
    expected = (weighed.dequantize() - weight).square().sum() / weight.square().sum()
    assert error == pytest.approx(float(expected), rel=1e-5)


# --- a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
def test_a_model_is_quantized(bits):
    model, reference = shallow(), shallow()
    report = models.quantize_model(model, bits, "additive", progress=False)
    assert (report.bits, report.n_codes, report.method) == (bits, 256, "additive")
    layers = dict(swap.additive_layers(model))
    assert set(report.errors) == set(layers) and len(layers) == 7
    assert models.is_quantized(model) and not swap.codebook_layers(model)
    weight = layers["model.layers.0.mlp.up_proj"].to_weight()
    assert weight.n_codebooks == bits
    error = (weight.dequantize() - reference.model.layers[0].mlp.up_proj.weight).square().sum()
    total = reference.model.layers[0].mlp.up_proj.weight.square().sum()
    assert report.errors["model.layers.0.mlp.up_proj"] == pytest.approx(float(error / total), rel=1e-4)
    with pytest.raises(ValueError, match="no dense linear layers left"):
        models.quantize_model(model, bits, "additive", progress=False)


def test_bytes_are_those_of_codes_codebooks_and_scales():
    model = coded()
    linears = sum(layer.to_weight().nbytes for _, layer in swap.additive_layers(model))
    rest = sum(p.nbytes for p in model.parameters())
    assert models.weight_bytes(model) == linears + rest
    assert models.weight_bytes(model) < models.weight_bytes(dense())


@pytest.mark.parametrize("stage", ["naive", "cast_free", "lean"])
@pytest.mark.parametrize("n_codebooks", [2, 4])
def test_every_cpu_stage_decodes_the_tokens_of_the_dense_twin(stage, n_codebooks):
    twin = models.dequantize_model(coded(n_codebooks, attention_bias=True))
    assert not models.is_quantized(twin)
    expected = Engine(twin, "naive").generate(PROMPT, 24).tokens
    assert Engine(coded(n_codebooks, attention_bias=True), stage).generate(PROMPT, 24).tokens == expected
    assert len(set(expected)) > 4  # a model that says one thing would prove nothing


def test_a_head_of_additive_codes(tmp_path):
    model, generator = coded(), torch.Generator().manual_seed(7)
    head = AdditiveLinear.from_weight(additive.random(256, 64, 2, generator))
    swap.replace(model, "lm_head", head)
    models.save(model, None, tmp_path / "out")
    loaded = models.load(str(tmp_path / "out")).model
    assert len(swap.additive_layers(loaded)) == 15
    expected = Engine(models.dequantize_model(model), "lean").generate(PROMPT, 8).tokens
    for stage in ("naive", "cast_free", "lean"):
        assert Engine(loaded, stage).generate(PROMPT, 8).tokens == expected


def test_16_bit_models_work_in_float32_on_the_cpu():
    twin = models.dequantize_model(coded(dtype=torch.bfloat16), torch.float32).float()
    made = Engine(coded(dtype=torch.bfloat16), "lean").generate(PROMPT, 8).tokens
    expected = Engine(twin, "lean").generate(PROMPT, 8).tokens
    assert made == expected


def test_a_stage_without_linears_leaves_additive_products_out():
    engine = Engine(coded(), "lean")
    before = engine.generate(PROMPT, 6).tokens
    for stage in ("naive", "lean"):
        with Engine(coded(), stage).without("linears") as floor:
            assert floor.generate(PROMPT, 4).tokens == [0] * 4
    assert engine.generate(PROMPT, 6).tokens == before


def test_the_fused_stages_refuse_and_the_last_that_can_is_taken():
    with pytest.raises(UnsupportedModel, match="weights of another kind.*use the stage graph"):
        FusedDecoder(coded(), 64)
    assert last_engine(coded(), 64).stage == "lean"


def test_statistics_lower_the_output_error_and_a_stopped_run_goes_on(tmp_path):
    calibration = made_of(
        [torch.randint(256, (48,), generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    )
    first, second, plain = shallow(), shallow(), shallow()
    report = quantize_calibrated(first, 2, "additive", calibration, progress=False, resume_dir=tmp_path)
    assert (
        set(report.objectives) == set(report.output_errors) == set(report.errors) and len(report.errors) == 7
    )
    assert all(log[-1] <= log[0] + 1e-9 for log in report.objectives.values())
    models.quantize_model(plain, 2, "additive", progress=False)
    seen = calibration.rows[0].tolist()
    lost = [(logits(model, seen) - logits(shallow(), seen)).norm() for model in (first, plain)]
    assert lost[0] < 0.9 * lost[1]
    (tmp_path / "model.layers.0.mlp.up_proj.safetensors").unlink()
    again = quantize_calibrated(second, 2, "additive", calibration, progress=False, resume_dir=tmp_path)
    assert again.errors == report.errors
    assert all(
        torch.equal(a.codes, b.codes) and torch.equal(a.codebooks, b.codebooks)
        for (_, a), (_, b) in zip(swap.additive_layers(first), swap.additive_layers(second), strict=True)
    )


def test_tokens_given_to_quantize_model_are_used():
    rows = [torch.arange(40), torch.arange(100, 140)]
    report = models.quantize_model(shallow(), 2, "additive", calibration=rows, progress=False)
    assert len(report.output_errors) == 7


def test_what_additive_codebooks_cannot_have():
    for bits, method, message in ((3, "additive", "makes 2, 4"), (8, "additive", "makes 2, 4")):
        with pytest.raises(ValueError, match=message):
            models.quantize_model(dense(), bits, method, progress=False)
    with pytest.raises(ValueError, match="not beside additive"):
        quantize_calibrated(dense(), 2, "additive", made_of([torch.arange(9)]), outliers=0.01, progress=False)
    odd = models.random_model(SHAPE, "cpu", torch.float32, intermediate_size=36)
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj has 36 inputs.*groups of 8"):
        models.quantize_model(odd, 2, "additive", progress=False)
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj has 36 inputs.*groups of 8"):
        quantize_calibrated(odd, 2, "additive", made_of([torch.arange(9)]), progress=False)
    assert not models.is_quantized(odd)


# --- directories ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_codebooks", [2, 4])
@pytest.mark.parametrize("config", [{}, {"attention_bias": True}, {"tie_word_embeddings": True}])
def test_a_saved_model_is_read_back_to_the_bit(tmp_path, n_codebooks, config):
    model = coded(n_codebooks, torch.bfloat16, **config)
    swap.note_method(model, "additive", {"method": "additive", "calibration": {"seed": 3}})
    models.save(model, None, tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (said["method"], said["bits"], said["n_codes"]) == ("additive", n_codebooks, 256)
    assert said["recipe"] == {"calibration": {"seed": 3}}
    loaded = models.load(str(tmp_path / "out")).model
    hugging = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    hugging.save_pretrained(tmp_path / "again")
    for other in (loaded, hugging, models.load(str(tmp_path / "again")).model):
        assert len(swap.additive_layers(other)) == 14
        assert torch.equal(logits(other), logits(model))
        assert other.trapetum_method == "additive"


def test_a_saved_model_holds_packed_layers_as_they_are_stored(tmp_path):
    model = coded()
    expected = [layer.codes.clone() for _, layer in swap.additive_layers(model)]
    Engine(model, "lean").generate(PROMPT, 2)
    models.save(model, None, tmp_path / "out")
    loaded = models.load(str(tmp_path / "out")).model
    assert all(
        torch.equal(a, b.codes) for a, (_, b) in zip(expected, swap.additive_layers(loaded), strict=True)
    )


def test_layers_of_two_kinds_are_no_directory(tmp_path):
    model = coded()
    other = models.random_model(SHAPE, "cpu", torch.float32, bits=4)
    swap.replace(model, "model.layers.0.mlp.up_proj", other.model.layers[0].mlp.up_proj)
    with pytest.raises(ModelError, match="a directory holds one kind"):
        models.save(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change_config(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= fields
    config["quantization_config"].pop("sha256", None)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 3}, "additive layers have 2 or 4 bits"),
        ({"bits": 4}, r"as \[64, 8, 2\], and config.json asks for \[64, 8, 4\]"),
        ({"bits": "2"}, "additive layers have 2 or 4 bits"),
        ({"n_codes": 16}, "256 codes a codebook"),
        ({"outliers": 0.01}, "beside additive codebooks"),
        ({"method": "kmeans"}, "2 bits|codes"),
        ({"exceptions": {"model.layers.0.mlp.up_proj": [4, 256]}}, "config.json asks for"),
        ({"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.up_proj"]}, "lacks 1 tensors"),
    ],
)
def test_a_config_that_does_not_fit_its_files_is_refused(tmp_path, fields, message):
    models.save(coded(), None, tmp_path / "out")
    change_config(tmp_path / "out", **fields)
    with pytest.raises(ModelError, match=message):
        models.load(str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("part", "message"), [("codebooks", "codebooks are NaN"), ("scales", "scale are NaN")]
)
def test_values_that_are_not_finite_are_refused(tmp_path, part, message):
    models.save(coded(), None, tmp_path / "out")
    change_config(tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.1.mlp.up_proj.{part}"].view(-1)[3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"model.layers.1.mlp.up_proj: .*{message}"):
        models.load(str(tmp_path / "out"))


def test_a_model_is_quantized_while_it_is_read_from_the_command_line(tmp_path):
    shallow().save_pretrained(tmp_path / "dense")
    arguments = ["quantize", str(tmp_path / "dense"), str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--method", "additive", "--bits", "2", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    model = shallow()
    models.quantize_model(model, 2, "additive", progress=False)
    loaded = models.load(str(tmp_path / "out")).model
    streamed = models.load(str(tmp_path / "dense"), quantize=QuantizeSpec(2, "additive"))
    assert streamed.report.n_codes == 256
    for other in (loaded, streamed.model):
        assert torch.equal(logits(other), logits(model))


def test_a_measurement_says_that_the_layers_are_additive(tmp_path):
    models.save(coded(4), None, tmp_path / "out")
    variant = codebook_variant(str(tmp_path / "out"), "cpu", "fp32")
    assert (variant.config["linears"], variant.config["bits"], variant.config["n_codes"]) == (
        "additive",
        4,
        256,
    )


# --- AQLM ----------------------------------------------------------------------------------------------------------


def aqlm_tensors(model, unsigned=False):
    """The state of a model of additive layers as AQLM publishes it."""
    state = {name: p.detach().half() for name, p in model.named_parameters()}
    for name, layer in swap.additive_layers(model):
        state[f"{name}.codes"] = layer.codes if unsigned else layer.codes.view(torch.int8)
        state[f"{name}.codebooks"] = layer.codebooks.unsqueeze(2)
        state[f"{name}.scales"] = layer.scales[:, None, None, None]
        state |= {} if layer.bias is None else {f"{name}.bias": layer.bias.half()}
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def aqlm_directory(folder, n_codebooks=2, unsigned=False, shards=1, change=None, config=None, scheme=None):
    model = coded(n_codebooks, torch.float16, **(config or {}))
    tensors = aqlm_tensors(model, unsigned)
    (change or (lambda _: None))(tensors)
    fields = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    fields["quantization_config"] = {
        "quant_method": "aqlm",
        "num_codebooks": n_codebooks,
        "nbits_per_codebook": 8,
        "in_group_size": 8,
        "out_group_size": 1,
        "linear_weights_not_to_quantize": ["lm_head.weight", "model.embed_tokens.weight"],
    } | (scheme or {})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return model
    where = {name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return model


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"n_codebooks": 4},
        {"unsigned": True},
        {"shards": 3},
        {"config": {"attention_bias": True}},
        {"scheme": {"linear_weights_not_to_quantize": ["lm_head"]}},
    ],
    ids=str,
)
def test_an_aqlm_directory_is_a_model_of_the_same_codes(tmp_path, how):
    model = aqlm_directory(tmp_path / "aqlm", **how)
    loaded = models.load(str(tmp_path / "aqlm"))
    assert (loaded.kind, loaded.shape.hidden, loaded.tokenizer) == ("directory", 64, None)
    assert len(swap.additive_layers(loaded.model)) == 14
    assert torch.equal(logits(loaded.model), logits(model))
    name, layer = swap.additive_layers(loaded.model)[-1]
    alone = additive.load(tmp_path / "aqlm", name)
    assert torch.equal(alone.codes, layer.codes) and torch.equal(alone.codebooks, layer.codebooks)


def test_an_aqlm_model_is_saved_as_one_of_ours(tmp_path):
    aqlm_directory(tmp_path / "aqlm")
    loaded = aqlm_model(tmp_path / "aqlm", dtype=torch.float32)
    assert next(loaded.model.parameters()).dtype == torch.float32
    models.save(loaded.model, None, tmp_path / "out")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    scheme = {"num_codebooks": 2, "nbits_per_codebook": 8, "in_group_size": 8, "out_group_size": 1}
    assert (said["method"], said["recipe"]) == ("additive", {"imported": {"quant_method": "aqlm"} | scheme})
    again = models.load(str(tmp_path / "out")).model
    assert torch.equal(logits(again), logits(loaded.model))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (
            {"num_codebooks": 1, "nbits_per_codebook": 16},
            "num_codebooks 1, nbits_per_codebook 16.*2x8 and 4x8",
        ),
        ({"num_codebooks": 3}, "num_codebooks 3"),
        ({"nbits_per_codebook": 12}, "nbits_per_codebook 12"),
        ({"in_group_size": 16}, "in_group_size 16"),
        ({"in_group_size": None}, "in_group_size None"),
        ({"out_group_size": 2}, "out_group_size 2"),
        ({"num_codebooks": True}, "num_codebooks True"),
        ({"linear_weights_not_to_quantize": "lm_head"}, "no list of names"),
        ({"linear_weights_not_to_quantize": []}, "lacks 3 tensors, lm_head.codebooks"),
        ({"num_codebooks": 4}, r"config.json asks for I8 or U8 \[64, 8, 4\]|asks for F16"),
    ],
)
def test_other_aqlm_schemes_are_refused_with_the_reason(tmp_path, scheme, message):
    aqlm_directory(tmp_path / "aqlm", scheme=scheme)
    with pytest.raises(ModelError, match=message):
        models.load(str(tmp_path / "aqlm"))


def inexact(tensors):
    tensors["model.layers.0.mlp.up_proj.scales"] = (
        tensors["model.layers.0.mlp.up_proj.scales"].float() * 1.0001
    )


def wide_but_exact(tensors):
    for part in ("scales", "codebooks"):
        tensors[f"model.layers.0.mlp.up_proj.{part}"] = tensors[f"model.layers.0.mlp.up_proj.{part}"].float()


def of_two_outputs(tensors):
    books = tensors["model.layers.0.mlp.up_proj.codebooks"]
    tensors["model.layers.0.mlp.up_proj.codebooks"] = books.view(2, 256, 2, 4)


def not_a_number(tensors):
    tensors["model.layers.0.mlp.up_proj.codebooks"][1, 7] = torch.nan


def without(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (inexact, "values of scales are not exact in float16"),
        (of_two_outputs, r"codebooks as F16 \[2, 256, 2, 4\]"),
        (not_a_number, "model.layers.0.mlp.up_proj: 8 of 4096 values of the codebooks are NaN"),
        (without("model.layers.1.mlp.up_proj.scales"), "lacks 1 tensors, model.layers.1.mlp.up_proj.scales"),
        (without("model.norm.weight"), "lacks 1 tensors, model.norm.weight"),
        (
            lambda t: t.update(more=torch.zeros(3)),
            "holds 1 tensors that its config.json has no place for, more",
        ),
        (lambda t: t.update({"model.norm.weight": torch.full((64,), torch.inf)}), "model.norm.*infinite"),
        (
            lambda t: t.update(
                {"model.layers.0.mlp.up_proj.codes": torch.zeros(160, 8, 2, dtype=torch.int16)}
            ),
            r"codes as I16 \[160, 8, 2\]",
        ),
    ],
)
def test_aqlm_files_that_are_not_what_the_config_says(tmp_path, change, message):
    aqlm_directory(tmp_path / "aqlm", change=change)
    with pytest.raises(ModelError, match=message):
        models.load(str(tmp_path / "aqlm"))


def test_aqlm_files_may_be_wider_and_hold_what_the_config_says(tmp_path):
    def old_and_wide(tensors):
        wide_but_exact(tensors)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    model = aqlm_directory(tmp_path / "aqlm", change=old_and_wide)
    assert torch.equal(logits(models.load(str(tmp_path / "aqlm")).model), logits(model))


def test_what_is_no_aqlm_directory(tmp_path):
    models.save(coded(), None, tmp_path / "out")
    with pytest.raises(ModelError, match="no AQLM checkpoint"):
        aqlm_model(tmp_path / "out")
    with pytest.raises(ModelError, match="holds no config.json"):
        aqlm_model(tmp_path)
    aqlm_directory(tmp_path / "aqlm")
    with pytest.raises(ModelError, match="quantized"):
        models.load(str(tmp_path / "aqlm"), quantize=QuantizeSpec(4))


# --- on a GPU ------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("shape", [(1, 8, 20), (64, 4096, 2048), (1, 1000, 4104), (33, 72, 8)])
@pytest.mark.parametrize("n_codebooks", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpu_layers_follow_float64(shape, n_codebooks, dtype):
    _, out, inputs = shape
    inputs -= inputs % 8
    inputs = max(8, inputs)
    layer = random_layer(out, inputs, n_codebooks, device="cuda")
    stored, bias = layer.dequantize(torch.float64), layer.bias.double()
    for rows in (1, 3):
        x = torch.randn(rows, inputs, device="cuda", generator=torch.Generator("cuda").manual_seed(2)).to(
            dtype
        )
        expected = x.double() @ stored.T + bias
        limit = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 4e-3}[dtype]
        assert ((layer(x) - expected).norm() / expected.norm()) < limit
    assert layer.layout == "device"
    assert torch.equal(layer.dequantize(torch.float64), stored)


@gpu
def test_gpu_layers_are_packed_once_and_come_back():
    layer = random_layer(70, 88, device="cuda")
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.prepare()
    packed = layer.codes
    assert layer.prepare().codes is packed and layer.layout == "device" and packed.dim() == 4
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in stored.items())
    back = layer.to("cpu")
    assert back.layout == "rows" and torch.equal(back.codes, stored["codes"].cpu())
    back.to("cuda").prepare()
    back.load_state_dict(stored)
    assert back.layout == "rows" and torch.equal(back.codes, stored["codes"])


@gpu
def test_gpu_without_a_kernel_that_fits_the_layer_is_written_out(monkeypatch):
    layer = random_layer(70, 88, device="cuda")
    x = torch.randn(1, 88, device="cuda")
    expected = layer(x)
    monkeypatch.setattr(cuda_additive, "plan_for", lambda *_: None)
    assert torch.allclose(layer(x), expected, rtol=1e-2, atol=1e-2)


def assert_greedy(model, prompt, tokens, tolerance):
    """Each token is what the dense float32 twin would choose, or within `tolerance` of its best logit."""
    found = logits(model, prompt + tokens)[len(prompt) - 1 : -1].float()
    chosen = found.gather(1, torch.tensor(tokens, device=model.device)[:, None])[:, 0]
    behind = (found.max(-1).values - chosen) / found.std(-1)
    assert float(behind.max()) < tolerance, behind.tolist()


@gpu
@pytest.mark.parametrize("stage", ["naive", "cast_free", "graph"])
@pytest.mark.parametrize("n_codebooks", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gpu_stages_decode_the_tokens_of_the_dense_twin(stage, n_codebooks, dtype):
    made = Engine(coded(n_codebooks, dtype, "cuda"), stage).generate(PROMPT, 48).tokens
    twin = models.dequantize_model(coded(n_codebooks, dtype, "cuda"), torch.float32).float()
    assert_greedy(twin, PROMPT, made, tolerance=0.3 if dtype == torch.bfloat16 else 0.05)
    assert len(set(made)) > 4


@gpu
def test_gpu_graph_replays_the_same_step():
    engine = Engine(coded(2, torch.float16, "cuda"), "graph")
    made = []
    for capture in (True, False):
        engine._decoder.capture = capture
        made.append(engine.generate(PROMPT, 40).tokens)
    assert made[0] == made[1]


@gpu
@pytest.mark.parametrize("stage", ["fused", "pdl"])
def test_gpu_fused_stages_refuse_and_the_graph_takes_over(stage):
    with pytest.raises(UnsupportedModel, match="use the stage graph"):
        Engine(coded(2, torch.float16, "cuda"), stage)
    assert last_engine(coded(2, torch.float16, "cuda"), 64).stage == "graph"


@gpu
def test_gpu_directories(tmp_path):
    model = coded(2, torch.float16, "cuda")
    expected = Engine(model, "graph").generate(PROMPT, 16).tokens
    models.save(model, None, tmp_path / "out")
    loaded = models.load(str(tmp_path / "out"), "cuda")
    assert Engine(loaded, "graph").generate(PROMPT, 16).tokens == expected
    aqlm_directory(tmp_path / "aqlm")
    assert torch.equal(
        logits(models.load(str(tmp_path / "aqlm"), "cuda").model), logits(coded(2, torch.float16, "cuda"))
    )
