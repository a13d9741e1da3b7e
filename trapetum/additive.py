"""Additive codebook weights: 8 consecutive weights of a row are a sum of looked-up vectors, times the row's scale.

    W[o, 8g + j] = scale[o] * sum_c codebook[c, code[o, g, c], j]

Two codebooks of 256 vectors are 2 bits a weight, four are 4; both belong to the whole matrix. The format is that of
AQLM (Egiazarian et al., "Extreme Compression of Large Language Models via Additive Quantization", 2024), whose
checkpoints `load` reads. Here are the tensors, a slow float64 twin of the kernel and the dense product, which is also the
CPU's way (dequantize, then multiply: it reads and writes more bytes than a dense layer would); the kernel is in
`trapetum.cuda_additive`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trapetum.formats import FormatError

GROUP = 8
ENTRIES = 256
N_CODEBOOKS = (2, 4)
PARTS = ("codebooks", "codes", "scales")
_CHUNK_WEIGHTS = 1 << 22


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _require_codebooks(codebooks: Tensor) -> None:
    shape = tuple(codebooks.shape)
    fits = len(shape) == 3 and shape[0] in N_CODEBOOKS and shape[1:] == (ENTRIES, GROUP)
    if codebooks.dtype != torch.float16 or not fits:
        raise FormatError(
            f"the codebooks are {_shape(codebooks)}; additive weights have 2 or 4 codebooks of {ENTRIES} vectors of "
            f"{GROUP} weights, float16 [2 or 4, {ENTRIES}, {GROUP}]."
        )


def _require_codes(codes: Tensor, n_codebooks: int) -> None:
    if codes.dtype != torch.uint8 or codes.dim() != 3 or codes.shape[2] != n_codebooks or 0 in codes.shape:
        raise FormatError(
            f"the codes are {_shape(codes)}; with {n_codebooks} codebooks they are uint8 "
            f"[out_features, in_features / {GROUP}, {n_codebooks}]."
        )


def _require_per_channel(name: str, tensor: Tensor, out_features: int) -> None:
    if tensor.dtype != torch.float16 or tuple(tensor.shape) != (out_features,):
        raise FormatError(
            f"the {name} is {_shape(tensor)}; {out_features} output channels need float16 [{out_features}]."
        )


def _require_finite(name: str, tensor: Tensor) -> None:
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise FormatError(
            f"{bad} of {tensor.numel()} values of the {name} are NaN or infinite in float16 (largest 65504); "
            "take another checkpoint or leave this layer dense."
        )


@dataclass(frozen=True, eq=False)
class AdditiveWeight:
    """A weight matrix [out_features, in_features] as additive codes.

    Attributes:
        codes: uint8 [out_features, in_features/8, n_codebooks].
        codebooks: float16 [n_codebooks, 256, 8], n_codebooks 2 or 4.
        scales: float16 [out_features].
        bias: float16 [out_features], or None; products add it, `dequantize` does not.

    Raises:
        FormatError: a shape, dtype, device or value does not fit.
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    bias: Tensor | None = None

    def __post_init__(self):
        _require_codebooks(self.codebooks)
        _require_codes(self.codes, self.n_codebooks)
        named = {"codebooks": self.codebooks, "scale": self.scales}
        named |= {} if self.bias is None else {"bias": self.bias}
        for name, tensor in named.items():
            if name != "codebooks":
                _require_per_channel(name, tensor, self.out_features)
            if tensor.device != self.codes.device:
                raise FormatError(
                    f"the codes are on {self.codes.device} and the {name} on {tensor.device}; "
                    "move them to one device."
                )
            _require_finite(name, tensor)

    @property
    def out_features(self) -> int:
        """Rows, one output channel each."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """Weights per row, a multiple of 8."""
        return self.codes.shape[1] * GROUP

    @property
    def n_codebooks(self) -> int:
        """2 or 4; as many codes for each group of 8 weights."""
        return self.codebooks.shape[0]

    @property
    def bits(self) -> int:
        """Bits of codes a weight: 8 for each codebook and group of 8."""
        return self.n_codebooks

    @property
    def nbytes(self) -> int:
        """Bytes of codes, codebooks and scales together (the bias is not the matrix's)."""
        return self.codes.nbytes + self.codebooks.nbytes + self.scales.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, codebooks and scales included."""
        return 8 * self.nbytes / (self.out_features * self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out_features, in_features] in `dtype`, on the codes' device.

        The sum and the scale are computed in float32, or in float64 for a float64 result, and rounded once.
        """
        return dequantized(self.codes, self.codebooks, self.scales, dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Codes, codebooks and scales by these names."""
        return {part: getattr(self, part) for part in PARTS}

    def to(self, device: torch.device | str) -> "AdditiveWeight":
        """The same weight with its tensors on `device`."""
        bias = None if self.bias is None else self.bias.to(device)
        return AdditiveWeight(self.codes.to(device), self.codebooks.to(device), self.scales.to(device), bias)


def dequantized(codes: Tensor, codebooks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The dense weight of the tensors of an `AdditiveWeight`, which this takes to be checked: it never waits for a GPU.

    The sum and the scale are computed in float32, or in float64 for a float64 result, and rounded once.

    Returns:
        [out_features, in_features] in `dtype`, on the codes' device.
    """
    out_features, in_features = codes.shape[0], codes.shape[1] * GROUP
    dense = torch.empty(out_features, in_features, dtype=dtype, device=codes.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = codebooks.to(wide)
    rows = max(1, _CHUNK_WEIGHTS // in_features)
    for start in range(0, out_features, rows):
        part = slice(start, start + rows)
        chosen = codes[part].long()
        total = vectors[0][chosen[..., 0]]
        for c in range(1, len(codebooks)):
            total += vectors[c][chosen[..., c]]
        dense[part] = total.flatten(1).mul_(scales[part].to(wide).unsqueeze(1))
    return dense


def random(
    out_features: int,
    in_features: int,
    n_codebooks: int = 2,
    generator: torch.Generator | None = None,
    bias: bool = False,
) -> AdditiveWeight:
    """A random weight whose rows have about unit length, so that a product has the size of its inputs.

    Args:
        out_features: rows.
        in_features: weights per row, a multiple of 8.
        n_codebooks: 2 or 4.
        generator: of random numbers, on the CPU or a CUDA device, which is where the weight lies; None for the default.
        bias: whether to make one.

    Raises:
        FormatError: `in_features` is no positive multiple of 8, or another size is wrong.
    """
    _require_groups(in_features)
    at = {"generator": generator, "device": generator.device if generator else "cpu"}
    codes = torch.randint(ENTRIES, (out_features, in_features // GROUP, n_codebooks), dtype=torch.uint8, **at)
    codebooks = torch.randn(n_codebooks, ENTRIES, GROUP, **at) / math.sqrt(n_codebooks * in_features)
    scales = 0.5 + torch.rand(out_features, **at)
    added = torch.randn(out_features, **at).half() if bias else None
    return AdditiveWeight(codes, codebooks.half(), scales.half(), added)


def _require_groups(in_features: int) -> None:
    if in_features < 1 or in_features % GROUP:
        raise FormatError(
            f"in_features is {in_features}; additive codebooks store groups of {GROUP} inputs, "
            f"so it must be a positive multiple of {GROUP}."
        )


# --- products ------------------------------------------------------------------------------------------------------


def reference_gemv(x: Tensor, weight: AdditiveWeight) -> Tensor:
    """x @ W^T + bias in float64 from the stored tensors: slow, simple, and what the kernel is compared with.

    Args:
        x: [..., in_features] of any float dtype, on the weight's device.

    Returns:
        float64 [..., out_features].
    """
    y = x.double() @ weight.dequantize(torch.float64).T
    return y if weight.bias is None else y + weight.bias.double()


def dense_product(x: Tensor, weight: AdditiveWeight) -> Tensor:
    """x @ W^T + bias by way of the dense matrix in x's dtype: any number of rows, any device, slow for one row.

    Args:
        x: [..., in_features] in float16, bfloat16 or float32, on the weight's device.

    Returns:
        [..., out_features] in x's dtype.

    Raises:
        ValueError: x does not have the weight's inputs.
    """
    require_inputs(x, weight.in_features)
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    return torch.nn.functional.linear(x, weight.dequantize(x.dtype), bias)


def require_inputs(x: Tensor, in_features: int) -> None:
    """Refuse an x whose last dimension or dtype no product takes.

    Raises:
        ValueError: it is not [..., in_features].
        TypeError: it is not float16, bfloat16 or float32.
    """
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"the weight has {in_features} inputs, and x has shape {list(x.shape)}.")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"x must be float16, bfloat16 or float32, not {x.dtype}.")


# --- checkpoints ---------------------------------------------------------------------------------------------------


def _as_codes(codes: Tensor) -> Tensor:
    """Stored bytes as indices: AQLM keeps 0 to 255 in int8, modulo 256."""
    if codes.dtype == torch.int8:
        return codes.view(torch.uint8)
    if codes.dtype != torch.uint8:
        raise FormatError(
            f"the codes are {_shape(codes)}; only one-byte codes (codebooks of {ENTRIES} vectors) are supported, "
            "so take a checkpoint of the 2x8 or 4x8 scheme."
        )
    return codes


def _as_codebooks(codebooks: Tensor) -> Tensor:
    """[n, 256, 1, 8] -> float16 [n, 256, 8]."""
    if codebooks.dim() != 4 or codebooks.shape[2] != 1 or not codebooks.is_floating_point():
        raise FormatError(
            f"the codebooks are {_shape(codebooks)}; an AQLM layer with groups of {GROUP} inputs and one output "
            f"has float [2 or 4, {ENTRIES}, 1, {GROUP}]."
        )
    return codebooks.squeeze(2).half()


def _as_scales(scales: Tensor) -> Tensor:
    """[out, 1, 1, 1] or [out] -> float16 [out]."""
    if scales.dim() == 0 or scales.numel() != scales.shape[0] or not scales.is_floating_point():
        raise FormatError(
            f"the scales are {_shape(scales)}; one scale per output channel is float [out, 1, 1, 1] or [out]."
        )
    return scales.flatten().half()


def from_tensors(tensors: Mapping[str, Tensor]) -> AdditiveWeight:
    """A weight from the tensors of one AQLM layer.

    Args:
        tensors: `codebooks` float [n_codebooks, 256, 1, 8], `codes` int8 (an index modulo 256) or uint8
            [out, in/8, n_codebooks], `scales` float [out, 1, 1, 1] or [out], and perhaps `bias` float [out].

    Raises:
        FormatError: a tensor is missing, or does not fit the others.
    """
    missing = [name for name in PARTS if name not in tensors]
    if missing:
        raise FormatError(
            f"an AQLM layer needs the tensors {', '.join(PARTS)}; missing: {', '.join(missing)}."
        )
    bias = tensors.get("bias")
    return AdditiveWeight(
        _as_codes(tensors["codes"]).contiguous(),
        _as_codebooks(tensors["codebooks"]).contiguous(),
        _as_scales(tensors["scales"]).contiguous(),
        None if bias is None else bias.half().contiguous(),
    )


def _files(path: Path) -> dict[str, Path]:
    """Tensor name -> file, of a safetensors file, or of a directory with one or with an index of shards."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            return {str(k): path / v for k, v in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FormatError(f"{index} is damaged ({error!r}); download it again.") from error
    file = path if path.is_file() else path / "model.safetensors"
    if not file.is_file():
        raise FormatError(
            f"{path} holds neither model.safetensors nor model.safetensors.index.json; "
            "give the directory of an AQLM checkpoint."
        )
    return dict.fromkeys(_read(file, None), file)


def _read(file: Path, wanted: list[str] | None) -> dict[str, Tensor | None]:
    """The tensors `wanted` of a file; with None the names of all, without their contents."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            if wanted is None:
                return dict.fromkeys(opened.keys())
            return {name: opened.get_tensor(name) for name in wanted}
    except FileNotFoundError as error:
        raise FormatError(f"{file} is missing; download the checkpoint again.") from error
    except (SafetensorError, ValueError, OSError) as error:
        raise FormatError(
            f"{file} lacks a tensor, is truncated or is no safetensors file ({error}); download it again."
        ) from error


def layers_of(path: Path | str) -> list[str]:
    """The prefixes of all additive layers of a checkpoint, sorted; for `load`.

    Raises:
        FormatError: the path holds no safetensors checkpoint.
    """
    names = _files(Path(path))
    return sorted(name.removesuffix(".codebooks") for name in names if name.endswith(".codebooks"))


def load(path: Path | str, prefix: str, device: torch.device | str = "cpu") -> AdditiveWeight:
    """One linear layer of an AQLM checkpoint.

    Args:
        path: a directory with `model.safetensors` or with shards and their index, or one safetensors file.
        prefix: the layer, e.g. `model.layers.0.self_attn.q_proj`; `layers_of` lists them.
        device: where to put it.

    Raises:
        FormatError: missing or damaged file, missing tensor, or tensors that do not fit; the message names the layer.
    """
    path = Path(path)
    files = _files(path)
    present = [part for part in (*PARTS, "bias") if f"{prefix}.{part}" in files]
    try:
        tensors = {part: _read(files[f"{prefix}.{part}"], [f"{prefix}.{part}"]) for part in present}
        return from_tensors({part: found[f"{prefix}.{part}"] for part, found in tensors.items()}).to(device)
    except FormatError as error:
        raise FormatError(f"{path}, layer {prefix}: {error}") from error
