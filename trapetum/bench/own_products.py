"""Dense products by kernels of our own on a CPU, `own-fp32`, `own-fp16` and `own-int8`: the law without other people's code."""

import math
from functools import partial

import torch

from trapetum import cpu, cpu_dense
from trapetum.bench.products import CHECKED_OUTPUTS, NotPossible, Weights
from trapetum.build import source_sha256

METHODS = tuple(f"own-{kind}" for kind in cpu_dense.KINDS)


def weights(method: str, in_features: int, out_features: int) -> Weights:
    """Random dense weights in one of `METHODS`, for one row of float32 activations.

    Raises:
        NotPossible: the kernel cannot be compiled here.
    """
    if not cpu_dense.available():
        raise NotPossible(cpu_dense.why_not())
    kind = method.removeprefix("own-")
    dense = torch.randn(out_features, in_features) / math.sqrt(in_features)
    packed, scale = cpu_dense.pack(dense, kind)
    head, head_scale = cpu_dense.pack(dense[:CHECKED_OUTPUTS], kind)
    rows = min(CHECKED_OUTPUTS, out_features)
    return Weights(
        method,
        (packed,) if scale is None else (packed, scale),
        in_features,
        out_features,
        lambda x, w, s=None: partial(cpu_dense.gemv, x[0], w, s, in_features, out_features, kind),
        {"bits": 8 * packed.element_size(), "path": cpu.active_path()},
        torch.float32,
        cpu_dense.unpack(head, head_scale, in_features, rows, kind).double(),
        source_sha256(cpu_dense.SOURCE),
        most_rows=1,
    )
