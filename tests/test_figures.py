"""The figures: what is drawn for measured, published, suspect and stale records, and that saved pages need nothing."""

import json

import numpy as np
import plotly.graph_objects as go
import pytest

from trapetum import bench, build, figures, hardware, law, law_cards, records, waterfall
from trapetum.figures import pareto_state, style
from trapetum.paths import PUBLISHED
from trapetum.shapes import MODELS
from trapetum.widgets import ParetoExplorer, explore

H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "arch": "sm_90",
    "sms": 132,
    "l2_bytes": 50 * 2**20,
    "memory_bytes": 85_000_000_000,
    "power_limit_w": 700.0,
}
SHAPES = ((3072, 768), (4096, 4096), (4096, 11008), (8192, 28672))
ROOF = 3190.0


def make(quantity, value, method, config, device=H100, **more):
    """A measured record with five samples around `value`."""
    samples = [value * f for f in (0.97, 0.99, 1.0, 1.02, 1.05)]
    return records.measured(
        quantity, samples, method, config, device, {"python": "3.12"}, commit="abc", dirty=False, **more
    )


def gemv(method, shape, us, bits=None, l2="cold", chain="alone", **more):
    config = {"in_features": shape[0], "out_features": shape[1], "l2": l2, "chain": chain}
    nbytes = law.gemv_bytes(*shape, bits or "fp16")
    config |= {"bytes": nbytes} | ({"bits": bits, "n_codes": 2**bits} if bits else {})
    return make("gemv_time", us, method, config | more.pop("config", {}), **more)


def gemv_records():
    """Times that follow the law, with a dense baseline, a peer and ours at two cache states; the small shape loses."""
    made = []
    for l2, gain in (("cold", 1.0), ("warm", 1.5)):
        for shape in SHAPES:
            dense = 2.0 + law.floor_us(law.gemv_bytes(*shape, "fp16"), ROOF) / gain
            made.append(gemv("linear-fp16", shape, dense, l2=l2))
            for bits in (8, 4, 3, 2):
                own = 3.9 + law.floor_us(law.gemv_bytes(*shape, bits), 0.9 * ROOF) / gain
                made.append(gemv("codebook", shape, own, bits, l2=l2))
            made.append(gemv("tinygemm-int4", shape, own * 1.9, 4, l2=l2))
    return made


def decode_records(model="random:llama-2-7b"):
    made = []
    base = {"model": model, "context": 288.0, "new_tokens": 512}
    for stage, dense, ours in (("naive", 38, 41), ("cast_free", 60, 82), ("graph", 170, 310)):
        config = base | {"stage": stage}
        wide = {"bits": 16, "linears": "dense", "bytes": 13_360_000_000}
        narrow = {"bits": 4, "linears": "codebook", "n_codes": 16, "bytes": 3_690_000_000}
        for method, speed, more in (("fp16", dense, wide), ("codebook", ours, narrow)):
            made.append(make("decode_speed", speed, method, config | more))
            made.append(make("decode_memory", more["bytes"] / 1e9 + 0.4, method, config | more))
            joules = 320 / speed
            made.append(make("energy_per_token", joules, method, config | more | {"accounting": "gross"}))
            made.append(make("energy_per_token", 0.7 * joules, method, config | more | {"accounting": "net"}))
    return made


def perplexity_records():
    config = {"model": "builtin", "text": "builtin", "window": 512, "stride": 256, "tokens": 20000}
    made = [make("perplexity", 14.2, "fp", config | {"bits": 16, "interval": [13.9, 14.6]})]
    for method, cost in (("rtn", 0.9), ("lloyd", 0.3), ("kmeans", 0.2)):
        for bits in (8, 4, 3, 2):
            value = 14.2 + cost * 4.0 ** (4 - bits)
            interval = [value * 0.98, value * 1.02]
            made.append(make("perplexity", value, method, config | {"bits": bits, "interval": interval}))
            made.append(make("weight_error", cost * 0.02 * 4.0 ** (4 - bits), method, {"bits": bits}))
    return made


@pytest.fixture(scope="module")
def published():
    return records.load(PUBLISHED).records


def symbols(figure):
    """Every marker symbol in the figure."""
    found = set()
    for trace in figure.data:
        symbol = getattr(getattr(trace, "marker", None), "symbol", None)
        found |= set([symbol] if isinstance(symbol, str) else symbol or [])
    return found


def words(figure):
    """Everything written in or on the figure, as one string."""
    return json.dumps(figure.to_plotly_json(), default=lambda x: np.asarray(x).tolist(), ensure_ascii=False)


def test_a_method_has_one_colour_and_fewer_bits_are_darker():
    assert style.colour("linear-fp16") == style.colour("fp16") == style.colour("fp")
    assert style.colour("never-heard-of") == style.colour("never-heard-of")
    brightness = [int(style.colour("codebook", bits)[1:3], 16) for bits in (8, 4, 3, 2)]
    assert brightness == sorted(brightness, reverse=True) and len(set(brightness)) == 4
    assert style.colour("codebook", 4) == style.colour("codebook")


@pytest.mark.parametrize("tint", sorted(set(style.PALETTE.values())))
def test_every_colour_can_be_read_on_white(tint):
    channels = [int(tint[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    assert 1.05 / (luminance + 0.05) > 2.2, f"{tint} is too pale on white"


def test_marker_says_kind_suspect_and_stale():
    good = gemv("codebook", (4096, 4096), 5.0, 4)
    assert style.symbol(good) == "circle"
    assert style.symbol(records.gate(good, 1000.0)) == "circle-open"
    assert style.symbol(good.replace(kernel_sha256="0" * 64)) == "circle-dot"
    for sources in (["codebook_gemv.cu"], ["codebook_gemv.cu", "sparse_gemv.cu"]):
        assert style.symbol(good.replace(kernel_sha256=build.source_sha256(*sources))) == "circle"
    paper = records.published("perplexity", 5.5, "gptq", {}, {}, "a paper, table 1")
    assert style.symbol(paper) == "diamond"


def test_hover_text_tells_what_is_needed_to_find_the_record():
    record = records.gate(gemv("codebook", (4096, 4096), 5.0, 4), 1000.0)
    text = style.describe(record)
    for part in (record.id, "measured", "H100", "p20", "n 5", "in_features 4096", "suspect"):
        assert part in text


def test_ceilings_show_cold_warm_and_the_datasheet():
    found = [make("read_bandwidth", v, "read", {"bytes": b, "l2": l2}) for v, b, l2 in
             ((3190, 4 * 10**9, "cold"), (5600, 2 * 10**7, "warm"))]  # fmt: skip
    figure = figures.ceilings(found, H100, peak_gbps=3350)
    text = words(figure)
    assert "cold read of 4.00 GB" in text and "datasheet 3,350 GB/s" in text and "132 SMs" in text
    assert "No read bandwidth" in words(figures.ceilings([], H100))


def test_roofline_puts_batch_one_on_the_slope():
    figure = figures.roofline(gemv_records()[:6], ROOF, {"fp16": 989.0}, "H100")
    dense = next(t for t in figure.data if t.name == "linear-fp16")
    assert dense.x[0] == pytest.approx(1.0, rel=0.01)
    assert dense.y[0] < ROOF / 1e3
    assert "310 FLOP/B" in words(figure)
    alone = figures.roofline([], ROOF, {})
    assert len(alone.data) >= 2 and "bandwidth 3,190 GB/s" in words(alone)


def test_card_compares_this_machine_with_recorded_ones():
    here = [
        make(
            "decode_speed", 12.0, "codebook", {"bits": 4, "model": "m", "stage": "lean"}, {"name": "some CPU"}
        )
    ]
    text = words(figures.your_machine(here, decode_records(), "some CPU"))
    assert "12.0 tok/s" in text and "310 tok/s" in text and "H100 80GB" in text
    small = make(
        "decode_speed", 1790, "codebook", {"bits": 4, "model": "random:tinyllama-1.1b", "stage": "pdl"}
    )
    assert "1,790" not in words(figures.your_machine(here, [*decode_records(), small], "some CPU"))
    assert "1,790" in words(figures.your_machine(here, [small], "some CPU"))
    assert "Nothing" in words(figures.your_machine([], []))


def test_predictions_lie_on_the_diagonal_when_right():
    rows = [{"label": "a", "unit": "us", "predicted": 4.0, "measured": 4.2},
            {"label": "b", "unit": "us", "predicted": 9.0, "measured": None}]  # fmt: skip
    figure = figures.predicted_vs_measured(rows)
    drawn = next(t for t in figure.data if t.name == "measured, us")
    assert list(drawn.x) == [4.0] and list(drawn.y) == [4.2]


def test_law_fit_marks_what_was_left_out():
    found = [r for r in gemv_records() if r.method == "linear-fp16" and r.config["l2"] == "cold"]
    fit = law.fit([r.config["bytes"] for r in found[:-1]], [r.value for r in found[:-1]])
    figure = figures.law_fit(found[:-1], fit, found[-1:], ROOF)
    names = [t.name for t in figure.data]
    assert "left out of the fit" in names and "fitted" in names
    assert any("ideal" in (n or "") for n in names) and "t0 = " in words(figure)


def test_ladder_has_the_error_beside_the_time():
    found = [r for r in gemv_records() if r.config["in_features"] == 4096 and r.config["l2"] == "cold"][:6]
    shape = {"in_features": 4096, "out_features": 4096}
    errors = [
        make("output_error", 3e-4, "codebook", {**shape, "bits": b, "n_codes": 2**b}) for b in (8, 4, 3, 2)
    ]
    figure = figures.ladder(found, errors, ROOF)
    drawn = next(t for t in figure.data if t.name == "error")
    assert set(drawn.y) == {f"codebook {b}-bit" for b in (8, 4, 3, 2)}
    ideal = next(t for t in figure.data if "ideal" in (t.name or ""))
    assert ideal.x[0] == pytest.approx(found[0].config["bytes"] / ROOF / 1e3)
    without = figures.ladder(found, [], ROOF)
    assert not any(t.name == "error" for t in without.data)


def test_fused_is_shown_beside_its_alternatives():
    found = []
    for shape in SHAPES:
        found += [gemv("linear-fp16", shape, 15.0), gemv("codebook", shape, 5.0, 4)]
        found.append(gemv("dequantize-linear", shape, 40.0, 4, config={"path": "dequantize"}))
    figure = figures.dequantize_or_fuse(found, ROOF)
    bars = {t.name: t for t in figure.data if isinstance(t, go.Bar)}
    assert set(bars) == {"linear-fp16", "codebook 4-bit", "dequantize-linear 4-bit"}
    assert len(bars["linear-fp16"].x) == len(SHAPES)
    assert len({*bars["linear-fp16"].x, *bars["codebook 4-bit"].x}) == 2 * len(SHAPES)


def test_speedups_name_the_loser():
    figure = figures.speedups(gemv_records())
    assert "loses: " in words(figure) and "cold cache" in words(figure) and "warm cache" in words(figure)
    made = figures.pairs(gemv_records())
    small = [p for p in made if p.record.config["out_features"] == 768 and p.record.method == "codebook"]
    assert small and all(p.speedup < 1 for p in small)
    large = next(
        p for p in made if p.record.config["in_features"] == 8192 and p.record.config.get("bits") == 4
    )
    assert 3.9 < large.ideal < 4.0
    assert "No shape" in words(figures.speedups([], "linear-fp16"))


def test_a_pair_never_crosses_cache_states_or_devices():
    cold, warm = gemv("linear-fp16", (64, 64), 2.0), gemv("codebook", (64, 64), 1.0, 4, l2="warm")
    other = gemv("codebook", (64, 64), 1.0, 4, device={"name": "other"})
    assert figures.pairs([cold, warm, other]) == []


def test_losers_map_crosses_what_loses_and_queries_what_is_suspect():
    slow = gemv("codebook", (64, 64), 3.0, 4)
    fast = records.gate(gemv("codebook", (8192, 28672), 1.0, 4), ROOF)
    figure = figures.losers_map(
        [slow, fast, gemv("linear-fp16", (64, 64), 2.0), gemv("linear-fp16", (8192, 28672), 160.0)]
    )
    cells = [cell for line in figure.data[0].text for cell in line]
    assert "0.67 ✗" in cells and any(cell.endswith("?") for cell in cells)


def test_decode_stages_say_bandwidth_and_share_of_the_bound():
    figure = figures.decode_stages([r for r in decode_records() if r.quantity == "decode_speed"], ROOF)
    text = words(figure)
    assert "36% of bound" in text and "byte bound at 3,190 GB/s" in text and "mean context 288" in text


def test_decodes_in_turns_are_not_drawn_and_the_cache_is_named():
    config = {
        "model": "random:llama-2-7b",
        "context": 288.0,
        "new_tokens": 512,
        "bits": 4,
        "linears": "codebook",
    }
    config |= {"stage": "pdl", "bytes": 3_690_000_000}
    plain = make("decode_speed", 500, "codebook", config)
    small = make("decode_speed", 520, "codebook", config | {"kv": "int8", "rows": 4})
    turn = make("decode_speed", 400, "codebook", config | {"beside": "c++"})
    round_ = make("decode_speed", 401, "codebook", config | {"interleaved": True})
    early = make("decode_speed", 40, "codebook", config | {"stage": "naive"})
    memory = make("decode_memory", 4.0, "codebook", config)
    pool = [plain, small, turn, round_, early, memory]
    figure = figures.decode_stages(pool, ROOF)
    assert {bar.name for bar in figure.data if bar.type == "bar"} == {
        "codebook 4-bit",
        "codebook 4-bit, kv int8, 4 rows",
    }
    assert list(figure.layout.xaxis.ticktext) == ["naive", "pdl"]
    points = {p.label: p for p in figures.tradeoffs(pool)}
    assert {p.values["tok_s"] for p in points.values()} == {500, 520, 40}
    ours, quantized = points["codebook 4-bit, pdl"], points["codebook 4-bit, pdl, kv int8, 4 rows"]
    assert ours.kinds["memory_gb"] == "measured" and quantized.kinds["memory_gb"] == "derived"
    assert 0.5 < quantized.kv_bytes / ours.kv_bytes < 0.6


def test_every_peer_has_a_colour_of_its_own():
    drawn = [*bench.PEERS, "codebook", "fp16", "bf16", "fp32"]
    assert set(drawn) <= set(style.PALETTE)
    assert len({style.PALETTE[method] for method in drawn}) == len(drawn)


def test_transformers_is_labelled_by_its_dtype():
    labels = {
        figures.label_of(make("decode_speed", 10, "transformers-eager", {"bits": 16, "dtype": dtype}))
        for dtype in ("fp16", "bf16")
    }
    assert labels == {"transformers-eager fp16", "transformers-eager bf16"}


def token_run(parts, method, stage, total=None):
    """A token taken apart, as `trapetum.waterfall` finds it; ideal bytes are derived, the rest measured."""
    config = {"bits": 4 if method == "codebook" else 16, "stage": stage, "context": 262.0, "run": "now"}
    rows = []
    for label, us in {**parts, "token": total or sum(parts.values())}.items():
        labelled = {**config, "part": label}
        if label == "ideal bytes":
            rows.append(records.derived("token_part", us, method, labelled, H100, "bytes", "over bandwidth"))
        else:
            rows.append(make("token_part", us, method, labelled))
    return waterfall.find(rows)


LEFT = {"ideal bytes": 4000.0, "norms": 500.0}
RIGHT = {"ideal bytes": 1000.0, "norms": 300.0, "sampling": -20.0}


def test_waterfall_bars_add_up_to_the_measured_time():
    figure = figures.waterfall(
        token_run(LEFT, "fp16", "graph", 4600.0), token_run(RIGHT, "codebook", "graph")
    )
    first, second = figure.data
    assert list(first.x) == ["ideal bytes", "norms", "not explained", "<b>token</b>"]
    assert sum(first.y[:-1]) == pytest.approx(4600) == first.y[-1]
    assert list(second.x) == ["ideal bytes", "norms", "sampling", "<b>token</b>"] and second.y[-1] == 1280
    assert list(second.base) == [0, 1000, 1300, 0]
    assert first.marker.color[0] == second.marker.color[0]
    assert list(second.marker.pattern.shape) == ["/", "", "", ""] and list(second.customdata)[0] == "derived"
    said = words(figure)
    assert (
        "3.59 times faster" in said and "ideal 1,000 us" in said and "us a token at a context of 262" in said
    )
    assert {s.y0 for s in figure.layout.shapes} == {4000, 1000}


def test_bridge_leads_from_one_token_to_the_other():
    figure = figures.bridge(token_run(LEFT, "fp16", "graph"), token_run(RIGHT, "codebook", "pdl"))
    (bars,) = figure.data
    assert list(bars.x) == ["fp16, graph", "ideal bytes", "norms", "sampling", "4-bit codebook, pdl"]
    assert list(bars.y) == [4500, -3000, -200, -20, 1280]
    assert list(bars.base) == [0, 4500, 1500, 1300, 0]
    assert figure.layout.shapes[0].y0 == 1000 and "3.52 times faster" in words(figure)
    assert figure.layout.title.text == "Where did my 4x go?"
    assert "hatched: derived" in words(figure) and "ideal 1,000 us" in words(figure)


def test_waterfall_and_bridge_without_a_measurement_say_so():
    assert "taken apart" in words(figures.waterfall(None))
    assert "taken apart" in words(figures.bridge(token_run(LEFT, "fp16", "graph"), None))


def test_perplexity_never_mixes_protocols(published):
    own = [r for r in perplexity_records() if r.quantity == "perplexity"]
    papers = records.select(published, quantity="perplexity")
    figure = figures.perplexity_by_bits(own, papers)
    titles = [a.text for a in figure.layout.annotations if "unquantized" not in a.text]
    assert len(titles) == 3 and titles[0].startswith("measured") and len(set(titles)) == 3
    assert {"circle", "diamond"} <= symbols(figure)
    only = figures.perplexity_by_bits([], papers)
    assert len(only.data) > 3


def test_weight_error_is_logarithmic():
    figure = figures.weight_error(perplexity_records())
    assert figure.layout.yaxis.type == "log" and {t.name for t in figure.data} >= {"rtn", "lloyd", "kmeans"}


def windows_of(factors, method="fp", bits=16, model="builtin"):
    """A perplexity record whose windows are `factors` times ten windows of very different difficulty."""
    base = np.linspace(5.0, 50.0, 10)
    config = {"model": model, "window": 257, "stride": 256, "tokens": 2560, "bits": bits}
    samples = base * factors
    value = float(np.exp(np.log(samples).mean()))
    return records.measured("perplexity", samples.tolist(), method, config, H100, {}, value=value)


def test_losses_are_paired_and_shared_with_round_to_nearest():
    wobble = np.where(np.arange(10) % 2, 1.001, 0.999)
    own = [windows_of(1.0), windows_of(1.2 * wobble, "rtn", 4), windows_of(1.1 * wobble, "kmeans", 4)]
    nearest, best = figures.losses([*own, windows_of(1.5, "nf4", 3)])[:2]
    assert nearest.left == 1 and best.left == pytest.approx(np.log(1.1) / np.log(1.2), rel=1e-3)
    assert best.percent == pytest.approx(10, rel=1e-3)
    low, high = best.interval
    assert low < best.nats < high and high - low < 0.002
    assert figures.losses(own[1:]) == []
    assert figures.losses([own[0], windows_of(1.5, "nf4", 3)])[0].left is None


def test_losses_refuse_two_protocols(published):
    with pytest.raises(ValueError, match="protocols do not compare"):
        figures.losses(records.select(published, quantity="perplexity"))


def test_the_codebooks_of_a_channel_lie_under_its_histogram():
    row = np.random.default_rng(0).standard_normal(500)
    codebooks = {"rtn": [-3.0, -1.0, 1.0, 3.0], "kmeans": [-1.5, -0.4, 0.4, 1.5]}
    figure = figures.codebooks_of_channel(row, codebooks, "a test, channel 0")
    bars, *ticks = figure.data
    assert sum(bars.y) == 500 and {t.name: list(t.x) for t in ticks} == codebooks
    nearest = np.abs(row[:, None] - np.array(codebooks["kmeans"])).argmin(1)
    assert f"for {(nearest == 0).sum()} weights" in ticks[1].text[0]
    assert "channel 0" in figure.layout.title.subtitle.text
    with pytest.raises(ValueError, match="no weights"):
        figures.codebooks_of_channel([], codebooks, "nowhere")


def test_energy_gross_and_net(published):
    figure = figures.energy_bars(decode_records())
    bars = [t for t in figure.data if isinstance(t, go.Bar)]
    assert len(bars) == 2 and "J gross" in words(figure) and "J net" in words(figure)
    assert len(figures.energy_bars(records.select(published, quantity="energy_per_token")).data) >= 2


def test_carbon_is_energy_times_intensity():
    assert figures.carbon_g(5.45, 50) == pytest.approx(0.0757, rel=0.01)
    assert figures.carbon_g(5.45, 400) == pytest.approx(0.61, rel=0.01)
    record = next(r for r in decode_records() if r.quantity == "energy_per_token")
    figure = figures.carbon([record], {"here": 100.0})
    assert figure.data[0].y[0] == pytest.approx(1000 * record.value / 3.6e6 * 100)
    assert symbols(figure) == {"triangle-up"}
    assert figures.GRIDS_SOURCE.split(",")[0] in words(figures.carbon([record]))


def test_claims_need_a_known_verdict():
    row = {"who": "a", "claim": "b", "implies": "c", "measured": "d", "verdict": "refuted: 3 against 4"}
    assert "1 refuted" in words(figures.claims([row]))
    with pytest.raises(ValueError, match="must start with one of"):
        figures.claims([row | {"verdict": "maybe"}])


def test_tradeoffs_join_the_records_of_one_decode(published):
    points = figures.tradeoffs([*published, *decode_records(), *perplexity_records()])
    found = figures.groups(points)
    h100 = next(
        group for (device, model), group in found.items() if "H100" in device and model == "llama-2-7b"
    )
    ours = next(p for p in h100 if p.method == "codebook" and "graph" in p.label)
    assert ours.values["tok_s"] == pytest.approx(310) and ours.values["memory_gb"] == pytest.approx(4.09)
    assert ours.values["j_per_token"] == pytest.approx(320 / 310)
    assert any(p.kinds["tok_s"] == "published" for p in h100), (
        "measured and published names of the device must meet"
    )
    assert {p.kind("memory_gb", "tok_s") for p in h100} >= {"measured", "published"}
    dense = next(p for p in h100 if p.method == "fp16" and p.kinds["tok_s"] == "measured")
    assert dense.values["loss_pct"] == 0


def test_a_longer_context_costs_time_memory_and_energy():
    (point,) = [
        p
        for p in figures.tradeoffs(decode_records())
        if p.label.startswith("codebook") and "graph" in p.label
    ]
    later = point.at(8192)
    more = (8192 - 288) * 524_288
    assert later["memory_gb"] == pytest.approx(point.values["memory_gb"] + more / 1e9)
    assert 1 / later["tok_s"] == pytest.approx(1 / 310 + more / point.roof_gbps / 1e9)
    assert later["j_per_token"] == pytest.approx(320 / later["tok_s"])
    assert point.at(None) == point.values and point.kind("memory_gb", "tok_s", 8192) == "derived"


def pareto_points(published):
    found = figures.groups(figures.tradeoffs([*published, *decode_records()]))
    return next(
        group for (device, model), group in found.items() if "H100" in device and model == "llama-2-7b"
    )


def test_front_holds_what_nothing_beats_and_what_fits(published):
    points = pareto_points(published)
    free = pareto_state.state(points, "memory_gb", "tok_s", None, None)
    stairs = free.front_of_all
    assert stairs.y == sorted(stairs.y) and stairs.x == sorted(stairs.x)
    assert stairs.y[-1] == max(p.values["tok_s"] for p in points if "memory_gb" in p.values and not p.suspect)
    tight = pareto_state.state(points, "memory_gb", "tok_s", None, 3.6)
    assert max(tight.front.x[:-1]) <= 3.6 and pareto_state.UNFIT in tight.colours
    own = [label for label in free.front.labels if label]
    measured = {p.system for p in points if p.kinds["tok_s"] == "measured"}
    assert own and set(own) <= measured


def apply(figure, changes):
    """Do to a copy of the figure what plotly.js does for a step: `restyle` with one value a trace."""
    data = [trace.to_plotly_json() for trace in figure.data]
    change, indices = changes
    for key, values in change.items():
        for index, value in zip(indices, values, strict=True):
            data[index][key] = value
    return data


def test_sliders_hold_every_state_of_the_figure(published):
    points = pareto_points(published)
    figure = figures.pareto(points)
    context, limit = figure.layout.sliders
    assert [s.label for s in context.steps][:2] == ["as recorded", "512"]
    before = figure.data[0].to_plotly_json()
    after = apply(figure, context.steps[3].args)[0]
    expected = pareto_state.state(points, "memory_gb", "tok_s", 8192, None)
    assert after["x"] == [None if v is None else float(f"{v:.5g}") for v in expected.x] != list(before["x"])
    assert after["marker.symbol"] == expected.symbols
    chosen = apply(figure, limit.steps[1].args)
    assert [t["opacity"] for t in chosen[:6]] == [0, 0, 0, 1, 1, 1]
    assert [t["hoverinfo"] for t in chosen[:6]] == ["skip"] * 3 + ["all"] * 3


def test_dropdown_shows_one_view_and_keeps_the_legend(published):
    figure = figures.pareto(pareto_points(published))
    buttons = figure.layout.updatemenus[0].buttons
    assert len(buttons) == 4
    legend = [t.showlegend is not False for t in figure.data]
    for button in buttons:
        visible = button.args[0]["visible"]
        assert len(visible) == len(figure.data)
        assert all(v for v, entry in zip(visible, legend, strict=True) if entry)
        drawn = [i for i, (v, entry) in enumerate(zip(visible, legend, strict=True)) if v and not entry]
        assert len(drawn) == 3 * len(figure.layout.sliders[1].steps) + 1
    assert len(json.dumps(figure.to_plotly_json(), default=str)) < 1_500_000


def test_points_of_two_models_are_refused(published):
    points = figures.tradeoffs(published)
    with pytest.raises(ValueError, match="do not compare"):
        figures.pareto(points)
    assert "No decode" in words(figures.pareto([]))


@pytest.mark.parametrize("seed", range(3))
def test_published_records_alone_give_figures(published, seed):
    group = list(figures.groups(figures.tradeoffs(published)).values())[seed]
    figure = figures.pareto(group)
    assert any(x is not None for x in figure.data[0].x)


def test_live_explorer_shows_something_at_once_and_follows_its_controls(published):
    explorer = ParetoExplorer(figures.tradeoffs([*published, *decode_records()]))
    first = list(explorer.figure.data[0].y)
    assert any(y is not None for y in first), "drawn before anything is touched"
    explorer.context.value = 8192
    assert list(explorer.figure.data[0].y) != first
    explorer.x.value = explorer.y.value = "loss_pct"
    assert explorer.figure.layout.xaxis.title.text.startswith("perplexity")
    assert explorer.figure.layout.yaxis.title.text.startswith("decode speed")
    explorer.published.value = False
    assert "published" not in explorer.figure.layout.title.subtitle.text
    assert {t.name for t in explorer.figure.data if t.showlegend} >= {"fp16", "codebook 4-bit"}


def test_live_explorer_is_for_people_only(capsys):
    headless = type("Book", (), {"live": False})()
    assert explore(headless, figures.tradeoffs(decode_records())) is None
    assert "running notebook" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no record has a decode speed"):
        ParetoExplorer([])


def test_token_bytes_stack_to_the_bytes_of_a_token():
    shapes = [MODELS["llama-2-7b"], MODELS["builtin"]]
    figure = figures.token_bytes(shapes, ("fp16", "codebook-4"), context=256)
    bars = [t for t in figure.data if t.type == "bar" and t.xaxis == "x"]
    total = sum(t.x[1] for t in bars)
    assert total == pytest.approx(shapes[0].bytes_per_token("codebook-4", 256) / 1e9)
    assert "GB a token" in words(figure) and "MB a token" in words(figure)


def test_cards_set_derived_speeds_beside_measured_ones():
    h100, rtx, shape = hardware.find("H100 SXM"), hardware.find("RTX 4090"), MODELS["llama-2-7b"]
    fit = law.Fit(1.0, 3000.0, (0.9, 1.1), (2900, 3100), 7, 0.1)
    there = law_cards.speed_on(rtx, shape, "codebook-4", fit, h100)
    figure = figures.cards([there], [make("decode_speed", 200, "fp16", {"model": "llama-2-7b"})])
    assert {"triangle-up", "circle"} <= symbols(figure)


def test_the_best_dense_method_is_the_preferred_one_unless_clearly_beaten():
    made = gemv_records()
    slower = [gemv("linear-bf16", shape, 500.0) for shape in SHAPES]
    assert figures.best_dense(made + slower) == "linear-fp16"
    assert figures.best_dense(made + slower, prefer="linear-bf16") == "linear-fp16"
    near = [gemv("linear-bf16", tuple((r.config["in_features"], r.config["out_features"])), 0.95 * r.value)
            for r in made if r.method == "linear-fp16" and r.config["l2"] == "cold"]  # fmt: skip
    assert figures.best_dense(made + near) == "linear-fp16"
    with pytest.raises(ValueError, match="no dense product"):
        figures.best_dense([])


def test_the_bound_is_bandwidth_over_bytes_and_lies_on_the_roof():
    read = make("read_bandwidth", ROOF, "read", {"l2": "cold", "bytes": 4 << 30})
    bound = figures.speed_bound(read, MODELS["llama-2-7b"], "codebook-4", context=0)
    assert bound.value == pytest.approx(ROOF * 1e9 / MODELS["llama-2-7b"].bytes_per_token("codebook-4"))
    assert bound.kind == "derived" and read.id in bound.source
    assert "triangle-up" in symbols(figures.speed_by_bytes([bound], ROOF))


def test_the_fastest_dense_product_of_each_place_can_be_the_baseline():
    slow, quick = gemv("linear-fp16", SHAPES[0], 9.0), gemv("linear-bf16", SHAPES[0], 6.0)
    other, ours = gemv("linear-fp16", SHAPES[1], 20.0), gemv("codebook", SHAPES[0], 3.0, 4)
    made = figures.pairs([slow, quick, other, ours, gemv("codebook", SHAPES[1], 40.0, 4)], figures.FASTEST)
    assert [p.baseline for p in made] == [quick, other]
    assert [p.speedup for p in made] == [2.0, 0.5]
    assert "times faster than fastest dense" in words(figures.speedups([slow, quick, ours], figures.FASTEST))


# The accuracy ladder


def ladder_records(model, factor):
    wobble, made = 1 + 0.1 * (np.arange(10) % 2), [windows_of(np.ones(10), model=model)]
    for bits in (4, 2):
        for method, rise in (("rtn", 0.4), ("kmeans", 0.2), ("lnq", 0.1 * factor), ("nf4", -0.1)):
            if (method, bits) != ("nf4", 2):
                made.append(windows_of(np.exp(rise * wobble / bits), method, bits, model))
    return made


def test_the_ladder_shows_what_is_left_of_the_nearest_codes_loss():
    rows = [*ladder_records("a", 1.0), *ladder_records("b", 0.5)]
    left = {(x.record.method, x.record.config["bits"]): x for x in figures.shares(rows[:8])}
    assert left["kmeans", 4].left == pytest.approx(0.5) and left["lnq", 2].left == pytest.approx(0.25)
    assert left["kmeans", 4].interval == pytest.approx((0.5, 0.5)) and ("rtn", 4) not in left
    figure = figures.accuracy_ladder(rows)
    drawn = [t for t in figure.data if t.y and t.x[0]]
    assert len(drawn) == 8 and {t.y[0] for t in drawn} == {"kmeans", "lnq"}
    assert min(t.x[0] for t in drawn) == pytest.approx(12.5)
    notes = [a.text for a in figure.layout.annotations]
    assert notes.count("no loss: nf4") == 2 and {"4 bits", "2 bits"} <= set(notes)
    with pytest.raises(ValueError, match="2 protocols do not compare"):
        figures.shares(rows)


def test_the_ladder_of_divergences_and_of_papers(published):
    config = {"model": "a", "window": 10, "stride": 10, "tokens": 90, "text": "a", "bits": 4}
    rows = [
        records.measured("kl_divergence", values, method, config, H100, {})
        for method, values in (("rtn", [0.4]), ("lnq", [0.1, 0.2, 0.3]))
    ]
    (lnq,) = figures.shares(rows)
    assert lnq.left == pytest.approx(0.5) and lnq.interval == pytest.approx((0.25, 0.75))
    papers = records.select(published, quantity="perplexity")
    figure = figures.accuracy_ladder([], papers)
    drawn = {t.y[0] for t in figure.data if t.y and t.x[0]}
    assert {"squeezellm", "ganq"} <= drawn and "lnq-guided" not in drawn  # its window has no round to nearest
    with pytest.raises(ValueError, match="do not compare"):
        figures.shares([*rows, *ladder_records("a", 1.0)])
    assert "No ladder" in figures.accuracy_ladder([]).layout.annotations[0].text


def test_of_each_model_the_fullest_ladder_is_taken_and_its_other_records_found():
    short, full = ladder_records("a", 1.0)[:3], ladder_records("a", 0.5)
    other = [r.replace(config={**r.config, "stride": 128}) for r in short]
    found = figures.newest_ladders([*other, *full, *ladder_records("b", 1.0)[2:]])
    assert found.keys() == {"a"} and {r.id for r in found["a"]} == {r.id for r in full}
    config = {"model": "a", "bits": 4}
    rows = [
        records.measured("layer_error", [0.1], method, config | {"model": model}, H100, {})
        for method, model in (("lnq", "a"), ("awq", "a"), ("lnq", "b"))
    ]
    (lnq,) = figures.of_ladder(found["a"], rows, "layer_error")
    assert lnq.method == "lnq" and figures.of_ladder([], rows, "layer_error") == []
