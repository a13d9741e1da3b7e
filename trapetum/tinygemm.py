"""PyTorch's own 4-bit product ("tinygemm") as the linear layer of a model, for the same decode loop with a peer's kernel.

Each group of inputs of a channel has a scale and a zero in the dtype of the activations, and 4-bit codes q between the
group's least and largest weight:

    w = (q - 8) * scale + zero,    scale = (max - min) / 15,    zero = min + 8 * scale

On CUDA the kernel takes bf16 only; the CPU's takes fp32, bf16 and fp16.
Source: the operators' checks in PyTorch, aten/src/ATen/native/cuda/int4mm.cu and .../LinearAlgebra.cpp
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trapetum import swap
from trapetum.projection import stack

GROUP = 128
GROUPS = (128, 64, 32)  # inputs; 256 works too, but 128 is what its users measure
_LEVELS, _MIDDLE = 15, 8
_CPU_ROWS, _CUDA_ROWS = 16, 8  # outputs come in multiples of so many
_CPU_TILE = 64  # outputs that the CPU's packing mixes
_READ_ROWS = 1024


class TinyGemmError(ValueError):
    """A shape, dtype or PyTorch that the kernel cannot do; the message says which."""


def quantize_groups(weight: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes between the least and the largest weight of each group.

    Args:
        weight: [out, in], floating point.
        group: inputs that share a scale and a zero; divides in.
        dtype: of scale and zero. The codes are chosen for the rounded ones.

    Returns:
        codes uint8 [out, in], 0 to 15, and [in / group, out, 2] of scale and zero in `dtype`.
    """
    groups = weight.detach().float().unflatten(1, (-1, group))
    low, high = groups.aminmax(dim=-1)
    scale = ((high - low) / _LEVELS).clamp_min(torch.finfo(dtype).tiny).to(dtype)  # of an even group not zero
    zero = (low + _MIDDLE * scale.float()).to(dtype)
    codes = (groups - zero.float().unsqueeze(-1)) / scale.float().unsqueeze(-1) + _MIDDLE
    codes = codes.round_().clamp_(0, _LEVELS).to(torch.uint8).flatten(1)
    return codes, torch.stack([scale.T, zero.T], -1).contiguous()


def _pack_cpu(codes: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)


def _pack_cuda(codes: Tensor) -> Tensor:
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    inner = next(
        k for k in (8, 4, 2) if codes.shape[1] % (16 * k) == 0
    )  # tiles of 16 inputs a thread loads at once
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), inner)


def _multiply(x: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
    aten = torch.ops.aten
    multiply = aten._weight_int4pack_mm if packed.is_cuda else aten._weight_int4pack_mm_for_cpu
    return multiply(x.contiguous(), packed, group, scales)


def _require(layer: nn.Linear, group: int, dtype: torch.dtype, name: str) -> None:
    rows, on_gpu = (_CUDA_ROWS, True) if layer.weight.is_cuda else (_CPU_ROWS, False)
    if group not in GROUPS:
        raise TinyGemmError(f"groups are of {', '.join(map(str, GROUPS))} inputs, not {group}.")
    if layer.in_features % group or layer.out_features % rows:
        raise TinyGemmError(
            f"{name} is {layer.in_features} x {layer.out_features} (in x out); tinygemm takes in_features in multiples of "
            f"its groups of {group} and out_features of {rows}."
        )
    if on_gpu and dtype != torch.bfloat16:
        raise TinyGemmError(
            f"on CUDA tinygemm multiplies in bfloat16, and {name} is {dtype}; load the model in bf16."
        )


class TinyGemmLinear(nn.Module):
    """y = x W^T + b with W in 4-bit groups, by PyTorch's int4 kernel.

    The weights are parameters, so that whatever counts a model's bytes counts them.

    Attributes:
        packed: codes as the kernel of the device they were made on reads them: on CUDA int32 [out / 8, in / (16 k), 32, k / 2],
            on the CPU uint8 [out, in / 2].
        scales: [in / group, out, 2], scale and zero, in the dtype of x and y.
        bias: [out_features] or None.
        in_features, out_features, group: sizes.
    """

    def __init__(self, packed: Tensor, scales: Tensor, bias: Tensor | None, in_features: int, group: int):
        super().__init__()
        self.in_features, self.out_features, self.group = in_features, scales.shape[1], group
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False) if bias is not None else None

    @classmethod
    def from_linear(cls, layer: nn.Linear, group: int = GROUP, name: str = "the layer") -> "TinyGemmLinear":
        """Quantize a dense layer, on its device, for activations of its dtype.

        Args:
            layer: the dense layer.
            group: inputs that share a scale and a zero: 128, 64 or 32.
            name: for messages.

        Raises:
            TinyGemmError: the kernel cannot do the shape or the dtype, or this PyTorch has no such kernel here.
        """
        dtype = layer.weight.dtype
        _require(layer, group, dtype, name)
        codes, scales = quantize_groups(layer.weight, group, dtype)
        try:
            packed = (_pack_cuda if codes.is_cuda else _pack_cpu)(codes)
        except (AttributeError, RuntimeError, NotImplementedError) as error:
            line = str(error).strip().splitlines()[0]
            raise TinyGemmError(f"this PyTorch ({torch.__version__}) cannot pack {name}: {line}") from error
        return cls(packed, scales, layer.bias, layer.in_features, group)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out_features, in_features] as the kernel reads it: its products with rows of the identity.

        Each is one weight times 1 and nothing else, so no sum rounds it.
        """
        rows = []
        for first in range(0, self.in_features, _READ_ROWS):
            count = min(_READ_ROWS, self.in_features - first)
            unit = torch.zeros(count, self.in_features, dtype=self.scales.dtype, device=self.scales.device)
            unit[:, first:].fill_diagonal_(1)
            rows.append(_multiply(unit, self.packed, self.group, self.scales.contiguous()))
        return torch.cat(rows).T.to(dtype).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], x and y in the dtype of `scales`.

        Raises:
            TinyGemmError: x is of another dtype or size.
        """
        if x.dtype != self.scales.dtype or x.shape[-1] != self.in_features:
            raise TinyGemmError(
                f"this layer takes {self.scales.dtype} [..., {self.in_features}], and x is {x.dtype} {list(x.shape)}."
            )
        y = _multiply(x.reshape(-1, self.in_features), self.packed, self.group, self.scales.contiguous())
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    @staticmethod
    def stackable(layers: Sequence["TinyGemmLinear"]) -> bool:
        """Whether the packed codes of these layers, one behind the other, are those of the stacked layer."""
        kinds = {(layer.group, layer.scales.dtype, layer.packed.shape[1:]) for layer in layers}
        tile = 1 if layers[0].packed.is_cuda else _CPU_TILE
        return len(kinds) == 1 and all(layer.out_features % tile == 0 for layer in layers)

    @staticmethod
    def projection(layers: Sequence["TinyGemmLinear"], dtype: torch.dtype) -> "TinyGemm":
        """The product of the own decode step for layers of one input (`trapetum.projection.project` asks for it)."""
        return TinyGemm(layers, dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, group={self.group}, "
            f"bias={self.bias is not None}"
        )


def _beside(parts: Sequence[Tensor]) -> Tensor:
    """Scales side by side, [in / group, all outputs, 2], without a copy where they already lie so."""
    first, outputs = parts[0], sum(part.shape[1] for part in parts)
    places = [first.data_ptr()]
    for part in parts:
        places.append(places[-1] + part.shape[1] * part.stride(1) * part.element_size())
    same = len({part.untyped_storage().data_ptr() for part in parts}) == 1
    lies_so = all(part.stride() == (2 * outputs, 2, 1) for part in parts)
    if same and lies_so and [part.data_ptr() for part in parts] == places[:-1]:
        return first.as_strided((first.shape[0], outputs, 2), first.stride(), first.storage_offset())
    return torch.cat(list(parts), 1)


class TinyGemm:
    """Several `TinyGemmLinear` of one input as one product; their weights become views of the stacked ones."""

    def __init__(self, layers: Sequence[TinyGemmLinear], dtype: torch.dtype):
        first = layers[0]
        if dtype != first.scales.dtype:
            raise TinyGemmError(
                f"the decode step works in {dtype} and these weights in {first.scales.dtype}; quantize a model of {dtype}."
            )
        self._packed = stack([layer.packed.detach() for layer in layers])
        self._scales = _beside([layer.scales.detach() for layer in layers])
        self._bias = self._stacked_bias(layers, dtype)
        self._group, self.out_features = first.group, self._scales.shape[1]
        if len(layers) > 1:
            self._share(layers)

    @staticmethod
    def _stacked_bias(layers, dtype) -> Tensor | None:
        if all(layer.bias is None for layer in layers):
            return None
        return torch.cat(
            [
                layer.bias.detach().to(dtype)
                if layer.bias is not None
                else layer.scales.new_zeros(layer.out_features)
                for layer in layers
            ]
        )

    def _share(self, layers) -> None:
        sizes = [layer.out_features for layer in layers]
        parts = zip(
            layers,
            self._packed.split([p.packed.shape[0] for p in layers]),
            self._scales.split(sizes, 1),
            strict=True,
        )
        for layer, packed, scales in parts:
            layer.packed = nn.Parameter(packed, requires_grad=False)
            layer.scales = nn.Parameter(scales, requires_grad=False)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in_features] to [rows, out_features]."""
        y = _multiply(x, self._packed, self._group, self._scales)
        return y if self._bias is None else y.add_(self._bias)

    rows = __call__


def best_group(model: nn.Module, lm_head: bool = False) -> int:
    """The largest group, at most 128, that divides the inputs of every linear layer of `model`.

    Raises:
        TinyGemmError: none does.
    """
    sizes = {layer.in_features for _, layer in swap.linears(model, lm_head)}
    for group in GROUPS:
        if all(size % group == 0 for size in sizes):
            return group
    raise TinyGemmError(
        f"tinygemm takes groups of {', '.join(map(str, GROUPS))} inputs; none divides all of {sorted(sizes)}."
    )


@torch.no_grad()
def tinygemm_model(model: nn.Module, group: int = GROUP, lm_head: bool = False) -> nn.Module:
    """Replace each `nn.Linear` by a `TinyGemmLinear`, in place and layer by layer.

    Args:
        model: a dense transformers causal language model; on CUDA in bf16.
        group: inputs that share a scale and a zero: 128, 64 or 32.
        lm_head: replace the output head too.

    Returns:
        the same model.

    Raises:
        TinyGemmError: a layer does not fit; the message names it.
    """
    for name, layer in swap.linears(model, lm_head):
        swap.replace(model, name, TinyGemmLinear.from_linear(layer, group, name))
    return model


def tinygemm_layers(model: nn.Module) -> list[tuple[str, TinyGemmLinear]]:
    """The tinygemm layers of `model` by name, in order."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, TinyGemmLinear)]


@torch.no_grad()
def dense_model(model: nn.Module) -> nn.Module:
    """Replace each `TinyGemmLinear` by the `nn.Linear` with the same values, in place: the dense twin."""
    for name, layer in tinygemm_layers(model):
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        dense.weight = nn.Parameter(layer.dequantize(layer.scales.dtype), requires_grad=False)
        dense.bias = layer.bias
        swap.replace(model, name, dense)
    return model
