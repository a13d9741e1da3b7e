"""A thousand damaged or hostile copies of a quantized directory: each is the same model, or one sentence says what is wrong.

`test_damage` changes a directory as disks, networks, editors and people do; its hashes are left as they are, so whatever
loads must be the model that was saved. `test_malice` signs its changes, or strips the hashes: what loads may be another
model, and nothing else may happen. In both, no exception but the package's own, no pickle opened, no memory, no hang.
"""

import copy
import json
import os
import pickle
import random
import shutil
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trapetum import additive, models, swap
from trapetum.additive_linear import AdditiveLinear
from trapetum.checkpoint import ModelError, config_digest
from trapetum.formats import FormatError
from trapetum.shapes import MODELS
from trapetum.tensor_files import DTYPES, combined, digest

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
ROOM = 100e6  # bytes that all loads of a test may add to the process' peak
SECONDS = 5  # for one load; it takes some 10 ms


class Files(dict):
    """The contents of a directory by file name: bytes, a `Path` for a symbolic link, or a word for another thing."""

    def header(self) -> dict:
        length = struct.unpack("<Q", self[WEIGHTS][:8])[0]
        return json.loads(self[WEIGHTS][8 : 8 + length])

    def data(self) -> bytes:
        return self[WEIGHTS][8 + struct.unpack("<Q", self[WEIGHTS][:8])[0] :]

    def put_header(self, header: dict | bytes, data: bytes | None = None) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        data = self.data() if data is None else data
        self[WEIGHTS] = struct.pack("<Q", len(text)) + text + data

    def config(self) -> dict:
        return json.loads(self[CONFIG])

    def put_config(self, config) -> None:
        self[CONFIG] = json.dumps(config).encode()


def dense():
    small = dict(hidden=16, intermediate=24, heads=2, kv_heads=1, head_dim=8, vocab=32)
    shape = replace(MODELS["llama-tiny"], layers=1, biases=("q_proj", "k_proj", "v_proj", "o_proj"), **small)
    return models.random_model(shape, dtype=torch.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A quantized directory: codes that do not use all of their bits, two schemes, biases, a quantized head."""
    model = dense()
    models.quantize_model(model, bits=4, n_codes=11, progress=False)
    models.randomize_codes(model, bits=3, lm_head=True)
    return models.save(model, None, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="module")
def files(saved):
    return Files({path.name: path.read_bytes() for path in saved.iterdir()})


def described(model) -> dict:
    return {
        "config": {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"},
        "quantization": model.config.quantization_config.to_dict(),
        "made": model.trapetum_quantization,
    }


def same(model, other) -> bool:
    left, right = model.state_dict(), other.state_dict()
    alike = left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )
    return alike and described(model) == described(other)


@pytest.fixture(scope="module")
def original(saved):
    return models.load(str(saved)).model


@pytest.fixture(autouse=True)
def no_pickles(monkeypatch):
    """Every way into a pickle fails the test, also where somebody catches what it raises."""
    opened = []

    def refuse(*arguments, **options):
        opened.append(arguments)
        raise AssertionError("a pickle was opened")

    for place, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(place, name, refuse)
    yield
    assert opened == []


def peak() -> int:
    """Peak resident bytes since `reset_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return 1024 * int(line.split()[1])


@pytest.fixture(autouse=True)
def little_memory(original):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    yield
    assert peak() - before < ROOM


def write(folder: Path, changed: Files) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in changed.items():
        place = folder / name
        if isinstance(content, Path):
            place.symlink_to(content)
        elif content == "directory":
            place.mkdir()
        elif content == "fifo":
            os.mkfifo(place)
        else:
            place.write_bytes(content)
    return folder


def outcome(folder: Path):
    """The loaded model, or the sentence that refuses it."""
    start = time.perf_counter()
    try:
        result = models.load(str(folder)).model
    except (ModelError, FormatError) as error:
        result = str(error)
        assert result.endswith(".") and result.isprintable() and 20 < len(result) < 700, result
    assert time.perf_counter() - start < SECONDS
    return result


# --- changes: (random, files) -> None, in place ----------------------------------------------------------------------


def cut(rng, files):
    name = rng.choice([WEIGHTS, WEIGHTS, CONFIG])
    files[name] = files[name][: rng.randrange(len(files[name]))]


def padded(rng, files):
    name = rng.choice([WEIGHTS, WEIGHTS, CONFIG])
    more = rng.randbytes(rng.choice([1, 7, 64, 4096]))
    files[name] += rng.choice([more, bytes(len(more)), b" " * len(more)])


def inserted(rng, files):
    name = rng.choice([WEIGHTS, CONFIG])
    at = rng.randrange(len(files[name]))
    files[name] = files[name][:at] + rng.randbytes(rng.randrange(1, 9)) + files[name][at:]


def _flip(content: bytes, rng, start: int, stop: int) -> bytes:
    changed, at = bytearray(content), rng.randrange(start, stop)
    changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flipped_in_data(rng, files):
    whole = files[WEIGHTS]
    files[WEIGHTS] = _flip(whole, rng, len(whole) - len(files.data()), len(whole))


def flipped_in_header(rng, files):
    files[WEIGHTS] = _flip(files[WEIGHTS], rng, 0, len(files[WEIGHTS]) - len(files.data()))


def flipped_in_config(rng, files):
    files[CONFIG] = _flip(files[CONFIG], rng, 0, len(files[CONFIG]))


def zeroed(rng, files):
    """A page that never reached the disk."""
    changed = bytearray(files[WEIGHTS])
    at = rng.randrange(0, len(changed), 64)
    changed[at : at + 64] = bytes(len(changed[at : at + 64]))
    files[WEIGHTS] = bytes(changed)


def _tensors(header) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def swapped(rng, files):
    """Offsets, dtypes or shapes of two tensors change places."""
    header = files.header()
    one, other = rng.sample(_tensors(header), 2)
    for part in rng.choice([["data_offsets"], ["shape"], ["dtype"], ["data_offsets", "shape", "dtype"]]):
        header[one][part], header[other][part] = header[other][part], header[one][part]
    files.put_header(header)


def renamed(rng, files):
    header = files.header()
    name = rng.choice(_tensors(header))
    hostile = [
        "",
        "\n",
        "\x00",
        "../../etc/passwd",
        "__class__",
        "a" * 10000,
        "\udcff",
        "\u202e",
        "model..",
        "lm_head.",
    ]
    header[rng.choice([*hostile, *(_tensors(header))])] = header.pop(name)
    files.put_header(header)


def doubled(rng, files):
    """A name stands in the header twice: with its own place or with another tensor's."""
    header = files.header()
    one, other = (rng.choice(_tensors(header)) for _ in range(2))
    text = json.dumps(header)[:-1] + f", {json.dumps(one)}: {json.dumps(header[other])}" + "}"
    files.put_header(text.encode())


NUMBERS = [-1, -(2**63), 0, 1, 2**31, 2**32 + 1, 2**63, 2**64, 10**400, 1.5, 1e999, True, None, "7", [], {}]


def misnumbered(rng, files):
    """A size or an offset that is negative, huge, fractional or no number."""
    header = files.header()
    entry = header[rng.choice(_tensors(header))]
    part = rng.choice(["shape", "data_offsets"])
    entry[part][rng.randrange(len(entry[part]))] = rng.choice(NUMBERS)
    files.put_header(header)


def misshapen(rng, files):
    header = files.header()
    entry = header[rng.choice(_tensors(header))]
    shapes = [[], [0], [0, 2**40], [2**40, 2**40], [1] * 40, [-1, -1], [[1]], None, "4", [entry["shape"]]]
    entry["shape"] = rng.choice([*shapes, entry["shape"][::-1], [1, *entry["shape"]]])
    files.put_header(header)


def mistyped(rng, files):
    header = files.header()
    entry = header[rng.choice(_tensors(header))]
    entry["dtype"] = rng.choice([*DTYPES, "F8_E4M3", "float16", "", None, 3, ["F16"], "O"])
    files.put_header(header)


def undescribed(rng, files):
    header = files.header()
    name = rng.choice(_tensors(header))
    if rng.random() < 0.5:
        header[name].pop(rng.choice(list(header[name])))
    else:
        header[name] = rng.choice([None, [], 3, "x", header[name] | {"more": 1}])
    files.put_header(header)


def lost(rng, files):
    header = files.header()
    header.pop(rng.choice(list(header)))
    files.put_header(header)


def added(rng, files):
    header, data = files.header(), files.data()
    name = rng.choice(["model.layers.7.mlp.up_proj.codes", "x", "lm_head.weight", "model.embed_tokens.bias"])
    header[name] = {"dtype": "U8", "shape": [3], "data_offsets": [len(data), len(data) + 3]}
    files.put_header(header, data + b"abc")


def header_of_another_kind(rng, files):
    deep = rng.choice([b"[", b'{"a":']) * 100_000
    texts = [
        deep,
        b"[]",
        b"3",
        b"null",
        b'"x"',
        b"{",
        b"",
        b"\xff\xfe",
        b"{}",
        b'{"__metadata__": 3}',
        b"1" * 5000,
    ]
    files.put_header(rng.choice(texts))


def header_of_another_length(rng, files):
    length = rng.choice([0, 1, 7, 2**20, 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(5000)])
    files[WEIGHTS] = struct.pack("<Q", length) + files[WEIGHTS][8:]


def described_otherwise(rng, files):
    """The package's own entry in the header."""
    header = files.header()
    own = json.loads(header["__metadata__"]["trapetum"])
    name = rng.choice(list(own["weights"]))
    changes = [
        lambda: own.update(version=rng.choice([0, 2, "1", None, [1]])),
        lambda: own["weights"].pop(name),
        lambda: own["weights"].update({rng.choice(["x", "lm_head ", "model"]): own["weights"][name]}),
        lambda: own["weights"][name].update(bits=rng.choice([2, 3, 8, 5, -4, 2**70, "4", 4.0, None])),
        lambda: own["weights"][name].update(in_features=rng.choice([0, 1, 15, 2**70, "16", None])),
        lambda: own["sha256"].pop(rng.choice(list(own["sha256"]))),
        lambda: own["sha256"].update({rng.choice(list(own["sha256"])): rng.choice(["", "0" * 64, None, 3])}),
        lambda: own.update(weights=rng.choice([[], None, 3, {"x": 3}])),
        lambda: own.pop("sha256"),
        lambda: own.update(more=1),
    ]
    rng.choice(changes)()
    texts = [json.dumps(own)] * 8 + ["[" * 100_000, "null", "", "{"]
    header["__metadata__"]["trapetum"] = rng.choice(texts)
    files.put_header(header)


def _change(fields: dict, rng) -> None:
    """One value somewhere in a JSON object: another number, type or depth, gone, or with a new neighbour."""
    key = rng.choice(list(fields))
    if isinstance(fields[key], dict) and fields[key] and rng.random() < 0.8:
        return _change(fields[key], rng)
    value, how = fields[key], rng.randrange(5)
    if how == 0:
        fields.pop(key)
    elif how == 1:
        fields[rng.choice(["group_size", "auto_map", "x", "num_experts", "attn_implementation"])] = (
            "kernels/evil"
        )
    elif how == 2 and type(value) in (int, float):
        fields[key] = rng.choice(
            [-value, value + 1, value * 2, value * 10**9, value / 3, str(value), [value]]
        )
    else:
        deep = []
        for _ in range(500):
            deep = [deep]
        fields[key] = rng.choice([*NUMBERS, deep, "../..", "x" * 5000, {"a": 1}, ["a"]])


def configured_otherwise(rng, files):
    config = files.config()
    _change(config, rng)
    files.put_config(config)


def quantized_otherwise(rng, files):
    config = files.config()
    _change(config["quantization_config"], rng)
    files.put_config(config)


def config_of_another_kind(rng, files):
    deep = rng.choice([b"[", b'{"a":']) * 100_000
    files[CONFIG] = rng.choice(
        [deep, b"[]", b"3", b"null", b"", b"\xff", b"{}", b'{"model_type": "llama"}', b"1" * 5000]
    )


def index_that_leads_elsewhere(rng, files):
    """No single file, and an index that names paths, links, pickles, or what is not there."""
    weights = files.pop(WEIGHTS)
    names = [
        "../model.safetensors",
        "/etc/passwd",
        "..",
        "",
        ".",
        "deep/x.safetensors",
        "pytorch_model.bin",
        "gone.safetensors",
    ]
    names += [
        "a\x00.safetensors",
        "\udcff.safetensors",
        "C:\\x.safetensors",
        "a" * 5000 + ".safetensors",
        "whole.safetensors",
    ]
    files["whole.safetensors"] = weights
    file = rng.choice(names)
    places = {name: "whole.safetensors" for name in _tensors(Files({WEIGHTS: weights}).header())}
    if rng.random() < 0.5:
        places[rng.choice([*places, "x"])] = file
    else:
        places = dict.fromkeys(places, file)
    text = json.dumps({"metadata": {}, "weight_map": places}).encode()
    files[INDEX] = rng.choice([text] * 6 + [b"[" * 100_000, text[:-1], b"{}"])


def pickled(rng, files):
    """A pickle that would act when it is opened, under every name."""
    bomb = b"cos\nsystem\n(S'echo opened'\ntR."
    zipped = b"PK\x03\x04" + bytes(60) + bomb
    how = rng.randrange(4)
    if how == 0:
        files[WEIGHTS] = rng.choice([bomb, zipped])
    elif how == 1:
        files["pytorch_model.bin"] = rng.choice([bomb, zipped])
    elif how == 2:
        del files[WEIGHTS]
        files[rng.choice(["pytorch_model.bin", "model.pt", "model.safetensors.bin", "x.safetensors"])] = bomb
    else:
        del files[WEIGHTS]
        files["pytorch_model.bin"] = bomb
        files["pytorch_model.bin.index.json"] = json.dumps(
            {"weight_map": {"x": "pytorch_model.bin"}}
        ).encode()
        files["adapter.safetensors"] = files.get("adapter.safetensors", b"")


def other_things(rng, files):
    """Not a file at all: gone, a directory, a pipe, a link to itself, to a device, or outwards to a file that is no model."""
    name = rng.choice([WEIGHTS, CONFIG])
    links = [
        Path(name),
        Path("/dev/zero"),
        Path("/dev/urandom"),
        Path("/etc/hostname"),
        Path("nowhere"),
        Path(".."),
    ]
    what = rng.choice(["gone", "directory", "fifo", b"", *links])
    if what == "gone":
        del files[name]
    else:
        files[name] = what


DAMAGE = [
    cut,
    padded,
    inserted,
    flipped_in_data,
    flipped_in_header,
    flipped_in_config,
    zeroed,
    swapped,
    renamed,
    doubled,
]
DAMAGE += [
    misnumbered,
    misshapen,
    mistyped,
    undescribed,
    lost,
    added,
    header_of_another_kind,
    header_of_another_length,
]
DAMAGE += [described_otherwise, configured_otherwise, quantized_otherwise, config_of_another_kind]
DAMAGE += [index_that_leads_elsewhere, pickled, other_things]
EACH = 40


def test_the_directory_itself_loads(tmp_path, files, original):
    assert same(outcome(write(tmp_path / "model", copy.deepcopy(files))), original)


@pytest.mark.parametrize("change", DAMAGE, ids=lambda change: change.__name__)
def test_damage(tmp_path, files, original, change):
    refused = 0
    for seed in range(EACH):
        changed = copy.copy(files)
        change(random.Random(f"{change.__name__} {seed}"), changed)
        result = outcome(write(tmp_path / "model", changed))
        refused += isinstance(result, str)
        assert isinstance(result, str) or same(result, original), f"seed {seed} loads another model"
    assert refused > 0


# --- the same by somebody who can compute hashes, or who takes them away -------------------------------------------


def sign(files: Files) -> None:
    """Make all hashes those of what the files now hold, where that can be read at all."""
    try:
        header, data, config = files.header(), files.data(), files.config()
        own = json.loads(header["__metadata__"]["trapetum"])
        own["sha256"] = {name: _digest(header[name], data) for name in _tensors(header)}
        header["__metadata__"]["trapetum"] = json.dumps(own)
        files.put_header(header, data)
        hashes = {"weights": combined(own["sha256"]), "config": config_digest(config)}
        config["quantization_config"]["sha256"] = hashes
        files.put_config(config)
    except Exception:  # what cannot be read cannot be signed; it is tried as it is
        pass


def _digest(entry: dict, data: bytes) -> str:
    start, stop = entry["data_offsets"]
    raw = torch.frombuffer(bytearray(data[start:stop]), dtype=torch.uint8)
    return digest(raw.view(DTYPES[entry["dtype"]]).reshape(entry["shape"]))


def strip(files: Files) -> None:
    """Take the hashes away: a directory of before there were any."""
    try:
        header, config = files.header(), files.config()
        own = json.loads(header["__metadata__"]["trapetum"])
        own.pop("sha256", None)
        header["__metadata__"]["trapetum"] = json.dumps(own)
        config["quantization_config"].pop("sha256", None)
        files.put_header(header)
        files.put_config(config)
    except Exception:  # as above
        pass


MALICE = [
    cut,
    flipped_in_data,
    flipped_in_header,
    flipped_in_config,
    swapped,
    renamed,
    misnumbered,
    misshapen,
    mistyped,
]
MALICE += [lost, added, described_otherwise, configured_otherwise, quantized_otherwise]


@pytest.mark.parametrize("change", MALICE, ids=lambda change: change.__name__)
def test_malice(tmp_path, files, change):
    for seed in range(24):
        rng, changed = random.Random(f"malice {change.__name__} {seed}"), copy.copy(files)
        change(rng, changed)
        rng.choice([sign, strip])(changed)
        result = outcome(write(tmp_path / "model", changed))
        assert isinstance(result, str) or all(p.isfinite().all() for p in result.parameters())


def _with_outliers():
    model = dense()
    models.quantize_model(model, bits=4, progress=False, outliers=0.02)
    return model


def _with_additive_layers():
    model, generator = dense(), torch.Generator().manual_seed(0)
    for name, layer in swap.linears(model):
        weight = additive.random(layer.out_features, layer.in_features, 2, generator)
        swap.replace(model, name, AdditiveLinear.from_weight(weight, layer.bias))
    return model


FORMAT = [
    cut,
    flipped_in_data,
    flipped_in_header,
    swapped,
    renamed,
    misnumbered,
    misshapen,
    mistyped,
    undescribed,
    lost,
]


@pytest.mark.parametrize("make", [_with_outliers, _with_additive_layers], ids=["outliers", "additive"])
def test_damage_and_malice_in_other_layers(tmp_path, make):
    """They have tensors of their own: values, columns and rows kept apart, or vectors and scales."""
    saved = models.save(make(), None, tmp_path / "saved")
    files, whole = Files({p.name: p.read_bytes() for p in saved.iterdir()}), models.load(str(saved)).model
    for change in [*FORMAT, quantized_otherwise]:
        for seed in range(8):
            rng, changed = random.Random(f"{change.__name__} {seed}"), copy.copy(files)
            change(rng, changed)
            result = outcome(write(tmp_path / "model", changed))
            assert isinstance(result, str) or same(result, whole), f"{change.__name__}, seed {seed}"
            rng.choice([sign, strip])(changed)
            outcome(write(tmp_path / "model", changed))


SIZES = [
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "head_dim",
]


@pytest.mark.parametrize("size", [10**7, 2**31 - 1, 2**62])
@pytest.mark.parametrize("field", SIZES)
def test_sizes_that_no_memory_holds_are_refused_before_anything_is_made(tmp_path, files, field, size):
    """By somebody who signs them; a model of so many layers would take minutes to make, even without memory."""
    changed = copy.copy(files)
    changed.put_config(files.config() | {field: size})
    sign(changed)
    assert isinstance(outcome(write(tmp_path / "model", changed)), str)


def poisoned(files: Files, name: str, value: bytes, seal) -> Files:
    """The tensor `name` filled with `value`."""
    changed = copy.copy(files)
    header, data = changed.header(), bytearray(changed.data())
    start, stop = header[name]["data_offsets"]
    data[start:stop] = (value * (stop - start))[: stop - start]
    changed.put_header(header, bytes(data))
    seal(changed)
    return changed


POISON = [
    ("model.layers.0.mlp.up_proj.codebook", struct.pack("<e", float("nan")), "NaN or infinite"),
    ("lm_head.codebook", struct.pack("<e", float("inf")), "NaN or infinite"),
    ("model.layers.0.mlp.up_proj.codes", b"\xbb", "code 11 is out of range"),
    ("model.norm.weight", struct.pack("<f", float("nan")), "NaN or infinite"),
    ("model.layers.0.self_attn.q_proj.bias", struct.pack("<f", float("inf")), "NaN or infinite"),
]


@pytest.mark.parametrize("seal", [sign, strip], ids=["signed", "without hashes"])
@pytest.mark.parametrize(("name", "value", "words"), POISON, ids=[name for name, _, _ in POISON])
def test_values_are_checked_whoever_signs_them(tmp_path, files, name, value, words, seal):
    result = outcome(write(tmp_path / "model", poisoned(files, name, value, seal)))
    assert isinstance(result, str) and words in result and name.rpartition(".")[0] in result


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "lm_head.codes", "model.layers.0.self_attn.v_proj.codebook"]
)
def test_a_changed_tensor_is_named(tmp_path, files, name):
    result = outcome(write(tmp_path / "model", poisoned(files, name, b"\x11", lambda files: None)))
    assert isinstance(result, str) and name in result and "SHA-256" in result


def test_directories_without_hashes_load(tmp_path, files, original):
    strip(old := copy.copy(files))
    assert same(outcome(write(tmp_path / "model", old)), original)


def test_a_config_changed_on_purpose_loads_without_its_hash(tmp_path, files):
    changed, config = copy.copy(files), files.config()
    config["max_position_embeddings"] //= 2
    changed.put_config(config)
    assert "delete sha256" in outcome(write(tmp_path / "model", changed))
    del config["quantization_config"]["sha256"]
    changed.put_config(config)
    loaded = outcome(write(tmp_path / "model", changed))
    assert loaded.config.max_position_embeddings == config["max_position_embeddings"]


def test_weights_of_another_directory_are_refused(tmp_path, files, saved):
    """Whole, with good hashes, and of the right shapes."""
    model = models.load(str(saved)).model
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    other = models.save(model, None, tmp_path / "other")
    changed = copy.copy(files)
    changed[WEIGHTS] = (other / WEIGHTS).read_bytes()
    assert "config.json was written with" in outcome(write(tmp_path / "model", changed))


@pytest.mark.parametrize(
    "change", [flipped_in_data, zeroed, swapped, configured_otherwise], ids=lambda c: c.__name__
)
def test_transformers_refuses_the_same_damage(tmp_path, files, original, change):
    """By the hook that it gives: any exception will do, a changed model will not."""
    from transformers import AutoModelForCausalLM

    for seed in range(4):
        changed = copy.copy(files)
        change(random.Random(seed), changed)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                write(tmp_path / "model", changed), use_safetensors=True
            )
        except Exception:
            continue
        assert same(model, original)
