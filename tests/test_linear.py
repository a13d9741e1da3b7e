"""CodebookLinear against float64, through layouts, casts, moves and state dicts."""

import pytest
import torch

from trapetum import formats, ops
from trapetum.linear import CodebookLinear

SCHEMES = [(8, 256), (8, 64), (4, 16), (3, 8), (2, 4), (4, 11)]


def make_weight(out_features=37, in_features=70, bits=4, n_codes=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(n_codes, (out_features, in_features), generator=generator, dtype=torch.uint8)
    codebook = torch.randn(out_features, n_codes, generator=generator).half()
    return formats.pack(indices, codebook, bits)


def relative_error(y, reference):
    return float((y.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("bits,n_codes", SCHEMES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_one_row_and_several_rows_agree_with_float64(bits, n_codes, has_bias):
    weight = make_weight(bits=bits, n_codes=n_codes)
    bias = torch.randn(37) if has_bias else None
    layer = CodebookLinear.from_weight(weight, bias)
    x = torch.randn(5, 70)
    dense = weight.dequantize(torch.float64)
    reference = x.double() @ dense.T + (bias.double() if has_bias else 0)
    assert relative_error(layer(x), reference) < 1e-6
    one = layer(x[2].view(1, 1, -1))
    assert one.shape == (1, 1, 37) and layer.layout == "device"
    assert relative_error(one.view(-1), reference[2]) < 2e-4
    assert relative_error(layer(x), reference) < 1e-6  # now from the device's layout


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_activations_keep_their_dtype_with_and_without_casts(dtype):
    layer = CodebookLinear.from_weight(make_weight(), torch.randn(37).to(dtype))
    x = torch.randn(1, 70).to(dtype)
    plain = layer(x)
    layer.casts = True
    cast = layer(x)
    assert plain.dtype == cast.dtype == dtype
    torch.testing.assert_close(plain, cast, rtol=2e-2, atol=2e-2)


def test_casting_the_module_leaves_the_codebook_alone():
    weight = make_weight()
    layer = CodebookLinear.from_weight(weight, torch.zeros(37)).to(torch.bfloat16)
    assert layer.codebook.dtype == torch.float16 and layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.codebook, weight.codebook)
    assert layer.double().codebook.dtype == torch.float16


@pytest.mark.parametrize("bits,n_codes", SCHEMES)
def test_state_dict_holds_the_stored_form_whatever_the_layout(bits, n_codes):
    weight = make_weight(bits=bits, n_codes=n_codes)
    layer = CodebookLinear.from_weight(weight)
    layer.prepare()
    state = layer.state_dict()
    assert torch.equal(state["codes"], weight.codes) and torch.equal(state["codebook"], weight.codebook)
    other = CodebookLinear.from_weight(make_weight(bits=bits, n_codes=n_codes, seed=1)).prepare()
    other.load_state_dict(state)
    assert other.layout == "rows" and torch.equal(other.to_weight().codes, weight.codes)


def test_an_empty_layer_on_the_meta_device_has_the_stored_shapes():
    layer = CodebookLinear(70, 37, bits=3, n_codes=8, bias=True, device="meta")
    weight = make_weight(bits=3, n_codes=8)
    assert layer.codes.shape == weight.codes.shape and layer.codebook.shape == weight.codebook.shape
    assert layer.bias.shape == (37,) and layer.n_codes == 8


def test_repr_names_the_sizes():
    text = repr(CodebookLinear(70, 37, bits=3, n_codes=8))
    assert "in_features=70" in text and "bits=3" in text and "n_codes=8" in text


@pytest.mark.gpu
@pytest.mark.parametrize("bits,n_codes", SCHEMES)
def test_moving_between_devices_repacks(bits, n_codes):
    weight = make_weight(out_features=64, in_features=256, bits=bits, n_codes=n_codes)
    layer = CodebookLinear.from_weight(weight)
    x = torch.randn(1, 256)
    reference = ops.reference_gemv(x[0], weight)
    for device in ("cpu", "cuda", "cpu"):
        layer.to(device)
        assert layer.layout == "rows" and torch.equal(layer.to_weight().codes.cpu(), weight.codes)
        y = layer(x.to(device, torch.float16 if device == "cuda" else torch.float32))
        assert relative_error(y.cpu().view(-1), reference) < 2e-3
        assert torch.equal(layer.to_weight().codes.cpu(), weight.codes)
