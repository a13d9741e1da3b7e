"""The command line: help with examples, results as JSON, one sentence and exit code 2 for bad input."""

import json

import pytest
from typer.testing import CliRunner

from trapetum import bench, generation, quantize_job, swap
from trapetum.cli import app, bench_app
from trapetum.quantizers import METHODS

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
    ["bench", "quantize"],
    ["bench", "context"],
    ["bench", "accuracy"],
    ["bench", "agreement"],
    ["bench", "breakdown"],
    ["bench", "energy"],
    ["bench", "standalone"],
    ["tune"],
    ["quantize"],
    ["import"],
    ["generate"],
    ["export"],
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


def test_every_command_is_among_them():
    named = {
        (*at, c.name or c.callback.__name__)
        for at, group in (((), app), (("bench",), bench_app))
        for c in group.registered_commands
    }
    assert named == {tuple(command) for command in COMMANDS}


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


def test_quantize_names_every_method():
    said = " ".join(run("quantize", "--help").stdout.replace("│", " ").split())
    assert [name for name in METHODS if f" {name}" not in said] == []


def test_quantize_with_calibration(tmp_path):
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("Return the name of the file that was opened, or None. " * 60)
    arguments = [
        "quantize",
        "builtin",
        out,
        "--bits",
        2,
        "--method",
        "kmeans-weighted",
        "--calibrate",
        text,
        "--length",
        64,
    ]
    told = json.loads(run(*arguments, "--sequences", 3, "--device", "cpu", "--json").stdout)
    assert len(told["errors"]) == len(told["output_errors"]) == 49 and told["out"] == str(out)
    said = run(*arguments, "--sequences", 3, "--seed", 5, "--device", "cpu").stdout
    assert f"calibration: 3 sequences of 64 tokens of {text}, seed 5" in said
    assert "49 layers, 2 bits, kmeans-weighted" in said and "mean relative squared output error" in said
    recipe = json.loads((out / "config.json").read_text())["quantization_config"]["recipe"]
    assert recipe["calibration"]["seed"] == 5 and recipe["calibration"]["sequences"] == 3
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_quantize_hands_its_options_on(monkeypatch, tmp_path):
    asked = []
    report = swap.Report({"a": 0.1}, 1.0, 4, 16, "lnq-guided", {"a": 0.2})
    monkeypatch.setattr(quantize_job, "quantize_to", lambda *how: asked.append(how) or (report, tmp_path))
    options = ["--lm-head", "--sequences", 7, "--length", 99, "--seed", 3, "--no-resume", "--outliers", 0.01]
    run("quantize", "a/model", "out", "--calibrate", "wikitext-2", *options, "--device", "cpu")
    assert asked[0][2] == quantize_job.Job(4, "lnq-guided", True, "wikitext-2", 7, 99, 3, False, 0.01)
    run("quantize", "a/model", "out", "--bits", 3, "--device", "cpu")
    assert asked[1][2] == quantize_job.Job(3, "kmeans")


TINY = ["--model", "random:llama-tiny", "--profile", "smoke"]


def test_bench_decode_beside_peers_and_in_turns():
    found = json.loads(run("bench", "decode", *TINY, "--device", "cpu", "--peers", "--json").stdout)
    assert {r["method"] for r in found} >= {"transformers-eager", "tinygemm-int4"}
    only = run("bench", "decode", *TINY, "--device", "cpu", "--peer", "torchao-fp6").stdout
    assert "decode_speed" not in only
    assert (
        "not measured: torchao-fp6, stage compiled: torchao-fp6 is a static cache with a compiled step"
        in only
    )
    turns = json.loads(run("bench", "decode", *TINY, "--interleaved", "--bits", 3, "--json").stdout)
    assert all(r["config"]["interleaved"] for r in turns)
    assert {r["config"]["baseline"] for r in turns if r["quantity"] == "speedup"} >= {
        "transformers-eager best dtype"
    }
    ours = [r for r in turns if r["method"] == "codebook"]
    assert ours and all(r["config"]["bits"] == 3 for r in ours)


def test_bench_standalone_hands_its_options_on(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(bench, "compare_runtimes", lambda *how: asked.append(how) or [])
    options = ["-n", 64, "--rounds", 2, "--kv", "int8", "--keep", tmp_path / "kept", "--bits", 3]
    assert "nothing could be measured" in run("bench", "standalone", *TINY, *options).stdout
    assert asked == [("random:llama-tiny", "smoke", 64, 3, 2, "int8", tmp_path / "kept")]


def test_a_refusal_is_a_sentence():
    arguments = ["bench", "decode", *TINY, "--device", "cpu", "--stage", "lean", "--method", "codebook"]
    said = run(*arguments, "--kv", "int8", "--rows", 2).stdout.splitlines()
    (sentence,) = [line for line in said if line.startswith("not measured: ")]
    assert sentence.startswith(
        "not measured: 4-bit codebook, stage lean, kv int8, rows 2: a cache in int8 and"
    )
    assert not any("error" in line for line in said[:1])


def test_generate_hands_its_options_on(monkeypatch):
    asked = []
    monkeypatch.setattr(generation, "run", lambda *how: asked.append(how) or RESULT)
    options = ["--stage", "pdl", "--kv", "int8", "--rows", 4, "--temperature", 0.5, "--seed", 7]
    said = run("generate", "builtin", *options).stdout
    assert asked[0][3] == generation.How("pdl", "int8", 4, 0.5, 7)
    assert (
        "at stage pdl on cuda, cache in int8, 1.50 tokens a step of 4 rows, temperature 0.5: 3 tokens" in said
    )


RESULT = generation.Result(
    "abc", 3, 0.1, 10.0, 1.0, None, "no counter.", "pdl", "cuda", "builtin", "int8", 4, 0.5, 1.5
)


@pytest.mark.gpu
@pytest.mark.parametrize("how", [generation.How("pdl", rows=4), generation.How("fused", "int8", 1, 0.8, 3)])
def test_generate_with_drafts_and_with_draws(how):
    prompt = "def f(self):\n    return self"
    first, again = (generation.run("builtin", prompt, 48, how, 4, "cuda", lambda _: None) for _ in range(2))
    assert first.text == again.text and 1 <= first.tokens <= 48
    assert 0.5 < first.tokens_a_step <= how.rows  # a few steps are queued beyond the last token
    assert (first.stage, first.kv, first.rows) == (how.stage, how.kv, how.rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "gemv", "--shape", "4096"], "'4096' is no shape; write in x out, e.g. 4096x11008."),
        (["bench", "gemv", "--l2", "tepid"], "--l2 is 'tepid'; choose cold, warm or both."),
        (["report", "--profile", "huge"], "'huge' is unknown"),
        (["report", "--only", "55"], "there is no chapter 55"),
        (["generate", "no/such/directory/here"], "no directory 'no/such/directory/here'"),
        (["quantize", "builtin", "out", "--method", "magic"], "no quantization method 'magic'"),
        (["quantize", "builtin", "out", "--method", "rtn-128"], "rtn-128 keeps a scale and a zero point"),
        (["quantize", "builtin", "out", "--method", "lnq"], "give tokens (--calibrate"),
        (["quantize", "builtin", "out", "--calibrate", "nothing.txt"], "there is no text file 'nothing.txt'"),
        (["quantize", "random:llama-tiny", "out", "--calibrate", "builtin"], "the model has no tokenizer"),
        (["perplexity", "builtin", "--text", "missing.txt"], "missing.txt"),
        (["perplexity", "builtin", "--text", "a", "--dataset", "b"], "give --text or --dataset, not both."),
        (["generate", "random:llama-900b"], "llama-900b"),
        (
            ["generate", "builtin", "--kv", "int2"],
            "the cache format 'int2' is unknown; the formats are fp16, int8, int4.",
        ),
        (
            ["generate", "builtin", "--device", "cpu", "--rows", "4"],
            "steps of 4 rows need the stage fused or pdl, not 'lean'.",
        ),
        (["generate", "builtin", "--device", "cpu", "--temperature", "1"], "the stage 'lean' is greedy"),
        (
            ["bench", "decode", "--peers", "--kv", "int8", "--stage", "graph"],
            "--peers does not take --stage, --kv",
        ),
        (["bench", "decode", "--interleaved", "--device", "cuda"], "--interleaved does not take --device"),
        (
            ["bench", "decode", "--interleaved", "--bits", "4", "--bits", "3"],
            "give --bits once, not 2 times.",
        ),
        (["bench", "decode", "--peer", "magic"], "peer 'magic' is unknown; it is one of"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    result = run(*arguments, code=2)
    said = result.stderr.strip().splitlines()[-1]  # a progress bar may stand before it
    assert said.startswith("trapetum: ") and message in said
    assert "Traceback" not in result.output
