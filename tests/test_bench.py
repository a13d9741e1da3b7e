"""The bench: what is measured, what its records say, and what is refused or doubted."""

from dataclasses import replace

import pytest
import torch

from trapetum import bench, energy, timing
from trapetum.bench import generating, multiply, products, reading, unpacking, variants
from trapetum.bench.recording import Recorder
from trapetum.decode import FUSED_STAGES, Generation, stages
from trapetum.models import Loaded, random_model
from trapetum.records import implied_gbps
from trapetum.shapes import MODELS

SHAPE = (256, 128)
TINY = "random:llama-tiny"
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


@pytest.fixture(autouse=True, scope="module")
def small_rotations():
    """Rotations of a megabyte: these tests look at the records, not at the speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "rotation_bytes", lambda device, cache=None: 1 << 20)
        patch.setattr(reading, "_known_gbps", {})
        yield


@pytest.mark.parametrize("profile", bench.PROFILES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_profile_has_sizes(profile, device):
    size = bench.sizes(profile, device)
    assert size.shapes and set(size.bits) <= set(products.N_CODES) and size.stride <= size.window


def test_unknown_profile_is_refused():
    with pytest.raises(ValueError, match="'fast' is unknown; it is one of smoke, quick, full"):
        bench.sizes("fast", "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_bandwidth_records(device):
    rows = bench.bandwidth(device, "smoke")
    assert [r.quantity for r in rows] == ["read_bandwidth"] * len(rows)
    assert sum(r.config["fastest"] for r in rows) == 1 and rows[-1].config["fastest"]
    assert rows[-1].value == max(r.value for r in rows) > 0.1
    assert all(r.kind == "measured" and r.config["l2"] == "cold" and r.n >= 3 for r in rows)


# Products


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_products_are_right_before_they_are_timed(device, bits):
    for method in bench.methods_on(device):
        product = products.build(method, *SHAPE, bits, device)
        error = product.checked_error()
        assert (error is None) == (method == "read")
        assert all(t.float().abs().sum() > 0 for t in product.tensors)


@pytest.mark.parametrize("device", DEVICES)
def test_copies_are_distinct_memory(device):
    seen = set()
    product = products.build("codebook", *SHAPE, 4, device)
    spy = replace(product, bind=lambda w, c: seen.add(w.data_ptr()) or product.bind(w, c))
    assert len(spy.calls(5)) == 5 and len(seen) == 5


def test_a_wrong_product_is_not_timed(monkeypatch):
    product = products.build("linear-fp32", *SHAPE, 4, "cpu")
    wrong = replace(product, reference=product.reference * 1.01)
    with pytest.raises(ArithmeticError, match="linear-fp32 is off by 0.0099 .* it is not timed"):
        wrong.checked_error()
    nan = replace(product, reference=product.reference * float("nan"))
    with pytest.raises(ArithmeticError):
        nan.checked_error()


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="'marlin' is unknown on cpu; it is one of linear-fp32"):
        bench.gemv("cpu", [SHAPE], ["marlin"], profile="smoke")


def test_int4_refuses_odd_shapes_and_is_left_out():
    with pytest.raises(products.NotPossible, match="multiples of 128"):
        products.build("torch-int4", 100, 64, 4, "cpu")
    rows = bench.gemv("cpu", [(100, 64)], ["torch-int4", "codebook"], l2=("cold",), profile="smoke")
    assert {r.method for r in rows} == {"codebook"}


@pytest.fixture(scope="module")
def cpu_rows(small_rotations):
    return bench.gemv("cpu", [SHAPE], profile="smoke")


def test_gemv_times_every_method_cold_and_warm(cpu_rows):
    times = [r for r in cpu_rows if r.quantity == "gemv_time"]
    found = {(r.method, r.config.get("path"), r.config["l2"]) for r in times}
    exact = ("codebook", "exact")
    assert {method for method, _, _ in found} == set(products.CPU_METHODS) - {"codebook-exact"}
    assert {(*exact, "cold"), (*exact, "warm")} <= found
    needed = {"in_features", "out_features", "bits", "l2", "chain", "bytes", "copies", "threads"}
    assert all(needed <= r.config.keys() for r in times)
    assert all((r.config["copies"] == 1) == (r.config["l2"] == "warm") for r in times)


def test_gemv_bytes_are_weights_codebooks_and_activations(cpu_rows):
    i, o = SHAPE
    moved = {r.method: r.config["bytes"] for r in cpu_rows if r.quantity == "gemv_time"}
    assert moved["linear-fp32"] == 4 * i * o + 4 * (i + o)
    assert moved["linear-bf16"] == 2 * i * o + 2 * (i + o)
    assert moved["codebook"] == i * o // 2 + 2 * 16 * o + 4 * (i + o)
    assert moved["read"] == i * o // 2


def test_gemv_records_errors_beside_times(cpu_rows):
    errors = {(r.method, r.config.get("path")): r.value for r in cpu_rows if r.quantity == "output_error"}
    assert errors["linear-bf16", None] > errors["linear-fp16", None] > errors["linear-fp32", None] > 0
    assert set(path for method, path in errors if method == "codebook") & {"exact", "torch"}


def test_kernel_hash_is_only_on_our_kernels(cpu_rows):
    ours = {"codebook", "codebook-int8", "own-fp32", "own-fp16", "own-int8", "read"}
    assert {r.method for r in cpu_rows if r.kernel_sha256} == ours


def test_a_rotation_within_the_cache_is_doubted(cpu_rows):
    cold = [r for r in cpu_rows if r.quantity == "gemv_time" and r.config["l2"] == "cold"]
    assert all(r.suspect for r in cold)
    assert "not cold" in multiply.cold_doubt(1_000_000, 2_000_000, "cold")
    assert (
        multiply.cold_doubt(1_000_000, 2_000_000, "warm")
        == multiply.cold_doubt(2_000_000, 2_000_000, "cold")
        == ""
    )


def test_records_above_the_cold_read_are_suspect():
    recorder = Recorder("cpu", "smoke")
    recorder.cold_read_gbps = 10.0
    config = {"in_features": 1, "out_features": 1, "l2": "cold", "chain": "alone", "bytes": 10**6}
    slow, fast = (recorder.add("gemv_time", [us], "codebook", config) for us in (101.0, 97.0))
    assert not slow.suspect and fast.suspect and "10 GB/s" in fast.why_suspect
    assert recorder.close()[0].device["clocks"].keys() == {"before", "after"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gemv_on_a_gpu_has_chains():
    rows = bench.gemv("cuda", [(1024, 1024)], profile="smoke")
    chains = {(r.method, r.config["chain"]) for r in rows if r.quantity == "gemv_time"}
    assert {("codebook", "alone"), ("codebook", "pdl"), ("linear-fp16", "alone")} <= chains
    assert {r.method for r in rows} >= {"tinygemm-int4", "mv-fp16", "linear-bf16", "read"}


# Dequantize and chains


@pytest.mark.parametrize("device", DEVICES)
def test_dequant_measures_bandwidth_and_both_products(device):
    rows = bench.dequant(device, [SHAPE], [4], "smoke")
    assert {r.config["variant"] for r in rows if r.quantity == "dequant_bandwidth"} == set(
        unpacking.VARIANTS[device]
    )
    times = {r.method: r.config["path"] for r in rows if r.quantity == "gemv_time"}
    assert times.keys() == {"dequantize-linear", "codebook"} and times["dequantize-linear"] == "dequantize"


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "llama-0.9b"])
def test_fused_shapes_hold_all_weights_of_a_token(name):
    shape = MODELS[name]
    weights = sum(i * o * count for i, o, count in unpacking.fused_shapes(shape))
    assert weights == shape.linear_weights + shape.lm_head_weights
    assert sum(count for *_, count in unpacking.fused_shapes(shape)) == 4 * shape.layers + 1


@pytest.mark.parametrize("device", DEVICES)
def test_chain_covers_one_token(device):
    rows = bench.gemv_chain(device, "llama-tiny", ["codebook"], profile="smoke")
    assert {r.quantity for r in rows} == {"linears_time"}
    assert {r.config["chain"] for r in rows} == ({"alone", "pdl"} if device == "cuda" else {"alone"})
    assert rows[0].config["calls"] == 9 and rows[0].config["model"] == TINY


def test_products_of_a_chain_come_in_layer_order():
    parts = [(["qkv0", "qkv1"], 2), (["out0", "out1"], 2), (["head"], 1)]
    assert unpacking._in_layer_order(parts) == ["qkv0", "out0", "qkv1", "out1", "head"]


# Decode


@pytest.mark.parametrize(("model", "device"), [(TINY, "cpu"), pytest.param("builtin", "cuda", marks=gpu)])
def test_decode_measures_every_method_and_stage(model, device):
    rows = bench.decode(model, device, profile="smoke")
    speeds = [r for r in rows if r.quantity == "decode_speed"]
    found = {(r.method, r.config["stage"]) for r in speeds}
    dense = {"fp16"} if device == "cuda" else {"fp32"}
    for method in (*dense, "codebook"):
        assert {(method, stage) for stage in stages(device)} <= found
    linears = {r.method: r.config["linears"] for r in speeds}
    assert linears["codebook"] == "codebook" and {linears[m] for m in dense} == {"dense"}
    assert {r.quantity for r in rows} == {"decode_speed", "decode_memory", "time_to_first_token"}
    assert all(r.config["read_gbps"] > 0 and r.config["estimate_gb"] > 0 for r in speeds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_shape_that_the_fused_step_cannot_run_is_refused_there_only():
    rows = bench.decode(
        TINY, "cuda", profile="smoke"
    )  # heads of 16, which the attention kernel does not have
    refused = {(r.method, r.config["stage"]): r for r in rows if r.quantity == "call_accepted"}
    assert set(refused) == {(m, s) for m in ("fp16", "codebook") for s in FUSED_STAGES}
    for r in refused.values():
        assert r.value == 0 and "the fused step cannot run this model" in r.config["error"]
        assert r.config["error"].endswith(", not 16.")
    speeds = {(r.method, r.config["stage"]) for r in rows if r.quantity == "decode_speed"}
    others = set(stages("cuda")) - set(FUSED_STAGES)
    assert speeds == {(method, stage) for method in ("fp16", "codebook") for stage in others}


def test_decode_bytes_are_weights_and_cache():
    model = random_model(MODELS["llama-tiny"], "cpu", torch.float32)
    shape = MODELS["llama-tiny"]
    variant = variants.Variant("fp32", Loaded(model, None, TINY, shape, "random"), {})
    norms = (2 * shape.layers + 1) * shape.hidden
    assert variant.token_weight_bytes == 4 * (shape.linear_weights + shape.lm_head_weights + norms)
    assert variant.token_bytes(10) - variant.token_weight_bytes == shape.kv_bytes(10, 4)
    assert variant.token_bytes(640, "int8") - variant.token_weight_bytes == shape.kv_bytes(640, 4, "int8")
    everything = 4 * shape.embedding_weights + variant.token_weight_bytes
    assert variant.estimate_bytes(10) == everything + shape.kv_bytes(10, 4)
    assert (variant.kv_name(), variant.kv_name("int4")) == ("fp32", "int4")


def test_memory_estimate_of_16_bit_weights_is_from_the_shape_alone():
    shape = MODELS["llama-tiny"]
    loaded = Loaded(random_model(shape, "cpu", torch.float16), None, TINY, shape, "random")
    dense = variants.Variant("fp16", loaded, {"bits": 16, "linears": "dense"})
    weights = 2 * shape.parameters
    assert weights < dense.estimate_bytes(64) < 1.2 * weights + shape.kv_bytes(64)


def test_decode_config_names_context_and_tokens():
    (row, *_) = bench.decode(TINY, "cpu", ["lean"], "smoke", 6, ["codebook"])
    assert row.config["new_tokens"] == 6 and row.config["context"] == row.config["prompt_tokens"] + 3
    assert row.config["bits"] == 4 and row.config["n_codes"] == 16 and row.config["model"] == TINY
    assert implied_gbps(row) == pytest.approx(row.config["bytes"] * row.value / 1e9)


def test_slow_stages_are_cut_to_the_budget(monkeypatch):
    small = replace(bench.sizes("smoke", "cpu"), token_budget_s=1e-9, new_tokens=64)
    monkeypatch.setattr("trapetum.bench.recording.sizes", lambda profile, device: small)
    (row, *_) = bench.decode(TINY, "cpu", ["lean"], "smoke", methods=["fp32"])
    assert row.config["new_tokens"] == generating.FEWEST_TOKENS


def test_speed_samples_are_runs_or_stretches():
    even = Generation([1] * 17, 0.1, [0.5] * 16)
    assert generating.speed_samples([even] * 3) == [2.0] * 3
    assert generating.speed_samples([even]) == [2.0] * 8
    uneven = Generation([1] * 3, 0.1, [0.25, 0.5])
    assert generating.speed_samples([uneven]) == [4.0, 2.0]


def test_stretches_are_whole_windows_where_tokens_arrive_together():
    # 32 tokens a launch: the first of each waits for all of them
    launches = Generation([1] * 129, 0.1, [t for _ in range(4) for t in (3.2, *[0.0] * 31)])
    assert generating.speed_samples([launches]) == [10.0] * 4
    assert generating.window_samples([launches]) == {"first 32": [10.0], "last 32": [10.0]}


def test_windows_are_the_first_and_the_last_tokens():
    spans = [0.1] * 32 + [1.0] * 40 + [0.5] * 24 + [9.0] * 5  # 101 steps: the last whole window ends at 96
    windows = generating.window_samples([Generation([1] * 102, 0.1, spans)] * 2)
    assert windows["first 32"] == pytest.approx([10.0] * 2)
    assert windows["last 32"] == pytest.approx([32 / (8 * 1.0 + 24 * 0.5)] * 2)
    assert generating.window_samples([Generation([1] * 64, 0.1, [0.5] * 63)]) == {}


def test_window_records_have_their_own_context_and_bytes():
    rows = bench.decode(TINY, "cpu", ["lean"], "smoke", 64, ["codebook"])
    whole = next(r for r in rows if r.quantity == "decode_speed")
    first, last = (r for r in rows if r.quantity == "window_speed")
    assert [r.config["window"] for r in (first, last)] == ["first 32", "last 32"]
    prompt = whole.config["prompt_tokens"]
    assert [r.config["context"] for r in (first, whole, last)] == [prompt + 16, prompt + 32, prompt + 48]
    assert first.config["bytes"] < whole.config["bytes"] < last.config["bytes"]
    assert implied_gbps(first) == pytest.approx(first.config["bytes"] * first.value / 1e9)


def test_budgets_keep_whole_windows():
    assert generating._affordable(512, 1000.0) == 512 and generating._affordable(512, 200.0) == 192
    assert generating._affordable(512, 50.0) == 50 and generating._affordable(512, 0.1) == 4
    assert generating._affordable(2, 0.0) == 2


class Drafting:
    """An engine of several rows whose steps make two tokens each."""

    rows, steps = 4, 100

    def generate(self, prompt, count):
        self.steps += (count - 1) // 2
        return Generation([1] * count, 0.1, [0.1] * (count - 1))


def test_bytes_of_a_token_are_a_steps_over_the_accepted_ones():
    from trapetum.bench.variants import codebook_variant

    recorder = Recorder("cpu", "smoke")
    run = generating.Run(recorder, codebook_variant(TINY, "cpu", "fp32"), "lean", 64)
    run.engine, run._sizes = Drafting(), replace(run._sizes, runs=2)
    run.settle = lambda: setattr(run, "threads", 1) or setattr(run, "tokens", 64)
    run.generate()
    assert run.config()["accepted"] == 2.0
    assert run.config()["bytes"] == run.variant.token_bytes(run.context) // 2


def test_drafts_are_looked_up_in_a_text():
    from trapetum.models import load

    builtin = variants.Variant("fp32", load("builtin"), {})
    assert generating._prompt(builtin, 6, 4) == generating.text_tokens(builtin.loaded)[:64]
    assert generating._prompt(builtin, 6, 1) == generating.random_prompt(builtin, 6)
    random = variants.Variant("fp32", load(TINY), {})
    assert len(generating._prompt(random, 6, 4)) == 6


def test_what_does_not_fit_is_a_record_and_the_rest_is_measured(monkeypatch):
    need = 4 * MODELS["llama-tiny"].parameters
    monkeypatch.setattr(timing, "free_bytes", lambda device: need - 1)
    rows = bench.decode(TINY, "cpu", ["lean"], "smoke", methods=["fp32", "fp16", "codebook"])
    (refused,) = [r for r in rows if r.quantity == "call_accepted"]
    assert (refused.method, refused.value, refused.config["bits"]) == ("fp32", 0.0, 32)
    assert "llama-tiny in 32 bits takes 0.0 GB, and 0.0 GB are free on cpu" in refused.config["error"]
    assert {r.method for r in rows if r.quantity == "decode_speed"} == {"fp16", "codebook"}
    with pytest.raises(MemoryError, match="are free on cpu"):
        next(variants.variants(TINY, "cpu", ["fp32"], ()))


def test_a_stage_that_refuses_is_a_record(monkeypatch):
    from trapetum.decode import DecodeError, Engine

    class Picky(Engine):
        def __init__(self, loaded, stage, *args, **more):
            if stage == "naive":
                raise DecodeError("not today.")
            super().__init__(loaded, stage, *args, **more)

    monkeypatch.setattr(generating, "Engine", Picky)
    rows = bench.decode(TINY, "cpu", ["naive", "lean"], "smoke", methods=["codebook"])
    (refused,) = [r for r in rows if r.quantity == "call_accepted"]
    assert refused.config["stage"] == "naive" and refused.config["error"] == "not today."
    assert {r.config["stage"] for r in rows if r.quantity == "decode_speed"} == {"lean"}


def test_unknown_decode_method_is_refused():
    with pytest.raises(ValueError, match="'int3' is unknown; a decode knows"):
        bench.decode(TINY, "cpu", profile="smoke", methods=["int3"])


def test_best_16_bit_is_one_of_the_two():
    assert variants.best_16_bit(MODELS["llama-tiny"], rounds=1) in ("fp16", "bf16")


# Energy


def test_energy_without_a_counter_is_no_record(monkeypatch):
    def none(device):
        raise energy.NoEnergyCounter("no counter.")

    monkeypatch.setattr(energy, "find_counter", none)
    assert bench.energy(TINY, "cpu", profile="smoke") == []


def test_energy_is_gross_and_net(monkeypatch):
    from test_energy import SteadyCounter

    monkeypatch.setattr(energy, "find_counter", lambda device: SteadyCounter(100.0, 0.02))
    rows = bench.energy(TINY, "cpu", profile="smoke", methods=["codebook"])
    assert [r.config["accounting"] for r in rows] == ["gross", "net"]
    gross, net = rows
    assert gross.value > abs(net.value) and gross.config["idle_w"] == pytest.approx(100, rel=0.3)
    assert gross.config["window_s"] >= 0.3 and gross.config["counter"] == "test"
    assert gross.config["resolution_s"] > 0 and gross.config["trace_j"] > 0
    assert len(gross.config["before"]) == len(gross.config["after"]) == gross.n


def test_idle_is_measured_for_each_run_with_the_weights_resident(monkeypatch):
    from test_energy import SteadyCounter

    events = []

    class Meter(energy.EnergyMeter):
        def __init__(self, device):
            super().__init__(device, SteadyCounter(100.0, 0.02))

        def idle_power_w(self, seconds, quiet_s):
            events.append(("idle", quiet_s))
            return 10.0

        def measure(self, fn, seconds, idle_w):
            events.append(("window", idle_w))
            return super().measure(fn, 0.05, idle_w)

    class Watched(generating.Run):
        def settle(self, *args):
            events.append((self.variant.method, self.stage))
            super().settle(*args)

    monkeypatch.setattr(generating, "EnergyMeter", Meter)
    monkeypatch.setattr(generating, "Run", Watched)
    rows = bench.energy(TINY, "cpu", ["cast_free", "lean"], "smoke", ["fp32", "codebook"])
    one = [("idle", 0.0), ("window", 10.0)]
    expected = [[(m, s), *one] for m in ("fp32", "codebook") for s in ("cast_free", "lean")]
    assert events == [event for run in expected for event in run]
    assert {(r.method, r.config["stage"]) for r in rows} == {run[0] for run in expected}
