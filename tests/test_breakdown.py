"""The ablation: parts recovered from known times, and a real step on the CPU taken apart."""

from contextlib import contextmanager
from importlib import import_module

import pytest
import torch

from trapetum import bench, records, waterfall
from trapetum.decode import stages
from trapetum.shapes import MODELS

breaking = import_module("trapetum.bench.breakdown")  # `bench.breakdown` is its function
TINY = "random:llama-tiny"
KNOWN = {"sampling": 30.0, "norms": 200.0, "attention and cache": 500.0, "products": 5000.0}
LEFT = 340.0
CARD = {"name": "a card"}
ATTEMPTS = (
    3  # of a comparison of two times that other processes on the GPU may spoil; a fault spoils all of them
)


class Machine:
    """Takes a known time for each part that is not left out, and more in every round."""

    def __init__(self, drift=0.0):
        self.out, self.rounds, self.drift, self.order = 0, 0, drift, []

    @contextmanager
    def without(self, count):
        self.out = count
        yield
        self.out = 0

    def seconds(self):
        self.order.append(self.out)
        self.rounds += self.out == 0
        return (sum(list(KNOWN.values())[self.out :]) + LEFT) * (1 + self.drift * self.rounds) / 1e6

    def cases(self):
        names = ["token", *KNOWN]
        return {name: lambda count=count: self.without(count) for count, name in enumerate(names)}


def test_known_parts_are_recovered():
    machine = Machine()
    times = breaking.step_times(machine.cases(), machine.seconds, rounds=3, budget_s=60)
    assert machine.order == [0, 1, 2, 3, 4] * 4  # the cases take turns; the first round is dropped
    parts = breaking.parts_of(times)
    assert {name: value for name, (value, _, _) in parts.items() if name in KNOWN} == pytest.approx(KNOWN)
    assert parts["what is left"][0] == pytest.approx(LEFT)
    assert all(len(samples) == 3 for _, samples, _ in parts.values())


def test_parts_add_up_even_where_the_machine_drifts():
    machine = Machine(drift=0.05)
    times = breaking.step_times(machine.cases(), machine.seconds, rounds=5, budget_s=60)
    parts = {name: value for name, (value, _, _) in breaking.parts_of(times).items()}
    assert sum(parts.values()) - parts["token"] == pytest.approx(parts["token"], rel=1e-12)


def test_rounds_end_with_the_budget_but_two_are_made():
    machine = Machine()
    times = breaking.step_times(machine.cases(), machine.seconds, rounds=50, budget_s=0.0)
    assert {len(row) for row in times.values()} == {2}


def test_a_tree_has_only_products_and_the_rest():
    parts = breaking.parts_of({"token": [10.0, 12.0], "casts": [7.0, 9.0], "products": [4.0, 4.0]})
    assert {name: value for name, (value, _, _) in parts.items()} == {
        "token": 11.0,
        "casts": 3.0,
        "products": 4.0,
        "all but products": 4.0,
    }


def group(**launches):
    config = {"model": TINY, "bits": 4, "dtype": "fp16", "lm_head": "fp16", "read_gbps": 3000.0, "run": "r"}
    config |= {"stage": "graph", "context": 262.0}
    parts = {**KNOWN, "what is left": LEFT, "token": sum(KNOWN.values()) + LEFT}
    counted = {"products": launches.get("products"), "what is left": launches.get("left")}
    return [
        records.measured(
            "token_part", [us], "codebook", {**config, "part": name, "launches": counted.get(name)}, CARD, {}
        )
        for name, us in parts.items()
    ]


def launch(us):
    return records.measured("launch_time", [us], "nothing", {"chain": "alone"}, CARD, {})


@pytest.mark.parametrize(("products", "left"), [(129, 200), (129, 0)])
def test_products_and_the_rest_are_split_without_a_remainder(products, left):
    shape, rows = MODELS["llama-2-7b"], group(products=products, left=left)
    made = breaking.derived_parts(rows, shape, launch(0.9))
    by_part = {r.config["part"]: r for r in made}
    assert len(by_part) == len(made)
    nbytes = waterfall.product_bytes("codebook", 4, "fp16", "fp16", shape)
    for part, count in nbytes.items():
        assert by_part[part].value == pytest.approx(count / 3e6) and by_part[part].kind == "derived"
    assert by_part["launches"].value == pytest.approx(0.9 * (products + left))
    assert by_part["dispatch"].value == pytest.approx(LEFT - 0.9 * left)
    own = sum(by_part[p].value for p in (*nbytes, "kernel efficiency"))
    assert own == pytest.approx(KNOWN["products"] - 0.9 * products)
    waterfall.find([*rows, *made]).checked(1e-9)


def test_launches_are_at_most_what_is_left_and_unknown_ones_are_dispatch():
    shape = MODELS["llama-2-7b"]
    rows = group(products=100, left=900)
    many = {r.config["part"]: r.value for r in breaking.derived_parts(rows, shape, launch(0.9))}
    assert many["launches"] == pytest.approx(90 + LEFT) and many["dispatch"] == 0
    for rows, empty in ((group(), launch(0.9)), (group(products=100, left=200), None)):
        made = {r.config["part"]: r for r in breaking.derived_parts(rows, shape, empty)}
        assert "launches" not in made and made["dispatch"].value == LEFT
        assert made["dispatch"].kind == "measured"
        waterfall.find([*rows, *made.values()]).checked(1e-9)


def test_a_step_on_the_cpu_is_taken_apart():
    rows = bench.breakdown(TINY, "cpu", profile="smoke", methods=("fp32", "codebook"))
    taken_apart = waterfall.runs(rows)
    assert [(r.token.method, r.token.config["stage"]) for r in taken_apart] == [
        (method, stage) for method in ("fp32", "codebook") for stage in stages("cpu")
    ]
    for run in taken_apart:
        run.checked(1e-9)
    lean = waterfall.find(rows, "codebook", stage="lean")
    assert {p.label for p in lean.parts} == {
        "ideal bytes", "codebook overhead", "output head", "kernel efficiency", "dispatch",
        "attention and cache", "norms", "sampling",
    }  # fmt: skip
    assert lean.token.config["read_gbps"] > 0 and lean.token.n >= 2
    naive = waterfall.find(rows, "codebook", stage="naive")
    assert {"casts", "all but products"} <= {p.label for p in naive.parts}
    steps = waterfall.compare(taken_apart[0], lean)
    assert sum(s.us for s in steps[:-1]) == pytest.approx(lean.us)


def test_without_casts_only_the_casts_go():
    from trapetum.bench.variants import codebook_variant
    from trapetum.decode import Engine
    from trapetum.swap import codebook_layers

    loaded = codebook_variant(TINY, "cpu", "fp32").loaded
    engine = Engine(loaded, "naive", 32)
    _, layer = next(iter(codebook_layers(loaded.model)))
    seen = []
    layer.register_forward_pre_hook(lambda module, _: seen.append(module.casts))
    tokens = engine.generate([1, 2], 3).tokens
    with engine.without("casts"):
        assert engine.generate([1, 2], 3).tokens == tokens
    assert engine.generate([1, 2], 3).tokens == tokens
    assert seen == [True] * 3 + [False] * 3 + [True] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_a_gpu_is_taken_apart():
    rows = bench.breakdown("builtin", "cuda", profile="smoke", methods=("fp16", "codebook"), new_tokens=128)
    assert not [r for r in rows if r.quantity == "call_accepted"]
    assert {r.config["chain"] for r in rows if r.quantity == "launch_time"} == {"alone", "pdl"}
    taken_apart = waterfall.runs(rows)
    assert [r.token.config["stage"] for r in taken_apart] == [*stages("cuda"), *stages("cuda")]
    for run in taken_apart:
        run.checked(1e-9)
    graphs = [r for r in taken_apart if r.token.config["stage"] not in breaking.TREES]
    assert all(run.of("launches") > 0 and run.of("attention and cache") > 0 for run in graphs)
    assert [s.label for s in waterfall.compare(taken_apart[0], taken_apart[-1])]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_parts_explain_the_decode_of_a_graph():
    model = dict(model_name="random:llama-0.9b", device="cuda", stages=["graph"], methods=("codebook",))
    off = []
    for _ in range(ATTEMPTS):
        (speed, *_) = bench.decode(**model, profile="smoke", new_tokens=256)
        parts = bench.breakdown(**model, profile="smoke", new_tokens=256)
        run = waterfall.find(parts, "codebook", stage="graph")
        assert run.token.config["context"] == speed.config["context"]
        off.append(sum(p.us for p in run.parts) * speed.value / 1e6 - 1)
        if abs(off[-1]) <= 0.03:
            return
    pytest.fail(
        f"in {ATTEMPTS} attempts the parts were off the decode by {', '.join(f'{o:+.1%}' for o in off)}"
    )
