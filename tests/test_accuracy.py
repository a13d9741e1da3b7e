"""The accuracy ladder: every rung is scored on the same text, counts its bytes, and calibrates on other documents."""

import copy
import re
from dataclasses import replace

import pytest
import torch

from trapetum import bench
from trapetum.models import Loaded, random_model
from trapetum.shapes import MODELS

TINY = "random:llama-tiny"


class ByteTokenizer:
    """Token ids are the bytes of the text."""

    def __call__(self, text, return_tensors, add_special_tokens, verbose):
        ids = torch.tensor([list(text.encode())])
        return type("Encoding", (), {"input_ids": ids})()


@pytest.fixture
def tiny_with_tokenizer(monkeypatch):
    from trapetum import models

    def load(name, device="cpu", dtype=None, **more):
        model = random_model(MODELS["llama-tiny"], device, torch.float32)
        return Loaded(model, ByteTokenizer(), name, MODELS["llama-tiny"], "random")

    monkeypatch.setattr(models, "load", load)


@pytest.fixture
def fox(tmp_path):
    path = tmp_path / "fox.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return str(path)


def test_the_ladder_scores_the_model_and_its_quantizations(tiny_with_tokenizer, fox):
    methods = ["rtn", "kmeans", "nf4", "rtn-128"]
    rows = bench.accuracy("tiny", "cpu", methods, [4, 2], "smoke", fox)
    found = {(r.method, r.config["bits"]): r for r in rows if r.quantity == "perplexity"}
    both = {(m, b) for m in ("rtn", "kmeans", "rtn-128") for b in (4, 2)}
    assert found.keys() == {("fp", 32), ("nf4", 4), *both}
    fp = found["fp", 32]
    assert fp.config["window"] == 128 and fp.config["stride"] == 64 and fp.config["tokens"] > 400
    assert fp.config["text"] == "fox.txt" and fp.config["interval"][0] <= fp.value <= fp.config["interval"][1]
    for quantity in ("weight_error", "layer_error", "kl_divergence"):
        values = {(r.method, r.config["bits"]): r.value for r in rows if r.quantity == quantity}
        assert 0 < values["kmeans", 4] < values["kmeans", 2] and values["rtn", 4] < values["rtn", 2]
    agreement = [r for r in rows if r.quantity == "top1_agreement"]
    assert all(0 < r.value <= 1 and r.config["baseline"] == "fp" for r in agreement)
    assert len({(r.config["window"], r.config["tokens"]) for r in found.values()}) == 1


def test_bits_count_every_byte(tiny_with_tokenizer, fox):
    rows = bench.accuracy("tiny", "cpu", ["kmeans", "rtn-128", "rotation"], [4], "smoke", fox, dense=False)
    bits = {r.method: r.value for r in rows if r.quantity == "bits_per_weight"}
    shape = MODELS["llama-tiny"]
    linears = [(i, o) for _, i, o in shape.linears()] * shape.layers
    weights = sum(i * o for i, o in linears)
    codebooks = sum(16 * 16 * o for _, o in linears)
    assert bits["kmeans"] == pytest.approx(4 + codebooks / weights)
    groups = sum(32 * o * -(-i // 128) for i, o in linears)
    assert bits["rtn-128"] == pytest.approx(4 + groups / weights)
    assert bits["rotation"] == pytest.approx(bits["kmeans"])  # its head is its own; see the next test


def test_a_head_that_had_to_be_untied_counts():
    from trapetum.bench.accuracy_rungs import stored_bits

    shape = replace(MODELS["llama-tiny"], tied_embeddings=True)
    model = random_model(shape, "cpu", torch.float32)
    assert stored_bits(model, model) == pytest.approx(16)
    untied = copy.deepcopy(model)
    untied.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert stored_bits(model, untied) == pytest.approx(16 + 16 * shape.lm_head_weights / shape.linear_weights)


def test_a_layer_is_measured_alike_in_another_basis(tiny_with_tokenizer):
    from trapetum import equivalence, layer_error

    model = random_model(MODELS["llama-tiny"], "cpu", torch.float32)
    for p in model.model.embed_tokens.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(3))
    turned = copy.deepcopy(model)
    ids = torch.randint(256, (64,), generator=torch.Generator().manual_seed(1))
    equivalence.rotate(turned, 5)
    assert max(layer_error.layer_errors(model, turned, ids, 32)) < 1e-3
    with torch.no_grad():
        turned.model.layers[1].mlp.down_proj.weight *= 1.5
    exact, changed = layer_error.layer_errors(model, turned, ids, 32)
    assert exact < 1e-3 < 0.02 < changed
    with torch.no_grad():
        turned.model.embed_tokens.weight[:100] *= 2
    with pytest.raises(ValueError, match="no change of basis"):
        layer_error.basis(model, turned)


def test_a_layer_that_adds_nothing_is_all_wrong(tiny_with_tokenizer):
    from trapetum.layer_error import layer_errors

    model = random_model(MODELS["llama-tiny"], "cpu", torch.float32)
    silent, ids = copy.deepcopy(model), torch.arange(64)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        torch.nn.init.zeros_(silent.model.layers[0].get_submodule(name).weight)
    assert layer_errors(model, silent, ids, 64) == pytest.approx([1.0, 0.0])
    with pytest.raises(ValueError, match="less than a window"):
        layer_errors(model, silent, ids, 65)


def test_seeds_are_pooled_window_by_window(tiny_with_tokenizer, fox):
    rows = bench.accuracy("tiny", "cpu", ["kmeans-weighted"], [2], "smoke", fox, seeds=2, dense=False)
    (score,) = (r for r in rows if r.quantity == "perplexity")
    by_seed = score.config["by_seed"]
    assert score.config["seeds"] == [0, 1] and len(by_seed) == 2 and by_seed[0] != by_seed[1]
    assert score.value == pytest.approx((by_seed[0] * by_seed[1]) ** 0.5)
    assert score.config["calibration"]["text"] == "fox.txt, behind what is scored"
    for quantity in ("kl_divergence", "top1_agreement", "quantize_time"):
        assert [r.n for r in rows if r.quantity == quantity] == [2]
    alone = bench.accuracy("tiny", "cpu", ["kmeans"], [2], "smoke", fox, seeds=2, dense=False)
    assert all("seeds" not in r.config for r in alone)


def test_calibration_uses_only_what_is_not_scored(tiny_with_tokenizer, tmp_path, monkeypatch):
    from trapetum import calibration

    seen, made_of = [], calibration.made_of
    monkeypatch.setattr(calibration, "made_of", lambda rows, *more: seen.append(rows) or made_of(rows, *more))
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 64 + "0123456789" * 60)
    bench.accuracy("tiny", "cpu", ["kmeans-weighted"], [4], "smoke", str(text), dense=False)
    ((first, *_),) = seen
    assert set(bytes(first.tolist()).decode()) == set("0123456789")
    text.write_text("abcdefgh" * 64 + "0")
    with pytest.raises(ValueError, match="1 tokens beyond the scored ones"):
        bench.accuracy("tiny", "cpu", ["kmeans-weighted"], [4], "smoke", str(text), dense=False)


def test_a_method_without_these_bits_is_left_out_and_an_unknown_one_refused():
    from trapetum.bench.accuracy_rungs import rung, rungs

    made = [(r.method, r.bits) for r in rungs(["nf4", "kmeans", "additive"], [4, 3])]
    assert made == [("nf4", 4), ("kmeans", 4), ("additive", 4), ("kmeans", 3)]
    sparse = rung("kmeans+sparse", 4)
    assert (sparse.base, sparse.outliers) == ("kmeans", 0.0045) and sparse.config["outliers"] == 0.0045
    for unknown in ("gptqq", "rtn-128+sparse", "additive+sparse"):
        with pytest.raises(ValueError, match=f"no method '{re.escape(unknown)}' on the ladder"):
            rung(unknown, 4)


def test_accuracy_needs_a_tokenizer():
    with pytest.raises(ValueError, match="has no tokenizer"):
        bench.accuracy(TINY, "cpu", profile="smoke")


def test_weight_error_falls_with_bits_and_with_the_better_method():
    rows = bench.weight_error(methods=("rtn", "kmeans", "nf4"), bits=(4, 2), profile="smoke")
    errors = {(r.method, r.config["bits"]): r.value for r in rows if r.quantity == "weight_error"}
    assert errors["kmeans", 4] < errors["rtn", 4] < errors["rtn", 2] and ("nf4", 2) not in errors
    assert sum(r.quantity == "quantize_time" for r in rows) == len(errors)
