"""The law of every method that was measured on a device, how well it predicts unseen shapes, and how it moves.

Takes records apart by method, fits `trapetum.law` to each, leaves out one shape after another, and compares two devices.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trapetum import hardware, law, law_terms, records
from trapetum.records import Record

_MIN_SIZES = 4  # a law has two numbers, and needs two sizes more to contradict it


@dataclass(frozen=True)
class MethodLaw:
    """The law of one method on one device.

    Attributes:
        label: e.g. `codebook 4-bit`, `codebook 4-bit (pdl)`, `read`.
        records: the times it was fitted on, by bytes.
        fit: `t0 + bytes / BW` of all of them.
        errors: for each record, predicted over measured less 1, by a fit that did not see its shape.
    """

    label: str
    records: tuple[Record, ...]
    fit: law.Fit
    errors: tuple[float, ...]

    @property
    def typical_error(self) -> float:
        """The median of the absolute errors."""
        return records.percentile([abs(e) for e in self.errors], 50)

    @property
    def worst(self) -> tuple[Record, float]:
        """The record that was predicted worst, and its error."""
        return max(zip(self.records, self.errors, strict=True), key=lambda pair: abs(pair[1]))


def shape_of(record: Record) -> tuple[int, int]:
    """(in_features, out_features) of a product."""
    return record.config["in_features"], record.config["out_features"]


def label_of(record: Record) -> str:
    """What tells one method from another: its name, the bits of codes, and `(pdl)` for a chain of launches that overlap."""
    name = "codebook-exact" if record.config.get("path") == "exact" else record.method
    bits = record.config.get("bits")
    plain = name.endswith(("fp16", "bf16", "fp32", "int4", "int8"))
    says_it = name == "read" or (plain and not name.startswith("codebook"))
    words = [name] if says_it or bits is None else [name, f"{bits:g}-bit"]
    return " ".join([*words, "(pdl)"] if record.config.get("chain") == "pdl" else words)


def single_products(found: Iterable[Record], card: str | None = None) -> list[Record]:
    """The measured, believable times of cold products of one row with their bytes, each once, the newest.

    Args:
        found: records of any kind.
        card: a device's name, or a card's as in `trapetum.hardware` (its devices' names vary); None takes every device.
    """
    kept = records.select(
        found, "gemv_time", kind="measured", suspect=False, l2="cold", beside=None, calls=None
    )
    kept = [r for r in kept if law_terms.one_row(r) and r.config.get("bytes") and r.config.get("in_features")]
    return records.latest(r for r in kept if card is None or is_on(r, card))


def is_on(record: Record, card: str) -> bool:
    """Whether a record was made on `card`: a device's own name, or a card's in `trapetum.hardware`."""
    name = record.device.get("name", "")
    known = hardware.find(name)
    return name == card or (known is not None and known.name == card)


def by_method(found: Iterable[Record]) -> dict[str, list[Record]]:
    """`single_products` by `label_of`, each by bytes; the labels in the order of their names."""
    groups: dict[str, list[Record]] = {}
    for record in sorted(found, key=lambda r: (r.config["bytes"], shape_of(r))):
        groups.setdefault(label_of(record), []).append(record)
    return dict(sorted(groups.items()))


def method_laws(found: Iterable[Record], n_boot: int = 500) -> dict[str, MethodLaw]:
    """The law of each method of one device, by label; methods with under 4 sizes or shapes are left out.

    Args:
        found: as `single_products` returns them, of one device.
        n_boot: bootstrap draws of the intervals.
    """
    groups = by_method(found).items()
    return {label: _law_of(label, group, n_boot) for label, group in groups if _enough(group)}


def _enough(group: Sequence[Record]) -> bool:
    return min(len({r.config["bytes"] for r in group}), len({shape_of(r) for r in group})) >= _MIN_SIZES


def _law_of(label: str, group: Sequence[Record], n_boot: int) -> MethodLaw:
    sizes, times = [r.config["bytes"] for r in group], [r.value for r in group]
    fit = law.fit(sizes, times, [r.samples for r in group], n_boot)
    pairs = law.leave_one_out(sizes, times, [shape_of(r) for r in group])
    errors = tuple(predicted / measured - 1 for measured, predicted in pairs)
    return MethodLaw(label, tuple(group), fit, errors)


def terms_by_method(
    laws: Mapping[str, MethodLaw], read_gbps: float, counted: Iterable[Record] = ()
) -> dict[str, list[tuple[Record, law_terms.Terms]]]:
    """The four terms of every time of every method of one device, by label.

    The launch of overlapping launches (`pdl`) is that of the read kernel in such a chain.

    Args:
        laws: of the device, from `method_laws`.
        read_gbps: its measured read bandwidth.
        counted: `instructions_per_weight` records.
    """
    counted, found = list(counted), {}
    for label, method in laws.items():
        first = method.records[0]
        reads = laws.get("read (pdl)" if first.config.get("chain") == "pdl" else "read")
        known = law_terms.rates(first.device, read_gbps, reads.fit.t0_us if reads else 0.0)
        arch = first.device.get("arch", "")
        found[label] = [
            (r, law_terms.terms(r, known, law_terms.work(r.method, r.config.get("bits"), counted, arch)))
            for r in method.records
        ]
    return found


def law_rows(laws: Mapping[str, MethodLaw], read_gbps: float | None) -> list[list[str]]:
    """The laws of one device as rows of a table, under `LAW_HEADINGS`; a row stays on one line."""
    return [[cell.replace(" ", "\u00a0") for cell in _law_row(m, read_gbps)] for m in laws.values()]


LAW_HEADINGS = ("method", "t0, us (95 %)", "GB/s (95 %)", "of a read", "left out: median", "worst")


def _law_row(method: MethodLaw, read_gbps: float | None) -> list[str]:
    fit = method.fit
    low, high = fit.bandwidth_interval
    return [
        method.label,
        f"{fit.t0_us:.2f} ({fit.t0_interval[0]:.2f} to {fit.t0_interval[1]:.2f})",
        f"{fit.bandwidth_gbps:.4g} ({low:.4g} to {high:.4g})",
        f"{100 * fit.bandwidth_gbps / read_gbps:.0f} %" if read_gbps else "not known",
        f"{100 * method.typical_error:.1f} %",
        f"{100 * method.worst[1]:+.0f} %",
    ]


BINDING_HEADINGS = ("method", "smallest", "middle", "largest", "what binds how many shapes")


def binding_rows(terms: Mapping[str, Sequence[tuple[Record, law_terms.Terms]]]) -> list[list[str]]:
    """A row a method, under `BINDING_HEADINGS`: what binds its smallest, middle and largest shape, with its share, and all.

    Sizes are in bytes. A kernel that only reads has a time for each width of codes: the widest stands for its shape.
    """
    rows = []
    for label, found in terms.items():
        by_size = sorted(found, key=lambda pair: pair[0].config["bytes"])
        one = list({shape_of(r): (r, t) for r, t in by_size}.values())
        picked = [_cell(one[i][1]) for i in (0, len(one) // 2, -1)]
        rows.append([label.replace(" ", "\u00a0"), *picked, tally(one)])
    return rows


def _cell(t: law_terms.Terms) -> str:
    return f"{t.binds}\u00a0{100 * t.share(t.binds):.0f}\u00a0%"


def tally(found: Sequence[tuple[Record, law_terms.Terms]]) -> str:
    """How many products each term binds, e.g. `bytes 10 of 14, latency 3, launch 1`."""
    counts = {term: sum(t.binds == term for _, t in found) for term in law_terms.TERMS}
    named = [f"{term} {n}" for term, n in sorted(counts.items(), key=lambda item: -item[1]) if n]
    return ", ".join([f"{named[0]} of {len(found)}", *named[1:]]) if named else "nothing was timed"


def largest(laws: Mapping[str, MethodLaw]) -> list[Record]:
    """The largest product of each method."""
    return [
        max(m.records, key=lambda r: (r.config["bytes"], r.config["out_features"])) for m in laws.values()
    ]


def read_gbps(found: Iterable[Record], card: str) -> float | None:
    """The highest believable cold read bandwidth measured on `card`, in GB/s, or None."""
    kept = records.select(found, "read_bandwidth", kind="measured", suspect=False, l2="cold")
    return max((r.value for r in kept if is_on(r, card)), default=None)


# Two devices


def shifts(first: Mapping[str, MethodLaw], second: Mapping[str, MethodLaw]) -> dict[str, law.Shift]:
    """How the law of each method moved from the first device to the second, on the shapes that both have.

    Methods with under 4 common shapes are left out.
    """
    found = {}
    for label in (label for label in first if label in second):
        pairs = common(first[label].records, second[label].records)
        if len(pairs) and _enough([a for a, _ in pairs]):
            found[label] = law.shift(
                [a.config["bytes"] for a, _ in pairs],
                *([r.value for r in side] for side in zip(*pairs, strict=True)),
                *([r.samples for r in side] for side in zip(*pairs, strict=True)),
                n_boot=500,
            )
    return found


SHIFT_HEADINGS = (
    "method",
    "t0 moved by, us (95 %)",
    "t0",
    "bandwidth moved by (95 %)",
    "bandwidth",
    "shapes",
)


def shift_rows(moved: Mapping[str, law.Shift], ratio: float) -> list[list[str]]:
    """Shifts as rows of a table, under `SHIFT_HEADINGS`; `ratio` is that of the read bandwidths."""
    says = {
        "as": "as the memory",
        "less": "part of the way",
        "not": "not at all",
        "more": "more than the memory",
    }
    return [
        [
            label,
            f"{s.t0_us:+.2f} ({s.t0_interval[0]:+.2f} to {s.t0_interval[1]:+.2f})",
            "agrees" if s.t0_agrees else "differs",
            f"{s.ratio:.3f} ({s.ratio_interval[0]:.3f} to {s.ratio_interval[1]:.3f})",
            says[_side(s, ratio)],
            str(s.n),
        ]
        for label, s in moved.items()
    ]


def common(first: Iterable[Record], second: Iterable[Record]) -> list[tuple[Record, Record]]:
    """Pairs of times of the same method, shape, bits and bytes on two devices."""

    def key(r: Record):
        return label_of(r), shape_of(r), r.config.get("bits"), r.config["bytes"]

    there = {key(r): r for r in second}
    return [(r, there[key(r)]) for r in first if key(r) in there]


def memory_shares(
    first: Iterable[Record],
    second: Iterable[Record],
    ratio: float,
    shapes: Sequence[tuple[int, int]] | None = None,
) -> list[tuple[Record, Record, float]]:
    """For each product timed on both devices its two records and `law.memory_share`, by method and bytes.

    Args:
        first, second: `gemv_time` records of two devices that differ in their memory alone.
        ratio: the second device's read bandwidth over the first's.
        shapes: (in_features, out_features) of the products to take; None for all.
    """
    pairs = sorted(common(first, second), key=lambda pair: (label_of(pair[0]), pair[0].config["bytes"]))
    wanted = [(a, b) for a, b in pairs if shapes is None or shape_of(a) in shapes]
    return [(a, b, law.memory_share(a.value, b.value, ratio)) for a, b in wanted]


def in_words(moved: Mapping[str, law.Shift], ratio: float) -> str:
    """What the shifts say of the law, as sentences: whose t0 agrees, whose bandwidth moved as the memory's did.

    Args:
        moved: from `shifts`.
        ratio: the second device's measured read bandwidth over the first's.
    """
    if not moved:
        return "No method was measured on enough shapes of both devices, so nothing can be said yet."
    same = [label for label, s in moved.items() if s.t0_agrees]
    other = [f"{label} ({s.t0_us:+.2f} us)" for label, s in moved.items() if not s.t0_agrees]
    sentences = [_holds("The fixed time agrees", same, len(moved))]
    sentences += [f"It differs for {_listed(other)}."] if other else []
    words = {"less": "moved, but less,", "not": "did not move", "more": "moved more"}
    sides = {
        side: [label for label, s in moved.items() if _side(s, ratio) == side] for side in ("as", *words)
    }
    sentences.append(_holds(f"The bandwidth moved by the memory's {ratio:.3f}", sides["as"], len(moved)))
    for side, verb in words.items():
        named = [f"{label} ({moved[label].ratio:.2f})" for label in sides[side]]
        sentences += [f"It {verb} for {_listed(named)}."] if named else []
    return " ".join(sentences)


def _side(s: law.Shift, ratio: float) -> str:
    """`as`, `less` or `more` than the memory as in `law.Shift.moved`; `not` where the bandwidth is no higher than it was."""
    side = s.moved(ratio)
    return "not" if side == "less" and s.moved(1.0) != "more" else side


def _holds(what: str, labels: Sequence[str], of: int) -> str:
    if len(labels) == of:
        return f"{what} for {'all ' + str(of) + ' methods' if of > 1 else 'the one method, ' + labels[0]}."
    return f"{what} for {_listed(labels)}." if labels else f"{what} for none of the methods."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
