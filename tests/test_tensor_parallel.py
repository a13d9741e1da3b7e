"""A model split over processes makes the tokens of the whole one: two of them on a CPU with gloo, NCCL on GPUs."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from trapetum import models, records, shapes
from trapetum import tensor_parallel as tp
from trapetum.bench import two_cards
from trapetum.decode import DecodeError, Engine
from trapetum.memory import memory_estimate
from trapetum.tensor_parallel import Cards, SplitEngine, SplitError

gpu = pytest.mark.gpu
TINY = shapes.model("llama-tiny")
SHAPES = {
    "llama, 4 heads on 2 key heads": TINY,
    "qwen2, biases, tied head": replace(
        TINY,
        name="qwen2-tiny",
        model_type="qwen2",
        biases=("q_proj", "k_proj", "v_proj"),
        tied_embeddings=True,
    ),
}
PROMPTS = ([7], [1, 200, 3, 4, 5])
NEW, SEED = 12, 3


# --- without processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("model.layers.0.self_attn.q_proj.weight", 0),
        ("model.layers.0.self_attn.k_proj.bias", 0),
        ("model.layers.0.mlp.up_proj.weight", 0),
        ("lm_head.weight", 0),
        ("model.layers.0.self_attn.o_proj.weight", 1),
        ("model.layers.0.mlp.down_proj.weight", 1),
    ],
)
def test_the_parts_make_the_whole(name, dim):
    whole = torch.randn(12) if name.endswith("bias") else torch.randn(12, 8)
    parts = [tp.share_of(name, whole, rank, 4) for rank in range(4)]
    assert torch.equal(torch.cat(parts, dim), whole)
    assert all(part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes for part in parts)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_what_is_not_split_is_whole_on_every_card(name):
    whole = torch.randn(12, 8)
    assert tp.share_of(name, whole, 1, 4) is whole


def test_a_shape_that_does_not_divide_is_refused_by_name():
    with pytest.raises(SplitError, match=r"over 4 cards.*key heads \(2\); choose another"):
        tp.require_divisible(TINY, 4)
    with pytest.raises(SplitError, match=r"heads \(4\) and key heads \(2\) and intermediate size \(160\)"):
        tp.require_divisible(TINY, 3)
    biased = replace(TINY, biases=("q_proj", "k_proj", "v_proj", "o_proj"))
    with pytest.raises(SplitError, match="biases on o_proj"):
        tp.require_divisible(biased, 2)
    tp.require_divisible(shapes.model("llama-2-70b"), 8)


def test_only_random_weights_are_split():
    with pytest.raises(SplitError, match="'builtin' is none; choose one of random:SHAPE"):
        tp.load_split("builtin", Cards(0, 2, "cpu"))


def test_a_70b_fits_two_cards_of_80_gb_and_not_one():
    shape = shapes.model("llama-2-70b")
    card = tp.card_estimate(shape, 1024, 2, prompt=6)
    assert sum(memory_estimate(shape, None, 1024).values()) > 80 * 2**30 > 1.1 * sum(card.values())
    assert card["embedding"] == 2 * shape.embedding_weights
    assert 2 * card["weights"] >= 2 * shape.linear_weights


class _Two:
    """Two cards in one process: what the other one sent is known."""

    size = 2

    def __init__(self, rank, others):
        self.rank, self._others = rank, others

    def gather(self, pair):
        return torch.stack([pair, self._others] if self.rank == 0 else [self._others, pair])


@pytest.mark.parametrize(("values", "best"), [([1, 5, 2, 4], 1), ([1, 2, 2, 9], 3), ([0, 7, 7, 1], 1)])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_largest_logit_of_all_cards_wins_and_of_equal_ones_the_first(values, best, rank):
    halves = torch.tensor([values], dtype=torch.float16).chunk(2, 1)
    place = int(halves[1 - rank].argmax()) + 2 * (1 - rank)
    other = torch.tensor([[float(halves[1 - rank].max())], [float(place)]], dtype=torch.float64)
    token = tp.SplitLogits(halves[rank], _Two(rank, other)).argmax(-1)
    assert token.tolist() == [best] and token.dtype == torch.long


# --- processes -----------------------------------------------------------------------------------------------------


def whole_tokens(shape, prompt):
    """Greedy tokens of transformers on the whole model."""
    model, ids = models.random_model(shape, "cpu", torch.float32, seed=SEED), list(prompt)
    with torch.inference_mode():
        for _ in range(NEW):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def _process(rank, folder):
    """What each of two processes does; the results go to files."""
    torch.set_num_threads(1)
    with tp.joined(rank, 2, "cpu", f"file://{folder}/meet") as cards:
        made = {}
        for name, shape in SHAPES.items():
            model = tp.split_random(shape, cards, torch.float32, SEED)
            engine = SplitEngine(model, cards, 64)
            made[name] = [engine.generate(prompt, NEW).tokens for prompt in PROMPTS]
            with torch.inference_mode():
                logits = engine._decoder.llama.prefill_rows(torch.tensor(PROMPTS[1])).mine
            made[f"{name}, logits"] = logits.clone()
            made[f"{name}, bytes"] = sum(p.nbytes for p in model.parameters())
        made["agree"] = [cards.all_say(True), cards.all_say(rank == 0), cards.largest(float(rank))]
        try:
            tp._require_same(torch.full((64, 2), float(rank)), cards)
        except SplitError as error:
            made["different"] = str(error)
        torch.save(made, f"{folder}/made-{rank}")
        rows = two_cards.measure(cards, "random:llama-tiny", 6, "smoke")
        rows += two_cards.measure(cards, "builtin", 6, "smoke")
        records.append(f"{folder}/made-{rank}.jsonl", rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    torch.multiprocessing.spawn(_process, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("name", SHAPES)
def test_two_processes_make_the_tokens_of_the_whole_model(folder, name):
    made = [torch.load(folder / f"made-{rank}") for rank in range(2)]
    assert made[0][name] == made[1][name] == [whole_tokens(SHAPES[name], prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("name", SHAPES)
def test_each_process_has_the_logits_of_its_half_of_the_vocabulary(folder, name):
    """Tokens alone would not do: a tied head on random weights repeats its input."""
    made = [torch.load(folder / f"made-{rank}")[f"{name}, logits"] for rank in range(2)]
    model = models.random_model(SHAPES[name], "cpu", torch.float32, seed=SEED)
    with torch.inference_mode():
        whole = model(torch.tensor([PROMPTS[1]])).logits[0, -1:]
    torch.testing.assert_close(torch.cat(made, 1), whole, rtol=1e-4, atol=1e-6)


def test_a_part_that_does_not_fit_is_a_sentence(monkeypatch):
    monkeypatch.setattr(two_cards.timing, "free_bytes", lambda device: 60e9)
    assert two_cards._problem(Cards(0, 4, "cuda:0"), "random:llama-2-70b", 1024) == ""
    why = two_cards._problem(Cards(0, 2, "cuda:0"), "random:llama-2-70b", 1024)
    assert why.startswith("random:llama-2-70b in 16 bits takes 69.") and "on each of 2 cards" in why
    assert "60.0 GB are free" in why


def test_each_process_holds_half_of_what_is_split(folder):
    name = next(iter(SHAPES))
    made = torch.load(folder / "made-0")[f"{name}, bytes"]
    whole = 4 * (TINY.embedding_weights + TINY.norm_weights)
    assert made == whole + 2 * (TINY.linear_weights + TINY.lm_head_weights)


def test_the_processes_agree(folder):
    for rank in range(2):
        made = torch.load(folder / f"made-{rank}")
        assert made["agree"] == [True, False, 1.0]
        assert "cards of one model" in made["different"]


def test_the_first_process_makes_the_records(folder):
    made = records.load(folder / "made-0.jsonl")
    assert made.problems == [] and not (folder / "made-1.jsonl").exists()
    by_quantity = {row.quantity: row for row in made.records}
    assert set(by_quantity) == {"decode_speed", "time_to_first_token", "decode_memory", "call_accepted"}
    speed = by_quantity["decode_speed"]
    assert speed.config["world_size"] == 2 and speed.config["linears"] == "dense"
    assert (speed.method, speed.config["stage"], speed.config["new_tokens"]) == ("fp32", "lean", 6)
    half = 2 * (TINY.linear_weights + TINY.lm_head_weights) + 4 * TINY.norm_weights
    assert speed.config["bytes"] == half + TINY.kv_bytes(7, 4) // 2
    refused = by_quantity["call_accepted"]
    assert refused.value == 0 and "only random weights can be split" in refused.config["error"]


# --- one process ---------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path):
    return partial(tp.joined, 0, 1, init_method=f"file://{tmp_path}/meet")


def test_one_process_is_the_plain_engine(alone):
    whole = Engine(models.random_model(TINY, "cpu", torch.float32, seed=SEED), "lean", 64)
    with alone("cpu") as cards:
        engine = SplitEngine(tp.split_random(TINY, cards, torch.float32, SEED), cards, 64)
        for prompt in PROMPTS:
            assert engine.generate(prompt, NEW).tokens == whole.generate(prompt, NEW).tokens
        with pytest.raises(DecodeError, match="need a context of 69"):
            engine.generate(PROMPTS[1], 64)
        with pytest.raises(DecodeError, match="cannot leave out"), engine.without("linears"):
            pass
    assert not torch.distributed.is_initialized()


def test_the_command_starts_processes_and_saves(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(
        torch.multiprocessing, "spawn", lambda work, args, nprocs: [work(n, *args) for n in range(nprocs)]
    )
    options = ["--model", "random:llama-tiny", "--new-tokens", "5", "--profile", "smoke", "--cards", "1"]
    two_cards.main([*options, "--device", "cpu", "--save", str(tmp_path / "made.jsonl")])
    saved = records.load(tmp_path / "made.jsonl").records
    assert [row.quantity for row in saved] == ["decode_speed", "time_to_first_token", "decode_memory"]
    assert saved[0].config["world_size"] == 1 and saved[0].config["new_tokens"] == 5
    assert "decode_speed: " in capsys.readouterr().out


def test_under_torchrun_the_process_takes_part(monkeypatch, capsys):
    free = torch.distributed.TCPStore("127.0.0.1", 0, 1, True)  # finds a free port
    port, free = free.port, None
    place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    two_cards.main(
        ["--model", "random:llama-tiny", "--new-tokens", "5", "--profile", "smoke", "--device", "cpu"]
    )
    assert "decode_memory: " in capsys.readouterr().out


# --- GPUs ----------------------------------------------------------------------------------------------------------


@gpu
def test_one_card_is_the_plain_engine_in_a_graph_with_nccl(alone):
    shape = shapes.model("builtin")
    model = models.random_model(shape, "cuda", torch.float16, seed=SEED)
    whole = Engine(model, "graph", 300)
    with alone("cuda") as cards:
        engine = SplitEngine(tp.split_random(shape, cards, torch.float16, SEED), cards, 300)
        for prompt in PROMPTS:
            assert engine.generate(prompt, 200).tokens == whole.generate(prompt, 200).tokens
        assert engine.why_eager == "" and engine._decoder._graphs
    assert not engine._decoder._graphs  # a group that a graph still holds would not end
    assert not torch.distributed.is_initialized()


@gpu
def test_what_cannot_be_captured_runs_eagerly_and_says_so(alone, monkeypatch):
    shape = shapes.model("builtin")
    with alone("cuda") as cards:
        engine = SplitEngine(tp.split_random(shape, cards, torch.float16, SEED), cards, 64)
        expected = engine.generate(PROMPTS[1], NEW).tokens
        other = SplitEngine(tp.split_random(shape, cards, torch.float16, SEED), cards, 64)

        def refuse(bucket):
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(other._decoder, "_captured", refuse)
        assert other.generate(PROMPTS[1], NEW).tokens == expected
        assert "not permitted" in other.why_eager and "runs eagerly" in other.why_eager


@gpu
def test_records_of_one_card(alone):
    with alone("cuda") as cards:
        rows = two_cards.measure(cards, "random:llama-0.9b", 70, "smoke")
    by_quantity = {row.quantity: row for row in rows}
    assert by_quantity["decode_speed"].config["stage"] == "graph"
    memory = by_quantity["decode_memory"]
    assert 0.9 < memory.value / memory.config["estimate_gb"] < 1.5
    assert not by_quantity["decode_speed"].suspect


@gpu
def test_fewer_cards_than_asked_for_are_a_record():
    (row,) = two_cards.two_cards("random:llama-tiny", 4, "smoke", torch.cuda.device_count() + 1, "cuda")
    assert row.quantity == "call_accepted" and "cards were asked for" in row.config["error"]


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_cards_decode_and_are_recorded():
    rows = two_cards.two_cards("random:llama-0.9b", 70, "smoke", 2, "cuda")
    by_quantity = {row.quantity: row for row in rows}
    assert by_quantity["decode_speed"].config["world_size"] == 2
    assert by_quantity["decode_speed"].config["stage"] == "graph", by_quantity["decode_speed"].config
    assert "window_speed" in by_quantity
