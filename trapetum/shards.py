"""Read a checkpoint directory tensor by tensor, after every file's header was checked.

A checkpoint is `model.safetensors`, or several files that `model.safetensors.index.json` lists by tensor. A file is mapped
for one read and let go, so that the pages of a tensor that was read do not stay in memory.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trapetum.checkpoint import ModelError
from trapetum.formats import FormatError, described
from trapetum.tensor_files import TensorFile, digest, shown, strict_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_VALUES = 1 << 24


@dataclass(frozen=True)
class Entry:
    """Where a tensor is: its file's name, its shape, and its dtype as safetensors writes it ("F16")."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def _header(path: Path) -> dict[str, Entry]:
    try:
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {n: Entry(path.name, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise ModelError(
            f"{path} ({size} bytes) is truncated or not a safetensors file ({error}); download it again."
        ) from error


def _index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, every file in the index' own directory."""
    try:
        files = strict_json(path)["weight_map"]
        texts = [(name, file) for name, file in files.items() if isinstance(file, str)]
    except FormatError as error:
        raise ModelError(f"{path} is not an index of shards: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not an index of shards ({error}); download it again.") from error
    if len(texts) != len(files) or not files:
        raise ModelError(f"{path} is not an index of shards (weight_map must name files); download it again.")
    for name, file in texts:
        plain = Path(file).name == file and file.isprintable() and "\\" not in file and len(file) < 256
        if not plain or not file.endswith(".safetensors"):
            raise ModelError(
                f"{path} puts {shown(name)} into {file[:80]!r}, which is not a .safetensors file of its directory; "
                "do not trust this checkpoint."
            )
    return files


def files_of(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name as the index says, or None where the checkpoint is one file.

    Raises:
        ModelError: there is neither, or the index is not one.
    """
    if (folder / SINGLE).is_file():
        return None
    if (folder / INDEX).is_file():
        return _index(folder / INDEX)
    raise ModelError(
        f"{folder} holds neither {SINGLE} nor {INDEX}; trapetum does not open pickled weights (.bin, .pt), so save the "
        "model with safetensors first."
    )


class Shards:
    """The tensors of a checkpoint directory, by name.

    Attributes:
        entries: where each tensor is.

    Raises:
        ModelError: a file is missing, truncated or foreign, or index and files disagree.
    """

    def __init__(self, folder: Path):
        self._folder, self.entries, self._hashed = folder, {}, {}
        files = files_of(folder)
        names = [SINGLE] if files is None else sorted(set(files.values()))
        absent = [name for name in names if not os.path.isfile(folder / name)]
        if absent:
            raise ModelError(
                f"{folder} lacks {len(absent)} of {len(names)} shards, {absent[0]} among them; download them again."
            )
        for name in names:
            self._add(_header(folder / name))
            self._hashed |= self._hashes(name)
        if files is not None:
            self._require_as_indexed(files)

    def _hashes(self, name: str) -> dict[str, str]:
        """Of the tensors of a file that trapetum wrote; of others none."""
        with safe_open(str(self._folder / name), framework="pt") as file:
            if "trapetum" not in (file.metadata() or {}):
                return {}
        try:
            with TensorFile(self._folder / name) as file:
                found = described(file)
        except FormatError as error:
            raise ModelError(str(error)) from error
        return found.digests or {} if found else {}

    def _add(self, header: dict[str, Entry]) -> None:
        twice = header.keys() & self.entries.keys()
        if twice:
            name = min(twice)
            raise ModelError(
                f"{self._folder} holds {name} twice, in {self.entries[name].file} and in {header[name].file}; "
                "download the checkpoint again."
            )
        self.entries |= header

    def _require_as_indexed(self, files: dict[str, str]) -> None:
        for name, file in files.items():
            if name not in self.entries or self.entries[name].file != file:
                raise ModelError(
                    f"{self._folder / INDEX} puts {shown(name)} into {file}, and it is not there; download the "
                    "checkpoint again."
                )

    def require(self, shapes: dict[str, tuple[int, ...]], optional: Iterable[str] = ()) -> None:
        """Refuse a checkpoint that is not exactly a model's tensors.

        Args:
            shapes: what the model needs.
            optional: what may stand there besides.

        Raises:
            ModelError: a tensor is missing, too many, of another shape, or not floating-point.
        """
        missing = sorted(shapes.keys() - self.entries.keys())
        if missing:
            raise ModelError(
                f"{self._folder} lacks {len(missing)} tensors, {missing[0]} among them; download it again."
            )
        extra = sorted(self.entries.keys() - shapes.keys() - set(optional))
        if extra:
            raise ModelError(
                f"{self._folder} holds {len(extra)} tensors that its config.json has no place for, {extra[0]} among them; "
                "config.json and weights are of two models."
            )
        for name, shape in shapes.items():
            self._require_entry(name, tuple(shape))

    def _require_entry(self, name: str, shape: tuple[int, ...]) -> None:
        entry = self.entries[name]
        if entry.shape != shape:
            raise ModelError(
                f"{self._folder / entry.file} holds {name} as {list(entry.shape)}, and config.json asks for {list(shape)}; "
                "config.json and weights are of two models."
            )
        if entry.dtype not in _DTYPES:
            raise ModelError(
                f"{self._folder / entry.file} holds {name} in {entry.dtype}; trapetum reads {', '.join(_DTYPES)}, so load "
                "the checkpoint with its original weights."
            )

    def dtype(self) -> torch.dtype:
        """Of the first floating-point tensor, for a config that names none; float32 where there is none."""
        return next((_DTYPES[e.dtype] for e in self.entries.values() if e.dtype in _DTYPES), torch.float32)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor as stored; on the CPU it stands in the mapped file, so what is kept must be copied.

        Raises:
            ModelError: the file cannot be read (any more), or it holds a hash of the tensor that is another.
        """
        path = self._folder / self.entries[name].file
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                value = file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{name} cannot be read from {path} ({error}); download it again.") from error
        if name in self._hashed and digest(value) != self._hashed[name]:
            raise ModelError(
                f"the tensor {name} in {path} is not what was stored (its SHA-256 differs); copy or make the file again."
            )
        return value

    def equal(self, one: str, other: str) -> bool:
        """Whether two matrices hold the same values, compared a part at a time."""
        if self.entries[one].shape != self.entries[other].shape:
            return False
        rows, columns = self.entries[one].shape
        step = max(1, _CHUNK_VALUES // columns)
        parts = [(start, min(start + step, rows)) for start in range(0, rows, step)]
        return all(torch.equal(self._rows(one, *part), self._rows(other, *part)) for part in parts)

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        path = self._folder / self.entries[name].file
        with safe_open(str(path), framework="pt") as file:
            return file.get_slice(name)[start:stop].to(torch.float64)
