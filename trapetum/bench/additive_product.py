"""Products with additive codebooks, to be timed beside the others: `additive-2x8` (2 bits) and `additive-4x8` (4 bits)."""

import torch

from trapetum import additive, cuda, cuda_additive
from trapetum.bench.products import CHECKED_OUTPUTS, NotPossible, Product, Weights
from trapetum.build import source_sha256

METHODS = {"additive-2x8": 2, "additive-4x8": 4}


def weights(method: str, in_features: int, out_features: int, device: str) -> Weights:
    """Random additive weights and their product with one row of x.

    On a GPU the kernel with fp16 activations; on the CPU dequantize and multiply in fp32, which is slow and says so in
    `config.path`.

    Args:
        method: one of `METHODS`.
        device: "cpu" or "cuda".

    Raises:
        NotPossible: this device cannot do the shape.
    """
    if in_features % additive.GROUP:
        raise NotPossible(
            f"{method} stores groups of {additive.GROUP} inputs, and {in_features} is no multiple of it."
        )
    generator = torch.Generator(device).manual_seed(0)
    weight = additive.random(out_features, in_features, METHODS[method], generator)
    return (_on_cuda if device == "cuda" else _on_cpu)(method, weight)


def build(method: str, in_features: int, out_features: int, device: str) -> Product:
    """`weights` with one row of random activations.

    Raises:
        NotPossible: as `weights`.
    """
    return weights(method, in_features, out_features, device).at(1)


def _config(weight: additive.AdditiveWeight, path: str) -> dict:
    return {
        "bits": weight.n_codebooks,
        "n_codes": additive.ENTRIES,
        "n_codebooks": weight.n_codebooks,
        "group_size": additive.GROUP,
        "path": path,
    }


def _head(weight: additive.AdditiveWeight) -> torch.Tensor:
    part = slice(CHECKED_OUTPUTS)
    first = additive.AdditiveWeight(weight.codes[part], weight.codebooks, weight.scales[part])
    return first.dequantize(torch.float64)


def _on_cuda(method: str, weight: additive.AdditiveWeight) -> Weights:
    if not cuda.available():
        raise NotPossible(cuda.why_not())
    room = cuda.room_of(weight.codes.get_device())
    if not cuda_additive.fits(weight, room):
        raise NotPossible(
            f"{method} keeps {weight.in_features} inputs and its codebooks in shared memory, of which a block may have "
            f"{room.a_block} bytes here."
        )
    return Weights(
        method,
        (cuda_additive.pack(weight.codes), weight.codebooks, weight.scales),
        weight.in_features,
        weight.out_features,
        lambda x, w, c, s, **options: lambda: cuda_additive.gemv(x[0], w, c, s, **options),
        _config(weight, "table"),
        torch.float16,
        _head(weight),
        source_sha256(cuda_additive.SOURCE),
        ("alone", "pdl"),
        most_rows=1,
    )


def _on_cpu(method: str, weight: additive.AdditiveWeight) -> Weights:
    return Weights(
        method,
        (weight.codes, weight.codebooks, weight.scales),
        weight.in_features,
        weight.out_features,
        lambda x, w, c, s: lambda: additive.dense_product(x, additive.AdditiveWeight(w, c, s)),
        _config(weight, "dequantize"),
        torch.float32,
        _head(weight),
    )
