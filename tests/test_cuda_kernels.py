"""The CUDA kernels: layouts and compilation anywhere, results against float64 on a GPU."""

import pytest
import torch

from trapetum import build, cuda, ops
from trapetum.formats import pack

ARCHES = ("sm_80", "sm_86", "sm_89", "sm_90")
VARIANTS = {
    "codebook_gemv.cu": [
        (f"BITS={b}", f"XTYPE={t}", *cuda.plan_for(out, b, 132).defines)
        for b in (8, 4, 3, 2)
        for t in (0, 1, 2)
        for out in (4096, 28672)
    ],
    "codebook_dequantize.cu": [(f"BITS={b}", f"WTYPE={t}") for b in (8, 4, 3, 2) for t in (0, 1, 2)],
    "read_bandwidth.cu": [()],
    "mma_formats.cu": [(f"FORMAT={f}",) for f in (8, 4, 1)],
}
SCHEMES = [(8, 256), (8, 64), (4, 16), (3, 8), (2, 4)]
SHAPES = [(1, 1), (31, 33), (32, 32), (33, 127), (100, 1000), (768, 3072), (4096, 4096), (257, 11008)]
gpu = pytest.mark.gpu


def random_weight(out_features, in_features, bits, n_codes, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(n_codes, (out_features, in_features), generator=generator, dtype=torch.uint8)
    codebook = torch.randn(out_features, n_codes, generator=generator).half()
    return pack(indices.to(device), codebook.to(device), bits)


@pytest.mark.parametrize("source", VARIANTS)
def test_every_source_and_variant_is_listed(source):
    assert {p.name for p in build.KERNELS.glob("*.cu")} - {"kmeans.cu"} == set(VARIANTS)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("source", VARIANTS)
def test_compiles_without_spills(source, arch):
    pytest.importorskip("cuda.bindings.nvrtc")
    for defines in VARIANTS[source]:
        resources = build.compile_cuda(source, arch, defines).resources()
        assert resources, f"{source} {defines} has no kernel in the assembler's report"
        for name, used in resources.items():
            assert used.spill_bytes == 0, f"{name} {defines} on {arch} spills {used.spill_bytes} bytes"
            assert 0 < used.registers <= 128


def test_unknown_source_is_one_sentence():
    with pytest.raises(build.BuildError, match="no kernel source named 'nothing.cu'"):
        build.compile_cuda("nothing.cu", "sm_90")


@pytest.mark.parametrize(("bits", "n_codes"), SCHEMES)
@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (64, 129), (100, 257)])
def test_layout_round_trip(shape, bits, n_codes):
    indices = torch.randint(n_codes, shape, dtype=torch.uint8)
    packed = cuda.pack(indices, bits)
    assert packed.is_contiguous() and packed.shape[-1] == 16
    assert packed.numel() % (512 * (3 if bits == 3 else 1)) == 0
    assert torch.equal(cuda.unpack(packed, *shape, bits), indices)


def test_layout_places_inputs_where_the_picture_says():
    indices = torch.arange(32, dtype=torch.uint8).repeat(32, 1) % 16
    packed = cuda.pack(indices, 4)
    first_bytes = packed[0, 0, 0, 5, :3].tolist()
    assert first_bytes == [0x10, 0x32, 0x54]


def relative_error(y, expected):
    return ((y.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "n_codes"), SCHEMES)
def test_gemv_matches_float64(bits, n_codes, dtype):
    """Error at most twice that of F.linear in fp16 (or x's own dtype where that is coarser), both against float64."""
    for out_features, in_features in SHAPES:
        weight = random_weight(out_features, in_features, bits, n_codes, device="cuda")
        bias = torch.randn(out_features, device="cuda", dtype=dtype)
        x = torch.randn(in_features, device="cuda").to(dtype)
        expected = ops.reference_gemv(x, weight, bias)
        compared = torch.float16 if dtype == torch.float32 else dtype
        dense = weight.dequantize(compared)
        plain = torch.nn.functional.linear(x.to(compared), dense, bias.to(compared))
        codes = ops.to_layout(weight, "cuda")
        for plan in (None, cuda.Plan(1, 1), cuda.Plan(3, 2), cuda.Plan(16, 3)):
            y = torch.full((out_features,), float("nan"), device="cuda", dtype=dtype)
            cuda.gemv(x, codes, weight.codebook, in_features, bits, bias, out=y, plan=plan)
            assert torch.isfinite(y).all(), f"{out_features}x{in_features}: an output was not written"
            one_ulp = 1e-3 if in_features < 64 else 5e-4
            allowed = 2 * relative_error(plain, expected) + one_ulp
            assert relative_error(y, expected) <= allowed, f"{out_features}x{in_features}, {plan}"


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_gemv_with_outliers_and_zeros(bits, dtype):
    weight = random_weight(300, 4096, bits, 2**bits, device="cuda")
    codes = ops.to_layout(weight, "cuda")
    x = torch.randn(4096, device="cuda")
    x[::513] *= 1e3
    x = x.to(dtype)
    expected = ops.reference_gemv(x, weight)
    dense = weight.dequantize(torch.float16 if dtype == torch.float32 else dtype)
    plain = torch.nn.functional.linear(x.to(dense.dtype), dense)
    y = cuda.gemv(x, codes, weight.codebook, 4096, bits)
    assert relative_error(y, expected) <= 2 * relative_error(plain, expected) + 5e-4
    zero = cuda.gemv(torch.zeros_like(x), codes, weight.codebook, 4096, bits)
    assert torch.equal(zero, torch.zeros_like(zero))


@gpu
def test_gemv_is_bit_identical_and_pdl_changes_nothing():
    weight = random_weight(4096, 4096, 4, 16, device="cuda")
    codes = ops.to_layout(weight, "cuda")
    x = torch.randn(4096, device="cuda").half()
    torch.cuda.synchronize()
    first = cuda.gemv(x, codes, weight.codebook, 4096, 4)
    for pdl in (False, True) * 5:
        assert torch.equal(first, cuda.gemv(x, codes, weight.codebook, 4096, 4, pdl=pdl))


@gpu
def test_gemv_chain_in_a_graph_with_pdl_waits_for_its_input():
    """Each product feeds the next: a launch that did not wait would read a stale vector."""
    weights = [random_weight(2048, 2048, 4, 16, seed=s, device="cuda") for s in range(8)]
    codes = [ops.to_layout(w, "cuda") for w in weights]
    x = torch.randn(2048, device="cuda").half()

    def chain(pdl):
        y = x
        for w, c in zip(weights, codes, strict=True):
            y = cuda.gemv(y, c, w.codebook, 2048, 4, pdl=pdl) * 0.02
        return y

    expected = chain(False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(True)
    for _ in range(20):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, expected)


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "n_codes"), SCHEMES)
@pytest.mark.parametrize("variant", ["naive", "tiled"])
def test_dequantize_is_exact(variant, bits, n_codes, dtype):
    for out_features, in_features in [(1, 1), (31, 33), (100, 1000), (768, 3072)]:
        weight = random_weight(out_features, in_features, bits, n_codes, device="cuda")
        codes = ops.to_layout(weight, "cuda")
        dense = torch.full((out_features, in_features), float("nan"), device="cuda", dtype=dtype)
        cuda.dequantize(codes, weight.codebook, in_features, bits, dtype, variant, out=dense)
        assert torch.equal(dense, weight.dequantize(dtype))


@gpu
def test_shape_too_wide_for_shared_memory_takes_the_dense_path():
    assert not cuda.fits(200_000, 4)
    weight = random_weight(40, 200_000, 4, 16, device="cuda")
    x = torch.randn(200_000, device="cuda").half()
    y = ops.codebook_gemv(x, ops.to_layout(weight, "cuda"), weight.codebook, None, 200_000, 4)
    assert relative_error(y, ops.reference_gemv(x, weight)) < 2e-3
