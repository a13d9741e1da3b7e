"""The README's table of targets: what the kernels were asked for, what was measured, and what was missed by how much."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from trapetum import records as rec
from trapetum.records import Record

LARGE = {"in_features": 8192, "out_features": 28672}


class Target(NamedTuple):
    """One line: what is asked, the bound, and the worst measured case.

    Attributes:
        what: in words.
        bound: the figure asked for.
        at_least: whether more is better; else less.
        case: the records whose ratio (or single value) is compared, and where it was; None where nothing was measured.
        why: the reason of a miss; shown only then.
        goal: what was hoped for beyond the bound, in words.
    """

    what: str
    bound: float
    at_least: bool
    case: "Case | None"
    why: str = ""
    goal: str = ""

    @property
    def met(self) -> bool:
        """Whether the measured figure keeps the bound; False where there is none."""
        if self.case is None:
            return False
        value = self.case.value
        return value >= self.bound if self.at_least else value <= self.bound


class Case(NamedTuple):
    """A measured figure: `top` over `bottom`, or `top` alone where there is no `bottom`; `share` instead where it is given."""

    top: Record
    bottom: Record | None
    where: str
    share: float | None = None

    @property
    def value(self) -> float:
        if self.share is not None:
            return self.share
        return self.top.value / (self.bottom.value if self.bottom else 1)


def newest(records: Sequence[Record], quantity: str, method: str, **config) -> Record | None:
    """The last record of this kind, or None."""
    found = rec.select(records, quantity=quantity, method=method, **{"beside": None, **config})
    return found[-1] if found else None


def _gemv(records, method: str, shape: tuple[int, int], **config) -> Record | None:
    sizes = {"in_features": shape[0], "out_features": shape[1], "l2": "cold"}
    return newest(records, "gemv_time", method, **sizes, **config)


def _shapes(records: Sequence[Record], method: str, smallest: int = 0) -> list[tuple[int, int]]:
    found = {
        (r.config["in_features"], r.config["out_features"])
        for r in rec.select(records, "gemv_time", method=method)
    }
    return sorted(s for s in found if s[0] * s[1] >= smallest)


def worst(cases: Iterable[Case | None], at_least: bool) -> Case | None:
    """The case that is furthest from a bound that is to be kept by all."""
    found = [case for case in cases if case]
    return (min if at_least else max)(found, key=lambda case: case.value, default=None)


def over(top: Record | None, bottom: Record | None, where: str) -> Case | None:
    """The case of two records, or None where one is missing."""
    return Case(top, bottom, where) if top and bottom else None


def _name(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _against_cublas(records, shapes, method: str, chain: str, **config) -> Case | None:
    cases = (
        over(_gemv(records, "linear-fp16", s), _gemv(records, method, s, chain=chain, **config), _name(s))
        for s in shapes
    )
    return worst(cases, at_least=True)


def _against_four_bits(records, bits: int) -> Case | None:
    large = tuple(LARGE.values())
    four = _gemv(records, "codebook", large, bits=4, chain="pdl")
    return over(four, _gemv(records, "codebook", large, bits=bits, chain="pdl"), _name(large))


def _four_rows(records: Sequence[Record]) -> Case | None:
    def of(shape, rows: int) -> Record | None:
        sizes = {"in_features": shape[0], "out_features": shape[1], "bits": 4, "rows": rows, "l2": "cold"}
        quantity = "gemv_time" if rows == 1 else "gemm_time"
        return newest(records, quantity, "codebook", **sizes, beside="batch", chain="alone")

    return worst((over(of(s, 4), of(s, 1), _name(s)) for s in _shapes(records, "codebook")), at_least=False)


def _error(records: Sequence[Record]) -> Case | None:
    """The largest error over that of cuBLAS; 8 bits and the smallest shapes included."""

    def of(method, shape, **config):
        sizes = {"in_features": shape[0], "out_features": shape[1]}
        return newest(records, "output_error", method, **sizes, **config)

    cases = (
        over(of("codebook", s, bits=b), of("linear-fp16", s), f"{b} bits, {_name(s)}")
        for s in _shapes(records, "codebook")
        for b in (8, 4, 3, 2)
    )
    return worst(cases, at_least=False)


def _token(records: Sequence[Record]) -> tuple[Case | None, Case | None]:
    ours = newest(records, "linears_time", "codebook", bits=4, chain="pdl", l2="cold")
    peer = newest(records, "linears_time", "tinygemm-int4", l2="cold")
    return (Case(ours, None, "Llama-2-7B") if ours else None), over(peer, ours, "Llama-2-7B")


def h100(records: Sequence[Record]) -> list[Target]:
    """What an H100 was asked for."""
    chain = ((4096, 12288), (11008, 4096), (4096, 22016))
    token, peer = _token(records)
    additive = [s for s in _shapes(records, "additive-2x8", 4096 * 4096)]
    rows_why = "each further row loads its own x from shared memory, twice for every four lookups"
    rows = [
        (
            "4-bit over cuBLAS fp16, alone",
            2.7,
            True,
            _against_cublas(records, [(4096, 4096)], "codebook", "alone", bits=4),
            "",
        ),
        (
            "the same in a PDL chain",
            3.3,
            True,
            _against_cublas(records, [(4096, 4096)], "codebook", "pdl", bits=4),
            "",
        ),
        (
            "4-bit in a chain, large matrices of a 7B",
            3.5,
            True,
            _against_cublas(records, chain, "codebook", "pdl", bits=4),
            "",
        ),
        (
            "4-bit in a chain, of a 70B",
            3.8,
            True,
            _against_cublas(records, [tuple(LARGE.values())], "codebook", "pdl", bits=4),
            "",
        ),
        ("all products of a token, us", 1450, False, token, ""),
        ("the same, tinygemm over ours", 1.4, True, peer, ""),
        ("3-bit over 4-bit", 1.2, True, _against_four_bits(records, 3), ""),
        ("2-bit over 4-bit", 1.45, True, _against_four_bits(records, 2), ""),
        (
            "additive 2x8 over cuBLAS fp16",
            2.4,
            True,
            _against_cublas(records, [tuple(LARGE.values())], "additive-2x8", "alone"),
            "",
        ),
        (
            "the same, every shape from 4096 x 4096 up",
            1.0,
            True,
            _against_cublas(records, additive, "additive-2x8", "alone"),
            "",
        ),
        ("4 rows over 1, time, alone", 1.15, False, _four_rows(records), rows_why),
        ("error over that of cuBLAS fp16", 2.0, False, _error(records), ""),
    ]
    return [Target(*row) for row in rows if row[3]]


def h200(records: Sequence[Record]) -> list[Target]:
    """What an H200 was asked for."""
    large = tuple(LARGE.values())
    ours = _gemv(records, "codebook", large, bits=4, chain="pdl")
    why = "in a process that had measured other shapes before; the time of so large a matrix moves with where its memory lies"
    return [Target("4-bit in a chain, us", 36, False, Case(ours, None, _name(large)), why)] if ours else []


def cpu(records: Sequence[Record]) -> list[Target]:
    """What a CPU with AVX-512 was asked for, beyond its cache."""
    shapes = ((4096, 4096), (4096, 11008), (11008, 4096))

    def against(method: str) -> Case | None:
        ours = ((s, _gemv(records, "codebook", s, bits=4, path="int16")) for s in shapes)
        return worst((over(_gemv(records, method, s), own, _name(s)) for s, own in ours), at_least=True)

    def share(s) -> Case | None:
        """Time of a read over ours: the codes' share of the read bandwidth."""
        return over(
            _gemv(records, "read", s, bits=4), _gemv(records, "codebook", s, bits=4, path="int16"), _name(s)
        )

    best = [case for case in map(against, ("linear-bf16", "linear-fp16")) if case]
    rows = [
        (
            "codes streamed, share of the read bandwidth",
            0.8,
            True,
            worst(map(share, shapes), True),
            "shared with other tenants",
        ),
        (
            "int16 over torch fp32",
            10,
            True,
            against("linear-fp32"),
            "torch's fp32 product runs at the read bandwidth here, so 7.9, the ratio of the bytes, is the limit",
        ),
        ("int16 over torch's better 16-bit", 3.5, True, min(best, key=lambda c: c.value, default=None), ""),
    ]
    return [Target(*row) for row in rows if row[3]]


def table(targets: Sequence[Target], cited, ratio) -> str:
    """Markdown lines of one device, "" for no target.

    Args:
        targets: in the order of the lines.
        cited, ratio: write a record, and a ratio of two, with their citations.
    """
    head = ["| | asked | measured | at | |", "| :-- | --: | --: | :-- | :-- |"]
    return "\n".join([*head, *(_line(t, cited, ratio) for t in targets)]) if targets else ""


def _line(t: Target, cited, ratio) -> str:
    sign, goal = ">=" if t.at_least else "<=", f" ({t.goal})" if t.goal else ""
    asked = f"| {t.what} | {sign} {t.bound:g}{goal} |"
    if t.case is None:
        return f"{asked} not measured | | |"
    verdict = "met" if t.met else f"missed: {t.why}" if t.why else "missed"
    return f"{asked} {_figure(t.case, cited, ratio)} | {t.case.where} | {verdict} |"


def _figure(case: Case, cited, ratio) -> str:
    if case.share is not None:
        if case.top.quantity == "perplexity":
            return f"{cited(case.top, 4)} perplexity, {case.share:.2g}"
        return f"{cited(case.top)} tok/s, {case.share:.2f}"
    if case.bottom:
        return ratio(case.top, case.bottom)
    return cited(case.top, 3, "x" if case.top.quantity == "speedup" else "")
