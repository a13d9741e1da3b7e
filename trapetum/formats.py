"""Codebook weights as they are stored: a few bits per weight and a short table of values per output channel.

    w[o, i] = codebook[o, code(o, i)]

A row of codes is a little-endian bit stream: code i occupies bits [i*bits, (i+1)*bits), bit b of the stream
is bit b % 8 of byte b // 8, and the last byte is filled up with zeros. With 3 bits a code can straddle bytes:

    byte    0                 1                 2
    bit     0 1 2 3 4 5 6 7   0 1 2 3 4 5 6 7   0 1 2 3 4 5 6 7
    code    0 0 0 1 1 1 2 2   2 3 3 3 4 4 4 5   5 5 6 6 6 7 7 7

This is the canonical layout, the one in files. Kernels repack it into their own (`trapetum.ops.to_layout`).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trapetum.tensor_files import FormatError, TensorFile, combined, digest, once, shown

BITS = (2, 3, 4, 8)
#: The (bits, codes) pairs that the workbook measures; any shorter codebook can be stored too.
SCHEMES = {(8, 256), (8, 64), (4, 16), (3, 8), (2, 4)}
_VERSION = 1
_CHUNK_WEIGHTS = 1 << 24


def _row_bytes(in_features: int, bits: int) -> int:
    return -(-in_features * bits // 8)


def _require_bits(bits: int) -> None:
    if bits not in BITS:
        raise FormatError(
            f"{bits} bits per code are not supported; choose one of {', '.join(map(str, BITS))}."
        )


def _require_codebook(codebook: Tensor, bits: int) -> None:
    if codebook.dim() != 2 or codebook.shape[0] < 1 or not 1 <= codebook.shape[1] <= 2**bits:
        raise FormatError(
            f"the codebook has shape {list(codebook.shape)}; {bits}-bit codes need [out_features, n_codes] "
            f"with 1 to {2**bits} codes."
        )
    if codebook.dtype != torch.float16:
        raise FormatError(
            f"the codebook is {codebook.dtype}; it is stored as torch.float16, so convert it first."
        )


def _require_finite(codebook: Tensor) -> None:
    bad = int((~codebook.isfinite()).sum())
    if bad:
        raise FormatError(
            f"{bad} of {codebook.numel()} codebook values are NaN or infinite in fp16 (largest 65504); "
            f"scale the weights or leave this layer dense."
        )


def _require_codes_in_range(indices: Tensor, n_codes: int) -> None:
    largest = int(indices.max())
    if largest >= n_codes:
        raise FormatError(
            f"code {largest} is out of range; the codebook has {n_codes} entries, 0 to {n_codes - 1}."
        )


@dataclass(frozen=True, eq=False)
class CodebookWeight:
    """A weight matrix [out_features, in_features] as packed codes and one codebook per output channel.

    Attributes:
        codes: uint8 [out_features, ceil(in_features*bits/8)], the bit stream drawn at the top of this module.
        codebook: float16 [out_features, n_codes], n_codes <= 2**bits.
        in_features: weights per row.
        bits: bits per code, one of `BITS`.

    Raises:
        FormatError: a shape, dtype or size does not fit the others.
    """

    codes: Tensor
    codebook: Tensor
    in_features: int
    bits: int

    def __post_init__(self):
        _require_bits(self.bits)
        _require_codebook(self.codebook, self.bits)
        if self.in_features < 1:
            raise FormatError(f"in_features is {self.in_features}; a row needs at least one weight.")
        expected = (self.codebook.shape[0], _row_bytes(self.in_features, self.bits))
        if self.codes.dtype != torch.uint8 or tuple(self.codes.shape) != expected:
            raise FormatError(
                f"the codes are {self.codes.dtype} {list(self.codes.shape)}; {self.in_features} weights of "
                f"{self.bits} bits in {expected[0]} rows are torch.uint8 {list(expected)}."
            )

    @property
    def out_features(self) -> int:
        """Rows, one output channel each."""
        return self.codebook.shape[0]

    @property
    def n_codes(self) -> int:
        """Codebook entries per output channel."""
        return self.codebook.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and codebooks together: what one decode step reads of this weight."""
        return self.codes.nbytes + self.codebook.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, codebook and padding included."""
        return 8 * self.nbytes / (self.out_features * self.in_features)

    def require_values(self) -> None:
        """Refuse codebooks that are not finite, and codes beyond the codebook where the bits could hold such.

        Raises:
            FormatError: either of these.
        """
        _require_finite(self.codebook)
        if self.n_codes < 2**self.bits:
            _require_codes_in_range(self.indices(), self.n_codes)

    def indices(self) -> Tensor:
        """The codes, one a byte: uint8 [out_features, in_features]."""
        return unpack_rows(self.codes, self.in_features, self.bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out_features, in_features] in `dtype`, on the codes' device."""
        dense = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.codes.device)
        values = self.codebook.to(dtype)
        rows = max(1, _CHUNK_WEIGHTS // self.in_features)
        for start in range(0, self.out_features, rows):
            part = slice(start, start + rows)
            codes = unpack_rows(self.codes[part], self.in_features, self.bits)
            torch.gather(values[part], 1, codes.long(), out=dense[part])
        return dense

    def to(self, device: torch.device | str) -> "CodebookWeight":
        """The same weight with its tensors on `device`."""
        return CodebookWeight(self.codes.to(device), self.codebook.to(device), self.in_features, self.bits)


def _pack_rows(indices: Tensor, bits: int) -> Tensor:
    rows, in_features = indices.shape
    codes = torch.zeros(rows, _row_bytes(in_features, bits), dtype=torch.uint8, device=indices.device)
    for phase in range(min(8, in_features)):  # 8 codes are exactly `bits` bytes, so every 8th code sits alike
        column = indices[:, phase::8]
        byte, shift = divmod(phase * bits, 8)
        codes[:, byte::bits][:, : column.shape[1]] |= column << shift
        if shift + bits > 8:
            codes[:, byte + 1 :: bits][:, : column.shape[1]] |= column >> (8 - shift)
    return codes


def unpack_rows(codes: Tensor, in_features: int, bits: int) -> Tensor:
    """Undo the packing of rows of codes.

    Args:
        codes: uint8 [rows, ceil(in_features*bits/8)].
        in_features: codes per row.
        bits: bits per code.

    Returns:
        uint8 [rows, in_features].

    Raises:
        FormatError: `codes` does not have that shape or dtype.
    """
    _require_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] != _row_bytes(in_features, bits):
        raise FormatError(
            f"the codes are {codes.dtype} {list(codes.shape)}; {in_features} codes of {bits} bits need "
            f"torch.uint8 rows of {_row_bytes(in_features, bits)} bytes."
        )
    if bits == 8:
        return codes.clone()
    indices = torch.empty(codes.shape[0], in_features, dtype=torch.uint8, device=codes.device)
    for phase in range(min(8, in_features)):
        column = indices[:, phase::8]
        byte, shift = divmod(phase * bits, 8)
        value = codes[:, byte::bits][:, : column.shape[1]] >> shift
        if shift + bits > 8:
            value = value | (codes[:, byte + 1 :: bits][:, : column.shape[1]] << (8 - shift))
        column.copy_(value & (2**bits - 1))
    return indices


def pack(indices: Tensor, codebook: Tensor, bits: int) -> CodebookWeight:
    """Pack one code per weight into the stored layout.

    Args:
        indices: uint8 [out_features, in_features], each below n_codes.
        codebook: float16 [out_features, n_codes], finite.
        bits: bits per code, with n_codes <= 2**bits.

    Returns:
        the packed weight, on the device of `indices`.

    Raises:
        FormatError: shapes or dtypes do not fit, a code is out of range, or the codebook is not finite.
    """
    _require_bits(bits)
    _require_codebook(codebook, bits)
    if indices.dtype != torch.uint8 or indices.dim() != 2 or indices.shape[0] != codebook.shape[0]:
        raise FormatError(
            f"the codes are {indices.dtype} {list(indices.shape)}; a codebook of {codebook.shape[0]} rows "
            f"needs torch.uint8 [{codebook.shape[0]}, in_features]."
        )
    if indices.shape[1] < 1:
        raise FormatError("the rows hold no weights; in_features must be at least 1.")
    _require_finite(codebook)
    _require_codes_in_range(indices, codebook.shape[1])
    return CodebookWeight(_pack_rows(indices, bits), codebook.contiguous(), indices.shape[1], bits)


class Archive(NamedTuple):
    """What a file holds: codebook weights by name, other tensors by name, and the writer's metadata."""

    weights: dict[str, CodebookWeight]
    extra: dict[str, Tensor]
    metadata: dict[str, str]


def _tensors(weights: Mapping[str, CodebookWeight], extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {name: tensor.contiguous() for name, tensor in extra.items()}
    for name, weight in weights.items():
        for part in ("codes", "codebook"):
            if f"{name}.{part}" in extra:
                raise FormatError(
                    f"the extra tensor {name}.{part} has the name of a part of the weight {name}."
                )
            tensors[f"{name}.{part}"] = getattr(weight, part).contiguous()
    return tensors


def save(
    path: Path | str,
    weights: Mapping[str, CodebookWeight],
    extra: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write codebook weights to one safetensors file, which appears whole or not at all.

    The weight `name` becomes the tensors `name.codes` and `name.codebook`; sizes, bits and the SHA-256 of every tensor
    go into the header.

    Args:
        path: the file to write.
        weights: by name.
        extra: other tensors (biases, norms, embeddings), stored as they are.
        metadata: strings for the header.

    Returns:
        `tensor_files.combined` of the hashes.

    Raises:
        FormatError: two tensors would have one name, or the metadata are not strings.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors = _tensors(weights, extra or {})
    digests = {name: digest(tensor) for name, tensor in tensors.items()}
    header = {"format": "pt", **(metadata or {}), "trapetum": _described(weights, digests)}
    wrong = [key for key, value in header.items() if not isinstance(value, str)]
    if wrong:
        raise FormatError(
            f"the metadata {wrong[0]!r} is not a string; a safetensors header holds strings only."
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, str(temporary), metadata=header)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return combined(digests)


def _described(weights: Mapping[str, CodebookWeight], digests: Mapping[str, str]) -> str:
    sizes = {name: {"in_features": w.in_features, "bits": w.bits} for name, w in weights.items()}
    return json.dumps({"version": _VERSION, "weights": sizes, "sha256": digests}, sort_keys=True)


class Described(NamedTuple):
    """What the writer said about a file: sizes of codebook weights by name, and hashes by tensor (old files: None)."""

    sizes: dict[str, dict[str, int]]
    digests: dict[str, str] | None


def described(file: TensorFile) -> Described | None:
    """The `trapetum` entry of a file's header, or None where there is none (another program wrote the file).

    Raises:
        FormatError: the entry is damaged, or of another version of the format.
    """
    if "trapetum" not in file.metadata:
        return None
    try:
        header = json.loads(file.metadata["trapetum"], object_pairs_hook=once)
        version, unknown = header["version"], header.keys() - {"version", "weights", "sha256"}
        sizes = {name: _size(size) for name, size in header["weights"].items()}
        digests = header.get("sha256")
        damaged = unknown or (digests is not None and not _covers(digests, file))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"{file.path} has a damaged trapetum header ({error!r}); quantize the model again."
        ) from error
    if version != _VERSION:
        raise FormatError(
            f"{file.path} has format version {str(version)[:20]}, this program reads {_VERSION}; quantize it again."
        )
    if damaged:
        what = (
            f"unknown field {shown(min(unknown))}" if unknown else "it must hold one SHA-256 for each tensor"
        )
        raise FormatError(f"{file.path} has a damaged trapetum header ({what}); quantize the model again.")
    return Described(sizes, digests)


def _size(size: dict) -> dict[str, int]:
    found = {key: size[key] for key in ("in_features", "bits")}
    if not all(type(value) is int for value in found.values()):
        raise TypeError("in_features and bits must be whole numbers")
    return found


def _covers(digests: dict, file: TensorFile) -> bool:
    good = all(isinstance(value, str) and len(value) == 64 for value in digests.values())
    return good and digests.keys() == file.entries.keys()


def _take(path: Path, name: str, tensors: dict[str, Tensor], size: dict[str, int]) -> CodebookWeight:
    try:
        codes, codebook = (tensors.pop(f"{name}.{part}") for part in ("codes", "codebook"))
        weight = CodebookWeight(codes, codebook, **size)
        weight.require_values()
    except KeyError as error:
        raise FormatError(f"{path} lacks the tensor {error.args[0]}; quantize the model again.") from error
    except FormatError as error:
        raise FormatError(f"{path}, weight {name}: {error}") from error
    return weight


def load(path: Path | str, device: str = "cpu") -> Archive:
    """Read a file written by `save`, checking every hash, shape, dtype and code.

    Returns:
        the weights by name, the other tensors by name, and the metadata.

    Raises:
        FormatError: missing, truncated, changed or foreign file, or weights that break the format.
    """
    path = Path(path)
    with TensorFile(path) as file:
        found = described(file)
        if found is None:
            raise FormatError(f"{path} holds no trapetum weights; make it with `trapetum quantize`.")
        digests = found.digests or {}
        tensors = {name: file.read(name, digests.get(name)).to(device) for name in file.entries}
    weights = {name: _take(path, name, tensors, size) for name, size in found.sizes.items()}
    metadata = {k: v for k, v in file.metadata.items() if k not in ("trapetum", "format")}
    return Archive(weights, tensors, metadata)
