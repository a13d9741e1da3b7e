"""Claims 6 to 10: which formats a GPU knows, what sparsity saves, what its bandwidth allows a 4-bit product.

For each claim one function says what it implies and one judges it; both take an `Evidence`.
"""

from trapetum import law
from trapetum.claims.documents import ARTICLE, LIST, NOTES, SQUARE, TRAPETUM
from trapetum.claims.evidence import (
    Evidence,
    Implied,
    Verdict,
    device_name,
    first,
    gpu,
    near,
    not_testable,
    text,
    verdict,
)
from trapetum.records import Record

# 6. Which tensor cores know int4 and 1 bit

NATIVE_INSTRUCTIONS = 2  # a native operation is one instruction; one more may set up its registers


def formats_imply(e: Evidence) -> list[Implied]:
    return [
        Implied("multiply-adds in one int4 operation (16 x 8 x 64)", 16 * 8 * 64, ""),
        Implied("instructions it takes where it is native", 1, ""),
    ]


def judge_formats(e: Evidence) -> Verdict:
    count = {
        (r.config["format"], r.config["arch"]): r
        for r in e.derived("instruction_count", method="tensor-core")
    }
    asked = [("int4", "sm_80"), ("int4", "sm_90"), ("int4", "sm_100"), ("b1", "sm_80")]
    found = {key: count[key] for key in asked if key in count}
    if ("int4", "sm_90") not in found or ("b1", "sm_80") not in found:
        return not_testable(
            "It needs NVRTC (`pip install 'trapetum[gpu]'`) to compile the operations; no GPU."
        )
    native = {key: r.value <= NATIVE_INSTRUCTIONS for key, r in found.items()}
    said = ", ".join(f"{f} on {arch}: {text(r.value)}" for (f, arch), r in found.items())
    holds = native["int4", "sm_90"] and native.get(("int4", "sm_100"), True) and not native["b1", "sm_80"]
    reason = (
        f"Machine instructions for one operation: {said}. Hopper and Blackwell emulate int4 by int8, "
        "while Ampere has binary operations of its own."
    )
    return verdict(
        holds,
        reason if not holds else f"Machine instructions for one operation: {said}.",
        "compiled",
        found.values(),
    )


# 7. The benchmark code runs


def calls_imply(e: Evidence) -> list[Implied]:
    return [Implied("rows that its decode test gives to torch._int_mm", 1, "rows")]


def judge_calls(e: Evidence) -> Verdict:
    tried = [r for r in e.measured("call_accepted") if r.config.get("as_printed")]
    if not tried:
        return not_testable("It needs a CUDA device: the calls take other paths on a CPU.")
    refused = [r for r in tried if r.value == 0]
    said = "; ".join(f"{r.config['call']}: {r.config['error']}" for r in refused)
    reason = (
        f"{len(refused)} of its {len(tried)} calls are refused on {device_name(tried[0])}. {said}".strip()
    )
    return verdict(not refused, reason, "measured", tried)


# 8. 70B in FP4 with 2:4 sparsity

_KEPT = 0.5  # of the weights, with 2:4 sparsity
_INDEX_BITS = 2  # position of each kept weight in its group of four
_SCALE_BITS = 8 / 16  # NVFP4: one FP8 scale for 16 weights


def sparse_gb(parameters: float, scales: bool = True) -> float:
    """GB of `parameters` weights in FP4 with 2:4 sparsity: kept values, their positions, block scales if wanted.

    Counts one scale for 16 weights of the dense matrix; embeddings and the head, usually kept in 16 bits, come on top.
    """
    bits = _KEPT * (4 + _INDEX_BITS) + (_SCALE_BITS if scales else 0)
    return parameters * bits / 8 / 1e9


def _sparse_claim(e: Evidence, quantity: str) -> Record:
    return e.claimed(quantity, ARTICLE, method="nvfp4-2:4")


def sparse_implies(e: Evidence) -> list[Implied]:
    memory, speed = _sparse_claim(e, "model_memory"), _sparse_claim(e, "decode_speed")
    parameters = memory.config["parameters"]
    bandwidth = memory.value * speed.value
    return [
        Implied("bandwidth at the claimed size and speed", bandwidth, "GB/s"),
        Implied("with the positions of the kept weights", sparse_gb(parameters, scales=False), "GB"),
        Implied("and the block scales", sparse_gb(parameters), "GB"),
        Implied("speed at the same bandwidth", bandwidth / sparse_gb(parameters), "tok/s"),
    ]


def judge_sparse(e: Evidence) -> Verdict:
    memory, speed = _sparse_claim(e, "model_memory"), _sparse_claim(e, "decode_speed")
    real = sparse_gb(memory.config["parameters"])
    reason = (
        f"Positions and block scales make it {text(real)} GB, not {text(memory.value)}; at the same bandwidth that is "
        f"{text(speed.value * memory.value / real)} tok/s, not {text(speed.value)}."
    )
    return verdict(near(real, memory.value), reason, "arithmetic", [memory, speed])


# 9. Parity on an H100


def _parity_claim(e: Evidence) -> Record:
    return e.claimed("speedup", TRAPETUM, "H100 PCIe", method="study-codebook")


def parity_implies(e: Evidence) -> list[Implied]:
    h100 = gpu("H100 PCIe")
    fp16, codes = (law.gemv_bytes(4096, 4096, f) for f in ("fp16", "codebook-4"))
    per_weight = e.claimed("instructions_per_weight", LIST, method="study-codebook").value
    issue_us = 4096 * 4096 * per_weight / (128 * h100.sms * h100.boost_ghz * 1e3)
    return [
        Implied("fp16 floor at the peak bandwidth", law.floor_us(fp16, h100.bandwidth_gbps), "us"),
        Implied("4-bit floor at the peak bandwidth", law.floor_us(codes, h100.bandwidth_gbps), "us"),
        Implied("ratio of the bytes", fp16 / codes, "x"),
        Implied(f"{per_weight:g} instructions a weight, issued without a stall", issue_us, "us"),
    ]


def _pair(e: Evidence, on: str) -> tuple[str, Record | None, Record | None]:
    """(basis, fp16, 4-bit codebook) at 4096 x 4096, cold."""
    cold = dict(l2="cold", **SQUARE)
    dense = first(e.measured("gemv_time", on, method="linear-fp16", **cold))
    codes = [
        r
        for r in e.measured("gemv_time", on, method="codebook", bits=4, **cold)
        if dense and device_name(r) == device_name(dense)
    ]
    if dense and codes:
        return "measured", dense, min(codes, key=lambda r: (r.config.get("chain") != "alone", r.value))
    peers = dict(document=NOTES, place="peers", **SQUARE)
    return (
        "published",
        first(e.published("gemv_time", method="linear-fp16", **peers)),
        first(e.published("gemv_time", method="codebook-prototype", chain="alone", **peers)),
    )


def judge_parity(e: Evidence) -> Verdict:
    claim = _parity_claim(e)
    basis, dense, codes = _pair(e, "H100")
    if not (dense and codes):
        return not_testable("It needs fp16 and 4-bit codebook products timed on an H100.", [claim])
    ratio = dense.value / codes.value
    reason = (
        f"A 4-bit codebook kernel takes {text(codes.value)} us where cuBLAS fp16 takes {text(dense.value)} us on "
        f"{device_name(dense)}: {ratio:.1f}x, not {claim.value:g}x; the tie was the kernel's, not the card's."
    )
    return verdict(near(ratio, claim.value), reason, basis, [dense, codes, claim])


# 10. 3.7x on the MLP shapes


def _mlp_claim(e: Evidence) -> Record:
    return e.claimed("speedup", TRAPETUM, "11008 x 4096", in_features=11008, out_features=4096)


def mlp_implies(e: Evidence) -> list[Implied]:
    card = gpu("RTX 4090")
    fp16, codes = (law.gemv_bytes(11008, 4096, f) for f in ("fp16", "codebook-4"))
    return [
        Implied("fp16 bytes", fp16 / 1e6, "MB"),
        Implied("4-bit bytes", codes / 1e6, "MB"),
        Implied("L2 of an RTX 4090", card.l2_bytes / 1e6, "MB"),
        Implied("ratio of the bytes, the most that memory can give", fp16 / codes, "x"),
    ]


def _mlp_times(e: Evidence, on: str) -> dict[str, Record | None]:
    shape = dict(in_features=11008, out_features=4096)
    dense = first(
        e.measured("gemv_time", on, method=("mv-fp16", "linear-fp16", "linear-fp32"), l2="cold", **shape)
    )
    where = device_name(dense) if dense else ""
    codes = {
        l2: first(
            [
                r
                for r in e.measured("gemv_time", on, method="codebook", bits=4, l2=l2, **shape)
                if device_name(r) == where
            ]
        )
        for l2 in ("cold", "warm")
    }
    return {"dense": dense, **codes}


def judge_mlp(e: Evidence) -> Verdict:
    claim = _mlp_claim(e)
    times = _mlp_times(e, "4090")
    if times["dense"] and times["cold"]:
        ratio = times["dense"].value / times["cold"].value
        reason = f"Both from memory, the codes are {ratio:.2f}x faster than fp16 on an RTX 4090; claimed is {claim.value:g}x."
        return verdict(near(ratio, claim.value), reason, "measured", [times["dense"], times["cold"], claim])
    elsewhere = _mlp_times(e, "")
    reason = "It needs an RTX 4090 with both sides cold. "
    if all(elsewhere.values()):
        dense = elsewhere["dense"]
        cold, warm = (dense.value / elsewhere[k].value for k in ("cold", "warm"))
        reason += (
            f"On {device_name(dense)} {dense.method} from memory over the codes gives {cold:.1f}x with codes from memory, "
            f"{warm:.1f}x with codes from the cache."
        )
    else:
        share = e.claimed("peak_fraction", LIST, "row 10").value
        reason += f"Its own fp16 time implies {100 * share:.0f} % of the card's bandwidth."
    return not_testable(reason, [claim, *(r for r in elsewhere.values() if r)])
