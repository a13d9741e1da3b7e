"""What the README's tables are made of: cells that cite their record, markdown, and the records that a row is about."""

from collections.abc import Iterable, Sequence
from decimal import Decimal

from trapetum import records as rec
from trapetum.figures.style import OWN_DENSE, by_itself, decode_label, unusual
from trapetum.records import Record

_WEIGHTS = "model stage bits linears dtype lm_head kv rows world_size".split()
_SAME_RUN = [*_WEIGHTS, "new_tokens", "prompt_tokens", "interleaved", "beside"]


def cited(record: Record | None, digits: int = 3, unit: str = "") -> str:
    """A record's value for a table cell, with the comment that names the record."""
    if record is None:
        return "-"
    from trapetum.workbook import significant

    text = f"{Decimal(significant(record.value, digits)):f}"  # no exponent: the check of citations reads plain numbers
    return f"{text}{unit}<!-- record:{record.id} -->"


def ratio(above: Record | None, below: Record | None) -> str:
    """above / below as a cited speedup."""
    if above is None or below is None:
        return "-"
    return f"{above.value / below.value:.2f}x<!-- ratio:{above.id}/{below.id} -->"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, the first column to the left, the others to the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def filled(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without the columns in which no row has anything, or "" where there is no row."""
    kept = [k for k in range(len(header)) if k == 0 or any(row[k] not in ("", "-") for row in rows)]
    return markdown([header[k] for k in kept], [[row[k] for k in kept] for row in rows]) if rows else ""


def notes(sentences: Iterable[str]) -> str:
    """Lines under a table, each once, or "" for none."""
    lines = list(dict.fromkeys(sentences))
    return "\n" + "".join(f"- {line}\n" for line in lines) if lines else ""


def current(records: Iterable[Record]) -> list[Record]:
    """The records that a page may cite: neither suspect nor measured with an older kernel, and of repeats the newest.

    Args:
        records: of any kind, in the order of their files.
    """
    from trapetum.verify import kernel_hashes

    hashes = {None, *kernel_hashes()}
    usable = [r for r in records if not r.suspect and r.kernel_sha256 in hashes]
    return rec.latest(usable)


def one(records: Iterable[Record], quantity: str, method: str | None = None, **config) -> Record | None:
    """The last record of this kind that was measured by itself, or None."""
    found = rec.select(records, quantity=quantity, method=method, **{"beside": None, **config})
    return found[-1] if found else None


def devices(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Measured records by device name, GPUs first."""
    groups: dict[str, list[Record]] = {}
    for r in records:
        if r.kind == "measured" and r.device.get("name"):
            groups.setdefault(r.device["name"], []).append(r)
    return dict(sorted(groups.items(), key=lambda item: not is_gpu(item[1])))


def is_gpu(records: Sequence[Record]) -> bool:
    """Whether a device's records are a GPU's."""
    return str(records[0].device.get("arch", "")).startswith("sm_")


# Decodes


def weights(record: Record) -> str:
    """The weights of a decode and what is unusual of it, e.g. `4-bit codebook, kv int8`."""
    if record.method != "codebook":
        return decode_label(record)
    head = ["codes in the head"] if record.config.get("lm_head") == "codebook" else []
    return ", ".join([f"{record.config['bits']}-bit codebook", *head, *unusual(record.config)])


def plain(records: Iterable[Record], quantity: str = "decode_speed") -> list[Record]:
    """Whole decodes by the own engine, each timed alone."""
    own = rec.select(records, quantity=quantity, method=(*OWN_DENSE, "codebook"))
    return [r for r in own if by_itself(r) and r.config.get("linears") != "none"]


def usual(record: Record) -> bool:
    """Whether a decode has one card, a 16-bit cache, and makes one token a step."""
    return not unusual(record.config)


def stage_number(record: Record) -> int:
    """The place of a decode's stage among all stages; -1 for one that is none of an engine's."""
    from trapetum.decode import stages

    known = [*stages("cuda"), *stages("cpu")]
    stage = record.config.get("stage")
    return known.index(stage) if stage in known else -1


def main_model(records: Iterable[Record]) -> str | None:
    """The model that was decoded in the most ways on a device, or None."""
    ways: dict[str, set] = {}
    for r in plain(records):
        ways.setdefault(r.config["model"], set()).add((r.config["stage"], r.method))
    return max(ways, key=lambda model: len(ways[model]), default=None)


def beside(record: Record, records: Iterable[Record], quantity: str, **config) -> Record | None:
    """The record of another quantity from the same run as `record`, or None."""
    same = {name: record.config.get(name) for name in _SAME_RUN}
    found = rec.select(records, quantity=quantity, method=record.method, **{**same, **config})
    return found[-1] if found else None


def as_long(one: Record, other: Record) -> bool:
    """Whether two decodes are of about the same length, so that their caches are."""
    lengths = sorted((one.config["new_tokens"], other.config["new_tokens"]))
    return lengths[1] <= 1.25 * lengths[0]


def longest(records: Iterable[Record]) -> list[Record]:
    """Of decodes that differ only in how long they are, the longest."""
    kept: dict[tuple, Record] = {}
    for r in records:
        config = tuple(r.config.get(name) for name in _WEIGHTS)
        known = kept.get((r.method, config))
        if known is None or r.config["new_tokens"] >= known.config["new_tokens"]:
            kept[r.method, config] = r
    return list(kept.values())


def gbps(record: Record | None) -> str:
    """Bytes of a token times tokens a second, GB/s: a product of two fields of the record cited beside it."""
    moved = rec.implied_gbps(record) if record else None
    return "-" if moved is None else f"{moved:.{0 if moved >= 10 else 2}f}"


def share_of_bound(record: Record, records: Iterable[Record] = ()) -> float | None:
    """A decode's speed over the read bandwidth divided by the bytes of a token: also its GB/s over that bandwidth.

    The bandwidth is the one measured in the same run; without it, on a GPU, the best read among `records`. A CPU that others
    share does not read as fast from one hour to the next.
    """
    reads = [r.value for r in rec.select(records, quantity="read_bandwidth", method="read") if is_gpu([r])]
    roof, moved = record.config.get("read_gbps") or max(reads, default=None), rec.implied_gbps(record)
    return moved / roof if moved and roof else None


def percent(share: float | None) -> str:
    """A share as whole per cents."""
    return "-" if share is None else f"{100 * share:.0f} %"


def refusals(records: Iterable[Record], **config) -> list[Record]:
    """Decodes that did not run, each with a sentence in `config.error`."""
    found = rec.select(records, quantity="call_accepted", **config)
    return [r for r in found if not r.value and r.config.get("error") and r.config.get("model")]


def not_run(refused: Record) -> str:
    """Two or three words for a cell, from the sentence of a refusal."""
    error = refused.config["error"].lower()
    return "does not fit" if "are free" in error or "memory" in error else "not run"
