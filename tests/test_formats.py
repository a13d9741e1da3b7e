"""Packing, sizes and files of codebook weights."""

import hashlib
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trapetum import formats
from trapetum.formats import BITS, SCHEMES, CodebookWeight, FormatError
from trapetum.tensor_files import TensorFile, combined, digest


def random_weight(out_features, in_features, bits, n_codes=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n_codes = n_codes or 2**bits
    indices = torch.randint(n_codes, (out_features, in_features), generator=generator, dtype=torch.uint8)
    codebook = torch.randn(out_features, n_codes, generator=generator).half()
    return indices, codebook, formats.pack(indices, codebook, bits)


def stream_bits(indices, bits):
    """A row's bit stream written out by the definition, as a list of byte values."""
    stream = [(int(code) >> b) & 1 for code in indices for b in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [sum(bit << b for b, bit in enumerate(stream[i : i + 8])) for i in range(0, len(stream), 8)]


@settings(deadline=None, max_examples=80)
@given(
    out_features=st.integers(1, 5),
    in_features=st.integers(1, 67),
    bits=st.sampled_from(BITS),
    seed=st.integers(0, 2**31),
)
def test_pack_round_trip_and_layout(out_features, in_features, bits, seed):
    indices, codebook, weight = random_weight(out_features, in_features, bits, seed=seed)
    assert torch.equal(weight.indices(), indices)
    assert torch.equal(weight.dequantize(), codebook.float().gather(1, indices.long()))
    assert weight.codes.tolist() == [stream_bits(row, bits) for row in indices]


@pytest.mark.parametrize("bits,n_codes", sorted(SCHEMES))
def test_sizes_count_the_codebook(bits, n_codes):
    _, _, weight = random_weight(3, 1000, bits, n_codes)
    assert (weight.out_features, weight.n_codes) == (3, n_codes)
    assert weight.nbytes == 3 * (1000 * bits // 8 + 2 * n_codes)
    assert weight.bits_per_weight == pytest.approx(bits + 16 * n_codes / 1000)


def test_dequantize_in_chunks_and_dtypes(monkeypatch):
    indices, codebook, weight = random_weight(7, 13, 3)
    whole = weight.dequantize(torch.float16)
    monkeypatch.setattr(formats, "_CHUNK_WEIGHTS", 30)
    assert torch.equal(weight.dequantize(torch.float16), whole)
    assert torch.equal(whole, codebook.gather(1, indices.long()))


def test_to_moves_both_tensors():
    _, _, weight = random_weight(2, 5, 4)
    assert weight.to("meta").codes.device.type == weight.to("meta").codebook.device.type == "meta"


def test_non_contiguous_indices():
    indices = torch.arange(16, dtype=torch.uint8).repeat(3, 2)[:, ::2]
    codebook = torch.arange(16.0).half().repeat(3, 1)
    assert torch.equal(formats.pack(indices, codebook, 4).indices(), indices)


@pytest.mark.parametrize(
    "indices,codebook,bits,words",
    [
        (torch.full((1, 4), 5, dtype=torch.uint8), torch.zeros(1, 5).half(), 4, "code 5 is out of range"),
        (torch.zeros(1, 4, dtype=torch.uint8), torch.zeros(1, 5).half(), 2, "1 to 4 codes"),
        (torch.zeros(1, 4, dtype=torch.uint8), torch.zeros(1, 4).half(), 5, "5 bits per code"),
        (torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4).half(), 2, "torch.int64"),
        (torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(1, 4).half(), 2, "codebook of 1 rows"),
        (torch.zeros(1, 0, dtype=torch.uint8), torch.zeros(1, 4).half(), 2, "at least 1"),
        (torch.zeros(1, 4, dtype=torch.uint8), torch.zeros(1, 4), 2, "torch.float32"),
        (
            torch.zeros(1, 4, dtype=torch.uint8),
            torch.tensor([[0.0, float("inf")]]).half(),
            2,
            "1 of 2 codebook",
        ),
    ],
)
def test_pack_refuses(indices, codebook, bits, words):
    with pytest.raises(FormatError, match=words):
        formats.pack(indices, codebook, bits)


def test_weight_and_unpack_refuse_wrong_row_bytes():
    codes, codebook = torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 16).half()
    with pytest.raises(FormatError, match=r"\[2, 4\]"):
        CodebookWeight(codes, codebook, in_features=7, bits=4)
    with pytest.raises(FormatError, match="rows of 4 bytes"):
        formats.unpack_rows(codes, 7, 4)
    with pytest.raises(FormatError, match="in_features is 0"):
        CodebookWeight(codes[:, :0], codebook, in_features=0, bits=4)


@pytest.fixture
def saved(tmp_path):
    weights = {f"layers.{b}.proj": random_weight(3, 11, b)[2] for b in BITS}
    weights["short"] = random_weight(2, 9, 8, n_codes=64)[2]
    extra = {"norm.weight": torch.randn(8).bfloat16(), "layers.4.proj.bias": torch.randn(3)}
    path = tmp_path / "weights.safetensors"
    formats.save(path, weights, extra, {"method": "kmeans"})
    return path, weights, extra


def test_file_round_trip(saved):
    path, weights, extra = saved
    read = formats.load(path)
    assert read.weights.keys() == weights.keys() and read.extra.keys() == extra.keys()
    for name, weight in weights.items():
        assert torch.equal(read.weights[name].codes, weight.codes)
        assert torch.equal(read.weights[name].codebook, weight.codebook)
        assert (read.weights[name].in_features, read.weights[name].bits) == (weight.in_features, weight.bits)
    assert all(torch.equal(read.extra[name], extra[name]) for name in extra)
    assert read.metadata == {"method": "kmeans"}
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary file is left"


def test_save_refuses_name_clash_and_leaves_the_old_file(saved):
    path, weights, _ = saved
    before = path.read_bytes()
    with pytest.raises(FormatError, match=r"short\.codes"):
        formats.save(path, weights, {"short.codes": torch.zeros(1)})
    with pytest.raises(FormatError, match="'bits' is not a string"):
        formats.save(path, weights, metadata={"bits": 4})
    assert path.read_bytes() == before


@pytest.mark.parametrize("keep", [0, 4, 20, 0.5, -1])
def test_truncated_file_is_one_sentence(saved, keep):
    path, _, _ = saved
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(FormatError, match="truncated or not a safetensors file"):
        formats.load(path)


def test_pickle_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "model.bin"
    torch.save({"w": torch.zeros(2)}, path)
    with pytest.raises(FormatError, match="not a safetensors file"):
        formats.load(path)
    with pytest.raises(FormatError, match="is not a file"):
        formats.load(tmp_path / "absent.safetensors")


def sign(tensors, metadata):
    """Store the hashes that `tensors` have now, as one would who knows the format and means harm."""
    try:
        header = json.loads(metadata["trapetum"])
        header["sha256"] = {name: digest(tensor) for name, tensor in tensors.items()}
        metadata["trapetum"] = json.dumps(header)
    except (KeyError, ValueError, TypeError):
        pass


def edit_header(path, change, signed=True):
    """Rewrite a safetensors file with its tensors or its `trapetum` header changed."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(path), "pt") as file:
        tensors, metadata = {k: file.get_tensor(k).clone() for k in file.keys()}, dict(file.metadata())
    change(tensors, metadata)
    if signed:
        sign(tensors, metadata)
    save_file(tensors, str(path), metadata=metadata)


def _set(metadata, value):
    metadata["trapetum"] = value if isinstance(value, str) else json.dumps(value)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda t, m: m.pop("trapetum"), "holds no trapetum weights"),
        (lambda t, m: _set(m, "{"), "damaged trapetum header"),
        (lambda t, m: _set(m, []), "damaged trapetum header"),
        (lambda t, m: _set(m, {"version": 9, "weights": {}}), "format version 9"),
        (lambda t, m: t.pop("short.codebook"), "lacks the tensor short.codebook"),
        (
            lambda t, m: t.update({"short.codes": t["short.codes"][:, :5].clone()}),
            "weight short: the codes are",
        ),
        (lambda t, m: t.update({"short.codes": t["short.codes"].int()}), "torch.int32"),
        (lambda t, m: t.update({"short.codebook": t["short.codebook"].float()}), "torch.float32"),
        (lambda t, m: t["short.codes"].fill_(200), "code 200 is out of range"),
        (lambda t, m: t["short.codebook"].fill_(float("nan")), "NaN"),
    ],
)
def test_load_refuses_damaged_contents(saved, change, words):
    path, _, _ = saved
    edit_header(path, change)
    with pytest.raises(FormatError, match=words):
        formats.load(path)


def _header(metadata, **fields):
    _set(metadata, json.loads(metadata["trapetum"]) | fields)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda t, m: t["norm.weight"].view(torch.int16).__ixor__(1), r"norm\.weight .* not what was stored"),
        (lambda t, m: t["short.codes"].__ixor__(1), r"short\.codes .* not what was stored"),
        (lambda t, m: t.update({"norm.weight": t["norm.weight"].view(torch.float16)}), "not what was stored"),
        (lambda t, m: t.update({"norm.weight": t["norm.weight"].reshape(2, 4)}), "not what was stored"),
        (lambda t, m: _header(m, sha256={}), "one SHA-256 for each tensor"),
        (lambda t, m: _header(m, sha256=[]), "damaged trapetum header"),
        (lambda t, m: _header(m, sha257={}), "unknown field sha257"),
        (lambda t, m: t.update({"late.bias": torch.zeros(1)}), "one SHA-256 for each tensor"),
    ],
)
def test_hashes_find_what_was_changed(saved, change, words):
    path, _, _ = saved
    edit_header(path, change, signed=False)
    with pytest.raises(FormatError, match=words):
        formats.load(path)


def test_files_without_hashes_still_load(saved):
    path, weights, _ = saved
    edit_header(
        path,
        lambda t, m: _set(m, {k: v for k, v in json.loads(m["trapetum"]).items() if k != "sha256"}),
        False,
    )
    assert formats.load(path).weights.keys() == weights.keys()


def test_save_returns_the_hash_of_all_hashes(saved, tmp_path):
    path, weights, extra = saved
    assert formats.save(tmp_path / "again", weights, extra) == formats.save(
        tmp_path / "third", weights, extra
    )
    with TensorFile(path) as file:
        digests = {name: digest(file.read(name)) for name in file.entries}
    assert combined(digests) == formats.save(tmp_path / "again", weights, extra)
    assert combined(digests) != combined(digests | {"norm.weight": digests["short.codes"]})


def test_a_hash_is_of_dtype_shape_and_bytes():
    """Written out by the definition, for a tensor whose bytes are known."""
    expected = hashlib.sha256(b"F16 [1, 2]\n" + b"\x00\x3c\x00\xc0").hexdigest()
    assert digest(torch.tensor([[1.0, -2.0]]).half()) == expected


def written(folder, header: bytes, data: bytes):
    path = folder / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def entry(name, start, stop):
    return f'"{name}": {{"dtype": "U8", "shape": [{stop - start}], "data_offsets": [{start}, {stop}]}}'


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([entry("a", 0, 3), entry("b", 4, 6)], "b does not begin where the one before it ends"),  # a gap
        ([entry("a", 0, 4), entry("b", 2, 6)], "b does not begin where the one before it ends"),  # an overlap
        (
            [entry("a", 0, 6), entry("b", 0, 6)],
            "does not begin where the one before it ends",
        ),  # one place for two
        ([entry("a", 1, 6)], "a does not begin where the one before it ends"),
        ([entry("a", 0, 5)], "1 bytes behind the last tensor"),
        ([entry("a", 0, 7)], "a has offsets outside the 6 bytes"),
        ([entry("a", 0, 6), entry("a", 0, 6)], "'a' stands in it twice"),
        ([entry("a", 0, 6), '"__metadata__": {"x": "1", "x": "1"}'], "'x' stands in it twice"),
    ],
)
def test_tensors_lie_end_to_end_each_once(tmp_path, entries, words):
    with pytest.raises(FormatError, match=words):
        TensorFile(written(tmp_path, f"{{{', '.join(entries)}}}".encode(), b"abcdef"))


def test_a_file_of_others_is_read_as_it_is(tmp_path):
    header = f"{{{entry('b', 2, 6)}, {entry('a', 0, 2)}, {entry('none', 6, 6)}}}   ".encode()
    with TensorFile(written(tmp_path, header, b"abcdef")) as file:
        assert [bytes(file.read(name).tolist()) for name in ("a", "b", "none")] == [b"ab", b"cdef", b""]


@settings(deadline=None, max_examples=60)
@given(data=st.binary(max_size=200))
def test_load_survives_any_bytes(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data)
    with pytest.raises(FormatError):
        formats.load(path)
