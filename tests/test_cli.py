"""The command line: help with examples, results as JSON, one sentence and exit code 2 for bad input."""

import json

import pytest
from typer.testing import CliRunner

from trapetum.cli import app

runner = CliRunner()
COMMANDS = [
    ["doctor"],
    ["report"],
    ["bench", "gemv"],
    ["bench", "bandwidth"],
    ["bench", "decode"],
    ["bench", "batch"],
    ["bench", "dequant"],
    ["bench", "token"],
    ["bench", "ladder"],
    ["bench", "crosscheck"],
    ["bench", "profile"],
    ["tune"],
    ["quantize"],
    ["generate"],
    ["perplexity"],
    ["verify"],
]


def run(*arguments, code=0):
    result = runner.invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(command):
    assert f"Example: trapetum {' '.join(command)}" in run(*command, "--help").stdout


def test_version():
    from trapetum import __version__

    assert __version__ in run("--version").stdout


def test_doctor_tells_the_machine_and_reasons():
    told = json.loads(run("doctor", "--json").stdout)
    assert told["device"]["name"]
    assert all(c["why"] for c in told["capabilities"] if not c["available"])
    assert "C compiler" in run("doctor").stdout


def test_bench_gemv_prints_a_table_and_json(tmp_path):
    saved = tmp_path / "records.jsonl"
    arguments = [
        "bench",
        "gemv",
        "--shape",
        "256x128",
        "--profile",
        "smoke",
        "--device",
        "cpu",
        "--l2",
        "warm",
    ]
    found = json.loads(run(*arguments, "--json", "--save", saved).stdout)
    times = [r for r in found if r["quantity"] == "gemv_time"]
    assert {"codebook", "linear-fp32"} <= {r["method"] for r in times}
    assert all(r["config"]["in_features"] == 256 and r["value"] > 0 for r in times)
    assert len(saved.read_text().splitlines()) == len(found)
    assert "gemv_time" in run(*arguments).stdout


def test_quantize_generate_perplexity(tmp_path):
    out = tmp_path / "quantized"
    assert "layers, 4 bits, kmeans" in run("quantize", "builtin", out, "--device", "cpu").stdout
    said = run("generate", out, "--prompt", "Return the", "-n", 8, "--device", "cpu").stdout
    assert said.startswith("Return the") and "tok/s" in said and "GB/s" in said and "J/token" in said
    told = json.loads(run("perplexity", out, "--max-tokens", 1024, "--device", "cpu", "--json").stdout)
    assert told["window"] == 512 and told["stride"] == 256 and 1 < told["value"] < 4096


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "gemv", "--shape", "4096"], "'4096' is no shape; write in x out, e.g. 4096x11008."),
        (["bench", "gemv", "--l2", "tepid"], "--l2 is 'tepid'; choose cold, warm or both."),
        (["report", "--profile", "huge"], "'huge' is unknown"),
        (["report", "--only", "55"], "there is no chapter 55"),
        (["generate", "no/such/directory/here"], "no directory 'no/such/directory/here'"),
        (["quantize", "builtin", "out", "--method", "magic"], "no quantization method 'magic'"),
        (["perplexity", "builtin", "--text", "missing.txt"], "missing.txt"),
        (["perplexity", "builtin", "--text", "a", "--dataset", "b"], "give --text or --dataset, not both."),
        (["generate", "random:llama-900b"], "llama-900b"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    result = run(*arguments, code=2)
    said = result.stderr.strip().splitlines()[-1]  # a progress bar may stand before it
    assert said.startswith("trapetum: ") and message in said
    assert "Traceback" not in result.output
