"""A few rows at once, shapes from a config, and the comparison with Triton's timers."""

import json
import sys
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from trapetum import bench, figures, records, timing
from trapetum.bench import crosscheck, products, reading
from trapetum.bench.recording import Recorder
from trapetum.cli import app
from trapetum.shapes import GEMV_SHAPES, MODELS

SHAPE = (256, 128)
CODED = ("codebook", "codebook-exact", "dequantize-linear", "dequantize-linear-bf16", "read")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


@pytest.fixture(autouse=True, scope="module")
def small_rotations():
    """Rotations of a megabyte: these tests look at the records, not at the speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "rotation_bytes", lambda device, cache=None: 1 << 20)
        patch.setattr(reading, "_known_gbps", {"cpu": 1e4, "cuda": 1e4})
        yield


# Products of several rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 17])
def test_every_method_is_right_for_several_rows(device, rows):
    for method in (*bench.methods_on(device), "dequantize-linear", "dequantize-linear-bf16"):
        for bits in (8, 4, 3, 2) if method in CODED else (4,):
            matrix = products.weights(method, *SHAPE, bits, device)
            if matrix.most_rows and rows > matrix.most_rows:
                with pytest.raises(products.NotPossible, match=f"takes 1 row of x at most, not {rows}"):
                    matrix.at(rows)
                continue
            product = matrix.at(rows)
            error = product.checked_error()
            assert (error is None) == (method == "read")
            assert error is None or product.reference.shape == (rows, SHAPE[1])


def test_more_rows_than_a_kernel_takes_are_several_launches():
    matrix = products.weights("codebook", *SHAPE, 4, "cpu")
    assert matrix.at(4).config["launches"] == 4 and "launches" not in matrix.at(1).config
    assert "launches" not in products.weights("linear-fp32", *SHAPE, 4, "cpu").at(4).config


def test_bytes_of_several_rows_are_the_weights_once_and_every_row():
    matrix = products.weights("linear-fp32", *SHAPE, 4, "cpu")
    one, four = matrix.at(1), matrix.at(4)
    assert one.weight_bytes == four.weight_bytes == 4 * SHAPE[0] * SHAPE[1]
    assert four.io_bytes == 4 * one.io_bytes == 16 * sum(SHAPE)


def test_a_wrong_row_is_noticed():
    product = products.weights("codebook", *SHAPE, 4, "cpu").at(3)
    spoiled = product.reference.clone()
    spoiled[2] *= 1.1
    object.__setattr__(product, "reference", spoiled)
    with pytest.raises(ArithmeticError, match="codebook is off"):
        product.checked_error()


# The comparison


@pytest.fixture(scope="module")
def cpu_batches(small_rotations):
    return bench.small_batches("cpu", [SHAPE], (1, 2, 4), profile="smoke")


def test_every_method_is_timed_at_every_number_of_rows(cpu_batches):
    found = {(r.method, r.config["rows"]) for r in cpu_batches}
    from trapetum.bench.batch import CPU_BATCH

    assert found == {(m, n) for m in CPU_BATCH for n in (1, 2, 4)}
    assert {(r.quantity, r.config["rows"] == 1) for r in cpu_batches} == {
        ("gemv_time", True),
        ("gemm_time", False),
    }
    needed = {
        "in_features",
        "out_features",
        "rows",
        "bits",
        "bytes",
        "l2",
        "chain",
        "copies",
        "threads",
        "beside",
    }
    assert all(needed <= r.config.keys() and r.config["l2"] == "cold" for r in cpu_batches)


def test_batches_do_not_replace_the_records_of_single_rows(cpu_batches):
    alone = bench.gemv("cpu", [SHAPE], ["codebook"], [4], ("cold",), "smoke")
    kept = records.latest([*alone, *cpu_batches])
    assert sum(r.quantity == "gemv_time" and r.method == "codebook" for r in kept) == 2
    assert records.select(kept, quantity="gemv_time", method="codebook", beside=None) == [alone[-1]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_a_gpu_have_chains_and_several_launches():
    rows = bench.small_batches("cuda", [(1024, 1024)], (1, 8, 16), profile="smoke")
    ours = {(r.config["rows"], r.config["chain"]): r for r in rows if r.method == "codebook"}
    assert ours.keys() == {(n, c) for n in (1, 8, 16) for c in ("alone", "pdl")}
    assert ours[16, "alone"].config["launches"] == 2 and "launches" not in ours[8, "pdl"].config
    assert {r.method for r in rows} == {"codebook", "dequantize-linear", "linear-fp16", "tinygemm-int4"}


def test_what_cannot_be_done_is_said():
    said = []
    rows = bench.small_batches(
        "cpu", [(100, 64)], (2,), ["torch-int4", "codebook"], profile="smoke", say=said.append
    )
    assert {r.method for r in rows} == {"codebook"}
    assert said == ["torch-int4 left out at 100 x 64: torch-int4 needs in_features in multiples of 128 and out_features "
                    "of 16, not 100 x 64."]  # fmt: skip


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="rows must be 1 or more, not 0"):
        bench.small_batches("cpu", [SHAPE], (0, 1), profile="smoke")


# Crossovers and their figures

H100 = {"name": "NVIDIA H100 80GB HBM3", "arch": "sm_90", "l2_bytes": 50 * 2**20}


def timed(method, rows, us, bits=16, chain="alone", shape=(4096, 4096)):
    config = {"in_features": shape[0], "out_features": shape[1], "rows": rows, "bits": bits, "l2": "cold"}
    config |= {"chain": chain, "bytes": shape[0] * shape[1] * bits // 8, "beside": "batch"}
    quantity = "gemv_time" if rows == 1 else "gemm_time"
    return records.measured(quantity, [us] * 3, method, config, H100, {}, commit="abc", dirty=False)


def h100_batches():
    made = []
    for rows, kernel in ((1, 6.0), (4, 6.5), (8, 8.0), (16, 16.0), (32, 32.0)):
        made += [timed("codebook", rows, kernel, 4), timed("codebook", rows, kernel - 1.5, 4, "pdl")]
        made += [timed("linear-fp16", rows, 16.5), timed("tinygemm-int4", rows, 7.0, 4)]
        made.append(timed("dequantize-linear", rows, 30.0, 4))
    return made


def test_the_crossover_is_where_the_rival_is_faster_and_stays_so():
    found = {c.rival.method: c for c in figures.crossovers(h100_batches())}
    assert found.keys() == {"linear-fp16", "dequantize-linear"}  # tinygemm's weights are no dense ones
    assert found["dequantize-linear"].rows == found["linear-fp16"].rows == 32
    assert found["linear-fp16"].fewest == 1 and found["linear-fp16"].most == 32
    once = [timed("codebook", n, us, 4) for n, us in ((1, 9.0), (2, 4.0), (4, 20.0))]
    rival = [timed("linear-fp16", n, 8.0) for n in (1, 2, 4)]
    assert [c.rows for c in figures.crossovers([*once, *rival])] == [4]
    assert [c.rows for c in figures.crossovers([*once[:2], *rival])] == [None]
    assert [c.rows for c in figures.crossovers([*once[:1], *rival])] == [1]


def test_crossovers_are_of_one_device_shape_and_width():
    other = [timed("linear-fp16", n, 0.1, shape=(8192, 8192)) for n in (1, 2)]
    assert figures.crossovers([timed("codebook", 1, 5.0, 4), *other]) == []
    assert figures.crossovers([timed("codebook", 1, 5.0, 4), timed("dequantize-linear", 1, 1.0, 2)]) == []
    assert figures.crossovers(bench_free_of_batches()) == []


def bench_free_of_batches():
    config = {"in_features": 1, "out_features": 1, "rows": 2048}
    return [records.measured("gemm_time", [1.0], "linear-fp16", config, H100, {}, commit="a", dirty=False)]


def test_dense_matrices_made_from_different_codes_are_told_apart():
    made = [timed("codebook", n, 9.0, b) for n in (1, 2) for b in (4, 2)]
    made += [timed("dequantize-linear-bf16", n, us, b) for n in (1, 2) for b, us in ((4, 5.0), (2, 50.0))]
    assert {(c.kernel.config["bits"], c.rows) for c in figures.crossovers(made)} == {(4, 1), (2, None)}
    assert (
        "dequantize-linear-bf16 from 4-bit is faster at all of 1 to 2 rows"
        in figures.crossover_sentences(made)[0]
    )


def test_crossovers_in_words():
    (sentence,) = figures.crossover_sentences(h100_batches())
    assert sentence.startswith("4096 x 4096, codebook 4-bit on H100 80GB: ")
    assert "linear-fp16 is faster from 32 rows on" in sentence
    few = [r for r in h100_batches() if r.config["rows"] < 16]
    assert "faster at no number of rows from 1 to 8" in figures.crossover_sentences(few)[0]
    assert figures.crossover_sentences([]) == []


def test_the_figure_has_a_line_a_method_and_the_roof():
    figure = figures.batch_times(h100_batches(), 3190.0)
    named = {t.name: t for t in figure.data}
    assert {
        "codebook 4-bit",
        "codebook 4-bit (pdl)",
        "linear-fp16",
        "ideal: codes at the roof",
    } <= named.keys()
    assert list(named["codebook 4-bit"].x) == [1, 4, 8, 16, 32]
    assert named["ideal: codes at the roof"].y[0] == pytest.approx(4096 * 4096 / 2 / 3190e3)
    (note,) = [a for a in figure.layout.annotations if a.text == "dequantize from 32"]
    assert note.x == pytest.approx(1.505, abs=1e-3)  # a logarithm, as annotations are placed on such an axis
    two = figures.batch_times([*h100_batches(), timed("codebook", 1, 5.0, 4, shape=(8192, 8192))])
    assert {t.xaxis for t in two.data if t.name == "codebook 4-bit"} == {"x", "x2"}


def test_the_map_crosses_what_loses():
    figure = figures.batch_map(h100_batches())
    (heat,) = figure.data
    assert list(heat.y) == ["4096 x 4096, codebook 4-bit", "4096 x 4096, codebook 4-bit (pdl)"]
    assert list(heat.x) == ["1", "4", "8", "16", "32"]
    assert heat.text[0][0] == "2.75" and heat.text[0][-1] == "0.52 ✗"


@pytest.mark.parametrize("draw", [figures.batch_times, figures.batch_map])
def test_without_records_a_figure_says_so(draw):
    assert "No product of several rows" in draw(bench_free_of_batches()).layout.annotations[0].text


# Shapes of a config


def test_shapes_of_a_named_model_are_its_matrices_once():
    assert bench.shapes_of("random:llama-2-7b") == bench.shapes_of("llama-2-7b")
    assert bench.shapes_of("llama-2-7b") == [(4096, 4096), (4096, 11008), (11008, 4096), (4096, 32000)]
    every = set(bench.shapes_of("llama-2-7b"))
    assert every - set(GEMV_SHAPES) == {(4096, 32000)}


def test_shapes_of_a_config_file(tmp_path):
    from trapetum.models import config_of

    config_of(MODELS["llama-tiny"]).save_pretrained(tmp_path)
    found = bench.shapes_of(str(tmp_path))
    assert found == bench.shapes_of(str(tmp_path / "config.json")) == bench.shapes_of("llama-tiny")


def test_shapes_of_another_architecture(tmp_path):
    from transformers import Qwen2Config

    config = Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert set(bench.shapes_of(str(tmp_path))) == {(64, 64), (64, 32), (64, 96), (96, 64), (64, 128)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no config.json that transformers understands"),
        ("[]", "no config.json that transformers understands"),
        ('{"model_type": "abacus"}', "abacus"),
        ('{"model_type": "vit"}', "names no language model"),
    ],
)
def test_a_config_that_is_none_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        bench.shapes_of(str(path))
    assert "\n" not in str(caught.value)


def test_a_config_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="config.json is no config.json"):
        bench.shapes_of(str(tmp_path))


# Triton's timers


@pytest.fixture
def triton(monkeypatch):
    """A GPU's timers without a GPU: 8 us between events, 4 us repeated from the cache, 6 us in our graph."""
    testing = ModuleType("triton.testing")
    testing.do_bench = lambda call, return_mode: [0.008, 0.0081] if call() is not None else None
    testing.do_bench_cudagraph = lambda call, return_mode: [0.004] * 3
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.testing", testing)
    monkeypatch.setattr(crosscheck.machine, "choose_device", lambda device: "cuda")
    monkeypatch.setattr(crosscheck, "Recorder", lambda device, profile: Recorder("cpu", profile))
    monkeypatch.setattr(Recorder, "cache_bytes", property(lambda self: 50_000_000))
    monkeypatch.setattr(timing, "free_bytes", lambda device: 1 << 34)
    monkeypatch.setattr(timing, "cuda_graph_us", lambda calls, repeats: [6.0, 6.1, 5.9])
    make = crosscheck.make_product
    monkeypatch.setattr(
        crosscheck, "make_product", lambda method, i, o, bits, device: make(method, i, o, bits, "cpu")
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    monkeypatch.setattr(crosscheck.machine, "provenance", lambda device: {
        "device": H100, "software": {}, "commit": "abc", "dirty": False
    })  # fmt: skip
    monkeypatch.setattr(crosscheck.machine, "after", lambda device: device)
    return testing


def test_timers_are_told_apart(triton):
    monkey = bench.compare_timers("cuda", SHAPE, profile="smoke")
    found = {(r.method, r.config["timer"]): r for r in monkey}
    assert found.keys() == {(m, t) for m in ("codebook", "linear-fp16") for t in crosscheck.CACHE}
    assert found["codebook", "do_bench"].value == pytest.approx(8.05)
    assert found["codebook", "do_bench_cudagraph"].value == pytest.approx(4.0)
    assert {r.config["l2"] for r in monkey} == {"cold", "flushed", "repeated"}
    assert "bytes" not in found["codebook", "do_bench_cudagraph"].config
    assert all(r.config["beside"] == "crosscheck" for r in monkey)


def test_the_difference_is_explained_with_its_numbers(triton):
    sentences = crosscheck.explain(bench.compare_timers("cuda", SHAPE, profile="smoke"))
    assert len(sentences) == 5
    assert "do_bench says 8.05 us, the graph 6.00" in sentences[0] and "+2.05 us" in sentences[0]
    assert "0.67 times the graph" in sentences[1] and "times the cache, not the memory" in sentences[1]
    assert (
        sentences[-1]
        == "codebook over linear-fp16: 1.00 (graph), 1.00 (do_bench), 1.00 (do_bench_cudagraph) times as fast."
    )
    assert crosscheck.explain([]) == []


def test_without_triton_or_a_gpu_it_is_one_sentence(monkeypatch):
    monkeypatch.setattr(crosscheck.machine, "choose_device", lambda device: "cpu")
    with pytest.raises(RuntimeError, match="there is no GPU here"):
        bench.compare_timers()
    monkeypatch.setattr(crosscheck.machine, "choose_device", lambda device: "cuda")
    monkeypatch.setitem(sys.modules, "triton.testing", None)
    with pytest.raises(RuntimeError, match="Triton's timers cannot be imported"):
        bench.compare_timers()


# The command line

runner = CliRunner()


def run(*arguments, code=0):
    result = runner.invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("command", ["batch", "dequant", "token", "crosscheck"])
def test_help_has_an_example(command):
    assert f"Example: trapetum bench {command}" in run(command, "--help").stdout


def test_batch_prints_the_crossover_and_json():
    asked = [
        "batch",
        "--shape",
        "256x128",
        "--rows",
        "1",
        "--rows",
        "2",
        "--profile",
        "smoke",
        "--device",
        "cpu",
    ]
    asked += ["--method", "codebook", "--method", "linear-fp32"]
    said = run(*asked).stdout
    assert "gemm_time" in said and "256 x 128, codebook 4-bit on" in said.splitlines()[-1]
    assert {r["config"]["rows"] for r in json.loads(run(*asked, "--json").stdout)} == {1, 2}


def test_gemv_takes_the_shapes_of_a_config_once():
    asked = ["gemv", "--config", "llama-tiny", "--shape", "64x64", "--method", "codebook", "--l2", "warm"]
    found = json.loads(run(*asked, "--profile", "smoke", "--device", "cpu", "--json").stdout)
    shapes = [
        (r["config"]["in_features"], r["config"]["out_features"])
        for r in found
        if r["quantity"] == "gemv_time"
    ]
    assert shapes == bench.shapes_of("llama-tiny")


def test_dequant_and_token_print_tables():
    small = ["--profile", "smoke", "--device", "cpu"]
    assert "dequant_bandwidth" in run("dequant", "--shape", "256x128", "--bits", "4", *small).stdout
    assert "linears_time" in run("token", "--model", "llama-tiny", "--method", "codebook", *small).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["batch", "--rows", "0"], "rows must be 1 or more, not 0."),
        (["gemv", "--config", "no/such/config.json"], "no/such/config.json is no config.json"),
        (["token", "--model", "llama-900b"], "llama-900b"),
        (["crosscheck", "--device", "cpu"], "there is no GPU here"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    said = run(*arguments, code=2).stderr.strip().splitlines()
    assert said[-1].startswith("trapetum: ") and message in said[-1]
