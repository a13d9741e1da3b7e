"""Bad input ends in one sentence that holds the values given and what is needed, or is made good with a warning.

What is wrong with a cache, a compiler or a driver is in `test_build.py`, with stored launch shapes in `test_plans.py`, with
files of weights in `test_formats.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trapetum import build, cpu, cuda, formats, ops
from trapetum.formats import FormatError, pack
from trapetum.linear import CodebookLinear

OUT, IN = 70, 130
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def weight(bits=4, device="cpu"):
    indices = torch.randint(2**bits, (OUT, IN), dtype=torch.uint8, device=device)
    return pack(indices, torch.randn(OUT, 2**bits, device=device).half(), bits)


def refused(action, *words, kinds=(ValueError, TypeError)):
    """The action must raise one sentence that holds every word."""
    with pytest.raises(kinds) as raised:
        action()
    said = str(raised.value)
    assert said.endswith(".") and "\n" not in said, said
    assert [word for word in words if word not in said] == [], said


# --- the operator --------------------------------------------------------------------------------------------------

OPERATOR = {
    "x too short": ({"x": torch.randn(IN - 1)}, ["[129]", "130"]),
    "x empty": ({"x": torch.randn(0)}, ["[0]", "130"]),
    "x a number": ({"x": torch.tensor(1.0)}, ["[]", "130"]),
    "x rows too short": ({"x": torch.randn(2, IN - 1)}, ["[2, 129]", "130"]),
    "x a column": ({"x": torch.randn(IN, 1)}, ["[130, 1]", "130"]),
    "x float64": ({"x": torch.randn(IN).double()}, ["float64", "float32", "float16"]),
    "x integer": ({"x": torch.ones(IN, dtype=torch.int32)}, ["int32", "float32"]),
    "codebook float32": ({"codebook": torch.randn(OUT, 16)}, ["float32", "float16", "[70, 16]"]),
    "codebook too long": ({"codebook": torch.randn(OUT, 17).half()}, ["[70, 17]", "16"]),
    "codebook one row": ({"codebook": torch.randn(16).half()}, ["[16]", "16"]),
    "bias too short": ({"bias": torch.randn(OUT - 1)}, ["[69]", "[70]"]),
    "bias of two rows": ({"bias": torch.randn(1, OUT)}, ["[1, 70]", "[70]"]),
    "bias of another dtype": ({"bias": torch.randn(OUT).half()}, ["float16", "float32"]),
}
CPU_OPERATOR = {
    "codes int32": ({"codes": lambda codes: codes.int()}, ["int32", "uint8"]),
    "codes too short": ({"codes": lambda codes: codes[:-16]}, ["9200", "9216"]),
    "codebook empty": ({"codebook": lambda codebook: codebook[:, :0]}, ["16"]),
    "codebook of fewer rows": ({"codebook": lambda codebook: codebook[:32]}, ["[32, 130]", "9216"]),
    "bits": ({"bits": lambda bits: 5}, ["5", "2, 3, 4, 8"]),
    "codes of other bits": ({"bits": lambda bits: 8}, ["9100", "9216"]),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("change", "words"), OPERATOR.values(), ids=OPERATOR)
def test_operator(device, change, words):
    stored = weight(device=device)
    given = {
        "x": torch.randn(IN, device=device),
        "codes": ops.to_layout(stored, device),
        "codebook": stored.codebook,
        "bias": None,
        "in_features": IN,
        "bits": 4,
    }
    ops.codebook_gemv(*given.values())
    given |= {name: value.to(device) for name, value in change.items()}
    refused(lambda: ops.codebook_gemv(*given.values()), *words)


@pytest.mark.parametrize(("change", "words"), CPU_OPERATOR.values(), ids=CPU_OPERATOR)
def test_operator_with_codes_that_do_not_fit(change, words):
    stored = weight()
    given = {"codes": ops.to_layout(stored, "cpu"), "codebook": stored.codebook, "bits": 4}
    given |= {name: make(given[name]) for name, make in change.items()}
    x = torch.randn(IN)
    refused(lambda: ops.codebook_gemv(x, given["codes"], given["codebook"], None, IN, given["bits"]), *words)


@pytest.mark.gpu
@pytest.mark.parametrize("moved", ["x", "codes", "codebook"])
def test_operator_across_devices(moved):
    stored = weight(device="cuda")
    given = {
        "x": torch.randn(IN, device="cuda"),
        "codes": ops.to_layout(stored, "cuda"),
        "codebook": stored.codebook,
    }
    given[moved] = given[moved].cpu()
    refused(lambda: ops.codebook_gemv(*given.values(), None, IN, 4), "cpu", "cuda:0", "move")


def test_strided_tensors_give_the_same_as_contiguous_ones():
    stored = weight()
    codes, x, bias = ops.to_layout(stored, "cpu"), torch.randn(IN), torch.randn(OUT)
    expected = ops.codebook_gemv(x, codes, stored.codebook, bias, IN, 4)
    apart = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, codes, stored.codebook, bias)]
    assert not any(t.is_contiguous() for t in apart)
    assert torch.equal(ops.codebook_gemv(*apart, IN, 4), expected)


# --- storing weights -----------------------------------------------------------------------------------------------


STORED = {
    "a code out of range": (lambda i, c: pack(i.fill_(16), c, 4), ["16 is out of range", "0 to 15"]),
    "a code beyond a short codebook": (lambda i, c: pack(i.fill_(11), c[:, :11], 4), ["11", "0 to 10"]),
    "codes of int64": (lambda i, c: pack(i.long(), c, 4), ["int64", "uint8", "[70, 130]"]),
    "codes of fewer rows": (lambda i, c: pack(i[:69], c, 4), ["[69, 130]", "70"]),
    "one row of codes": (lambda i, c: pack(i[0], c, 4), ["[130]", "70"]),
    "no codes": (lambda i, c: pack(i[:, :0], c, 4), ["at least 1"]),
    "a codebook too long": (lambda i, c: pack(i, c, 3), ["[70, 16]", "1 to 8"]),
    "an empty codebook": (lambda i, c: pack(i, c[:, :0], 4), ["[70, 0]", "1 to 16"]),
    "a codebook of float32": (lambda i, c: pack(i, c.float(), 4), ["float32", "float16"]),
    "a codebook of infinity": (lambda i, c: pack(i, c.fill_(torch.inf), 4), ["1120 of 1120", "65504"]),
    "5 bits": (lambda i, c: pack(i, c, 5), ["5 bits", "2, 3, 4, 8"]),
    "rows of too few bytes": (
        lambda i, c: formats.CodebookWeight(torch.zeros(OUT, 64, dtype=torch.uint8), c, IN, 4),
        ["[70, 64]", "[70, 65]"],
    ),
}


@pytest.mark.parametrize(("action", "words"), STORED.values(), ids=STORED)
def test_storing(action, words):
    codes = torch.zeros(OUT, IN, dtype=torch.uint8)
    codebook = torch.randn(OUT, 16).half()
    refused(lambda: action(codes, codebook), *words, kinds=FormatError)


# --- the CPU binding -----------------------------------------------------------------------------------------------

BINDING = {
    "x float16": (lambda x, w, c: cpu.gemv(x.half(), w, c, IN, 4), ["float16", "float32", "130"]),
    "x too long": (lambda x, w, c: cpu.gemv(x.repeat(2), w, c, IN, 4), ["[260]", "130"]),
    "out too long": (lambda x, w, c: cpu.gemv(x, w, c, IN, 4, out=torch.empty(71)), ["[71]", "[70]"]),
    "out float64": (
        lambda x, w, c: cpu.gemv(x, w, c, IN, 4, out=torch.empty(70).double()),
        ["float64", "float32"],
    ),
    "out strided": (lambda x, w, c: cpu.gemv(x, w, c, IN, 4, out=torch.empty(140)[::2]), ["stride is 2"]),
    "an unknown path": (lambda x, w, c: cpu.gemv(x, w, c, IN, 4, path="avx9"), ["avx9", "portable"]),
    "dequantized to float64": (
        lambda x, w, c: cpu.dequantize(w, c, IN, 4, torch.float64),
        ["float64", "float32"],
    ),
    "too few packed bytes": (lambda x, w, c: cpu.unpack(w[:-4], OUT, IN, 4), ["9212", "9216"]),
    "a code out of range": (
        lambda x, w, c: cpu.pack(torch.full((OUT, IN), 16, dtype=torch.uint8), 4),
        ["16", "15"],
    ),
}


@pytest.mark.parametrize(("action", "words"), BINDING.values(), ids=BINDING)
def test_cpu_binding(action, words):
    stored = weight()
    packed = ops.to_layout(stored, "cpu")
    refused(lambda: action(torch.randn(IN), packed, stored.codebook), *words)


# --- the machine ---------------------------------------------------------------------------------------------------


def on_a_card(monkeypatch, name, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


def test_a_card_that_is_too_old_is_named_with_what_is_needed(monkeypatch):
    on_a_card(monkeypatch, "Tesla V100-SXM2-16GB", (7, 0))
    said = cuda.why_not()
    assert said.endswith(".") and all(word in said for word in ("Tesla V100-SXM2-16GB", "7.0", "7.5"))


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (12, 0)])
def test_a_card_that_is_new_enough_is_not_named(monkeypatch, capability):
    on_a_card(monkeypatch, "some card", capability)
    assert "some card" not in cuda.why_not()


def test_a_missing_package_is_named(monkeypatch):
    on_a_card(monkeypatch, "NVIDIA H100", (9, 0))
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "cupy is not installed; install it with `pip install" in cuda.why_not()


@pytest.mark.parametrize(("built", "words"), [(None, "without CUDA"), ("13.0", "no CUDA device")])
def test_no_card_is_said(monkeypatch, built, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    assert words in cuda.why_not()


USE_THE_KERNEL = """
import torch
from trapetum import cpu, kernel_cache
assert cpu.available(), cpu.why_not()
codes = torch.randint(16, (64, 64), dtype=torch.uint8)
y = cpu.gemv(torch.ones(64), cpu.pack(codes, 4), torch.ones(64, 16).half(), 64, 4)
assert torch.allclose(y, torch.full((64,), 64.0), rtol=1e-3), y
print(next(iter(kernel_cache._moved.values()), ""))
"""


@pytest.mark.skipif(cpu.active_path() == "torch", reason="needs a C compiler")
def test_a_program_with_an_unwritable_cache_runs_warns_once_and_leaves_nothing(tmp_path):
    wall = tmp_path / "file"
    wall.write_text("not a folder")
    environment = os.environ | {"TRAPETUM_CACHE": str(wall)}
    done = subprocess.run(
        [sys.executable, "-c", USE_THE_KERNEL], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("set TRAPETUM_CACHE") == 1 and str(wall) in done.stderr
    used = Path(done.stdout.strip())
    assert used.suffix == ".so" and not used.parent.exists()


# --- the CUDA layout (no GPU needed) -------------------------------------------------------------------------------


def misaligned(packed):
    room = torch.empty(packed.numel() + 32, dtype=torch.uint8)
    start = -room.data_ptr() % 16 + 1
    return room[start : start + packed.numel()].view(packed.shape)


LAYOUT = {
    "codes of int64": (lambda i, p: cuda.pack(i.long(), 4), ["int64", "uint8"]),
    "one row of codes": (lambda i, p: cuda.pack(i[0], 4), ["[130]", "out_features"]),
    "no codes": (lambda i, p: cuda.pack(i[:, :0], 4), ["[70, 0]", "non-empty"]),
    "a code out of range": (lambda i, p: cuda.pack(i.fill_(16), 4), ["16", "15"]),
    "5 bits": (lambda i, p: cuda.pack(i, 5), ["5", "2, 3, 4, 8"]),
    "packed int32": (lambda i, p: cuda.unpack(p.int(), OUT, IN, 4), ["int32", "uint8"]),
    "packed too few": (
        lambda i, p: cuda.unpack(p[:2], OUT, IN, 4),
        ["[2, 5, 1, 32, 16]", "[3, 5, 1, 32, 16]"],
    ),
    "packed of other bits": (
        lambda i, p: cuda.unpack(p, OUT, IN, 8),
        ["[3, 5, 1, 32, 16]", "[3, 9, 1, 32, 16]"],
    ),
    "packed rows": (lambda i, p: cuda.unpack(weight().codes, OUT, IN, 4), ["[70, 65]", "cuda.pack"]),
    "packed strided": (
        lambda i, p: cuda.unpack(p.repeat_interleave(2, -1)[..., ::2], OUT, IN, 4),
        ["contiguous", "clone"],
    ),
    "packed misaligned": (lambda i, p: cuda.unpack(misaligned(p), OUT, IN, 4), ["1 bytes behind", "clone"]),
}


@pytest.mark.parametrize(("action", "words"), LAYOUT.values(), ids=LAYOUT)
def test_cuda_layout(action, words):
    codes = torch.zeros(OUT, IN, dtype=torch.uint8)
    refused(lambda: action(codes, cuda.pack(codes, 4)), *words)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda codes: codes[:2], ["[2, 5, 1, 32, 16]"]),
        (lambda codes: codes.int(), ["int32"]),
        (lambda codes: codes.repeat_interleave(2, -1)[..., ::2], ["contiguous"]),
    ],
)
def test_operator_with_cuda_codes_that_do_not_fit(change, words):
    stored = weight(device="cuda")
    codes, x = change(ops.to_layout(stored, "cuda")), torch.randn(IN, device="cuda")
    refused(lambda: ops.codebook_gemv(x, codes, stored.codebook, None, IN, 4), *words)


@pytest.mark.gpu
def test_operator_with_a_bias_on_another_device():
    stored = weight(device="cuda")
    codes, x = ops.to_layout(stored, "cuda"), torch.randn(IN, device="cuda")
    refused(
        lambda: ops.codebook_gemv(x, codes, stored.codebook, torch.randn(OUT), IN, 4), "bias on cpu", "move"
    )


# --- the layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.randn(IN + 1), ["[131]", "130"]),
        (torch.randn(2, 65), ["[2, 65]", "130"]),  # as many numbers as one row
        (torch.randn(4, IN + 1), ["[4, 131]", "130"]),
        (torch.tensor(1.0), ["[]", "130"]),
        (torch.ones(IN, dtype=torch.long), ["int64"]),
        (torch.ones(2, IN, dtype=torch.long), ["int64"]),
    ],
)
def test_layer(x, words):
    refused(lambda: CodebookLinear.from_weight(weight())(x), *words)


def test_a_driver_older_than_nvrtc_turns_the_kernels_off(monkeypatch):
    on_a_card(monkeypatch, "NVIDIA H100", (9, 0))
    monkeypatch.setattr(build, "nvrtc_version", lambda: (13, 5))
    monkeypatch.setattr(build, "driver_version", lambda: (12, 8))
    said = cuda.why_not()
    assert said.endswith(".") and all(word in said for word in ("12.8", "13.5", "driver"))
