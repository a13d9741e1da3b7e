"""The fused step: what it refuses and how its steps are queued anywhere; on a GPU its tokens, caches, drafts and samples."""

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch

from trapetum import cuda_token, launch, llama_step, models
from trapetum.cuda_token import scores
from trapetum.decode import TOKENS_A_GRAPH, DecodeError, Engine
from trapetum.decoders import FusedDecoder, queued_ahead
from trapetum.fused_step import PARTS, FusedStep
from trapetum.kv_cache import KINDS
from trapetum.llama_step import LlamaStep, UnsupportedModel
from trapetum.paths import BUILTIN_MODEL
from trapetum.shapes import MODELS, Rope

SHAPE = replace(MODELS["llama-tiny"], name="llama-test", hidden=128, intermediate=320, head_dim=32)
PROMPT = [5, 9, 200, 31, 77, 2, 140]
HALF = (torch.float16, torch.bfloat16)
TOLERANCE = {
    torch.float16: 0.05,
    torch.bfloat16: 0.3,
}  # of a step's rounding, in standard deviations of the logits
gpu = pytest.mark.gpu


def make(dtype=torch.float16, device="cuda", bits=None, seed=0, lm_head=False, **changes):
    """A random model whose logits and norms are spread out, so that a rounding seldom decides and no weight is neutral."""
    model = models.random_model(replace(SHAPE, **changes), device, dtype, seed=seed)
    generator = torch.Generator(device).manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or name.endswith("bias"):
                parameter.mul_(8)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    if bits:
        models.quantize_model(model, bits, method="rtn", lm_head=lm_head, progress=False)
    return model


# --- anywhere: what is refused ---------------------------------------------------------------------------------------


@pytest.fixture
def on_a_card(monkeypatch):
    """Sizes are checked before anything is put on a device, so a capability is all that must be there."""

    def pretend(capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


def fused_step(model, rows=1):
    return FusedStep(LlamaStep(model, 64, cache=False), 64, rows=rows)


@pytest.mark.parametrize(
    ("changes", "rows", "words"),
    [
        (dict(head_dim=16), 1, "head dimensions of 32, 64, 128, not 16"),
        (dict(head_dim=80), 1, "not 80"),
        (dict(heads=8, kv_heads=1), 4, "8 query heads a key head at 4 rows are 32; use at most 2 rows"),
        (dict(hidden=192, heads=24, kv_heads=1), 1, "16 query heads a key head, not 24"),
        (dict(dtype=torch.float32), 1, "float16 or bfloat16, not torch.float32; load the model with dtype='fp16'"),
        (dict(hidden=132), 1, "not 132 and 320; use the stage graph"),
        (dict(intermediate=330), 1, "not 128 and 330; use the stage graph"),
    ],
)  # fmt: skip
def test_what_the_kernels_cannot_do_is_said(changes, rows, words, on_a_card):
    on_a_card()
    dtype = changes.pop("dtype", torch.float16)
    with pytest.raises(UnsupportedModel, match=words):
        fused_step(make(dtype, "cpu", **changes), rows)


@pytest.fixture
def mixed(on_a_card, monkeypatch):
    """Two models that differ in their codes alone, in 16 bits as on a GPU."""
    on_a_card()
    monkeypatch.setattr(llama_step, "activation_dtype", lambda model: torch.float16)
    return make(device="cpu"), make(device="cpu", bits=4)


def test_layers_that_cannot_be_stacked_are_refused(mixed):
    model, coded = mixed
    model.model.layers[0].self_attn.q_proj = coded.model.layers[0].self_attn.q_proj
    with pytest.raises(UnsupportedModel, match="some layers cannot be stacked"):
        fused_step(model)


def test_layers_with_and_without_codes_in_one_mlp_are_refused(mixed):
    model, coded = mixed
    model.model.layers[1].mlp.down_proj = coded.model.layers[1].mlp.down_proj
    with pytest.raises(UnsupportedModel, match="all of gate, up and down or in none"):
        fused_step(model)


def test_another_activation_is_refused(on_a_card):
    on_a_card()
    model = make(device="cpu")
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    with pytest.raises(UnsupportedModel, match=r"silu\(gate\) only"):
        fused_step(model)


def test_bfloat16_needs_its_capability(on_a_card):
    on_a_card((7, 5))
    with pytest.raises(UnsupportedModel, match="bfloat16 needs compute capability 8.0"):
        fused_step(make(torch.bfloat16, "cpu"))


# --- anywhere: how steps are queued ----------------------------------------------------------------------------------


class Device:
    """Makes `accepted` tokens a step, in graphs of `several` steps, and notes what the host asks of it in which order."""

    def __init__(self, several=1, accepted=(1,)):
        self.several, self.accepted, self.steps, self.made, self.log = several, accepted, 0, 1, []

    def queue(self, wanted):
        steps = self.several if wanted >= self.several else 1
        for _ in range(steps):
            self.made += self.accepted[self.steps % len(self.accepted)]
            self.steps += 1
        self.log.append(steps)
        return steps

    def fetch(self):
        return Snapshot(self.made, self.log)


class Snapshot:
    def __init__(self, made, log):
        self.made, self.log = made, log

    def tokens(self):
        self.log.append("wait")
        return list(range(self.made))


@pytest.mark.parametrize("several", [1, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 8, 9, 10, 17, 64])
def test_a_row_takes_one_step_a_token_and_long_graphs_where_they_fit(count, several):
    device = Device(several)
    assert list(queued_ahead(count, device.queue, device.fetch)) == list(range(count))
    queued = [entry for entry in device.log if entry != "wait"]
    long = (count - 1) // several
    assert queued == [several] * long + [1] * (count - 1 - several * long)


@pytest.mark.parametrize("count", [2, 40])
def test_the_next_steps_are_queued_before_the_host_waits(count):
    device = Device(8)
    list(queued_ahead(count, device.queue, device.fetch))
    waits = [place for place, entry in enumerate(device.log) if entry == "wait"]
    assert all(device.log[place - 1] != "wait" for place in waits[:-1])
    assert device.log[0] != "wait" and device.log[-1] == "wait"


@pytest.mark.parametrize("several", [1, 8])
@pytest.mark.parametrize("accepted", [(1, 3, 2), (4,), (1, 1, 1, 8)])
@pytest.mark.parametrize("count", [1, 2, 9, 33, 100])
def test_accepted_drafts_end_a_generation_early_and_no_token_is_lost(count, accepted, several):
    device = Device(several, accepted)
    assert list(queued_ahead(count, device.queue, device.fetch)) == list(range(count))
    slow = Device(several)
    list(queued_ahead(count, slow.queue, slow.fetch))
    needed = next(n for n in range(count) if 1 + sum(accepted[k % len(accepted)] for k in range(n)) >= count)
    assert needed <= device.steps <= min(slow.steps, needed + 2 * several)


def test_nothing_is_queued_for_a_consumer_that_went_away():
    device = Device(8)
    stream = queued_ahead(64, device.queue, device.fetch)
    first = [next(stream) for _ in range(3)]
    steps = device.steps
    stream.close()
    assert first == [0, 1, 2] and device.steps == steps <= 24


# --- on a GPU: tokens ------------------------------------------------------------------------------------------------


def logits_of(model, prompt, tokens):
    """What transformers says after the prompt and after each token but the last: float64 [tokens, vocab]."""
    ids = torch.tensor([prompt + tokens], device=model.device)
    with torch.inference_mode():
        return model(ids).logits[0, len(prompt) - 1 : -1].double()


def leads(twin, prompt, tokens):
    """How far each token stands before the best other one in the twin's logits, in their standard deviations: [tokens]."""
    logits = logits_of(twin, prompt, tokens)
    chosen = torch.tensor(tokens, device=twin.device).unsqueeze(1)
    own = logits.gather(1, chosen)
    others = logits.scatter(1, chosen, -torch.inf).amax(1, keepdim=True)
    return ((own - others)[:, 0] / logits.std(1)).cpu()


def assert_follows(twin, prompt, made, *others, tolerance=TOLERANCE[torch.float16]):
    """`made` is what the float32 twin would choose or a near tie of it; `others` are the same up to the first near tie."""
    lead = leads(twin, prompt, made)
    assert float(lead.min()) > -tolerance, lead.tolist()
    near = (lead < tolerance).nonzero()
    certain = int(near[0]) if len(near) else len(made)
    for other in others:
        assert other[:certain] == made[:certain]
        assert float(leads(twin, prompt, other).min()) > -tolerance


def twin_of(**how):
    return models.dequantize_model(make(**how), torch.float32).float()


def transformers_tokens(model, prompt, count):
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def relative_error(logits, exact):
    return float((logits.double() - exact).norm() / exact.norm())


def assert_every_stage_agrees(count=48, **how):
    """Tokens of three stages and of transformers, and logits no further from exact ones than twice transformers' own."""
    model, tolerance = make(**how), TOLERANCE[how.get("dtype", torch.float16)]
    engines = [Engine(model, stage, max_context=128) for stage in ("fused", "pdl", "graph")]
    fused, pdl, graph = (engine.generate(PROMPT, count).tokens for engine in engines)
    assert pdl == fused and len(set(fused)) > 4  # a model that says one thing would prove nothing
    plain, twin = models.dequantize_model(make(**how)), twin_of(**how)
    reference = transformers_tokens(plain, PROMPT, count)
    assert_follows(twin, PROMPT, fused, graph, reference, tolerance=tolerance)
    exact = logits_of(twin, PROMPT, fused)
    allowed = 2 * relative_error(logits_of(plain, PROMPT, fused), exact)
    assert relative_error(engines[0].forced_logits(PROMPT, fused[:-1]), exact) <= allowed


@gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bits", [None, 8, 4, 3, 2])
def test_tokens_are_those_of_the_graph_and_of_transformers(bits, dtype):
    assert_every_stage_agrees(dtype=dtype, bits=bits)


LLAMA_3 = Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 64)
VARIANTS = {
    "qkv bias": dict(model_type="qwen2", biases=("q_proj", "k_proj", "v_proj"), tied_embeddings=True),
    "biases everywhere": dict(
        biases=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ),
    "tied": dict(tied_embeddings=True),
    "mistral": dict(model_type="mistral", sliding_window=256),
    "llama-3 rope": dict(rope=LLAMA_3),
    "groups of 1": dict(kv_heads=4),
    "groups of 4": dict(kv_heads=1),
    "groups of 7": dict(hidden=224, heads=7, kv_heads=1),
    "groups of 8": dict(heads=8, kv_heads=1),
    "heads of 64": dict(head_dim=64),
    "heads of 128": dict(head_dim=128),
    "large epsilon": dict(norm_eps=0.5),
}


@gpu
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_architecture(variant, bits):
    assert_every_stage_agrees(bits=bits, seed=3, **VARIANTS[variant])


@gpu
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_a_head_of_codes(bits):
    assert_every_stage_agrees(bits=bits, lm_head=True)


@gpu
@pytest.mark.parametrize("stage", ["fused", "pdl"])
@pytest.mark.parametrize("length", [1, 2, 50])
def test_prompts_of_any_length(stage, length):
    prompt = torch.randint(256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    made = Engine(make(bits=4), stage).generate(prompt, 20).tokens
    assert_follows(twin_of(bits=4), prompt, made)


@gpu
@pytest.mark.parametrize("kv", KINDS)
def test_a_long_context(kv):
    model, twin = make(bits=4), twin_of(bits=4)
    prompt = torch.randint(256, (4200,), generator=torch.Generator().manual_seed(1)).tolist()
    engines = {s: Engine(model, s, max_context=8192, kv=kv) for s in ("fused", "pdl")}
    made = {stage: engine.generate(prompt, 24).tokens for stage, engine in engines.items()}
    assert made["fused"] == made["pdl"]
    if kv == "fp16":
        graph = Engine(model, "graph", max_context=8192).generate(prompt, 24).tokens
        assert_follows(twin, prompt, made["pdl"], graph)
        return
    loosely = 0.3 if kv == "int8" else 2.0  # random keys and values are the worst case of a quantized cache
    assert float(leads(twin, prompt, made["pdl"]).min()) > -loosely


# --- on a GPU: the same bits however it is launched ------------------------------------------------------------------


def outcome(model, count=150, prompt=tuple(range(100)), **how):
    """Tokens, every cache tensor, the last logits."""
    decoder = FusedDecoder(model, 512, **how)
    ids = torch.tensor(prompt, device="cuda")
    decoder.prepare(len(ids), count)
    tokens = list(decoder.tokens(ids, count))
    kept = [tensor.clone() for cache in decoder.step.caches for tensor in cache.tensors().values()]
    return tokens, kept, decoder.step.logits.clone(), decoder.steps


def assert_same(one, other):
    assert one[0] == other[0] and one[3] == other[3]
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    assert torch.equal(one[2], other[2])


@gpu
@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("bits", [None, 4])
def test_graphs_pdl_and_several_tokens_a_graph_change_no_bit(bits, kv):
    model = make(bits=bits)
    eager = outcome(model, kv=kv, capture=False)
    assert torch.isfinite(eager[2]).all() and len(eager[0]) == 150 and eager[3] == 149
    for how in (
        dict(),
        dict(several=TOKENS_A_GRAPH),
        dict(pdl=True),
        dict(pdl=True, several=TOKENS_A_GRAPH),
        dict(pdl=True, capture=False),
    ):
        assert_same(outcome(model, kv=kv, **how), eager)


@gpu
@pytest.mark.parametrize("kv", KINDS)
def test_graphs_and_pdl_change_no_bit_of_steps_with_drafts(kv):
    model, how = make(bits=4), dict(kv=kv, rows=4, prompt=[1, 2, 3, 4] * 20)
    eager = outcome(model, capture=False, **how)
    assert_same(outcome(model, **how), eager)
    assert_same(outcome(model, pdl=True, **how), eager)
    assert outcome(model, pdl=True, several=TOKENS_A_GRAPH, **how)[0] == eager[0]


@gpu
def test_the_same_twice():
    model = make(bits=4)
    first = outcome(model, pdl=True, several=TOKENS_A_GRAPH)
    for _ in range(5):
        assert_same(outcome(model, pdl=True, several=TOKENS_A_GRAPH), first)


# --- on a GPU: drafts ------------------------------------------------------------------------------------------------


def spoil_drafts(monkeypatch):
    """Let every draft be a token that greedy decoding seldom makes, so that next to none is accepted."""
    next_token = cuda_token.next_token

    def spoiled(logits, state, embedding, x, pdl=False):
        next_token(logits, state, embedding, x, pdl)
        worst = logits[:1].argmin(-1)
        state.tokens[1:] = worst
        x[1:] = embedding[worst]

    monkeypatch.setattr(cuda_token, "next_token", spoiled)


@gpu
@pytest.mark.parametrize("bits", [None, 4])
def test_drafts_do_not_change_the_tokens(bits, monkeypatch):
    model, twin, prompt = make(bits=bits), twin_of(bits=bits), [1, 2, 3, 4] * 10
    drafted = outcome(model, rows=4, prompt=prompt)
    alone = outcome(model, rows=1, prompt=prompt)
    spoil_drafts(monkeypatch)
    spoiled = outcome(model, rows=4, prompt=prompt, capture=False)
    assert_follows(twin, prompt, drafted[0], spoiled[0], alone[0])
    assert spoiled[3] >= 145 and alone[3] == 149 >= drafted[3]


@gpu
@pytest.mark.skipif(not (BUILTIN_MODEL / "config.json").is_file(), reason="the built-in model is not there")
@pytest.mark.parametrize("stage", ["fused", "pdl"])
def test_a_text_that_repeats_itself_makes_several_tokens_a_step(stage):
    loaded = models.load("builtin", "cuda", "fp16")
    prompt = loaded.tokenizer("def area(width, height):\n    return width * height\n\n" * 6).input_ids
    engine = Engine(loaded, stage, rows=4)
    tokens = engine.generate(prompt, 96).tokens
    assert 95 / engine.steps > 1.5
    assert_follows(loaded.model.float(), prompt, tokens)


@gpu
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("stage", ["fused", "pdl"])
def test_the_end_of_the_context(stage, rows):
    model, twin = make(bits=4), twin_of(bits=4)
    engine = Engine(model, stage, max_context=64, rows=rows)
    whole = Engine(model, stage, max_context=256, rows=rows).generate(PROMPT, 57).tokens
    assert_follows(twin, PROMPT, engine.generate(PROMPT, 57).tokens, whole)
    with pytest.raises(DecodeError, match="context of 65, and the engine has 64"):
        engine.generate(PROMPT, 58)
    assert len(engine.step_times(64 - 8, 8)) == 8
    with pytest.raises(DecodeError, match="context of 65"):
        engine.step_times(64 - 8, 9)


# --- on a GPU: what is kept in 8 and 4 bits --------------------------------------------------------------------------


@gpu
@pytest.mark.skipif(not (BUILTIN_MODEL / "config.json").is_file(), reason="the built-in model is not there")
@pytest.mark.parametrize(("kv", "share"), [("int8", 0.98), ("int4", 0.95)])
def test_a_quantized_cache_seldom_changes_the_best_token(kv, share):
    from trapetum.bench.generating import text_tokens

    loaded = models.load("builtin", "cuda", "fp16")
    ids = text_tokens(loaded, 8000)[:400]
    plain, coded = (
        Engine(loaded, "pdl", 512, kind).forced_logits(ids[:64], ids[64:]) for kind in ("fp16", kv)
    )
    assert torch.isfinite(coded).all()
    assert (plain.argmax(-1) == coded.argmax(-1)).float().mean() >= share
    assert not torch.equal(plain, coded)


@gpu
@pytest.mark.parametrize("kv", KINDS)
def test_forced_logits_are_those_of_a_full_forward_pass(kv):
    model, twin = make(bits=4), twin_of(bits=4)
    ids = torch.randint(256, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.inference_mode():
        whole = twin(torch.tensor([ids], device="cuda")).logits[0, 19:].float()
    for rows in (1, 3):
        engine = Engine(model, "fused", 64, kv, rows)
        made = engine.forced_logits(ids[:20], ids[20:]).float()
        assert (made - whole).norm() / whole.norm() < 0.02


# --- on a GPU: samples -----------------------------------------------------------------------------------------------


@gpu
def test_samples_depend_on_the_seed_alone():
    engine = Engine(make(bits=4), "pdl", max_context=256)
    greedy = engine.generate(PROMPT, 60).tokens
    first = engine.generate(PROMPT, 60, temperature=1.0, seed=1).tokens
    assert engine.generate(PROMPT, 60, temperature=1.0, seed=1).tokens == first
    assert engine.generate(PROMPT, 60, temperature=1.0, seed=2).tokens != first != greedy
    assert engine.generate(PROMPT, 60, temperature=0.0, seed=1).tokens == greedy
    assert (
        Engine(make(bits=4), "fused", max_context=256).generate(PROMPT, 60, temperature=1.0, seed=1).tokens
        == first
    )


@gpu
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_frequencies_are_those_of_softmax(temperature):
    """With all before it left out, the step draws from logits that stay as they are."""
    draws, seed = 3000, 7
    engine = Engine(make(vocab=16), "pdl", max_context=draws + 64)
    row = torch.linspace(-2, 2, 16).half()
    with engine.without("linears", "attention", "norms"):
        engine.step.logits.copy_(row.cuda())
        tokens = engine.generate([1, 2, 3], draws + 1, temperature=temperature, seed=seed).tokens[1:]
    same = [t == int(scores(row, 3 + i, temperature, seed).argmax()) for i, t in enumerate(tokens)]
    assert np.mean(same) > 0.995
    wanted = draws * torch.softmax(row.double() / temperature, 0).numpy()
    assert (
        float(((np.bincount(tokens, minlength=16) - wanted) ** 2 / wanted).sum()) < 37.7
    )  # 15 degrees: 1 in 1000


# --- on a GPU: the engine --------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("stage", ["fused", "pdl"])
@pytest.mark.parametrize("bits", [None, 4])
def test_without_parts_and_back(stage, bits):
    engine = Engine(make(bits=bits), stage, max_context=256)
    before, all_launches = engine.generate(PROMPT, 20).tokens, 5 * SHAPE.layers + 2
    taken = {"linears": 4 * SHAPE.layers + 1, "attention": SHAPE.layers, "norms": 0, "sampling": 1}
    for parts in [(), *((part,) for part in PARTS), PARTS[:2], PARTS[:3], PARTS]:
        with engine.without(*parts):
            with launch.recorded(dry=True) as launches:
                engine.step.advance()
            assert len(launches) == engine.step.launches == all_launches - sum(taken[part] for part in parts)
            assert all(t > 0 for t in engine.step_times(100, 20))
            if "sampling" in parts:
                with pytest.raises(DecodeError, match="no token is ever chosen"):
                    engine.generate(PROMPT, 4)
            else:
                assert len(engine.generate(PROMPT, 9).tokens) == 9
    assert engine.generate(PROMPT, 20).tokens == before
    with pytest.raises(DecodeError, match="cannot leave out 'casts'"), engine.without("casts"):
        pass


@gpu
def test_without_norms_the_numbers_change():
    engine = Engine(make(bits=4), "fused", max_context=64)
    whole = engine.forced_logits(PROMPT, [1, 2, 3])
    with engine.without("norms"):
        assert not torch.equal(engine.forced_logits(PROMPT, [1, 2, 3])[1:], whole[1:])
    assert torch.equal(engine.forced_logits(PROMPT, [1, 2, 3]), whole)


@gpu
@pytest.mark.parametrize("kv", KINDS)
def test_steps_are_timed_at_any_length_and_hold_no_more_memory(kv):
    engine = Engine(make(bits=4), "pdl", max_context=4096, kv=kv)
    engine.step_times(0, 20), engine.generate(PROMPT, 20)
    held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for length in (0, 1, 100, 2000, 4096 - 40):
        times = engine.step_times(length, 40)
        assert len(times) == 40 and all(1e-6 < t < 0.1 for t in times)
        engine.generate(PROMPT, 30)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == held


@gpu
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("stage", ["fused", "pdl"])
def test_streams_stop_tokens_and_generations_that_nobody_finished(stage, rows):
    engine, seen = Engine(make(bits=4), stage, rows=rows), []
    made = engine.generate(PROMPT, 61, on_token=seen.append)
    whole = made.tokens
    assert seen == whole and len(made.token_s) == 60 and made.ttft_s > 0 and all(t > 0 for t in made.token_s)
    for place in (0, 1, 4, 9, 60):  # the first, within a graph, behind one, the last
        cut = engine.generate(PROMPT, 61, eos=[whole[place], 999]).tokens
        assert cut == whole[: whole.index(whole[place]) + 1]

    class Enough(Exception):
        pass

    def stop(token):
        if len(seen) > 64:
            raise Enough
        seen.append(token)

    with pytest.raises(Enough):
        engine.generate(PROMPT[::-1], 61, on_token=stop)
    assert engine.generate(PROMPT, 61).tokens == whole
    assert engine.generate(PROMPT, 1).tokens == whole[:1]


@gpu
def test_a_model_that_the_kernels_cannot_do_is_refused():
    for how, words in (
        (dict(head_dim=16), "not 16"),
        (dict(bits=4, intermediate=336), "no multiples of 32"),
        (dict(dtype=torch.float32), "torch.float32"),
        (dict(dtype=torch.float32, bits=4), "torch.float32"),
    ):
        with pytest.raises(UnsupportedModel, match=words):
            Engine(make(**how), "fused")
    with pytest.raises(UnsupportedModel, match="at most 2 rows"):
        Engine(make(heads=8, kv_heads=1), "pdl", rows=3)


def held_bytes():
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@gpu
@pytest.mark.parametrize("stage", ["fused", "pdl", "graph"])
def test_a_context_that_no_card_holds(stage):
    model = make(bits=4)
    model.config.max_position_embeddings = 10**12
    tokens = Engine(model, stage, max_context=64).generate(PROMPT, 8).tokens  # stacks the weights, compiles
    held = held_bytes()
    with pytest.raises(DecodeError, match=r"needs about \d+\.\d\d GB beside the weights") as refused:
        Engine(model, stage, max_context=10**12)
    assert held_bytes() == held
    sentence = str(refused.value)
    assert (
        " GB are free on cuda" in sentence and "shorter max_context" in sentence and "fewer bits" in sentence
    )
    assert ("kv='int8' or 'int4'" in sentence) == (stage != "graph")
    assert Engine(model, stage, max_context=64).generate(PROMPT, 8).tokens == tokens


@gpu
@pytest.mark.parametrize("kv", KINDS)
def test_a_cache_that_fits_in_part_leaves_nothing_behind(kv):
    model = make(bits=4, layers=24)
    model.config.max_position_embeddings = 2**20
    Engine(model, "fused", max_context=64, kv=kv)
    held = held_bytes()
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + (1200 << 20)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(DecodeError, match=f"context of {2**20} .* for the {kv} cache"):
            Engine(model, "fused", max_context=2**20, kv=kv)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert held_bytes() == held


@gpu
def test_a_capture_without_memory_is_said_and_can_be_tried_again(monkeypatch):
    engine = Engine(make(bits=4), "pdl", max_context=64)

    def capture(decoder, steps):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patched:
        patched.setattr(FusedDecoder, "_captured", capture)
        with pytest.raises(DecodeError, match="context of 64 at the stage 'pdl' needs about"):
            engine.generate(PROMPT, 8)
    assert len(engine.generate(PROMPT, 8).tokens) == 8
