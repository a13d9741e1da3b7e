"""The quantizers: order of their errors, rounding to float16, refusals."""

import math

import pytest
import torch

from trapetum.quantizers import METHODS, NF4, quantize, weight_error


def heavy_tailed(out_features=24, in_features=200):
    return torch.distributions.StudentT(4.0).sample((out_features, in_features)) * 0.02


@pytest.mark.parametrize("method,bits", [(m, bits) for m in METHODS for bits in METHODS[m].bits])
def test_every_method_gives_the_nearest_code(method, bits):
    weight = heavy_tailed(5, 77)
    quantized = quantize(weight, bits, method, input_weight=torch.rand(77))
    assert (quantized.bits, quantized.n_codes, quantized.in_features) == (bits, 2**bits, 77)
    distance = (weight.unsqueeze(2) - quantized.codebook.float().unsqueeze(1)).abs()
    chosen = distance.gather(2, quantized.indices().long().unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(chosen, distance.amin(2), rtol=0, atol=1e-8)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_methods_order_as_theory_says(bits):
    weight = heavy_tailed()
    error = {m: weight_error(weight, quantize(weight, bits, m)) for m in ("rtn", "lloyd", "kmeans")}
    assert error["kmeans"] < error["lloyd"] < error["rtn"]


def test_kmeans_nears_lloyd_max_on_a_normal():
    weight = torch.randn(4, 20000)
    error = [weight_error(weight, quantize(weight, bits)) for bits in (2, 3, 4)]
    # Source: Max, "Quantizing for minimum distortion", IRE Trans. 1960, table I: 4, 8 and 16 levels.
    assert error == pytest.approx([0.1175, 0.03454, 0.009497], rel=0.03)


def test_weighted_kmeans_lowers_the_weighted_error():
    weight, moment = heavy_tailed(), torch.rand(200) ** 6 + 1e-3

    def weighted_error(method):
        restored = quantize(weight, 3, method, input_weight=moment).dequantize()
        return float(((weight - restored).square() * moment).sum())

    assert weighted_error("kmeans-weighted") < 0.9 * weighted_error("kmeans")


def test_rtn_steps_are_equal_and_reach_the_ends():
    weight = heavy_tailed(3, 50)
    codebook = quantize(weight, 4, "rtn").codebook.float()
    ends = torch.stack(weight.aminmax(dim=1), 1)
    torch.testing.assert_close(codebook[:, [0, -1]], ends, rtol=1e-3, atol=1e-5)
    steps = codebook.diff(dim=1)
    assert float((steps - steps.mean(1, keepdim=True)).abs().max()) < 2e-3 * float(codebook.abs().max())


def test_nf4_is_scaled_by_the_largest_magnitude():
    weight = torch.tensor([[0.5, -2.0, 0.1]])
    torch.testing.assert_close(quantize(weight, 4, "nf4").codebook[0], (torch.tensor(NF4) * 2).half())
    assert len(NF4) == 16 and list(NF4) == sorted(NF4)


def test_codes_follow_the_rounded_codebook():
    # 1 + 2^-12 rounds to 1 in float16; the middle between the two codes moves with it.
    weight = torch.tensor([[1 + 2.0**-12, 1 + 2.0**-12, 2.0, 2.0, 1.5 + 2.0**-14]])
    quantized = quantize(weight, 2, "rtn", n_codes=2)
    assert quantized.codebook.tolist() == [[1.0, 2.0]]
    assert quantized.indices().tolist() == [[0, 0, 1, 1, 1]]


def test_few_values_are_reproduced():
    weight = torch.randint(-3, 4, (6, 40)) / 4
    assert weight_error(weight, quantize(weight, 3)) == 0.0
    assert weight_error(torch.zeros(2, 3), quantize(torch.zeros(2, 3), 4)) == 0.0
    assert weight_error(torch.zeros(1, 1), quantize(torch.ones(1, 1), 4)) == math.inf


def test_64_codes_in_8_bits_and_odd_shapes():
    weight = heavy_tailed(1, 1001)
    quantized = quantize(weight, 8, n_codes=64)
    assert (quantized.n_codes, quantized.bits) == (64, 8)
    assert weight_error(weight, quantized) < weight_error(weight, quantize(weight, 4)) / 4
    assert quantize(weight[:, :1], 4).dequantize().item() == pytest.approx(weight[0, 0].item(), rel=1e-3)


def test_deterministic_and_chunked(monkeypatch):
    weight = heavy_tailed(9, 64).bfloat16()
    first = quantize(weight, 4)
    monkeypatch.setattr("trapetum.quantizers._CHUNK_WEIGHTS", 130)
    second = quantize(weight, 4)
    assert torch.equal(first.codes, second.codes) and torch.equal(first.codebook, second.codebook)
    assert weight_error(weight, first) == pytest.approx(
        float(
            (weight.double() - first.dequantize(torch.float64)).square().sum()
            / weight.double().square().sum()
        )
    )


def test_parameters_need_no_detaching():
    parameter = torch.nn.Parameter(heavy_tailed(2, 16))
    assert not quantize(parameter, 4).codebook.requires_grad
    assert weight_error(parameter, quantize(parameter, 4)) < 0.02


@pytest.mark.parametrize(
    "change,words",
    [
        (
            {"weight": torch.tensor([[1.0, math.nan], [math.inf, 0.0]])},
            "layers.0.up holds 1 NaN and 1 infinite",
        ),
        ({"weight": torch.tensor([[1e6]])}, r"layers.0.up reaches 1e\+06"),
        ({"weight": torch.zeros(4)}, r"layers.0.up is torch.float32 \[4\]"),
        ({"weight": torch.zeros(2, 2, dtype=torch.int8)}, "torch.int8"),
        ({"method": "magic"}, "no quantization method 'magic'; choose one of rtn"),
        ({"method": "nf4", "bits": 3}, "does not make 3-bit codes; it makes 4"),
        ({"method": "nf4", "n_codes": 8}, "nf4 has 16 codes, not 8"),
        ({"bits": 5}, "5-bit"),
        ({"n_codes": 17}, "n_codes is 17"),
        ({"method": "kmeans-weighted"}, "got none for layers.0.up"),
        ({"method": "kmeans-weighted", "input_weight": torch.ones(2)}, "one for each of 3 inputs"),
        ({"method": "kmeans-weighted", "input_weight": -torch.ones(3)}, "input weights of layers.0.up hold"),
    ],
)
def test_refusals_name_the_tensor_and_the_way_out(change, words):
    arguments = {"weight": torch.zeros(2, 3), "bits": 4, "name": "layers.0.up", **change}
    with pytest.raises(ValueError, match=words):
        quantize(**arguments)


def test_weight_error_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\[2, 4\]"):
        weight_error(torch.zeros(2, 4), quantize(torch.zeros(2, 3), 4))


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_gpu_gives_the_same_quality(method):
    weight, moment = heavy_tailed(64, 1500), torch.rand(1500)
    here = quantize(weight, 4, method, input_weight=moment)
    there = quantize(weight.cuda(), 4, method, input_weight=moment.cuda())
    assert there.codes.is_cuda
    assert weight_error(weight.cuda(), there) == pytest.approx(weight_error(weight, here), rel=2e-3)
