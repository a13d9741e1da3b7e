"""Recorded launches, the exported folder, and the C++ program: against a driver that runs on the host, and on a GPU."""

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from trapetum import (
    build,
    cuda,
    cuda_attention,
    cuda_dense,
    cuda_token,
    export,
    export_plan,
    launch,
    models,
)
from trapetum.bench import standalone
from trapetum.bench.recording import Recorder
from trapetum.decode import Engine
from trapetum.export import About, Buffers, ExportError
from trapetum.fused_step import FusedStep
from trapetum.gemv_plans import H100, Plan
from trapetum.launch import Kernel, Launch, integer, pointer, recorded
from trapetum.llama_step import LlamaStep
from trapetum.paths import KERNELS, ROOT
from trapetum.records import latest, select
from trapetum.shapes import MODELS

VOCABULARY, CONTEXT = 97, 64
ABOUT = About("a model", "sm_90", VOCABULARY, CONTEXT, (3, 5), 1000, 10, 4, {"hidden": 1, "layers": 2})
SCALE, SALT, SHIFT = 2.75, 2**63 + 11, -5
PROMPT = [17, 4, 90]


# --- a step without a GPU ----------------------------------------------------------------------------------------------


class FakeKernel(Kernel):
    """A kernel that is only noted: nothing is compiled or loaded."""

    def __init__(self, name, cubin):
        self.source, self.name, self.defines, self.cubin = "fake.cu", name, ("A=1",), cubin


def a_cubin(folder, name):
    path = folder / f"{name}.cubin"
    path.write_bytes(b"\x7fELF" + name.encode() * 40)
    return path


class FakeStep:
    """Integers through three kernels, which tests/fake_cuda_driver.cpp runs on the host."""

    def __init__(self, folder):
        generator = torch.Generator().manual_seed(1)
        self.table = torch.randint(1000, (VOCABULARY,), generator=generator)
        self.factors = torch.tensor([1, 3, 5])
        self.tokens, self.position = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        self.history = torch.zeros(CONTEXT + 2, dtype=torch.int32)
        self.cache = torch.zeros(CONTEXT + 2, dtype=torch.int32)
        self.x, self.sums = torch.full((1,), 7), torch.full((2,), 9)
        one = a_cubin(folder, "one")
        self.kernels = {
            name: FakeKernel(name, path)
            for name, path in {"embed": one, "mix": one, "choose": a_cubin(folder, "two")}.items()
        }

    def tensors(self):
        return {
            "weights.table": self.table,
            "weights.factors": self.factors,
            "weights.second_factor": self.factors[1:2],
            "state.tokens": self.tokens,
            "state.position": self.position,
            "state.history": self.history,
            "state.cache": self.cache,
            "scratch.x": self.x,
            "scratch.sums": self.sums,
            "scratch.none": torch.empty(0),
        }

    def _launch(self, name, arguments, shared_bytes=0, pdl=False):
        self.kernels[name].launch((1, 1, 1), (32, 1, 1), shared_bytes, arguments, pdl)

    def embed(self):
        pointers = [pointer(t) for t in (self.tokens, self.table, self.x)]
        self._launch("embed", [*pointers, integer(VOCABULARY)])

    def advance(self):
        arguments = [pointer(t) for t in (self.x, self.factors, None)]
        arguments += [(SCALE, ctypes.c_float), (SALT, ctypes.c_uint64), (SHIFT, ctypes.c_int64)]
        self._launch("mix", [*arguments, pointer(self.sums[1:])], 100_000, True)
        state = (self.x, self.table, self.tokens, self.position, self.history, self.cache)
        self._launch("choose", [*map(pointer, state), integer(VOCABULARY)])


def as_int64(value):
    return (value + 2**63) % 2**64 - 2**63


def expected_tokens(step, prompt, count):
    """What the three kernels make, by Python."""
    cache, made = [0] * (CONTEXT + 2), []
    for position in range(len(prompt) + count - 1):
        if position < len(prompt):
            token = prompt[position]
        x = step.table[token].item()
        x = as_int64(x * step.factors[1].item() + int(SCALE * 4) + as_int64(SALT) + SHIFT)
        cache[position] = token + 1
        token = as_int64(x + 7 * position + cache[position // 2] + cache[position + 1]) % VOCABULARY
        if position >= len(prompt) - 1:
            made.append(token)
    return made


@pytest.fixture
def step(tmp_path):
    (tmp_path / "kernels").mkdir()
    return FakeStep(tmp_path / "kernels")


@pytest.fixture
def folder(step, tmp_path):
    return export.export(step, ABOUT, tmp_path / "out")


def one_sentence(text):
    return text.endswith(".") and "\n" not in text


# --- the recorder ------------------------------------------------------------------------------------------------------


def test_a_dry_recording_notes_launches_in_order(step):
    with recorded(dry=True) as launches:
        step.embed()
        assert len(launches) == 1
        step.advance()
    assert [found.name for found in launches] == ["embed", "mix", "choose"]
    mix = launches[1]
    assert mix == Launch(
        "fake.cu", "mix", ("A=1",), (1, 1, 1), (32, 1, 1), 100_000, mix.arguments, True, step.kernels["mix"].cubin
    )  # fmt: skip
    assert mix.arguments[0] == (step.x.data_ptr(), ctypes.c_void_p) and mix.arguments[2] == (
        0,
        ctypes.c_void_p,
    )
    assert not launches[0].pdl and len({*launches}) == 3


def test_recordings_do_not_nest_and_end_with_their_block(step):
    with recorded(dry=True) as launches:
        with pytest.raises(RuntimeError, match="recorded already; end that recording first"):
            with recorded():
                pass
        step.embed()
    assert len(launches) == 1
    with pytest.raises(KeyError):
        with recorded(dry=True):
            raise KeyError
    assert launch._recording is None
    with pytest.raises(AttributeError):  # outside, a launch is made: a fake kernel has no function
        step.embed()


def test_without_dry_the_launch_is_noted_and_made(step):
    with recorded() as launches, pytest.raises(AttributeError):
        step.embed()
    assert len(launches) == 1


# --- what a step may be --------------------------------------------------------------------------------------------------


def test_an_operator_of_pytorch_is_refused(step, tmp_path):
    advance = step.advance

    def with_an_operator():
        advance()
        step.x.add_(1)

    step.advance = with_an_operator
    with pytest.raises(
        ExportError, match=r"the step calls PyTorch's aten::add_.*only this package's kernels"
    ) as e:
        export.export(step, ABOUT, tmp_path / "out")
    assert one_sentence(str(e.value))


def test_views_and_what_is_made_once_are_no_operators_of_a_step(step):
    made = []

    def advance():
        if not made:
            made.append(torch.zeros(3))
        step._launch("embed", [pointer(step.factors[1:].view(2, 1)[1])])

    (found,) = export.record(advance)
    assert found.arguments[0][0] == step.factors.data_ptr() + 16


def test_a_step_that_changes_is_refused(step):
    sizes = iter(range(100))
    with pytest.raises(ExportError, match="made 1 launches and then 1 others"):
        export.record(lambda: step._launch("embed", [integer(next(sizes))]))
    with pytest.raises(ExportError, match="launches no kernel"):
        export.record(lambda: None)


def test_several_rows_are_refused(step, tmp_path):
    step.tokens = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ExportError, match="feeds 4 rows at once.*rows=1"):
        export.export(step, ABOUT, tmp_path / "out")


# --- pointers ------------------------------------------------------------------------------------------------------------


def test_addresses_are_found_in_their_buffers():
    a, b = torch.zeros(10), torch.zeros(6, dtype=torch.uint8)
    buffers = Buffers({"weights.a": a, "scratch.b": b})
    index = {buffer.name: i for i, buffer in enumerate(buffers.all)}
    for offset in (0, 4, 39):
        assert buffers.find(a.data_ptr() + offset) == (index["weights.a"], offset)
    assert buffers.find(b.data_ptr() + 5) == (index["scratch.b"], 5)
    for outside in (a.data_ptr() + 40, a.data_ptr() - 1, b.data_ptr() + 6, 1):
        assert buffers.find(outside) is None
    assert buffers.place_of("weights.a") == (index["weights.a"], 0)


def test_a_view_is_found_in_what_it_is_a_view_of_whatever_the_order():
    whole = torch.zeros(4, 5)
    for names in (("weights.part", "weights.whole"), ("weights.whole", "weights.part")):
        tensors = {"weights.part": whole[2], "weights.whole": whole, "weights.same": whole.view(-1)}
        buffers = Buffers({name: tensors[name] for name in (*names, "weights.same")})
        assert len(buffers.all) == 1 and buffers.place_of("weights.part") == (0, 40)
        assert buffers.place_of("weights.same") == (0, 0)


def test_buffers_that_cannot_be_told_apart_are_refused():
    base = torch.zeros(10)
    with pytest.raises(ExportError, match="weights.a and weights.b overlap"):
        Buffers({"weights.a": base[:6], "weights.b": base[4:]})
    with pytest.raises(ExportError, match="overlap"):
        Buffers({"weights.a": base, "state.b": base[4:]})
    with pytest.raises(ExportError, match="should be called weights"):
        Buffers({"something": base})
    with pytest.raises(ExportError, match="should be called"):
        Buffers({"weights.a b\n": base})
    with pytest.raises(ExportError, match="strides"):
        Buffers({"weights.a": torch.zeros(3, 4).T})
    with pytest.raises(ExportError, match="no buffer state.tokens"):
        Buffers({}).place_of("state.tokens")


def test_a_pointer_into_no_buffer_is_refused(step, tmp_path):
    tensors = step.tensors()
    del tensors["state.cache"]
    step.tensors = lambda: tensors
    with pytest.raises(
        ExportError, match="argument 5 of a launch of choose points to 0x.*add that tensor"
    ) as e:
        export.export(step, ABOUT, tmp_path / "out")
    assert one_sentence(str(e.value))


def test_an_argument_of_another_type_is_refused(step, tmp_path):
    step.embed = lambda: step._launch("embed", [(True, ctypes.c_bool)])
    with pytest.raises(ExportError, match="is a c_bool, which a plan cannot hold"):
        export.export(step, ABOUT, tmp_path / "out")


def test_what_state_starts_with():
    cache = torch.ones(1 << 20, dtype=torch.int32)
    cache[3] = 2
    tensors = {
        "state.zero": torch.zeros(5, dtype=torch.long),
        "state.minus": torch.full((5,), -1),
        "state.seed": torch.tensor([12345]),
        "state.used_cache": cache,
        "scratch.nan": torch.full((3,), float("nan")),
        "weights.zero": torch.zeros(3),
    }
    fills = {buffer.name: buffer.fill for buffer in Buffers(tensors).all}
    assert fills == {
        "state.zero": 0, "state.minus": 255, "state.seed": None, "state.used_cache": 0, "scratch.nan": 0, "weights.zero": None,
    }  # fmt: skip


# --- the folder ------------------------------------------------------------------------------------------------------------


def read_plan(folder):
    """plan.txt by its keywords: word -> lists of words, as a reader of its own would take them."""
    lines = (folder / "plan.txt").read_text().split("\n")
    assert lines[-2:] == ["end", ""]
    found = {}
    for line in lines[:-2]:
        keyword, _, rest = line.partition(" ")
        found.setdefault(keyword, []).append(rest.split(" ") if rest else [])
    return found


BITS = {"i32": "<i", "i64": "<q", "u64": "<Q", "f32": "<f"}


def value_of(argument, buffers, tensors):
    """The launch argument that a word of the plan stands for."""
    kind, *rest = argument.split(":")
    if kind == "null":
        return 0
    if kind == "ptr":
        return tensors[buffers[int(rest[0])]].data_ptr() + int(rest[1])
    size = struct.calcsize(BITS[kind])
    return struct.unpack(BITS[kind], int(rest[0]).to_bytes(size, "little"))[0]


def test_the_plan_says_what_was_launched(step, folder):
    plan, tensors = read_plan(folder), step.tensors()
    assert plan["trapetum-plan"] == [["1"]] and plan["arch"] == [["sm_90"]] and plan["eos"] == [["3", "5"]]
    assert plan["vocabulary"] == [[str(VOCABULARY)]] and plan["context"] == [[str(CONTEXT)]]
    names = [buffer[0] for buffer in plan["buffer"]]
    with recorded(dry=True) as launches:
        step.embed()
        step.advance()
    kernels = [line[1] for line in plan["kernel"]]
    assert len(plan["launch"]) == len(launches) == 3 and len(kernels) == 3
    for line, wanted in zip(plan["launch"], launches, strict=True):
        assert line[0] == ("embed" if wanted.name == "embed" else "advance")
        assert kernels[int(line[1])] == wanted.name
        sizes = [int(word) for word in line[2:10]]
        assert sizes == [*wanted.grid, *wanted.block, wanted.shared_bytes, wanted.pdl]
        values = [value_of(word, names, tensors) for word in line[10:]]
        assert values == [value for value, _ in wanted.arguments]


def test_cubins_are_kept_once_under_their_hash(step, folder):
    cubins = [line[0] for line in read_plan(folder)["cubin"]]
    assert len(cubins) == 2 and {f"{c}.cubin" for c in cubins} == {
        p.name for p in (folder / "kernels").iterdir()
    }
    for name in cubins:
        assert hashlib.sha256((folder / "kernels" / f"{name}.cubin").read_bytes()).hexdigest() == name
    kernels = {line[1]: cubins[int(line[0])] for line in read_plan(folder)["kernel"]}
    assert kernels["embed"] == kernels["mix"] != kernels["choose"]


def test_the_weights_are_safetensors_and_lie_where_the_plan_says(step, folder):
    path, plan = folder / "weights.safetensors", read_plan(folder)
    loaded, data = load_file(path), path.read_bytes()
    assert set(loaded) == {"weights.table", "weights.factors"}
    assert torch.equal(loaded["weights.table"], step.table) and torch.equal(
        loaded["weights.factors"], step.factors
    )
    assert plan["weights"] == [[str(len(data))]]
    by_name = {line[0]: line[1:] for line in plan["buffer"]}
    for name, tensor in loaded.items():
        nbytes, origin, offset, use = by_name[name]
        assert (int(nbytes), origin, use) == (tensor.nbytes, "file", "constant")
        assert data[int(offset) :][: tensor.nbytes] == tensor.numpy().tobytes()
    assert by_name["state.cache"][1:] == ["fill", "0", "variable"]
    assert by_name["scratch.x"][1:] == ["fill", "0", "variable"]


@pytest.mark.parametrize("dtype", export_plan._DTYPES)
def test_every_dtype_is_written_as_safetensors_reads_it(dtype, tmp_path):
    tensors = {"weights.a": torch.arange(6).view(2, 3).to(dtype), "weights.b": torch.ones((), dtype=dtype)}
    layout = export_plan.layout_of(tensors)
    with open(tmp_path / "w.safetensors", "wb") as file:
        export_plan.write_weights(file, tensors, layout)
    loaded = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == dtype for n, t in tensors.items())
    assert (tmp_path / "w.safetensors").stat().st_size == layout.file_bytes


def test_a_failure_leaves_nothing_behind(step, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(export, "write_weights", full)
    with pytest.raises(OSError, match="No space"):
        export.export(step, ABOUT, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_holds_something_is_left_alone(step, folder, tmp_path):
    plan = (folder / "plan.txt").read_bytes()
    with pytest.raises(ExportError, match="exists already; name a new directory"):
        export.export(step, ABOUT, folder)
    assert (folder / "plan.txt").read_bytes() == plan
    (tmp_path / "empty").mkdir()
    assert export.export(step, ABOUT, tmp_path / "empty") == tmp_path / "empty"
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ExportError, match="exists already"):
        export.export(step, ABOUT, file)


# --- the program -------------------------------------------------------------------------------------------------------


SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]


def compile_cpp(arguments):
    compiler = export.cxx_compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    command = [compiler, "-std=c++17", f"-I{KERNELS}", *map(str, arguments), "-ldl"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checker(tmp_path_factory):
    """The program with the sanitizers where the compiler has them, without warnings anywhere."""
    out = tmp_path_factory.mktemp("checker") / "decode"
    source = KERNELS / "standalone" / "decode.cpp"
    done = compile_cpp([*SANITIZERS, source, "-o", out])
    if done.returncode:
        done = compile_cpp(["-O1", source, "-o", out])
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A folder with a libcuda.so.1 that runs on the host."""
    folder = tmp_path_factory.mktemp("driver")
    source = ROOT / "tests" / "fake_cuda_driver.cpp"
    done = compile_cpp(["-O1", "-shared", "-fPIC", source, "-o", folder / "libcuda.so.1"])
    assert done.returncode == 0, done.stderr
    return folder


def run(program, *words, prompt="", **environment):
    known = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", **{k: str(v) for k, v in environment.items()}}
    command = [str(program), *map(str, words)]
    return subprocess.run(
        command, input=prompt, capture_output=True, encoding="utf-8", errors="replace", env=known, timeout=60
    )


def test_the_program_has_no_warnings():
    source = KERNELS / "standalone" / "decode.cpp"
    done = compile_cpp([*WARNINGS, "-fsyntax-only", source])
    assert done.returncode == 0, done.stderr


LAYOUTS = r"""
#include <cuda.h>
#include "standalone/cuda_driver.h"
static_assert(sizeof(cuda::LaunchConfig) == sizeof(CUlaunchConfig));
static_assert(offsetof(cuda::LaunchConfig, block) == offsetof(CUlaunchConfig, blockDimX));
static_assert(offsetof(cuda::LaunchConfig, shared_bytes) == offsetof(CUlaunchConfig, sharedMemBytes));
static_assert(offsetof(cuda::LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));
static_assert(offsetof(cuda::LaunchConfig, attributes) == offsetof(CUlaunchConfig, attrs));
static_assert(offsetof(cuda::LaunchConfig, attribute_count) == offsetof(CUlaunchConfig, numAttrs));
static_assert(sizeof(cuda::LaunchAttribute) == sizeof(CUlaunchAttribute));
static_assert(offsetof(cuda::LaunchAttribute, value) == offsetof(CUlaunchAttribute, value));
static_assert(cuda::PROGRAMMATIC_STREAM_SERIALIZATION == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
static_assert(cuda::CAPABILITY_MAJOR == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(cuda::CAPABILITY_MINOR == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(cuda::SHARED_BYTES_OPTIN == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
static_assert(cuda::MAX_DYNAMIC_SHARED_BYTES == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(cuda::STREAM_NON_BLOCKING == CU_STREAM_NON_BLOCKING);
static_assert(cuda::EVENT_DISABLE_TIMING == CU_EVENT_DISABLE_TIMING);
static_assert(cuda::CAPTURE_THREAD_LOCAL == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
static_assert(sizeof(cuda::Address) == sizeof(CUdeviceptr) && sizeof(cuda::Result) == sizeof(CUresult));
static_assert(sizeof(cuda::Device) == sizeof(CUdevice));
#define STRING(x) #x
#define NAME(x) STRING(x)
constexpr bool same(const char* a, const char* b) { return *a == *b && (!*a || same(a + 1, b + 1)); }
"""
SYMBOLS = (
    "cuDevicePrimaryCtxRelease", "cuStreamDestroy", "cuStreamBeginCapture", "cuEventDestroy", "cuMemAlloc", "cuMemFree",
    "cuMemsetD8Async", "cuMemGetInfo", "cuMemAllocHost", "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuGraphInstantiate",
    "cuGraphUpload", "cuGraphLaunch", "cuGraphDestroy", "cuModuleLoadData", "cuStreamSynchronize", "cuEventRecord",
)  # fmt: skip


def test_the_declarations_are_those_of_the_cuda_headers(tmp_path):
    try:
        include = build._cuda_include_dirs()[0]
    except build.BuildError as error:
        pytest.skip(str(error))
    header = (KERNELS / "standalone" / "cuda_driver.h").read_text()
    loaded = set(re.findall(r'X\(\w+, "(\w+)"', header))
    checks = ""
    for symbol in SYMBOLS:
        (name,) = (s for s in loaded if re.fullmatch(rf"{symbol}(_v\d+|WithFlags)?", s))
        checks += f'static_assert(same(NAME({symbol}), "{name}"));\n'
    source = tmp_path / "layouts.cpp"
    source.write_text(LAYOUTS + checks)
    done = compile_cpp([f"-I{include}", "-fsyntax-only", source])
    assert done.returncode == 0, done.stderr


def test_check_accepts_an_export(checker, folder):
    done = run(checker, folder, "--check")
    assert (done.returncode, done.stderr) == (0, "")
    assert "model a model\nlaunches_a_token 2\nkernels 3\n" in done.stdout


def line_of(text, keyword, nth=0):
    return [line for line in text.split("\n") if line.startswith(keyword + " ")][nth]


def swap(keyword, change, nth=0):
    """An edit of a plan: `change` takes the words of the nth line of a keyword and gives others."""

    def edit(text):
        line = line_of(text, keyword, nth)
        return text.replace(line, " ".join(change(line.split(" "))), 1)

    return edit


def word(number, value):
    return lambda words: [*words[:number], value, *words[number + 1 :]]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_cache_of_every_shape_fits_a_plan(checker, folder, name):
    path = folder / "plan.txt"
    cached = 2 * 2 * MODELS[name].layers * MODELS[name].kv_heads * MODELS[name].head_dim
    path.write_text(swap("token_bytes", word(2, str(cached)))(path.read_text()))
    done = run(checker, folder, "--check")
    assert (done.returncode, done.stderr) == (0, "")


HUGE = str(2**64)
HOSTILE = {
    "another version": (swap("trapetum-plan", word(1, "2")), "reads version 1"),
    "another file": (lambda t: "PK\x03\x04" + t, "does not begin with 'trapetum-plan'"),
    "cut off": (lambda t: t[: len(t) // 2], "cut off|is missing|should stand|is no number|has no value|needs a buffer"),
    "cut off before its end": (lambda t: t.removesuffix("end\n"), "cut off"),
    "goes on": (lambda t: t + "launch\n", "goes on behind its end"),
    "an architecture": (swap("arch", word(1, "sm_")), "must be like sm_90"),
    "no vocabulary": (swap("vocabulary", word(1, "0")), "vocabulary is 0"),
    "a negative number": (swap("vocabulary", word(1, "-1")), "'-1' is no number"),
    "a number too large": (swap("context", word(1, HUGE)), f"'{HUGE}' is no number"),
    "a context too large": (swap("context", word(1, str(2**40))), "at most"),
    "an end outside the vocabulary": (swap("eos", word(1, "97")), "token is 97, and at most 96"),
    "too many tokens a graph": (swap("tokens_a_graph", word(1, "65")), "at most 64"),
    "a path for a cubin": (swap("cubin", word(1, "../" * 20 + "abcd")), "64 hex digits"),
    "a cubin that is not there": (swap("cubin", word(1, "0" * 64)), "cannot be opened"),
    "a kernel of no cubin": (swap("kernel", word(1, "2")), "cubin is 2, and at most 1"),
    "an empty buffer": (swap("buffer", word(2, "0")), "has no bytes"),
    "all memory there is": (
        lambda t: re.sub(r"(buffer state\.\w+) \d+ fill", rf"\1 {2**48} fill", t), "larger than any GPU",
    ),
    "behind the file": (lambda t: behind_the_file(t), "ends behind the .* bytes of weights.safetensors"),
    "an origin": (swap("buffer", word(3, "nowhere")), "from the file or with a fill"),
    "a fill of two bytes": (lambda t: t.replace("fill 0", "fill 256", 1), "byte is 256, and at most 255"),
    "a use": (swap("buffer", lambda w: [*w[:-1], "maybe"]), "constant or variable"),
    "state in the weights": (lambda t: re.sub(r"^token \d+", f"token {constant_index(t)}", t, flags=re.M), "is constant"),
    "an odd place": (swap("position", word(2, "4")), "multiple of 8"),
    "a place behind the buffer": (swap("token", word(2, "8")), "do not fit the 8"),
    "a short history": (swap("context", word(1, "4096")), "do not fit"),
    "history ahead": (swap("history", word(3, "2")), "lead is 2, and at most 1"),
    "a launch of no kernel": (swap("launch", word(2, "3")), "kernel is 3, and at most 2"),
    "another list": (swap("launch", word(1, "prefill")), "embed or advance"),
    "an empty grid": (swap("launch", word(3, "0")), "grid is 0"),
    "a grid too large": (swap("launch", word(4, "65536")), "at most 65535"),
    "a block too large": (swap("launch", word(7, "64")), "at most 1024 threads"),
    "too much shared memory": (swap("launch", word(9, str(2**31))), "shared memory is"),
    "a flag": (swap("launch", word(10, "2")), "pdl is 2"),
    "a pointer to no buffer": (swap("launch", word(11, "ptr:99:0")), "buffer is 99"),
    "a pointer behind its buffer": (swap("launch", word(11, "ptr:0:100000")), "offset is 100000"),
    "a pointer without an offset": (swap("launch", word(11, "ptr:0")), "needs a buffer and an offset"),
    "an argument's type": (swap("launch", word(14, "str:5")), "'str' is unknown"),
    "an argument too wide": (swap("launch", word(14, f"i32:{2**32}")), "at most 4294967295"),
    "an argument without a value": (swap("launch", word(14, "7")), "has no value"),
    "two spaces": (swap("launch", lambda w: [*w[:3], "", *w[3:]]), "is missing"),
    "a space at the end": (swap("launch", lambda w: [*w, ""]), "ends in a space"),
    "more words": (swap("token", lambda w: [*w, "x"]), "has 'x' at its end"),
    "a control character": (swap("model", word(1, "a\x1b[31m")), "control character"),
    "a zero byte": (swap("kernel", word(2, "embed\0x")), "control character"),
    "Windows": (lambda t: t.replace("\n", "\r\n"), "control character"),
    "lines in another order": (lambda t: move_up(t, "launch"), "should stand here"),
    "no advance": (lambda t: re.sub(r"^launch advance.*\n", "", t, flags=re.M), "none to advance"),
    "nothing to embed": (lambda t: re.sub(r"^launch embed.*\n", "", t, flags=re.M), "no launches to embed"),
    "too many arguments": (swap("launch", lambda w: w + ["null"] * 600), "at most 512 arguments"),
    "no buffers": (lambda t: re.sub(r"^buffer.*\n", "", t, flags=re.M), "there is no buffer"),
    "empty": (lambda t: "", "is empty"),
}  # fmt: skip


def constant_index(text):
    return [line.endswith("constant") for line in text.split("\n") if line.startswith("buffer ")].index(True)


def move_up(text, keyword):
    line = line_of(text, keyword) + "\n"
    return text.replace(line, "", 1).replace("token ", line + "token ", 1)


def behind_the_file(text):
    line = next(line for line in text.split("\n") if line.startswith("buffer ") and " file " in line)
    words = line.split(" ")
    return text.replace(line, " ".join([*words[:4], str(10**9), *words[5:]]), 1)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_plan_is_one_sentence(checker, folder, name):
    edit, match = HOSTILE[name]
    path = folder / "plan.txt"
    text = path.read_text()
    changed = edit(text)
    assert changed != text
    path.write_bytes(changed.encode())
    done = run(checker, folder, "--check")
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert (
        done.stderr.startswith("decode: ")
        and one_sentence(done.stderr[:-1])
        and re.search(match, done.stderr)
    )


def test_damaged_plans_never_crash_the_program(checker, folder):
    """A byte changed at every 7th place: refused in a sentence, or still a plan that can be launched."""
    path = folder / "plan.txt"
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for at in range(0, len(whole), max(7, len(whole) // 150)):
        value = int(torch.randint(256, (1,), generator=generator))
        path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        done = run(checker, folder, "--check")
        assert done.returncode in (0, 2), f"byte {at} as {value}: {done.stderr}"
        refused += done.returncode == 2
    assert refused > 50


def test_files_that_do_not_belong_to_the_plan(checker, folder):
    weights = folder / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert "bytes and the plan says" in run(checker, folder, "--check").stderr
    weights.unlink()
    assert "weights.safetensors cannot be opened: No such file" in run(checker, folder, "--check").stderr
    weights.mkdir()
    assert "is not a regular file" in run(checker, folder, "--check").stderr
    weights.rmdir()
    weights.write_bytes(whole)
    cubin = next((folder / "kernels").iterdir())
    cubin.write_bytes(b"#!/bin/sh" + bytes(100))
    done = run(checker, folder, "--check")
    assert done.returncode == 2 and done.stderr.endswith("is no cubin.\n")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "no folder is named; usage"),
        (["--runs"], "--runs needs a number"),
        (["F", "-n", "0"], "-n is '0'; it must be a whole number from 1"),
        (["F", "-n", "1e3"], "-n is '1e3'"),
        (["F", "--fast"], "--fast is no option; usage"),
        (["F", "-5"], "-5 is no option"),
        (["F", "x"], "a prompt token is 'x'"),
        (["F", "99999999999999999999"], "a prompt token is"),
        (["F", "1", "97"], "token 97 is not in the vocabulary of 97"),
        (["F", "-n", "62", "1", "2", "3"], "need a context of 65, and the export has 64"),
        (["F"], "the prompt is empty"),
        (["/nowhere"], "/nowhere/plan.txt cannot be opened"),
    ],
)
def test_words_that_cannot_be_used(checker, folder, words, match):
    done = run(checker, *(str(folder) if w == "F" else w for w in words))
    assert done.returncode == 2 and match in done.stderr and one_sentence(done.stderr[:-1])


def test_no_driver_is_one_sentence(checker, folder):
    if torch.cuda.is_available():
        pytest.skip("there is a driver here")
    done = run(checker, folder, "-n", 2, 1)
    assert done.returncode == 1 and one_sentence(done.stderr[:-1])
    assert "the NVIDIA driver was not found" in done.stderr or "CUDA_ERROR" in done.stderr


# --- decoding with the driver on the host ----------------------------------------------------------------------------------


def on_host(program, driver, folder, *words, prompt=PROMPT, **environment):
    """Run with the fake driver; what it printed, and what the driver counted."""
    log, words = folder / "log", words if "-n" in words else ("-n", 8, *words)
    known = {"LD_LIBRARY_PATH": driver, "FAKE_CUDA_LOG": log, **environment}
    done = run(program, folder, *words, prompt=" ".join(map(str, prompt)), **known)
    counted = dict(line.split() for line in log.read_text().splitlines())
    return done, {name: int(count) for name, count in counted.items()}


@pytest.mark.parametrize("a_graph", [1, 3, 4, 64])
@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_tokens_are_those_of_the_step(checker, driver, step, folder, count, a_graph):
    done, counted = on_host(
        checker, driver, folder, "-n", count, "--tokens-a-graph", a_graph, "--ignore-eos", "--runs", 2
    )
    assert done.returncode == 0, done.stderr
    wanted = expected_tokens(step, PROMPT, count)
    outputs = export._outputs(done.stdout)
    assert [o.tokens for o in outputs] == [wanted] * 2
    assert all((o.tokens_per_s is None) == (count == 1) for o in outputs)
    assert counted["live"] == 0
    whole, single = divmod(count - 1, a_graph)
    assert counted["graph_launches"] == 2 * (whole + single)
    fed = 3 * len(PROMPT)  # once before the capture, and in each run
    captured = a_graph + 1
    assert counted["overlapping"] == fed + captured and counted["launches"] == 3 * fed + 2 * captured


def test_the_model_and_speed_are_printed(checker, driver, folder):
    done, _ = on_host(checker, driver, folder, "-n", 9, "--ignore-eos")
    assert "device Fake GPU\n" in done.stdout and "tokens_a_graph 4\n" in done.stdout
    (output,) = export._outputs(done.stdout)
    assert output.first_token_s > 0 and output.tokens_per_s > 0
    gbps = (1000 + 10 * (len(PROMPT) + 4.5)) * output.tokens_per_s / 1e9
    assert output.gb_per_s == pytest.approx(gbps, abs=0.05)


def test_it_stops_behind_a_token_that_ends_the_text(checker, driver, step, tmp_path):
    wanted = expected_tokens(step, PROMPT, 40)
    for place in (0, 1, 7, 8):
        end = wanted[place]
        folder = export.export(
            step, About("m", "sm_90", VOCABULARY, CONTEXT, (end,)), tmp_path / f"out{place}"
        )
        done, counted = on_host(checker, driver, folder, "-n", 40)
        (output,) = export._outputs(done.stdout)
        assert output.tokens == wanted[: wanted.index(end) + 1] and counted["live"] == 0
        assert output.gb_per_s is None


def test_below_sm_90_nothing_overlaps(checker, driver, step, tmp_path):
    folder = export.export(step, About("m", "sm_80", VOCABULARY, CONTEXT), tmp_path / "old")
    done, counted = on_host(checker, driver, folder, FAKE_CUDA_CAPABILITY=86)
    assert done.returncode == 0 and counted["overlapping"] == 0


def test_another_architecture_is_refused(checker, driver, folder):
    for capability in (80, 100):
        done, counted = on_host(checker, driver, folder, FAKE_CUDA_CAPABILITY=capability)
        assert done.returncode == 2 and counted["live"] == 0
        assert f"for sm_90 and Fake GPU is sm_{capability}; export the model on such a GPU" in done.stderr


FAILURES = (
    "cuInit", "cuCtxSetCurrent", "cuMemAlloc_v2", "cuModuleLoadData", "cuLaunchKernelEx", "cuGraphInstantiateWithFlags",
    "cuGraphLaunch", "cuStreamSynchronize",
)  # fmt: skip


@pytest.mark.parametrize("function", FAILURES)
def test_what_the_driver_refuses_is_one_sentence_and_nothing_leaks(checker, driver, folder, function):
    done, counted = on_host(checker, driver, folder, "--ignore-eos", FAKE_CUDA_FAIL=function)
    assert done.returncode == 1 and counted["live"] == 0
    assert re.fullmatch(r"decode: .+ failed: CUDA_ERROR_OUT_OF_MEMORY, .+\.\n", done.stderr)


def test_a_full_gpu_says_how_much_is_needed(checker, driver, folder):
    done, _ = on_host(checker, driver, folder, FAKE_CUDA_FAIL="cuMemAlloc_v2")
    assert re.search(r"reserving \d+ MB on the GPU, which has 80000 MB free", done.stderr)


@pytest.mark.parametrize(
    ("edit", "code", "match"),
    [
        (
            swap("launch", word(14, "i64:97")),
            2,
            "argument 3 of a launch of embed has 8 bytes and the kernel takes 4",
        ),
        (swap("launch", lambda w: w[:-1]), 2, "has 3 arguments and the kernel takes more"),
        (swap("launch", lambda w: [*w, "null"]), 2, "has 8 bytes and the kernel takes 0"),
        (swap("kernel", word(2, "nothing")), 1, "finding nothing in its cubin failed: CUDA_ERROR_NOT_FOUND"),
        (
            swap("launch", word(9, "300000")),
            1,
            "giving embed 300000 bytes of shared memory on Fake GPU.*at most 232448",
        ),
    ],
)
def test_a_plan_that_does_not_fit_its_cubins(checker, driver, folder, edit, code, match):
    path = folder / "plan.txt"
    path.write_text(edit(path.read_text()))
    done, counted = on_host(checker, driver, folder)
    assert done.returncode == code and re.search(match, done.stderr) and counted["live"] == 0
    assert one_sentence(done.stderr[:-1])


def test_the_program_is_built_beside_the_plan_and_run(driver, step, folder, monkeypatch):
    if export.cxx_compiler() is None:
        pytest.skip("needs a C++ compiler")
    program = export.build_standalone(folder)
    assert program == folder / "decode" and os.access(program, os.X_OK)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    outputs = export.run_standalone(folder, PROMPT, 12, runs=2)
    assert [o.tokens for o in outputs] == [expected_tokens(step, PROMPT, 12)] * 2
    with pytest.raises(ExportError, match="the program failed: decode: token 97 is not in the vocabulary"):
        export.run_standalone(folder, [97], 2)


def test_no_compiler_is_one_sentence(folder, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ExportError, match="no C.. compiler was found; install") as e:
        export.build_standalone(folder)
    assert one_sentence(str(e.value)) and not (folder / "decode").exists()


# --- a model and the engine's stages -----------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")


def test_without_a_gpu_the_command_is_one_sentence(no_gpu, tmp_path):
    from typer.testing import CliRunner

    from trapetum.cli import app

    result = CliRunner().invoke(app, ["export", "builtin", str(tmp_path / "out")])
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "an export compiles for the GPU of this machine: " in result.output and one_sentence(
        result.output[:-1]
    )


def test_a_stage_that_calls_pytorch_is_refused(tmp_path):
    loaded = models.load("random:llama-tiny")
    engine = Engine(loaded, "lean", max_context=32)
    with pytest.raises(ExportError, match="the stage lean calls PyTorch.*choose the stage fused or pdl") as e:
        export.export_engine(engine, loaded, tmp_path / "out")
    assert one_sentence(str(e.value))


def test_what_a_plan_says_of_a_model(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    loaded = models.load("builtin")
    about = export.about_model(loaded, 100)
    shape, model = loaded.shape, loaded.model
    width = model.get_input_embeddings().weight.element_size()
    assert (about.arch, about.context, about.vocabulary) == ("sm_90", 100, shape.vocab)
    assert about.cached_token_bytes == 2 * shape.layers * shape.kv_heads * shape.head_dim * width
    dense = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    assert about.token_bytes == dense - (0 if tied else embedding.nbytes)
    assert about.eos == (loaded.tokenizer.eos_token_id,) if loaded.tokenizer.eos_token_id is not None else ()
    assert export.about_model(models.load("random:llama-tiny"), 8).eos == ()


# --- the two runtimes in turns ---------------------------------------------------------------------------------------------


def test_turns_alternate_and_pair_up():
    order = []

    def runtime(name, speed):
        def turn():
            order.append(name)
            return standalone.Turn([1, 2, 3], speed + len(order))

        return turn

    turns = standalone.take_turns({"python": runtime("python", 100), "c++": runtime("c++", 200)}, 3)
    assert order == ["python", "c++", "c++", "python", "python", "c++"]
    assert [turn.tokens_per_s for turn in turns["c++"]] == [202, 203, 206]
    assert standalone.agreement(turns["c++"], [1, 2, 4]) == [2 / 3] * 3


def turns_of(python, cpp, tokens):
    return {
        "python": [standalone.Turn([1, 2, 3, 4], speed) for speed in python],
        "c++": [standalone.Turn(tokens, speed) for speed in cpp],
    }


def test_records_hold_both_runtimes_and_the_ratio_within_a_round():
    recorder = Recorder("cpu", "smoke")
    config = {"model": "m", "stage": "pdl", "bytes": 1000, "context": 10.0}
    turns = turns_of([100, 200, 100], [98, 202, 101], [1, 2, 3, 4])
    standalone.add_turns(recorder, turns, [1, 2, 3, 4], config, None)
    found = {(r.quantity, r.config["runtime"]): r for r in recorder.close()}
    assert set(found) == {
        ("decode_speed", "python"),
        ("decode_speed", "c++"),
        ("speedup", "c++"),
        ("token_agreement", "c++"),
    }
    assert found["decode_speed", "python"].samples == (100, 200, 100)
    assert found["speedup", "c++"].samples == (0.98, 1.01, 1.01)
    assert found["speedup", "c++"].config["baseline"] == "python"
    assert found["token_agreement", "c++"].value == 1 and not any(r.suspect for r in found.values())
    assert len({r.config["run"] for r in found.values()}) == 1
    assert len(latest(found.values())) == 4  # neither runtime takes the other's place
    assert select(found.values(), beside=None) == []  # nor that of a decode measured alone


def test_a_program_with_other_tokens_is_suspect():
    recorder = Recorder("cpu", "smoke")
    standalone.add_turns(recorder, turns_of([100], [300], [1, 2, 4, 4]), [1, 2, 3, 4], {"model": "m"}, None)
    found = {(r.quantity, r.config["runtime"]): r for r in recorder.close()}
    assert found["token_agreement", "c++"].value == 0.75
    assert (
        found["decode_speed", "c++"].suspect
        and "75% of the tokens" in found["decode_speed", "c++"].why_suspect
    )
    assert found["speedup", "c++"].suspect and not found["decode_speed", "python"].suspect


# --- this package's kernels --------------------------------------------------------------------------------------------------


class ChainStep:
    """Two codebook products between an embedding and the next token: what a decode step is, without attention."""

    HIDDEN, VOCABULARY, CONTEXT = 256, 320, 64

    def __init__(self, device, dtype=torch.float16):
        generator = torch.Generator().manual_seed(5)

        def weight(out_features):
            codes = torch.randint(16, (out_features, self.HIDDEN), generator=generator, dtype=torch.uint8)
            values = torch.randn(out_features, 16, generator=generator).div(16).half()
            return cuda.pack(codes, 4).to(device), values.to(device)

        self.body, self.head = weight(self.HIDDEN), weight(self.VOCABULARY)
        embedding = torch.randn(self.VOCABULARY, self.HIDDEN, generator=generator)
        self.embedding = embedding.to(device, dtype)
        self.state = cuda_token.State.make(self.CONTEXT, device=device)
        self.x, self.h = (torch.zeros(1, self.HIDDEN, dtype=dtype, device=device) for _ in range(2))
        self.logits = torch.zeros(1, self.VOCABULARY, dtype=dtype, device=device)

    def tensors(self):
        weights = {"embedding": self.embedding}
        for name, (codes, codebook) in {"body": self.body, "head": self.head}.items():
            weights |= {f"{name}.codes": codes, f"{name}.codebook": codebook}
        state = {name: value for name, value in vars(self.state).items() if isinstance(value, torch.Tensor)}
        return (
            {f"weights.{name}": tensor for name, tensor in weights.items()}
            | {f"state.{name}": tensor for name, tensor in state.items()}
            | {"scratch.x": self.x, "scratch.h": self.h, "scratch.logits": self.logits}
        )

    def embed(self):
        cuda_token.embed(self.state, self.embedding, self.x)

    def advance(self):
        plan = Plan(4, 2)
        cuda.gemv(self.x, *self.body, self.HIDDEN, 4, out=self.h, pdl=True, plan=plan, residual=self.x)
        cuda.gemv(self.h, *self.head, self.HIDDEN, 4, out=self.logits, pdl=True, plan=plan)
        cuda_token.next_token(self.logits, self.state, self.embedding, self.x, pdl=True)


class CompiledKernel(Kernel):
    """A kernel that is compiled and not loaded."""

    def __init__(self, source, name, defines, device):
        self.source, self.name, self.defines = source, name, tuple(defines)
        self.cubin = build.compile_cuda(source, "sm_90", self.defines).path


def test_compiled_kernels_make_a_folder_that_the_program_accepts(checker, tmp_path, monkeypatch):
    pytest.importorskip("cuda.bindings.nvrtc")
    on_the_cpu(monkeypatch, CompiledKernel)
    step = ChainStep("cpu")
    about = About("chain", "sm_90", step.VOCABULARY, step.CONTEXT)
    folder = export.export(step, about, tmp_path / "out")
    plan = read_plan(folder)
    assert len(plan["cubin"]) == 2  # one of each source; next_token.cu has both of its functions
    assert [line[1] for line in plan["kernel"]] == ["embed", "codebook_gemv", "next_token"]
    assert len(plan["launch"]) == 4
    done = run(checker, folder, "--check")
    assert done.returncode == 0 and "launches_a_token 3\nkernels 3\n" in done.stdout


def on_the_cpu(monkeypatch, kernel):
    """Let what launches believe that CPU tensors are on an H100, and its kernels be `kernel`."""
    zeros = torch.zeros

    def zeros_anywhere(*sizes, device=None, **how):
        return zeros(*sizes, device=None if str(device).startswith("cuda") else device, **how)

    monkeypatch.setattr(torch, "zeros", zeros_anywhere)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(cuda_dense, "_check_devices", lambda *_, **__: None)
    monkeypatch.setattr(cuda, "_tuned_for", lambda device: ("H100", "0" * 64))
    for module in (cuda, cuda_attention, cuda_dense, cuda_token):
        monkeypatch.setattr(module, "kernel", kernel)
        if hasattr(module, "room_of"):
            monkeypatch.setattr(module, "room_of", lambda device: H100)


@pytest.mark.parametrize("kv", ["fp16", "int8", "int4"])
def test_every_pointer_of_the_fused_step_lies_in_its_tensors(kv, checker, tmp_path, monkeypatch):
    def noted(source, name, defines, device):
        return FakeKernel(name, a_cubin(tmp_path, f"{name}-{abs(hash((source, defines)))}"))

    on_the_cpu(monkeypatch, noted)
    loaded = models.load("builtin", "cpu", "fp16")
    step = FusedStep(LlamaStep(loaded.model, 64, cache=False), 64, kv, pdl=True)
    folder = export.export(step, export.about_model(loaded, 64, kv), tmp_path / "out")
    done = run(checker, folder, "--check")
    assert done.returncode == 0 and f"launches_a_token {step.launches}\n" in done.stdout
    used = {word for line in read_plan(folder)["launch"] for word in line if word.startswith("ptr:")}
    assert len({word.split(":")[1] for word in used}) == len(read_plan(folder)["buffer"])


@pytest.mark.gpu
def test_a_recording_on_a_gpu_launches_only_when_it_is_not_dry():
    step = ChainStep("cuda")
    with recorded(dry=True) as dry:
        step.embed()
    torch.cuda.synchronize()
    assert not step.x.any()
    with recorded() as made:
        step.embed()
    torch.cuda.synchronize()
    assert step.x.any() and dry == made and made[0].cubin.read_bytes()[:4] == b"\x7fELF"
    assert made[0].source == cuda_token.SOURCE and f"ROWS={step.state.rows}" in made[0].defines


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_program_makes_the_tokens_of_the_launches_from_python(dtype, tmp_path):
    step = ChainStep("cuda", dtype)
    major, minor = torch.cuda.get_device_capability()
    about = About("chain", f"sm_{major}{minor}", step.VOCABULARY, step.CONTEXT)
    folder = export.export(step, about, tmp_path / "out")
    assert int(step.state.position) == 0 and not step.logits.any()  # an export launches nothing
    wanted = standalone.launched_tokens(step, [7, 300, 12], 40)
    assert len(set(wanted)) > 3
    export.build_standalone(folder)
    outputs = export.run_standalone(folder, [7, 300, 12], 40, runs=3)
    assert [output.tokens for output in outputs] == [wanted] * 3


def built_in(bits=None):
    quantize = models.QuantizeSpec(bits) if bits else None
    return models.load("builtin", "cuda", "fp16", quantize=quantize)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["fused", "pdl"])
@pytest.mark.parametrize("bits", [None, 4, 2])
def test_the_program_makes_the_tokens_of_the_engines_step(bits, stage, tmp_path):
    loaded = built_in(bits)
    engine = Engine(loaded, stage, max_context=128)
    folder = export.export_engine(engine, loaded, tmp_path / "out", tokens_a_graph=5)
    export.build_standalone(folder)
    made = set()
    for prompt in ([5], [200, 7], [77, 78, 79, 80]):
        wanted = standalone.launched_tokens(export.step_of(engine), prompt, 100)
        outputs = export.run_standalone(folder, prompt, 100, runs=2)
        assert [output.tokens for output in outputs] == [wanted] * 2
        assert all(output.gb_per_s is not None for output in outputs)
        made |= set(wanted)
    assert len(made) > 3, f"the prompts together made only the tokens {sorted(made)}"


@pytest.mark.gpu
@pytest.mark.parametrize("kv", ["fp16", "int8", "int4"])
def test_the_built_in_model_says_the_same_without_python(kv, tmp_path):
    loaded = built_in(4)
    engine = Engine(loaded, export.STAGE, max_context=256, kv=kv)
    prompt = loaded.tokenizer("Return a", return_tensors="pt").input_ids[0].tolist()
    said = engine.generate(prompt, 200).tokens
    folder = export.export_engine(
        engine, loaded, tmp_path / "out"
    )  # after a generation, whose cache is not exported
    export.build_standalone(folder)
    (output,) = export.run_standalone(folder, prompt, 200)
    assert output.tokens == standalone.launched_tokens(export.step_of(engine), prompt, 200)
    if kv == "fp16":  # a prefill rounds otherwise, which a quantized cache carries on
        assert output.tokens == said


@pytest.mark.gpu
def test_the_whole_context_can_be_used(tmp_path):
    loaded = built_in(4)
    engine = Engine(loaded, export.STAGE, max_context=64)
    folder = export.export_engine(engine, loaded, tmp_path / "out")
    export.build_standalone(folder)
    (output,) = export.run_standalone(folder, [1, 2, 3], 61)
    assert output.tokens == standalone.launched_tokens(export.step_of(engine), [1, 2, 3], 61)
    with pytest.raises(ExportError, match="need a context of 65, and the export has 64"):
        export.run_standalone(folder, [1, 2, 3], 62)


@pytest.mark.gpu
def test_a_damaged_cubin_is_one_sentence(tmp_path):
    loaded = built_in(4)
    folder = export.export_engine(Engine(loaded, export.STAGE, max_context=64), loaded, tmp_path / "out")
    export.build_standalone(folder)
    for cubin in (folder / "kernels").iterdir():
        cubin.write_bytes(b"\x7fELF" + bytes(5000))
    with pytest.raises(ExportError, match="loading .*cubin failed: CUDA_ERROR_") as e:
        export.run_standalone(folder, [1], 2)
    assert one_sentence(str(e.value))


@pytest.mark.gpu
def test_the_command_writes_a_folder_that_decodes(tmp_path):
    from typer.testing import CliRunner

    from trapetum.cli import app

    words = ["export", "builtin", str(tmp_path / "out"), "--bits", "4", "--context", "64"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    (output,) = export.run_standalone(tmp_path / "out", [1, 2, 3], 20)
    assert len(output.tokens) == 20
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2 and "exists already" in again.output


@pytest.mark.gpu
def test_both_runtimes_are_recorded():
    found = standalone.compare_runtimes("builtin", "smoke", new_tokens=16, rounds=2)
    by_name = {(r.quantity, r.config["runtime"]): r for r in found}
    assert by_name["token_agreement", "c++"].value == 1
    assert by_name["decode_speed", "c++"].n == by_name["decode_speed", "python"].n == 2
