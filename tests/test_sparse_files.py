"""A model with outliers apart: quantized, written, checked, and read by trapetum and by transformers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import trapetum.hf  # noqa: F401
from trapetum import models, sparse, swap
from trapetum.bench.variants import codebook_variant
from trapetum.checkpoint import ModelError
from trapetum.cli import app
from trapetum.memory import memory_estimate, outlier_bytes
from trapetum.perplexity import perplexity

SHARE = 0.01
IDS = torch.tensor([[5, 9, 200, 3]])


def dense():
    return models.load("random:llama-tiny", dtype=torch.float32).model


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


@pytest.fixture(scope="module")
def quantized():
    model = dense()
    report = models.quantize_model(model, 4, "rtn", progress=False, outliers=SHARE)
    return model, report


@pytest.fixture(scope="module")
def folder(quantized, tmp_path_factory):
    return models.save(quantized[0], None, tmp_path_factory.mktemp("sparse") / "model")


@pytest.fixture
def copied(folder, tmp_path):
    """A copy whose hashes are gone, so that other checks are reached."""
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    fields = json.loads(path.read_text())
    del fields["quantization_config"]["sha256"]
    path.write_text(json.dumps(fields))
    return tmp_path / "copy"


def change_config(folder, **fields):
    path = folder / "config.json"
    whole = json.loads(path.read_text())
    whole["quantization_config"] |= fields
    path.write_text(json.dumps(whole))


def change_tensor(folder, name, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def test_every_layer_keeps_its_share_and_loses_less(quantized):
    model, report = quantized
    plain = dense()
    without = models.quantize_model(plain, 4, "rtn", progress=False)
    for name, layer in swap.codebook_layers(model):
        assert layer.outlier_share == SHARE
        assert len(layer.outliers.values) == sparse.count(SHARE, layer.out_features, layer.in_features)
        assert report.errors[name] < without.errors[name]
    weights = dict(swap.linears(dense()))
    name, layer = swap.codebook_layers(model)[0]
    lost = (weights[name].weight - layer.dequantize()).double().square().sum()
    assert report.errors[name] == pytest.approx(
        float(lost / weights[name].weight.double().square().sum()), rel=1e-5
    )


def test_config_says_the_share_and_the_file_names_the_parts(folder):
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert fields["outliers"] == SHARE
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    dtypes = {part: tensors[f"{name}.{part}"].dtype for part in sparse.PARTS}
    assert dtypes == {
        "outlier_values": torch.float16,
        "outlier_columns": torch.uint16,
        "outlier_rows": torch.int32,
    }


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_trapetum_reads_it_back(quantized, folder, dtype):
    model = models.load(str(folder), dtype=dtype).model
    for (name, layer), (_, other) in zip(
        swap.codebook_layers(model), swap.codebook_layers(quantized[0]), strict=True
    ):
        for part in ("outlier_values", "outlier_columns", "outlier_rows"):
            assert torch.equal(getattr(layer, part), getattr(other, part)), name
    if dtype is None:
        assert torch.equal(logits(model), logits(quantized[0]))


def test_transformers_reads_it_and_writes_it(quantized, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    assert torch.equal(logits(model), logits(quantized[0]))
    assert {layer.outlier_share for _, layer in swap.codebook_layers(model)} == {SHARE}
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path / "again"))
    assert torch.equal(logits(again), logits(model))


def test_without_outliers_nothing_is_said(tmp_path):
    model = dense()
    models.quantize_model(model, 4, "rtn", progress=False)
    made = models.save(model, None, tmp_path / "plain")
    assert "outliers" not in json.loads((made / "config.json").read_text())["quantization_config"]
    assert not any("outlier" in name for name in load_file(made / "model.safetensors"))


NAME = "model.layers.0.mlp.up_proj"


def first(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("outlier_values", first(float("nan")), "values of the outliers are NaN or infinite"),
        ("outlier_values", lambda t: t.float(), "outlier_values in F32 and not in torch.float16"),
        ("outlier_values", lambda t: t[:-1].clone(), "outlier_values as "),
        (
            "outlier_columns",
            lambda t: (t.long() * 0 + 65535).to(t.dtype),
            "the columns of the outliers go from 65535",
        ),
        ("outlier_columns", lambda t: (t.long() * 0).to(t.dtype), "do not rise within each row"),
        ("outlier_rows", first(1), "the row starts of the outliers go from 1"),
        ("outlier_rows", lambda t: t.flip(0).contiguous(), "must rise from 0"),
    ],
)
@pytest.mark.parametrize("reader", ["trapetum", "transformers"])
def test_a_damaged_part_is_named(copied, part, change, message, reader):
    change_tensor(copied, f"{NAME}.{part}", change)
    with pytest.raises(ModelError, match=message) as caught:
        if reader == "trapetum":
            models.load(str(copied))
        else:
            AutoModelForCausalLM.from_pretrained(str(copied))
    assert NAME in str(caught.value)


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.02, "outlier_columns as|outlier_values as"),
        (0.0, "no place for"),
        (-1, "a share is 0 to 0.5"),
        ("x", "a share is"),
    ],
)
def test_another_share_in_the_config_is_refused(copied, share, message):
    change_config(copied, outliers=share)
    with pytest.raises(ModelError, match=message):
        models.load(str(copied))


def test_layers_of_two_shares_are_not_written(tmp_path):
    model = dense()
    models.quantize_model(model, 4, "rtn", progress=False, outliers=SHARE)
    name, layer = swap.codebook_layers(model)[0]
    swap.replace(model, name, type(layer).from_weight(layer.to_weight(), layer.bias))
    with pytest.raises(ModelError, match=r"different shares of outliers apart \(0, 0.01\)"):
        models.save(model, None, tmp_path / "mixed")


def test_quantizing_while_loading_gives_the_same(quantized):
    spec = models.QuantizeSpec(4, "rtn", outliers=SHARE)
    loaded = models.load("random:llama-tiny", dtype=torch.float32, quantize=spec)
    assert torch.equal(logits(loaded.model), logits(quantized[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outliers": 0.7}, "the share of outliers is 0.7"),
        ({"outliers": 0.01, "method": "additive"}, "not beside additive"),
    ],
)
def test_what_no_layer_could_keep_apart_is_refused(options, message):
    options = {"bits": 2, "method": "rtn"} | options
    with pytest.raises(ValueError, match=message):
        models.quantize_model(dense(), progress=False, **options)
    with pytest.raises(ValueError, match=message):
        models.load("random:llama-tiny", quantize=models.QuantizeSpec(**options))


def test_the_command_quantizes_with_outliers_and_generates(tmp_path):
    out = tmp_path / "out"
    arguments = [
        "quantize",
        "random:llama-tiny",
        str(out),
        "--method",
        "rtn",
        "--outliers",
        "0.01",
        "--device",
        "cpu",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads((out / "config.json").read_text())["quantization_config"]["outliers"] == 0.01
    done = CliRunner().invoke(app, ["generate", str(out), "-n", "3", "--device", "cpu"])
    assert done.exit_code == 0 and "stage lean" in done.output, done.output


def test_a_models_perplexity_is_that_of_its_dense_twin(quantized, folder):
    model = models.load(str(folder)).model
    ids = torch.arange(200) % 97
    ours = perplexity(model, ids, 64, 32).value
    assert ours == pytest.approx(perplexity(swap.dequantize_model(model), ids, 64, 32).value, rel=1e-4)


def test_the_memory_estimate_counts_them():
    shape = models.MODELS["llama-tiny"]
    extra = sum(
        memory_estimate(shape, 4, 64, outliers=SHARE)[part] - memory_estimate(shape, 4, 64)[part]
        for part in ("weights", "output head")
    )
    counted = sum(outlier_bytes(inputs, out, SHARE) for _, inputs, out in shape.linears())
    assert extra == shape.layers * counted


def test_a_decodes_record_says_the_share_and_its_bytes_count_it(quantized, folder):
    variant = codebook_variant(str(folder), "cpu", "fp32")
    assert variant.config["outliers"] == SHARE and variant.config["bits"] == 4
    apart = sum(layer.outliers.nbytes for _, layer in swap.codebook_layers(variant.loaded.model))
    plain = dense()
    models.quantize_model(plain, 4, "rtn", progress=False)
    assert swap.weight_bytes(variant.loaded.model) == swap.weight_bytes(plain) + apart
    assert variant.token_weight_bytes == swap.weight_bytes(variant.loaded.model) - embedding_bytes(variant)


def embedding_bytes(variant):
    """Of an embedding that is no head, whose other rows a token does not read."""
    model = variant.loaded.model
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return 0 if tied else model.get_input_embeddings().weight.nbytes
