"""The dense CPU kernels against float64: every width and path, odd sizes, and what they refuse."""

import pytest
import torch

from trapetum import build, cpu, cpu_dense

SHAPES = [(1, 1), (31, 33), (4, 64), (5, 63), (3, 65), (7, 4096), (6, 4097), (9, 11008)]  # (out, in)
PATHS = cpu.paths() or ["torch"]


def make(out_features, in_features, kind, seed=0):
    """x, bias, the packed weight and its scales, and the stored weight in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.05
    x, bias = torch.randn(in_features, generator=generator), torch.randn(out_features, generator=generator)
    packed, scale = cpu_dense.pack(weight, kind)
    return x, bias, packed, scale, stored(weight, kind)


def stored(weight, kind):
    """What rounding to the width leaves, computed apart from `pack`."""
    if kind == "fp32":
        return weight.double()
    if kind == "fp16":
        return weight.half().double()
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().double() * scale.double()


def relative_l2(y, wanted):
    return ((y.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", cpu_dense.KINDS)
def test_every_path_matches_float64_and_fills_a_poisoned_output(path, kind):
    for out_features, in_features in SHAPES:
        x, bias, packed, scale, weight = make(out_features, in_features, kind)
        out = torch.full((out_features,), float("nan"))
        y = cpu_dense.gemv(x, packed, scale, in_features, out_features, kind, bias=bias, out=out, path=path)
        wanted = weight @ x.double() + bias.double()
        size = (
            weight.abs() @ x.double().abs() + bias.double().abs()
        )  # a wrong term of 11008 exceeds 3e-7 of it
        assert y is out and ((y.double() - wanted).abs() <= 3e-7 * size).all(), (out_features, in_features)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", cpu_dense.KINDS)
def test_error_with_outliers(path, kind):
    x, _, packed, scale, weight = make(512, 5000, kind)
    x[::1250] *= 1e3
    y = cpu_dense.gemv(x, packed, scale, 5000, 512, kind, path=path)
    assert relative_l2(y, weight @ x.double()) <= 1e-6


def test_int8_rounds_by_less_than_a_hundredth():
    x, _, packed, scale, _ = make(512, 4096, "int8")
    exact = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)) * 0.05
    assert (
        1e-3
        < relative_l2(cpu_dense.gemv(x, packed, scale, 4096, 512, "int8"), exact.double() @ x.double())
        < 1e-2
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", cpu_dense.KINDS)
def test_same_bits_for_any_number_of_threads(path, kind):
    x, _, packed, scale, _ = make(45, 4500, kind)
    results = [
        cpu_dense.gemv(x, packed, scale, 4500, 45, kind, path=path, threads=threads) for threads in (1, 2, 3)
    ]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kind", cpu_dense.KINDS)
def test_unpack_gives_what_was_stored(kind):
    for out_features, in_features in SHAPES:
        _, _, packed, scale, weight = make(out_features, in_features, kind)
        back = cpu_dense.unpack(packed, scale, in_features, out_features, kind)
        assert torch.allclose(back.double(), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("kind", "block", "width"), [("fp32", 16, 4), ("fp16", 32, 2), ("int8", 64, 1)])
def test_packed_layout_is_the_documented_one(kind, block, width):
    weight = torch.zeros(8, 4096 + block)
    weight[5, block + 3] = 1.0  # tile 1, row 1, block 1
    weight[2, 4096 + 2] = 1.0  # second panel, tile 0, row 2
    packed, _ = cpu_dense.pack(weight, kind)
    assert packed.nbytes == weight.numel() * width
    first = 4 * 4096 + 4 * block + 1 * block + 3
    second = 8 * 4096 + 2 * block + 2
    assert packed.nonzero().flatten().tolist() == [first, second]


@pytest.mark.parametrize("kind", cpu_dense.KINDS)
def test_zeros_stay_zeros(kind):
    packed, scale = cpu_dense.pack(torch.zeros(5, 70), kind)
    assert torch.equal(cpu_dense.gemv(torch.ones(70), packed, scale, 70, 5, kind), torch.zeros(5))


def _valid():
    x, bias, packed, scale, _ = make(6, 40, "int8")
    return {
        "x": x,
        "packed": packed,
        "scale": scale,
        "in_features": 40,
        "out_features": 6,
        "kind": "int8",
        "bias": bias,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(41)}, r"x must be contiguous float32 \[40\].*\[41\]"),
        ({"x": torch.zeros(40).double()}, "x must be.*float64"),
        ({"x": torch.zeros(80)[::2]}, r"x must be contiguous.*strides \[2\]"),
        ({"packed": torch.zeros(3, dtype=torch.int8)}, r"512 torch.int8.*int8 \[6, 40\]; it is 3"),
        ({"scale": None}, "int8 weights have scales"),
        ({"kind": "fp32", "packed": torch.zeros(8 * 48)}, "fp32 weights have no scales"),
        ({"kind": "fp8"}, "kind is 'fp8'; dense weights are fp32, fp16, int8"),
        ({"bias": torch.zeros(5)}, r"bias must be contiguous float32 \[6\]"),
        ({"out": torch.zeros(6).half()}, r"out must be contiguous float32 \[6\].*float16"),
        ({"path": "sse9"}, "path=sse9 is unknown"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        cpu_dense.gemv(**(_valid() | change))


@pytest.mark.parametrize("weight", [torch.zeros(4), torch.zeros(0, 4), torch.zeros(4, 4, dtype=torch.int8)])
def test_pack_refuses(weight):
    with pytest.raises(ValueError, match="non-empty floating-point"):
        cpu_dense.pack(weight, "fp32")


def test_without_a_compiler_torch_does_the_work(monkeypatch):
    def fail(name):
        raise build.BuildError("no C compiler was found.")

    monkeypatch.setattr(cpu_dense, "compile_c", fail)
    cpu_dense._load.cache_clear()
    try:
        assert not cpu_dense.available() and "no C compiler" in cpu_dense.why_not()
        for kind in cpu_dense.KINDS:
            x, bias, packed, scale, weight = make(33, 130, kind)
            y = cpu_dense.gemv(x, packed, scale, 130, 33, kind, bias=bias)
            assert relative_l2(y, weight @ x.double() + bias.double()) <= 1e-6
    finally:
        cpu_dense._load.cache_clear()
