"""Safetensors files, read strictly: the whole header first, then each tensor against the hash that was stored for it.

    8 bytes         length of the header, little-endian
    length bytes    JSON: {tensor: {"dtype", "shape", "data_offsets"}, ..., "__metadata__": {key: text}}
    the rest        the tensors' bytes end to end, without gaps

A tensor is read into memory of its own and hashed there, once: what was checked is what is used, whatever happens to
the file meanwhile. SHA-256 costs about 0.5 s a GB where the processor has instructions for it (2 s for the 4 GB of a
7B model at 4 bits) and about 2 s a GB where it has none.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = 8
_MAX_JSON = 32 << 20  # bytes; 100 000 tensors with their hashes are 25 MB
_MAX_DIMENSIONS, _MAX_SIZE = 8, 1 << 48  # so that a product of sizes stays a small number
_MAX_NAME = 512
_CHUNK = 1 << 24


class FormatError(ValueError):
    """Codebook weights, or a file of them, break the format; the message says where and what to do."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor is in its file: dtype as safetensors writes it ("F16"), shape, first byte and one past the last."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def shown(name: str) -> str:
    """A name out of a file as a sentence may hold it: escaped if it is not plain, cut after 80 characters."""
    plain = name.isprintable() and name.isascii() and 0 < len(name) <= 80
    return name if plain else ascii(name[:80])


def once(pairs: list[tuple]) -> dict:
    """Keys and values of a JSON object as a dict, for `json.loads(object_pairs_hook=once)`.

    Raises:
        ValueError: a key stands there twice.
    """
    found: dict = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:80]!r} stands in it twice")
        found[name] = value
    return found


def strict_json(path: Path) -> dict:
    """The JSON object in a file of at most 32 MiB, no key in it twice.

    Raises:
        FormatError: unreadable, too large, too deep, not JSON, or no object.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_JSON:
            raise FormatError(f"{path} is {size} bytes; trapetum reads at most {_MAX_JSON} bytes of JSON.")
        fields = json.loads(path.read_bytes().decode(), object_pairs_hook=once)
    except FormatError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(
            f"{path} cannot be loaded, it is not readable JSON ({_said(error)}); write it again."
        ) from error
    if not isinstance(fields, dict):
        raise FormatError(f"{path} holds a JSON {type(fields).__name__}, not an object; write it again.")
    return fields


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _sha256(dtype: str, shape: tuple[int, ...]):
    return hashlib.sha256(f"{dtype} {list(shape)}\n".encode())


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor as a file holds it: dtype, shape and bytes, as 64 hexadecimal digits."""
    tensor = tensor.detach().cpu().contiguous()
    found = _sha256(_NAMES[tensor.dtype], tuple(tensor.shape))
    found.update(_bytes_of(tensor))
    return found.hexdigest()


def combined(digests: Mapping[str, str]) -> str:
    """One SHA-256 over the hashes of all tensors, by name."""
    return hashlib.sha256(json.dumps(dict(sorted(digests.items()))).encode()).hexdigest()


def _whole(value, below: int) -> bool:
    return type(value) is int and 0 <= value < below


def _entry(name: str, fields, origin: int, size: int) -> Entry:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"has the dtype {shown(str(dtype))}, and known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise FormatError(f"has a shape that is no list of at most {_MAX_DIMENSIONS} sizes")
    if not all(_whole(s, _MAX_SIZE) for s in shape):
        raise FormatError("has a shape with a size that is no whole number from 0 to 2^48")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_whole(o, size + 1) for o in offsets):
        raise FormatError(f"has offsets outside the {size} bytes of data")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise FormatError(f"needs {needed} bytes, and its offsets hold {offsets[1] - offsets[0]}")
    return Entry(dtype, tuple(shape), origin + offsets[0], origin + offsets[1])


def _entries(header: dict, origin: int, size: int) -> dict[str, Entry]:
    entries = {}
    for name, fields in header.items():
        if not name.isprintable() or not 0 < len(name) <= _MAX_NAME:
            raise FormatError(f"the tensor name {shown(name)} is empty, too long or not printable")
        try:
            entries[name] = _entry(name, fields, origin, size)
        except FormatError as error:
            raise FormatError(f"the tensor {shown(name)} {error}") from error
    end = origin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise FormatError(f"the tensor {shown(name)} does not begin where the one before it ends")
        end = entry.stop
    if end != origin + size:
        raise FormatError(f"{origin + size - end} bytes behind the last tensor belong to none")
    return entries


def _metadata(header: dict) -> dict[str, str]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("its metadata are not texts")
    return metadata


class TensorFile:
    """A safetensors file, open for reading, its header checked. A context manager.

    Attributes:
        path: of the file.
        entries: `Entry` by tensor name.
        metadata: texts that the writer put into the header.

    Raises:
        FormatError: not a file, truncated, padded, foreign, or a header that contradicts itself or the file's size.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_file():
            raise FormatError(
                f"{path} is not a file; give the path of a safetensors file written by trapetum."
            )
        self._file = None
        try:
            self._file = open(self.path, "rb", buffering=0)
            self.entries, self.metadata = self._header()
        except (OSError, ValueError, RecursionError) as error:
            self.close()
            size = os.path.getsize(path)
            raise FormatError(
                f"{path} ({size} bytes) is truncated or not a safetensors file ({_said(error)}); make it again."
            ) from error

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; tensors that were read stay."""
        if self._file is not None:
            self._file.close()

    def _header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._exactly(0, min(size, _LENGTH)), "little")
        if size < _LENGTH or not 2 <= length <= min(size - _LENGTH, _MAX_JSON):
            raise FormatError(f"it declares a header of {length} bytes")
        header = json.loads(self._exactly(_LENGTH, length).decode(), object_pairs_hook=once)
        if not isinstance(header, dict):
            raise FormatError("its header is no JSON object")
        metadata = _metadata(header)
        return _entries(header, _LENGTH + length, size - _LENGTH - length), metadata

    def _exactly(self, start: int, count: int) -> bytes:
        self._file.seek(start)
        found = self._file.read(count)
        if len(found) != count:
            raise FormatError(f"it ends after {start + len(found)} bytes")
        return found

    def read(self, name: str, sha256: str | None = None) -> Tensor:
        """One tensor, in memory of its own on the CPU.

        Args:
            name: a key of `entries`.
            sha256: what `digest` gave when it was stored, or None where no hash is known.

        Raises:
            FormatError: another hash, or the file is shorter than it was when it was opened.
        """
        entry = self.entries[name]
        raw = torch.empty(entry.stop - entry.start, dtype=torch.uint8, device="cpu")
        found = _sha256(entry.dtype, entry.shape)
        self._fill(memoryview(raw.numpy()), entry, found if sha256 is not None else None)
        if sha256 is not None and found.hexdigest() != sha256:
            raise FormatError(
                f"the tensor {name} in {self.path} is not what was stored (its SHA-256 begins with "
                f"{found.hexdigest()[:12]}, not {sha256[:12]}); copy or make the file again."
            )
        return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def _fill(self, room: memoryview, entry: Entry, found) -> None:
        self._file.seek(entry.start)
        at = 0
        while at < len(room):
            count = self._file.readinto(room[at : at + _CHUNK])
            if not count:
                raise FormatError(f"{self.path} became shorter while it was read; copy or make it again.")
            if found is not None:
                found.update(room[at : at + count])
            at += count
