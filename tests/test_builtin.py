"""The training run: tokenizer, sampling, schedule, what it keeps and what it writes."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trapetum import builtin, pretraining, records, training_text
from trapetum import trained as trained_model
from trapetum.pretraining import Recipe, Sampler, Schedule, rows_by_kind
from trapetum.shapes import MODELS

WORDS = "Return a list of the names in the current scope, or raise ValueError if there is none.\n" * 40
SHORT = Recipe(steps=40, batch=4, context=64, learning_rate=5e-3)


@pytest.fixture(scope="module")
def tokenizer():
    return training_text.make_tokenizer([WORDS], 300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "new"
    return out, builtin.train(out, SHORT, builtin.TINY, "cpu", limit=40_000, progress=False)


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_tokenizer_returns_any_text_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_sizes_and_markers(tokenizer):
    assert len(tokenizer) <= 300 and tokenizer.eos_token_id == 0
    stream = training_text.encode(tokenizer, ["Return", "a"])
    assert stream.dtype == torch.int32 and stream[-1] == 0 and (stream == 0).sum() == 2
    assert len(training_text.encode(tokenizer, [])) == 0


def test_parts_do_not_share_lines():
    parts = training_text.prepare_texts(limit=3_000_000)
    lines = {
        name: {k for kind in texts.values() for t in kind for k in t.split("\n") if len(k.split()) > 12}
        for name, texts in parts.items()
    }
    assert all(lines.values())
    assert not lines["train"] & (lines["validation"] | lines["heldout"])


def test_rows_fill_the_batch_by_tokens_and_weight():
    tokens = {"topics": 100, "docstrings": 650, "sources": 2500, "tests": 5600}
    mix = {"topics": 3.0, "docstrings": 2.0, "sources": 1.0, "tests": 0.5}
    assert rows_by_kind(mix, tokens, 69) == {"topics": 3, "docstrings": 13, "sources": 25, "tests": 28}
    assert rows_by_kind(mix, {"docstrings": 50, "sources": 100}, 7) == {"docstrings": 4, "sources": 3}
    assert all(sum(rows_by_kind(mix, tokens, n).values()) == n for n in range(1, 40))


def test_dropout_acts_in_training_only_and_goes_away(tokenizer):
    model = builtin.make_model(replace(builtin.TINY, vocab=300), 32)
    ids = torch.arange(32)[None]

    def outputs():
        with torch.no_grad():
            return model(input_ids=ids).logits

    plain = outputs()
    with pretraining.dropout(model, 0.5):
        model.eval()
        assert torch.equal(outputs(), plain)
        model.train()
        assert not torch.equal(outputs(), outputs())
    assert torch.equal(outputs(), plain)


def test_sampler_draws_consecutive_tokens_everywhere():
    sampler = Sampler({"a": torch.arange(20, dtype=torch.int32), "short": torch.arange(3)}, 8, seed=0)
    inputs, targets = sampler.draw({"a": 1.0}, 400)
    assert inputs.shape == targets.shape == (400, 8)
    assert torch.equal(targets, inputs + 1)
    assert set(inputs[:, 0].tolist()) == set(range(12))


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="64 tokens"):
        Sampler({"a": torch.arange(60)}, 64, seed=0)


def test_schedule_holds_then_falls_to_zero():
    recipe = Recipe(steps=1000, learning_rate=1.0)
    schedule, rates = Schedule(recipe), []
    for step in range(1000):
        assert not schedule.done(step)
        schedule.tick(step, step / 1000)
        rates.append(schedule.rate(step))
    assert schedule.done(1000) and schedule.fall_at == 700
    assert rates[0] == pytest.approx(1 / 100) and set(rates[99:700]) == {1.0}
    assert rates[850] == pytest.approx(0.5) and rates[999] == pytest.approx(1 / 300)


def test_schedule_falls_early_from_the_best_when_the_loss_stops_falling():
    schedule = Schedule(Recipe(patience=3))
    asked = []
    for step, loss in zip(range(0, 1000, 200), [3.0, 2.0, 1.9999, 2.1, 2.2], strict=True):
        schedule.observe(step, loss)
        asked.append(schedule.tick(step, 0.1))
    assert asked == [False] * 4 + [True]
    assert schedule.fall_at == 800 and schedule.fall_steps == round(200 * 0.3 / 0.7 * 0.97)
    assert schedule.rate(800) == Recipe.learning_rate and schedule.rate(800 + schedule.fall_steps) == 0


def test_schedule_falls_in_time_from_where_it_is():
    schedule = Schedule(Recipe())
    schedule.observe(400, 2.0)
    assert not schedule.tick(500, 0.69) and not schedule.tick(501, 0.7)
    assert schedule.fall_at == 501 and schedule.held == 501


def test_training_lowers_every_loss(trained):
    _, summary = trained
    uniform = math.log(builtin.TINY.vocab)
    for kind in ("topics", "docstrings", "sources"):
        p = summary["perplexity"][kind]
        assert math.log(p["value"]) < uniform - 0.5
        assert p["interval"][0] < p["value"] < p["interval"][1]
        assert p["window"] == p["stride"] == 64 and p["tokens"] > 1000
    assert set(summary["samples"]) == set(trained_model.PROMPTS)


def test_the_log_has_a_row_an_evaluation(trained):
    out, summary = trained
    rows = builtin.read_log(out)
    assert [row["step"] for row in rows] == list(range(0, 41, 4))
    assert rows[-1]["tokens"] == 40 * 4 * 64
    assert rows[-1]["train_loss"] < rows[1]["train_loss"]
    assert all(row["validation_loss"] > 0 and row["heldout_loss"] > 0 and row["seconds"] > 0 for row in rows)
    assert summary["kept"] == min(rows, key=lambda row: row["validation_loss"])
    assert json.loads((out / "training.json").read_text())["kept"] == summary["kept"]


def test_transformers_loads_what_was_written(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, summary = trained
    assert {path.name for path in out.iterdir()} == set(builtin.FILES)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert builtin.samples(model.eval(), tokenizer) == summary["samples"]


def test_the_run_becomes_records(trained):
    _, summary = trained
    found = builtin.as_records(summary)
    assert [r.quantity for r in found] == ["train_time"] + ["perplexity"] * 3
    assert all(r.kind == "measured" and not r.suspect and r.method == "fp" for r in found)
    for r, (kind, p) in zip(found[1:], summary["perplexity"].items(), strict=True):
        assert (r.value, r.config["text"]) == (p["value"], f"held-out {kind}")
        assert r.config["window"] == r.config["stride"] == 64 and r.config["tokens"] == p["tokens"]
        assert r.n == len(p["samples"]) > 10 and r.p20 < r.p80
    assert records.from_json(records.to_json(found[1])) == found[1]


def test_variety_tells_a_loop_from_a_text():
    assert trained_model.variety(["abc" * 50]) == 0 and trained_model.variety(["short"]) == 0
    assert trained_model.variety([WORDS[:80]]) == 1.0
    assert 0.3 < trained_model.variety([WORDS[:80], "ab" * 40]) < 0.6


def test_the_command_line_trains_writes_and_records(tmp_path, monkeypatch, capsys):
    words = "--steps 3 --batch 2 --context 64 --tiny --limit 20000 --device cpu".split()
    folder, kept = tmp_path / "model", tmp_path / "records.jsonl"
    monkeypatch.setattr("sys.argv", ["builtin", "--out", str(folder), "--records", str(kept), *words])
    builtin.main()
    printed = capsys.readouterr().out
    assert "held-out docstrings: perplexity" in printed and "window 64, stride 64" in printed
    assert "--- 'Return a'" in printed
    assert len(records.load(kept).records) == 4 and (folder / "model.safetensors").is_file()


def test_the_larger_shape_trains_by_its_own_recipe(tmp_path, monkeypatch, capsys):
    shape = MODELS["builtin-40m"]
    assert 20e6 < shape.parameters < 60e6 and shape.vocab == MODELS["builtin"].vocab
    chosen = {}

    def train(out, recipe, shape, *more):
        chosen.update(recipe=recipe, shape=shape)
        raise SystemExit

    monkeypatch.setattr(builtin, "train", train)
    words = ["--out", str(tmp_path), "--shape", "builtin-40m", "--steps", "7"]
    monkeypatch.setattr("sys.argv", ["builtin", *words])
    with pytest.raises(SystemExit):
        builtin.main()
    assert chosen["shape"] == shape
    assert chosen["recipe"] == replace(builtin.RECIPES["builtin-40m"], steps=7)
    assert chosen["recipe"].dropout > Recipe().dropout


def test_the_loss_figure_draws_the_log(trained):
    from trapetum.figures.training import losses

    out, summary = trained
    figure = losses(builtin.read_log(out), "cpu", summary["kept"])
    assert [trace.name for trace in figure.data] == ["training", "validation", "held out"]
    assert len(figure.data[1].x) == 11 and len(figure.data[0].x) == 10
    assert figure.layout.shapes[0].x0 == summary["kept"]["tokens"] / 1e6


def test_a_seed_fixes_the_weights(trained, tmp_path):
    out, _ = trained
    for name, recipe in (("same", SHORT), ("other", replace(SHORT, seed=1))):
        builtin.train(tmp_path / name, recipe, builtin.TINY, "cpu", limit=40_000, progress=False)
    weights = [
        (folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "same", tmp_path / "other")
    ]
    assert weights[0] == weights[1] != weights[2]


def test_the_best_weights_are_kept_not_the_last(tokenizer):
    """Validation text that training text contradicts: the longer it trains, the worse it gets."""
    shape = replace(builtin.TINY, vocab=300)
    model = builtin.make_model(shape, 32)
    train, other = (torch.arange(start, start + 3000, dtype=torch.int32) % 290 for start in (0, 7))
    streams = {"train": {"a": train}, "validation": {"a": other.flip(0)}, "heldout": {"a": other}}
    alone = {"a": 1}
    recipe = Recipe(
        steps=60, batch=4, context=32, learning_rate=1e-2, dropout=0.0, mix=alone, final_mix=alone
    )
    rows = []
    best = pretraining.run(model, streams, recipe, 0.0, rows.append)
    assert best["validation_loss"] < rows[-1]["validation_loss"] - 0.1
    now = pretraining.evaluate(model, streams["validation"], 32)["a"]
    assert now == pytest.approx(best["validation_loss"], abs=1e-5)


def test_a_run_by_time_ends_in_time(tmp_path):
    recipe = replace(SHORT, steps=None, seconds=12, eval_every=50)
    summary = builtin.train(tmp_path, recipe, builtin.TINY, "cpu", limit=20_000, progress=False)
    assert summary["trained_tokens"] > 0 and summary["seconds"] < 30


def test_the_built_in_model_fits_in_16_megabytes():
    model = builtin.make_model(MODELS["builtin"], 512)
    assert 12e6 < 2 * sum(p.numel() for p in model.parameters()) < 15.5e6
    assert model.config.head_dim == 32 and model.config.num_key_value_heads == 4


def test_a_missing_gpu_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cpu"):
        builtin.train(tmp_path, SHORT, device="cuda")
