"""Write a decode step as files that `kernels/standalone/decode.cpp` runs without Python.

    plan.txt               buffers and launches of one token, one a line; `kernels/standalone/plan.h` describes the format
    kernels/<sha256>.cubin the compiled kernels
    weights.safetensors    what the buffers start with where it is not one byte throughout
    decode                 the program, where there is a C++ compiler

The launches are noted, not made (`launch.recorded`), so an export changes nothing in the step.
"""

import ctypes
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trapetum.kernel_cache import write_atomically
from trapetum.launch import Launch, recorded
from trapetum.paths import KERNELS, require_clone

STANDALONE = KERNELS / "standalone"
PROGRAM = "decode"
PLAN, WEIGHTS, CUBINS = "plan.txt", "weights.safetensors", "kernels"
VERSION = 1
TOKENS_A_GRAPH = 8
ROLES = {"token": "state.tokens", "position": "state.position", "history": "state.history"}
HISTORY_AHEAD = 1  # the token made from place p of the cache stands at p + 1
_KINDS = ("weights", "state", "scratch")
_KEPT_STATE_BYTES = 1 << 20  # a larger state is a cache, whose places are written before they are read
_DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_ARGUMENTS = {  # ctypes type -> name in the plan, struct formats of the value and of its bits
    ctypes.c_int32: ("i32", "<i", "<I"),
    ctypes.c_uint32: ("u32", "<I", "<I"),
    ctypes.c_int64: ("i64", "<q", "<Q"),
    ctypes.c_uint64: ("u64", "<Q", "<Q"),
    ctypes.c_float: ("f32", "<f", "<I"),
    ctypes.c_double: ("f64", "<d", "<Q"),
}


class ExportError(ValueError):
    """A step that cannot be exported, or a folder that cannot be written; the message says why."""


class Step(Protocol):
    """What can be exported: a decode step of one row, made only of this package's kernels."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Every device buffer that a launch points into, by name: `weights.*`, `state.*` or `scratch.*`."""

    def embed(self) -> None:
        """Launch what makes x from `state.tokens`."""

    def advance(self) -> None:
        """Launch what makes the next token from x, and the next x."""


@dataclass(frozen=True)
class About:
    """What a plan says of the model besides its launches.

    Attributes:
        model: its name.
        arch: what the cubins are compiled for, e.g. `sm_90`.
        vocabulary: tokens.
        context: places of the cache.
        eos: tokens that end a text.
        token_bytes: of the weights, read for each token; 0 where unknown.
        cached_token_bytes: read for each cached token.
        tokens_a_graph: how many tokens the program captures into one graph, at most 64.
        shape: sizes for people, e.g. hidden, layers.
    """

    model: str
    arch: str
    vocabulary: int
    context: int
    eos: tuple[int, ...] = ()
    token_bytes: int = 0
    cached_token_bytes: int = 0
    tokens_a_graph: int = TOKENS_A_GRAPH
    shape: Mapping[str, int] | None = None


# --- launches ----------------------------------------------------------------------------------------------------------


class _NoOperators(TorchDispatchMode):
    """Refuses PyTorch's operators: they launch kernels that are not noted. Views launch nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            raise ExportError(
                f"the step calls PyTorch's {func.name()}, and an export holds only this package's kernels; "
                "export a step at the stage fused or pdl."
            )
        return func(*args, **(kwargs or {}))


def record(call: Callable[[], None]) -> tuple[Launch, ...]:
    """The launches that `call` would make.

    Raises:
        ExportError: it calls an operator of PyTorch, launches nothing, or launches other things the second time.
    """
    with recorded(dry=True) as first:  # compiles, and makes what is made once
        call()
    with _NoOperators(), recorded(dry=True) as second:
        call()
    if not first:
        raise ExportError("the step launches no kernel of this package, so there is nothing to export.")
    if first != second:
        raise ExportError(
            f"the step made {len(first)} launches and then {len(second)} others; only a step that repeats itself, with "
            "its position in device memory, can be exported."
        )
    return tuple(first)


# --- buffers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Buffer:
    """A device buffer of the plan.

    Attributes:
        name: of the first tensor that begins in it.
        tensor: its bytes, contiguous.
        fill: the byte that it starts with throughout; None where it starts with the tensor's bytes.
        constant: whether the step only reads it.
    """

    name: str
    tensor: Tensor
    fill: int | None
    constant: bool

    @property
    def begin(self) -> int:
        """Its address."""
        return self.tensor.data_ptr()

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.begin + self.tensor.nbytes


def _kind(name: str) -> str:
    kind = name.partition(".")[0]
    if kind not in _KINDS or not re.fullmatch(r"[\w.\-]+", name):
        raise ExportError(f"the buffer {name!r} should be called {', '.join(f'{k}.*' for k in _KINDS)}.")
    return kind


def _uniform_byte(tensor: Tensor) -> int | None:
    """The byte that all of a tensor consists of, or None."""
    flat = tensor.reshape(-1).view(torch.uint8)
    low = int(flat.amin())
    return low if low == int(flat.amax()) else None


def _fill(kind: str, tensor: Tensor) -> int | None:
    if kind == "weights":
        return None
    if kind == "scratch":
        return 0
    byte = _uniform_byte(tensor)
    return 0 if byte is None and tensor.nbytes > _KEPT_STATE_BYTES else byte


def _checked(name: str, tensor: Tensor) -> Tensor:
    _kind(name)
    if not tensor.is_contiguous():
        raise ExportError(f"the buffer {name} has strides {list(tensor.stride())}; make it contiguous.")
    if tensor.dtype not in _DTYPES:
        raise ExportError(f"the buffer {name} is {tensor.dtype}, which an export does not write.")
    return tensor.detach()


class Buffers:
    """The buffers of a step by address; a tensor that lies in another is found there.

    Attributes:
        all: the buffers, in the order of `tensors`.

    Args:
        tensors: as `Step.tensors` gives them; empty ones are left out.

    Raises:
        ExportError: a name without a kind, a tensor that is not contiguous, or two that overlap in part.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        found = [(name, _checked(name, t)) for name, t in tensors.items() if t.numel()]
        found.sort(key=lambda item: (item[1].data_ptr(), -item[1].nbytes))
        self._by_address: list[Buffer] = []
        self._address_of = {name: tensor.data_ptr() for name, tensor in found}
        for name, tensor in found:
            self._add(name, tensor)
        self._begins = [buffer.begin for buffer in self._by_address]
        order = list(tensors)
        self.all = sorted(self._by_address, key=lambda buffer: order.index(buffer.name))
        self._number = {buffer.name: i for i, buffer in enumerate(self.all)}

    def _add(self, name: str, tensor: Tensor) -> None:
        last, begin = self._by_address[-1] if self._by_address else None, tensor.data_ptr()
        if last is None or begin >= last.end:
            kind = _kind(name)
            self._by_address.append(Buffer(name, tensor, _fill(kind, tensor), kind == "weights"))
        elif begin + tensor.nbytes > last.end or _kind(name) != _kind(last.name):
            raise ExportError(
                f"the buffers {last.name} and {name} overlap; give views of one tensor one kind, or keep them apart."
            )

    def place_of(self, name: str) -> tuple[int, int]:
        """Index in `all` of the buffer that holds the tensor called `name`, and its offset there in bytes."""
        if name not in self._address_of:
            raise ExportError(f"the step has no buffer {name}, which the program feeds or reads.")
        return self.find(self._address_of[name])

    def find(self, address: int) -> tuple[int, int] | None:
        """Index in `all` of the buffer that holds a device address, and the offset there; None where none does."""
        i = bisect_right(self._begins, address) - 1
        if i < 0 or address >= self._by_address[i].end:
            return None
        buffer = self._by_address[i]
        return self._number[buffer.name], address - buffer.begin


# --- the plan ----------------------------------------------------------------------------------------------------------


def _argument(launch: Launch, number: int, buffers: Buffers) -> str:
    value, type_ = launch.arguments[number]
    if type_ is ctypes.c_void_p:
        if not value:
            return "null"
        place = buffers.find(value)
        if place is None:
            raise ExportError(
                f"argument {number} of a launch of {launch.name} points to {value:#x}, which lies in none of the step's "
                f"{len(buffers.all)} buffers; add that tensor to the step's tensors()."
            )
        return "ptr:{}:{}".format(*place)
    if type_ not in _ARGUMENTS:
        raise ExportError(
            f"argument {number} of a launch of {launch.name} is a {type_.__name__}, which a plan cannot hold."
        )
    name, as_value, as_bits = _ARGUMENTS[type_]
    (bits,) = struct.unpack(as_bits, struct.pack(as_value, value))
    return f"{name}:{bits}"


class _Kernels:
    """Cubins by their hash, and the functions in them, numbered as they are met."""

    def __init__(self, launches: Iterable[Launch]):
        self.cubins: dict[str, Path] = {}
        self._digests: dict[Path, str] = {}
        self._lines: dict[tuple[str, str], tuple[int, str]] = {}
        for launch in launches:
            self._add(launch)

    def _add(self, launch: Launch) -> None:
        if launch.cubin not in self._digests:
            self._digests[launch.cubin] = hashlib.sha256(launch.cubin.read_bytes()).hexdigest()
        digest = self._digests[launch.cubin]
        self.cubins.setdefault(digest, launch.cubin)
        words = " ".join((launch.source, *launch.defines))
        cubin = list(self.cubins).index(digest)
        line = f"kernel {cubin} {launch.name} {words}"
        self._lines.setdefault((digest, launch.name), (len(self._lines), line))

    def number(self, launch: Launch) -> int:
        return self._lines[self._digests[launch.cubin], launch.name][0]

    @property
    def lines(self) -> list[str]:
        cubins = [f"cubin {digest}" for digest in self.cubins]
        return cubins + [line for _, line in self._lines.values()]


def _launch_line(kind: str, launch: Launch, kernels: _Kernels, buffers: Buffers) -> str:
    arguments = [_argument(launch, i, buffers) for i in range(len(launch.arguments))]
    sizes = (*launch.grid, *launch.block, launch.shared_bytes, int(launch.pdl))
    return " ".join(map(str, ("launch", kind, kernels.number(launch), *sizes, *arguments)))


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text).strip() or "unnamed"


def _header(about: About, weight_file_bytes: int) -> list[str]:
    shape = [f"{name} {size}" for name, size in (about.shape or {}).items()]
    return [
        f"trapetum-plan {VERSION}",
        f"arch {about.arch}",
        f"model {_one_line(about.model)}",
        " ".join(("shape", *(shape or ["unknown"]))),
        f"vocabulary {about.vocabulary}",
        f"context {about.context}",
        " ".join(("eos", *map(str, about.eos))),
        f"token_bytes {about.token_bytes} {about.cached_token_bytes}",
        f"tokens_a_graph {about.tokens_a_graph}",
        f"weights {weight_file_bytes}",
    ]


def _buffer_line(buffer: Buffer, offset: int | None) -> str:
    start = f"fill {buffer.fill}" if offset is None else f"file {offset}"
    use = "constant" if buffer.constant else "variable"
    return f"buffer {buffer.name} {buffer.tensor.nbytes} {start} {use}"


def _roles(buffers: Buffers) -> list[str]:
    lines = [" ".join(map(str, (role, *buffers.place_of(name)))) for role, name in ROLES.items()]
    return [*lines[:-1], f"{lines[-1]} {HISTORY_AHEAD}"]


@dataclass(frozen=True)
class Recorded:
    """A step as it is written: its buffers and its two lists of launches."""

    buffers: Buffers
    embed: tuple[Launch, ...]
    advance: tuple[Launch, ...]

    @property
    def launches(self) -> tuple[Launch, ...]:
        """Both lists, one behind the other."""
        return self.embed + self.advance


def _plan_text(about: About, step: Recorded, kernels: _Kernels, layout: "Layout") -> str:
    buffers = step.buffers
    lines = _header(about, layout.file_bytes) + kernels.lines
    lines += [_buffer_line(buffer, layout.offsets.get(buffer.name)) for buffer in buffers.all]
    lines += _roles(buffers)
    for kind, launches in (("embed", step.embed), ("advance", step.advance)):
        lines += [_launch_line(kind, launch, kernels, buffers) for launch in launches]
    return "\n".join([*lines, "end", ""])


# --- weights -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a safetensors file goes.

    Attributes:
        header: the bytes before the first tensor.
        offsets: name to place in the file, bytes from its beginning.
        file_bytes: the size of the file.
    """

    header: bytes
    offsets: dict[str, int]
    file_bytes: int


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """A safetensors file of `tensors` in their order, without gaps (the format: 8 bytes of length, JSON, the data)."""
    entries, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        span = [at, at + tensor.nbytes]
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        at = span[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {n: start + entries[n]["data_offsets"][0] for n in tensors}
    return Layout(struct.pack("<Q", len(text)) + text, offsets, start + at)


def _write_weights(file: BinaryIO, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """One tensor after another, so that no more than one of them is on the host."""
    file.write(layout.header)
    for tensor in tensors.values():
        file.write(tensor.reshape(-1).view(torch.uint8).cpu().numpy())


# --- the folder --------------------------------------------------------------------------------------------------------


def _check_step(step: Step, about: About) -> None:
    tokens = step.tensors().get(ROLES["token"])
    if tokens is not None and tokens.numel() != 1:
        raise ExportError(
            f"the step feeds {tokens.numel()} rows at once, and the program feeds one; make it with rows=1."
        )
    if not 1 <= about.tokens_a_graph <= 64:
        raise ExportError(f"tokens_a_graph is {about.tokens_a_graph}; choose 1 to 64.")


def _require_new(folder: Path) -> None:
    if folder.is_symlink() or folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ExportError(f"{folder} exists already; name a new directory.")


def _write(folder: Path, step: Recorded, about: About) -> None:
    kernels = _Kernels(step.launches)
    kept = {buffer.name: buffer.tensor for buffer in step.buffers.all if buffer.fill is None}
    layout = layout_of(kept)
    (folder / PLAN).write_text(_plan_text(about, step, kernels, layout))
    (folder / CUBINS).mkdir()
    for digest, path in kernels.cubins.items():
        shutil.copyfile(path, folder / CUBINS / f"{digest}.cubin")
    with open(folder / WEIGHTS, "wb") as file:
        _write_weights(file, kept, layout)


def export(step: Step, about: About, folder: str | Path) -> Path:
    """Write a step to a new directory; it appears whole or not at all.

    Args:
        step: a decode step of one row.
        about: what the plan says of the model.
        folder: a new directory, or an empty one.

    Returns:
        the directory.

    Raises:
        ExportError: the step cannot be exported, or the directory holds something.
        OSError: the directory cannot be written.
    """
    folder = Path(folder)
    _require_new(folder)
    _check_step(step, about)
    noted = Recorded(Buffers(step.tensors()), record(step.embed), record(step.advance))
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.absolute().name}."))
    try:
        temporary.chmod(0o755)  # mkdtemp makes private folders
        _write(temporary, noted, about)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


# --- the program -------------------------------------------------------------------------------------------------------


def cxx_compiler() -> str | None:
    """The system's C++ compiler: `$CXX` if set, else the first of c++, g++, clang++, or None."""
    candidates = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def build_command(compiler: str, out: Path) -> list[str]:
    """The command that builds the program as `out`."""
    source = STANDALONE / f"{PROGRAM}.cpp"
    return [compiler, "-std=c++17", "-O2", f"-I{KERNELS}", str(source), "-o", str(out), "-ldl"]


def build_standalone(folder: str | Path) -> Path:
    """Build the program into `folder` with the system's C++ compiler.

    Returns:
        its path.

    Raises:
        ExportError: there is no compiler, or it refuses the source.
    """
    require_clone()
    compiler, target = cxx_compiler(), Path(folder) / PROGRAM
    if compiler is None:
        raise ExportError(
            "no C++ compiler was found; install g++ or clang++, or name one in the CXX variable."
        )
    with tempfile.TemporaryDirectory() as place:
        built = Path(place) / PROGRAM
        done = subprocess.run(build_command(compiler, built), capture_output=True, text=True)
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise ExportError(f"{compiler} does not build {STANDALONE / PROGRAM}.cpp: {said}")
        write_atomically(target, built.read_bytes())
    target.chmod(0o755)
    return target


@dataclass(frozen=True)
class Output:
    """What the program printed of one run.

    Attributes:
        tokens: new token ids.
        first_token_s: seconds from the start to the first token.
        tokens_per_s: speed after the first token; None for a single token.
        gb_per_s: of weights and cache; None where the plan does not say the bytes.
    """

    tokens: list[int]
    first_token_s: float
    tokens_per_s: float | None = None
    gb_per_s: float | None = None


def _outputs(text: str) -> list[Output]:
    """The runs in what the program printed."""
    runs: list[dict] = []
    for line in text.splitlines():
        word, *values = line.split() or [""]
        if word == "tokens":
            runs.append({"tokens": [int(value) for value in values]})
        elif word in ("first_token_s", "tokens_per_s", "gb_per_s"):
            runs[-1][word] = float(values[0])
    return [Output(**run) for run in runs]


def run_standalone(
    folder: str | Path, prompt: Sequence[int], new_tokens: int, runs: int = 1, ignore_eos: bool = True
) -> list[Output]:
    """Decode with the program of an exported directory.

    Args:
        folder: an export with its program.
        prompt: token ids.
        new_tokens: at most so many.
        runs: how often, in one process.
        ignore_eos: go on behind a token that ends the text.

    Raises:
        ExportError: the program failed; its sentence.
    """
    folder = Path(folder).absolute()
    command = [str(folder / PROGRAM), str(folder), "-n", str(new_tokens), "--runs", str(runs)]
    command += ["--ignore-eos"] if ignore_eos else []
    prompt_words = " ".join(map(str, prompt))
    done = subprocess.run(
        command, input=prompt_words, capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        raise ExportError(f"the program failed: {done.stderr.strip() or f'exit code {done.returncode}.'}")
    return _outputs(done.stdout)
