"""Outliers apart in a layer, in a model, and at every stage of the decode."""

import copy

import pytest
import torch
from torch import nn

from trapetum import models, quantizers, sparse, swap
from trapetum.decode import Engine, last_engine, stages
from trapetum.fused_step import FusedStep
from trapetum.linear import CodebookLinear
from trapetum.llama_step import LlamaStep, UnsupportedModel
from trapetum.projection import WithOutliers, project

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make(out_features=64, in_features=96, share=0.02, bits=4, bias=True, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.05
    weight[torch.rand(weight.shape, generator=generator) < 0.01] *= 10
    kept, apart = sparse.split(weight, None, share)
    quantized, apart = sparse.settle(quantizers.quantize(kept, bits, "kmeans"), apart)
    values = torch.randn(out_features, generator=generator) if bias else None
    layer = CodebookLinear.from_weight(quantized, values, apart).to(device)
    return layer, sparse.dequantize(quantized, apart, torch.float64).to(device)


def error(y, expected):
    return float((y.double() - expected).norm() / expected.norm())


# The layer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("rows", [1, 2, 8, 20])
def test_one_row_and_several_rows_agree_with_float64(device, bits, rows):
    layer, dense = make(bits=bits, device=device)
    x = torch.randn(rows, 96, device=device)
    expected = x.double() @ dense.T + layer.bias.double()
    assert error(layer(x), expected) < 1e-3 and layer(x.view(1, rows, 96)).shape == (1, rows, 64)
    layer.casts = True
    assert error(layer(x), expected) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_activations(device, dtype):
    layer, dense = make(device=device)
    layer.to(dtype)
    assert layer.outlier_values.dtype == torch.float16
    x = torch.randn(1, 96, device=device).to(dtype)
    expected = x.double() @ dense.T + layer.bias.double()
    assert error(layer(x), expected) < (2e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("layout", ["rows", "device"])
def test_the_dense_weight_has_the_outliers_in_it(layout):
    layer, dense = make(seed=1)
    if layout == "device":
        layer.prepare()
    assert torch.equal(layer.dequantize(torch.float32), dense.float())
    assert layer.layout == layout


def test_a_state_dict_holds_the_parts_and_fills_an_empty_layer():
    layer, _ = make(bias=False)
    state = layer.state_dict()
    assert {"outlier_values", "outlier_columns", "outlier_rows"} < set(state)
    other = CodebookLinear(96, 64, 4, outliers=0.02)
    other.load_state_dict(state)
    other.outliers.check()
    x = torch.randn(1, 96)
    assert torch.equal(other(x), layer(x))
    meta = CodebookLinear(96, 64, 4, outliers=0.02, device="meta")
    assert {n: (t.shape, t.dtype) for n, t in meta.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in state.items()
    }


def test_a_layer_without_outliers_is_as_it_was():
    layer = CodebookLinear(96, 64, 4)
    assert layer.outliers is None and set(layer.state_dict()) == {"codes", "codebook"}
    assert "outliers" not in repr(layer) and "outliers=0.02" in repr(make()[0])


@pytest.mark.gpu
def test_moving_between_devices():
    layer, dense = make()
    x = torch.randn(1, 96)
    for device in ("cpu", "cuda", "cpu"):
        layer.to(device)
        expected = x.double() @ dense.T + layer.bias.double().cpu()
        assert error(layer(x.to(device)).cpu(), expected) < 1e-3


# Stacked products


@pytest.mark.parametrize("device", DEVICES)
def test_stacked_layers_are_their_products_side_by_side_and_hold_nothing_twice(device):
    made = [
        make(rows, 96, share, seed=rows, device=device)
        for rows, share in ((64, 0.02), (32, 0.02), (96, 0.05))
    ]
    layers = [layer for layer, _ in made]
    product = project(layers, torch.float32)
    assert isinstance(product, WithOutliers) and product.out_features == 192
    bias = torch.cat([layer.bias for layer in layers]).double()
    dense = torch.cat([dense for _, dense in made])
    x = torch.randn(40, 96, device=device)
    expected = x.double() @ dense.T + bias
    assert error(product(x[:1]), expected[:1]) < 1e-3
    assert error(product.rows(x), expected) < 1e-5
    for layer, y in zip(layers, expected.split([64, 32, 96], -1), strict=True):
        layer.outliers.check()
        assert error(layer(x[:1]), y[:1]) < 1e-3
    first, second = layers[0].outlier_columns, layers[1].outlier_columns
    assert second.data_ptr() == first.data_ptr() + first.nbytes
    again = project(layers, torch.float32)
    assert torch.equal(again(x[:1]), product(x[:1]))


def test_layers_with_and_without_outliers_stay_apart():
    sparse_layer, dense = make(64, bias=False)
    plain = CodebookLinear.from_weight(swap.random_weight(64, 96, 4, torch.Generator().manual_seed(0)))
    product = project([sparse_layer, plain], torch.float32)
    x = torch.randn(1, 96)
    expected = torch.cat([x.double() @ dense.T, x.double() @ plain.dequantize(torch.float32).double().T], -1)
    assert not isinstance(product, WithOutliers) and error(product(x), expected) < 1e-3


# A model


def with_outliers(model, share=0.01, bits=4):
    for name, layer in swap.linears(model):
        kept, apart = sparse.split(layer.weight.detach(), None, share)
        quantized, apart = sparse.settle(quantizers.quantize(kept, bits, "rtn"), apart)
        swap.replace(model, name, CodebookLinear.from_weight(quantized, swap._bias(layer), apart))
    return model


def tiny(device="cpu", dtype=torch.float32):
    """A random model, its logits spread so that a rounding does not decide between two tokens."""
    model = models.random_model(models.MODELS["llama-tiny"], device, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


@pytest.fixture(scope="module")
def pair():
    """A model with 1 % of its weights apart, and its dense twin."""
    model = with_outliers(tiny())
    return model, swap.dequantize_model(copy.deepcopy(model))


def test_bytes_of_a_model_count_the_outliers(pair):
    model, twin = pair
    plain = swap.weight_bytes(with_outliers_removed(copy.deepcopy(model)))
    extra = sum(layer.outliers.nbytes for _, layer in swap.codebook_layers(model))
    assert extra > 0 and swap.weight_bytes(model) == plain + extra
    assert not swap.is_quantized(twin) and all(isinstance(m, nn.Linear) for _, m in swap.linears(twin))


def with_outliers_removed(model):
    for name, layer in swap.codebook_layers(model):
        swap.replace(model, name, CodebookLinear.from_weight(layer.to_weight(), layer.bias))
    return model


@pytest.mark.parametrize("stage", stages("cpu"))
def test_every_cpu_stage_gives_the_dense_twins_tokens(pair, stage):
    model, twin = pair
    prompt = [5, 9, 200, 31]
    made = Engine(copy.deepcopy(model), stage, 64).generate(prompt, 12).tokens
    assert made == Engine(twin, "naive", 64).generate(prompt, 12).tokens


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["naive", "cast_free", "graph"])
def test_every_cuda_stage_is_close_to_the_dense_twin(stage):
    model = with_outliers(tiny("cuda", torch.float16))
    twin = swap.dequantize_model(copy.deepcopy(model), torch.float32).float()
    prompt, tokens = [5, 9, 200, 31], [7, 80, 12, 3, 44]
    ours = Engine(model, stage, 64).forced_logits(prompt, tokens).double()
    theirs = Engine(twin, "naive", 64).forced_logits(prompt, tokens).double()
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-2


@pytest.mark.gpu
def test_the_fused_stages_refuse_and_the_last_engine_is_of_the_stage_before():
    model = with_outliers(tiny("cuda", torch.float16))
    for stage in ("fused", "pdl"):
        with pytest.raises(
            UnsupportedModel, match="no kernel for outliers kept apart in fp16; use the stage graph"
        ):
            Engine(model, stage, 64)
    assert last_engine(model, 64).stage == "graph"
    with pytest.raises(UnsupportedModel, match="outliers"):
        last_engine(model, 64, kv="int8")


def test_the_fused_step_refuses_in_one_sentence(pair):
    with pytest.raises(UnsupportedModel, match="no kernel for outliers") as caught:
        FusedStep(LlamaStep(copy.deepcopy(pair[0]), 64, cache=False), 64)
    assert str(caught.value).count(". ") == 0
    assert last_engine(copy.deepcopy(pair[0]), 64).stage == "lean"
