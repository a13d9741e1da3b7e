"""The README's tables: numbers cited, blocks rewritten, nothing invented."""

import re

import pytest

from trapetum import bench, readme, readme_cells, readme_decode, records, verify

DEVICE = {"name": "NVIDIA H100 80GB HBM3", "arch": "sm_90", "memory_bytes": 1}
SQUARE = {"in_features": 4096, "out_features": 4096, "l2": "cold", "bytes": 8_500_000}


def time_of(method, us, **config):
    return records.measured(
        "gemv_time", [us], method, SQUARE | config, DEVICE, {}, utc="2026-01-01T00:00:00Z"
    )


def test_a_table_cites_every_number():
    dense = time_of("linear-fp16", 16.0, bits=16, chain="alone")
    ours = time_of("codebook", 4.0, bits=4, chain="alone")
    text = readme.fill("before\n<!-- table:gemv-gpu -->\nold\n<!-- end -->\nafter", [dense, ours])
    assert "old" not in text and text.startswith("before\n") and text.endswith("after")
    assert f"16.0<!-- record:{dense.id} -->" in text
    assert f"4.00x<!-- ratio:{dense.id}/{ours.id} -->" in text
    citations = verify.citations_in(text, "README.md")
    assert len(citations) == 3
    assert verify.check(citations, {r.id: r for r in (dense, ours)}, set()) == []


def test_a_small_number_has_no_exponent():
    error = records.measured(
        "logit_error", [3.88473e-05], "codebook", {}, DEVICE, {}, utc="2026-01-01T00:00:00Z"
    )
    assert readme.cited(error).startswith("0.0000388<!--")
    assert verify.check(verify.citations_in(readme.cited(error), ""), {error.id: error}, set()) == []


def test_what_was_not_measured_is_a_dash():
    text = readme.fill(
        "<!-- table:gemv-gpu -->\n<!-- end -->", [time_of("codebook", 4.0, bits=4, chain="alone")]
    )
    assert "| - |" in text


def test_an_unknown_table_is_named():
    with pytest.raises(KeyError, match="asks for table 'speed'"):
        readme.fill("<!-- table:speed -->\n<!-- end -->", [])


def test_the_readme_is_as_its_records_say():
    """`make readme` was run after the records changed."""
    known = readme.known_records()
    text = (readme.ROOT / "README.md").read_text()
    assert readme.fill(text, known) == text


# Decodes, from records as the bench makes them

TINY = {"model_name": "random:llama-tiny", "profile": "smoke"}


@pytest.fixture(scope="module")
def measured_here():
    """Every measurement of decodes that a CPU can make, of a model so small that none takes long."""
    here = {**TINY, "device": "cpu"}
    made = bench.decode(stages=["naive", "lean"], methods=["fp32", "codebook"], new_tokens=72, **here)
    made += bench.decode(
        model_name="builtin", device="cpu", profile="smoke", stages=["lean"], methods=["fp32", "codebook"]
    )
    made += bench.decode(stages=["lean"], methods=["codebook"], kv="int8", **here)
    made += bench.context(contexts=[64, 10**9], methods=["codebook"], **here)
    made += bench.agreement(stages=["lean"], prompts=2, new_tokens=4, **here)
    made += bench.decode_peers(**here)
    made += bench.decode_peers(peers=["torchao-fp6"], **here)
    made += bench.decode_interleaved(**TINY)
    made += bench.breakdown(stages=["lean"], methods=["fp32", "codebook"], **here)
    return readme_cells.current(r.replace(suspect=False, why_suspect="") for r in made)


def table(name, found):
    return readme.fill(f"<!-- table:{name} -->\n<!-- end -->", found)


ON_A_CPU = ["decode-cpu", "contexts", "models", "peers", "turns", "agreement", "waterfall", "targets"]


@pytest.mark.parametrize("name", ON_A_CPU)
def test_what_the_bench_measures_is_a_table_whose_numbers_hold(measured_here, name):
    text = table(name, measured_here)
    assert text.count("\n") > 1, "the table is empty"
    lengths = {line.count(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert name in ("targets", "contexts") or len(lengths) <= 1, "a row is longer than its head"
    found = verify.citations_in(text, name)
    assert found or name == "waterfall"
    assert verify.check(found, {r.id: r for r in measured_here}, verify.kernel_hashes()) == []


def test_the_stages_are_in_order_with_windows_and_refusals(measured_here):
    text = readme_decode.stages(measured_here)
    head, _, *rows = text.splitlines()
    stages = [row.split(",")[0] for row in rows if row.startswith("| ")]
    assert stages == ["| naive"] * 2 + ["| lean"] * 2
    assert "tok/s, first 32 | last 32 | all" in head
    assert re.search(r"- lean, 4-bit codebook.*, kv int8: a cache in int8", text)
    assert "tinygemm" not in text and "transformers" not in text and "1000000000 tokens" not in text
    assert "| 1,000,000,000 | does not fit | - |" in readme_decode.contexts(measured_here)


def test_what_no_record_tells_is_left_out():
    for name in readme.TABLES:
        if name != "targets":
            assert table(name, []) == f"<!-- table:{name} -->\n<!-- end -->"


# Decodes on a GPU, whose records are written here

DECODE = {
    "model": "random:llama-2-7b",
    "new_tokens": 512,
    "prompt_tokens": 6,
    "context": 262.0,
    "dtype": "fp16",
    "read_gbps": 3000.0,
}
CODES = {"bits": 4, "linears": "codebook", "lm_head": "fp16", "bytes": 3_000_000_000}
DENSE = {"bits": 16, "linears": "dense", "bytes": 12_000_000_000}


def made(quantity, value, method, *configs, utc="2026-01-01T00:00:00Z", **config):
    whole = dict(DECODE)
    for part in (*configs, config):
        whole |= part
    return records.measured(quantity, [value], method, whole, DEVICE, {}, utc=utc)


def test_only_dense_weights_of_the_own_engine_are_called_dense():
    ours = made("decode_speed", 300, "codebook", CODES, stage="graph")
    fp16 = made("decode_speed", 150, "fp16", DENSE, stage="graph")
    peer = made("decode_speed", 200, "tinygemm-int4", CODES, stage="graph", linears="tinygemm", dtype="bf16")
    turn = made("decode_speed", 310, "codebook", CODES, stage="graph", beside="c++", interleaved=True)
    found = [ours, fp16, peer, turn]
    by_stage = readme_decode.stages(found)
    assert f"ratio:{ours.id}/{fp16.id}" in by_stage
    assert peer.id not in by_stage and turn.id not in by_stage
    beside = readme_decode.peers(found)
    assert f"1.50x<!-- ratio:{ours.id}/{peer.id} -->" in beside and "tinygemm-int4 4-bit" in beside
    assert "| 900 | 30 % |" in by_stage  # 300 tok/s of 3 GB


def test_an_unusual_cache_and_drafts_are_named_and_not_compared_with_usual_ones():
    dense = made("decode_speed", 150, "fp16", DENSE, stage="pdl")
    odd = made("decode_speed", 700, "codebook", CODES, stage="pdl", kv="int8", rows=4, accepted=1.75)
    text = readme_decode.stages([dense, odd])
    assert "| pdl, 4-bit codebook, kv int8, 4 rows |" in text and "| 1.75 |" in text
    assert "ratio:" not in text


def test_runs_in_turns_do_not_hide_those_by_themselves():
    alone = made("decode_speed", 300, "codebook", CODES, stage="pdl")
    later = {"utc": "2026-01-02T00:00:00Z", "stage": "pdl", "interleaved": True, "run": "r"}
    turns = [
        made("decode_speed", 290, "codebook", CODES, runtime=r, beside=b, **later)
        for r, b in (("python", "c++"), ("c++", "python"))
    ]
    best = [
        made("speedup", 2.0, "codebook", CODES, baseline=f"transformers-eager {d}", **later)
        for d in ("fp32", "bf16")
    ]
    kept = readme_cells.current([alone, *turns, *best])
    assert set(kept) == {alone, *turns, *best}
    old = alone.replace(kernel_sha256="0" * 64)
    assert readme_cells.current([old, alone.replace(suspect=True, why_suspect="too fast.")]) == []


def test_the_cpp_program_stands_beside_python():
    about = {"stage": "pdl", "interleaved": True, "run": "r", "rounds": 7, "kv": "fp16"}
    python = made("decode_speed", 500, "codebook", CODES, about, runtime="python", beside="c++")
    cpp = made("decode_speed", 505, "codebook", CODES, about, runtime="c++", beside="python")
    gain = made("speedup", 1.01, "codebook", CODES, about, runtime="c++", beside="python", baseline="python")
    same = made(
        "token_agreement", 1.0, "codebook", CODES, about, runtime="c++", beside="python", baseline="python"
    )
    text = readme_decode.standalone([python, cpp, gain, same])
    order = [text.index(r.id) for r in (python, cpp, gain, same)]
    assert order == sorted(order) and "1.01x<!--" in text


def test_a_model_that_does_not_fit_says_so():
    seven = [
        made("decode_speed", v, m, c, stage="pdl")
        for v, m, c in ((150, "fp16", DENSE), (500, "codebook", CODES))
    ]
    large = {"model": "random:llama-2-70b", "stage": "pdl"}
    ours = made("decode_speed", 60, "codebook", CODES, large, bytes=36_000_000_000)
    error = "llama-2-70b in 16 bits takes 138.0 GB, and 79.0 GB are free on cuda."
    no = made("call_accepted", 0, "fp16", DENSE, large, error=error)
    text = readme_decode.models([*seven, ours, no])
    (row,) = [line for line in text.splitlines() if "llama-2-70b" in line and line.startswith("| ")]
    assert "| does not fit |" in row and f"- llama-2-70b (random weights), fp16: {error}" in text
    assert f"ratio:{seven[1].id}/{seven[0].id}" in text
    assert readme_decode.models(seven) == ""
    split = made("decode_speed", 20, "fp16", DENSE, large, stage="graph", world_size=2)
    text = readme_decode.models([*seven, ours, no, split])
    (row,) = [line for line in text.splitlines() if "llama-2-70b" in line and line.startswith("| ")]
    assert f"20.0<!-- record:{split.id} --> (2 cards)" in row and f"ratio:{ours.id}/{split.id}" in row
    assert error in text and "| graph, fp16, 2 cards |" in readme_decode.stages([split])
    alone = readme_decode.models([*seven, split])
    assert (
        "(2 cards)" in alone
        and len(readme_cells.current([split, split.replace(config={**split.config, "world_size": 1})])) == 2
    )


def test_energy_names_its_stage_and_compares_at_it():
    def joules(value, method, *configs, **config):
        return made("energy_per_token", value, method, *configs, mean_w=400.4, idle_w=100.2, **config)

    found = [
        joules(3.0, "fp16", DENSE, stage="pdl", accounting="gross"),
        joules(1.0, "codebook", CODES, stage="pdl", accounting="gross"),
    ]
    found += [
        joules(0.8, "codebook", CODES, stage="pdl", accounting="net"),
        joules(9.0, "fp16", DENSE, stage="graph", accounting="gross"),
    ]
    found += [made("decode_speed", 500, "codebook", CODES, stage="pdl")]
    text = readme_decode.energy(found)
    assert "| pdl, 4-bit codebook |" in text and "| graph, fp16 |" in text and "| 400 | 100 |" in text
    assert f"3.00x<!-- ratio:{found[0].id}/{found[1].id} -->" in text
    (row,) = [line for line in text.splitlines() if "codebook" in line]
    assert found[2].id in row


def test_a_token_taken_apart_is_a_picture():
    def part(label, us, method, *config):
        return made("token_part", us, method, *config, stage="pdl", part=label, run="now", context=262.0)

    rows = [
        part(label, us, m, c)
        for m, c in (("fp16", DENSE), ("codebook", CODES))
        for label, us in (("token", 9.0), ("norms", 9.0))
    ]
    assert "(data/pictures/waterfall-gpu.png)" in table("waterfall", rows)
    assert list(readme.pictures(rows)) == ["waterfall-gpu.png"]
    assert "png" not in table("waterfall", rows[:2])


def test_a_picture_without_codebook_weights_is_not_made():
    dense = made("decode_speed", 57, "fp16", DENSE, stage="naive")
    assert readme.pictures([dense]) == {}
    assert list(readme.pictures([dense, made("decode_speed", 30, "codebook", CODES, stage="naive")])) == [
        "decode-gpu.png"
    ]
