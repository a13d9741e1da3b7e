"""The tuner: who wins, who is refused, what is stored; on made-up times here, end to end on a GPU."""

import json
from dataclasses import dataclass

import pytest
import torch
from typer.testing import CliRunner

from trapetum import cuda, gemv_plans, plans, shapes, timing, tuning
from trapetum.cli import app

CASE = tuning.Case(4096, 4096, 4)


@dataclass(frozen=True)
class Plan:
    warps: int
    ahead: int = 1


class Made:
    """A product whose times are made up: `us[warps]` is a list of measurements, the last one repeats."""

    def __init__(self, us, outputs=None, refuses=(), kind=RuntimeError):
        self.us, self.outputs, self.refuses, self.kind = us, outputs or {}, refuses, kind
        self.timed = []

    def output(self, plan):
        if plan.warps in self.refuses:
            raise self.kind("CUDA refused the launch with 64 warps\nand more")
        return torch.tensor(self.outputs.get(plan.warps, [1.0, 2.0, 3.0]))

    def time_us(self, plan):
        before = self.timed.count(plan)
        self.timed.append(plan)
        measurements = self.us[plan.warps]
        return list(measurements[min(before, len(measurements) - 1)])


def steady(us, spread=0.001):
    return [[us * (1 + spread * k / 4) for k in (-2, -1, 0, 1, 2)]]


def tuned(product, *others):
    return tuning.tune_case(CASE, Plan(32), [Plan(n) for n in others], product)


def test_the_fastest_candidate_wins():
    product = Made({32: steady(10.0), 16: steady(9.0), 8: steady(8.0), 4: steady(11.0)})
    found = tuned(product, 16, 8, 4)
    assert found.plan == Plan(8) and found.tried == 4 and found.refused == []
    assert found.default_us == pytest.approx(10.0) and found.best_us == pytest.approx(8.0)


def test_one_per_cent_is_not_enough():
    assert tuned(Made({32: steady(10.0), 16: steady(9.92)}), 16).plan is None
    assert tuned(Made({32: steady(10.0), 16: steady(9.88)}), 16).plan == Plan(16)


@pytest.mark.parametrize("noisy", [16, 32])
def test_a_gain_within_the_spread_is_none(noisy):
    us = {32: steady(10.0), 16: steady(9.5)}
    us[noisy] = steady(us[noisy][0][2], spread=0.2)
    found = tuned(Made(us), 16)
    assert found.plan is None and found.best_us == found.default_us


def test_a_lucky_measurement_does_not_win():
    """The candidate is picked by its first time and judged by the later ones."""
    assert tuned(Made({32: steady(10.0), 16: steady(5.0) + steady(10.0)}), 16).plan is None


def test_the_last_measurements_take_turns():
    product = Made({32: steady(10.0), 16: steady(9.0)})
    tuned(product, 16)
    assert product.timed[-4:] == [Plan(32), Plan(16)] * 2


def test_nobody_is_timed_against_itself():
    product = Made({32: steady(10.0)})
    found = tuned(product, 32, 32)
    assert product.timed == [Plan(32)] and found.plan is None and found.tried == 1


@pytest.mark.parametrize("output", [[1.0, 2.0, 3.1], [1.0, 2.0, float("nan")], [1.0, float("inf"), 3.0]])
def test_a_wrong_result_is_not_timed(output):
    product = Made({32: steady(10.0), 16: steady(1.0), 8: steady(9.0)}, outputs={16: output})
    found = tuned(product, 16, 8)
    assert Plan(16) not in product.timed and found.plan == Plan(8)
    assert [plan for plan, _ in found.refused] == [Plan(16)] and "off the default's" in found.refused[0][1]


def test_a_result_within_rounding_is_timed():
    product = Made({32: steady(10.0), 16: steady(9.0)}, outputs={16: [1.0005, 2.0, 3.001]})
    assert tuned(product, 16).plan == Plan(16)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_launch_that_is_refused_is_passed_over(kind):
    product = Made({32: steady(10.0), 8: steady(9.0)}, refuses=(64,), kind=kind)
    found = tuned(product, 64, 8)
    assert found.plan == Plan(8)
    assert found.refused == [(Plan(64), "CUDA refused the launch with 64 warps")]


def test_a_default_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="64 warps"):
        tuning.tune_case(CASE, Plan(64), [], Made({}, refuses=(64,)))


def test_tune_keeps_winners_and_says_a_table():
    cases = [tuning.Case(4096, 4096, 4), tuning.Case(4096, 11008, 4, rows=2)]
    times = {cases[0]: {32: steady(10.0), 16: steady(9.0)}, cases[1]: {32: steady(10.0), 16: steady(12.0)}}
    kept, said = [], []
    found = tuning.tune(
        cases,
        lambda case: [Plan(32), Plan(16), Plan(64)],
        lambda case: Made(times[case], refuses=(64,)),
        lambda case, plan: kept.append((case, plan)),
        said.append,
    )
    assert kept == [(cases[0], Plan(16)), (cases[1], None)]
    assert [tuned.plan for tuned in found] == [Plan(16), None]
    assert said[0].split() == "in x out bits rows default us best us tried plan".split()
    assert said[1].split() == "4096 x 4096 4 1 10.00 9.00 2 warps 16, ahead 1".split()
    assert "not timed" in said[2] and "64 warps" in said[2]
    assert said[3].split() == "4096 x 11008 4 2 10.00 10.00 2 the default".split()


def test_the_matrices_of_a_model_are_alone_and_fused():
    found = tuning.shapes_of(shapes.model("llama-3-8b"))
    assert {(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)} <= set(
        found
    )  # q and o, k and v, gate, down
    assert {(4096, 6144), (4096, 28672)} <= set(found)  # qkv, gate and up
    assert len(found) == len(set(found)) == 6


def test_winners_are_stored_under_the_key_that_the_kernel_looks_up(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAPETUM_CACHE", str(tmp_path))
    plans.forget()
    monkeypatch.setattr(cuda, "why_not", lambda: "")
    monkeypatch.setattr(cuda, "room_of", lambda device: 32)
    monkeypatch.setattr(cuda, "plan_key", lambda device, *sizes: plans.Key(f"card {device}", "sha", *sizes))
    monkeypatch.setattr(gemv_plans, "plan_for", lambda *sizes: Plan(sizes[-1]))
    monkeypatch.setattr(gemv_plans, "candidates", lambda *sizes: [Plan(16), Plan(sizes[-1])])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    fast = {32: steady(10.0), 16: steady(9.0)}
    monkeypatch.setattr(tuning, "CudaProduct", lambda case: Made(fast))
    assert (
        len(tuning.tune_cuda([(64, 96), (64, 96)], (4, 2), (1, 3))) == 4
    )  # a shape given twice is tuned once
    plans.forget()
    assert plans.load_as(Plan, plans.Key("card 1", "sha", 64, 96, 2, 3)) == Plan(16)
    fast[16] = steady(11.0)  # another day the default is the fastest: the old winner goes
    tuning.tune_cuda([(64, 96)], (2,), (3,))
    plans.forget()
    assert plans.load(plans.Key("card 1", "sha", 64, 96, 2, 3)) is None
    assert plans.load(plans.Key("card 1", "sha", 64, 96, 4, 1)) == {"warps": 16, "ahead": 1}
    plans.forget()


# --- the command ---------------------------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(app, ["tune", *arguments], env={"COLUMNS": "200"})


def test_help_has_an_example():
    assert "Example: trapetum tune --shape 4096x4096" in command("--help").stdout


def test_without_a_gpu_there_is_nothing_to_tune(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = command("--shape", "4096x4096")
    assert result.exit_code == 2
    assert result.stderr.startswith("trapetum: nothing to tune: ") and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "5"], "5 bits cannot be tuned; choose among 2, 3, 4, 8."),
        (["--rows", "0"], "0 rows cannot be tuned; choose 1 to"),
        (["--shape", "4096"], "'4096' is no shape"),
        (["--model", "llama-900b"], "'llama-900b'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    result = command(*arguments)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4])
def test_tuning_on_a_gpu_ends_in_a_plan_that_is_used(tmp_path, monkeypatch, rows):
    """Whatever wins is stored, and `cuda.gemv` without a plan then computes and times what the winner does."""
    monkeypatch.setenv("TRAPETUM_CACHE", str(tmp_path))
    plans.forget()
    said = []
    (found,) = tuning.tune_cuda([(2048, 1024)], (4,), (rows,), said.append)
    assert found.default_us > 0 and found.best_us <= found.default_us and found.tried > 1
    key = cuda.plan_key(torch.cuda.current_device(), 2048, 1024, 4, rows)
    plans.forget()
    assert plans.load_as(cuda.Plan, key) == found.plan
    product = tuning.CudaProduct(found.case)
    if found.plan:
        assert torch.equal(product.output(None), product.output(found.plan))
        again = [timing.Spread.of(product.time_us(plan)).median for plan in (None, found.plan)]
        assert again[0] == pytest.approx(again[1], rel=0.1)
    plans.forget()


@pytest.mark.gpu
def test_the_command_on_a_gpu_prints_json(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAPETUM_CACHE", str(tmp_path))
    plans.forget()
    result = command("--shape", "1024x512", "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["case"] == {"in_features": 1024, "out_features": 512, "bits": 4, "rows": 1}
    plans.forget()
