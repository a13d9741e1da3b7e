"""Tokens and logits beside transformers': equal ones, flipped ones, near-ties and faults."""

from importlib import import_module

import pytest
import torch

from trapetum import bench
from trapetum.bench.agreement import Reference, compared
from trapetum.decode import FUSED_STAGES, Engine, stages
from trapetum.models import load

agreeing = import_module("trapetum.bench.agreement")  # `bench.agreement` is its function
TINY = "random:llama-tiny"
LOGITS = torch.tensor([[0.0, 5.0, 4.9], [3.0, 0.0, 1.0], [0.0, 1.0, 7.0]])
WANTED = Reference([1], [1, 0, 2], LOGITS)


def test_equal_logits_agree():
    same = compared([1, 0, 2], LOGITS, WANTED)
    assert (same.equal, same.count, same.same, same.worst, same.gaps) == (3, 3, 1.0, 0.0, ())


def test_a_flip_has_its_gap_and_ends_the_equal_tokens():
    other = LOGITS.clone()
    other[0, 2] += 0.3  # token 2 instead of 1, which the reference prefers by 0.1
    found = compared([2, 0, 2], other, WANTED)
    assert found.equal == 0 and found.same == pytest.approx(2 / 3)
    assert found.gaps == pytest.approx((0.1,), abs=1e-5) and found.worst == pytest.approx(0.3, abs=1e-5)
    assert found.worst_agreed == 0.0
    assert found.relative == pytest.approx(0.3 / float(LOGITS.std()), abs=1e-5)


def records_of(*comparisons):
    from trapetum.bench.recording import Recorder
    from trapetum.bench.variants import codebook_variant

    recorder = Recorder("cpu", "smoke")
    agreeing._record(recorder, codebook_variant(TINY, "cpu", "fp32"), {"stage": "lean"}, list(comparisons))
    return {(r.quantity, r.config["variant"]): r for r in recorder.close()}


def test_a_near_tie_is_told_from_a_fault():
    fine = agreeing.Comparison(16, 16, 1.0, 0.2, 0.2, 0.1, ())
    tie = agreeing.Comparison(4, 16, 15 / 16, 0.15, 0.1, 0.1, (0.05,))
    fault = agreeing.Comparison(0, 16, 14 / 16, 4.0, 0.1, 2.0, (0.02, 3.0))
    found = records_of(fine, tie, fault)
    gaps = found["logit_gap", "disagreements"]
    assert gaps.value == 3.0 and gaps.samples == (0.05, 0.02, 3.0)
    assert (gaps.config["near_ties"], gaps.config["faults"], gaps.config["noise"]) == (2, 1, 0.2)
    assert found["token_agreement", "prompts"].value == pytest.approx(1 / 3)
    assert found["token_agreement", "tokens"].value == pytest.approx((1 + 15 / 16 + 14 / 16) / 3)
    assert found["logit_error", "absolute"].value == 4.0 and found["logit_error", "relative"].value == 2.0
    assert ("logit_gap", "disagreements") not in records_of(fine)


def test_every_stage_on_the_cpu_makes_transformers_tokens():
    rows = bench.agreement(TINY, "cpu", profile="smoke", methods=("fp32", "codebook"), new_tokens=6)
    shares = [r for r in rows if r.quantity == "token_agreement"]
    assert {(r.method, r.config["stage"]) for r in shares} == {
        (method, stage) for method in ("fp32", "codebook") for stage in stages("cpu")
    }
    assert all(r.value == 1.0 and r.n == 3 for r in shares)
    errors = [r.value for r in rows if r.quantity == "logit_error" and r.config["variant"] == "relative"]
    assert max(errors) < 2e-3


def test_the_built_in_model_agrees_on_pieces_of_text():
    rows = bench.agreement("builtin", "cpu", ["lean"], "smoke", prompts=4)
    assert {r.value for r in rows if r.quantity == "token_agreement"} == {1.0}
    assert rows[0].config["baseline"] == "transformers" and rows[0].config["new_tokens"] == 16


def test_a_broken_stage_is_caught(monkeypatch):
    def wrong(engine, prompt, tokens):
        logits = torch.zeros(len(tokens) + 1, 256)
        logits[:, 0] = 1.0
        return logits

    monkeypatch.setattr(Engine, "forced_logits", wrong)
    rows = bench.agreement(TINY, "cpu", ["lean"], "smoke", prompts=3)
    teacher_forced = [r for r in rows if r.config["variant"] == "tokens"]
    assert teacher_forced[0].value < 0.5
    assert max(r.value for r in rows if r.quantity == "logit_gap") > 0


@pytest.mark.parametrize("stage", stages("cpu"))
def test_forced_logits_are_those_of_a_full_forward_pass(stage):
    loaded = load(TINY, "cpu", "fp32")
    ids = torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        whole = loaded.model(ids[None]).logits[0]
    engine = Engine(loaded, stage, max_context=16)
    forced = engine.forced_logits(ids[:5].tolist(), ids[5:].tolist())
    assert torch.allclose(forced, whole[4:], atol=1e-5)


def test_prompts_are_seeded_and_begin_with_one_token():
    loaded = load(TINY)
    first, second = (agreeing.prompt_set(loaded, 32) for _ in range(2))
    assert first == second and len(first) == 32 and len(first[0]) == 1
    assert 1 <= min(map(len, first)) and max(map(len, first)) <= agreeing.LONGEST_PROMPT


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("model", "cannot"), [("builtin", ()), (TINY, FUSED_STAGES)])  # TINY has heads of 16
def test_every_stage_on_a_gpu_agrees_up_to_near_ties(model, cannot):
    rows = bench.agreement(model, "cuda", profile="smoke", prompts=8)
    refused = [r for r in rows if r.quantity == "call_accepted"]
    assert [r.config["stage"] for r in refused] == list(cannot)
    assert all("the fused step cannot run this model" in r.config["error"] for r in refused)
    shares = [r for r in rows if r.quantity == "token_agreement" and r.config["variant"] == "tokens"]
    assert {r.config["stage"] for r in shares} == set(stages("cuda")) - set(cannot)
    assert all(r.config["faults"] == 0 for r in rows if r.quantity == "logit_gap")
    assert all(r.value > 0.95 for r in shares)
