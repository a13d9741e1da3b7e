"""Other people's 4-bit and 2-bit products, measured like ours where they are installed.

`pip install -e '.[peers]'` installs them. Each adapter builds one layer through its package's public interface, with
weights whose values are known, so that the product can be checked against float64. A package that is missing, or whose
interface has changed, ends as one sentence and not as a number.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from trapetum.bench.products import CHECKED_OUTPUTS, NotPossible, Product

GROUP = 128
TOLERANCE = 2e-2  # relative L2 error against float64: some of them sum in fp16 or bf16


@dataclass(frozen=True)
class Made:
    """A peer's layer and what is known of it.

    Attributes:
        layer: callable on x [1, in_features].
        dtype: of x and y.
        head: float64 [up to `CHECKED_OUTPUTS`, in_features], the first outputs' weights as stored.
        config: what a record's config says (bits, group_size, ...).
    """

    layer: nn.Module
    dtype: torch.dtype
    head: Tensor
    config: dict


@dataclass(frozen=True)
class Peer:
    """How to make one peer's product.

    Attributes:
        package: what has to be installed.
        make: `make(in_features, out_features, device)` gives a `Made`.
    """

    package: str
    make: Callable[[int, int, str], Made]


@dataclass(frozen=True)
class PeerProduct(Product):
    """A product by a layer that is not ours; copies of the weights are copies of the layer.

    Attributes:
        layer: the layer.
        x: [1, in_features].
    """

    layer: nn.Module | None = None
    x: Tensor | None = None

    def calls(self, copies: int, **options) -> list[Callable[[], object]]:
        """Calls of `copies` layers with the same content in distinct memory.

        Raises:
            NotPossible: the layer's copies share memory, so a rotation over them would not be cold.
        """
        with _plain_tensors():
            layers = [self.layer, *(copy.deepcopy(self.layer) for _ in range(copies - 1))]
        places = {max(stored(layer), key=lambda t: t.nbytes).data_ptr() for layer in layers}
        if len(places) < copies:
            raise NotPossible(
                f"{copies} copies of its layer take {len(places)} places in memory, not {copies}."
            )
        return [_call(layer, self.x) for layer in layers]

    def checked_error(self) -> float:
        """The error against float64, refused when it is too large.

        Raises:
            ArithmeticError: the product is wrong, so its time would mean nothing.
        """
        error = self.error()
        if not error <= TOLERANCE:
            raise ArithmeticError(f"it is off by {error:.2g} against float64 (allowed {TOLERANCE:g}).")
        return error


def _call(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: layer(x)


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """No gradients, but ordinary tensors: packages that make parameters do not expect inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def stored(layer: nn.Module) -> list[Tensor]:
    """The plain tensors that a layer keeps: parameters, buffers, what is inside them, and bitsandbytes' state."""
    held = [*layer.parameters(), *layer.buffers()]
    return [inner for tensor in held for inner in plain(tensor)]


def plain(tensor: Tensor) -> list[Tensor]:
    """The plain tensors inside a tensor: itself, or what its class or its quantization state wraps."""
    if hasattr(tensor, "__tensor_flatten__"):  # a subclass that wraps plain tensors, as torchao's are
        names, _ = tensor.__tensor_flatten__()
        return [inner for name in names for inner in plain(getattr(tensor, name))]
    state = getattr(tensor, "quant_state", None)
    inside = vars(state).values() if hasattr(state, "__dict__") else ()
    return [tensor, *(value for value in inside if isinstance(value, Tensor))]


def installed() -> tuple[str, ...]:
    """The peers' methods whose package can be found."""
    return tuple(name for name, peer in PEERS.items() if _found(peer.package))


def missing() -> list[str]:
    """One sentence for every peer that is not installed."""
    return [
        f"{name} left out: {peer.package} is not installed (pip install -e '.[peers]')."
        for name, peer in PEERS.items()
        if not _found(peer.package)
    ]


def _found(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def reason(error: BaseException) -> str:
    """An error as the end of a sentence: its type and its first line."""
    line = (str(error).strip().splitlines() or ["no message"])[0][:200]
    return line if isinstance(error, (NotPossible, ArithmeticError)) else f"{type(error).__name__}: {line}"


def build(method: str, in_features: int, out_features: int, device: str = "cuda") -> PeerProduct:
    """Make a peer's product with random weights and one row of random activations.

    Args:
        method: a key of `PEERS`.
        device: where; the packages' kernels are for CUDA.

    Raises:
        NotPossible: it is not installed, or it refuses the shape, the device or what this adapter asks of it.
    """
    peer = PEERS[method]
    if not _found(peer.package):
        raise NotPossible(f"{peer.package} is not installed (pip install -e '.[peers]').")
    try:
        with _plain_tensors():
            made = peer.make(in_features, out_features, device)
            return _product(method, made, in_features, out_features, device)
    except Exception as error:  # whatever another release of the package raises
        raise NotPossible(reason(error)) from error


def _product(method: str, made: Made, in_features: int, out_features: int, device: str) -> PeerProduct:
    x = torch.randn(1, in_features, device=device).to(made.dtype)
    tensors = tuple(t for t in stored(made.layer) if t.device == x.device)
    return PeerProduct(
        method,
        tensors,
        lambda *_tensors: _call(made.layer, x),
        (in_features + out_features) * x.element_size(),
        made.config,
        x.double() @ made.head.T,
        made.dtype,
        layer=made.layer,
        x=x,
    )


# The adapters


def _grid(in_features: int, out_features: int, device: str) -> tuple[Tensor, float]:
    """Integers 0 to 15, uint8 [out, in] with both ends in every group, and the power of two that scales them.

    Weights `(q - 8) * scale` lose nothing when they are quantized to 4 bits by groups, so that what a package has
    stored is known without asking it.
    """
    if in_features % GROUP:
        raise NotPossible(f"in_features must be a multiple of its groups of {GROUP}, not {in_features}.")
    q = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, device=device)
    q[:, ::GROUP], q[:, 1::GROUP] = 0, 15
    return q, 2.0**-8


def _torchao(in_features: int, out_features: int, device: str) -> Made:
    """`Int4WeightOnlyConfig`: bf16 activations, groups of 128, the layout of PyTorch's tinygemm.

    Source: https://docs.pytorch.org/ao (torchao.quantization.Int4WeightOnlyConfig, quantize_)
    """
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    q, scale = _grid(in_features, out_features, device)
    linear = nn.Linear(in_features, out_features, bias=False, device=device, dtype=torch.bfloat16)
    linear.weight.data.copy_((q.float() - 8) * scale)
    head = linear.weight.data[:CHECKED_OUTPUTS].double()
    model = nn.Sequential(linear)
    try:
        config = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    except TypeError:  # releases before that argument had this layout as their default
        config = Int4WeightOnlyConfig(group_size=GROUP)
    quantize_(model, config)
    return Made(model, torch.bfloat16, head, {"bits": 4, "group_size": GROUP})


def _gemlite(in_features: int, out_features: int, device: str) -> Made:
    """`GemLiteLinear`, 4 bits, fp16 activations, groups of 128 with a scale and a zero, its default launch choice.

    Source: https://github.com/mobiusml/gemlite, README, "Usage"
    """
    from gemlite.core import DType, GemLiteLinear

    q, scale = _grid(in_features, out_features, device)
    layer = GemLiteLinear(
        4,
        group_size=GROUP,
        in_features=in_features,
        out_features=out_features,
        input_dtype=DType.FP16,
        output_dtype=DType.FP16,
    )
    head = (q[:CHECKED_OUTPUTS].double() - 8) * scale
    groups = torch.ones(out_features * in_features // GROUP, 1, dtype=torch.float16, device=device)
    layer.pack(q, groups * scale, groups * 8, None)
    return Made(layer, torch.float16, head, {"bits": 4, "group_size": GROUP})


def _bitsandbytes(in_features: int, out_features: int, device: str) -> Made:
    """`Linear4bit` with NF4, fp16 activations, its default block, statistics in fp32 (no second quantization).

    Source: https://huggingface.co/docs/bitsandbytes/reference/nn/linear4bit and .../functional
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(
        in_features,
        out_features,
        bias=False,
        compute_dtype=torch.float16,
        compress_statistics=False,
        quant_type="nf4",
    )
    layer.load_state_dict({"weight": torch.randn(out_features, in_features) / in_features**0.5})
    layer = layer.to(device)  # this quantizes
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    head = weight.reshape(out_features, in_features)[:CHECKED_OUTPUTS].double()
    return Made(layer, torch.float16, head, {"bits": 4, "group_size": layer.weight.quant_state.blocksize})


def _aqlm(in_features: int, out_features: int, device: str) -> Made:
    """`QuantizedLinear` with two codebooks of 256 vectors of 8 weights: 2 bits, fp16 activations, a scale a channel.

    Source: https://github.com/Vahe1994/AQLM, inference_lib
    """
    from aqlm import QuantizedLinear

    layer = QuantizedLinear(
        in_features,
        out_features,
        in_group_size=8,
        out_group_size=1,
        num_codebooks=2,
        nbits_per_codebook=8,
        bias=False,
        device=device,
        dtype=torch.float16,
    )
    codes = torch.randint(-128, 128, layer.codes.shape, dtype=torch.int8, device=device)
    layer.codes.data.copy_(codes)
    layer.codebooks.data.copy_(torch.randn_like(layer.codebooks) / (2 * in_features) ** 0.5)
    layer.scales.data.copy_(0.5 + torch.rand_like(layer.scales))
    head = _additive_head(codes, layer.codebooks.data, layer.scales.data)
    return Made(layer, torch.float16, head, {"bits": 2, "n_codes": 256})


def _additive_head(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """float64 weights of the first outputs.

    Args:
        codes: int8 [out, in / 8, 2], an index modulo 256.
        codebooks: fp16 [2, 256, 1, 8].
        scales: fp16 [out, 1, 1, 1].
    """
    first = codes[:CHECKED_OUTPUTS].long() % 256
    vectors = sum(codebooks[k, :, 0].double()[first[..., k]] for k in range(codebooks.shape[0]))
    return (vectors * scales[:CHECKED_OUTPUTS].double().view(-1, 1, 1)).flatten(1)


PEERS = {
    "torchao-int4": Peer("torchao", _torchao),
    "gemlite": Peer("gemlite", _gemlite),
    "bitsandbytes-nf4": Peer("bitsandbytes", _bitsandbytes),
    "aqlm": Peer("aqlm", _aqlm),
}
