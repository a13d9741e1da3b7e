"""Dense-and-sparse weights: a small share of a matrix kept apart in float16, beside the codes of the rest.

    W = codebook[o, code(o, i)] + S[o, i],    S[o, i] = w[o, i] - codebook[o, code(o, i)] at an outlier, else 0

S is stored row by row (CSR). An outlier's code is that of the nearest entry of its row which, with S rounded to float16, adds
up to w in float16 exactly; where no entry does, that of the nearest, and W is off by half a unit in the last place of S at
most. The codebook is fitted to the matrix with zeros in the outliers' places.

Source: Kim et al., "SqueezeLLM: Dense-and-Sparse Quantization", arXiv:2306.07629 (2023), section 4.2. It keeps 0.45 % apart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trapetum.formats import CodebookWeight, FormatError, pack

#: What SqueezeLLM keeps apart: 0.4 % by magnitude, and 0.05 %, a ninth of all, by sensitivity.
SHARE = 0.0045
_SENSITIVE = 1 / 9
MOST = 0.5  # a matrix with more apart is better stored dense
#: Names of the tensors in a file, behind the weight's name, and the attributes of `Outliers` that they are.
PARTS = {"outlier_values": "values", "outlier_columns": "columns", "outlier_rows": "starts"}
_NARROW = 1 << 16  # inputs that a uint16 column can name
_LARGEST = torch.finfo(torch.float16).max
_CHUNK = 1 << 24


def require_share(share: float) -> None:
    """Refuse a share that is none.

    Raises:
        ValueError: not above 0 and at most one half.
    """
    if not 0 < share <= MOST:
        raise ValueError(
            f"the share of outliers is {share:g}; give a part of 1 above 0 and at most {MOST:g}, such as {SHARE:g}."
        )


def count(share: float, out_features: int, in_features: int) -> int:
    """How many weights of a matrix are kept apart: the share rounded to the nearest number, at least 1.

    Raises:
        ValueError: the share is not above 0 and at most one half.
    """
    require_share(share)
    return max(1, round(share * out_features * in_features))


def column_dtype(in_features: int) -> torch.dtype:
    """The dtype that column indices are stored in: uint16 up to 65536 inputs, else int32."""
    return torch.uint16 if in_features <= _NARROW else torch.int32


@dataclass(frozen=True, eq=False)
class Outliers:
    """A sparse matrix [out_features, in_features] of a fixed share of entries, row by row.

    Attributes:
        values: float16 [entries].
        columns: uint16 (int32 above 65536 inputs) [entries], rising within a row.
        starts: int32 [out_features + 1]: row o has the entries from starts[o] to starts[o + 1].
        in_features: columns of the matrix.
        share: of the matrix, which the number of entries follows from (`count`).

    Raises:
        FormatError: a shape or dtype does not fit the others; what the tensors hold is for `check`.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    in_features: int
    share: float

    def __post_init__(self):
        if self.starts.dtype != torch.int32 or self.starts.dim() != 1 or len(self.starts) < 2:
            raise FormatError(
                f"the row starts of the outliers are {self.starts.dtype} {list(self.starts.shape)}; they are stored as "
                "torch.int32 [out_features + 1]."
            )
        try:
            entries = count(self.share, self.out_features, self.in_features)
        except (ValueError, TypeError) as error:
            raise FormatError(f"the share of outliers is {self.share!r}: {error}") from error
        wanted = {"values": torch.float16, "columns": column_dtype(self.in_features)}
        for name, dtype in wanted.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tuple(tensor.shape) != (entries,):
                raise FormatError(
                    f"the {name} of the outliers are {tensor.dtype} {list(tensor.shape)}; a share of {self.share:g} of "
                    f"{self.out_features} x {self.in_features} weights is {dtype} [{entries}]."
                )

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return len(self.starts) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of values, columns and row starts."""
        return self.values.nbytes + self.columns.nbytes + self.starts.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """The parts by the names that they have in a file, behind the weight's name."""
        return {name: getattr(self, part) for name, part in PARTS.items()}

    def to(self, device: torch.device | str) -> "Outliers":
        """The same with its tensors on `device`."""
        return self._with(*(getattr(self, part).to(device) for part in PARTS.values()))

    def _with(self, values: Tensor, columns: Tensor, starts: Tensor) -> "Outliers":
        return Outliers(values, columns, starts, self.in_features, self.share)

    def places(self) -> Tensor:
        """Where the entries are in the matrix read row by row: int64 [entries], rising."""
        rows = torch.arange(self.out_features, device=self.starts.device)
        lengths = self.starts.diff().long()
        rows = torch.repeat_interleave(rows, lengths, output_size=len(self.values))
        return rows * self.in_features + self.columns.long()

    def check(self) -> None:
        """Refuse tensors that are no such matrix.

        Raises:
            FormatError: row starts that do not rise from 0 to the number of entries, columns out of range, not rising or twice
                in a row, or values that are not finite.
        """
        entries, starts = len(self.values), self.starts
        if int(starts[0]) != 0 or int(starts[-1]) != entries or bool((starts[1:] < starts[:-1]).any()):
            raise FormatError(
                f"the row starts of the outliers go from {int(starts[0])} to {int(starts[-1])}; they must rise from 0 to the "
                f"{entries} entries that there are."
            )
        columns = self.columns.long()
        if int(columns.min()) < 0 or int(columns.max()) >= self.in_features:
            raise FormatError(
                f"the columns of the outliers go from {int(columns.min())} to {int(columns.max())}; the matrix has "
                f"{self.in_features}, 0 to {self.in_features - 1}."
            )
        if bool((self.places().diff() <= 0).any()):
            raise FormatError(
                "the columns of the outliers do not rise within each row; quantize the model again."
            )
        bad = int((~self.values.isfinite()).sum())
        if bad:
            raise FormatError(f"{bad} of {entries} values of the outliers are NaN or infinite in float16.")

    def add_to(self, dense: Tensor) -> Tensor:
        """Add the entries to a matrix in place, in its own dtype or float32, whichever is wider.

        Args:
            dense: contiguous floating [out_features, in_features] on the same device.

        Returns:
            the same tensor.
        """
        flat, places = dense.view(-1), self.places()
        wide = torch.promote_types(dense.dtype, torch.float32)
        flat[places] = (flat[places].to(wide) + self.values.to(wide)).to(dense.dtype)
        return dense


def empty(
    share: float, out_features: int, in_features: int, device: torch.device | str | None = None
) -> Outliers:
    """Outliers of a matrix with nothing in them yet: zeros, to be read from a file."""
    entries = count(share, out_features, in_features)
    values = torch.zeros(entries, dtype=torch.float16, device=device)
    columns = torch.zeros(entries, dtype=column_dtype(in_features), device=device)
    starts = torch.zeros(out_features + 1, dtype=torch.int32, device=device)
    return Outliers(values, columns, starts, in_features, share)


def joined(values: Tensor, columns: Tensor, starts: Sequence[Tensor], in_features: int) -> Outliers:
    """Outliers of several matrices of one in_features, one below the other.

    Args:
        values, columns: of all, one matrix after the other.
        starts: row starts of each.
        in_features: columns.
    """
    rows, before = [starts[0][:1]], 0
    for one in starts:
        rows.append(one[1:] + before)
        before += int(one[-1])
    every = torch.cat(rows)
    return Outliers(values, columns, every, in_features, len(values) / ((len(every) - 1) * in_features))


# --- choosing ------------------------------------------------------------------------------------------------------


def _require_weight(weight: Tensor, name: str) -> None:
    if weight.dim() != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(
            f"{name} is {weight.dtype} {list(weight.shape)}; give a floating matrix [out_features, in_features]."
        )
    bad = int((~(weight.abs() <= _LARGEST)).sum())
    if bad:
        raise ValueError(
            f"{name} holds {bad} values among {weight.numel()} that are NaN, infinite or beyond the {_LARGEST:g} of float16; "
            "repair the checkpoint or leave it dense."
        )


def _largest(score: Tensor, entries: int) -> Tensor:
    """Flat places of the `entries` largest, rising; of equals the first, so that the choice depends on no device."""
    flat = score.reshape(-1)
    least = flat.kthvalue(flat.numel() - entries + 1).values
    above, equal = (flat > least).nonzero().view(-1), (flat == least).nonzero().view(-1)
    return torch.cat([above, equal[: entries - len(above)]]).sort().values


def _mean_square(statistics, weight: Tensor, name: str) -> Tensor:
    mean_square = statistics.mean_square.to(weight.device, torch.float32)
    if mean_square.shape != weight.shape[1:]:
        raise ValueError(
            f"the statistics of {name} are of {list(mean_square.shape)} inputs; the matrix has {weight.shape[1]}."
        )
    return mean_square


def _sensitive_and_large(size: Tensor, mean_square: Tensor, entries: int) -> Tensor:
    """Flat places, rising; overwrites `size`."""
    sensitive = _largest(size.square() * mean_square, max(1, round(entries * _SENSITIVE)))
    if len(sensitive) == entries:
        return sensitive
    size.view(-1)[sensitive] = -1
    return torch.cat([sensitive, _largest(size, entries - len(sensitive))]).sort().values


def _gather(weight: Tensor, places: Tensor, share: float) -> Outliers:
    out_features, in_features = weight.shape
    rows = torch.div(places, in_features, rounding_mode="floor")
    starts = torch.zeros(out_features + 1, dtype=torch.int32, device=weight.device)
    starts[1:] = torch.bincount(rows, minlength=out_features).cumsum(0)
    columns = (places - rows * in_features).to(column_dtype(in_features))
    return Outliers(weight.reshape(-1)[places].half(), columns, starts, in_features, share)


@torch.no_grad()
def split(
    weight: Tensor, statistics=None, share: float = SHARE, name: str = "weight"
) -> tuple[Tensor, Outliers]:
    """Take the weights that matter most out of a matrix.

    With statistics a ninth of them, as in SqueezeLLM, are those that add most to the output's energy, w^2 times the input's
    mean square. The others, and without statistics all, are the largest of the rest: those stretch the codebook.

    Args:
        weight: floating [out_features, in_features], finite.
        statistics: `calibration.Statistics` of the layer's inputs (of which `mean_square` is used), or None.
        share: of the weights to take, above 0 and at most one half.
        name: what to call the tensor in an error.

    Returns:
        the matrix with zeros in their places, in its dtype, and the outliers with the weights themselves, rounded to float16:
        once the rest is quantized, `settle` makes them what is stored.

    Raises:
        ValueError: not such a matrix, a share out of range, or statistics of another number of inputs.
    """
    _require_weight(weight, name)
    entries = count(share, *weight.shape)
    size = weight.detach().float().abs()
    if statistics is None:
        places = _largest(size, entries)
    else:
        places = _sensitive_and_large(size, _mean_square(statistics, weight, name), entries)
    kept = weight.detach().clone()
    kept.view(-1)[places] = 0
    return kept, _gather(weight.detach(), places, share)


@torch.no_grad()
def settle(
    quantized: CodebookWeight, outliers: Outliers, name: str = "weight"
) -> tuple[CodebookWeight, Outliers]:
    """Fit the codes and the outliers of one matrix together, so that they add up to its weights.

    Args:
        quantized: the matrix that `split` left, quantized by any method.
        outliers: what `split` took, the weights themselves.
        name: what to call the tensor in an error.

    Returns:
        the codes, at each outlier that of its row's nearest entry, and the outliers less what those codes stand for.

    Raises:
        ValueError: the two are of different shapes, or a difference is beyond float16.
    """
    if (quantized.out_features, quantized.in_features) != (outliers.out_features, outliers.in_features):
        raise ValueError(
            f"{name} is quantized as {quantized.out_features} x {quantized.in_features} and its outliers are of "
            f"{outliers.out_features} x {outliers.in_features}; split and settle the same matrix."
        )
    indices, places = quantized.indices(), outliers.places()
    left = torch.empty_like(outliers.values)
    for part in _chunks(len(places), quantized.n_codes):
        rows = torch.div(places[part], outliers.in_features, rounding_mode="floor")
        codes, left[part] = _codes_and_rest(outliers.values[part, None], quantized.codebook[rows])
        indices.view(-1)[places[part]] = codes
    if not bool(left.isfinite().all()):
        raise ValueError(
            f"an outlier of {name} and its nearest code are further apart than float16 reaches; leave it dense."
        )
    return pack(indices, quantized.codebook, quantized.bits), outliers._with(
        left, outliers.columns, outliers.starts
    )


def _codes_and_rest(wanted: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8 [n]) and what they leave (float16 [n]) of float16 weights [n, 1], whose rows have `entries` [n, n_codes]."""
    apart = wanted.float() - entries.float()
    rest = apart.half()
    exact = (entries.float() + rest.float()).half() == wanted
    size = apart.abs()
    nearest = size.argmin(1, keepdim=True)
    best = size.masked_fill(~exact, torch.inf).argmin(1, keepdim=True)
    codes = torch.where(exact.any(1, keepdim=True), best, nearest)
    return codes.view(-1).to(torch.uint8), rest.gather(1, codes).view(-1)


def _chunks(entries: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK // width)
    return (slice(first, min(first + step, entries)) for first in range(0, entries, step))


# --- what it costs and what it leaves ------------------------------------------------------------------------------


def bits_per_weight(quantized: CodebookWeight, outliers: Outliers | None = None) -> float:
    """Stored bits per weight: codes, codebook, padding and, where there are some, outliers."""
    apart = outliers.nbytes if outliers is not None else 0
    return 8 * (quantized.nbytes + apart) / (quantized.out_features * quantized.in_features)


def dequantize(
    quantized: CodebookWeight, outliers: Outliers | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The dense matrix [out_features, in_features]: codes, and the outliers added."""
    dense = quantized.dequantize(dtype)
    return dense if outliers is None else outliers.add_to(dense)


def weight_error(weight: Tensor, quantized: CodebookWeight, outliers: Outliers) -> float:
    """Relative squared error ||W - Q||^2 / ||W||^2 of codes and outliers together, summed in float64.

    A weight of zeros gives 0 when it is reproduced and infinity when it is not.
    """
    lost = total = 0.0
    restored = dequantize(quantized, outliers)
    for dense, back in zip(weight.detach().split(1024), restored.split(1024), strict=True):
        lost += float((dense.double() - back.double()).square().sum())
        total += float(dense.double().square().sum())
    return lost / total if total else (float("inf") if lost else 0.0)
