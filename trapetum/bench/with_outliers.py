"""The codebook product and what dense-and-sparse weights add to it, to be timed beside the codebook product alone.

`codebook+sparse` keeps 0.45 % of the weights apart in fp16, as SqueezeLLM does; `codebook+sparse@0.01` another share. Places
are random and uniform: real ones crowd in some rows, which takes longer where one warp or thread has them all.
"""

from dataclasses import replace

import torch
from torch import Tensor

from trapetum import cpu, cuda, sparse, sparse_product
from trapetum.bench import products
from trapetum.build import source_sha256

METHOD = "codebook+sparse"


def method_of(share: float) -> str:
    """The name under which `products.weights` makes the product with this share of outliers."""
    sparse.require_share(share)
    return METHOD if share == sparse.SHARE else f"{METHOD}@{share:g}"


def _share_of(method: str) -> float:
    _, at, share = method.partition("@")
    try:
        return float(share) if at else sparse.SHARE
    except ValueError as error:
        raise ValueError(
            f"method {method!r} has no share of outliers behind its @; write {METHOD}@0.01."
        ) from error


def weights(method: str, in_features: int, out_features: int, bits: int, device: str) -> products.Weights:
    """Random codes with random outliers.

    Args:
        method: `METHOD`, or `method_of` another share.
        bits: of the codes.
        device: "cpu" or "cuda".

    Raises:
        products.NotPossible: as for "codebook".
        ValueError: a share out of range.
    """
    share = _share_of(method)
    base = products.weights("codebook", in_features, out_features, bits, device)
    apart = random_outliers(out_features, in_features, share, device)
    side = cuda if device == "cuda" else cpu
    source = sparse_product.SOURCE if device == "cuda" else sparse_product.CPU_SOURCE
    return replace(
        base,
        method=METHOD,
        tensors=(*base.tensors, apart.values, apart.columns, apart.starts),
        multiply=(_on_cuda if device == "cuda" else _on_cpu)(base.multiply),
        config=base.config | {"outliers": share},
        head=_head(base.head, apart),
        kernel_sha256=source_sha256(side.SOURCE, source),
        label=f"{method}-{bits}",
    )


def random_outliers(out_features: int, in_features: int, share: float, device: str) -> sparse.Outliers:
    """Entries at random places, each as likely as any other."""
    entries, total = sparse.count(share, out_features, in_features), out_features * in_features
    places = torch.empty(0, dtype=torch.int64, device=device)
    while len(places) < entries:
        more = torch.randint(total, (entries + 64,), device=device)
        places = torch.cat([places, more]).unique()
    places = places[torch.randperm(len(places), device=device)[:entries]].sort().values
    rows = torch.div(places, in_features, rounding_mode="floor")
    starts = torch.zeros(out_features + 1, dtype=torch.int32, device=device)
    starts[1:] = torch.bincount(rows, minlength=out_features).cumsum(0)
    columns = (places - rows * in_features).to(sparse.column_dtype(in_features))
    values = (torch.randn(entries, device=device) * 10 / in_features**0.5).half()
    return sparse.Outliers(values, columns, starts, in_features, share)


def _head(head: Tensor, apart: sparse.Outliers) -> Tensor:
    """The first outputs' weights in float64, outliers added."""
    starts = apart.starts[: len(head) + 1].long()
    entries = int(starts[-1])
    rows = torch.repeat_interleave(torch.arange(len(head), device=head.device), starts.diff())
    whole = head.clone()
    whole[rows, apart.columns[:entries].long()] += apart.values[:entries].double()
    return whole


def _on_cuda(multiply):
    def both(x: Tensor, codes: Tensor, codebook: Tensor, *apart: Tensor, pdl: bool = False):
        product = multiply(x, codes, codebook, pdl=pdl)

        def run() -> Tensor:
            y = product()
            every = y.view(len(x), -1).split(products.ROWS_A_LAUNCH)
            for out, rows in zip(every, x.split(products.ROWS_A_LAUNCH), strict=True):
                sparse_product.launch(out, rows, *apart, pdl=pdl)
            return y

        return run

    return both


def _on_cpu(multiply):
    """On the threads that torch is set to, as the codebook product: which are best is measured outside."""

    def both(x: Tensor, codes: Tensor, codebook: Tensor, *apart: Tensor):
        product = multiply(x, codes, codebook)

        def run() -> Tensor:
            y = product()
            for out, row in zip(y.view(len(x), -1), x, strict=True):
                sparse_product.add_row(out, row, *apart, threads=torch.get_num_threads())
            return y

        return run

    return both
