"""Claims 1 to 5: how long matrix products take on an H100.

For each claim one function says what it implies and one judges it; both take an `Evidence`.
"""

from trapetum import law
from trapetum.claims.documents import ARTICLE, MEAN_CONTEXT, NOTES, PREFILL, SQUARE
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
    text,
    verdict,
)
from trapetum.records import Record

# 1. Marlin decodes at 520 to 530 tok/s


def _marlin_claim(e: Evidence) -> Record:
    return e.claimed("decode_speed", ARTICLE, "Marlin", method="marlin-gptq")


def marlin_implies(e: Evidence) -> list[Implied]:
    speed = _marlin_claim(e).value
    nbytes = model("llama-2-7b").bytes_per_token("codebook-4", MEAN_CONTEXT)
    needed = nbytes * speed / 1e9
    return [
        Implied("time of one token", 1e6 / speed, "us"),
        Implied("bytes of one token", nbytes / 1e9, "GB"),
        Implied("bandwidth needed", needed, "GB/s"),
        Implied("share of an H100's peak", 100 * needed / gpu("H100 SXM").bandwidth_gbps, "%"),
    ]


def judge_marlin(e: Evidence) -> Verdict:
    claim = _marlin_claim(e)
    best = max(e.decodes("H100", "llama-2-7b", bits=4), key=lambda r: r.value, default=None)
    aside = f" The fastest 4-bit decode measured is {text(best.value)} tok/s ({best.method})." if best else ""
    run = first(e.decodes("H100", "llama-2-7b", method=("marlin", claim.method)))
    if run:
        reason = f"Marlin decodes at {text(run.value)} tok/s here, claimed are {text(claim.value)}."
        return verdict(run.value >= (1 - TOLERANCE) * claim.value, reason, "measured", [run, claim])
    products = first(
        e.measured("linears_time", "H100", "llama-2-7b", method="marlin")
        + e.published("linears_time", NOTES, model="llama-2-7b", method="marlin")
    )
    used = [r for r in (products, claim, best) if r]
    if products and 1e6 / products.value < claim.value:
        limit = 1e6 / products.value
        reason = (
            f"Marlin's products alone take {text(products.value)} us a token, which leaves at most {text(limit)} tok/s "
            f"before any attention or norm; claimed are {text(claim.value)}.{aside}"
        )
        return verdict(False, reason, "measured" if products.kind == "measured" else "published", used)
    return not_testable(
        f"It needs a Marlin decode, or the time of its products, on an H100.{aside}", used[-1:]
    )


# 2. Shares of peak


def _formats(e: Evidence) -> list[tuple[str, Record, float, float]]:
    """(format, throughput record, recomputed share of peak, claimed share) of each row of the article's table."""
    table = {
        r.config["format"]: r.value for r in e.published("peak_throughput", ARTICLE, "H100 (SXM)") if r.config
    }
    rows = []
    for done in e.published("gemm_throughput", ARTICLE):
        name = done.config["format"]
        peak = table.get(name) or gpu("H100 SXM").peak[name]
        claim = e.claimed("peak_fraction", ARTICLE, method=done.method)
        rows.append((name, done, done.value / peak, claim.value))
    return rows


def peaks_imply(e: Evidence) -> list[Implied]:
    return [
        Implied(f"{name}: throughput over peak", 100 * share, "%")
        for name, _, share, _ in _formats(e)
        if share
    ]


def judge_peaks(e: Evidence) -> Verdict:
    rows = _formats(e)
    wrong = [(name, share, claim) for name, _, share, claim in rows if not near(share, claim)]
    parts = ", ".join(f"{name} {100 * share:.1f} % for {100 * claim:.0f} %" for name, share, claim in wrong)
    right = ", ".join(name for name, _, share, claim in rows if near(share, claim)) or "none"
    used = [done for _, done, _, _ in rows]
    reason = f"Its throughputs over its own peaks give {parts}; consistent: {right}."
    return verdict(not wrong, reason, "arithmetic", used)


# 3. A prefill product in fp16


def prefill_implies(e: Evidence) -> list[Implied]:
    claim = e.claimed("gemm_time", ARTICLE, "cuBLAS GEMM", method="linear-fp16")
    flops = 2 * PREFILL["rows"] * PREFILL["in_features"] * PREFILL["out_features"]
    peak = gpu("H100 SXM").peak["fp16"]
    floor = flops / peak / 1e6
    return [
        Implied("work", flops / 1e9, "GFLOP"),
        Implied("time at the fp16 peak", floor, "us"),
        Implied("share of the peak at the claimed time", 100 * floor / claim.value, "%"),
    ]


def judge_prefill(e: Evidence) -> Verdict:
    claim = e.claimed("gemm_time", ARTICLE, "cuBLAS GEMM", method="linear-fp16")
    run = first(e.measured("gemm_time", "H100", method="linear-fp16", **PREFILL))
    if run is None:
        return not_testable("It needs a timed fp16 product of 2048 rows on an H100.", [claim])
    reason = f"cuBLAS takes {text(run.value)} us on {device_name(run)}; claimed are {text(claim.value)} us."
    return verdict(near(run.value, claim.value), reason, "measured", [run, claim])


# 4. The winner at 2048 rows


def _contestants(e: Evidence) -> list[Record]:
    return e.published("gemm_time", ARTICLE, "W4A16 kernel comparison, row (2048")


def winner_implies(e: Evidence) -> list[Implied]:
    peak = gpu("H100 SXM").peak["fp16"]
    flops = 2 * PREFILL["rows"] * PREFILL["in_features"] * PREFILL["out_features"]
    return [
        Implied(f"{r.method}: share of the fp16 peak", 100 * flops / r.value / peak / 1e6, "%")
        for r in _contestants(e)
    ]


def judge_winner(e: Evidence) -> Verdict:
    rows = _contestants(e)
    fastest = min(rows, key=lambda r: r.value)
    ours = [
        first(e.measured("gemm_time", "H100", method=m, **PREFILL)) for m in ("linear-fp16", "tinygemm-int4")
    ]
    aside = ""
    if all(ours):
        aside = " Measured: " + ", ".join(f"{r.method} {text(r.value)} us" for r in ours) + "."
    reason = f"The row names fp16 the winner, but its smallest time is {fastest.method}'s {text(fastest.value)} us.{aside}"
    return verdict(fastest.method == "linear-fp16", reason, "arithmetic", [*rows, *(r for r in ours if r)])


# 5. cuBLAS at batch 1


def _cublas_claim(e: Evidence) -> Record:
    return e.claimed("gemv_time", ARTICLE, method="linear-fp16", **SQUARE)


def cublas_implies(e: Evidence) -> list[Implied]:
    claim, h100 = _cublas_claim(e), gpu("H100 SXM")
    nbytes = law.gemv_bytes(4096, 4096, "fp16")
    return [
        Implied("bytes", nbytes / 1e6, "MB"),
        Implied("floor at the peak bandwidth", law.floor_us(nbytes, h100.bandwidth_gbps), "us"),
        Implied("bandwidth at the claimed time", law.gbps(nbytes, claim.value), "GB/s"),
        Implied("share of the peak", 100 * law.mbu(nbytes, claim.value, h100.bandwidth_gbps), "%"),
    ]


def judge_cublas(e: Evidence) -> Verdict:
    claim = _cublas_claim(e)
    runs = {
        l2: first(e.measured("gemv_time", "H100", method="linear-fp16", l2=l2, **SQUARE))
        for l2 in ("cold", "warm")
    }
    basis = "measured"
    if not runs["cold"]:
        basis = "published"
        runs = {"cold": first(e.published("gemv_time", NOTES, "peers", method="linear-fp16", **SQUARE))}
    found = [r for r in runs.values() if r]
    if not found:
        return not_testable("It needs cuBLAS fp16 timed at 4096 x 4096 on an H100.", [claim])
    times = [r.value for r in found]
    said = " and ".join(f"{text(r.value)} us {l2}" for l2, r in runs.items() if r)
    reason = f"cuBLAS takes {said} on {device_name(found[0])}; claimed are {text(claim.value)} us."
    holds = (1 - TOLERANCE) * min(times) <= claim.value <= (1 + TOLERANCE) * max(times)
    return verdict(holds, reason, basis, [*found, claim])
