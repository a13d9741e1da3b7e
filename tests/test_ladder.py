"""The ladder: every rung compiles anywhere, is counted where nvdisasm is, and is right on a GPU."""

import re

import pytest
import torch
from typer.testing import CliRunner

from trapetum import bench, build, cuda, disassembly, figures, ladder, records
from trapetum.cli import app
from trapetum.figures import style

ARCHES = ("sm_80", "sm_86", "sm_89", "sm_90")
SHAPES = [(1, 1), (33, 127), (100, 1000), (40, 8192), (4096, 4096)]
OWN = [rung for rung in ladder.ALL if rung.name != ladder.PRODUCT]
each_rung = pytest.mark.parametrize("rung", ladder.ALL, ids=lambda rung: rung.name)
each_own = pytest.mark.parametrize("rung", OWN, ids=lambda rung: rung.name)
gpu = pytest.mark.gpu
counted = pytest.mark.skipif(
    bool(ladder.why_not_counted()), reason=ladder.why_not_counted() or "it can be counted"
)


def test_every_source_is_a_rung():
    sources = {f"ladder/{path.name}" for path in (build.KERNELS / "ladder").iterdir()}
    assert sources == {rung.source for rung in OWN}
    assert len({rung.method for rung in ladder.ALL}) == len(ladder.ALL)


def test_the_rungs_are_lettered_in_order():
    assert [rung.name[:2] for rung in ladder.RUNGS] == [f"{letter}_" for letter in "abcdefg"]
    assert all(rung.is_dead_end for rung in ladder.DEAD_ENDS)
    assert not any(rung.is_dead_end for rung in ladder.RUNGS)


@each_own
def test_the_header_says_formula_layout_change_and_bytes(rung):
    header = build.source_text(rung.source).split("#include")[0]
    for part in ("y[o] = sum_i", "codes[out", "Changed", "Bytes moved per output:"):
        assert part in header, f"{rung.source}: the header lacks {part!r}"
    assert ("Why it lost:" in header) == rung.is_dead_end
    assert not re.search(r"\d (us|GB/s|times faster)\b", header), "measured figures rot in a header"


@pytest.mark.parametrize("arch", ARCHES)
@each_own
def test_compiles_without_spills(rung, arch):
    pytest.importorskip("cuda.bindings.nvrtc")
    resources = build.compile_cuda(rung.source, arch).resources()
    assert set(resources) == {rung.function}
    used = resources[rung.function]
    assert used.spill_bytes == 0 and 0 < used.registers * 32 * rung.warps <= 65536
    assert used.shared_bytes <= ladder._STATIC_SHARED


def test_an_unknown_name_is_one_sentence():
    with pytest.raises(ValueError, match="no rung 'h'; the ladder has a_scalar, b_wide_loads"):
        ladder.find("h")
    with pytest.raises(build.BuildError, match="no kernel source named 'ladder/h.cu' .*ladder/a_scalar.cu"):
        build.compile_cuda("ladder/h.cu", "sm_90")


def test_layouts():
    indices = torch.randint(16, (33, 127), dtype=torch.uint8)
    rows = ladder.pack(indices, ladder.find("a_scalar"))
    assert rows.shape == (33, 64)
    assert torch.equal(torch.stack([rows & 15, rows >> 4], -1).flatten(1)[:, :127], indices)
    tiles = ladder.pack(indices, ladder.find("b_wide_loads"))
    assert torch.equal(tiles, cuda.pack(indices, 4)) and tiles.numel() == 2 * 4 * 512
    for rung in ladder.ALL:
        assert ladder.pack(indices, rung).numel() == ladder.code_bytes(rung, 127, 33)


def test_shared_memory_is_table_and_x():
    in_features = 1000  # 32 steps
    of = {rung.name: ladder.shared_bytes(rung, in_features) for rung in ladder.ALL}
    assert of["a_scalar"] == 0 and of["b_wide_loads"] == of["dead_byte_permute"] == 2 * 1024
    assert of["c_pair_table"] == of["d_mixed_sums"] == 32768 + 2 * 1024
    assert of["e_two_columns"] == of["f_pdl"] == 65536 + 2 * 1024
    assert of["dead_atomics"] == 32768 + 2 * 256
    # 32 KiB of table and 16 KiB of x are 48 KiB, and the sums of the warps come on top
    rung = ladder.find("d_mixed_sums")
    assert ladder.shared_bytes(rung, 8192) > 49152 and ladder.shared_bytes(rung, 4096) == 32768 + 8192
    assert ladder.shared_bytes(rung, 16384) == 65536


def test_x_on_the_cpu_is_refused():
    x, codebook = torch.zeros(8), torch.zeros(1, 16).half()
    with pytest.raises(ValueError, match="d_mixed_sums multiplies one contiguous row of torch.float16"):
        ladder.gemv(ladder.find("d_mixed_sums"), x, torch.zeros(1), codebook)


# Instructions per weight


@counted
@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
def test_each_step_that_changes_the_arithmetic_costs_fewer_instructions(arch):
    loops = {rung.name: ladder.inner_loop(rung, arch) for rung in ladder.ALL}
    of = {name: loop.per_weight() for name, loop in loops.items()}
    steps = [of[rung.name] for rung in ladder.RUNGS]
    assert all(later < 1.02 * earlier for earlier, later in zip(steps, steps[1:], strict=False)), of
    assert steps[-1] < 0.25 * steps[0]
    assert (
        of["dead_register_table"] > of["b_wide_loads"] and of["dead_byte_permute"] > 1.2 * of["d_mixed_sums"]
    )


@counted
@pytest.mark.parametrize("arch", ("sm_80", "sm_90"))
def test_the_counted_loop_is_the_one_over_the_codes(arch):
    """What each rung must execute for a weight, and no more of it: its lookups, reads of x, permutes, conversions."""
    loops = {rung.name: ladder.inner_loop(rung, arch) for rung in ladder.ALL}
    mix = {name: loop.mix() for name, loop in loops.items()}
    code_bytes = {name: loop.code_bytes for name, loop in loops.items()}
    assert code_bytes.pop("a_scalar") % 2 == 0
    assert code_bytes.pop(ladder.PRODUCT) % 16 == 0
    assert code_bytes == {name: 32 if name in ("e_two_columns", "f_pdl") else 16 for name in code_bytes}
    x_reads = 1 / 8  # 16 bytes of x for 8 weights
    assert mix["a_scalar"]["LDS"] == 1 and mix["b_wide_loads"]["LDS"] == 1 + x_reads
    for name in ("c_pair_table", "d_mixed_sums", "f_pdl", "dead_atomics"):
        assert mix[name]["LDS"] == 1 / 2 + x_reads
    assert mix["e_two_columns"]["LDS"] == 1 / 2 + x_reads / 2
    assert mix["dead_byte_permute"]["PRMT"] == 2 and mix["dead_byte_permute"]["LDS"] == x_reads
    assert mix["dead_register_table"]["SEL"] >= 4 and mix["dead_register_table"]["LDS"] == x_reads
    assert mix["c_pair_table"]["FFMA"] == 1 and mix["c_pair_table"]["HADD2"] == 2
    assert "FFMA" not in mix["d_mixed_sums"] and mix["d_mixed_sums"]["HADD2"] == 1 / 4


@counted
def test_instruction_records_are_derived_and_name_their_source():
    found = bench.ladder_instructions("sm_90", ["d_mixed_sums", ladder.PRODUCT])
    assert [r.method for r in found] == ["ladder-d-mixed-sums", "ladder-g-tensor-cores", "codebook"]
    assert all(r.kind == "derived" and r.config["arch"] == "sm_90" and "kernels/" in r.source for r in found)
    first, *product = found
    assert first.kernel_sha256 == build.source_sha256("ladder/d_mixed_sums.cu")
    assert first.value == ladder.inner_loop(ladder.find("d_mixed_sums"), "sm_90").per_weight()
    assert first.config["lookups_per_weight"] == 0.625
    assert product[0].value == product[1].value < first.value


@counted
def test_a_kernel_is_counted_once_for_all_the_shapes_that_it_serves():
    found = bench.ladder_instructions("sm_90", ["c_pair_table"], (64, 4096, 100000))
    assert len(found) == 1


def test_without_nvdisasm_there_are_no_counts_and_a_reason(monkeypatch):
    monkeypatch.setattr(disassembly, "nvdisasm", lambda: None)
    assert bench.ladder_instructions("sm_90") == []
    assert "pip install nvidia-cuda-nvdisasm" in ladder.why_not_counted()


# The bench and the figure


def test_the_bench_needs_a_gpu():
    with pytest.raises(RuntimeError, match="the ladder is one of GPU kernels, and "):
        bench.ladder("cpu", profile="smoke")
    with pytest.raises(ValueError, match="no rung 'nothing'"):
        bench.ladder("cpu", rungs=["nothing"], profile="smoke")


def test_the_command_has_an_example_and_refuses_in_one_sentence():
    runner = CliRunner()
    shown = runner.invoke(app, ["bench", "ladder", "--help"], env={"COLUMNS": "200"}).output
    assert "Example: trapetum bench ladder" in shown
    refused = runner.invoke(app, ["bench", "ladder", "--rung", "nothing"])
    assert refused.exit_code == 2 and refused.stderr.startswith(
        "trapetum: there is no rung 'nothing'; the ladder has"
    )


def time_of(rung, us, chain="alone"):
    config = {"in_features": 4096, "out_features": 4096, "bits": 4, "l2": "cold", "chain": chain}
    config |= {"bytes": 8.5e6, "beside": "ladder"}
    device = {"name": "NVIDIA H100 80GB HBM3", "arch": "sm_90"}
    return records.measured("gemv_time", [us, 1.01 * us, 1.02 * us], rung.method, config, device, {})


def count_of(rung, value):
    device = {"name": "compiled for sm_90", "arch": "sm_90"}
    return records.derived(
        "instructions_per_weight", value, rung.method, {"bits": 4}, device, "a source", "a formula"
    )


def some_records():
    times = [time_of(rung, 20.0 - k) for k, rung in enumerate(ladder.ALL)]
    times.append(time_of(ladder.find("f_pdl"), 4.0, "pdl"))
    return times[::-1], [count_of(rung, 9.0 - k / 2) for k, rung in enumerate(ladder.ALL)]


def test_the_figure_has_three_panels_with_the_rungs_in_order():
    times, counts = some_records()
    figure = figures.rungs(times, counts, 3150.0)
    titles = [figure.layout[axis].title.text for axis in ("xaxis", "xaxis2", "xaxis3")]
    assert titles == ["time, us", "GB/s", "instructions per weight"]
    order = figure.layout.yaxis.categoryarray
    assert order[0] == "a scalar" and order[-1].startswith("dead: ") and "f pdl, chained" in order
    assert list(order).index("f pdl") + 1 == list(order).index("f pdl, chained")
    ideal = next(t for t in figure.data if "ideal" in (t.name or ""))
    assert ideal.x[0] == pytest.approx(8.5e6 / 3150 / 1e3)
    rates = [value for t in figure.data if t.type == "bar" and t.xaxis == "x2" for value in t.x]
    assert len(rates) == len(times)
    fastest = max(rates)
    assert fastest == pytest.approx(8.5e6 / 4.04 / 1e3)
    assert "H100" in figure.layout.title.subtitle.text and "derived" in figure.layout.title.subtitle.text


def test_the_figure_draws_counts_alone_and_says_when_there_is_nothing():
    _, counts = some_records()
    alone = figures.rungs([], counts)
    assert alone.layout.xaxis.title.text == "instructions per weight"
    marks = [t for t in alone.data if t.type == "scatter" and t.y and len(t.y) > 1]
    assert {symbol for t in marks for symbol in t.marker.symbol} == {style.KIND_SYMBOLS["derived"]}
    assert "trapetum bench ladder" in figures.rungs([]).layout.annotations[0].text


def test_words_name_the_first_and_the_fastest_rung():
    times, counts = some_records()
    said = figures.rungs_in_words(times, counts)
    assert "20.2 us on rung a scalar and 4.04 us on f pdl, chained: 5 times" in said
    assert "9.00 instructions on rung a scalar and 6.00 on g tensor cores" in said
    assert "costliest dead end, byte permute, takes 5.50" in said
    assert "sources are all" in figures.rungs_in_words([], [])


# On a GPU


def inputs(out_features, in_features):
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(16, (out_features, in_features), generator=generator, dtype=torch.uint8)
    codebook = torch.randn(out_features, 16, generator=generator).half()
    x = torch.randn(in_features, generator=generator).half()
    return indices.cuda(), codebook.cuda(), x.cuda()


def poisoned(rung, out_features):
    """A y that shows what is left unwritten. dead_atomics zeroes it itself."""
    dtype = torch.float32 if rung.name == "dead_atomics" else torch.float16
    return torch.full((out_features,), float("nan"), dtype=dtype, device="cuda")


@gpu
@each_rung
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_rung_matches_float64(rung, out_features, in_features):
    """Error at most twice that of F.linear in fp16, both against float64."""
    indices, codebook, x = inputs(out_features, in_features)
    dense = codebook.gather(1, indices.long())
    expected = dense.double() @ x.double()
    norm = expected.norm()
    plain = (torch.nn.functional.linear(x, dense).double() - expected).norm() / norm
    codes = ladder.pack(indices, rung)
    torch.cuda.synchronize()  # a launch that may overlap the one before reads codes at once
    for pdl in (False, True):
        y = ladder.gemv(rung, x, codes, codebook, poisoned(rung, out_features), pdl)
        assert torch.isfinite(y).all(), f"{out_features}x{in_features}: an output was not written"
        one_ulp = 1e-3 if in_features < 64 else 5e-4
        assert (y.double() - expected).norm() / norm <= 2 * plain + one_ulp


@gpu
@each_rung
def test_results_are_the_same_bits_every_time(rung):
    if rung.name == "dead_atomics":
        pytest.skip("its additions have no fixed order: that is why it lost")
    indices, codebook, x = inputs(1000, 4096)
    codes = ladder.pack(indices, rung)
    torch.cuda.synchronize()
    first = ladder.gemv(rung, x, codes, codebook)
    for pdl in (False, True) * 5:
        assert torch.equal(first, ladder.gemv(rung, x, codes, codebook, pdl=pdl))


@gpu
def test_codes_of_another_layout_are_refused():
    indices, codebook, x = inputs(33, 127)
    rows = ladder.pack(indices, ladder.find("a_scalar"))
    with pytest.raises(
        ValueError, match="reads 4096 bytes of codes in tiles for 33 x 127 weights, and these are 2112"
    ):
        ladder.gemv(ladder.find("d_mixed_sums"), x, rows, codebook)


@gpu
def test_too_many_inputs_for_shared_memory_are_refused():
    indices, codebook, x = inputs(32, 200_000)
    rung = ladder.find("d_mixed_sums")
    with pytest.raises(ValueError, match="200000 inputs in 432768 bytes of shared memory"):
        ladder.gemv(rung, x, ladder.pack(indices, rung), codebook)


@gpu
def test_bench_ladder_records():
    found = bench.ladder(
        "cuda", [(1024, 1024)], ["d_mixed_sums", "f_pdl", ladder.PRODUCT, "dead_atomics"], "smoke"
    )
    times = [(r.method, r.config["chain"]) for r in found if r.quantity == "gemv_time"]
    twice = [(m, c) for m in ("ladder-f-pdl", "ladder-g-tensor-cores") for c in ("alone", "pdl")]
    assert times == [("ladder-d-mixed-sums", "alone"), *twice, ("ladder-dead-atomics", "alone")]
    assert all(r.config["beside"] == "ladder" for r in found if r.quantity == "gemv_time")
    assert sum(r.quantity == "output_error" for r in found) == 4
    if not ladder.why_not_counted():
        assert sum(r.quantity == "instructions_per_weight" for r in found) == 5
