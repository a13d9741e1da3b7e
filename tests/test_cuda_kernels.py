"""The CUDA kernels: layouts and compilation anywhere, results against float64 on a GPU."""

import pytest
import torch
from torch.nn import functional as F

from trapetum import build, cuda, disassembly, ops
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
    "coordinate_descent.cu",
    "kmeans.cu",
    "additive_gemv.cu",
    "decode_attention.cu",
    "dense_decode.cu",
    "next_token.cu",
    "persistent_floor.cu",
    "sparse_gemv.cu",
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


# What a decode step asks of the GEMV: macros, inputs and outputs as in a 7B model.
FUSED = {
    "qkv": (("NORM=1", "LATE=1"), 4096, 12288),
    "out": (("LATE=1",), 4096, 4096),
    "gate and up": (("NORM=1", "SILU=1", "LATE=1"), 4096, 22016),
    "down": (("PAIRED=1", "LATE=1"), 11008, 4096),
}


def fused_variants(arch):
    """Defines of these products at their default launch shapes: more bits, rows and dtypes on sm_90 than elsewhere."""
    both, cases = ("gate and up", "down"), [(4, 0, 1, FUSED), (4, 0, 8, ("gate and up",))]
    if arch == "sm_90":
        more = [(8, 0, 1), (3, 0, 1), (2, 0, 1), (4, 0, 2), (4, 0, 4), (3, 0, 2), (4, 1, 1), (4, 1, 3)]
        cases += [(*case, both) for case in more]
    for bits, xtype, rows, products in cases:
        for macros, inputs, outputs in (FUSED[product] for product in products):
            plan = plan_for(inputs, outputs, bits, rows, ROOMS[arch])
            yield (f"BITS={bits}", f"XTYPE={xtype}", f"ROWS={rows}", *plan.defines, *macros)


def spills_allowed(defines):
    """Two rows with a norm do not quite fit the 64 registers of two blocks of 16 warps; drafts are three or none."""
    return 96 if {"ROWS=2", "NORM=1"} <= set(defines) else 0


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


@pytest.mark.parametrize("arch", ARCHES)
def test_products_of_a_decode_step_compile(arch):
    pytest.importorskip("cuda.bindings.nvrtc")
    for defines in fused_variants(arch):
        used = build.compile_cuda(cuda.SOURCE, arch, defines).resources()["codebook_gemv"]
        assert used.spill_bytes <= spills_allowed(defines), (
            f"{defines}, {arch}: {used.spill_bytes} bytes spilled"
        )
        assert 0 < used.registers <= 255


@pytest.mark.parametrize("macros", [("NORM=1",), ("SILU=1",), ("PAIRED=1",)])
def test_what_a_step_adds_is_not_made_for_float32(macros):
    pytest.importorskip("cuda.bindings.nvrtc")
    with pytest.raises(build.BuildError, match="works on 16-bit x"):
        build.compile_cuda(cuda.SOURCE, "sm_90", ("BITS=4", "XTYPE=2", *macros))


def test_a_norm_and_two_factors_exclude_each_other():
    pytest.importorskip("cuda.bindings.nvrtc")
    with pytest.raises(build.BuildError, match="normalised or has two factors"):
        build.compile_cuda(cuda.SOURCE, "sm_90", ("BITS=4", "XTYPE=0", "NORM=1", "PAIRED=1"))


@pytest.mark.skipif(bool(disassembly.why_not()), reason=disassembly.why_not() or "it is here")
@pytest.mark.parametrize("product", FUSED)
def test_weights_are_loaded_before_the_wait_and_late_products_let_the_next_start_after_it(product):
    pytest.importorskip("cuda.bindings.nvrtc")
    macros, inputs, outputs = FUSED[product]
    plan = plan_for(inputs, outputs, 4)
    for late in (True, False):
        chosen = [m for m in macros if late or m != "LATE=1"]
        defines = ("BITS=4", "XTYPE=0", "ROWS=1", *plan.defines, *chosen)
        cubin = build.compile_cuda(cuda.SOURCE, "sm_90", defines)
        code = [i.opcode for i in disassembly.parse(disassembly.text_of(cubin.path))["codebook_gemv"]]
        wait, allow = code.index("ACQBULK"), code.index("PREEXIT")
        assert (wait < allow) == late
        loads = [at for at, name in enumerate(code) if name.startswith("LDG.") and ".128" in name]
        assert sum(at < wait for at in loads) >= plan.ahead


HALF = {"dtype": torch.float16}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(x=torch.zeros(64)), "a norm takes float16 or bfloat16 .* not 64 inputs in torch.float32"),
        (dict(x=torch.zeros(68, **HALF), inputs=68), "a multiple of 8 inputs .* not 68"),
        (dict(x=torch.zeros(65, **HALF)[1:]), "at a multiple of 16 bytes"),
        (dict(norm=torch.ones(63, **HALF)), r"torch.float16 \[64\] .* not torch.float16 \[63\]"),
        (dict(norm=torch.ones(1, 64, **HALF)), r"not torch.float16 \[1, 64\]"),
        (dict(norm=torch.ones(64)), r"not torch.float32 \[64\]"),
        (dict(norm=torch.ones(65, **HALF)[1:]), "at a multiple of 16 bytes"),
        (dict(paired=True, x=torch.zeros(128, **HALF)), "for an x of one factor"),
        (dict(norm=None, paired=True, x=torch.zeros(128)), "two factors takes float16 or bfloat16"),
        (dict(norm=None, paired=True, x=torch.zeros(136, **HALF), inputs=68), "not 68 inputs"),
        (dict(norm=None, paired=True, x=torch.zeros(9, 128, **HALF)), "1 to 8 rows of x, not 9"),
        (dict(norm=None, paired=True, x=torch.zeros(64, **HALF)), "1 to 8 rows of x, not 0"),
    ],
)
def test_norms_and_factors_that_the_kernel_cannot_do_are_refused(change, words):
    asked = dict(x=torch.zeros(64, **HALF), norm=torch.ones(64, **HALF), inputs=64) | change
    x, inputs = asked.pop("x"), asked.pop("inputs")
    codes = cuda.pack(torch.zeros(32, inputs, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match=words) as refused:
        cuda.gemv(x, codes, torch.zeros(32, 16, **HALF), inputs, 4, plan=Plan(8, 1), **asked)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


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


# --- what a decode step adds to a product ----------------------------------------------------------------------------


def normalised(x, norm, eps):
    """RMSNorm as transformers rounds it."""
    wide = x.float()
    return norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def multiplied(x, norm=None, eps=0.0, paired=False):
    """What meets the weights, rounded as by transformers' modules."""
    if paired:
        return x.chunk(2, -1)[0] * x.chunk(2, -1)[1]
    return x if norm is None else normalised(x, norm, eps)


def finished(y, residual=None, silu=False):
    """SiLU on the gates and the residual, in y's dtype."""
    if silu:
        half = y.shape[-1] // 2
        y = torch.cat([F.silu(y[..., :half]), y[..., half:]], -1)
    return y if residual is None else y + residual.to(y.dtype)


def check_step_product(
    weight, x, plan=None, bias=None, residual=None, silu=False, pdl=False, late=False, **how
):
    """Against float64, in an output that held NaN: an error of at most twice plain fp16's and a rounding of the result's."""
    inputs = multiplied(x, **how)
    exact = inputs.double() @ weight.dequantize(torch.float64).T + (0 if bias is None else bias.double())
    plain = F.linear(inputs.half(), weight.dequantize(torch.float16), None if bias is None else bias.half())
    exact, plain = finished(exact, residual, silu), finished(plain, residual, silu)
    y = torch.full_like(exact, float("nan"), dtype=x.dtype)
    made = cuda.gemv(
        *(x, ops.to_layout(weight, "cuda"), weight.codebook, weight.in_features, weight.bits, bias, y),
        **dict(plan=plan, residual=residual, silu=silu, pdl=pdl, late=late, **how),
    )
    what = f"{weight.out_features}x{weight.in_features}, {list(x.shape)}, {plan}, silu {silu}, {sorted(how)}"
    assert made is y and torch.isfinite(y).all(), f"{what}: an output was not written"
    half_unit = torch.finfo(x.dtype).eps / 2
    allowed = 2 * relative_error(plain, exact) + half_unit * (
        3 if silu else 1
    )  # a gate is rounded before SiLU too
    assert relative_error(y, exact) <= allowed, what
    return y


STEP_SHAPES = [(1, 8), (33, 136), (34, 1000), (257, 4096), (100, 11008)]  # the last fills no panel to its end
ROWS_AND_DTYPES = [(r, torch.float16) for r in range(1, 9)] + [(r, torch.bfloat16) for r in (1, 3, 8)]


def step_operands(shape, bits, rows, dtype, paired=False):
    out_features, in_features = shape
    weight = random_weight(out_features, in_features, bits, 2**bits, device="cuda")
    weight.codebook.mul_(in_features**-0.5)  # results of about 1, where SiLU bends
    x = torch.randn(rows, in_features * (1 + paired), device="cuda").to(dtype)
    bias, residual = (
        torch.randn(*size, device="cuda").to(dtype) for size in ((out_features,), (rows, out_features))
    )
    return weight, x, bias, residual


@gpu
@pytest.mark.parametrize(("rows", "dtype"), ROWS_AND_DTYPES)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_norm_and_silu_match_float64(bits, rows, dtype):
    plan = plan_for(4096, 4096, bits, rows)  # one kernel for all shapes
    for shape in STEP_SHAPES:
        weight, x, bias, residual = step_operands(shape, bits, rows, dtype)
        x[:, ::97] *= 300  # as a residual stream has it
        how = dict(norm=(1 + torch.randn(shape[1], device="cuda")).to(dtype), eps=1e-5, plan=plan, silu=True)
        check_step_product(weight, x, **how)
        check_step_product(weight, x, bias=bias, **how)
        check_step_product(weight, x, bias=bias, residual=residual, **how)


@gpu
@pytest.mark.parametrize(("rows", "dtype"), ROWS_AND_DTYPES)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_two_factors_match_float64(bits, rows, dtype):
    plan = plan_for(4096, 4096, bits, rows)
    for shape in STEP_SHAPES:
        weight, x, bias, residual = step_operands(shape, bits, rows, dtype, paired=True)
        for extras in (dict(), dict(residual=residual), dict(bias=bias, residual=residual)):
            check_step_product(weight, x, plan=plan, paired=True, **extras)


@gpu
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_steps_of_one_row_at_every_launch_shape(bits):
    for plan in (None, *ODD_PLANS):
        for dtype in (torch.float16, torch.bfloat16):
            weight, x, bias, residual = step_operands((200, 1000), bits, 1, dtype)
            norm = torch.randn(1000, device="cuda").to(dtype)
            check_step_product(weight, x, plan, bias, residual, norm=norm, eps=1e-6)
            weight, x, bias, residual = step_operands((200, 1000), bits, 1, dtype, paired=True)
            check_step_product(weight, x, plan, bias, residual, paired=True)


@gpu
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_norms_and_factors_of_x_that_is_staged_in_panels(bits, rows):
    shape = (40, 200_000)
    weight, x, _, residual = step_operands(shape, bits, rows, torch.float16)
    norm = torch.randn(shape[1], device="cuda").half()
    check_step_product(weight, x, residual=residual, norm=norm, eps=1e-5)
    weight, x, _, residual = step_operands(shape, bits, rows, torch.float16, paired=True)
    check_step_product(weight, x, residual=residual, paired=True)


@gpu
@pytest.mark.parametrize("eps", [1e-6, 1e-2, 2.0])
def test_eps_and_rows_of_zeros(eps):
    weight, x, _, _ = step_operands((64, 256), 4, 4, torch.float16)
    x *= torch.tensor([0.0, 1e-3, 1.0, 100.0], device="cuda").half()[:, None]
    norm = torch.randn(256, device="cuda").half()
    y = check_step_product(weight, x, norm=norm, eps=eps)
    assert torch.equal(y[0], torch.zeros_like(y[0]))
    for row in range(4):  # each row has a norm of its own
        check_step_product(weight, x[row : row + 1], norm=norm, eps=eps)


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_an_mlp_of_two_products(bits, rows, dtype):
    """norm, gate and up, SiLU, their product, down, + x: what transformers' modules make of the same weights."""
    hidden, inner = 256, 704
    gate_up, x, _, _ = step_operands((2 * inner, hidden), bits, rows, dtype)
    down, _, _, _ = step_operands((hidden, inner), bits, rows, dtype)
    norm = (1 + 0.1 * torch.randn(hidden, device="cuda")).to(dtype)
    between = cuda.gemv(
        x, ops.to_layout(gate_up, "cuda"), gate_up.codebook, hidden, bits, norm=norm, eps=1e-5, silu=True
    )
    y = cuda.gemv(
        between, ops.to_layout(down, "cuda"), down.codebook, inner, bits, residual=x, paired=True, late=True
    )

    def mlp(x, weights, norm):
        gate, up = F.linear(normalised(x, norm, 1e-5), weights[0]).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, weights[1])

    exact = mlp(x.double(), [w.dequantize(torch.float64) for w in (gate_up, down)], norm.double())
    plain = mlp(x, [w.dequantize(dtype) for w in (gate_up, down)], norm)
    assert between.shape == (rows, 2 * inner) and torch.isfinite(y).all()
    assert relative_error(y, exact) <= 2 * relative_error(plain, exact)


@gpu
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_products_of_a_step_are_the_same_bits_however_they_are_launched(bits):
    weight, x, bias, residual = step_operands((2048, 2048), bits, 2, torch.float16)
    codes, norm = ops.to_layout(weight, "cuda"), torch.randn(2048, device="cuda").half()
    pair = torch.randn(2, 4096, device="cuda").half()
    for given, how in (
        (x, dict(norm=norm, eps=1e-5)),
        (x, dict(norm=norm, eps=1e-5, silu=True)),
        (pair, dict(paired=True, residual=residual)),
    ):
        torch.cuda.synchronize()
        first = cuda.gemv(given, codes, weight.codebook, 2048, bits, bias, **how)
        for late in (False, True):
            for pdl in (False, True) * 3:
                again = cuda.gemv(given, codes, weight.codebook, 2048, bits, bias, pdl=pdl, late=late, **how)
                assert torch.equal(first, again), (sorted(how), late, pdl)


@gpu
@pytest.mark.parametrize("late", [False, True])
def test_a_residual_stream_in_a_graph_with_pdl_waits_for_its_inputs(late):
    """Each product normalises the one before it and adds the one before that: nothing stale may be read."""
    weights = [step_operands((1024, 1024), 4, 1, torch.float16)[0] for _ in range(8)]
    codes = [ops.to_layout(w, "cuda") for w in weights]
    x, norm = torch.randn(1, 1024, device="cuda").half(), torch.ones(1024, device="cuda").half()
    streams = [torch.empty_like(x) for _ in weights]

    def chain(pdl):
        before, now = x, x
        for w, c, out in zip(weights, codes, streams, strict=True):
            how = dict(norm=norm, eps=1e-5, residual=before, pdl=pdl, late=late)
            before, now = now, cuda.gemv(now, c, w.codebook, 1024, 4, out=out, **how)

    chain(False)
    torch.cuda.synchronize()
    expected = [stream.clone() for stream in streams]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(True)
    for _ in range(20):
        for stream in streams:
            stream.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(streams, expected, strict=True))


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
