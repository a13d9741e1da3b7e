"""The files of a quantized directory: what they say of themselves, whether it is a model's, and whether it is unchanged.

What is checked, in this order and before anything large is made: config.json against its hash, every header against
its file, all hashes against config.json, sizes in config.json against the tensors, names, shapes and dtypes against
the model; then, tensor by tensor as it is read, its hash, finite codebooks and codes within the codebook. A directory
that was written before there were hashes, or by transformers' `save_pretrained`, has none and is checked for the rest.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from trapetum import formats, sparse
from trapetum.additive import AdditiveWeight
from trapetum.additive_linear import AdditiveLinear
from trapetum.checkpoint import OWNER, ModelError, config_digest
from trapetum.formats import CodebookWeight, FormatError
from trapetum.linear import CodebookLinear
from trapetum.shards import INDEX, SINGLE, files_of
from trapetum.tensor_files import DTYPES, TensorFile, combined, shown, strict_json

CONFIG = "config.json"
_LAYER = re.compile(r"model\.layers\.([0-9]+)\.")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_LARGEST = 1 << 31
_FLOATS = ("F64", "F32", "F16", "BF16")

#: One module's own tensors, as stored, by the name that each has in the module.
Parts = dict[str, Tensor]


def read_config(folder: Path) -> dict:
    """The fields of a directory's config.json, no key twice.

    Raises:
        ModelError: it is missing or not readable.
    """
    try:
        return strict_json(folder / CONFIG)
    except FormatError as error:
        raise ModelError(str(error)) from error


def is_ours(folder: Path, fields: dict) -> bool:
    """Whether `checkpoint.save` wrote a directory, codes or not, as far as config.json or the header of its file says.

    Raises:
        ModelError: config.json is said to be quantized in a way that is no JSON object.
    """
    quantization = fields.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise ModelError(
            f"{folder / CONFIG} holds a quantization_config that is no JSON object; write it again."
        )
    if (quantization or {}).get("quant_method") == OWNER:
        return True
    if quantization or not (folder / SINGLE).is_file():
        return False
    try:
        with TensorFile(folder / SINGLE) as file:
            return "trapetum" in file.metadata
    except FormatError as error:
        raise ModelError(str(error)) from error


def require_config(folder: Path, fields: dict, hashes: dict | None) -> None:
    """Refuse a config.json that is not what was written with the weights.

    Args:
        folder: the directory, for the sentence.
        fields: of its config.json.
        hashes: its `sha256`, or None where it has none.

    Raises:
        ModelError: another hash.
    """
    if hashes is not None and config_digest(fields) != hashes.get("config"):
        raise ModelError(
            f"{folder / CONFIG} is not what was written with the weights (its SHA-256 differs); copy it again, or, if you "
            "changed it yourself, delete sha256 from its quantization_config."
        )


class Stored:
    """The safetensors files of one quantized directory, open, headers checked. A context manager.

    Attributes:
        where: their directory.
        files: the file of each tensor, by tensor name.
        hashed: SHA-256 by tensor name; empty where the files hold none.
        sizes: in_features and bits of codebook weights, by name, as the headers say.

    Raises:
        ModelError: a file is no safetensors file, contradicts itself, or two hold one name.
    """

    def __init__(self, paths: list[Path]):
        self.where = paths[0].parent
        self.files: dict[str, TensorFile] = {}
        self.hashed: dict[str, str] = {}
        self.sizes: dict[str, dict[str, int]] = {}
        self._opened: list[TensorFile] = []
        self._described = False
        try:
            for path in paths:
                self._add(path)
        except FormatError as error:
            self.close()
            raise ModelError(str(error)) from error

    @classmethod
    def of(cls, folder: Path) -> "Stored":
        """The files of a directory: one, or those that its index lists, and no other.

        Raises:
            ModelError: also where index and files disagree, or the index names a path.
        """
        files = files_of(folder)
        stored = cls([folder / name for name in ([SINGLE] if files is None else sorted(set(files.values())))])
        found = {name: file.path.name for name, file in stored.files.items()}
        if files is not None and found != files:
            stored.close()
            name = min(found.items() ^ files.items())[0]
            raise ModelError(
                f"{folder / INDEX} and the files disagree on the tensor {shown(name)}; copy the directory again."
            )
        return stored

    def __enter__(self) -> "Stored":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._opened:
            file.close()

    def _add(self, path: Path) -> None:
        if path.suffix != ".safetensors":
            raise FormatError(
                f"{path} is not a .safetensors file; trapetum does not open pickled weights (.bin, .pt)."
            )
        file = TensorFile(path)
        self._opened.append(file)
        twice = file.entries.keys() & self.files.keys()
        if twice:
            raise FormatError(
                f"{min(twice)} is in {self.files[min(twice)].path} and in {path}; copy it again."
            )
        self.files |= dict.fromkeys(file.entries, file)
        described = formats.described(file)
        if described is not None:
            self._described = True
            self.sizes |= described.sizes
            self.hashed |= described.digests or {}

    def require_hashes(self, hashes: dict | None) -> None:
        """Refuse files whose hashes are not those that config.json was written with.

        Args:
            hashes: `sha256` of config.json, or None where it has none.

        Raises:
            ModelError: they differ, or the files have none.
        """
        if hashes is not None and combined(self.hashed) != hashes.get("weights"):
            raise ModelError(
                f"{self._opened[0].path} is not the file that config.json was written with (the SHA-256 of its hashes "
                "differs); copy the whole directory again."
            )

    def require_sizes(self, fields: dict) -> None:
        """Refuse a config.json that asks for another number of layers than there is, before any is made.

        Raises:
            ModelError: that, or a size that is no positive whole number.
        """
        where = self.where / CONFIG
        layers = {int(m[1]) for m in map(_LAYER.match, self.files) if m}
        asked = fields.get("num_hidden_layers")
        if type(asked) is not int or asked != len(layers):
            raise ModelError(
                f"{where} asks for {shown(str(asked))} layers, and the files hold {len(layers)}; copy the directory again."
            )
        for key in _SIZES:
            value = fields.get(key)
            if value is not None and not (type(value) is int and 0 < value < _LARGEST):
                raise ModelError(
                    f"{where} has {key} = {shown(str(value))}, which must be a whole number from 1 to 2^31; copy it again."
                )

    def require_model(self, model: nn.Module) -> None:
        """Refuse files that do not hold exactly the tensors of a model, in their shapes and dtypes.

        Args:
            model: with its codebook layers in place; may be on the meta device.

        Raises:
            ModelError: a tensor is missing, too many, or of another shape or dtype.
        """
        where, slots = self.where, dict(_slots(model))
        missing, extra = slots.keys() - self.files.keys(), self.files.keys() - slots.keys()
        if missing:
            raise ModelError(
                f"{where} lacks {len(missing)} tensors, {min(missing)} among them; quantize or copy the model again."
            )
        if extra:
            raise ModelError(
                f"{where} holds {len(extra)} tensors that its config.json has no place for, {shown(min(extra))} among them; "
                "config.json and weights are of two models."
            )
        for name, (tensor, exact) in slots.items():
            self._require_entry(name, tensor, exact)
        if self._described:
            self._require_layers(dict(codebooks(model)))

    def _require_entry(self, name: str, tensor: Tensor, exact: bool) -> None:
        file = self.files[name]
        entry = file.entries[name]
        if entry.shape != tuple(tensor.shape):
            raise ModelError(
                f"{file.path} holds {name} as {list(entry.shape)}, and config.json asks for {list(tensor.shape)}; "
                "config.json and weights are of two models."
            )
        if not (DTYPES[entry.dtype] == tensor.dtype if exact else entry.dtype in _FLOATS):
            needed = str(tensor.dtype) if exact else "a floating-point dtype"
            raise ModelError(f"{file.path} holds {name} in {entry.dtype} and not in {needed}; copy it again.")

    def _require_layers(self, layers: dict[str, CodebookLinear]) -> None:
        needed = {n: {"in_features": layer.in_features, "bits": layer.bits} for n, layer in layers.items()}
        if needed != self.sizes:
            wrong = min(n for n in needed.keys() | self.sizes.keys() if needed.get(n) != self.sizes.get(n))
            raise ModelError(
                f"config.json and the header of {self._opened[0].path} disagree on the codes of {shown(wrong)}; copy the "
                "directory again."
            )

    def read(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, Parts]]:
        """Every module of `model` that has tensors, with them, each checked as it is read.

        Args:
            model: one that `require_model` accepted.

        Raises:
            ModelError: a hash differs, a codebook is not finite, or a code is beyond its codebook; the tensor is named.
        """
        for prefix, module in list(model.named_modules()):
            leaves = [leaf for leaf, _, _ in _own(module, prefix, model)]
            if leaves:
                yield prefix, module, self._parts(prefix, module, leaves)

    def _parts(self, prefix: str, module: nn.Module, leaves: list[str]) -> Parts:
        try:
            parts = {}
            for leaf in leaves:
                name = f"{prefix}.{leaf}" if prefix else leaf
                parts[leaf] = self.files[name].read(name, self.hashed.get(name))
            _require_values(prefix, module, parts)
        except FormatError as error:
            raise ModelError(str(error)) from error
        return parts


def check(model: nn.Module, paths: list[Path], hashes: dict | None) -> None:
    """Read all files of a model once, and check what `Stored` checks.

    Args:
        model: with its codebook layers in place; may be on the meta device.
        paths: its files, in one directory with its config.json.
        hashes: `sha256` of its `quantization_config`, or None.

    Raises:
        ModelError: as the methods of `Stored` and `require_config`.
    """
    folder = paths[0].parent
    if hashes is not None:
        require_config(folder, read_config(folder), hashes)
    with Stored(paths) as stored:
        stored.require_hashes(hashes)
        stored.require_model(model)
        for _ in stored.read(model):
            pass


def codebooks(model: nn.Module) -> Iterator[tuple[str, CodebookLinear]]:
    """The codebook layers of a model by name."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, CodebookLinear))


def _require_values(prefix: str, module: nn.Module, parts: Parts) -> None:
    if isinstance(module, CodebookLinear):
        try:
            weight = CodebookWeight(parts["codes"], parts["codebook"], module.in_features, module.bits)
            weight.require_values()
            if module.outlier_share:
                apart = (parts[name] for name in sparse.PARTS)
                sparse.Outliers(*apart, module.in_features, module.outlier_share).check()
        except FormatError as error:
            raise FormatError(f"{prefix}: {error}") from error
    if isinstance(module, AdditiveLinear):
        try:
            AdditiveWeight(parts["codes"], parts["codebooks"], parts["scales"])
        except FormatError as error:
            raise FormatError(f"{prefix}: {error}") from error


def _own(module: nn.Module, prefix: str, model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """A module's own stored tensors: name, tensor, and whether the stored dtype must be exactly its dtype."""
    tied = (
        set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    )
    for leaf, tensor in module._parameters.items():
        if tensor is not None and f"{prefix}.{leaf}" not in tied:
            yield leaf, tensor, False
    for leaf, tensor in module._buffers.items():
        if tensor is not None and leaf not in module._non_persistent_buffers_set:
            yield leaf, tensor, leaf != "bias"


def _slots(model: nn.Module) -> Iterator[tuple[str, tuple[Tensor, bool]]]:
    for prefix, module in model.named_modules():
        for leaf, tensor, exact in _own(module, prefix, model):
            yield (f"{prefix}.{leaf}" if prefix else leaf), (tensor, exact)


def put(module: nn.Module, parts: Parts, device: torch.device | str) -> None:
    """Give a module its tensors: codes and codebooks as they are, the rest in the dtype that the module asks for.

    Args:
        module: may be on the meta device.
        parts: from `Stored.read`.
        device: where to put them.

    Raises:
        FormatError: a value that is NaN or infinite in that dtype.
    """
    for leaf, value in parts.items():
        if leaf in module._parameters:
            value = _finite(leaf, value.to(device, module._parameters[leaf].dtype))
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        elif leaf == "bias":
            module._buffers[leaf] = _finite(leaf, value.to(device, module._buffers[leaf].dtype))
        else:
            module._buffers[leaf] = value.to(device)


def _finite(leaf: str, value: Tensor) -> Tensor:
    if not bool(value.isfinite().all()):
        raise FormatError(
            f"its {leaf} holds values that are NaN or infinite in {value.dtype}; load it in another dtype."
        )
    return value
