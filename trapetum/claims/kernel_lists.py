"""Claims 16 to 19: what the figures of other people's kernel lists say of each other.

For each claim one function says what it implies and one judges it; both take an `Evidence`.
"""

from trapetum.claims.documents import LIST_CARD, MODEL, QTIP, TORCHAO
from trapetum.claims.evidence import (
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
from trapetum.records import Record, implied_gbps

# 16. QTIP's HYB code with V = 1


def qtip_implies(e: Evidence) -> list[Implied]:
    config = e.claimed("bits_per_weight", QTIP).config
    return [
        Implied("states of the trellis", 2 ** config["L"], ""),
        Implied("weights that one codebook entry decodes", config["V"], ""),
        Implied("the table, 16-bit entries", 2 ** config["tlut_bits"] * 2 * config["V"], "bytes"),
    ]


def judge_qtip(e: Evidence) -> Verdict:
    claim = e.claimed("bits_per_weight", QTIP)
    paper = e.claimed("bits_per_weight", "QTIP paper", method="qtip-hyb")
    said, true = claim.config["V"], paper.config["V"]
    reason = f"It calls V = {said} the paper's HYB code; the paper and its kernels use V = {true}, two weights an entry."
    return verdict(said == true, reason, "published", [claim, paper])


# 17. fp6: the smaller model is slower


def _of_method(e: Evidence, name: str, method: str) -> Record | None:
    return first(
        e.published(
            "decode_speed", TORCHAO, model=name, method=method, compile=True, dtype=_DTYPE.get(method)
        )
    )


_DTYPE = {"torchao-fp6": "float16", "torchao-int8wo": "bfloat16", "torchao-int4wo-64": "bfloat16"}


def _ratio(e: Evidence, method: str) -> tuple[float, float, list[Record]]:
    """(7B over 8B in speed, what the bytes say it is, the two records)."""
    small, large = _of_method(e, MODEL, method), _of_method(e, "llama-3-8b", method)
    return small.value / large.value, large.config["bytes"] / small.config["bytes"], [small, large]


def fp6_implies(e: Evidence) -> list[Implied]:
    speed, by_bytes, (small, large) = _ratio(e, "torchao-fp6")
    peak = gpu(LIST_CARD).bandwidth_gbps
    shares = [
        Implied(f"{shape_of(r)}: share of the peak", 100 * r.value * r.config["bytes"] / 1e9 / peak, "%")
        for r in (small, large)
    ]
    return [
        Implied("7B over 8B, claimed", speed, "x"),
        Implied("7B over 8B, by their bytes", by_bytes, "x"),
        *shares,
    ]


def judge_fp6(e: Evidence) -> Verdict:
    speed, by_bytes, used = _ratio(e, "torchao-fp6")
    other, other_bytes, more = _ratio(e, "torchao-int8wo")
    runs = {name: first(e.decodes(model=name, method="torchao-fp6")) for name in (MODEL, "llama-3-8b")}
    if all(runs.values()):
        ratio = runs[MODEL].value / runs["llama-3-8b"].value
        reason = (
            f"Here fp6 decodes the 7B {ratio:.2f}x as fast as the 8B; the list has {speed:.2f}x, the bytes say "
            f"{by_bytes:.2f}x."
        )
        return verdict(near(ratio, speed), reason, "measured", [*runs.values(), *used])
    reason = (
        f"It needs torchao's fp6 kernel on both models. By their bytes the 7B should be {by_bytes:.2f}x as fast as the 8B, "
        f"the list has {speed:.2f}x; for int8 weights it has {other:.2f}x against {other_bytes:.2f}x."
    )
    return not_testable(reason, [*used, *more])


# 18. A quantized cache slows decode at every length


def _cache_rows(e: Evidence, kv_quant: bool) -> list[Record]:
    rows = e.published("decode_speed", TORCHAO, "kv cache", kv_quant=kv_quant)
    return sorted(
        (r for r in rows if not r.config.get("linear_causal_mask")), key=lambda r: r.config["cache_size"]
    )


def _step_growth(e: Evidence) -> tuple[float, float]:
    """Seconds that a token got longer from the shortest to the longest cache, and seconds to read that cache in full."""
    short, *_, long = _cache_rows(e, False)
    tokens = long.config["cache_size"] - short.config["cache_size"]
    reading = model("llama-3-8b").kv_bytes(tokens) / gpu(LIST_CARD).bandwidth_gbps / 1e9
    return 1 / long.value - 1 / short.value, reading


def cache_implies(e: Evidence) -> list[Implied]:
    grown, reading = _step_growth(e)
    long = _cache_rows(e, False)[-1]
    full = model("llama-3-8b").kv_bytes(long.config["cache_size"])
    bound = gpu(LIST_CARD).bandwidth_gbps * 1e9 / (full + long.config["bytes"])
    return [
        Implied("full cache at the longest setting", full / 1e9, "GB"),
        Implied("byte bound there, cache full", bound, "tok/s"),
        Implied("a token got longer by", 1e3 * grown, "ms"),
        Implied("reading the longer cache takes", 1e3 * reading, "ms"),
    ]


def _beside_16_bits(e: Evidence) -> list[tuple[Record, Record]]:
    """(decode with a quantized cache, the same with a 16-bit one) by format and context, the newest of one device."""
    pairs: dict[tuple, tuple[Record, Record]] = {}
    found = e.measured("context_speed", kv=("int8", "int4"))
    for run in [r for r in found if device_name(r) == device_name(found[0])]:
        same = {name: run.config.get(name) for name in ("stage", "bits", "lm_head", "context")}
        where = {"model": shape_of(run), "device": device_name(run), "method": run.method}
        plain = first(e.measured("context_speed", kv=("fp16", "bf16"), **where, **same))
        if plain:
            pairs.setdefault((where["model"], run.method, run.config["kv"], same["context"]), (run, plain))
    return list(pairs.values())


def _judged_by_own(pairs: list[tuple[Record, Record]]) -> Verdict:
    gains = [run.value / plain.value for run, plain in pairs]
    run, plain = max(pairs, key=lambda pair: pair[0].config["context"])
    faster, at = sum(gain > 1 for gain in gains), run.config["context"]
    reason = (
        f"Here a quantized cache is faster in {faster} of {len(gains)} cases of format and length on {device_name(run)}, "
        f"{min(gains):.2f}x to {max(gains):.2f}x; at {at:,} tokens {run.config['kv']} makes {text(run.value)} tok/s and "
        f"16 bits {text(plain.value)}."
    )
    return verdict(not faster, reason, "measured", [r for pair in pairs for r in pair])


def judge_cache(e: Evidence) -> Verdict:
    pairs = _beside_16_bits(e)
    if pairs:
        return _judged_by_own(pairs)
    plain, quantized = _cache_rows(e, False), _cache_rows(e, True)
    slower = [q.value < p.value for p, q in zip(plain, quantized, strict=True)]
    grown, reading = _step_growth(e)
    reason = (
        f"Slower at {sum(slower)} of {len(slower)} settings of its list; but with the setting a token grows by "
        f"{text(1e3 * grown)} ms, where reading the whole longer cache takes {text(1e3 * reading)} ms and only "
        f"{plain[-1].config['new_tokens']} tokens are in it: the padding costs, not the format."
    )
    return verdict(all(slower) and grown < 2 * reading, reason, "arithmetic", [*plain, *quantized])


# 19. int8dq and uintx are slow


def _slow_rows(e: Evidence) -> list[Record]:
    methods = ("torchao-int8dq", "torchao-uintx-4-64", "torchao-uintx-2-8")
    return [r for m in methods if (r := first(e.published("decode_speed", TORCHAO, model=MODEL, method=m)))]


def _peak_share(run: Record) -> float:
    return run.value * run.config["bytes"] / 1e9 / gpu(LIST_CARD).bandwidth_gbps


def slow_implies(e: Evidence) -> list[Implied]:
    return [Implied(f"{r.method}: share of the peak", 100 * _peak_share(r), "%") for r in _slow_rows(e)]


def judge_slow(e: Evidence) -> Verdict:
    slow = _slow_rows(e)
    best_slow = max(map(_peak_share, slow))
    ours = [r for r in e.measured("gemv_time", method="codebook", l2="cold") if share_of_read(e, r)]
    same_bytes = _of_method(e, MODEL, "torchao-int8wo")
    if ours:
        run = max(ours, key=lambda r: share_of_read(e, r))
        share = share_of_read(e, run)
        reason = (
            f"A {run.config['bits']}-bit codebook product reaches {100 * share:.0f} % of what a plain read does on "
            f"{device_name(run)}; the listed kernels reach {100 * best_slow:.0f} % of their card's peak or less."
        )
        return verdict(share < 2 * best_slow, reason, "measured", [run, *slow])
    reason = (
        f"The same list has int8 weights at {text(same_bytes.value)} tok/s with the bytes of int8dq's {text(slow[0].value)}: "
        "the kernel is slow, not the format."
    )
    return verdict(same_bytes.value < 2 * slow[0].value, reason, "arithmetic", [same_bytes, *slow])


def share_of_read(e: Evidence, run: Record) -> float | None:
    """The bandwidth a record implies over what a plain read reaches (else the peak) on the same device; None: unknown."""
    implied = implied_gbps(run)
    reads = e.measured("read_bandwidth", device=run.device.get("name"))
    if implied is None or not reads:
        return None
    return implied / max(r.value for r in reads)
