"""Additive codebooks: the format and AQLM checkpoints anywhere, the kernel's index algebra without a GPU, results on one."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from trapetum import additive, build, cuda, cuda_additive
from trapetum.bench import additive_product
from trapetum.bench.products import NotPossible
from trapetum.cuda_additive import Plan
from trapetum.formats import FormatError
from trapetum.gemv_plans import H100, Room

gpu = pytest.mark.gpu
ADA, TURING = Room(128, 101376, 102400), Room(40, 65536, 65536)
ARCHES = {"sm_75": TURING, "sm_80": Room(108, 166912, 167936), "sm_86": ADA, "sm_89": ADA, "sm_90": H100}
ARCHES |= {"sm_100": H100, "sm_120": ADA}
LAYER = "model.layers.0.mlp.up_proj"


def random_weight(out_features, in_features, n_codebooks=2, seed=0, bias=False, device="cpu"):
    generator = torch.Generator(device).manual_seed(seed)
    return additive.random(out_features, in_features, n_codebooks, generator, bias)


# --- format --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_codebooks", [2, 4])
def test_dequantize_is_the_formula(n_codebooks):
    w = random_weight(3, 16, n_codebooks)
    dense = w.dequantize(torch.float64)
    for o, i in [(0, 0), (1, 7), (2, 8), (2, 15)]:
        codes = w.codes[o, i // 8].tolist()
        vectors = [w.codebooks[c, code, i % 8].double() for c, code in enumerate(codes)]
        assert dense[o, i] == pytest.approx(float(w.scales[o].double() * sum(vectors)), rel=1e-12)
    assert w.dequantize(torch.float16).dtype == torch.float16


def test_sizes_count_codebooks_and_scales():
    w = random_weight(4096, 4096)
    assert w.nbytes == 4096 * 512 * 2 + 2 * 256 * 8 * 2 + 4096 * 2
    assert 2 < w.bits_per_weight < 2.01
    assert 4 < random_weight(4096, 4096, 4).bits_per_weight < 4.02


def test_products_on_the_cpu_agree_with_float64():
    w = random_weight(40, 72, bias=True)
    x = torch.randn(3, 72)
    expected = additive.reference_gemv(x, w)
    assert torch.allclose(additive.dense_product(x, w).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(cuda_additive.multiply(x[0], w).double(), expected[0], rtol=1e-5, atol=1e-5)
    half = cuda_additive.multiply(x.bfloat16(), w)
    assert half.dtype == torch.bfloat16 and half.shape == (3, 40)


@pytest.mark.parametrize("in_features", [0, 7, 65])
def test_inputs_come_in_groups_of_eight(in_features):
    with pytest.raises(FormatError, match=rf"in_features is {in_features}.*multiple of 8"):
        additive.random(4, in_features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(4, 9, 3, dtype=torch.uint8)}, r"the codes are uint8 \[4, 9, 3\]"),
        ({"codes": torch.zeros(4, 18, dtype=torch.uint8)}, r"the codes are uint8 \[4, 18\]"),
        ({"codes": torch.zeros(4, 9, 2, dtype=torch.int64)}, "the codes are int64"),
        ({"codebooks": torch.zeros(3, 256, 8).half()}, r"the codebooks are float16 \[3, 256, 8\]"),
        ({"codebooks": torch.zeros(2, 128, 8).half()}, r"the codebooks are float16 \[2, 128, 8\]"),
        ({"codebooks": torch.zeros(2, 256, 8)}, "the codebooks are float32"),
        ({"codebooks": torch.full((2, 256, 8), torch.inf).half()}, "4096 of 4096 values of the codebooks"),
        ({"scales": torch.ones(5).half()}, r"the scale is float16 \[5\]; 4 output channels"),
        ({"scales": torch.full((4,), torch.nan).half()}, "4 of 4 values of the scale"),
        ({"bias": torch.zeros(3).half()}, r"the bias is float16 \[3\]"),
        ({"scales": torch.ones(4, device="meta").half()}, "the codes are on cpu and the scale on meta"),
    ],
)
def test_tensors_that_do_not_fit_are_one_sentence(change, message):
    with pytest.raises(FormatError, match=message) as caught:
        replace(random_weight(4, 72), **change)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_x_that_does_not_fit_is_one_sentence():
    w = random_weight(4, 72)
    with pytest.raises(ValueError, match=r"the weight has 72 inputs, and x has shape \[64\]"):
        additive.dense_product(torch.randn(64), w)
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        cuda_additive.multiply(torch.randn(72, dtype=torch.float64), w)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def aqlm_tensors(weight, prefix=LAYER):
    """A weight as an AQLM checkpoint stores it."""
    tensors = {
        "codebooks": weight.codebooks.unsqueeze(2),
        "codes": weight.codes.view(torch.int8),
        "scales": weight.scales.view(-1, 1, 1, 1),
    }
    tensors |= {} if weight.bias is None else {"bias": weight.bias}
    return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def assert_same(found, expected):
    for name in ("codes", "codebooks", "scales", "bias"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None and other is None) or torch.equal(one, other), name


@pytest.mark.parametrize("n_codebooks", [2, 4])
def test_loads_a_layer_of_a_checkpoint(tmp_path, n_codebooks):
    expected = random_weight(33, 72, n_codebooks, bias=True)
    tensors = aqlm_tensors(expected)
    assert (tensors[f"{LAYER}.codes"] < 0).any()
    save_file(tensors | {"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    assert additive.layers_of(tmp_path) == [LAYER]
    assert_same(additive.load(tmp_path, LAYER), expected)
    assert_same(additive.load(tmp_path / "model.safetensors", LAYER), expected)


def sharded(folder, weight):
    """The layer's tensors spread over two files with an index."""
    tensors = aqlm_tensors(weight)
    codes = {name: t for name, t in tensors.items() if name.endswith(".codes")}
    shards = {
        "one.safetensors": codes,
        "two.safetensors": {n: t for n, t in tensors.items() if n not in codes},
    }
    for name, part in shards.items():
        save_file(part, folder / name)
    where = {tensor: name for name, part in shards.items() for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_loads_from_shards(tmp_path):
    expected = random_weight(8, 64)
    sharded(tmp_path, expected)
    assert additive.layers_of(tmp_path) == [LAYER]
    assert_same(additive.load(tmp_path, LAYER), expected)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(FormatError, match=r"two\.safetensors is missing; download"):
        additive.load(tmp_path, LAYER)


def test_scales_may_be_flat_and_codes_unsigned():
    w = random_weight(5, 16)
    tensors = {"codebooks": w.codebooks.unsqueeze(2).float(), "codes": w.codes, "scales": w.scales}
    assert_same(additive.from_tensors(tensors), w)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("codes", lambda t: None, "missing: codes"),
        ("scales", lambda t: None, "missing: scales"),
        ("codes", lambda t: t.short(), r"the codes are int16 .* only one-byte codes"),
        ("codes", lambda t: t[..., :1], r"the codes are uint8 \[8, 8, 1\]"),
        ("codebooks", lambda t: t.transpose(2, 3), r"the codebooks are float16 \[2, 256, 8, 1\]"),
        ("codebooks", lambda t: t[:1], r"the codebooks are float16 \[1, 256, 8\]"),
        ("scales", lambda t: t.expand(8, 2, 1, 1), r"the scales are float16 \[8, 2, 1, 1\]"),
        ("scales", lambda t: t[:7], r"the scale is float16 \[7\]; 8 output"),
    ],
)
def test_a_corrupt_layer_is_one_sentence(tmp_path, part, change, message):
    tensors = aqlm_tensors(random_weight(8, 64))
    tensors[f"{LAYER}.{part}"] = change(tensors[f"{LAYER}.{part}"])
    stored = {name: t.contiguous() for name, t in tensors.items() if t is not None}
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=message) as caught:
        additive.load(tmp_path, LAYER)
    assert f"layer {LAYER}" in str(caught.value) and "\n" not in str(caught.value)


def test_paths_without_a_checkpoint_are_one_sentence(tmp_path):
    with pytest.raises(FormatError, match=r"holds neither model\.safetensors nor"):
        additive.load(tmp_path, LAYER)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(FormatError, match="is truncated or is no safetensors file"):
        additive.layers_of(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(FormatError, match=r"index\.json is damaged"):
        additive.load(tmp_path, LAYER)


# --- the kernel's layout and index algebra, without a GPU ---------------------------------------------------------


@pytest.mark.parametrize("n_codebooks", [2, 4])
@pytest.mark.parametrize("shape", [(1, 8), (33, 72), (64, 128), (100, 264)])
def test_layout_round_trip(shape, n_codebooks):
    w = random_weight(*shape, n_codebooks)
    packed = cuda_additive.pack(w.codes)
    steps = cuda_additive.steps_for(shape[1], n_codebooks)
    assert packed.is_contiguous() and packed.shape == (-(-shape[0] // 32), steps, 32, 16)
    assert torch.equal(cuda_additive.unpack(packed, *shape, n_codebooks), w.codes)


def test_layout_places_codes_where_the_picture_says():
    w = random_weight(64, 256)
    packed = cuda_additive.pack(w.codes)
    assert packed[1, 2, 5].tolist() == w.codes[32 + 5, 16:24].flatten().tolist()


def table_of(codebooks, copies):
    """The kernel's table: byte address -> vector, and the bytes of an entry."""
    n = len(codebooks)
    spread = 16 * copies
    entry = min(256, n * spread)
    per_entry = entry // spread
    places = {}
    for c in range(n):
        base = c // per_entry * 256 * entry + c % per_entry * spread
        for code in range(256):
            for copy in range(copies):
                places[base + code * entry + 16 * copy] = (c, code)
    return places, entry, [c // per_entry * 256 * entry + c % per_entry * spread for c in range(n)]


@pytest.mark.parametrize(
    ("n_codebooks", "copies", "ways"), [(2, 8, 1), (4, 8, 1), (2, 4, 2), (4, 4, 2), (4, 2, 4)]
)
def test_table_addresses_name_the_vector_and_conflict_as_documented(n_codebooks, copies, ways):
    """The byte-permute's address, for random codes; `ways` lanes at most of the eight served at once share banks."""
    places, entry, begins = table_of(torch.zeros(n_codebooks, 256, 8), copies)
    assert (
        len(places) == n_codebooks * 256 * copies and max(places) + 16 == 32 * 256 * n_codebooks * copies // 2
    )
    codes = torch.randint(256, (50, 32)).tolist()
    worst = 0
    for row in codes:
        for c in range(n_codebooks):
            at = [
                (code << 8 | lane % copies * 16 * (256 // entry)) // (256 // entry)
                for lane, code in enumerate(row)
            ]
            assert [places[begins[c] + a] for a in at] == [(c, code) for code in row]
            for quarter in range(0, 32, 8):
                banks = [(begins[c] + a) % 128 for a in set(at[quarter : quarter + 8])]
                worst = max(worst, max(banks.count(b) for b in banks))
    assert worst == ways


def staged(x, steps, groups):
    """x as the kernel stages it, [steps, group pairs, 2 halves, 8]: inputs 0 1 4 5 of both groups, then 2 3 6 7."""
    padded = torch.zeros(steps * groups * 8, dtype=torch.float64)
    padded[: len(x)] = x
    pairs = padded.view(steps, groups // 2, 2, 4, 2)  # [..., group of the pair, two inputs, 2]
    halves = torch.stack([pairs[..., [0, 2], :], pairs[..., [1, 3], :]], 2)
    return halves.flatten(3)


def fragment_a(vectors):
    """A [16, 16] from 8 weights a lane, by the register layout of mma.m16n8k16."""
    a = torch.zeros(16, 16, dtype=torch.float64)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for register, (row, k) in enumerate([(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]):
            a[row, k : k + 2] = vectors[lane, 2 * register : 2 * register + 2]
    return a


def fragment_b(halves, which):
    """B [16, 8] for one group of a pair: each diagonal lane holds 4 inputs of its half, the others zeros."""
    b = torch.zeros(16, 8, dtype=torch.float64)
    for lane in range(32):
        g, t = divmod(lane, 4)
        if g % 4 == t:
            four = halves[lane >> 4, 4 * which : 4 * which + 4]
            b[2 * t : 2 * t + 2, g], b[2 * t + 8 : 2 * t + 10, g] = four[:2], four[2:]
    return b


def channel_sums(d):
    """32 sums from the fragments of D, as lanes 0 and 1 of a quad write them after one exchange with lanes 2 and 3."""
    sums = torch.zeros(32, dtype=torch.float64)
    for lane in range(32):
        g, t = divmod(lane, 4)
        if t < 2:
            for c in range(2):
                low, high = d[g, 2 * t + c], d[g + 8, 2 * (t ^ 2) + c]
                sums[4 * g + 2 * t + c] = low + high
    return sums


@pytest.mark.parametrize("n_codebooks", [2, 4])
def test_a_diagonal_b_multiplies_each_lane_with_its_own_inputs(n_codebooks):
    w = random_weight(32, 136, n_codebooks)
    x = torch.randn(136, dtype=torch.float64)
    packed = cuda_additive.pack(w.codes)[0]
    groups, books = cuda_additive.STEP_GROUPS[n_codebooks], w.codebooks.double()
    xs = staged(x, len(packed), groups)
    d = torch.zeros(16, 8, dtype=torch.float64)
    for step, lanes in enumerate(packed.long()):
        for j in range(groups):
            b = fragment_b(xs[step, j // 2], j % 2)
            for c in range(n_codebooks):
                d += fragment_a(books[c][lanes[:, j * n_codebooks + c]]) @ b
    y = channel_sums(d) * w.scales.double()
    assert torch.allclose(y, additive.reference_gemv(x, w), rtol=1e-12, atol=1e-12)


def test_the_zeros_do_not_share_banks_with_x():
    """Of lanes off the diagonal and lanes on it, in every load of x: 16 bytes each, 128 bytes of banks."""
    for step_bytes in (64, 128):
        for step in range(4):
            for pair in range(step_bytes // 32):
                x_banks = {(step_bytes * step + 32 * pair + 16 * half) % 128 for half in (0, 1)}
                assert (32 + 32 * pair) % 128 not in x_banks


# --- launch shapes -------------------------------------------------------------------------------------------------


def test_default_plans():
    narrow, wide = Plan(16, 2), Plan(16, 2, channels=64)
    for out_features, expected in (
        (4096, narrow),
        (8192, wide),
        (12288, narrow),
        (22016, wide),
        (28672, narrow),
    ):
        assert cuda_additive.plan_for(out_features, 4096, 2, H100) == expected
    assert cuda_additive.plan_for(4096, 4096, 2, TURING).copies == 4
    assert cuda_additive.plan_for(4096, 4096, 4, ADA).copies == 4
    assert cuda_additive.plan_for(4096, 28672, 2, TURING) is None


@pytest.mark.parametrize("n_codebooks", [2, 4])
def test_plans_fit_where_they_are_chosen(n_codebooks):
    for room in (H100, ADA, TURING):
        for out_features in (32, 4096, 28672):
            for in_features in (8, 4096, 14336, 28672):
                plan = cuda_additive.plan_for(out_features, in_features, n_codebooks, room)
                if plan:
                    assert cuda_additive.shared_bytes_for(plan, n_codebooks, in_features) <= room.a_block
                    held = cuda_additive.resident(plan, n_codebooks, in_features, room)
                    assert 1 <= held <= plan.blocks
                else:
                    smallest = Plan(16, 2, copies=2 if n_codebooks == 4 else 4)
                    assert cuda_additive.shared_bytes_for(smallest, n_codebooks, in_features) > room.a_block


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("n_codebooks", [2, 4])
def test_compiles_without_spills(arch, n_codebooks):
    pytest.importorskip("cuda.bindings.nvrtc")
    room = ARCHES[arch]
    plans = {cuda_additive.plan_for(out, 4096, n_codebooks, room) for out in (1024, 28672)}
    cases = [(plan, dtype) for plan in plans for dtype in (torch.float16, torch.bfloat16, torch.float32)]
    if arch == "sm_90":
        cases += [(plan, torch.float16) for plan in cuda_additive.candidates(n_codebooks)]
    for plan, dtype in cases:
        used = build.compile_cuda(cuda_additive.SOURCE, arch, plan.defines(n_codebooks, dtype)).resources()
        resources = used["additive_gemv"]
        assert resources.spill_bytes == 0, f"{plan} {dtype} on {arch} spills {resources.spill_bytes} bytes"
        assert 0 < resources.registers * plan.warps * 32 * plan.blocks <= 65536


# --- products that are timed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", additive_product.METHODS)
def test_a_timed_product_is_right(method):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    product = additive_product.build(method, 264, 300, device)
    assert product.checked_error() < 1e-3
    bits = additive_product.METHODS[method]
    assert product.config["bits"] == bits
    assert product.weight_bytes >= 300 * 264 * bits // 8 + 4096 * bits + 600
    with pytest.raises(NotPossible, match="60 is no multiple"):
        additive_product.build(method, 60, 32, device)


# --- on a GPU ------------------------------------------------------------------------------------------------------

SHAPES = [(1, 8), (33, 72), (31, 64), (65, 136), (100, 1000), (768, 3072), (4096, 4096), (5000, 11008)]


def relative_error(y, expected):
    return ((y.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def launched(x, w, plan=None, pdl=False):
    """The kernel's result in a buffer that held NaN."""
    bias = None if w.bias is None else w.bias.to(x.dtype)
    out = torch.full((w.out_features,), float("nan"), device="cuda", dtype=x.dtype)
    packed = cuda_additive.pack(w.codes)
    return cuda_additive.gemv(x, packed, w.codebooks, w.scales, bias, out=out, plan=plan, pdl=pdl)


def assert_close(y, x, w, what=""):
    """Error at most twice that of F.linear in fp16 (or x's own dtype where that is coarser), both against float64."""
    expected = additive.reference_gemv(x, w)
    compared = torch.float16 if x.dtype == torch.float32 else x.dtype
    bias = None if w.bias is None else w.bias.to(compared)
    plain = F.linear(x.to(compared), w.dequantize(compared), bias)
    one_ulp = (1e-3 if w.in_features < 64 else 5e-4) * (8 if compared == torch.bfloat16 else 1)
    assert torch.isfinite(y).all(), f"{what}: an output was not written"
    assert relative_error(y, expected) <= 2 * relative_error(plain, expected) + one_ulp, what


def usable(plan, w):
    room = cuda.room_of(0)
    return cuda_additive.shared_bytes_for(plan, w.n_codebooks, w.in_features) <= room.a_block


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_codebooks", [2, 4])
def test_gemv_matches_float64(n_codebooks, dtype):
    odd = (Plan(1, 1), Plan(3, 2, channels=64), Plan(16, 2, copies=4), Plan(5, 3, 64, 4))
    for out_features, in_features in SHAPES:
        w = random_weight(out_features, in_features, n_codebooks, bias=True, device="cuda")
        x = torch.randn(in_features, device="cuda").to(dtype)
        for plan in (None, *odd, *cuda_additive.candidates(n_codebooks)):
            if plan is None or usable(plan, w):
                assert_close(launched(x, w, plan), x, w, f"{out_features}x{in_features}, {plan}")


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_codebooks", [2, 4])
def test_gemv_with_outliers_zeros_and_a_misaligned_x(n_codebooks, dtype):
    w = random_weight(300, 4096, n_codebooks, device="cuda")
    x = torch.randn(4097, device="cuda")
    x[::513] *= 1e3
    x = x.to(dtype)
    for part in (x[:4096], x[1:]):
        assert_close(launched(part, w), part, w)
    zero = launched(torch.zeros_like(x[:4096]), w)
    assert torch.equal(zero, torch.zeros_like(zero))


@gpu
@pytest.mark.parametrize("n_codebooks", [2, 4])
@pytest.mark.parametrize("shape", [(4096, 4096), (20000, 1024)])
def test_gemv_is_bit_identical_and_pdl_changes_nothing(shape, n_codebooks):
    w = random_weight(*shape, n_codebooks, device="cuda")
    x = torch.randn(shape[1], device="cuda").half()
    torch.cuda.synchronize()
    first = launched(x, w)
    for pdl in (False, True) * 5:
        assert torch.equal(first, launched(x, w, pdl=pdl))


@gpu
def test_a_chain_in_a_graph_with_pdl_waits_for_its_input():
    """Each product feeds the next: a launch that did not wait would read a stale vector."""
    weights = [random_weight(2048, 2048, seed=s, device="cuda") for s in range(8)]
    packed = [cuda_additive.pack(w.codes) for w in weights]
    x = torch.randn(2048, device="cuda").half()
    buffers = [torch.empty(2048, device="cuda").half() for _ in weights]

    def chain(pdl):
        y = x
        for w, p, out in zip(weights, packed, buffers, strict=True):
            y = cuda_additive.gemv(y, p, w.codebooks, w.scales, out=out, pdl=pdl)
        return y

    expected = chain(False).clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(True)
    for _ in range(20):
        for buffer in buffers:
            buffer.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, expected)


@gpu
def test_one_row_takes_the_kernel_and_others_the_dense_product(monkeypatch):
    w = random_weight(64, 256, device="cuda", bias=True)
    packed = cuda_additive.pack(w.codes)
    x = torch.randn(2, 256, device="cuda").half()
    assert_close(cuda_additive.multiply(x[:1], w, packed)[0], x[0], w)
    assert cuda_additive.multiply(x, w, packed).shape == (2, 64)
    called = []
    monkeypatch.setattr(cuda_additive, "dense_product", lambda x, w: called.append(x.shape))
    cuda_additive.multiply(x, w, packed)
    cuda_additive.multiply(x[0], w, packed)
    assert called == [(2, 256)]


@gpu
def test_operands_that_do_not_fit_are_one_sentence():
    w = random_weight(64, 256, device="cuda")
    packed = cuda_additive.pack(w.codes)
    x = torch.randn(256, device="cuda").half()
    for changed, message in [
        ((x[:252].clone(), packed, w.codebooks, w.scales), "multiples of 8 inputs"),
        ((x[:64].clone(), packed, w.codebooks, w.scales), "the packed codes must be"),
        ((x, packed, w.codebooks.float(), w.scales), "the codebooks must be"),
        ((x, packed, w.codebooks, w.scales.cpu()), "the scales must be"),
        ((x.repeat_interleave(2)[::2], packed, w.codebooks, w.scales), "x must be .* not contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            cuda_additive.gemv(*changed)
    with pytest.raises(ValueError, match="the bias must be"):
        cuda_additive.gemv(x, packed, w.codebooks, w.scales, bias=torch.zeros(64, device="cuda"))


@gpu
def test_a_shape_too_wide_for_shared_memory_takes_the_dense_path():
    w = random_weight(40, 200_000, device="cuda")
    assert not cuda_additive.fits(w, cuda.room_of(0))
    x = torch.randn(200_000, device="cuda").half()
    assert relative_error(cuda_additive.multiply(x, w), additive.reference_gemv(x, w)) < 2e-3
    with pytest.raises(ValueError, match="do not fit in the"):
        cuda_additive.gemv(x, cuda_additive.pack(w.codes), w.codebooks, w.scales)
