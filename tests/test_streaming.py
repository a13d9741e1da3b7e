"""Checkpoints quantized while they are read: the same codes as dense first, little memory, and every damage by sentence."""

import json
import os
import subprocess
import sys
import textwrap
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from trapetum import models, shards, streaming
from trapetum.checkpoint import ModelError
from trapetum.models import QuantizeSpec
from trapetum.shapes import MODELS, ModelShape
from trapetum.swap import linears, quantized_layer

RTN = QuantizeSpec(4, "rtn")
UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def tiny(seed=0, dtype=torch.float32, **config):
    return models.random_model(MODELS["llama-tiny"], dtype=dtype, seed=seed, **config)


@pytest.fixture
def single(tmp_path):
    """A directory with one file."""
    tiny().save_pretrained(tmp_path / "single")
    return tmp_path / "single"


@pytest.fixture
def sharded(tmp_path):
    """A directory with several files and their index."""
    tiny().save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    return tmp_path / "sharded"


def assert_same(one, other):
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


def refusal(folder, spec=RTN, **options) -> str:
    with pytest.raises(ModelError) as message:
        models.load(str(folder), quantize=spec, **options)
    text = str(message.value)
    assert str(folder) in text and "\n" not in text and text.endswith(".")
    return text


# The same as dense first


@pytest.mark.parametrize("method", ["rtn", "lloyd", "kmeans", "nf4"])
@pytest.mark.parametrize("dtype", [None, "fp16", "bf16", "fp32"])
def test_codes_equal_those_of_the_dense_way(sharded, method, dtype):
    streamed = models.load(str(sharded), dtype=dtype, quantize=QuantizeSpec(4, method))
    whole = models.load(str(sharded), dtype=dtype)
    report = models.quantize_model(whole.model, 4, method, progress=False)
    assert_same(streamed.model, whole.model)
    assert streamed.report.errors == report.errors and streamed.report.method == report.method
    assert (streamed.report.bits, streamed.report.n_codes, streamed.kind) == (4, 16, "directory")
    assert streamed.shape == whole.shape and streamed.model.config.dtype == whole.model.config.dtype
    rotary = [m.model.rotary_emb.inv_freq for m in (streamed.model, whole.model)]
    assert torch.equal(*rotary)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stated", [True, False])
def test_the_dtype_of_a_checkpoint_is_its_own(tmp_path, stored, stated):
    tiny(dtype=stored).save_pretrained(tmp_path)
    if not stated:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(
            json.dumps({k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")})
        )
    streamed, whole = models.load(str(tmp_path), quantize=RTN), models.load(str(tmp_path))
    assert streamed.model.dtype == whole.model.dtype == stored
    models.quantize_model(whole.model, 4, "rtn", progress=False)
    assert_same(streamed.model, whole.model)


@pytest.mark.parametrize(
    "spec", [QuantizeSpec(3, "rtn"), QuantizeSpec(8, "rtn", n_codes=64), QuantizeSpec(2)]
)
@pytest.mark.parametrize("lm_head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_heads_tied_and_own(tmp_path, spec, lm_head, tied):
    tiny(tie_word_embeddings=tied).save_pretrained(tmp_path)
    spec = QuantizeSpec(spec.bits, spec.method, spec.n_codes, lm_head)
    streamed, whole = models.load(str(tmp_path), quantize=spec).model, models.load(str(tmp_path)).model
    models.quantize_model(whole, spec.bits, spec.method, spec.n_codes, lm_head, progress=False)
    assert_same(streamed, whole)
    assert models.weight_bytes(streamed) == models.weight_bytes(whole)
    if tied and not lm_head:
        assert streamed.lm_head.weight is streamed.model.embed_tokens.weight


def test_what_is_saved_is_the_same_too(sharded, tmp_path):
    streamed = models.load(str(sharded), quantize=RTN)
    whole = models.load(str(sharded))
    models.quantize_model(whole.model, 4, "rtn", progress=False)
    folders = [models.save(m.model, None, tmp_path / n) for m, n in ((streamed, "one"), (whole, "two"))]
    for name in ("config.json", "generation_config.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    one, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((folders[0] / "config.json").read_text())["quantization_config"]["method"] == "rtn"


def test_the_built_in_model_streams_with_its_tokenizer():
    streamed, whole = models.load("builtin", quantize=RTN), models.load("builtin")
    models.quantize_model(whole.model, 4, "rtn", progress=False)
    assert_same(streamed.model, whole.model)
    assert streamed.kind == "builtin" and streamed.tokenizer("Return").input_ids


def test_one_file_is_as_good_as_several(single, sharded):
    assert_same(models.load(str(single), quantize=RTN).model, models.load(str(sharded), quantize=RTN).model)


def test_nothing_of_the_model_stays_in_the_file(single):
    """The file may be replaced or deleted afterwards: all that is kept was copied out of it."""
    streamed = models.load(str(single), quantize=RTN).model
    before = {name: tensor.clone() for name, tensor in streamed.state_dict().items()}
    with open(single / "model.safetensors", "r+b") as file:
        size = (single / "model.safetensors").stat().st_size
        file.seek(size // 3)
        file.write(b"\0" * (size - size // 3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in streamed.state_dict().items())


def test_stored_rope_frequencies_of_old_checkpoints_are_left_out(single):
    tensors = load_file(single / "model.safetensors")
    expected = models.load(str(single), quantize=RTN).model
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
    assert_same(models.load(str(single), quantize=RTN).model, expected)


def test_a_tied_head_that_is_stored_again_must_be_the_embedding(tmp_path):
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path)
    expected = models.load(str(tmp_path), quantize=RTN).model
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(models.load(str(tmp_path), quantize=RTN).model, expected)
    tensors["lm_head.weight"][200, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "tie_word_embeddings to false" in refusal(tmp_path)
    tensors["lm_head.weight"] = torch.zeros(3, 64)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "another lm_head.weight" in refusal(tmp_path)


def test_progress_counts_bytes(sharded, capsys):
    models.load(str(sharded), quantize=RTN, progress=True)
    told = capsys.readouterr().err
    assert "read and quantize to 4 bits: 100%" in told and "B/s" in told
    models.load(str(sharded), quantize=RTN)
    assert "quantize" not in capsys.readouterr().err


# Memory


def test_one_dense_layer_at_a_time(sharded, monkeypatch):
    """Weights of linears that are alive whenever another is read."""
    alive: dict[str, weakref.ref] = {}
    most, read = [0], shards.Shards.read

    def counted(self, name, device="cpu"):
        living = [n for n, tensor in alive.items() if tensor() is not None]
        most[0] = max(most[0], len(living))
        tensor = read(self, name, device)
        if "proj" in name:
            alive[name] = weakref.ref(tensor)
        return tensor

    monkeypatch.setattr(shards.Shards, "read", counted)
    models.load(str(sharded), quantize=RTN)
    assert len(alive) == 14 and most[0] == 0


_PEAK = """
    import sys
    from pathlib import Path
    import torch
    from trapetum import models
    import transformers.models.llama.modeling_llama  # would be imported while loading

    def peak():  # not ru_maxrss, which a process takes over from its parent
        status = Path("/proc/self/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))

    torch.set_num_threads(1)
    models.quantize_model(models.load("random:llama-tiny").model, 4, "rtn", progress=False)
    before = peak()
    model = models.load(sys.argv[1], quantize=models.QuantizeSpec(4, "rtn")).model
    print(peak() - before, models.weight_bytes(model))
"""
_MIDDLE = ModelShape("middle", 512, 8, 1536, 8, 8, 64, 512)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_resident_memory_stays_near_the_quantized_size(tmp_path):
    """In a fresh process; blocks of 64 KiB go back to the system when freed, as the larger ones of real layers do."""
    models.random_model(_MIDDLE, dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="20MB")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_PEAK), str(tmp_path)],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    grown, size = map(int, done.stdout.split())
    dense, layer = 4 * _MIDDLE.parameters, 4 * 512 * 1536
    assert size < 0.2 * dense and size < grown
    assert grown < size + 14 * layer  # quantizing one layer takes a few copies of it, in float32 and float64
    assert grown < 0.6 * dense


def working_bytes(weight, spec) -> int:
    """What quantizing one weight takes at most on its GPU, the weight and its codes included."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    quantized_layer(weight, None, spec.bits, spec.method, spec.n_codes)
    return torch.cuda.max_memory_allocated() - before + weight.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["rtn", "kmeans"])
def test_gpu_memory_stays_near_the_quantized_size(tmp_path, method):
    """The quantized model, and what quantizing its largest layer takes."""
    shape, spec = ModelShape("wide", 2048, 12, 5632, 32, 8, 64, 32000), QuantizeSpec(4, method)
    whole = models.random_model(shape, "cuda", torch.float16)
    whole.save_pretrained(tmp_path, max_shard_size="300MB")
    largest = max(working_bytes(layer.weight, spec) for _, layer in linears(whole)[:7])
    models.quantize_model(whole, 4, method, progress=False)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    streamed = models.load(str(tmp_path), "cuda", quantize=spec)
    grown = torch.cuda.max_memory_allocated() - before
    assert_same(streamed.model, whole)
    size = models.weight_bytes(streamed.model)
    assert size < 0.45 * 2 * shape.parameters and size < grown
    assert grown < 1.05 * size + largest


@pytest.mark.gpu
def test_gpu_codes_of_a_bias_and_a_tied_head(tmp_path):
    """On the device from the start: nothing is left behind on the host or on meta."""
    shape = replace(MODELS["qwen2-0.5b"], layers=2, vocab=4096)
    models.random_model(shape, "cuda", torch.bfloat16).save_pretrained(tmp_path, max_shard_size="10MB")
    streamed = models.load(str(tmp_path), "cuda", quantize=QuantizeSpec(4, "lloyd")).model
    tensors = [*streamed.parameters(), *streamed.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight
    whole = models.load(str(tmp_path), "cuda").model
    models.quantize_model(whole, 4, "lloyd", progress=False)
    assert_same(streamed, whole)


# What is refused


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (QuantizeSpec(4, "magic"), "no quantization method 'magic'"),
        (QuantizeSpec(5), "does not make 5-bit codes"),
        (QuantizeSpec(3, "nf4"), "does not make 3-bit codes"),
        (QuantizeSpec(2, n_codes=5), "n_codes is 5"),
        (QuantizeSpec(4, "kmeans-weighted"), "needs calibration on the whole model"),
    ],
)
@pytest.mark.parametrize("name", ["builtin", "random:llama-tiny", "no/where/at/all", "owner/never-asked-for"])
def test_a_scheme_is_refused_before_anything_is_read(name, spec, words):
    with pytest.raises(ValueError, match=words):
        models.load(name, quantize=spec)


def test_bits_and_quantize_are_two_things():
    with pytest.raises(ModelError, match="give one of the two"):
        models.load("random:llama-tiny", bits=4, quantize=RTN)


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path):
    model = tiny()
    models.quantize_model(model, 4, "rtn", progress=False)
    assert "is quantized already" in refusal(models.save(model, None, tmp_path / "codes"))


def test_weights_that_are_not_numbers_are_named(single):
    tensors = load_file(single / "model.safetensors")
    tensors[UP][3, 4] = float("nan")
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{UP} holds 1 NaN and 0 infinite"):
        models.load(str(single), quantize=RTN)
    tensors[UP][3, 4] = 0
    tensors["model.norm.weight"][5] = float("inf")
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="model.norm.weight holds NaN or infinite"):
        models.load(str(single), quantize=RTN)


def rewrite(folder, change):
    """Rewrite the single file of `folder` after `change` had its way with the tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(UP), f"lacks 1 tensors, {UP} among them"),
        (lambda t: t.pop("model.norm.weight"), "lacks 1 tensors, model.norm.weight"),
        (lambda t: t.pop("lm_head.weight"), "lacks 1 tensors, lm_head.weight"),
        (lambda t: t.update(extra=torch.zeros(3)), "holds 1 tensors that its config.json has no place for, extra"),
        (
            lambda t: t.update({UP.replace("weight", "bias"): torch.zeros(160)}),
            "no place for, model.layers.1.mlp.up_proj.bias",
        ),
        (lambda t: t.update({UP: t[UP].T.contiguous()}), f"{UP} as [64, 160], and config.json asks for [160, 64]"),
        (lambda t: t.update({UP: t[UP].flatten()}), f"{UP} as [10240], and config.json asks for [160, 64]"),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), f"{UP} in I8; trapetum reads F64, F32, F16, BF16"),
        (lambda t: t.update({EMBEDDING: t[EMBEDDING].to(torch.float8_e4m3fn)}), "in F8_E4M3; trapetum reads"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_the_models(single, change, words):
    rewrite(single, change)
    assert words in refusal(single)


def test_files_cut_short_or_foreign(sharded):
    path = sorted(sharded.glob("model-*"))[1]
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:50], b"", b"x" * 500, b"\0" * 500):
        path.write_bytes(damaged)
        text = refusal(sharded)
        assert f"{path} ({len(damaged)} bytes) is truncated or not a safetensors file" in text
    path.unlink()
    assert f"lacks 1 of {len(list(sharded.glob('model-*'))) + 1} shards, {path.name}" in refusal(sharded)


def test_a_file_that_vanishes_while_it_is_read(sharded, monkeypatch):
    original = streaming.fill

    def late(model, read, spec, progress):
        sorted(sharded.glob("model-*"))[-1].unlink()
        return original(model, read, spec, progress)

    monkeypatch.setattr(streaming, "fill", late)
    assert "cannot be read from" in refusal(sharded)


def reindex(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "deeper/model.safetensors",
        "..\\secret.safetensors",
        "pytorch_model.bin",
        "..",
        "",
    ],
)
def test_an_index_that_leads_elsewhere(sharded, file):
    save_file({UP: torch.zeros(160, 64)}, sharded.parent / "secret.safetensors")
    reindex(sharded, lambda files: files.update({UP: file}))
    text = refusal(sharded)
    assert f"puts {UP} into {file!r}" in text and "do not trust" in text


def test_an_index_that_does_not_fit_its_files(sharded):
    path = sharded / "model.safetensors.index.json"
    good = path.read_text()
    files = json.loads(good)["weight_map"]
    other = next(file for file in files.values() if file != files[UP])
    reindex(sharded, lambda found: found.update({UP: other}))
    assert f"puts {UP} into {other}, and it is not there" in refusal(sharded)
    path.write_text(good)
    reindex(sharded, lambda found: found.update({"model.more.weight": other}))
    assert "puts model.more.weight" in refusal(sharded)
    path.write_text(good)
    expected = models.load(str(sharded), quantize=RTN).model
    reindex(sharded, lambda found: found.pop(UP))  # the file has it, and that is enough
    assert_same(models.load(str(sharded), quantize=RTN).model, expected)


def test_a_tensor_in_two_files(sharded):
    files = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in files.values() if file != files[UP])
    tensors = load_file(sharded / other)
    save_file(tensors | {UP: torch.zeros(160, 64)}, sharded / other, metadata={"format": "pt"})
    text = refusal(sharded)
    assert f"holds {UP} twice" in text and other in text and files[UP] in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not an index of shards"),
        ("[]", "is not an index of shards"),
        ("{}", "is not an index of shards"),
        ('{"weight_map": {}}', "weight_map must name files"),
        ('{"weight_map": {"a": 3}}', "weight_map must name files"),
        ('{"weight_map": ["a"]}', "is not an index of shards"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' stands in it twice"),
        ("\udcff", "is not an index of shards"),
    ],
)
def test_an_index_that_is_none(sharded, text, words):
    (sharded / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert words in refusal(sharded)


def test_a_dense_model_that_trapetum_saved_is_checked_while_it_is_quantized(tmp_path):
    folder = models.save(tiny(), None, tmp_path / "saved")
    models.load(str(folder), quantize=RTN)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert "SHA-256" in refusal(folder)


def test_shards_without_an_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refusal(sharded)


def test_a_config_that_is_none(single):
    (single / "config.json").write_text("{")
    assert "cannot be loaded" in refusal(single)


# The hub


class Hub:
    """Stands in for `snapshot_download`: copies what a pattern lets through from a directory."""

    def __init__(self, source, target):
        self.source, self.target, self.asked, self.got = source, target, [], set()

    def __call__(self, name, revision=None, allow_patterns=()):
        from fnmatch import fnmatch

        self.asked.append((name, revision))
        self.target.mkdir(exist_ok=True)
        for path in self.source.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                (self.target / path.name).write_bytes(path.read_bytes())
                self.got.add(path.name)
        return str(self.target)


def test_a_hub_model_is_fetched_without_what_is_not_needed(sharded, tmp_path, monkeypatch):
    for junk in (
        "consolidated.safetensors",
        "pytorch_model.bin",
        "model.gguf",
        "README.md",
        "modeling_evil.py",
    ):
        (sharded / junk).write_bytes(b"junk")
    (sharded / "tokenizer.model").write_bytes(b"not opened here")
    hub = Hub(sharded, tmp_path / "0123abc")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    loaded = models.load("owner/name", quantize=RTN)
    assert (loaded.kind, loaded.name) == ("hub", "owner/name")
    assert hub.asked == [("owner/name", None), ("owner/name", "0123abc")]  # both from the same commit
    wanted = {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.model"}
    assert hub.got == wanted | {path.name for path in sharded.glob("model-*")}
    assert_same(loaded.model, models.load(str(sharded), quantize=RTN).model)


def test_a_hub_model_of_one_file(single, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(single, tmp_path / "0123abc"))
    assert models.is_quantized(models.load("owner/name", quantize=RTN).model)


def test_an_unsupported_hub_model_costs_no_weights(single, tmp_path, monkeypatch):
    (single / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    hub = Hub(single, tmp_path / "0123abc")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    with pytest.raises(ModelError, match="owner/name is a 'mixtral' model; .* llama, mistral, qwen2"):
        models.load("owner/name", quantize=RTN)
    assert "model.safetensors" not in hub.got


def test_a_hub_model_with_pickled_weights_only(single, tmp_path, monkeypatch):
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(single, tmp_path / "0123abc"))
    with pytest.raises(ModelError, match="pickled"):
        models.load("owner/name", quantize=RTN)


def test_the_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for retries
    with pytest.raises(ModelError, match="'trapetum-tests/no-such-model'.*local directory"):
        models.load("trapetum-tests/no-such-model", quantize=RTN)
