"""What an export writes of a decode step: its launches with their pointers as places in buffers, and the weights.

`record` notes the launches of a step without making them, `Buffers` finds each pointer's buffer, `plan_text` is the plan that
`kernels/standalone/plan.h` describes and reads, and `layout_of` places the weights in a safetensors file.
"""

import ctypes
import hashlib
import json
import re
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trapetum.launch import Launch, recorded

VERSION = 1
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
    tokens_a_graph: int = 8
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


class Kernels:
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
        """Which kernel of the plan a launch starts."""
        return self._lines[self._digests[launch.cubin], launch.name][0]

    @property
    def lines(self) -> list[str]:
        """The plan's lines of cubins and kernels."""
        cubins = [f"cubin {digest}" for digest in self.cubins]
        return cubins + [line for _, line in self._lines.values()]


def _launch_line(kind: str, launch: Launch, kernels: Kernels, buffers: Buffers) -> str:
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


def plan_text(about: About, step: Recorded, kernels: Kernels, layout: "Layout") -> str:
    """The text of plan.txt.

    Raises:
        ExportError: a launch points into no buffer, or the step lacks one that the program needs.
    """
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


def write_weights(file: BinaryIO, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Write a safetensors file, one tensor after another, so that no more than one of them is on the host."""
    file.write(layout.header)
    for tensor in tensors.values():
        file.write(tensor.reshape(-1).view(torch.uint8).cpu().numpy())
