"""The dense product of a decode step: fragments, launch shapes, compilation and refusals anywhere, results on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from trapetum import build, cuda, cuda_dense, disassembly
from trapetum.cuda_dense import Plan, candidates, fits, memory, plan_for
from trapetum.gemv_plans import H100, Room

gpu = pytest.mark.gpu
ROOMS = {
    "sm_75": Room(40, 64 * 1024, 64 * 1024),
    "sm_80": Room(108, 163 * 1024, 164 * 1024),
    "sm_86": Room(84, 99 * 1024, 100 * 1024),
    "sm_89": Room(128, 99 * 1024, 100 * 1024),
    "sm_90": H100,
}
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (768, 256), (257, 33), (1, 1), (9, 72), (40, 1000)]
ODD_PLANS = (
    Plan(1, 1),
    Plan(3, 2, 1, 1, 1),
    Plan(8, 4, 2, 1, 2),
    Plan(16, 2, 1, 2, 2),
    Plan(4, 2, tensor=False),
)
DTYPES = [torch.float16, torch.bfloat16]


# --- anywhere ------------------------------------------------------------------------------------------------------


def as_mma(x, weight):
    """D [16, 8] of two m16n8k16 products whose lanes hold `dense_decode.cu`'s chunks, by the fragments of the PTX ISA.

    `x` [8 rows, 32 inputs] is A with rows 8 to 15 zero, `weight` [8 rows, 32 inputs] is B.
    """
    d = torch.zeros(16, 8, dtype=torch.float64)
    for product in range(2):
        a, b = torch.zeros(16, 16, dtype=torch.float64), torch.zeros(16, 8, dtype=torch.float64)
        for lane in range(32):
            group, slot = divmod(lane, 4)
            for word in range(2):  # of the lane's four: two a product
                for e in range(2):
                    i = 8 * slot + 2 * (2 * product + word) + e
                    a[group, 2 * slot + 8 * word + e] = x[group, i]
                    b[2 * slot + 8 * word + e, group] = weight[group, i]
        d += a @ b
    return d


def test_chunks_of_a_lane_are_fragments_of_an_mma():
    x, weight = torch.randn(8, 32, dtype=torch.float64), torch.randn(8, 32, dtype=torch.float64)
    d = as_mma(x, weight)
    torch.testing.assert_close(d[:8], x @ weight.T)
    assert not d[8:].any()


@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
def test_every_product_has_a_launch_shape_that_fits(room):
    for in_features in (1, 33, 256, 768, 4096, 28672, 200_000):
        for rows in range(1, 9):
            for norm, aligned, tensor in ((0, 1, 1), (1, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 0)):
                plan = plan_for(in_features, 4096, rows, norm, room, aligned, tensor)
                panel, shared = memory(plan, in_features, rows, norm, room.a_block)
                assert 1 <= panel <= plan.rounds(in_features) and shared <= room.a_block
                assert plan.blocks == 1 or fits(plan, in_features, rows, norm, room)
                assert plan.tensor == bool(tensor)


@pytest.mark.parametrize("in_features", [4096, 8192, 11008])
def test_the_default_has_enough_bytes_in_flight(in_features):
    for rows in (1, 2, 4):
        plan = plan_for(in_features, 4096, rows, True)
        assert 32 * 1024 <= plan.bytes_in_flight <= 128 * 1024
    assert Plan(8, 4, 1, 2).bytes_in_flight == 2 * 8 * 4 * 8 * 128  # blocks, warps, steps, rows, a line each


def test_shared_memory_is_what_the_kernel_adds_up():
    """By hand: 2 rounds of 64 * 8 * 4 values for a row and the norm, padding, two sets of sums, scratch and rstd."""
    assert memory(Plan(8, 4), 4096, 1, True, 1 << 20) == (2, 2 * 2 * (4096 + 32) + 8 * 8 * 8 + 4 * 9)
    assert memory(Plan(8, 4), 4096, 1, True, 4096)[0] == 0


def test_tiles_cover_the_outputs_and_gates_take_half():
    assert [Plan(8, 4, n).tiles(4097, False) for n in (1, 2, 4)] == [513, 257, 129]
    assert Plan(8, 4).tiles(11008, True) == 2752


def test_candidates_fit_and_leave_out_the_default():
    for rows in (1, 8):
        found = candidates(4096, 12288, rows, True)
        assert len(found) == len(set(found)) > 5 and plan_for(4096, 12288, rows, True) not in found
        assert all(fits(plan, 4096, rows, True, H100) for plan in found)


def variants(arch):
    """Defines at the default launch shapes: more dtypes, rows and lengths on sm_90 than elsewhere."""
    cases = [(0, 1, 1), (1, 8, 1), (1, 8, 0)] + ([(0, 4, 1), (0, 8, 1), (0, 1, 0)] if arch == "sm_90" else [])
    found = []
    for xtype, rows, aligned in cases:
        tensor = xtype == 0 or arch != "sm_75"
        for in_features in (4096, 200_000) if arch == "sm_90" and aligned else (4096,):
            plan = plan_for(in_features, 4096, rows, True, ROOMS[arch], bool(aligned), tensor)
            what = (
                f"XTYPE={xtype}",
                f"ROWS={rows}",
                f"GATED={int(in_features == 4096)}",
                f"ALIGNED={aligned}",
            )
            found.append((*what, *plan.defines))
    return list(dict.fromkeys(found))


def resources(arch, defines):
    pytest.importorskip("cuda.bindings.nvrtc")
    return build.compile_cuda(cuda_dense.SOURCE, arch, defines).resources()["dense_decode"]


@pytest.mark.parametrize("arch", ROOMS)
def test_compiles_without_spills(arch):
    for defines in variants(arch):
        used = resources(arch, defines)
        assert used.spill_bytes == 0, f"{defines} on {arch} spills {used.spill_bytes} bytes"
        assert 0 < used.registers <= 255


def test_candidates_compile_without_spills():
    for plan in candidates(4096, 4096, 8):
        defines = ("XTYPE=0", "ROWS=8", "GATED=0", "ALIGNED=1", *plan.defines)
        assert resources("sm_90", defines).spill_bytes == 0, defines


@pytest.mark.skipif(bool(disassembly.why_not()), reason=disassembly.why_not() or "it is here")
@pytest.mark.parametrize("rows", [1, 8])
def test_the_first_weights_are_loaded_before_the_wait_and_the_next_kernel_allowed_after_it(rows):
    pytest.importorskip("cuda.bindings.nvrtc")
    plan = plan_for(4096, 4096, rows)
    cubin = build.compile_cuda(
        cuda_dense.SOURCE, "sm_90", ("XTYPE=0", f"ROWS={rows}", "GATED=0", "ALIGNED=1", *plan.defines)
    )
    code = [i.opcode for i in disassembly.parse(disassembly.text_of(cubin.path))["dense_decode"]]
    wait, allow = code.index("ACQBULK"), code.index("PREEXIT")
    loads = [at for at, name in enumerate(code) if name.startswith("LDG.") and ".128" in name]
    assert sum(at < wait for at in loads) == 2 * plan.ahead * plan.octets
    assert wait < allow


def test_bf16_on_tensor_cores_is_refused_where_there_are_none():
    pytest.importorskip("cuda.bindings.nvrtc")
    with pytest.raises(build.BuildError, match="bf16 on tensor cores begins with sm_80"):
        build.compile_cuda(cuda_dense.SOURCE, "sm_75", ("XTYPE=1", "TENSOR=1"))


HALF = {"dtype": torch.float16}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(16)}, TypeError, "float16 or bfloat16 x .* not torch.float32 and torch.float16"),
        ({"weight": torch.zeros(6, 16).bfloat16()}, TypeError, "the same dtype"),
        ({"weight": torch.zeros(96, **HALF)}, ValueError, r"the weight must be .* not \[96\]"),
        ({"weight": torch.zeros(16, 6, **HALF).T}, ValueError, r"the weight must be a contiguous.*\[1, 6\]"),
        ({"x": torch.zeros(15, **HALF)}, ValueError, r"x must be a contiguous \[16\] or .* not \[15\]"),
        ({"x": torch.zeros(16, 2, **HALF).T}, ValueError, r"x must be a contiguous .*strides \[1, 2\]"),
        ({"x": torch.zeros(9, 16, **HALF)}, ValueError, "1 to 8 rows of x, not 9"),
        ({"x": torch.zeros(0, 16, **HALF)}, ValueError, "1 to 8 rows of x, not 0"),
        ({"weight": torch.zeros(7, 16, **HALF), "gated": True}, ValueError, "as many ups as gates, not 7"),
        ({"bias": torch.zeros(5, **HALF)}, ValueError, r"bias must be a contiguous torch.float16 \[6\]"),
        ({"norm": torch.zeros(16)}, ValueError, r"norm must be .*float16 \[16\], not torch.float32"),
        ({"residual": torch.zeros(6, **HALF), "gated": True}, ValueError, r"residual must be .* \[3\]"),
        ({"residual": torch.zeros(1, 6, **HALF)}, ValueError, r"residual must be .* \[6\], not .* \[1, 6\]"),
        ({"out": torch.zeros(12, **HALF)[::2]}, ValueError, r"out must be a contiguous .*strides \[2\]"),
        ({"norm": torch.zeros(16, device="meta", **HALF)}, ValueError, "norm is on meta and x on cpu; move"),
        ({}, ValueError, "x is on cpu, but this product runs on a CUDA device; move it there"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(change, error, message):
    given = {"x": torch.zeros(16, **HALF), "weight": torch.zeros(6, 16, **HALF)} | change
    with pytest.raises(error, match=message) as raised:
        cuda_dense.gemv(**given)
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


# --- on a GPU ------------------------------------------------------------------------------------------------------


def random_product(out_features, in_features, rows, dtype, gated=False):
    """x, weight, bias, residual and norm on the GPU; the weight is scaled so that results are about 1."""
    weight_rows = out_features * (2 if gated else 1)
    made = {"x": (rows, in_features), "weight": (weight_rows, in_features), "bias": (weight_rows,)}
    made |= {"residual": (rows, out_features), "norm": (in_features,)}
    drawn = {name: torch.randn(shape, device="cuda") for name, shape in made.items()}
    drawn["weight"] *= in_features**-0.5
    return {name: value.to(dtype) for name, value in drawn.items()}


def normalised(x, norm, eps):
    """RMSNorm as transformers rounds it."""
    wide = x.float()
    return norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def exact_product(x, weight, bias=None, residual=None, norm=None, eps=0.0, gated=False):
    """In float64 from the rounded x: what the kernel is to come close to."""
    x = normalised(x, norm, eps) if norm is not None else x
    y = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    if gated:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y + (0 if residual is None else residual.double())


def plain_product(x, weight, bias=None, residual=None, norm=None, eps=0.0, gated=False):
    """As transformers' modules do it, every step in x's dtype."""
    y = F.linear(normalised(x, norm, eps) if norm is not None else x, weight, bias)
    if gated:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual


def relative_error(y, expected):
    return ((y.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def check(x, weight, plan=None, pdl=False, **extras):
    """Against float64, in an output that held NaN: an error of at most twice that of PyTorch's own modules."""
    exact, plain = exact_product(x, weight, **extras), plain_product(x, weight, **extras)
    y = torch.full_like(plain, float("nan"))
    assert cuda_dense.gemv(x, weight, out=y, plan=plan, pdl=pdl, **extras) is y
    what = f"{list(weight.shape)}, {list(x.shape)}, {plan}, {sorted(extras)}"
    assert torch.isfinite(y).all(), f"{what}: an output was not written"
    half_unit = (
        torch.finfo(x.dtype).eps / 2
    )  # what a rounding costs at most: of the result, and of the gates' way to it
    allowed = 2 * relative_error(plain, exact) + half_unit * (4 if extras.get("gated") else 1)
    assert relative_error(y, exact) <= allowed, what
    return y


def extras_of(made, *names):
    return {name: made[name] for name in names} | ({"eps": 1e-5} if "norm" in names else {})


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
def test_plain_products_match_float64(rows, dtype):
    for shape in SHAPES:
        made = random_product(*shape, rows, dtype)
        for plan in (None, *ODD_PLANS):
            check(made["x"], made["weight"], plan)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("gated", [False, True])
def test_fused_products_match_float64(gated, rows, dtype):
    for shape in SHAPES:
        made = random_product(*shape, rows, dtype, gated)
        for names in (("norm",), ("bias",), ("residual",), (), ("bias", "norm", "residual")):
            extras = extras_of(made, *names) | {"gated": gated}
            for plan in (None, Plan(3, 2, 2, 1, 1), Plan(4, 2, tensor=False)):
                check(made["x"], made["weight"], plan, **extras)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vocabulary_matches_float64(dtype):
    made = random_product(32000, 4096, 1, dtype)
    check(made["x"], made["weight"], **extras_of(made, "norm"))


@gpu
@pytest.mark.parametrize("norm", [False, True])
def test_x_longer_than_shared_memory_is_staged_in_panels(norm):
    made = random_product(2200, 28672, 8, torch.float16)  # more tiles than blocks, so that panels begin anew
    plan = plan_for(28672, 2200, 8, norm)
    panel, _ = memory(plan, 28672, 8, norm, cuda.room_of(0).a_block)
    assert panel < plan.rounds(28672), "the shape is to need panels here"
    for one_plan in (None, Plan(8, 1, 1, 1, 1)):
        check(made["x"], made["weight"], one_plan, **extras_of(made, "residual", *(["norm"] if norm else [])))


@gpu
def test_every_candidate_gives_the_result():
    made = random_product(1000, 4096, 2, torch.float16)
    for plan in candidates(4096, 1000, 2, True, cuda.room_of(0)):
        check(made["x"], made["weight"], plan, **extras_of(made, "norm", "residual"))


@gpu
def test_a_weight_off_the_16_bytes_takes_the_slow_path():
    made = random_product(65, 128, 3, torch.float16)
    shifted = torch.empty(65 * 128 + 1, device="cuda", **HALF)[1:].view(65, 128)
    shifted.copy_(made["weight"])
    assert shifted.data_ptr() % 16
    check(made["x"], shifted, **extras_of(made, "norm", "bias"))


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_rounds_as_transformers_does(dtype):
    """Through an identity matrix the normalised x comes out bit by bit."""
    x, norm = torch.randn(2, 256, device="cuda").to(dtype) * 7, torch.randn(256, device="cuda").to(dtype)
    eye = torch.eye(256, device="cuda").to(dtype)
    y, expected = cuda_dense.gemv(x, eye, norm=norm, eps=1e-6), normalised(x, norm, 1e-6)
    unequal = (y != expected).sum().item()
    assert unequal <= 2, f"{unequal} of 512 values differ"  # rstd may differ in its last bit
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_round_as_transformers_does(dtype):
    gate, up = (torch.randn(1, 256, device="cuda") * 4).to(dtype), torch.randn(256, device="cuda").to(dtype)
    weight = torch.cat([torch.eye(256, device="cuda").to(dtype), torch.diag(up)])
    y = cuda_dense.gemv(gate, weight, gated=True)
    expected = F.silu(gate) * (gate * up)
    assert (y != expected).sum() <= 2  # where the exponential's last bit decides the rounding
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@gpu
def test_the_result_may_be_added_to_the_residual_in_place():
    made = random_product(4096, 512, 4, torch.float16)
    expected = cuda_dense.gemv(made["x"], made["weight"], residual=made["residual"])
    cuda_dense.gemv(made["x"], made["weight"], residual=made["residual"], out=made["residual"])
    assert torch.equal(made["residual"], expected)


@gpu
def test_values_that_are_not_finite_stay_in_their_row():
    made = random_product(64, 4096, 8, torch.float16)
    made["weight"][5, 100] = float("inf")
    y = cuda_dense.gemv(made["x"], made["weight"])
    finite = torch.isfinite(y).all(0)
    assert not finite[5] and finite.sum() == 63


@gpu
def test_one_row_without_its_dimension():
    made = random_product(96, 256, 1, torch.bfloat16)
    flat = cuda_dense.gemv(made["x"][0], made["weight"], residual=made["residual"][0])
    assert flat.shape == (96,)
    assert torch.equal(flat, cuda_dense.gemv(made["x"], made["weight"], residual=made["residual"])[0])


@gpu
def test_a_plan_that_does_not_fit_is_one_sentence():
    made = random_product(64, 256, 8, torch.float16)
    with pytest.raises(ValueError, match="needs more than the .* bytes of shared memory a block has here"):
        cuda_dense.gemv(made["x"], made["weight"], plan=Plan(32, 8, 4, 1, 1))


@gpu
@pytest.mark.parametrize("rows", [1, 4])
def test_bit_identical_and_pdl_changes_nothing(rows):
    made = random_product(4096, 4096, rows, torch.float16)
    extras = extras_of(made, "norm", "residual")
    torch.cuda.synchronize()
    first = cuda_dense.gemv(made["x"], made["weight"], **extras)
    for pdl in (False, True) * 10:
        assert torch.equal(first, cuda_dense.gemv(made["x"], made["weight"], pdl=pdl, **extras))


@gpu
@pytest.mark.parametrize("rows", [1, 8])
def test_a_chain_in_a_graph_with_pdl_waits_for_its_input(rows):
    """Each product feeds the next, nothing else runs between: a launch that did not wait would read NaN or a stale x."""
    layers = [random_product(2048, 2048, rows, torch.float16, gated=bool(i % 2)) for i in range(12)]
    x = layers[0]["x"]
    steps = [torch.empty(rows, 2048, device="cuda", **HALF) for _ in layers]

    def chain(pdl):
        y = x
        for i, (layer, out) in enumerate(zip(layers, steps, strict=True)):
            extras = extras_of(layer, "norm") | ({"gated": True} if i % 2 else {"residual": y})
            y = cuda_dense.gemv(y, layer["weight"], out=out, pdl=pdl and i > 0, **extras)
        return y

    expected = chain(False).clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(True)
    for _ in range(50):
        for out in steps:
            out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(steps[-1], expected)
