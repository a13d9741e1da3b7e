"""Other people's decodes: PyTorch's int4 weights in the own engine, transformers' own loops, torchao (faked), taking turns."""

import importlib
import importlib.machinery
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from trapetum import models, swap, tinygemm
from trapetum.bench import torchao_models
from trapetum.bench.products import NotPossible
from trapetum.bench.recording import Recorder
from trapetum.bench.transformers_decoding import TransformersDecoder
from trapetum.decode import Engine, Generation
from trapetum.projection import Apart, project
from trapetum.tinygemm import TinyGemm, TinyGemmError, TinyGemmLinear, tinygemm_model

# The package exports functions of these names.
interleaved = importlib.import_module("trapetum.bench.decode_interleaved")
peers = importlib.import_module("trapetum.bench.decode_peers")

PROMPT = [5, 9, 200, 31, 77, 2, 140]
TINY = "random:llama-tiny"
WIDE = dict(
    hidden_size=128, intermediate_size=256, head_dim=32, num_key_value_heads=2
)  # groups of 128, stacks of 64


def tiny(dtype=torch.float32, device="cpu", **config):
    model = models.random_model(models.MODELS["llama-tiny"], device, dtype, seed=1, **config)
    with torch.no_grad():  # spread the logits, so that a rounding does not decide between two tokens
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def greedy(model, prompt, count):
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def linear(in_features, out_features, dtype=torch.float32, device="cpu", bias=False):
    layer = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
    with torch.no_grad():  # each group its own range, not centred
        groups = layer.weight.unflatten(1, (-1, 32))
        spread = torch.rand(groups.shape[:2] + (1,), device=device) + 0.2
        groups.copy_((torch.randn(groups.shape, device=device) + torch.randn_like(spread)) * spread)
    return layer.requires_grad_(False)


def expected_weight(weight, group, dtype):
    """float64 of (q - 8) * scale + zero, worked out group by group from the definition."""
    out = torch.empty(weight.shape, dtype=torch.float64)
    for row, values in enumerate(weight.double().cpu()):
        for first in range(0, len(values), group):
            part = values[first : first + group]
            step = ((part.max() - part.min()) / 15).to(dtype).double()
            middle = (part.min() + 8 * step).to(dtype).double()
            codes = ((part - middle) / step + 8).round().clamp(0, 15)
            out[row, first : first + group] = (codes - 8) * step + middle
    return out


# The layer


@pytest.mark.parametrize("group", tinygemm.GROUPS)
@pytest.mark.parametrize("shape", [(128, 16), (384, 48), (256, 80)])
def test_a_layer_reads_back_as_its_formula_and_multiplies_by_it(group, shape):
    dense = linear(*shape, bias=True)
    layer = TinyGemmLinear.from_linear(dense, group)
    weight = layer.dequantize(torch.float64)
    expected = expected_weight(dense.weight, group, torch.float32)
    wrong = (weight - expected).abs() > 1e-6 * expected.abs().max()
    assert wrong.double().mean() < 0.002  # a weight halfway between two codes may fall to either side
    for rows in (1, 5):
        x = torch.randn(rows, shape[0])
        exact = x.double() @ weight.T + dense.bias.double()
        assert (layer(x).double() - exact).norm() / exact.norm() < 1e-6
    assert layer(torch.randn(2, 3, shape[0])).shape == (2, 3, shape[1])


@pytest.mark.parametrize("dtype,limit", [(torch.bfloat16, 5e-3), (torch.float16, 6e-4)])
def test_16_bit_layers_follow_their_own_weights(dtype, limit):
    layer = TinyGemmLinear.from_linear(linear(256, 64, dtype))
    x = torch.randn(1, 256, dtype=dtype)
    y = layer(x)
    exact = x.double() @ layer.dequantize(torch.float64).T
    assert y.dtype == dtype and (y.double() - exact).norm() / exact.norm() < limit


def test_no_weight_is_further_from_its_own_than_half_a_step():
    weight = linear(256, 32).weight
    codes, scales = tinygemm.quantize_groups(weight, 64, torch.float32)
    assert codes.shape == (32, 256) and scales.shape == (4, 32, 2) and int(codes.max()) == 15
    step, middle = scales.double().unbind(-1)
    back = (codes.double() - 8).unflatten(1, (-1, 64)) * step.T[..., None] + middle.T[..., None]
    off = (back - weight.double().unflatten(1, (-1, 64))).abs() / step.T[..., None]
    assert float(off.max()) < 0.5 + 1e-4 and float(off.max()) > 0.4


def test_an_even_group_stays_finite():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        codes, scales = tinygemm.quantize_groups(torch.full((16, 128), 0.25), 128, dtype)
        back = (codes.float() - 8) * scales[0, :, :1].float() + scales[0, :, 1:].float()
        assert float((back - 0.25).abs().max()) < 2e-3


@pytest.mark.parametrize("shape,words", [((100, 64), "100 x 64"), ((128, 24), "128 x 24")])
def test_a_shape_that_the_kernel_cannot_do_is_named(shape, words):
    with pytest.raises(TinyGemmError, match=words):
        TinyGemmLinear.from_linear(nn.Linear(*shape), name="q_proj")


def test_other_refusals():
    with pytest.raises(TinyGemmError, match="128, 64, 32 inputs, not 48"):
        TinyGemmLinear.from_linear(nn.Linear(96, 64), 48)
    layer = TinyGemmLinear.from_linear(linear(128, 64))
    with pytest.raises(TinyGemmError, match="float16"):
        layer(torch.zeros(1, 128, dtype=torch.float16))
    with pytest.raises(TinyGemmError, match=r"\[1, 64\]"):
        layer(torch.zeros(1, 64))
    with pytest.raises(TinyGemmError, match="bfloat16"):
        project([layer], torch.bfloat16)


def test_a_pytorch_without_the_kernel_is_one_sentence(monkeypatch):
    def missing(codes):
        raise NotImplementedError("no such operator\nmore")

    monkeypatch.setattr(tinygemm, "_pack_cpu", missing)
    with pytest.raises(TinyGemmError, match="cannot pack the layer: no such operator$"):
        TinyGemmLinear.from_linear(linear(128, 64))


# In the engine


@pytest.mark.parametrize("biased", [(True, True, True), (False, True, False), (False, False, False)])
def test_stacked_products_equal_single_ones(biased):
    sizes = (64, 192, 128)
    parts = [linear(256, n, bias=b) for n, b in zip(sizes, biased, strict=True)]
    layers = [TinyGemmLinear.from_linear(part) for part in parts]
    x = torch.randn(3, 256)
    expected = torch.cat([layer(x) for layer in layers], -1)
    product = project(layers, torch.float32)
    assert isinstance(product, TinyGemm) and product.out_features == sum(sizes)
    torch.testing.assert_close(product(x), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(product.rows(x), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        torch.cat([layer(x) for layer in layers], -1), expected
    )  # the views still work


def test_stacking_holds_nothing_twice():
    layers = [TinyGemmLinear.from_linear(linear(256, n)) for n in (64, 128)]
    first, again = project(layers, torch.float32), project(layers, torch.float32)
    for name in ("_packed", "_scales"):
        assert getattr(first, name).data_ptr() == getattr(again, name).data_ptr()
    assert layers[1].scales.untyped_storage().data_ptr() == first._scales.untyped_storage().data_ptr()
    x = torch.randn(1, 256)
    assert torch.equal(first(x), again(x))


def test_what_cannot_be_stacked_stays_apart():
    odd = [TinyGemmLinear.from_linear(linear(256, n)) for n in (80, 64)]
    mixed = [TinyGemmLinear.from_linear(linear(256, 64)), linear(256, 64)]
    for layers in (odd, mixed):
        assert isinstance(project(layers, torch.float32), Apart)


@pytest.mark.parametrize("stage", ["naive", "lean"])
@pytest.mark.parametrize("shape,group", [({}, 32), (WIDE, 128)])
@pytest.mark.parametrize("lm_head", [False, True])
def test_tokens_equal_those_of_transformers_on_the_dequantized_weights(stage, shape, group, lm_head):
    model = tinygemm_model(tiny(**shape), group, lm_head)
    made = Engine(model, stage).generate(PROMPT, 24).tokens
    assert len(tinygemm.tinygemm_layers(model)) == 14 + lm_head
    expected = greedy(tinygemm.dense_model(model), PROMPT, 24)
    assert made == expected and len(set(expected)) > 4
    assert made != greedy(tiny(**shape), PROMPT, 24)  # four bits did change the model


def test_a_models_group_and_bytes():
    assert tinygemm.best_group(tiny()) == 32 and tinygemm.best_group(tiny(**WIDE)) == 128
    with pytest.raises(TinyGemmError, match="none divides all of"):
        tinygemm.best_group(nn.Sequential(nn.Linear(100, 16)))
    model = tiny(torch.bfloat16, **WIDE)
    dense = sum(layer.weight.nbytes for _, layer in swap.linears(model))
    before = swap.weight_bytes(model)
    tinygemm_model(model)
    assert (
        before - swap.weight_bytes(model) == dense * 12 // 16 - dense // 16 // 128 * 32
    )  # 4 bits, and 32 a group


# transformers' own loops


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1]])
def test_both_loops_speak_as_generate_does_and_forget(static, prompt):
    decoder = TransformersDecoder(tiny(), 40, static=static)
    made = decoder.generate(prompt, 20)
    assert made.tokens == greedy(tiny(), prompt, 20) and len(made.token_s) == 19 and made.ttft_s > 0
    decoder.generate([3, 4], 30)
    assert decoder.generate(prompt, 20).tokens == made.tokens
    with pytest.raises(NotPossible, match="more than the 40 places"):
        decoder.generate(prompt, 40)


def test_a_compiled_step_needs_a_gpu():
    with pytest.raises(NotPossible, match="CUDA graphs, and the model is on cpu"):
        TransformersDecoder(tiny(), 40, compiled=True)


def test_the_step_compiles_whole_and_once():
    """Without a GPU the graph is not replayed, but a break in it or a second compilation would show."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    decoder = TransformersDecoder(tiny(), 40, static=True)
    decoder._step = torch.compile(decoder._one, backend=keep, fullgraph=True)
    made = [decoder.generate(prompt, 12).tokens for prompt in (PROMPT, PROMPT[:2], PROMPT)]
    torch._dynamo.reset()
    assert len(graphs) == 1 and made[0] == made[2] == greedy(tiny(), PROMPT, 12)


# Records


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch):
    for module in (peers, interleaved):
        monkeypatch.setattr(module, "cold_read_gbps", lambda recorder: 1000.0)


def test_each_peer_of_a_cpu_has_all_its_records():
    found = peers.decode_peers(TINY, "cpu", "smoke", new_tokens=64)
    by = {}
    for record in found:
        by.setdefault((record.method, record.config["dtype"]), []).append(record)
    assert set(by) == {
        (peers.EAGER, "fp32"),
        (peers.EAGER, "bf16"),
        (peers.EAGER, "fp16"),
        (peers.TINYGEMM, "bf16"),
    }
    for records in by.values():
        quantities = [r.quantity for r in records]
        assert quantities == [
            "decode_speed",
            *["window_speed"] * 2,
            "time_to_first_token",
            "decode_memory",
            "model_memory",
            "model_bandwidth",
        ]
        speed, bandwidth = records[0], records[-1]
        assert speed.config["new_tokens"] == 64 and speed.config["context"] == 4 + 32
        ratio = bandwidth.value / speed.value  # GB a token: all but the cache
        assert 0.5 < ratio * 1e9 / speed.config["bytes"] < 1
        assert {r.config["profile"] for r in records} == {"smoke"}
        assert {r.config["stage"] for r in records} <= {"eager", "lean"}


def test_sizes_count_what_a_token_reads():
    config = peers._config(TINY, "fp32")
    shape = models.MODELS["llama-tiny"]
    dense = peers._eager(TINY, "cpu", config)
    assert dense.weight_bytes == 4 * shape.parameters
    assert dense.token_weight_bytes == 4 * (shape.parameters - shape.embedding_weights)
    assert dense.token_bytes(10) == dense.token_weight_bytes + shape.kv_bytes(10, 4)
    codes = interleaved._codebook(TINY, 4)
    assert codes.weight_bytes == swap.weight_bytes(codes.loaded.model)
    assert codes.token_bytes(10) - codes.token_weight_bytes == shape.kv_bytes(
        10, 4
    )  # its cache is float32 here
    tied = models.random_model(shape, dtype=torch.float32, tie_word_embeddings=True)
    loaded = models.Loaded(tied, None, TINY, shape, "random")
    both = peers.Contender("x", loaded, config, start=None)
    assert both.token_weight_bytes == both.weight_bytes


def test_peers_get_the_prompt_of_the_own_decode():
    from trapetum.bench import generating
    from trapetum.bench.variants import variants

    recorder = Recorder("cpu", "smoke")
    run = peers.PeerRun(recorder, peers.transformers_eager(TINY, "cpu", "fp32"))
    ours = generating.random_prompt(next(variants(TINY, "cpu", ["fp32"], ())), recorder.sizes.prompt_tokens)
    assert run.prompt == ours


@pytest.mark.parametrize("peer", [p for p in peers.PEERS if p not in peers.peers_on("cpu")])
def test_a_peer_that_needs_a_gpu_is_a_row_that_says_so(peer):
    (row,) = peers.decode_peers(TINY, "cpu", "smoke", peers=[peer])
    assert (row.quantity, row.value, row.method) == ("call_accepted", 0.0, peer)
    assert (
        "on the cpu compare with transformers-eager" in row.config["error"] and row.config["compile"] is True
    )


def test_a_peer_that_breaks_is_a_row_and_the_next_one_runs(monkeypatch):
    def breaks(model, group):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(peers, "tinygemm_model", breaks)
    found = peers.decode_peers(TINY, "cpu", "smoke", peers=[peers.TINYGEMM, peers.EAGER])
    assert found[0].config["error"] == "RuntimeError: no kernel image" and found[0].config["bits"] == 4
    assert [r.method for r in found[1:]] == [peers.EAGER] * 15


def test_a_contender_is_closed_whether_it_ran_or_not():
    closed, recorder = [], Recorder("cpu", "smoke")

    def contender(generate):
        loaded = models.load(TINY, "cpu", "fp32")
        return peers.Contender("p", loaded, {"dtype": "fp32"}, lambda n: generate, lambda: closed.append(1))

    def fails(prompt, count):
        raise torch.OutOfMemoryError("out of memory")

    fine = Generation([1] * 5, 0.1, [0.1] * 4)
    peers._measure(recorder, "p", {}, lambda: contender(fails), None)
    peers._measure(recorder, "p", {}, lambda: contender(lambda prompt, count: fine), None)
    assert closed == [1, 1]
    rows = recorder.close()
    assert rows[0].config["error"] == "OutOfMemoryError: out of memory"
    assert rows[1].quantity == "decode_speed" and rows[1].value == pytest.approx(10.0)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="peer 'gpt' is unknown; it is one of transformers-eager"):
        peers.decode_peers(TINY, "cpu", "smoke", peers=["gpt"])
    with pytest.raises(models.ModelError, match="no model shape 'none'"):
        peers.decode_peers("random:none", "cpu", "smoke", peers=[peers.EAGER])


# Taking turns


def test_turns_give_every_contender_a_sample_a_round():
    found = interleaved.decode_interleaved(TINY, "smoke", new_tokens=5, rounds=3, dtypes=("fp32", "bf16"))
    speeds = [r for r in found if r.quantity == "decode_speed"]
    assert [(r.method, r.config["dtype"], r.n) for r in speeds] == [
        ("codebook", "bf16", 3),
        (peers.EAGER, "fp32", 3),
        (peers.EAGER, "bf16", 3),
    ]
    assert len({r.config["run"] for r in found}) == 1 and {r.config["new_tokens"] for r in found} == {5}
    ratios = {r.config["baseline"]: r for r in found if r.quantity == "speedup"}
    assert list(ratios) == [f"transformers-eager {name}" for name in ("fp32", "bf16", "best dtype")]
    for record, baseline in zip(ratios.values(), speeds[1:], strict=False):
        expected = [a / b for a, b in zip(speeds[0].samples, baseline.samples, strict=True)]
        assert record.samples == pytest.approx(expected)
    best = max(speeds[1:], key=lambda r: r.value)
    assert ratios["transformers-eager best dtype"].config["baseline_dtype"] == best.config["dtype"]
    assert speeds[0].kernel_sha256 and not speeds[1].kernel_sha256


def test_turns_with_codes_in_the_head():
    found = interleaved.decode_interleaved(
        TINY, "smoke", new_tokens=4, rounds=1, dtypes=("fp32",), lm_head=True
    )
    dense_head = interleaved._codebook(TINY, 4)
    dense_head.start(16)  # arranges the codes, which pads them to whole blocks
    assert found[0].config["lm_head"] == "codebook"
    assert found[0].config["bytes"] < dense_head.token_bytes(found[0].config["context"])


def test_turns_alternate(monkeypatch):
    order = []

    class Run:
        def __init__(self, name):
            self.name = name

        def once(self):
            order.append(self.name)
            return Generation([0, 0], 1.0, [1.0 / len(order)])

    speeds = interleaved._take_turns([Run("a"), Run("b")], 2)
    assert order == ["a", "b"] * 3 and speeds == [[3.0, 5.0], [4.0, 6.0]]


def test_turns_refuse_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(interleaved.timing, "free_bytes", lambda device: 3e9)
    with pytest.raises(MemoryError, match="takes .* GB together, and 3.0 GB are free"):
        interleaved.decode_interleaved("random:llama-0.9b", "smoke")
    with pytest.raises(ValueError, match="asked for int8"):
        interleaved.decode_interleaved(TINY, "smoke", dtypes=("int8",))
    with pytest.raises(ValueError, match="0 rounds"):
        interleaved.decode_interleaved(TINY, "smoke", rounds=0)


# torchao, faked


@pytest.fixture
def torchao(monkeypatch):
    """A package of that name which notes what it is asked for."""
    asked = []
    for name in ("torchao", "torchao.quantization", "torchao.sparsity"):
        module = ModuleType(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torchao_models, "version", lambda: "0.0")

    def give(name, **contents):
        for key, value in contents.items():
            monkeypatch.setattr(sys.modules[name], key, value, raising=False)

    def noting(label):
        return lambda *args, **options: (label, args, options)

    give(
        "torchao.quantization",
        quantize_=lambda model, config: asked.append(config),
        Int8WeightOnlyConfig=noting("int8wo"),
        Int8DynamicActivationInt8WeightConfig=noting("int8dq"),
        Int4WeightOnlyConfig=noting("int4"),
    )
    return asked, give, noting


def test_ways_ask_for_what_they_say(torchao):
    asked, give, noting = torchao
    model = tiny()
    for method in ("torchao-int8wo", "torchao-int8dq", "torchao-int4wo-64"):
        torchao_models.quantize(method, model, None)
    layout = {"group_size": 64, "int4_packing_format": "tile_packed_to_4d"}
    assert asked == [("int8wo", (), {}), ("int8dq", (), {}), ("int4", (), layout)]
    give("torchao.quantization", Int4WeightOnlyConfig=lambda group_size: ("old", group_size))
    give("torchao.quantization", fpx_weight_only=noting("fp6"))
    torchao_models.quantize("torchao-int4wo-64", model, None)
    torchao_models.quantize("torchao-fp6", model, None)
    assert asked[3:] == [("old", 64), ("fp6", (3, 2), {})]


@pytest.mark.parametrize("method", ["torchao-fp6", "torchao-autoquant", "torchao-sparse-24"])
def test_a_way_that_a_release_dropped_is_one_sentence(torchao, method):
    with pytest.raises(NotPossible, match=r"^torchao 0\.0 has no .*\(looked for torchao"):
        torchao_models.quantize(method, tiny(), None)


def test_autoquant_sees_a_token_before_it_chooses(torchao):
    _, give, _ = torchao
    steps = []

    class Chosen:
        def finalize_autoquant(self):
            steps.append("finalize")

    give("torchao", autoquant=lambda model, manual: steps.append(manual) or Chosen())
    torchao_models.quantize("torchao-autoquant", tiny(), lambda: steps.append("token"))
    assert steps == [True, "token", "finalize"]


def test_sparse_weights_are_the_larger_two_of_four_and_the_head_stays(torchao):
    _, give, _ = torchao
    taken = {}

    def sparsify_(model, config, filter_fn):
        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        taken.update({name: layer.weight.clone() for name, layer in layers if filter_fn(layer, name)})

    give("torchao.sparsity", semi_sparse_weight=lambda: "2:4", sparsify_=sparsify_)
    model = tiny()
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    torchao_models.quantize("torchao-sparse-24", model, None)
    assert len(taken) == 14 and "lm_head" not in taken
    fours = taken["model.layers.0.mlp.up_proj"].unflatten(1, (-1, 4))
    assert int((fours != 0).sum(-1).max()) == 2
    dropped = before.unflatten(1, (-1, 4)).where(fours == 0, 0).abs().amax(-1)
    kept = fours.abs().where(fours != 0, torch.inf).amin(-1)
    assert bool((dropped <= kept).all())


def test_no_torchao_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torchao_models, "version", lambda: "")
    monkeypatch.setattr(peers, "_require_cuda", lambda method, device: None)
    (row,) = peers.decode_peers(TINY, "cpu", "smoke", peers=["torchao-int8wo"])
    assert row.config["error"] == "torchao is not installed (pip install -e '.[peers]')."


# --- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("group", tinygemm.GROUPS)
@pytest.mark.parametrize("shape", [(128, 16), (1024, 24), (2816, 4096), (4096, 1032)])
def test_gpu_a_layer_reads_back_as_its_formula_and_multiplies_by_it(group, shape):
    dense = linear(*shape, dtype=torch.bfloat16, device="cuda", bias=True)
    layer = TinyGemmLinear.from_linear(dense, group)
    codes, scales = tinygemm.quantize_groups(dense.weight, group, torch.bfloat16)
    scale, zero = scales.double().unbind(-1)
    exact = (codes.double() - 8).unflatten(1, (-1, group)) * scale.T[..., None] + zero.T[..., None]
    weight = layer.dequantize(torch.float64)
    assert (weight - exact.flatten(1)).norm() / exact.norm() < 4e-3  # the kernel's weights are bf16
    for rows in (1, 7, 40):
        x = torch.randn(rows, shape[0], device="cuda", dtype=torch.bfloat16)
        y = x.double() @ weight.T + dense.bias.double()
        assert (layer(x).double() - y).norm() / y.norm() < 6e-3


@pytest.mark.gpu
def test_gpu_tinygemm_is_bf16_only():
    with pytest.raises(TinyGemmError, match="multiplies in bfloat16"):
        TinyGemmLinear.from_linear(linear(128, 64, torch.float16, "cuda"))


@pytest.mark.gpu
def test_gpu_stacked_products_equal_single_ones():
    layers = [TinyGemmLinear.from_linear(linear(256, n, torch.bfloat16, "cuda")) for n in (64, 24, 128)]
    x = torch.randn(3, 256, device="cuda", dtype=torch.bfloat16)
    expected = torch.cat([layer(x) for layer in layers], -1)
    product = project(layers, torch.bfloat16)
    assert isinstance(product, TinyGemm)
    torch.testing.assert_close(product(x), expected)
    torch.testing.assert_close(torch.cat([layer(x) for layer in layers], -1), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["naive", "cast_free", "graph"])
def test_gpu_tokens_are_greedy_on_the_dequantized_weights(stage):
    model = tinygemm_model(tiny(torch.bfloat16, "cuda", **WIDE))
    made = Engine(model, stage).generate(PROMPT, 48).tokens
    twin = tinygemm.dense_model(model).float()
    ids = torch.tensor([PROMPT + made], device="cuda")
    with torch.inference_mode():
        logits = twin(ids).logits[0, len(PROMPT) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(made, device="cuda")[:, None])[:, 0]
    behind = (logits.max(-1).values - chosen) / logits.std(-1)
    assert float(behind.max()) < 0.3 and len(set(made)) > 4


@pytest.mark.gpu
def test_gpu_a_compiled_step_speaks_as_the_plain_one():
    plain = TransformersDecoder(tiny(torch.float32, "cuda"), 64).generate(PROMPT, 40).tokens
    decoder = TransformersDecoder(tiny(torch.float32, "cuda"), 64, compiled=True)
    first = decoder.generate(PROMPT, 40).tokens
    decoder.generate([3, 4], 20)
    assert first == plain and decoder.generate(PROMPT, 40).tokens == plain
    decoder.close()


@pytest.mark.gpu
def test_gpu_every_peer_has_its_records_or_its_sentence():
    found = peers.decode_peers(TINY, "cuda", "smoke")
    methods = {r.method for r in found}
    assert methods == set(peers.PEERS)
    for method in (peers.EAGER, peers.COMPILED, peers.TINYGEMM):
        quantities = {r.quantity for r in found if r.method == method}
        errors = [r.config.get("error") for r in found if r.method == method and "error" in r.config]
        assert not errors and {"decode_speed", "decode_memory", "model_memory"} <= quantities, errors
    refused = [r for r in found if r.quantity == "call_accepted"]
    assert all(r.config["error"] for r in refused)
