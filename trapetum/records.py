"""Records: every number of the workbook, one JSON object a line, with where it came from.

A record is **measured** (samples, device, software, commit, kernel hash, time), **published** (a document and the place
in it) or **derived** (a formula and its inputs). Its id is the first 12 hex digits of the SHA-256 of its content, so
a number on a page can cite it and an edited line is noticed. Files hold one record a line and are only appended to.

The vocabulary and the rules are in `record_rules`, the plausibility gate in `record_gate`, filters and tables in
`record_table`; all of it is available from here. Needs neither torch nor numpy; `frame` needs pandas.
"""

import fcntl
import hashlib
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from trapetum import record_rules
from trapetum.record_gate import Ceilings, gate, implied_gbps, is_stale, memory_gbps
from trapetum.record_rules import KINDS, QUANTITIES, RecordError
from trapetum.record_table import explain, frame, latest, select

__all__ = [
    "KINDS",
    "QUANTITIES",
    "Ceilings",
    "Loaded",
    "Problem",
    "Record",
    "RecordError",
    "append",
    "derived",
    "explain",
    "frame",
    "from_json",
    "gate",
    "implied_gbps",
    "is_stale",
    "latest",
    "load",
    "measured",
    "memory_gbps",
    "now_utc",
    "percentile",
    "published",
    "select",
    "to_json",
]

_gate = gate  # `measured` has an argument of that name


class Problem(NamedTuple):
    """A line, or a file, that could not be loaded. `line` counts from 1; 0 stands for the whole file."""

    path: Path
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}" if self.line else f"{self.path}: {self.message}"


class Loaded(NamedTuple):
    """What `load` found: the good records in file order without repeats, and the bad lines."""

    records: list["Record"]
    problems: list[Problem]


@dataclass(frozen=True)
class Record:
    """One number with its origin.

    Attributes:
        id: first 12 hex digits of the SHA-256 of the other fields; computed when left empty.
        quantity, unit: a key of `QUANTITIES` and its unit.
        value: the median of `samples`, or the figure as published or derived.
        samples, p20, p80, n: the repeats in `unit`, their 20th and 80th percentile, and how many.
        kind: `measured`, `published` or `derived`.
        method: what was measured, e.g. `codebook` or `linear-fp16`.
        config: what is needed to repeat it, e.g. in_features, bits, l2, bytes.
        device: the machine as `trapetum.machine.describe` gives it; published records may know only a name.
        software: versions of python, torch, cuda, trapetum.
        kernel_sha256: hash of the kernel source that ran, if one of ours did.
        commit, dirty: the state of the clone; None where it does not apply.
        utc: when, as ISO 8601 in UTC; None for published figures.
        source: published: document and place. derived: inputs and formula. measured: the protocol, if worth saying.
        suspect, why_suspect: whether the plausibility gate refused it, and its sentence.

    Raises:
        RecordError: a field breaks these rules, or a given `id` does not match the content.
    """

    quantity: str
    value: float
    unit: str
    kind: str
    method: str
    id: str = ""
    samples: tuple[float, ...] = ()
    p20: float | None = None
    p80: float | None = None
    n: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)
    software: dict[str, Any] = field(default_factory=dict)
    kernel_sha256: str | None = None
    commit: str | None = None
    dirty: bool | None = None
    utc: str | None = None
    source: str = ""
    suspect: bool = False
    why_suspect: str = ""

    def __post_init__(self):
        for name in ("value", "p20", "p80"):
            object.__setattr__(
                self, name, record_rules.number(name, getattr(self, name), optional=name != "value")
            )
        object.__setattr__(
            self,
            "samples",
            tuple(record_rules.number("samples", x) for x in record_rules.listed(self.samples)),
        )
        for name in ("config", "device", "software"):
            object.__setattr__(self, name, record_rules.plain(name, getattr(self, name)))
        record_rules.check(self)
        computed = _content_id(self)
        if self.id not in ("", computed):
            raise RecordError(
                f"id is {self.id!r} but the content hashes to {computed!r}: the line was edited."
            )
        object.__setattr__(self, "id", computed)

    def __hash__(self) -> int:
        return hash(self.id)

    def replace(self, **changes) -> "Record":
        """A copy with `changes` made, checked again and given its own id."""
        return Record(**{**_as_dict(self), "id": "", **changes})


_FIELDS = (
    "id quantity value unit samples p20 p80 n kind method config device software "
    "kernel_sha256 commit dirty utc source suspect why_suspect"
).split()


def _as_dict(record: Record) -> dict[str, Any]:
    return {name: getattr(record, name) for name in _FIELDS}


def _content_id(record: Record) -> str:
    content = {name: value for name, value in _as_dict(record).items() if name != "id"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def now_utc() -> str:
    """The time now as a record writes it, to the second, e.g. `2026-01-31T12:00:00Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def percentile(samples: Sequence[float], percent: float) -> float:
    """The `percent`-th percentile (0 to 100) of `samples`, interpolated linearly between neighbours."""
    if not samples:
        raise ValueError("a percentile needs at least one sample.")
    ordered = sorted(samples)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _unit(quantity: str) -> str:
    return QUANTITIES.get(quantity, "")


def measured(
    quantity: str,
    samples: Sequence[float],
    method: str,
    config: Mapping[str, Any],
    device: Mapping[str, Any],
    software: Mapping[str, Any],
    kernel_sha256: str | None = None,
    gate: Ceilings | None = None,
    value: float | None = None,
    **origin,
) -> Record:
    """A measured record: the median of `samples` with its 20th and 80th percentile, passed through the gate.

    Args:
        quantity: a key of `QUANTITIES`; `samples` are in its unit.
        samples: one figure a repeat.
        method, config, device, software, kernel_sha256: as in `Record`.
        gate: what bounds this device's reads; None leaves the record unjudged.
        value: the figure itself where it is not the median, e.g. a perplexity over all windows.
        **origin: `commit`, `dirty`, `utc` (default: now), `source`.

    Raises:
        RecordError: no samples, one is not finite, or another rule of `Record` is broken.
    """
    samples = [record_rules.number("samples", x) for x in record_rules.listed(samples)]
    if not samples:
        raise RecordError(f"{quantity} of {method}: a measured record needs at least one sample.")
    record = Record(
        quantity=quantity,
        value=statistics.median(samples) if value is None else value,
        unit=_unit(quantity),
        samples=tuple(samples),
        p20=percentile(samples, 20),
        p80=percentile(samples, 80),
        n=len(samples),
        kind="measured",
        method=method,
        config=config,
        device=device,
        software=software,
        kernel_sha256=kernel_sha256,
        **{"utc": now_utc(), **origin},
    )
    return _gate(record, *gate) if gate is not None else record


def published(
    quantity: str,
    value: float,
    method: str,
    config: Mapping[str, Any],
    device: Mapping[str, Any],
    source: str,
    **more,
) -> Record:
    """A published record: a figure of somebody else's, with `source` naming the document and the place in it.

    Carries no time, so that the same figure always gets the same id.

    Args:
        **more: other fields of `Record` that the document states, e.g. `n`, `p20`, `p80`, `software`.
    """
    unit = _unit(quantity)
    return Record(
        quantity, value, unit, "published", method, config=config, device=device, source=source, **more
    )


def derived(
    quantity: str,
    value: float,
    method: str,
    config: Mapping[str, Any],
    device: Mapping[str, Any],
    source: str,
    formula: str,
    **more,
) -> Record:
    """A derived record: `value` follows from `source` (ids of records, or documents) by `formula`.

    Both are kept in the record's `source`, as `formula; from source`.

    Raises:
        RecordError: `source` or `formula` is empty, or another rule of `Record` is broken.
    """
    if not source.strip() or not formula.strip():
        raise RecordError(
            f"a derived {quantity} needs its inputs and its formula; got {source!r} and {formula!r}."
        )
    origin = f"{formula}; from {source}"
    unit = _unit(quantity)
    return Record(
        quantity, value, unit, "derived", method, config=config, device=device, source=origin, **more
    )


def to_json(record: Record) -> str:
    """The record as one line of JSON, without the line's end."""
    return json.dumps(_as_dict(record), allow_nan=False)


def _no_constant(text: str):
    raise RecordError(f"{text} is no finite number.")


def from_json(line: str) -> Record:
    """The record of one line of JSON.

    Raises:
        RecordError: the line is no JSON object, has missing or unknown fields, or breaks a rule of `Record`.
    """
    try:
        found = json.loads(line, parse_constant=_no_constant)
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:
        raise RecordError(f"not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise RecordError(f"a record is a JSON object, not {type(found).__name__}.")
    missing = [name for name in _FIELDS if name not in found]
    unknown = sorted(set(found) - set(_FIELDS))
    if missing or unknown:
        raise RecordError(
            f"missing fields: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}."
        )
    if not found["id"]:
        raise RecordError("id is empty; records are written by trapetum.records.append.")
    return Record(**found)


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]


def _lines(path: Path) -> list[bytes] | Problem:
    try:
        return path.read_bytes().split(b"\n")
    except OSError as error:
        return Problem(path, 0, f"cannot be read: {error.strerror}.")


def load(*paths: str | Path) -> Loaded:
    """Read records from files, or from all `*.jsonl` below folders; a bad line is reported and the rest loads.

    A record that occurs twice (the same id) is kept once, at its first place.

    Returns:
        `records`, and `problems` with file, line number and sentence. A missing path is a problem, never an exception.
    """
    records: dict[str, Record] = {}
    problems: list[Problem] = []
    for file in (file for path in paths for file in _files(Path(path))):
        lines = _lines(file)
        if isinstance(lines, Problem):
            problems.append(lines)
            continue
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = from_json(line.decode())
            except ValueError as error:
                problems.append(Problem(file, number, str(error)))
            else:
                records.setdefault(record.id, record)
    return Loaded(list(records.values()), problems)


def append(path: str | Path, records: Record | Iterable[Record]) -> None:
    """Add `records` to the file at `path`, all or none, safe against other writers and against being killed.

    The file is locked, the lines go out in one write that reaches the disk before this returns, and a line that
    an earlier writer left unfinished is closed first, so that it spoils only itself.

    Raises:
        OSError: the disk refused; the file is then as it was before.
    """
    records = [records] if isinstance(records, Record) else list(records)
    if not records:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(to_json(record) + "\n" for record in records).encode()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        size = os.fstat(handle).st_size
        unfinished = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        _write_whole(handle, b"\n" + data if unfinished else data, size)
    finally:
        os.close(handle)


def _write_whole(handle: int, data: bytes, size: int) -> None:
    """Write `data` at the end of a file of `size` bytes, or leave the file at that size."""
    try:
        written = os.write(handle, data)
        if written != len(data):
            raise OSError(f"only {written} of {len(data)} bytes could be written; is the disk full?")
        os.fsync(handle)
    except OSError:
        os.ftruncate(handle, size)
        raise
