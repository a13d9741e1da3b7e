"""Chapter 4's walk: which decodes stand for a stage, what a stage gained, drafts counted, and figures beside them."""

import pytest

from trapetum import drafts, figures, records, waterfall, widgets
from trapetum.figures.walk import Place, stage_walk, staged
from trapetum.shapes import MODELS
from trapetum.walk import RECORDED_MODEL, Walk
from trapetum.workbook import Workbook

GPU = {"name": "NVIDIA H100 80GB HBM3", "arch": "sm_90"}
SPEEDS = {"naive": (40.0, 20.0), "graph": (160.0, 320.0), "pdl": (170.0, 480.0)}  # dense, codes


def decode(method, tok_s, stage, utc="2026-01-01T00:00:00Z", device=GPU, **config):
    coded = method == "codebook"
    bits, linears = (4, "codebook") if coded else (16, "dense")
    base = {"model": RECORDED_MODEL, "bits": bits, "linears": linears, "stage": stage, "context": 262.0}
    base |= {"bytes": 3_600_000_000 if coded else 13_000_000_000, **config}
    return records.measured("decode_speed", [tok_s] * 3, method, base, device, {}, utc=utc)


def walked():
    return [decode(m, v[m == "codebook"], s) for s, v in SPEEDS.items() for m in ("fp16", "codebook")]


@pytest.fixture
def book(tmp_path):
    read = records.measured("read_bandwidth", [3190.0], "read", {"l2": "cold"}, GPU, {})
    records.append(tmp_path / "records" / "gpu.jsonl", [*walked(), read])
    return Workbook("04", "smoke", "cpu", data=tmp_path)


def test_only_plain_decodes_stand_for_a_stage():
    odd = ({"kv": "int4"}, {"rows": 4}, {"interleaved": True}, {"runtime": "c++"}, {"model": "other"})
    others = [decode("codebook", 999.0, "graph", "2026-02-01T00:00:00Z", **more) for more in odd]
    others.append(decode("codebook", 999.0, "graph", "2026-02-01T00:00:00Z", lm_head="codebook"))
    others.append(decode("no-linears", 999.0, "graph"))
    found = staged([*walked(), *others], RECORDED_MODEL, coded_head=False)
    assert sorted(r.value for r in found) == sorted(v for pair in SPEEDS.values() for v in pair)
    newer = decode("codebook", 330.0, "graph", "2026-02-01T00:00:00Z")
    place = Place("a card", staged([newer, *walked()], RECORDED_MODEL))
    assert place.speed("graph", True) is newer and place.stages == ("naive", "graph", "pdl")


def test_gains_are_over_the_stage_before_and_at_the_first_over_dense(book):
    walk = Walk(book, "random:llama-tiny")
    (place,) = walk.places
    assert walk.gpu is place
    assert walk.gain(place, "naive", True) == 0.5
    assert walk.gain(place, "graph", True) == 16 and walk.gain(place, "graph", False) == 4
    assert walk.gain(place, "pdl", True) == 1.5
    assert walk.gain(place, "persistent", True) is None


def test_a_prediction_is_compared_and_drawn(book, capsys):
    walk, shown = Walk(book, "random:llama-tiny"), []
    book.show = shown.append
    walk.predict("lean", "graph", codes=4.0, dense=2.0)
    rows = walk.reveal("lean", "graph")
    assert [row["ratio"] for row in rows] == [2.0, 4.0]
    crosses = [trace for trace in shown[0].data if trace.name == "predicted"]
    assert sorted(y for trace in crosses for y in trace.y) == [80.0, 80.0]
    assert walk.reveal("lean", "graph") == []


def test_a_stage_that_nobody_ran_is_said(book, capsys):
    walk = Walk(book, "random:llama-tiny")
    walk.predict("fused", codes=1.3)
    assert walk.reveal("fused") == []
    said = capsys.readouterr().out
    assert "has run fused yet" in said and "no decode at fused" in said
    sentences = []
    book.takeaway = sentences.append
    walk.takeaway("fused")
    walk.takeaway("pdl")
    assert sentences[0].startswith("Not known") and "4-bit codes 1.50 times, dense 1.06 times" in sentences[1]


def test_the_walk_shows_stages_up_to_the_one_asked_and_its_bound():
    place = Place("a card", staged(walked(), RECORDED_MODEL), 3600.0)
    figure = stage_walk([place], ("graph",))
    (coded,) = [t for t in figure.data if t.type == "bar" and t.name == "codebook 4-bit"]
    assert list(coded.y) == [20.0, 320.0]
    bounds = {y for t in figure.data if t.legendgroup == "bound" for y in t.y if y}
    assert sorted(bounds) == pytest.approx([3600e9 / 13e9, 1000.0])
    assert figure.layout.yaxis.range[1] > 1000
    nothing = stage_walk([place], ("fused",))
    assert not nothing.data and "has run fused yet" in nothing.layout.annotations[0].text


# Drafts


def test_tokens_of_steps_with_drafts_are_counted():
    text = [1, 2, 3, 4] * 4
    assert drafts.accepted(text, text, 1) == [1] * 15
    assert drafts.accepted(text, text, 4) == [4, 4, 4, 3]
    assert drafts.accepted([1, 2], [3, 4, 5, 6], 4) == [1, 1, 1]


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_steps_make_every_token_and_never_more_than_their_rows(rows):
    text = [3, 1, 4, 1, 5, 9, 3, 1, 4, 1, 6, 3, 1, 4]
    steps = drafts.accepted(text[:4], text[4:], rows)
    assert sum(steps) == len(text) - 4 - 1 and all(1 <= made <= rows for made in steps)


def test_drafts_need_a_prompt_tokens_and_a_row():
    for wrong in (([], [1], 2), ([1], [], 2), ([1], [2], 0)):
        with pytest.raises(ValueError, match="at least 1"):
            drafts.accepted(*wrong)


def test_a_decode_with_drafts_stands_beside_the_same_without():
    pool = [decode("codebook", 400.0, "pdl", rows=4, accepted=2.5), decode("codebook", 500.0, "pdl")]
    (row,) = drafts.beside_one_row([*pool, decode("fp16", 100.0, "pdl")])
    assert row == [RECORDED_MODEL, "codebook 4-bit, pdl", "4", 2.5, 400.0, "0.80"]
    (alone,) = drafts.beside_one_row(pool[:1])
    assert alone[-1] == "not recorded"


# Figures beside them


def reached(kv, tok_s, context):
    config = {"model": RECORDED_MODEL, "bits": 4, "kv": kv, "context": context, "stage": "pdl"}
    return records.measured("context_speed", [tok_s], "codebook", config, GPU, {})


def test_caches_are_compared_where_both_were_measured():
    pool = [reached("fp16", 200.0, 4096), reached("int8", 250.0, 4096), reached("int4", 300.0, 8192)]
    assert figures.cache_gains(pool) == {("int8", 4096): 1.25}
    assert figures.reach(pool, RECORDED_MODEL) == pool and figures.reach(pool, "other") == []
    drawn = figures.speed_by_context(pool, MODELS["llama-2-7b"], 3190.0)
    assert [list(t.y) for t in drawn.data if t.mode == "lines+markers"] == [[200.0], [250.0], [300.0]]
    alone = figures.speed_by_context([], MODELS["llama-2-7b"], None)
    assert "no read bandwidth" in alone.layout.title.subtitle.text


def test_lines_of_a_context_are_bytes_over_bandwidth():
    shape = MODELS["llama-2-7b"]
    nbytes = shape.bytes_per_token("codebook-4", 4096, "fp16", "int8")
    assert figures.bound_tok_s(shape, 3190.0, 4096, "int8") == pytest.approx(3190e9 / nbytes)


def test_peers_are_the_fastest_of_each_with_their_memory():
    config = {"model": RECORDED_MODEL, "bits": 4, "linears": "codebook", "stage": "pdl", "context": 262.0}
    memory = records.measured("decode_memory", [3.9], "codebook", config, GPU, {})
    special = [
        decode("codebook", 900.0, "pdl", kv="int4"),
        decode("no-linears", 900.0, "pdl", linears="none"),
    ]
    found = figures.fastest_each([*walked(), *special])
    assert [r.value for r in found] == [480.0, 170.0]
    speedup = records.measured("speedup", [7.7], "codebook", config, GPU, {})
    said = [a.text for a in figures.peers(found, 3190.0, memory=[memory, speedup]).layout.annotations]
    assert "3.90 GB" in said[0] and "7.7" not in said[0]
    assert "on record" in figures.peers([]).layout.annotations[0].text


def test_agreement_has_a_row_a_stage():
    config = {"model": "builtin", "bits": 4, "stage": "lean", "baseline": "transformers", "prompts": 8}
    same = records.measured("token_agreement", [1.0], "codebook", {**config, "variant": "tokens"}, GPU, {})
    error = records.measured("logit_error", [3e-4], "codebook", {**config, "variant": "absolute"}, GPU, {})
    (row,) = figures.agreement_rows([same, error])
    assert row[1:] == ["builtin", "codebook 4-bit", "lean", "8", "100.00%", "0.0003"]
    assert figures.agreement_rows([same])[0][-1] == "not recorded"
    assert len(row) == len(figures.AGREEMENT_HEADINGS)


def energy(samples, **config):
    base = {"model": RECORDED_MODEL, "bits": 4, "stage": "pdl", "accounting": "gross", **config}
    return records.measured("energy_per_token", samples, "codebook", base, GPU, {})


def test_windows_say_what_was_logged_and_what_was_not():
    state = {"temperature": 41.0, "sm_mhz": 1980}
    logged = energy([1.0, 1.1], before=[state] * 2, after=[{**state, "temperature": 43.0}] * 2)
    rows = figures.window_rows(logged)
    assert rows[1] == ["codebook 4-bit, pdl", "2", 1.1, "41", "43", "1980", "1980"]
    assert figures.window_rows(energy([1.0]))[0][3:] == ["not logged"] * 4
    assert len(rows[0]) == len(figures.WINDOW_HEADINGS)
    (trace, *_) = figures.energy_windows([logged]).data
    assert list(trace.y) == [pytest.approx(1.0 / 1.05), pytest.approx(1.1 / 1.05)]
    assert not figures.energy_windows([]).data


# Bridges


def token(method, stage, us, utc, model=RECORDED_MODEL):
    config = {"model": model, "bits": 4 if method == "codebook" else 16, "stage": stage, "context": 262.0}
    parts = {"token": us, "ideal bytes": us / 4, "norms": us * 3 / 4}
    return [
        records.measured("token_part", [v], method, {**config, "part": part, "run": utc}, GPU, {}, utc=utc)
        for part, v in parts.items()
    ]


def taken_apart():
    rows = [
        ("fp16", "graph", 6e3),
        ("codebook", "naive", 3e4),
        ("codebook", "pdl", 2e3),
        ("codebook", "graph", 3e3),
    ]
    made = [token(*row, f"2026-01-01T00:00:0{n}Z") for n, row in enumerate(rows)]
    older = token("codebook", "graph", 9e3, "2025-01-01T00:00:00Z")
    other = token("codebook", "graph", 1e3, "2026-01-01T00:00:09Z", "random:llama-tiny")
    return waterfall.runs(r for group in (*made, older, other) for r in group)


def test_bridges_lead_to_codes_at_each_stage_and_from_stage_to_stage():
    figure = figures.bridges(taken_apart())
    (menu,) = figure.layout.updatemenus
    codes = "4-bit codebook, "
    assert [b.label for b in menu.buttons] == [
        "fp16, graph to 4-bit codebook, graph", f"{codes}naive to {codes}graph", f"{codes}graph to {codes}pdl"
    ]  # fmt: skip
    assert [t.visible for t in figure.data] == [None, False, False]
    assert [(t.y[0], t.y[-1]) for t in figure.data] == [(6e3, 3e3), (3e4, 3e3), (3e3, 2e3)]
    for number, button in enumerate(menu.buttons):
        shown, layout = button.args
        assert shown["visible"] == [n == number for n in range(3)]
        assert layout["shapes"][0]["y0"] == figure.data[number].y[-1] / 4


def test_bridges_of_one_token_say_what_is_missing():
    assert "two tokens" in figures.bridges(taken_apart()[:1]).layout.annotations[0].text


def test_a_person_may_choose_any_two_runs():
    runs = taken_apart()
    chooser = widgets.BridgeChooser(runs)
    assert chooser.figure.data[0].y[-1] == runs[-1].us
    chooser.first.value, chooser.second.value = runs[1], runs[2]
    assert list(chooser.figure.data[0].y)[0] == runs[1].us and chooser.figure.data[0].y[-1] == runs[2].us
    assert chooser.figure.layout.shapes[0].y0 == runs[2].ideal_us
    with pytest.raises(ValueError, match="no bridge"):
        widgets.BridgeChooser(runs[:1])


def test_the_newest_of_each_stage_stands_in_the_order_of_stages():
    old, new = energy([1.0], stage="pdl"), energy([2.0], stage="pdl").replace(utc="2099-01-01T00:00:00Z")
    found = figures.by_stage([new, old, energy([3.0], stage="naive")])
    assert list(found) == ["codebook 4-bit, naive", "codebook 4-bit, pdl"]
    assert found["codebook 4-bit, pdl"].value == 2.0


def test_temperatures_and_clocks_around_windows_are_put_in_words():
    before, after = [{"temperature": 31.0, "sm_mhz": 1980}], [{"temperature": 58.0}]
    assert (
        figures.logged_range([energy([1.0], before=before, after=after)])
        == "31 to 58 degrees C, 1980 to 1980 MHz"
    )
    assert figures.logged_range([energy([1.0])]) == ""
