"""The CUDA kernels: layouts and compilation anywhere, results against float64 on a GPU."""

import pytest
import torch

from trapetum import build, cuda, ops
from trapetum.formats import pack
from trapetum.gemv_plans import H100, Plan, Room, candidates, fits, memory, plan_for

# What each architecture offers: multiprocessors of a card, shared memory of a block and of a multiprocessor.
ROOMS = {
    "sm_75": Room(40, 64 * 1024, 64 * 1024),
    "sm_80": Room(108, 163 * 1024, 164 * 1024),
    "sm_86": Room(84, 99 * 1024, 100 * 1024),
    "sm_89": Room(128, 99 * 1024, 100 * 1024),
    "sm_90": H100,
    "sm_100": Room(148, 227 * 1024, 228 * 1024),
    "sm_120": Room(170, 99 * 1024, 100 * 1024),
}
ARCHES = tuple(ROOMS)
OTHERS = {
    "codebook_dequantize.cu": [(f"BITS={b}", f"WTYPE={t}") for b in (8, 4, 3, 2) for t in (0, 1, 2)],
    "read_bandwidth.cu": [()],
    "mma_formats.cu": [(f"FORMAT={f}",) for f in (8, 4, 1)],
}
ELSEWHERE = {
    "kmeans.cu",
    "additive_gemv.cu",
    "decode_attention.cu",
    "dense_decode.cu",
    "next_token.cu",
}  # compiled by the tests of their own


def gemv_variants(arch):
    """Defines of the GEMV at its default launch shapes: all dtypes and rows on sm_90, the ends of the range elsewhere."""
    few = [(0, 1)] if arch in ("sm_100", "sm_120") else [(0, 1), (0, 8), (2, 1)]
    cases = few + [(0, 2), (0, 4), (1, 1), (1, 4), (2, 8)] if arch == "sm_90" else few
    found = []
    for bits in (8, 4, 3, 2):
        for xtype, rows in cases:
            for shape in ((4096, 4096), (8192, 28672)):
                plan = plan_for(*shape, bits, rows * (2 if xtype == 2 else 1), ROOMS[arch])
                found.append((f"BITS={bits}", f"XTYPE={xtype}", f"ROWS={rows}", *plan.defines))
    return list(dict.fromkeys(found))


SCHEMES = [(8, 256), (8, 64), (4, 16), (3, 8), (2, 4)]
SHAPES = [(1, 1), (31, 33), (32, 32), (33, 127), (100, 1000), (768, 3072), (4096, 4096), (257, 11008)]
gpu = pytest.mark.gpu


def random_weight(out_features, in_features, bits, n_codes, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(n_codes, (out_features, in_features), generator=generator, dtype=torch.uint8)
    codebook = torch.randn(out_features, n_codes, generator=generator).half()
    return pack(indices.to(device), codebook.to(device), bits)


def test_every_source_is_listed():
    assert {p.name for p in build.KERNELS.glob("*.cu")} - ELSEWHERE == {cuda.SOURCE, *OTHERS}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("source", [cuda.SOURCE, *OTHERS])
def test_compiles_without_spills(source, arch):
    pytest.importorskip("cuda.bindings.nvrtc")
    if (source, arch) == ("mma_formats.cu", "sm_75"):
        pytest.skip("the integer formats compared there begin with sm_80")
    for defines in OTHERS.get(source) or gemv_variants(arch):
        resources = build.compile_cuda(source, arch, defines).resources()
        assert resources, f"{source} {defines} has no kernel in the assembler's report"
        for name, used in resources.items():
            assert used.spill_bytes == 0, f"{name} {defines} on {arch} spills {used.spill_bytes} bytes"
            assert 0 < used.registers <= 255


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


def as_mma(weights, x):
    """What `codebook_gemv.cu` asks of one m16n8k16 product, by the fragments of the PTX ISA.

    32 channels meet 2 x 4 inputs of x: `weights` [2 streams, 32 lanes, 4], `x` [2 streams, 4]; returns D [16, 8].
    """
    a, b = torch.zeros(16, 16, dtype=torch.float64), torch.zeros(16, 8, dtype=torch.float64)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for stream in range(2):
            for pair in range(2):
                for e in range(2):
                    a[g + 8 * stream, 2 * t + 8 * pair + e] = weights[stream, lane, 2 * pair + e]
        if g % 4 == t:  # the diagonal
            for pair in range(2):
                for e in range(2):
                    b[2 * t + 8 * pair + e, g] = x[g // 4, 2 * pair + e]
    return a @ b


def test_the_diagonal_of_b_keeps_the_lanes_of_a_quad_apart():
    weights, x = torch.randn(2, 32, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    d = as_mma(weights, x)
    for lane in range(32):
        g, slot = divmod(lane, 4)
        for stream in range(2):
            for half in range(2):  # columns 4 to 7 carry the second row of x, or the other half of the inputs
                got = d[g + 8 * stream, slot + 4 * half]
                torch.testing.assert_close(got, weights[stream, lane] @ x[half])


@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_every_product_has_a_launch_shape_that_fits(bits, room):
    for in_features in (1, 127, 4096, 28672, 200_000):
        for out_features in (1, 4096, 28672):
            for staged in (1, 2, 3, 8, 16):
                plan = plan_for(in_features, out_features, bits, staged, room)
                panel, shared = memory(plan, in_features, bits, staged, room.a_block)
                assert 1 <= panel <= plan.rounds(in_features, bits) and shared <= room.a_block
                assert plan.blocks == 1 or fits(plan, in_features, bits, staged, room)
                assert plan.stride == 256 or plan.channels == 32


def test_candidates_fit_and_leave_out_the_default():
    for bits in (8, 4, 3, 2):
        found = candidates(4096, 12288, bits)
        assert len(found) == len(set(found)) > 5 and plan_for(4096, 12288, bits) not in found
        assert all(memory(plan, 4096, bits, 1, H100.a_block)[0] for plan in found)


ODD_PLANS = (Plan(1, 1), Plan(3, 2), Plan(16, 3), Plan(4, 2, channels=64), Plan(8, 1, 2, stride=128))


def check_gemv(weight, x, dtype, plan=None, residual=None, bias=None):
    """The product against float64, in an output that held NaN: error at most twice that of F.linear in fp16."""
    codes = ops.to_layout(weight, "cuda")
    exact = x.double() @ weight.dequantize(torch.float64).T
    exact += 0 if bias is None else bias.double()
    exact += 0 if residual is None else residual.double()
    plain = torch.nn.functional.linear(x.half(), weight.dequantize(torch.float16))
    plain = plain + (0 if bias is None else bias.half()) + (0 if residual is None else residual.half())
    y = torch.full_like(exact, float("nan"), dtype=dtype)
    cuda.gemv(
        x, codes, weight.codebook, weight.in_features, weight.bits, bias, y, plan=plan, residual=residual
    )
    what = f"{weight.out_features}x{weight.in_features}, {len(x)} rows, {plan}"
    assert torch.isfinite(y).all(), f"{what}: an output was not written"
    coarse = 2**-8 if dtype == torch.bfloat16 else 0  # half a unit in the last place of what is written
    allowed = 2 * relative_error(plain, exact) + coarse
    assert relative_error(y, exact) <= allowed, what


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "n_codes"), SCHEMES)
def test_gemv_matches_float64(bits, n_codes, dtype):
    for out_features, in_features in SHAPES:
        weight = random_weight(out_features, in_features, bits, n_codes, device="cuda")
        bias = torch.randn(out_features, device="cuda").to(dtype)
        x = torch.randn(1, in_features, device="cuda").to(dtype)
        residual = torch.randn(1, out_features, device="cuda").to(dtype)
        for plan in (None, *ODD_PLANS):
            check_gemv(weight, x, dtype, plan, residual, bias)


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [2, 3, 5, 8])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_several_rows_match_float64(bits, rows, dtype):
    for out_features, in_features in [(33, 127), (100, 1000), (5000, 4096), (257, 11008)]:
        weight = random_weight(out_features, in_features, bits, 2**bits, device="cuda")
        x = torch.randn(rows, in_features, device="cuda").to(dtype)
        residual = torch.randn(rows, out_features, device="cuda").to(dtype)
        for plan in (None, Plan(4, 2, channels=64)):
            check_gemv(weight, x, dtype, plan, residual)


@gpu
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_gemv_with_outliers_and_zeros(bits, dtype, rows):
    weight = random_weight(300, 4096, bits, 2**bits, device="cuda")
    x = torch.randn(rows, 4096, device="cuda")
    x[:, ::513] *= 1e3
    check_gemv(weight, x.to(dtype), dtype)
    codes = ops.to_layout(weight, "cuda")
    zero = cuda.gemv(torch.zeros_like(x).to(dtype), codes, weight.codebook, 4096, bits)
    assert torch.equal(zero, torch.zeros_like(zero))


@gpu
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_x_longer_than_shared_memory_is_staged_in_panels(bits):
    weight = random_weight(40, 200_000, bits, 2**bits, device="cuda")
    check_gemv(weight, torch.randn(3, 200_000, device="cuda").half(), torch.float16)


@gpu
def test_too_many_rows_are_refused():
    weight = random_weight(64, 256, 4, 16, device="cuda")
    with pytest.raises(ValueError, match="1 to 8 rows of x, not 9"):
        cuda.gemv(torch.zeros(9, 256, device="cuda"), ops.to_layout(weight, "cuda"), weight.codebook, 256, 4)


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
