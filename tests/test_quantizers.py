"""The quantizers: order of their errors, rounding to float16, refusals."""

import math

import pytest
import torch

from trapetum.calibration import Statistics
from trapetum.gptq import gptq
from trapetum.lnq import lnq
from trapetum.quadratic import form, row_groups
from trapetum.quantizers import METHODS, NF4, group_rtn, quantize, require_scheme, weight_error

NEAREST = [m for m in METHODS if m not in ("lnq", "lnq-guided", "gptq-codebook", "additive")]


def heavy_tailed(out_features=24, in_features=200):
    return torch.distributions.StudentT(4.0).sample((out_features, in_features)) * 0.02


def statistics_of(in_features, tokens=400, groups=1):
    """Of inputs that share a component, so that they are correlated."""
    x = torch.randn(tokens, in_features) + 2 * torch.randn(tokens, 1)
    share = torch.rand(groups, tokens, 1) + 0.5
    hessian = torch.stack([x.T @ (s * x) / tokens for s in share])
    return Statistics(hessian, x.square().mean(0), tokens)


@pytest.mark.parametrize("method,bits", [(m, bits) for m in NEAREST for bits in METHODS[m].bits])
def test_methods_that_choose_by_distance_give_the_nearest_code(method, bits):
    weight = heavy_tailed(5, 77)
    quantized = quantize(weight, bits, method, statistics=statistics_of(77, groups=2))
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


def with_hessian(hessian, mean_square=None):
    return Statistics(hessian, torch.ones(3) if mean_square is None else mean_square, 9)


@pytest.mark.parametrize(
    "statistics,words",
    [
        (None, "got none for layers.0.up"),
        (with_hessian(None), "needs the Hessian of the inputs of layers.0.up"),
        (with_hessian(torch.eye(3)), r"Hessian of layers.0.up is \[3, 3\]; give \[groups, 3, 3\]"),
        (with_hessian(torch.eye(2)[None]), r"is \[1, 2, 2\]"),
        (with_hessian(torch.zeros(0, 3, 3)), r"is \[0, 3, 3\]"),
        (with_hessian(torch.full((1, 3, 3), math.nan)), "holds 9 NaN or infinite"),
        (with_hessian(-torch.eye(3)[None]), "has -1 on its diagonal"),
        (with_hessian(torch.eye(3)[None], torch.ones(4)), "one for each of 3 inputs"),
    ],
)
def test_refusals_of_statistics(statistics, words):
    for method in (name for name, m in METHODS.items() if m.needs_hessian):
        with pytest.raises(ValueError, match=words) as refused:
            quantize(torch.zeros(2, 3), 4, method, statistics=statistics, name="layers.0.up")
        assert "\n" not in str(refused.value) and str(refused.value).endswith(".")


def test_groups_of_rows():
    assert row_groups(7, 3) == [(0, slice(0, 3)), (1, slice(3, 5)), (2, slice(5, 7))]
    assert [g for g, _ in row_groups(2, 5)] == [0, 2]
    for rows, groups in [(1, 1), (7, 4), (5, 8), (300, 7)]:
        of_row = {r: g for g, part in row_groups(rows, groups) for r in range(rows)[part]}
        assert of_row == {r: r * groups // rows for r in range(rows)}


def test_hessian_methods_see_all_rows(monkeypatch):
    weight, statistics = heavy_tailed(9, 64), statistics_of(64, groups=4)
    first = [quantize(weight, 3, m, statistics=statistics) for m in METHODS if METHODS[m].needs_hessian]
    monkeypatch.setattr("trapetum.quantizers._CHUNK_WEIGHTS", 130)
    second = [quantize(weight, 3, m, statistics=statistics) for m in METHODS if METHODS[m].needs_hessian]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.codes, b.codes) and torch.equal(a.codebook, b.codebook)


@pytest.mark.parametrize("method", ["lnq", "lnq-guided"])
def test_what_lnq_measured_is_what_is_stored(method):
    weight, statistics = heavy_tailed(10, 150), statistics_of(150, groups=3)
    fitted = lnq(weight, 8, statistics.hessian)
    quantized = quantize(weight, 3, method, statistics=statistics)
    assert torch.equal(quantized.indices(), fitted.codes)
    assert torch.equal(quantized.codebook.float(), fitted.codebook)
    residual, error = (quantized.dequantize() - weight).double(), 0.0
    for g, rows in row_groups(10, 3):
        of = form(statistics.hessian[g])
        error += of.scale * float(((residual[rows] @ of.hessian.double()) * residual[rows]).sum())
    assert fitted.objective[-1] == pytest.approx(error, rel=1e-4)


def test_gptq_is_stored_as_it_is():
    weight, statistics = heavy_tailed(10, 150), statistics_of(150, groups=3)
    codebook, codes = gptq(weight, 16, statistics.hessian)
    quantized = quantize(weight, 4, "gptq-codebook", statistics=statistics)
    assert torch.equal(quantized.indices(), codes) and torch.equal(quantized.codebook.float(), codebook)


def test_awq_grid_is_the_best_of_its_clips():
    weight = heavy_tailed(6, 200)
    hessian = statistics_of(200).hessian[0]
    found = quantize(weight, 3, "awq", statistics=Statistics(hessian[None], hessian.diagonal(), 400))

    def output_errors(quantized):
        difference = quantized.dequantize() - weight
        return ((difference @ hessian) * difference).sum(1)

    codebook = found.codebook.float()
    steps = codebook.diff(dim=1)
    torch.testing.assert_close(steps, steps.mean(1, keepdim=True).expand_as(steps), rtol=0.02, atol=1e-5)
    shares = (codebook[:, -1] / weight.amax(1)).tolist()
    assert all(0.44 < share < 1.001 for share in shares) and min(shares) < 0.96
    assert bool((output_errors(found) <= output_errors(quantize(weight, 3, "rtn")) * 1.001).all())


def test_needs_and_transforms_are_known_words():
    assert {m.needs for m in METHODS.values()} <= {"", "moments", "hessian", "guided"}
    assert {m.transform for m in METHODS.values()} == {"", "awq", "rotation"}
    assert {name for name, m in METHODS.items() if not m.needs_calibration} == {
        "rtn",
        "nf4",
        "lloyd",
        "kmeans",
        "additive",
    }


def test_rounding_in_groups():
    weight = heavy_tailed(8, 300)
    rounded, bits = group_rtn(weight, 4)
    assert bits == 4 + 32 * 3 / 300
    assert rounded.shape == weight.shape and rounded.dtype == torch.float32
    for start in (0, 128, 256):
        part, back = weight[:, start : start + 128], rounded[:, start : start + 128]
        step = (part.amax(1, keepdim=True) - part.amin(1, keepdim=True)) / 15
        assert bool(((part - back).abs() <= 0.51 * step + 1e-4 * part.abs().amax()).all())
        assert all(len(row.unique()) <= 16 for row in back)
    one_group = quantize(weight, 4, "rtn").dequantize()
    assert (weight - rounded).square().sum() < 0.8 * (weight - one_group).square().sum()
    assert torch.equal(group_rtn(torch.zeros(2, 5), 4).weight, torch.zeros(2, 5))
    torch.testing.assert_close(
        group_rtn(torch.full((2, 5), 0.3), 4).weight, torch.full((2, 5), 0.3), rtol=1e-3, atol=0
    )


def test_groups_cannot_be_stored_and_that_is_said():
    with pytest.raises(ValueError, match="one codebook a channel, so use trapetum.quantizers.group_rtn"):
        quantize(torch.zeros(2, 3), 4, "rtn-128")
    with pytest.raises(ValueError, match="1 to 8 bits"):
        group_rtn(torch.zeros(2, 3), 9)


def test_weight_error_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"\[2, 4\]"):
        weight_error(torch.zeros(2, 4), quantize(torch.zeros(2, 3), 4))


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_gpu_gives_the_same_quality(method):
    weight, statistics = heavy_tailed(64, 1500), statistics_of(1500, 4000, groups=3)
    here = quantize(weight, 4, method, statistics=statistics)
    there = quantize(weight.cuda(), 4, method, statistics=statistics)
    assert there.codes.is_cuda
    rel = 2e-2 if METHODS[method].needs_hessian else 2e-3
    assert weight_error(weight.cuda(), there) == pytest.approx(weight_error(weight, here), rel=rel)


def test_a_scheme_is_known_before_a_weight_is():
    assert require_scheme(4, "kmeans") == 16 and require_scheme(4, "kmeans", 9) == 9
    assert require_scheme(2, "additive") == require_scheme(4, "additive", 256) == 256
    refused = {(3, "additive", None): "makes 2, 4", (2, "additive", 4): "additive codebooks have 256 entries"}
    refused |= {(4, "nf4", 8): "nf4 has 16 codes", (4, "none", None): "no quantization method 'none'"}
    for scheme, message in refused.items():
        with pytest.raises(ValueError, match=message):
            require_scheme(*scheme)


def test_additive_codebooks_are_not_codes_of_one_channel():
    with pytest.raises(ValueError, match="use trapetum.additive_fit.fit, or quantize a model"):
        quantize(torch.ones(2, 8), 2, "additive")
