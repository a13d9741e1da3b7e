"""Weights kept apart in fp16: which, how they are stored, and the product that adds them, against float64."""

from types import SimpleNamespace

import pytest
import torch

from trapetum import build, cpu, quantizers, sparse, sparse_product
from trapetum.formats import FormatError
from trapetum.memory import outlier_bytes
from trapetum.sparse import Outliers

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def heavy(out_features=37, in_features=130, seed=0, dtype=torch.float32):
    """A matrix with tails: some weights are far out, and one row has most of them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.02
    far = torch.rand(out_features, in_features, generator=generator) < 0.02
    weight[far] *= 12
    weight[1] *= 5
    return weight.to(dtype)


def pair(out_features=37, in_features=130, share=0.02, bits=4, method="kmeans", seed=0):
    weight = heavy(out_features, in_features, seed)
    kept, apart = sparse.split(weight, None, share)
    return weight, *sparse.settle(quantizers.quantize(kept, bits, method), apart)


def random_outliers(out_features, in_features, share, device="cpu", seed=0):
    """Random places and values; rows without entries and rows with many among them."""
    generator = torch.Generator().manual_seed(seed)
    entries = sparse.count(share, out_features, in_features)
    weighty = torch.rand(out_features, 1, generator=generator).pow(4) + 1e-3
    score = torch.rand(out_features, in_features, generator=generator) * weighty
    places = score.flatten().topk(entries).indices.sort().values
    rows = places // in_features
    starts = torch.zeros(out_features + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(rows, minlength=out_features).cumsum(0)
    columns = (places % in_features).to(sparse.column_dtype(in_features))
    values = torch.randn(entries, generator=generator).half()
    found = Outliers(values, columns, starts, in_features, share)
    found.check()
    return found.to(device)


# Which, and how many


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_are_taken_and_the_rest_is_as_it_was(dtype):
    weight = heavy(dtype=dtype)
    kept, apart = sparse.split(weight, None, 0.01)
    apart.check()
    assert len(apart.values) == sparse.count(0.01, 37, 130) == 48
    wanted = torch.where(kept == 0, weight.half().to(dtype), weight)
    assert kept.dtype == dtype and int((kept == 0).sum()) == 48
    assert torch.equal(apart.add_to(kept.clone()), wanted)
    assert float(kept.abs().max()) <= float(apart.values.abs().min())


def test_with_statistics_a_ninth_are_what_adds_most_to_the_output():
    weight = torch.full((8, 64), 0.5)
    mean_square = torch.ones(64)
    mean_square[7] = 2
    weight[:, 9] = 0.6  # larger, but adds less than input 7 does
    _, apart = sparse.split(weight, SimpleNamespace(mean_square=mean_square), 10 / 512)
    assert apart.columns.tolist() == [0, 7, *[9] * 8]
    _, plain = sparse.split(weight, None, 8 / 512)
    assert plain.columns.tolist() == [9] * 8
    _, one = sparse.split(weight, SimpleNamespace(mean_square=mean_square), 1 / 512)
    assert one.columns.tolist() == [7]


def test_of_equals_the_first_are_taken():
    _, apart = sparse.split(torch.ones(3, 4), None, 5 / 12)
    assert apart.starts.tolist() == [0, 4, 5, 5] and apart.columns.tolist() == [0, 1, 2, 3, 0]


def test_at_least_one_is_taken():
    assert sparse.count(1e-6, 4, 4) == 1
    _, apart = sparse.split(heavy(), None, 1e-6)
    assert float(apart.values.abs()) == float(heavy().half().abs().max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 0.0}, "the share of outliers is 0; give a part of 1 above 0"),
        ({"share": 0.6}, "the share of outliers is 0.6"),
        ({"share": float("nan")}, "the share of outliers is nan"),
        ({"weight": torch.tensor([[1.0, float("nan")]])}, "layer holds 1 values among 2 that are NaN"),
        ({"weight": torch.tensor([[1.0, 1e6]])}, "beyond the 65504 of float16"),
        ({"weight": torch.ones(3)}, r"layer is torch.float32 \[3\]"),
        (
            {"statistics": SimpleNamespace(mean_square=torch.ones(5))},
            r"are of \[5\] inputs; the matrix has 130",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_in_one_sentence(change, message):
    arguments = {"weight": heavy(), "statistics": None, "share": 0.01} | change
    with pytest.raises(ValueError, match=message) as caught:
        sparse.split(**arguments, name="layer")
    assert str(caught.value).count(". ") == 0


# Together with codes


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("method", ["rtn", "kmeans"])
def test_outliers_keep_their_fp16_weight_and_others_their_codes(bits, method):
    weight, quantized, apart = pair(64, 257, bits=bits, method=method)
    apart.check()
    places = apart.places()
    wanted = weight.half().view(-1)[places]
    missed = (sparse.dequantize(quantized, apart, torch.float64).view(-1)[places] - wanted.double()).abs()
    half_unit = torch.exp2(apart.values.abs().double().log2().floor() - 11)
    assert bool((missed <= half_unit).all())
    restored = sparse.dequantize(quantized, apart, torch.float16).view(-1)
    assert float((restored[places] == wanted).double().mean()) > 0.98
    alone = quantizers.quantize(sparse.split(weight, None, 0.02)[0], bits, method).dequantize(torch.float16)
    others = torch.ones(weight.numel(), dtype=torch.bool)
    others[places] = False
    assert torch.equal(restored[others], alone.view(-1)[others])


def test_where_no_entry_adds_up_exactly_the_error_is_half_a_unit_of_the_rest():
    weight = torch.tensor([[1.0009765625, 0.1, 0.1, 0.1]])  # 1 + 2**-10, and one entry of 0.1
    kept, apart = sparse.split(weight, None, 0.25)
    quantized = quantizers.quantize(torch.full_like(kept, 0.1), 2, "kmeans", n_codes=2)
    quantized, rest = sparse.settle(quantized, apart)
    restored = float(sparse.dequantize(quantized, rest, torch.float64)[0, 0])
    assert abs(restored - 1.0009765625) <= 2**-12


def test_apart_the_tails_cost_the_rest_less():
    weight, quantized, apart = pair(64, 512, bits=3)
    with_outliers = sparse.weight_error(weight, quantized, apart)
    without = quantizers.weight_error(weight, quantizers.quantize(weight, 3, "kmeans"))
    assert with_outliers < 0.7 * without
    dense = sparse.dequantize(quantized, apart, torch.float64)
    exact = float((weight.double() - dense).square().sum() / weight.double().square().sum())
    assert with_outliers == pytest.approx(exact, rel=1e-6)


def test_bytes_are_counted():
    weight, quantized, apart = pair(64, 512, share=0.0045)
    entries = round(0.0045 * 64 * 512)
    assert apart.nbytes == 4 * entries + 4 * 65 == outlier_bytes(512, 64, 0.0045)
    expected = 4 + 16 * 16 / 512 + 8 * apart.nbytes / weight.numel()
    assert sparse.bits_per_weight(quantized, apart) == pytest.approx(expected)
    assert sparse.bits_per_weight(quantized) == pytest.approx(quantized.bits_per_weight)
    assert outlier_bytes(70000, 8, 0.01) == 6 * 5600 + 4 * 9  # int32 columns


def test_matrices_of_two_shapes_do_not_settle():
    _, quantized, _ = pair(8, 64)
    with pytest.raises(ValueError, match="is quantized as 8 x 64 and its outliers are of 9 x 64"):
        sparse.settle(quantized, random_outliers(9, 64, 0.1))


def test_a_rest_beyond_fp16_is_refused():
    weight = torch.full((1, 8), -60000.0)
    weight[0, 3] = 65000.0
    _, apart = sparse.split(weight, None, 0.125)
    quantized = quantizers.quantize(torch.full((1, 8), -60000.0), 4, "kmeans")
    with pytest.raises(ValueError, match="further apart than float16 reaches"):
        sparse.settle(quantized, apart)


# What a file may hold


def damaged(**change):
    good = random_outliers(6, 50, 0.1)
    tensors = {"values": good.values, "columns": good.columns, "starts": good.starts, "share": 0.1} | change
    return Outliers(**tensors, in_features=50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(30)}, r"values of the outliers are torch.float32 \[30\]"),
        ({"values": torch.zeros(29).half()}, r"is torch.float16 \[30\]"),
        ({"columns": torch.zeros(30, dtype=torch.int32)}, "is torch.uint16"),
        ({"starts": torch.zeros(7, dtype=torch.int64)}, "the row starts of the outliers are torch.int64"),
        ({"share": -1.0}, "the share of outliers is -1"),
        ({"share": "much"}, "the share of outliers is 'much'"),
    ],
)
def test_shapes_and_dtypes_are_checked_at_once(change, message):
    with pytest.raises(FormatError, match=message):
        damaged(**change)


def rising(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": rising(0, 40, 30, 30, 30, 30, 30)}, "must rise from 0 to the 30 entries"),
        ({"starts": rising(1, 5, 5, 5, 5, 5, 30)}, "go from 1 to 30"),
        ({"starts": rising(0, 5, 5, 5, 5, 5, 31)}, "go from 0 to 31"),
        ({"columns": torch.full((30,), 50).to(torch.uint16)}, "go from 50 to 50; the matrix has 50, 0 to 49"),
        ({"columns": torch.zeros(30).to(torch.uint16)}, "do not rise within each row"),
        (
            {"values": torch.full((30,), torch.inf).half()},
            "30 of 30 values of the outliers are NaN or infinite",
        ),
    ],
)
def test_contents_are_checked_on_demand(change, message):
    with pytest.raises(FormatError, match=message):
        damaged(**change).check()


# The product


def error(y, expected):
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("path", [*cpu.paths(), "torch"])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 3), (37, 130), (200, 70000), (5, 65536)])
def test_every_cpu_path_agrees_with_float64(path, out_features, in_features, monkeypatch):
    monkeypatch.setattr(cpu, "active_path", lambda: path)
    outliers = random_outliers(out_features, in_features, 0.01 if in_features < 1000 else 0.0005)
    x, y = torch.randn(in_features), torch.randn(out_features)
    expected = sparse_product.reference(y, x, outliers)
    parts = outliers.values, outliers.columns, outliers.starts
    one = sparse_product.add_row(y.clone(), x, *parts, threads=1)
    assert error(one, expected) < 1e-6
    assert torch.equal(sparse_product.add_row(y.clone(), x, *parts, threads=3), one)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 3), (37, 131), (300, 70001)])
def test_the_operator_agrees_with_float64(device, rows, dtype, out_features, in_features):
    outliers = random_outliers(out_features, in_features, 0.02 if in_features < 1000 else 0.001, device)
    x = torch.randn(rows, in_features, device=device).to(dtype)
    y = torch.randn(rows, out_features, device=device).to(dtype)
    expected = sparse_product.reference(y, x, outliers)
    made = sparse_product.add(y.clone(), x, outliers)
    assert made.dtype == dtype and made.shape == y.shape
    assert error(made, expected) < {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]
    assert torch.equal(sparse_product.add(y.clone(), x, outliers), made)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    outliers = random_outliers(37, 130, 0.02, device)
    y, x = torch.randn(1, 1, 37, device=device), torch.randn(1, 1, 130, device=device)
    parts = outliers.values, outliers.columns, outliers.starts
    torch.library.opcheck(sparse_product.sparse_add_, (y, x, *parts))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.randn(9, 130), torch.randn(9, 37), "1 to 8 rows of x"),
        (torch.randn(1, 130), torch.randn(1, 36), "rows of 37 outputs"),
        (torch.randn(2, 130), torch.randn(1, 37), "rows of 37 outputs"),
        (torch.randn(1, 131), torch.randn(1, 37), "x has 131 inputs a row, and the outliers are of 130"),
        (torch.randn(1, 130).double(), torch.randn(1, 37), "not torch.float64 and torch.float32"),
        (torch.randn(2, 130), torch.randn(37, 2).T, "contiguous rows"),
    ],
)
def test_what_does_not_fit_is_refused(x, y, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sparse_product.add(y, x, random_outliers(37, 130, 0.02))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "defines", [("XTYPE=0", "ROWS=1"), ("XTYPE=1", "ROWS=8", "WIDE=1"), ("XTYPE=2", "ROWS=8")]
)
def test_the_cuda_kernel_compiles_without_spills(arch, defines):
    try:
        build.nvrtc_version()
    except build.BuildError as error:
        pytest.skip(str(error))
    assert build.compile_cuda(sparse_product.SOURCE, arch, defines).resources()["sparse_add"].spill_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("pdl", [False, True])
def test_the_cuda_kernel_writes_its_outputs_and_nothing_else(dtype, rows, pdl):
    outliers = random_outliers(301, 1030, 0.01, "cuda")
    x = torch.randn(rows, 1030, device="cuda").to(dtype)
    poisoned = torch.full((rows * 301 + 64,), float("nan"), dtype=dtype, device="cuda")
    y = poisoned[32:-32].view(rows, 301)
    y.copy_(torch.randn(rows, 301))
    before = y.clone()
    expected = sparse_product.reference(before, x, outliers)
    sparse_product.launch(y, x, outliers.values, outliers.columns, outliers.starts, pdl)
    assert error(y, expected) < {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]
    assert bool(poisoned[:32].isnan().all()) and bool(poisoned[-32:].isnan().all())
    empty = outliers.starts.diff() == 0
    assert bool(empty.any()) and torch.equal(y[:, empty], before[:, empty])


@pytest.mark.gpu
def test_chained_behind_a_product_with_pdl_it_waits_for_it():
    from trapetum import cuda, swap

    generator = torch.Generator("cuda").manual_seed(0)
    weight = swap.random_weight(4096, 4096, 4, generator)
    codes = cuda.pack(weight.indices(), 4)
    outliers = random_outliers(4096, 4096, 0.0045, "cuda")
    parts = outliers.values, outliers.columns, outliers.starts
    x = torch.randn(4096, device="cuda").half()
    alone = cuda.gemv(x, codes, weight.codebook, 4096, 4)
    expected = sparse_product.reference(alone, x, outliers)
    for _ in range(20):
        y = cuda.gemv(x, codes, weight.codebook, 4096, 4, pdl=True)
        sparse_product.launch(y, x, *parts, pdl=True)
        assert error(y, expected) < 6e-4
