"""The cache's codes and layouts, and the attention kernel against float64."""

import pytest
import torch

from trapetum import build
from trapetum.cuda_attention import Attention, Heads, reference_attention, why_not
from trapetum.kv_cache import QUANTUM, KvCache, key_places, quantize, value_places

KINDS = ("fp16", "int8", "int4")


def rope_tables(places: int, dim: int, dtype, device="cpu"):
    angle = torch.outer(torch.arange(places), 10000.0 ** (-torch.arange(0, dim, 2) / dim))
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    sin[:, : dim // 2].neg_()
    return cos.to(dtype).to(device), sin.to(dtype).to(device)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_lie_within_half_a_step(bits):
    values = torch.randn(3, 64, 20).half()
    codes, scale, zero = quantize(values, 1, bits)
    error = (codes.float() * scale.float() + zero.float() - values.float()).abs()
    rounded = 2.0**-11  # of scale and zero
    room = (0.51 + rounded * 2**bits) * scale.float() + rounded * zero.float().abs()
    assert int(codes.max()) < 2**bits and (error <= room).all()
    same, scale, zero = quantize(torch.full((1, 8, 1), 3.5).half(), 1, bits)
    assert not same.any() and float(scale) == 0 and float(zero) == 3.5


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_places_are_a_permutation(bits, dim):
    assert key_places(dim, bits).flatten().sort().values.tolist() == list(range(16 * dim))
    assert value_places(dim, bits).flatten().sort().values.tolist() == list(range(16 * dim))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 5, 64, 100, 191, 300])
def test_a_prompt_is_read_back(kind, length):
    torch.manual_seed(length)
    keys, values = torch.randn(2, 2, length, 32).half()
    keys[:, :, 3] *= 30  # an outlying channel
    cache = KvCache(kind, 2, 32, 400, torch.float16, "cpu")
    cache.store(keys, values)
    coded = cache.coded(length)
    read_keys, read_values = cache.read(length, coded)
    assert torch.equal(read_keys[:, coded:], keys[:, coded:].float())
    assert torch.equal(read_values[:, coded:], values[:, coded:].float())
    step = {16: 0, 8: 1 / 255, 4: 1 / 15}[cache.bits]
    for read, stored, dim in ((read_keys, keys, 1), (read_values, values, 2)):
        for first in range(0, coded, QUANTUM):
            part = stored[:, first : first + QUANTUM].float()
            room = 0.52 * step * (part.amax(dim, True) - part.amin(dim, True)) + 0.02 * step
            assert ((read[:, first : first + QUANTUM] - part).abs() <= room).all()


def test_bytes_follow_the_kind():
    sizes = {kind: KvCache(kind, 4, 64, 4096, torch.float16, "cpu").nbytes for kind in KINDS}
    assert sizes["fp16"] == 4 * 4096 * 64 * 2 * 2
    assert 0.5 < sizes["int8"] / sizes["fp16"] < 0.58 and 0.25 < sizes["int4"] / sizes["fp16"] < 0.34


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="fp16, int8, int4, not 'fp8'"):
        KvCache("fp8", 1, 32, 16, torch.float16, "cpu")


def test_what_the_kernel_cannot_do_is_said():
    assert "not 80" in why_not(80, 1, 1, torch.float16)
    assert "at most 2 rows" in why_not(128, 8, 4, torch.float16)
    assert "not 32" in why_not(128, 32, 1, torch.float16)
    assert "float32" in why_not(128, 8, 1, torch.float32)
    assert "8.0" in why_not(128, 8, 1, torch.bfloat16, (7, 5))
    assert why_not(128, 8, 2, torch.float16) == ""


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90"])
@pytest.mark.parametrize(
    "defines",
    [
        ("HEAD_DIM=128",),
        ("HEAD_DIM=128", "KV=8", "XTYPE=1"),
        ("HEAD_DIM=64", "KV=4", "GROUP=4", "ROWS=4"),
        ("HEAD_DIM=32", "KV=4", "GROUP=2"),
    ],
)
def test_compiles(arch, defines):
    if build.why_not():
        pytest.skip(build.why_not())
    assert build.compile_cuda("decode_attention.cu", arch, defines).path.is_file()


# heads, key heads, width, rows, length before the step
CASES = [
    (32, 32, 128, 1, 0),
    (32, 32, 128, 1, 5),
    (32, 32, 128, 1, 261),
    (8, 8, 128, 1, 4099),
    (64, 8, 128, 1, 1000),
    (64, 8, 128, 2, 1023),
    (32, 8, 128, 4, 62),
    (4, 4, 128, 4, 510),
    (8, 4, 32, 1, 77),
    (14, 2, 64, 1, 300),
    (14, 2, 64, 2, 65),
    (6, 3, 64, 3, 130),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_against_float64(case, kind, dtype):
    heads, kv_heads, dim, rows, length = case
    generator = torch.Generator("cuda").manual_seed(length)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    sizes = Heads(heads, kv_heads, dim, dim**-0.5)
    cache = KvCache(kind, kv_heads, dim, length + 200, dtype, "cuda")
    for tensor in (cache.keys, cache.values):
        tensor.fill_(7)  # what no row may see
    if length:
        cache.store(normal(kv_heads, length, dim), normal(kv_heads, length, dim))
    cos, sin = rope_tables(cache.context, dim, dtype, "cuda")
    attention = Attention(sizes, rows, dtype, 0)
    position = torch.tensor([length], device="cuda")
    out = torch.full((rows, heads * dim), torch.nan, dtype=dtype, device="cuda")
    for step in range(4):  # the cache it wrote is what the next step reads
        qkv = 2 * normal(rows, sizes.row)
        keys, values = cache.read(length, cache.coded(length, rows))
        expected, fresh_keys, fresh_values = reference_attention(qkv, sizes, keys, values, cos, sin, length)
        attention(qkv, cache, position, cos, sin, out)
        error = ((out.double() - expected).norm() / expected.norm()).item()
        assert error < (8e-3 if dtype == torch.bfloat16 else 2e-3), (step, error)
        read_keys, read_values = cache.read(length + rows, cache.coded(length, rows))
        assert torch.equal(read_keys[:, length:], fresh_keys.float())
        assert torch.equal(read_values[:, length:], fresh_values.float())
        first = out.clone()
        attention(qkv, cache, position, cos, sin, out.fill_(torch.nan))
        assert torch.equal(first, out)
        length += rows
        position.fill_(length)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dim", [32, 128])
def test_a_group_is_quantized_as_a_prompt_would_be(kind, rows, dim):
    sizes, dtype = Heads(4, 2, dim, dim**-0.5), torch.float16
    cache = KvCache(kind, 2, dim, 400, dtype, "cuda")
    cos, sin = rope_tables(cache.context, dim, dtype, "cuda")
    attention, position = Attention(sizes, rows, dtype, 0), torch.zeros(1, dtype=torch.long, device="cuda")
    out = torch.empty(rows, 4 * dim, dtype=dtype, device="cuda")
    torch.manual_seed(0)
    seen, length = [], 0
    while length < 300:
        qkv = torch.randn(rows, sizes.row, device="cuda").to(dtype)
        attention(qkv, cache, position, cos, sin, out)
        _, keys, values = reference_attention(
            qkv,
            sizes,
            torch.empty(2, 0, dim, device="cuda"),
            torch.empty(2, 0, dim, device="cuda"),
            cos[length:],
            sin[length:],
            0,
        )
        kept = 1 + length % rows  # as if the other drafts had been wrong
        seen.append((keys[:, :kept], values[:, :kept]))
        length += kept
        position.fill_(length)
    whole = KvCache(kind, 2, dim, 400, dtype, "cuda")
    whole.store(torch.cat([k for k, _ in seen], 1), torch.cat([v for _, v in seen], 1))
    groups = cache.coded(length, rows) // QUANTUM
    assert groups == 4
    for name in ("key_codes", "value_codes", "key_params", "value_params"):
        made, expected = getattr(cache, name), getattr(whole, name)
        places = groups * made.shape[1] * QUANTUM // cache.context
        assert torch.equal(made[:, :places], expected[:, :places]), name
