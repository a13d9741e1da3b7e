"""Speed and memory against the context: what is measured, and what is refused with its reason."""

import pytest
import torch

from trapetum import bench, timing
from trapetum.bench import contexts
from trapetum.bench.recording import Recorder
from trapetum.bench.variants import codebook_variant
from trapetum.models import load

TINY = "random:llama-tiny"


def test_each_context_has_speed_and_memory():
    rows = bench.context(TINY, "cpu", profile="smoke", contexts=(48, 64, 512), methods=["codebook"])
    speeds = [r for r in rows if r.quantity == "context_speed"]
    assert [r.config["context"] for r in speeds] == [48, 64, 512]
    assert all(r.value > 0 and r.n >= 3 and r.config["kv"] == "fp32" for r in speeds)
    shape = load(TINY).shape
    assert speeds[2].config["bytes"] - speeds[1].config["bytes"] == shape.kv_bytes(512 - 64, 4)
    held = [r for r in rows if r.quantity == "decode_memory"]
    assert [r.config["context"] for r in held] == [48, 64, 512]
    more = held[2].config["estimate_gb"] - held[1].config["estimate_gb"]
    assert more == pytest.approx(shape.kv_bytes(512 - 64, 4) / 1e9)


def test_random_weights_take_contexts_beyond_their_config():
    (row, *_) = bench.context(TINY, "cpu", profile="smoke", contexts=(9000,), methods=["codebook"])
    assert row.quantity == "context_speed" and row.config["context"] == 9000


def test_what_does_not_fit_says_so_with_estimate_and_free_bytes(monkeypatch):
    free = timing.free_bytes("cpu")
    monkeypatch.setattr(contexts, "_free", lambda device: 100_000)
    rows = bench.context(TINY, "cpu", profile="smoke", contexts=(64, 4096), methods=["codebook"])
    assert [r.quantity for r in rows] == ["context_speed", "decode_memory", "call_accepted"]
    (row,) = [r for r in rows if r.quantity == "call_accepted"]
    assert row.value == 0 and row.config["context"] == 4096 and row.config["free_bytes"] == 100_000 < free
    assert (
        "4096 tokens take an estimated 0.0 GB" in row.config["error"]
        and "0.0 GB are free" in row.config["error"]
    )
    assert row.config["estimate_gb"] * 1e9 > 100_000


def test_a_checkpoint_keeps_its_own_limit():
    rows = bench.context("builtin", "cpu", profile="smoke", contexts=(64, 10**6), methods=["fp32"])
    refused = [r for r in rows if r.quantity == "call_accepted"]
    assert len(refused) == 1 and "beyond the model's own limit of" in refused[0].config["error"]
    assert any(r.quantity == "context_speed" and r.config["context"] == 64 for r in rows)


def test_memory_of_other_code_in_the_process_is_not_counted():
    recorder = Recorder("cpu", "smoke")
    contexts._add_peak(
        recorder, codebook_variant(TINY, "cpu", "fp32"), {"context": 64}, 1_669_000_000, 1_003_000_000
    )
    (row,) = recorder.close()
    assert row.quantity == "decode_memory" and row.value == pytest.approx(0.666)
    assert "less 1.003 GB that were allocated before the model" in row.source


def test_too_short_a_context_is_refused():
    with pytest.raises(ValueError, match="32 tokens has no room for the 32 timed steps"):
        bench.context(TINY, "cpu", profile="smoke", contexts=(32,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_quantized_caches_on_a_gpu_take_less_memory():
    other = torch.empty(10**9, dtype=torch.uint8, device="cuda")  # of the process, but not of the decode
    rows = bench.context(
        "random:llama-0.9b", "cuda", profile="smoke", contexts=(1024, 16384), methods=["codebook"]
    )
    del other
    assert not [r for r in rows if r.quantity == "call_accepted"]
    speeds = [r for r in rows if r.quantity == "context_speed"]
    assert {(r.config["kv"], r.config["context"]) for r in speeds} == {
        (kv, length) for kv in contexts.KV for length in (1024, 16384)
    }
    held = {(r.config["kv"], r.config["context"]): r for r in rows if r.quantity == "decode_memory"}
    assert held["int4", 16384].value < held["int8", 16384].value < held["fp16", 16384].value
    for r in held.values():  # the estimate knows neither the allocator's rounding nor scratch
        assert r.value == pytest.approx(r.config["estimate_gb"], rel=0.15)
