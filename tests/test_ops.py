"""The torch operator: schema, shapes, errors, and agreement with the float64 twin on the device at hand."""

import pytest
import torch

from trapetum import ops
from trapetum.formats import pack

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make(device, out_features=70, in_features=130, bits=4, dtype=torch.float32):
    indices = torch.randint(2**bits, (out_features, in_features), dtype=torch.uint8, device=device)
    weight = pack(indices, torch.randn(out_features, 2**bits, device=device).half(), bits)
    return weight, ops.to_layout(weight, device), torch.randn(in_features, device=device).to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_float64(device, bits, dtype):
    weight, codes, x = make(device, bits=bits, dtype=dtype)
    bias = torch.randn(weight.out_features, device=device).to(dtype)
    y = ops.codebook_gemv(x, codes, weight.codebook, bias, weight.in_features, bits)
    expected = ops.reference_gemv(x, weight, bias)
    tolerance = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert y.dtype == dtype and y.shape == expected.shape
    assert (y.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    weight, codes, x = make(device)
    for bias in (None, torch.randn(weight.out_features, device=device)):
        arguments = (x.view(1, 1, -1), codes, weight.codebook, bias, weight.in_features, 4)
        torch.library.opcheck(ops.codebook_gemv, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_layout_and_dense_matrix_round_trip(device, bits):
    weight, codes, _ = make(device, bits=bits)
    back = ops.from_layout(codes, weight.codebook, weight.in_features, bits)
    assert torch.equal(back.codes, weight.codes)
    dense = ops.dequantize(codes, weight.codebook, weight.in_features, bits, torch.float32)
    assert torch.equal(dense, weight.dequantize(torch.float32))


@pytest.mark.parametrize("device", DEVICES)
def test_leading_dimensions_are_kept_and_rows_are_independent(device):
    weight, codes, x = make(device)
    rows = torch.randn(2, 3, 130, device=device)
    y = ops.codebook_gemv(rows, codes, weight.codebook, None, 130, 4)
    assert y.shape == (2, 3, 70)
    for i, j in ((0, 0), (1, 2)):
        expected = ops.reference_gemv(rows[i, j], weight)
        assert (y[i, j].double() - expected).norm() <= 1e-3 * expected.norm()
    assert ops.codebook_gemv(x.view(1, 1, -1), codes, weight.codebook, None, 130, 4).shape == (1, 1, 70)


def test_non_contiguous_input():
    weight, codes, _ = make("cpu")
    strided = torch.randn(130, 2)[:, 0]
    y = ops.codebook_gemv(strided, codes, weight.codebook, None, 130, 4)
    expected = ops.codebook_gemv(strided.contiguous(), codes, weight.codebook, None, 130, 4)
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 3, 130)}, r"1 to 8 rows of 130 inputs, and x has shape \[3, 3, 130\]"),
        ({"x": torch.randn(129)}, r"x has shape \[129\]"),
        ({"x": torch.randn(130).double()}, "not torch.float64"),
        ({"codebook": torch.randn(70, 16)}, r"must be float16 .* not torch.float32 \[70, 16\]"),
        ({"codebook": torch.randn(70, 17).half()}, "at most 16"),
        ({"bias": torch.randn(69)}, r"the bias must be torch.float32 \[70\]"),
    ],
)
def test_bad_input_is_one_clear_sentence(change, message):
    weight, codes, x = make("cpu")
    arguments = {"x": x, "codebook": weight.codebook, "bias": None} | change
    with pytest.raises((ValueError, TypeError), match=message):
        ops.codebook_gemv(arguments["x"], codes, arguments["codebook"], arguments["bias"], 130, 4)
