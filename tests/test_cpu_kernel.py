"""The CPU kernel against float64: every path, odd sizes, hard inputs, and what it refuses."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trapetum import build, cpu

SHAPES = [(1, 1), (31, 33), (4, 128), (5, 127), (3, 129), (7, 4096), (6, 4097), (9, 11008)]  # (out, in)
PATHS = cpu.paths() or ["torch"]
TOLERANCE = {
    "int16": 1e-4,
    "exact": 1e-6,
    "int8": 2e-2,
}  # of a row's scale; int8 is held tighter as relative L2


def make(out_features, in_features, bits, n_codes=None, seed=0):
    """Codes, codebook, x and bias; codebooks reach down to fp16 subnormals."""
    generator = torch.Generator().manual_seed(seed)
    n_codes = n_codes or 2**bits
    size = (out_features, in_features)
    indices = torch.randint(0, n_codes, size, dtype=torch.uint8, generator=generator)
    codebook = (torch.randn(out_features, n_codes, generator=generator) * 0.05).half()
    codebook[:, 0] = 3e-6
    x, bias = torch.randn(in_features, generator=generator), torch.randn(out_features, generator=generator)
    return indices, codebook, x, bias


def oracle(indices, codebook, x, bias=None):
    """y in float64, and the scale of each row's rounding errors: ||x|| (4 rms(w) + largest code).

    It is small enough that one input left out of 9000 is seen.
    """
    weight, wide = codebook.double().gather(1, indices.long()), x.double()
    y = weight @ wide + (0 if bias is None else bias.double())
    return y, wide.norm() * (4 * weight.pow(2).mean(1).sqrt() + codebook.double().abs().amax(1))


def assert_close(y, indices, codebook, x, bias, arithmetic):
    wanted, scale = oracle(indices, codebook, x, bias)
    tolerance = TOLERANCE[arithmetic]
    worst = ((y.double() - wanted).abs() / (tolerance * scale + 1e-6 * wanted.abs() + 1e-30)).max().item()
    assert worst <= 1, f"error is {worst:.2f} times the allowed {tolerance} of the row's scale"


def relative_l2(y, wanted):
    return ((y.double() - wanted).norm() / wanted.norm()).item()


def arithmetic_of(bits, arithmetic, path):
    """What is really computed: 8-bit weights and torch are always exact."""
    return "exact" if bits == 8 or path == "torch" else arithmetic


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", cpu.BITS)
@pytest.mark.parametrize("arithmetic", cpu.ARITHMETICS)
def test_every_path_matches_float64(path, bits, arithmetic):
    for out_features, in_features in SHAPES:
        indices, codebook, x, bias = make(out_features, in_features, bits)
        packed = cpu.pack(indices, bits)
        y = cpu.gemv(x, packed, codebook, in_features, bits, bias=bias, path=path, arithmetic=arithmetic)
        assert_close(y, indices, codebook, x, bias, arithmetic_of(bits, arithmetic, path))


def activation(kind, in_features, generator):
    if kind == "gaussian":
        return torch.randn(in_features, generator=generator)
    x = torch.randn(in_features, generator=generator)
    if kind == "laplace":  # the difference of two exponentials
        first, second = -torch.rand(2, in_features, generator=generator).clamp(min=1e-9).log()
        x = first - second
    x[torch.randperm(in_features, generator=generator)[:4]] *= 40 if kind == "laplace" else 1e3
    return x


# What is promised: relative L2 error against float64.
BOUNDS = {"gaussian": (1e-4, 1e-6, 1e-2), "laplace": (1e-4, 1e-6, 2e-2), "outliers": (1e-4, 1e-6, 2e-2)}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("kind", BOUNDS)
def test_error_of_a_real_layer(path, bits, kind):
    indices, _, _, _ = make(1024, 4096, bits)
    generator = torch.Generator().manual_seed(bits)
    codebook = (torch.randn(1024, 2**bits, generator=generator) / 64).half()
    x, packed = activation(kind, 4096, generator), cpu.pack(indices, bits)
    wanted, _ = oracle(indices, codebook, x)
    for arithmetic, bound in zip(cpu.ARITHMETICS, BOUNDS[kind], strict=True):
        y = cpu.gemv(x, packed, codebook, 4096, bits, path=path, arithmetic=arithmetic)
        assert relative_l2(y, wanted) <= bound, arithmetic


def test_int8_is_another_arithmetic():
    indices, codebook, x, _ = make(64, 4096, 4)
    packed, (wanted, _) = cpu.pack(indices), oracle(indices, codebook, x)
    error = relative_l2(cpu.gemv(x, packed, codebook, 4096, 4, arithmetic="int8"), wanted)
    assert cpu.active_path() == "torch" or error > 1e-3


@settings(max_examples=40, deadline=None)
@given(
    out_features=st.integers(1, 40),
    in_features=st.integers(1, 9000),
    scheme=st.sampled_from([(2, 4), (3, 8), (3, 5), (4, 16), (4, 1), (8, 64), (8, 256), (8, 100)]),
    path=st.sampled_from(PATHS),
    arithmetic=st.sampled_from(cpu.ARITHMETICS),
    outlier=st.sampled_from([1.0, 1e3, 1e-20]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(out_features, in_features, scheme, path, arithmetic, outlier, seed):
    bits, n_codes = scheme
    indices, codebook, x, bias = make(out_features, in_features, bits, n_codes, seed)
    x[seed % in_features] *= outlier
    packed = cpu.pack(indices, bits)
    assert torch.equal(cpu.unpack(packed, out_features, in_features, bits), indices)
    y = cpu.gemv(x, packed, codebook, in_features, bits, bias=bias, path=path, arithmetic=arithmetic)
    assert_close(y, indices, codebook, x, bias, arithmetic_of(bits, arithmetic, path))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", cpu.BITS)
def test_dequantize_is_exact(path, bits):
    for out_features, in_features in SHAPES:
        indices, codebook, _, _ = make(out_features, in_features, bits)
        packed, weight = cpu.pack(indices, bits), codebook.gather(1, indices.long())
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert torch.equal(
                cpu.dequantize(packed, codebook, in_features, bits, dtype, path), weight.to(dtype)
            )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", cpu.BITS)
@pytest.mark.parametrize("arithmetic", cpu.ARITHMETICS)
def test_same_bits_for_any_number_of_threads(path, bits, arithmetic):
    indices, codebook, x, _ = make(45, 4500, bits)
    packed, before, results = cpu.pack(indices, bits), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(cpu.gemv(x, packed, codebook, 4500, bits, path=path, arithmetic=arithmetic))
    finally:
        torch.set_num_threads(before)
    if path != "torch":
        assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(results[-1], results[0])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", cpu.BITS)
@pytest.mark.parametrize("arithmetic", cpu.ARITHMETICS)
def test_zero_x_and_poisoned_output(path, bits, arithmetic):
    indices, codebook, _, bias = make(37, 4225, bits)
    out = torch.full((37,), float("nan"))
    packed, zeros = cpu.pack(indices, bits), torch.zeros(4225)
    how = {"path": path, "arithmetic": arithmetic}
    assert cpu.gemv(zeros, packed, codebook, 4225, bits, bias=bias, out=out, **how) is out
    assert torch.equal(out, bias)
    assert torch.equal(cpu.gemv(zeros, packed, codebook, 4225, bits, **how), torch.zeros(37))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("arithmetic", cpu.ARITHMETICS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_x_is_not_hidden(path, bits, arithmetic, bad):
    indices, codebook, x, _ = make(6, 300, bits)
    packed = cpu.pack(indices, bits)
    for place in (0, 77, 130, 299):
        broken = x.clone()
        broken[place] = bad
        y = cpu.gemv(broken, packed, codebook, 300, bits, path=path, arithmetic=arithmetic)
        assert not y.isfinite().any()


def test_strided_x_and_codebook():
    indices, codebook, x, bias = make(20, 200, 4)
    spread = torch.zeros(200, 3)
    spread[:, 1] = x
    wanted = cpu.gemv(x, cpu.pack(indices), codebook, 200, 4, bias=bias)
    strided = codebook.t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(
        cpu.gemv(spread[:, 1], cpu.pack(indices.t().contiguous().t()), strided, 200, 4, bias=bias), wanted
    )
    assert torch.equal(cpu.gemv(x[None, None], cpu.pack(indices), codebook, 200, 4, bias=bias), wanted)


def test_misaligned_memory():
    indices, codebook, x, _ = make(9, 500, 4)
    packed = cpu.pack(indices)
    moved = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].copy_(packed)
    shifted = torch.empty(501)[1:].copy_(x)
    assert torch.equal(cpu.gemv(shifted, moved, codebook, 500, 4), cpu.gemv(x, packed, codebook, 500, 4))


def test_packed_layout_is_the_documented_one():
    indices = torch.zeros(8, 4096 + 128, dtype=torch.uint8)
    indices[5, 16 * 3 + 7] = 9  # tile 1, row 1, block 0, lane 7, nibble 3: high half of byte 1
    indices[2, 4096 + 2] = 6  # second panel, tile 0, row 2, lane 2, nibble 0
    packed = cpu.pack(indices)
    wanted = torch.zeros(8 * 4224 // 2, dtype=torch.uint8)
    wanted[4 * 4096 // 2 + 64 + 4 * 7 + 1] = 9 << 4
    wanted[8 * 4096 // 2 + 2 * 64 + 4 * 2] = 6
    assert torch.equal(packed, wanted)


# Bits, the code's number j of its 16-bit word, the word's half s of lane 7, and where its bits are: (byte, shift).
PLACES = [
    (2, 5, 1, [(4 * 7 + 3, 2)]),  # second code of byte 3
    (3, 3, 0, [(64 + 4 * 7, 3)]),  # c3: byte 0 of B
    (3, 12, 1, [(128 + 4 * 7 + 3, 0)]),  # c4 of byte 3: C
]


@pytest.mark.parametrize(("bits", "j", "s", "places"), PLACES)
def test_packed_layout_below_4_bits(bits, j, s, places):
    indices = torch.zeros(6, 600, dtype=torch.uint8)
    indices[5, 128 * (j // 4) + 16 * (j % 4 + 4 * s) + 7] = 2**bits - 1
    block = {2: 64, 3: 192}[bits]
    tile = 4 * block * {2: 3, 3: 2}[bits]
    wanted = torch.zeros(2 * tile, dtype=torch.uint8)
    for byte, shift in places:
        wanted[tile + block + byte] = (2**bits - 1) << shift
    assert torch.equal(cpu.pack(indices, bits), wanted)


def test_the_last_codes_of_3_bits_are_spread():
    indices = torch.zeros(4, 512, dtype=torch.uint8)
    indices[0, 128 + 16 * 2] = 0b101  # lane 0, byte 0: c6 is A's bit 4 - so B's bit 6 - over C's two
    indices[0, 128 + 16 * 3] = 0b110  # c7: B's bit 7 under A's two
    packed = cpu.pack(indices, 3)
    assert packed[:192].nonzero().flatten().tolist() == [0, 64, 128]
    assert [packed[k].item() for k in (0, 64, 128)] == [0b11 << 6, 0b01 << 6, 0b01 << 6]


@pytest.mark.parametrize(("bits", "stored"), [(4, 4), (3, 3), (2, 2), (8, 8)])
def test_packed_size(bits, stored):
    assert cpu.packed_bytes(64, 4096, bits) == 64 * 4096 * stored // 8


def test_stored_weights_survive_the_packed_layout():
    """Checkpoints hold the canonical bit stream; the packed layout is made from it and taken back to it."""
    from trapetum import formats, ops

    for bits in cpu.BITS:
        indices, codebook, x, _ = make(9, 700, bits)
        stored = formats.pack(indices, codebook, bits)
        packed = ops.to_layout(stored, "cpu")
        assert torch.equal(ops.from_layout(packed, codebook, 700, bits).codes, stored.codes)
        y = ops.codebook_gemv(x, packed, codebook, None, 700, bits)
        assert_close(y, indices, codebook, x, None, "int16" if bits < 8 else "exact")


@pytest.mark.parametrize("path", PATHS)
def test_read_sum(path):
    buffer = torch.randint(-(2**62), 2**62, (100_003,), generator=torch.Generator().manual_seed(1))
    wanted = sum(buffer.tolist()) % 2**64
    assert all(cpu.read_sum(buffer, threads, path) == wanted for threads in (1, 2))
    assert all(sample > 0 for sample in cpu.read_bandwidth(1 << 20, repeats=2))


def _valid():
    indices, codebook, x, bias = make(6, 40, 4)
    return {
        "x": x,
        "packed": cpu.pack(indices),
        "codebook": codebook,
        "in_features": 40,
        "bits": 4,
        "bias": bias,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(41)}, r"one row of 40 float32.*\[41\]"),
        ({"x": torch.zeros(40, dtype=torch.float64)}, "float64"),
        ({"x": torch.zeros(2, 40)}, r"\[2, 40\]"),
        ({"packed": torch.zeros(7, dtype=torch.uint8)}, r"\[6, 40\] weight must be 512 uint8.*they are 7"),
        ({"codebook": torch.zeros(6, 16)}, "float16.*float32"),
        ({"codebook": torch.zeros(6, 17).half()}, "17 codes a row; 4 bits allow 1 to 16"),
        ({"bits": 5}, "bits is 5"),
        ({"bias": torch.zeros(5)}, r"bias must be float32 \[6\].*\[5\]"),
        ({"out": torch.zeros(6, dtype=torch.float16)}, r"out must be float32 \[6\].*float16"),
        ({"out": torch.zeros(12)[::2]}, "out must be contiguous"),
        ({"arithmetic": "int4"}, "arithmetic is 'int4'; it is one of int16, exact, int8"),
        ({"arithmetic": "int8", "exact": True}, "exact=True asks for fp32 arithmetic and arithmetic='int8'"),
        ({"path": "sse9"}, "path=sse9 is unknown; it is one of neon, avx512vnni"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        cpu.gemv(**(_valid() | change))


@pytest.mark.parametrize(
    ("indices", "bits", "message"),
    [
        (torch.zeros(4, dtype=torch.uint8), 4, r"uint8 \[4\]"),
        (torch.zeros(4, 4), 4, "float32"),
        (torch.zeros(0, 4, dtype=torch.uint8), 4, r"non-empty.*\[0, 4\]"),
        (torch.full((4, 4), 8, dtype=torch.uint8), 3, "a code is 8, but 3-bit codes end at 7"),
        (torch.zeros(4, 4, dtype=torch.uint8), 6, "bits is 6"),
    ],
)
def test_pack_refuses(indices, bits, message):
    with pytest.raises(ValueError, match=message):
        cpu.pack(indices, bits)


def test_dequantize_into_a_given_tensor():
    indices, codebook, _, _ = make(6, 200, 4)
    out = torch.full((6, 200), float("nan"), dtype=torch.float16)
    assert cpu.dequantize(cpu.pack(indices), codebook, 200, 4, torch.float16, out=out) is out
    assert torch.equal(out, codebook.gather(1, indices.long()))
    with pytest.raises(ValueError, match=r"contiguous torch.float32 \[6, 200\]; it is torch.float16"):
        cpu.dequantize(cpu.pack(indices), codebook, 200, 4, out=out)


def test_dequantize_refuses_other_dtypes():
    with pytest.raises(ValueError, match="torch.float64"):
        cpu.dequantize(**{k: v for k, v in _valid().items() if k not in ("x", "bias")}, dtype=torch.float64)


def _run(code, **environment):
    command = [sys.executable, "-c", "from trapetum import cpu; " + code]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.parametrize("path", PATHS)
def test_the_environment_forces_a_path(path):
    assert _run("print(cpu.active_path())", TRAPETUM_CPU_PATH=path).stdout.strip() == path


def test_the_environment_is_checked():
    done = _run("cpu.active_path()", TRAPETUM_CPU_PATH="sse9")
    assert done.returncode == 1 and "TRAPETUM_CPU_PATH=sse9 is unknown" in done.stderr
    foreign = next(path for path in cpu.PATHS if path not in cpu.paths())
    done = _run("cpu.active_path()", TRAPETUM_CPU_PATH=foreign)
    assert f"TRAPETUM_CPU_PATH={foreign} does not run on this machine" in done.stderr


def test_a_path_that_does_not_run_here(monkeypatch):
    monkeypatch.setattr(cpu, "paths", lambda: ["avx2", "portable"])
    cpu.path_number.cache_clear()
    with pytest.raises(ValueError, match="avx512vnni does not run on this machine; these do: avx2, portable"):
        cpu.path_number("avx512vnni")
    cpu.path_number.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch):
    def fail(name):
        raise build.BuildError("no C compiler was found.")

    caches = (cpu._load, cpu.active_path, cpu.path_number)
    monkeypatch.setattr(cpu, "compile_c", fail)
    monkeypatch.delenv("TRAPETUM_CPU_PATH", raising=False)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_without_a_compiler_torch_does_the_work(no_compiler):
    assert not cpu.available() and cpu.paths() == [] and cpu.active_path() == "torch"
    assert "no C compiler" in cpu.why_not() and "through torch" in cpu.why_not()
    for bits in cpu.BITS:
        indices, codebook, x, bias = make(700, 130, bits)
        packed = cpu.pack(indices, bits)
        y = cpu.gemv(x, packed, codebook, 130, bits, bias=bias)
        assert_close(y, indices, codebook, x, bias, "exact")
        weight = codebook.gather(1, indices.long()).float()
        assert torch.equal(cpu.dequantize(packed, codebook, 130, bits), weight)
    assert cpu.read_sum(torch.arange(10)) == 45
    with pytest.raises(ValueError, match="no C compiler"):
        cpu.gemv(**_valid(), path="avx2")
