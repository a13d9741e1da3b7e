"""`trapetum bench` for whole decodes: help with examples, tables, and one sentence for bad input."""

import json

import pytest
from typer.testing import CliRunner

from trapetum import energy
from trapetum.cli import app

runner = CliRunner()
TINY = ("--model", "random:llama-tiny", "--device", "cpu", "--profile", "smoke")


def run(*arguments, code=0):
    result = runner.invoke(app, ["bench", *(str(a) for a in arguments)], env={"COLUMNS": "250"})
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("command", ["accuracy", "context", "agreement", "breakdown", "energy", "quantize"])
def test_help_has_an_example(command):
    assert f"Example: trapetum bench {command}" in run(command, "--help").stdout


def test_decode_takes_the_cache_and_the_head():
    found = json.loads(
        run("decode", *TINY, "--stage", "lean", "--method", "codebook", "--lm-head", "--json").stdout
    )
    assert {r["quantity"] for r in found} == {"decode_speed", "time_to_first_token", "decode_memory"}
    assert all(r["config"]["lm_head"] == "codebook" for r in found)


def test_a_cache_that_the_stage_does_not_know_is_a_row():
    table = run("decode", *TINY, "--stage", "lean", "--method", "codebook", "--kv", "int8").stdout
    assert "call_accepted" in table and "decode_speed" not in table and "int8" in table


def test_quantizing_is_timed_by_phase():
    found = json.loads(run("quantize", *TINY, "--method", "rtn", "--method", "lnq-guided", "--json").stdout)
    assert [(r["quantity"], r["method"]) for r in found] == [
        ("quantize_time", m) for m in ("rtn", "lnq-guided")
    ]
    quick, guided = (r["config"] for r in found)
    assert quick["calibration_tokens"] == 0 and guided["calibration_tokens"] == 128
    assert {"gradients", "statistics", "quantize"} <= set(guided["phases"])
    for r in found:
        assert 0 < sum(r["config"]["phases"].values()) <= r["value"]


def test_context_and_breakdown_print_tables():
    assert "context_speed" in run("context", *TINY, "--context", 64, "--method", "codebook").stdout
    said = run("breakdown", *TINY, "--stage", "lean", "--method", "fp32", "--method", "codebook").stdout
    assert "attention and cache" in said
    bridge = [line for line in said.splitlines() if line.lstrip().startswith(("+", "-"))]
    assert bridge[0].endswith("fp32, lean (measured)") and bridge[-1].endswith(
        "4-bit codebook, lean (measured)"
    )
    steps = [float(line.split(" us  ")[0]) for line in bridge]
    assert sum(steps[:-1]) == pytest.approx(steps[-1], abs=1)


def test_agreement_prints_shares_and_errors():
    said = run("agreement", *TINY, "--stage", "lean", "--prompts", 2, "-n", 4).stdout
    assert said.count("token_agreement") == 2 and said.count("logit_error") == 2


def test_accuracy_saves_each_rung_and_takes_its_options(tmp_path, monkeypatch):
    from trapetum import bench, records
    from trapetum.bench.recording import Recorder

    kept, seen = tmp_path / "kept.jsonl", []

    def rungs(*arguments):
        seen.append(arguments)
        for method in ("fp", "lnq"):
            recorder = Recorder("cpu", "smoke")
            recorder.add("perplexity", [20.0], method, {"model": "tiny", "bits": 4, "window": 64})
            yield recorder.close()
            assert len(records.load(kept).records) == (1 if method == "fp" else 2)  # before the next rung

    monkeypatch.setattr(bench, "accuracy_by_rung", rungs)
    words = ("--text", "a.txt", "--stress", "--seeds", 2, "--window", 64, "--stride", 32, "--tokens", 100)
    more = ("--method", "lnq", "--bits", 3, "--calibrate", "b.txt", "--profile", "smoke", "--device", "cpu")
    said = run("accuracy", "--model", "out/tiny", *words, *more, "--save", kept)
    expected = ("out/tiny", "cpu", ["lnq"], [3], "smoke", "a.txt", True, 2, 64, 32, 100, "b.txt")
    assert (
        seen == [expected]
        and "perplexity" in said.stdout
        and "lnq, 4 bits: perplexity 20.0000" in said.stderr
    )


def test_accuracy_refuses_an_unknown_method():
    said = run("accuracy", "--model", "builtin", "--method", "gptqq", "--device", "cpu", code=2)
    assert said.stderr.startswith("trapetum: no method 'gptqq' on the ladder")


def test_energy_without_a_counter_is_one_sentence(monkeypatch):
    def none(device):
        raise energy.NoEnergyCounter("there is no counter.")

    monkeypatch.setattr(energy, "find_counter", none)
    said = run("energy", *TINY, code=2).stderr
    assert said.strip() == "trapetum: energy cannot be measured here: there is no counter."


@pytest.mark.parametrize("command", ["decode", "context", "agreement", "breakdown"])
def test_an_unknown_cache_format_is_one_sentence(command):
    said = run(command, *TINY, "--kv", "int2", "--stage", "lean", code=2).stderr.strip().splitlines()[-1]
    assert said == "trapetum: the cache format 'int2' is unknown; the formats are fp16, int8, int4."
