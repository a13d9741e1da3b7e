"""Other people's packages, faked: what is asked of them, what is checked, and that a changed one ends as a sentence."""

import importlib.machinery
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from trapetum import timing
from trapetum.bench import multiply, peers
from trapetum.bench.products import NotPossible
from trapetum.bench.recording import Recorder

SHAPE = (256, 64)
PACKAGES = {
    "torchao-int4": "torchao",
    "gemlite": "gemlite",
    "bitsandbytes-nf4": "bitsandbytes",
    "aqlm": "aqlm",
}


def fake(patch, name, **contents):
    """Put a module called `name` in place, its parents too."""
    parts = name.split(".")
    for k in range(1, len(parts) + 1):
        path = ".".join(parts[:k])
        if path not in sys.modules:
            module = ModuleType(path)
            module.__spec__ = importlib.machinery.ModuleSpec(path, None)
            module.__path__ = []
            patch.setitem(sys.modules, path, module)
    for key, value in contents.items():
        patch.setattr(sys.modules[name], key, value, raising=False)


class Wrapped(torch.Tensor):
    """A tensor that keeps its numbers in another, as torchao's do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        bare = [a.inner if isinstance(a, cls) else a for a in args]
        made = function(*bare, **(kwargs or {}))
        return cls(made) if function is torch.ops.aten.detach.default else made


@pytest.fixture
def torchao(monkeypatch):
    """Quantizes by groups to the range of each, as tinygemm's parameters are chosen."""
    asked = {}

    def quantize_(model, config):
        asked["config"] = config
        weight = model[0].weight.data.float().view(-1, peers.GROUP)
        low, high = weight.aminmax(dim=1, keepdim=True)
        step = (high - low) / 15
        stored = ((weight - low) / step).round() * step + low
        model[0].weight = nn.Parameter(stored.view_as(model[0].weight).bfloat16(), requires_grad=False)

    def config(group_size, int4_packing_format):
        return (group_size, int4_packing_format)

    fake(monkeypatch, "torchao.quantization", Int4WeightOnlyConfig=config, quantize_=quantize_)
    return asked


class FakeGemlite(nn.Module):
    def __init__(self, W_nbits, group_size, in_features, out_features, input_dtype, output_dtype):
        super().__init__()
        self.group_size, self.shape = group_size, (out_features, in_features)
        self.forward = self.forward_one  # bound to the instance, as the package does

    def pack(self, W_q, scales, zeros, bias):
        assert W_q.dtype == torch.uint8 and bias is None
        q = W_q.view(-1, self.group_size).float()
        self.W_q = nn.Parameter(((q - zeros) * scales).view(self.shape).half(), requires_grad=False)

    def forward_one(self, x):
        return x @ self.W_q.T


@pytest.fixture
def gemlite(monkeypatch):
    fake(monkeypatch, "gemlite.core", DType=SimpleNamespace(FP16=0), GemLiteLinear=FakeGemlite)


class FakeLinear4bit(nn.Linear):
    def __init__(self, inputs, outputs, bias, compute_dtype, compress_statistics, quant_type):
        super().__init__(inputs, outputs, bias=bias)
        assert quant_type == "nf4" and not compress_statistics

    def to(self, device):
        self.weight = nn.Parameter(self.weight.data.half(), requires_grad=False)
        self.weight.quant_state = SimpleNamespace(absmax=torch.ones(7), blocksize=64)
        return self


@pytest.fixture
def bitsandbytes(monkeypatch):
    fake(monkeypatch, "bitsandbytes.nn", Linear4bit=FakeLinear4bit)
    fake(monkeypatch, "bitsandbytes.functional", dequantize_4bit=lambda data, state: data)


class FakeQuantizedLinear(nn.Module):
    """Computes with the packages' own formula, written from its definition: sum of vectors, times the scale."""

    def __init__(
        self, inputs, outputs, in_group_size, out_group_size, num_codebooks, nbits_per_codebook, **more
    ):
        super().__init__()
        device, dtype = more["device"], more["dtype"]
        entries, groups = 2**nbits_per_codebook, inputs // in_group_size

        def kept(*shape, dtype=dtype):
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device), requires_grad=False)

        self.codes = kept(outputs, groups, num_codebooks, dtype=torch.int8)
        self.codebooks = kept(num_codebooks, entries, 1, in_group_size)
        self.scales = kept(outputs, 1, 1, 1)

    def forward(self, x):
        rows = []
        for codes, scale in zip(self.codes, self.scales.flatten(), strict=True):
            vectors = [
                sum(self.codebooks[k, c % 256, 0] for k, c in enumerate(group)) for group in codes.tolist()
            ]
            rows.append(torch.cat(vectors) * scale)
        return x @ torch.stack(rows).T


@pytest.fixture
def aqlm(monkeypatch):
    fake(monkeypatch, "aqlm", QuantizedLinear=FakeQuantizedLinear)


@pytest.fixture
def every_package(torchao, gemlite, bitsandbytes, aqlm):
    return torchao


@pytest.mark.parametrize("method", peers.PEERS)
def test_a_peer_is_right_before_it_is_timed(every_package, method):
    product = peers.build(method, *SHAPE, "cpu")
    assert product.method == method and product.checked_error() < 1e-2
    assert product.config["bits"] == (2 if method == "aqlm" else 4)
    one, two, three = product.calls(3)
    assert torch.equal(one(), two()) and torch.equal(one(), three())
    assert product.weight_bytes > SHAPE[0] * SHAPE[1] / 4


def test_torchao_is_asked_for_the_layout_of_tinygemm_and_older_releases_for_their_default(
    torchao, monkeypatch
):
    peers.build("torchao-int4", *SHAPE, "cpu")
    assert torchao["config"] == (128, "tile_packed_to_4d")
    fake(monkeypatch, "torchao.quantization", Int4WeightOnlyConfig=lambda group_size: ("old", group_size))
    peers.build("torchao-int4", *SHAPE, "cpu")
    assert torchao["config"] == ("old", 128)


def test_copies_are_layers_of_their_own(gemlite):
    product = peers.build("gemlite", *SHAPE, "cpu")
    first, second = product.calls(2)
    before = second().clone()
    product.layer.W_q.data.zero_()
    assert first().abs().sum() == 0 and torch.equal(second(), before)


def test_copies_that_share_memory_are_refused(gemlite, monkeypatch):
    monkeypatch.setattr(FakeGemlite, "__deepcopy__", lambda self, memo: self, raising=False)
    with pytest.raises(NotPossible, match="4 copies of its layer take 1 places in memory, not 4"):
        peers.build("gemlite", *SHAPE, "cpu").calls(4)


def test_stored_looks_inside_wrappers_and_states():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(Wrapped(torch.ones(2, 3)), requires_grad=False)
    layer.bias.quant_state = SimpleNamespace(absmax=torch.ones(5), name="nf4")
    assert sorted(t.numel() for t in peers.stored(layer)) == [4, 5, 6]


def test_a_wrong_peer_is_not_timed(gemlite):
    product = peers.build("gemlite", *SHAPE, "cpu")
    wrong = replace(product, reference=product.reference * 1.1)
    with pytest.raises(ArithmeticError, match="off by 0.091 against float64"):
        wrong.checked_error()


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(peers, "_found", lambda package: package == "gemlite")
    assert peers.installed() == ("gemlite",)
    assert peers.missing()[0] == (
        "torchao-int4 left out: torchao is not installed (pip install -e '.[peers]')."
    )
    with pytest.raises(NotPossible, match="aqlm is not installed"):
        peers.build("aqlm", *SHAPE, "cpu")


@pytest.mark.parametrize("method", peers.PEERS)
def test_a_package_without_what_is_asked_of_it_is_one_sentence(monkeypatch, method):
    package = PACKAGES[method]
    for name in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    fake(monkeypatch, package)
    with pytest.raises(NotPossible, match="Error: ") as caught:
        peers.build(method, *SHAPE, "cpu")
    assert "\n" not in str(caught.value)


def test_a_changed_signature_is_one_sentence(monkeypatch, gemlite):
    fake(monkeypatch, "gemlite.core", GemLiteLinear=lambda bits: None)
    with pytest.raises(NotPossible, match="^TypeError: .*unexpected keyword argument"):
        peers.build("gemlite", *SHAPE, "cpu")


def test_a_shape_that_does_not_fit_the_groups_is_refused(gemlite):
    with pytest.raises(NotPossible, match="multiple of its groups of 128, not 100"):
        peers.build("gemlite", 100, 64, "cpu")


# In the bench


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The GPU's rounds with its graph replaced by calls, and peers built where there is no GPU."""
    monkeypatch.setattr(timing, "free_bytes", lambda device: 1 << 34)
    monkeypatch.setattr(timing, "rotation_bytes", lambda device, cache=None: 1 << 16)
    monkeypatch.setattr(
        timing, "cuda_graph_us", lambda calls, repeats: [float(len([c() for c in calls]))] * 3
    )
    make = peers.build
    monkeypatch.setattr(peers, "build", lambda method, i, o, device: make(method, i, o, "cpu"))
    return Recorder("cpu", "smoke")


def test_a_peer_is_timed_cold_and_warm_beside_the_others(as_on_a_gpu, gemlite):
    multiply._shape_cuda(as_on_a_gpu, SHAPE, [("gemlite", 4)], ("cold", "warm"))
    error, cold, warm = as_on_a_gpu.close()
    assert error.quantity == "output_error" and error.method == "gemlite"
    assert (cold.config["l2"], cold.config["copies"], cold.value) == ("cold", 2, 2.0)
    assert (warm.config["l2"], warm.config["copies"]) == ("warm", 1)
    assert cold.config["bytes"] == 2 * SHAPE[0] * SHAPE[1] + 2 * sum(SHAPE)


def test_a_peer_that_fails_while_it_is_timed_is_left_out_and_ours_is_not(as_on_a_gpu, gemlite, monkeypatch):
    def no_capture(calls, repeats):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(timing, "cuda_graph_us", no_capture)
    monkeypatch.setattr(peers, "_found", lambda package: package == "gemlite")
    said = []
    multiply._shape_cuda(as_on_a_gpu, SHAPE, [("gemlite", 4), ("aqlm", 4)], ("cold",), said.append)
    assert said == [
        "gemlite left out at 256 x 64: RuntimeError: operation not permitted when stream is capturing",
        "aqlm left out at 256 x 64: aqlm is not installed (pip install -e '.[peers]').",
    ]
    ours = multiply.build("linear-fp16", *SHAPE, 4, "cpu")
    monkeypatch.setattr(multiply, "make_product", lambda *a: ours)
    with pytest.raises(RuntimeError, match="not permitted"):
        multiply._shape_cuda(as_on_a_gpu, SHAPE, [("linear-fp16", 4)], ("cold",), said.append)


def test_peers_are_planned_on_a_gpu_only_and_only_when_installed(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda: ("gemlite",))
    recorder = Recorder("cpu", "smoke")
    assert ("gemlite", 4) not in multiply._plan(recorder, None, None)
    recorder.device = "cuda"
    assert ("gemlite", 4) in multiply._plan(recorder, None, None)
    assert multiply._plan(recorder, ["read"], [2]) == [("read", 2)]
