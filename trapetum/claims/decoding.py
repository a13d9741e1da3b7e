"""Claims 11 to 15: whole decodes, accuracy, energy.

For each claim one function says what it implies and one judges it; both take an `Evidence`.
"""

from trapetum.claims.documents import LANDING, LIST, MODEL, NOTES, TRAPETUM
from trapetum.claims.evidence import (
    TOLERANCE,
    Evidence,
    Implied,
    Verdict,
    device_name,
    first,
    gpu,
    model,
    near,
    not_testable,
    shape_of,
    text,
    verdict,
)
from trapetum.records import Record

# 11. On an H100 every quantized 7B decodes slower than fp16


def _slow_claim(e: Evidence) -> Record:
    return e.claimed("decode_speed", TRAPETUM, "single-harness", model=MODEL, method="fp16")


def slower_implies(e: Evidence) -> list[Implied]:
    speed, card = _slow_claim(e).value, gpu("H100 PCIe")
    nbytes = model(MODEL).bytes_per_token("fp16")
    return [
        Implied("time of one token", 1e3 / speed, "ms"),
        Implied("its bytes at the peak bandwidth", nbytes / card.bandwidth_gbps / 1e6, "ms"),
        Implied("bandwidth in use", nbytes * speed / 1e9, "GB/s"),
        Implied("share of the peak", 100 * nbytes * speed / 1e9 / card.bandwidth_gbps, "%"),
    ]


def _decodes(e: Evidence, stage: str) -> dict[str, Record | None]:
    """The newest fp16 and 4-bit decode of a 7B on one H100 at one stage."""
    dense = first(e.decodes("H100", MODEL, method="fp16", stage=stage))
    codes = e.decodes("H100", MODEL, method="codebook", bits=4, stage=stage)
    return {
        "fp16": dense,
        "codebook": first([r for r in codes if dense and device_name(r) == device_name(dense)]),
    }


def judge_slower(e: Evidence) -> Verdict:
    claim = _slow_claim(e)
    pairs = {stage: pair for stage in ("naive", "graph") if all((pair := _decodes(e, stage)).values())}
    if "graph" in pairs:
        said = ", ".join(
            f"{stage}: fp16 {text(p['fp16'].value)}, codes {text(p['codebook'].value)} tok/s"
            for stage, p in pairs.items()
        )
        used = [r for p in pairs.values() for r in p.values()]
        slower = pairs["graph"]["codebook"].value < pairs["graph"]["fp16"].value
        end = "lose" if slower else "win"
        reason = f"On {device_name(used[0])}, {said}. Without launches in the way fewer bytes {end}."
        return verdict(slower, reason, "measured", [*used, claim])
    peers = [first(e.published("decode_speed", NOTES, method="gpt-fast", bits=b)) for b in (16, 4)]
    if not all(peers):
        return not_testable("It needs fp16 and 4-bit decodes of a 7B in one CUDA graph on an H100.", [claim])
    reason = (
        f"On an H100 gpt-fast decodes at {text(peers[0].value)} tok/s in bf16 and {text(peers[1].value)} in int4: "
        "with the launches out of the way, fewer bytes win."
    )
    return verdict(peers[1].value < peers[0].value, reason, "published", [*peers, claim])


# 12. 135 tok/s because no Python runs


def _runtime(e: Evidence) -> tuple[Record, Record, Record]:
    """The headline, the same runtime over 512 tokens, and the Python loop around a captured graph."""
    return (
        e.claimed("decode_speed", LANDING, "headline", host="rust"),
        e.claimed("decode_speed", TRAPETUM, "Rust runtime", host="rust"),
        e.claimed("decode_speed", TRAPETUM, "integration path", stage="graph"),
    )


def _by_bytes(short: Record, long: Record) -> float:
    """How much faster the short run may be for its smaller cache alone."""
    return long.config["bytes"] / short.config["bytes"]


def runtime_implies(e: Evidence) -> list[Implied]:
    short, long, graph = _runtime(e)
    return [
        Implied("bandwidth at the headline's speed", short.value * short.config["bytes"] / 1e9, "GB/s"),
        Implied("headline over the same runtime at 512 tokens", short.value / long.value, "x"),
        Implied("what the smaller cache explains of that", _by_bytes(short, long), "x"),
        Implied("headline over the Python loop around a graph", short.value / graph.value, "x"),
    ]


def judge_runtime(e: Evidence) -> Verdict:
    short, long, graph = _runtime(e)
    ratio = first(e.measured("speedup", runtime="c++", baseline="python"))
    if ratio:
        run, where = ratio.config.get("run"), device_name(ratio)
        both = [r for r in e.measured("decode_speed", device=where, run=run) if r.config.get("runtime")]
        reason = f"The same step decoded from C++ instead of Python, in turns, is {ratio.value:.2f}x as fast on {where}."
        return verdict(ratio.value > 1 + TOLERANCE, reason, "measured", [ratio, *both])
    gain, explained = short.value / long.value, _by_bytes(short, long)
    reason = (
        f"Its own table has {text(long.value)} tok/s over 512 tokens, {gain:.2f}x less, where the cache explains "
        f"{explained:.2f}x; and its Python loop around a graph makes {text(graph.value)}, so Python costs at most "
        f"{short.value / graph.value:.2f}x."
    )
    return verdict(near(gain, explained), reason, "arithmetic", [short, long, graph])


# 13. Three fp16 perplexities of one model

SAME_PROTOCOL = 0.005  # two runs of one protocol differ by less than this


def _dense_perplexities(e: Evidence) -> list[Record]:
    return e.published("perplexity", TRAPETUM, model=MODEL, method="fp")


def _spread(values: list[float]) -> float:
    return max(values) / min(values) - 1


def perplexities_imply(e: Evidence) -> list[Implied]:
    values = [r.value for r in _dense_perplexities(e)]
    return [
        Implied("largest over smallest", 1 + _spread(values), "x"),
        Implied("figures", len(set(values)), ""),
    ]


def judge_perplexities(e: Evidence) -> Verdict:
    rows = _dense_perplexities(e)
    values = sorted({r.value for r in rows})
    stated = sum("window" in r.config for r in rows)
    here = e.measured("perplexity", method="fp")
    here = [r for r in here if shape_of(r) == shape_of(here[0]) and r.device == here[0].device]
    protocols = {(r.config.get("window"), r.config.get("stride")): r for r in here}
    aside = ""
    if len(protocols) > 1:
        said = ", ".join(f"{text(r.value)} at window {w}, stride {s}" for (w, s), r in protocols.items())
        aside = f" One model here, several protocols: {said}."
    reason = (
        f"{', '.join(map(text, values))}: {100 * _spread(values):.0f} % apart for the same weights, and {stated} of the "
        f"{len(rows)} states window and stride.{aside}"
    )
    return verdict(_spread(values) < SAME_PROTOCOL, reason, "arithmetic", [*rows, *protocols.values()])


# 14. Calibration does not close the gap

PLAIN = ("lloyd", "kmeans", "rtn")
CALIBRATED = ("lnq-guided", "lnq", "gptq", "kmeans-weighted")
CLOSED = 0.5  # of the gap: from here on it counts as closing


def _plain_gap(e: Evidence) -> tuple[Record, Record]:
    rows = e.published("perplexity", TRAPETUM, "4-bit accuracy table", model=MODEL)
    return rows[0], min((r for r in rows if r.method != "fp"), key=lambda r: r.value)


def calibration_implies(e: Evidence) -> list[Implied]:
    dense, best = _plain_gap(e)
    ratios = e.published("perplexity_ratio", LIST, "row 14")
    gaps = [Implied(f"{r.method}, 4.05 bits: perplexity over fp16", 100 * (r.value - 1), "%") for r in ratios]
    return [Implied("its best attempt, over its own fp16", 100 * (best.value / dense.value - 1), "%"), *gaps]


def _measured_gaps(e: Evidence) -> tuple[list[Record], float] | None:
    """The records and the share of the 4-bit gap that calibration closes, on one model, text and protocol."""

    def same(a: Record, b: Record) -> bool:
        keys = ("model", "window", "stride", "tokens", "text_sha256")
        return all(a.config.get(k) == b.config.get(k) for k in keys) and a.device == b.device

    for dense in e.measured("perplexity", method="fp"):
        found = [r for r in e.measured("perplexity", bits=4) if same(r, dense)]
        plain = next((r for m in PLAIN for r in found if r.method == m), None)
        better = next((r for m in CALIBRATED for r in found if r.method == m), None)
        if plain and better and plain.value > dense.value:
            closed = (plain.value - better.value) / (plain.value - dense.value)
            return [dense, plain, better], closed
    return None


def judge_calibration(e: Evidence) -> Verdict:
    measured = _measured_gaps(e)
    if measured and (measured[1] >= CLOSED or measured[0][2].method == CALIBRATED[0]):
        (dense, plain, better), closed = measured
        reason = (
            f"On {shape_of(dense)}, {better.method} closes {100 * closed:.0f} % of the gap that {plain.method} leaves "
            f"at 4 bits ({text(dense.value, 4)}, {text(better.value, 4)}, {text(plain.value, 4)})."
        )
        return verdict(closed < CLOSED, reason, "measured", measured[0])
    ratio = {r.method: r for r in e.published("perplexity_ratio", LIST, "row 14")}
    best, plain = min(ratio.values(), key=lambda r: r.value), ratio["study-kmeans"]
    closed = 1 - (best.value - 1) / (plain.value - 1)
    reason = (
        f"At the same 4.05 bits {best.method} is published at +{100 * (best.value - 1):.1f} % where it has "
        f"+{100 * (plain.value - 1):.1f} %: {100 * closed:.0f} % of the gap closed."
    )
    return verdict(closed < CLOSED, reason, "published", [best, plain])


# 15. 2.1x less energy per token


def _joules(e: Evidence) -> tuple[Record, Record]:
    runs = e.published("energy_per_token", TRAPETUM, "batch-1 decode")
    return runs[0], next(r for r in runs if r.config.get("host") == "rust")


def energy_implies(e: Evidence) -> list[Implied]:
    dense, codes = _joules(e)
    speed = {r.source: r.value for r in e.published("decode_speed", TRAPETUM, "batch-1 decode")}
    return [
        Implied("ratio of its two figures", dense.value / codes.value, "x"),
        Implied("mean power, fp16", dense.value * speed[dense.source], "W"),
        Implied("mean power, 4-bit", codes.value * speed[codes.source], "W"),
    ]


def _energy_pair(e: Evidence, accounting: str) -> list[Record]:
    codes = e.measured(
        "energy_per_token", method="codebook", bits=4, accounting=accounting, kv=(None, "fp16")
    )
    for ours in (r for r in codes if str(r.device.get("arch", "")).startswith("sm_")):
        same = dict(accounting=accounting, stage=ours.config.get("stage"), model=ours.config.get("model"))
        dense = e.measured(
            "energy_per_token", method="fp16", device=ours.device.get("name"), **_renamed(same)
        )
        if dense:
            return [dense[0], ours]
    return []


def _renamed(filters: dict) -> dict:
    """`Evidence.measured` takes `model` as a shape, without `random:` before it."""
    return {**filters, "model": str(filters["model"]).removeprefix("random:")}


def judge_energy(e: Evidence) -> Verdict:
    claim = e.claimed("energy_ratio", LANDING)
    pairs = {a: pair for a in ("gross", "net") if (pair := _energy_pair(e, a))}
    basis, ratios, used = "measured", {}, []
    for accounting, (dense, codes) in pairs.items():
        ratios[accounting] = dense.value / codes.value
        used += [dense, codes]
    where = device_name(used[0]) if used else "the same card, measured again later"
    if not ratios:
        basis = "published"
        used = e.published("energy_ratio", LIST, "row 15")
        ratios = {r.config["accounting"]: r.value for r in used}
    if "gross" not in ratios:
        return not_testable(
            "It needs the joules of fp16 and of 4-bit tokens from one GPU's energy counter.", [claim]
        )
    said = ", ".join(f"{value:.2f}x {accounting}" for accounting, value in ratios.items())
    reason = f"Joules per token, fp16 over 4 bits, on {where}: {said}; claimed is {claim.value:g}x, gross, from one run."
    return verdict(ratios["gross"] >= (1 - TOLERANCE) * claim.value, reason, basis, [*used, claim])
