"""The products of the own decode step: several linear layers of one input as one, dense or codebook.

Stacking layers along out_features changes no output: each row of W is multiplied by itself. The module tree keeps
working, because its weights become views of the stacked ones, so nothing is held twice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trapetum import cpu, cuda, cuda_dense, ops, sparse, sparse_product
from trapetum.cpu_layout import tile_rows
from trapetum.linear import CodebookLinear
from trapetum.sparse import Outliers


def _adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether `parts` already lie one behind the other in one storage."""
    end = parts[0].data_ptr()
    for part in parts:
        if (
            part.untyped_storage().data_ptr() != parts[0].untyped_storage().data_ptr()
            or part.data_ptr() != end
        ):
            return False
        end += part.nbytes
    return all(part.is_contiguous() for part in parts)


def stack(parts: Sequence[Tensor]) -> Tensor:
    """The concatenation of `parts` along dimension 0, without a copy where they already lie so."""
    if len(parts) == 1:
        return parts[0]
    if not _adjacent(parts):
        return torch.cat(list(parts))
    first = parts[0]
    rows = sum(part.shape[0] for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def _views(stacked: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    return list(stacked.split([part.shape[0] for part in parts]))


def _stacked_bias(layers, dtype) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    device = layers[0].bias.device if layers[0].bias is not None else _weight(layers[0]).device
    parts = [
        layer.bias if layer.bias is not None else torch.zeros(layer.out_features, device=device)
        for layer in layers
    ]
    return torch.cat([part.detach().to(dtype) for part in parts])


def _weight(layer) -> Tensor:
    return layer.codes if isinstance(layer, CodebookLinear) else layer.weight


def _present(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


class Dense:
    """y = x W^T + b with x and y in `dtype`; W may be narrower (a 16-bit head behind float32 activations).

    Attributes:
        gate_options: what `launch` is told for gate+up, and then for down, to make silu(gate) * up between them.
        factors: in how many factors gate+up leaves the input of down.
    """

    gate_options = ({"gated": True}, {})
    factors = 1

    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype):
        weights = [layer.weight.detach() for layer in layers]
        self._weight = stack(weights)
        self._bias = _stacked_bias(layers, self._weight.dtype)
        if len(layers) > 1:
            for layer, view in zip(layers, _views(self._weight, weights), strict=True):
                layer.weight = nn.Parameter(view, requires_grad=False)
        self.out_features, self._dtype = self._weight.shape[0], dtype
        self._same = self._weight.dtype == dtype

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in_features] to [rows, out_features]."""
        if self._same:
            return F.linear(x, self._weight, self._bias)
        return F.linear(x.to(self._weight.dtype), self._weight, self._bias).to(self._dtype)

    rows = __call__

    def launch(self, x: Tensor, out: Tensor, pdl: bool = False, **fused) -> None:
        """One kernel of this package on CUDA: x [rows, in_features] into `out`; `fused` as for `cuda_dense.gemv`."""
        cuda_dense.gemv(x, self._weight, self._bias, out, pdl, **fused)

    def tensors(self) -> dict[str, Tensor]:
        """What a launch reads beside x."""
        return _present(weight=self._weight, bias=self._bias)


class Codebook:
    """The same with W read from its codes; `rows` dequantizes W and multiplies."""

    gate_options = ({"silu": True}, {"paired": True})
    factors = 2

    def __init__(self, layers: Sequence[CodebookLinear], dtype: torch.dtype):
        for layer in layers:
            layer.prepare()
        codes, codebooks = [layer.codes for layer in layers], [layer.codebook for layer in layers]
        self._codes, self._codebook = stack(codes), stack(codebooks)
        if len(layers) > 1:
            parts = zip(_views(self._codes, codes), _views(self._codebook, codebooks), strict=True)
            for layer, (part, values) in zip(layers, parts, strict=True):
                layer.codes, layer.codebook = part, values
        self._bias = _stacked_bias(layers, dtype)
        self._in, self._bits, self._dtype = layers[0].in_features, layers[0].bits, dtype
        self.out_features = self._codebook.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """[1, in_features] to [1, out_features]; on CUDA up to `cuda.MAX_ROWS` rows."""
        return ops.codebook_gemv(x, self._codes, self._codebook, self._bias, self._in, self._bits)

    def rows(self, x: Tensor) -> Tensor:
        """[rows, in_features] to [rows, out_features]."""
        if x.is_cuda and len(x) <= cuda.MAX_ROWS:
            return self(x)
        return F.linear(x, self.dense(), self.bias)

    def dense(self) -> Tensor:
        """W [out_features, in_features] in the dtype of x and y."""
        return ops.dequantize(self._codes, self._codebook, self._in, self._bits, self._dtype)

    @property
    def bias(self) -> Tensor | None:
        """[out_features] in the dtype of x and y."""
        return self._bias

    def launch(self, x: Tensor, out: Tensor, pdl: bool = False, **fused) -> None:
        """One kernel of this package on CUDA: x [rows, in_features] into `out`; `fused` as for `cuda.gemv`."""
        cuda.gemv(
            x, self._codes, self._codebook, self._in, self._bits, self._bias, out, pdl, late=True, **fused
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a launch reads beside x."""
        return _present(codes=self._codes, codebook=self._codebook, bias=self._bias)


class CodebookCpu(Codebook):
    """`Codebook` on the CPU in float32, without the torch dispatcher and into an output made once."""

    def __init__(self, layers, dtype):
        super().__init__(layers, dtype)
        self._row = torch.empty(self.out_features)
        self._out = self._row.view(1, -1)

    def __call__(self, x: Tensor) -> Tensor:
        """[1, in_features] to [1, out_features], valid until the next call."""
        cpu.gemv(x, self._codes, self._codebook, self._in, self._bits, bias=self._bias, out=self._row)
        return self._out


class WithOutliers:
    """A codebook product with what its layers keep apart added to it; without `launch`, so not for the fused step."""

    def __init__(self, layers: Sequence[CodebookLinear], dtype: torch.dtype):
        self._product = _by_codes(layers, dtype)
        self._outliers = _stacked_outliers(layers)
        self._add = self._add_row if isinstance(self._product, CodebookCpu) else sparse_product.add
        self.out_features = self._product.out_features

    @staticmethod
    def _add_row(y: Tensor, x: Tensor, s: Outliers) -> Tensor:
        return sparse_product.add_row(y, x.contiguous(), s.values, s.columns, s.starts)

    def __call__(self, x: Tensor) -> Tensor:
        """[1, in_features] to [1, out_features], on the CPU valid until the next call; on CUDA up to `cuda.MAX_ROWS` rows."""
        return self._add(self._product(x), x, self._outliers)

    def rows(self, x: Tensor) -> Tensor:
        """[rows, in_features] to [rows, out_features]."""
        if x.is_cuda and len(x) <= cuda.MAX_ROWS:
            return self(x)
        return F.linear(x, self._outliers.add_to(self._product.dense()), self._product.bias)


def _stacked_outliers(layers: Sequence[CodebookLinear]) -> Outliers:
    """Those of the stacked matrix; values and columns of the layers become views of its own."""
    every = [layer.outliers for layer in layers]
    if len(every) == 1:
        return every[0]
    values, columns = [o.values for o in every], [o.columns for o in every]
    stacked = (
        stack(values),
        stack([c.view(torch.uint8) for c in columns]).view(columns[0].dtype),
    )  # bytes stack anywhere
    for layer, v, c in zip(layers, _views(stacked[0], values), _views(stacked[1], columns), strict=True):
        layer.outlier_values, layer.outlier_columns = v, c
    return sparse.joined(*stacked, [o.starts for o in every], every[0].in_features)


class Apart:
    """Layers whose packed codes cannot be stacked: one product each, outputs side by side."""

    def __init__(self, layers, dtype):
        self._parts = [project([layer], dtype) for layer in layers]
        self.out_features = sum(part.out_features for part in self._parts)

    def __call__(self, x: Tensor) -> Tensor:
        """[1, in_features] to [1, out_features]."""
        return torch.cat([part(x) for part in self._parts], -1)

    def rows(self, x: Tensor) -> Tensor:
        """[rows, in_features] to [rows, out_features]."""
        return torch.cat([part.rows(x) for part in self._parts], -1)


class Nothing:
    """Stands in for a product when only the framework around it is timed: zeros of the right shape, made once."""

    def __init__(self, out_features: int, like: Tensor):
        self.out_features = out_features
        self._zeros = torch.zeros(1, out_features, dtype=like.dtype, device=like.device)

    def __call__(self, x: Tensor) -> Tensor:
        """[1, in_features] to [1, out_features]."""
        return self._zeros

    def rows(self, x: Tensor) -> Tensor:
        """[rows, in_features] to [rows, out_features]."""
        return self._zeros.repeat(x.shape[0], 1)


def _tile_rows(layer: CodebookLinear) -> int | None:
    return cuda.LANES if layer.codes.is_cuda else tile_rows(layer.in_features, layer.bits)


def _stackable(layers) -> bool:
    if len({type(layer) for layer in layers}) > 1:
        return False
    if hasattr(layers[0], "stackable"):
        return layers[0].stackable(layers)
    if len({_weight(layer).dtype for layer in layers}) > 1:
        return False
    if not isinstance(layers[0], CodebookLinear):
        return True
    rows = _tile_rows(layers[0])
    schemes = {(layer.bits, layer.n_codes, bool(layer.outlier_share)) for layer in layers}
    if len(schemes) > 1 or rows is None:
        return False
    return all(layer.out_features % rows == 0 for layer in layers)


def project(layers: Sequence[nn.Module], dtype: torch.dtype):
    """One callable for linear layers that share their input.

    Args:
        layers: `nn.Linear`, `CodebookLinear`, or of a class with its own `stackable(layers)` and
            `projection(layers, dtype)`; of one in_features, on one device.
        dtype: of x and y.

    Returns:
        an object with `__call__` (one row), `rows` (many rows) and `out_features`.
    """
    if len(layers) > 1 and not _stackable(layers):
        return Apart(layers, dtype)
    if hasattr(layers[0], "projection"):
        return layers[0].projection(layers, dtype)
    if not isinstance(layers[0], CodebookLinear):
        return Dense(layers, dtype)
    return (WithOutliers if layers[0].outlier_share else _by_codes)(layers, dtype)


def _by_codes(layers: Sequence[CodebookLinear], dtype: torch.dtype) -> Codebook:
    if layers[0].codes.is_cuda or dtype != torch.float32:
        return Codebook(layers, dtype)
    return CodebookCpu(layers, dtype)
