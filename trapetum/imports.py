"""Checkpoints in the formats of GPTQ, AWQ and AQLM as codebook directories: exactly, or not at all.

GPTQ and AWQ store whole numbers q, and a scale and a zero point for each output channel and group of inputs:

    w[o, i] = scale[g, o] * (q[o, i] - zero[g, o]),    g the group of input i

Where a channel has one group (group_size -1), or the same scale and zero in all, its 2**bits possible values are a
codebook, and q are its codes. Each value is rounded once to the dtype of the scales, which is how these formats are
dequantized (the difference of two small whole numbers is exact, the product is rounded), and must then be a float16.

GPTQ    qweight int32 [in*bits/32, out]: read down a column, the words are one little-endian bit stream of q, at 3 bits
        across word borders. That is a row of codes as `trapetum.formats` stores it.
        qzeros int32 [groups, out*bits/32]: along a row likewise. Format "gptq" stores zero - 1, "gptq_v2" zero.
        g_idx int32 [in]: the group of each input; in order of importance with desc_act, and the rows stay where they were.
AWQ     qweight int32 [in, out/8], qzeros int32 [groups, out/8], 4 bits: eight outputs a word, low nibble first, in the
        order 0 2 4 6 1 3 5 7 (version "gemm").
both    scales floating [groups, out].

Sources: Frantar et al., "GPTQ", arXiv:2210.17323; Lin et al., "AWQ", arXiv:2306.00978; the checkpoints' layouts as
AutoGPTQ, GPTQModel and AutoAWQ document and write them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from trapetum.aqlm import read_aqlm
from trapetum.checkpoint import ModelError, save
from trapetum.formats import BITS, CodebookWeight, FormatError, pack, unpack_rows
from trapetum.linear import CodebookLinear
from trapetum.models import generation_config_of, tokenizer_of
from trapetum.reading import buildable, dtype_of, finish, skeleton
from trapetum.stored import Stored, put, read_config
from trapetum.swap import HEAD, linears, note_method, replace
from trapetum.tensor_files import shown

#: Output of an AWQ word that nibble 0, 1, ... 7 holds.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_WORD = 32
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_AGAIN = "quantize the original model (`trapetum quantize MODEL OUT`)"
#: Tensors by name -> a layer's weight.
Convert = Callable[[Mapping[str, Tensor]], CodebookWeight]


# --- one layer -----------------------------------------------------------------------------------------------------


def _require(tensor: Tensor, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    kind = "floating" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    if kind != dtype or tuple(tensor.shape) != shape:
        raise FormatError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} and must be {dtype} {list(shape)}; download it again."
        )


def _require_parts(tensors: Mapping[str, Tensor]) -> None:
    missing = [part for part in _PARTS[:3] if part not in tensors]
    if missing:
        raise FormatError(f"the tensor {missing[0]} is missing; download the checkpoint again.")
    qweight = tensors["qweight"]
    if qweight.dtype != torch.int32 or qweight.dim() != 2 or 0 in qweight.shape:
        raise FormatError(
            f"qweight is {qweight.dtype} {list(qweight.shape)}, not a matrix of int32; only int32 words are known."
        )
    if tensors["scales"].dim() != 2 or not tensors["scales"].isfinite().all():
        raise FormatError("scales are no matrix of finite values; download the checkpoint again.")


def _stream(words: Tensor, count: int, bits: int) -> Tensor:
    """int32 [rows, count*bits/32] as whole numbers, uint8 [rows, count]."""
    return unpack_rows(words.contiguous().view(torch.uint8), count, bits)


def _one_grid(scales: Tensor, zeros: Tensor, group: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The scale and zero of each channel where all groups that inputs belong to share them: [out] each."""
    used = group.unique()
    scales, zeros = scales[used], zeros[used]
    if bool((scales == scales[0]).all() and (zeros == zeros[0]).all()):
        return scales[0], zeros[0]
    values = (torch.arange(2**bits).view(-1, 1, 1) - zeros) * scales.double()  # [2**bits, groups, out]
    values = values.flatten(0, 1).sort(0).values
    most = 1 + int((values[1:] != values[:-1]).sum(0).max())
    inputs, groups = len(group), len(used)
    own = bits + (16 + bits) * groups / inputs
    needed = math.ceil(math.log2(most)) + 16 * most / inputs
    raise FormatError(
        f"{groups} groups of inputs have scales of their own ({own:.2f} bits a weight), and a codebook belongs to a whole "
        f"output channel: exact codes would need {most} values a channel, {needed:.2f} bits a weight; take a checkpoint "
        f"with group_size -1, or {_AGAIN}."
    )


def _codebook(scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """float16 [out, 2**bits]: (q - zero) * scale for q = 0, 1, ..., rounded once to the dtype of `scale`."""
    steps = torch.arange(2**bits) - zero.unsqueeze(1)
    values = steps.to(scale.dtype) * scale.unsqueeze(1)
    codebook = values.to(torch.float16)
    wrong = int((codebook.to(values.dtype) != values).sum())
    if wrong:
        raise FormatError(
            f"{wrong} of {values.numel()} values of its {str(scale.dtype).removeprefix('torch.')} grid are no float16, "
            f"which codebooks are stored in; take a checkpoint with float16 scales, or {_AGAIN}."
        )
    return codebook


def _gptq_zeros(words: Tensor, count: int, bits: int, version: int) -> Tensor:
    zeros = _stream(words, count, bits).int()
    if version == 2:
        return zeros
    if bool((zeros == 2**bits - 1).any()):
        raise FormatError(
            f"a stored zero point is {2**bits - 1}, which some programs read as 0 and others as {2**bits} (the format stores "
            f"zero - 1); {_AGAIN}."
        )
    return zeros + 1


def _gptq_groups(tensors: Mapping[str, Tensor], in_features: int, groups: int) -> Tensor:
    """The group of each input: int [in_features]."""
    if "g_idx" not in tensors:
        if in_features % groups:
            raise FormatError(f"{groups} groups do not divide {in_features} inputs; download it again.")
        return torch.arange(in_features) // (in_features // groups)
    group = tensors["g_idx"]
    _require(group, "g_idx", "int32", (in_features,))
    if int(group.min()) < 0 or int(group.max()) >= groups:
        raise FormatError(
            f"g_idx holds groups {int(group.min())} to {int(group.max())}, and there are {groups}; download it again."
        )
    return group.long()


def from_gptq(
    tensors: Mapping[str, Tensor], bits: int, version: int = 1, symmetric: bool = False
) -> CodebookWeight:
    """A weight from the tensors of one GPTQ layer.

    Args:
        tensors: `qweight`, `qzeros`, `scales` and perhaps `g_idx`, as drawn at the top of this module, on the CPU.
        bits: 2, 3, 4 or 8.
        version: 1 where zero - 1 is stored ("gptq"), 2 where zero is ("gptq_v2").
        symmetric: the config promises zero = 2**(bits - 1); another one is refused, for then the version is wrong.

    Raises:
        FormatError: a tensor is missing or does not fit, or there is no exact codebook; what to do instead.
    """
    if bits not in BITS:
        raise FormatError(
            f"{bits} bits are not supported; choose a checkpoint of {', '.join(map(str, BITS))}."
        )
    _require_parts(tensors)
    qweight, scales = tensors["qweight"], tensors["scales"]
    (rows, out_features), groups = qweight.shape, len(scales)
    in_features = rows * _WORD // bits
    if in_features * bits != rows * _WORD or out_features * bits % _WORD:
        raise FormatError(
            f"qweight is {list(qweight.shape)}: {bits}-bit numbers do not fill its words; check bits in the config."
        )
    _require(scales, "scales", "floating", (groups, out_features))
    _require(tensors["qzeros"], "qzeros", "int32", (groups, out_features * bits // _WORD))
    group = _gptq_groups(tensors, in_features, groups)
    zeros = _gptq_zeros(tensors["qzeros"], out_features, bits, version)
    _require_symmetric(zeros, bits, version, symmetric)
    codebook = _codebook(*_one_grid(scales, zeros, group, bits), bits)
    codes = qweight.T.contiguous().view(torch.uint8)
    weight = CodebookWeight(codes, codebook, in_features, bits)
    weight.require_values()
    return weight


def _require_symmetric(zeros: Tensor, bits: int, version: int, symmetric: bool) -> None:
    if symmetric and bool((zeros != 2 ** (bits - 1)).any()):
        low, high = int(zeros.min()), int(zeros.max())
        other = {1: "gptq_v2", 2: "gptq"}[version]
        raise FormatError(
            f"the config says sym, so that all zero points are {2 ** (bits - 1)}, and they are {low} to {high}; if another "
            f"program wrote this, set checkpoint_format to {other!r} or sym to false in its config.json."
        )


def from_awq(tensors: Mapping[str, Tensor]) -> CodebookWeight:
    """A weight from the tensors of one AWQ layer of version "gemm", 4 bits.

    Args:
        tensors: `qweight`, `qzeros` and `scales`, as drawn at the top of this module, on the CPU.

    Raises:
        FormatError: a tensor is missing or does not fit, or there is no exact codebook; what to do instead.
    """
    _require_parts(tensors)
    qweight, scales = tensors["qweight"], tensors["scales"]
    in_features, out_features, groups = len(qweight), qweight.shape[1] * 8, len(scales)
    _require(scales, "scales", "floating", (groups, out_features))
    _require(tensors["qzeros"], "qzeros", "int32", (groups, out_features // 8))
    if in_features % groups:
        raise FormatError(f"{groups} groups do not divide {in_features} inputs; download it again.")
    group = torch.arange(in_features) // (in_features // groups)
    zeros = _awq_numbers(tensors["qzeros"]).int()
    codebook = _codebook(*_one_grid(scales, zeros, group, 4), 4)
    return pack(_awq_numbers(qweight).T.contiguous(), codebook, 4)


def _awq_numbers(words: Tensor) -> Tensor:
    """int32 [rows, out/8] as uint8 [rows, out]."""
    nibbles = _stream(words, 8 * words.shape[1], 4).view(len(words), -1, 8)
    numbers = torch.empty_like(nibbles)
    numbers[..., AWQ_ORDER] = nibbles
    return numbers.flatten(1)


# --- a whole model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Imported:
    """What `import_model` did.

    Attributes:
        folder: the directory that was written.
        method: "gptq", "awq" or "aqlm".
        layers: how many were converted.
        bits: bits of the codes.
        nbytes: of the safetensors file.
    """

    folder: Path
    method: str
    layers: int
    bits: int
    nbytes: int


def _gptq(config: dict) -> Convert:
    known = {"gptq": 1, "gptq_v2": 2}
    version = config.get("checkpoint_format") or config.get("format") or "gptq"
    if version not in known:
        raise ModelError(f"its checkpoint_format is {shown(str(version))}; known are {', '.join(known)}.")
    if config.get("pack_dtype") not in (None, "int32"):
        raise ModelError(f"its pack_dtype is {shown(str(config['pack_dtype']))}; only int32 is known.")
    bits, symmetric = config.get("bits"), bool(config.get("sym"))
    if type(bits) is not int:
        raise ModelError(f"its bits are {shown(str(bits))}; known are {', '.join(map(str, BITS))}.")
    return lambda tensors: from_gptq(tensors, bits, known[version], symmetric)


def _awq(config: dict) -> Convert:
    needed = {"bits": 4, "version": "gemm", "zero_point": True}
    for field, value in needed.items():
        found = config.get(field, config.get("w_bit") if field == "bits" else value)
        found = found.lower() if isinstance(found, str) else found
        if found != value:
            raise ModelError(f"its {field} is {shown(str(found))}, and only {value} is known; {_AGAIN}.")
    return from_awq


_FORMATS: dict[str, Callable[[dict], Convert]] = {"gptq": _gptq, "awq": _awq}


def _foreign(folder: Path, fields: dict) -> tuple[str, dict]:
    """The format of a directory, and its quantization_config."""
    config = fields.get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else None
    method = method.lower() if isinstance(method, str) else method
    if method not in (*_FORMATS, "aqlm"):
        raise ModelError(
            f"{folder} has quant_method {shown(str(method))} in its config.json; trapetum imports gptq, awq and aqlm."
        )
    return method, config


def _parts(stored: Stored, name: str) -> dict[str, Tensor]:
    return {
        part: stored.files[f"{name}.{part}"].read(f"{name}.{part}")
        for part in _PARTS
        if f"{name}.{part}" in stored.files
    }


def _bias(stored: Stored, name: str, layer: nn.Linear, dtype: torch.dtype) -> Tensor | None:
    """The bias of a layer; zeros that a checkpoint holds for a layer without one are left out."""
    key = f"{name}.bias"
    value = stored.files[key].read(key) if key in stored.files else None
    if layer.bias is None:
        if value is not None and bool(value.any()):
            raise ModelError(f"{key} is not zero, and config.json asks for no bias there; download it again.")
        return None
    if value is None:
        raise ModelError(f"{key} is missing; download the checkpoint again.")
    _require(value, key, "floating", tuple(layer.bias.shape))
    return value.to(dtype)


def _convert(stored: Stored, model: nn.Module, convert: Convert, progress: bool) -> set[str]:
    """Put a codebook layer in the place of each linear that the files hold packed; the names of their tensors."""
    packed = [(n, layer) for n, layer in linears(model, lm_head=True) if f"{n}.qweight" in stored.files]
    if not packed:
        raise ModelError(
            f"{stored.where} holds no qweight of a linear layer; give the directory of a checkpoint."
        )
    for name, layer in tqdm(packed, desc="import", unit="layer", disable=not progress):
        try:
            weight = convert(_parts(stored, name))
            if (weight.out_features, weight.in_features) != (layer.out_features, layer.in_features):
                raise FormatError(
                    f"it is [{weight.out_features}, {weight.in_features}], and config.json asks for "
                    f"[{layer.out_features}, {layer.in_features}]; config.json and weights are of two models."
                )
            bias = _bias(stored, name, layer, model.dtype)
        except FormatError as error:
            raise ModelError(f"{stored.where}, {name}: {error}") from error
        replace(model, name, CodebookLinear.from_weight(weight, bias))
    if any(name == HEAD for name, _ in packed):  # a head of codes has no weight that could be the embedding's
        model.config.tie_word_embeddings = False
    return {f"{name}.{part}" for name, _ in packed for part in (*_PARTS, "bias")}


def _dense(model: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """What is still to be read: module, name in it and tensor on the meta device, by full name."""
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    found = {}
    for prefix, module in model.named_modules():
        for leaf, tensor in module._parameters.items():
            if tensor is not None and tensor.is_meta and f"{prefix}.{leaf}" not in tied:
                found[f"{prefix}.{leaf}"] = module, leaf, tensor
    return found


def _fill(stored: Stored, model: nn.Module, taken: set[str]) -> None:
    """Read what stays dense, and refuse what has no place."""
    dense = _dense(model)
    missing = dense.keys() - stored.files.keys()
    if missing:
        raise ModelError(
            f"{stored.where} lacks {len(missing)} tensors, {min(missing)} among them; download it again."
        )
    for name, (module, leaf, tensor) in dense.items():
        try:
            value = stored.files[name].read(name)
            _require(value, name, "floating", tuple(tensor.shape))
            put(module, {leaf: value}, "cpu")
        except FormatError as error:
            raise ModelError(f"{stored.where}, {name}: {error}") from error
    model.tie_weights()
    for name in sorted(stored.files.keys() - dense.keys() - taken):
        _require_known(stored, model, name)


def _require_known(stored: Stored, model: nn.Module, name: str) -> None:
    """Of a tensor that no module needs: rope tables are computed, and a tied head must be the embedding."""
    if name.endswith("rotary_emb.inv_freq"):
        return
    if name == f"{HEAD}.weight" and model.config.tie_word_embeddings:
        value, embedding = stored.files[name].read(name), model.get_input_embeddings().weight
        if value.shape == embedding.shape and torch.equal(value.to(embedding.dtype), embedding):
            return
    raise ModelError(
        f"{stored.where} holds {shown(name)}, for which its config.json has no place; config.json and weights are of two "
        "models."
    )


def read_foreign(folder: Path, progress: bool = False) -> nn.Module:
    """A GPTQ, AWQ or AQLM directory as a model with layers of codes, on the CPU, in eval mode.

    Raises:
        ModelError: not such a directory, damaged, or not to be converted exactly; one sentence says why and what to do.
    """
    fields = read_config(folder)
    method, config = _foreign(folder, fields)
    if method == "aqlm":
        return read_aqlm(folder, fields)
    try:
        convert = _FORMATS[method](config)
    except ModelError as error:
        raise ModelError(f"{folder} cannot be imported: {error}") from error
    with Stored.of(folder) as stored, buildable(folder):
        stored.require_sizes(fields)
        model = skeleton(folder, fields, dtype_of(folder, fields, None))
        taken = _convert(stored, model, convert, progress)
        _fill(stored, model, taken)
        model = finish(model, "cpu")
    note_method(model, method, {"imported": config})
    return model


def import_model(folder: str | Path, out: str | Path, progress: bool = False) -> Imported:
    """Convert a GPTQ, AWQ or AQLM directory into one that `trapetum.load` and transformers read.

    The tokenizer goes with it. The directory is written under another name and renamed, so it appears whole or not at all.

    Args:
        folder: a directory with config.json and safetensors.
        out: a new or empty directory, or one that holds a model of trapetum, which is replaced.
        progress: show a progress bar.

    Raises:
        ModelError: `folder` cannot be converted exactly, or `out` holds something else.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ModelError(f"no directory {str(folder)!r}; download the checkpoint and give its directory.")
    model = read_foreign(folder, progress)
    model.generation_config = generation_config_of(folder)
    written = save(model, tokenizer_of(str(folder)), out)
    layers = [layer for layer in model.modules() if hasattr(layer, "to_weight")]
    size = (written / "model.safetensors").stat().st_size
    return Imported(written, model.trapetum_method, len(layers), layers[0].bits, size)
