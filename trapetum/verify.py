"""`trapetum verify`: no number without its record.

A number in the README or in a notebook's prose that comes from a measurement is followed by a comment that names the
record:

    3090 GB/s<!-- record:0123456789ab -->
    2.9x<!-- ratio:0123456789ab/ba9876543210 -->

The record must exist, be neither stale nor suspect, and round to what is printed.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trapetum import records
from trapetum.paths import DATA, NOTEBOOKS, ROOT

_CITATION = re.compile(
    r"(?P<number>-?[\d][\d,]*\.?\d*)(?P<unit>[^<>|\n]{0,16}?)<!-- (?P<kind>record|ratio):(?P<ids>[0-9a-f/]+) -->"
)


@dataclass(frozen=True)
class Citation:
    """One cited number: where it stands, what is printed, and the record (or two, for a ratio) behind it."""

    place: str
    printed: str
    kind: str
    ids: tuple[str, ...]


def citations_in(text: str, place: str) -> list[Citation]:
    """The citations of `text`; `place` names the file."""
    found = []
    for match in _CITATION.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        found.append(
            Citation(f"{place}:{line}", match["number"], match["kind"], tuple(match["ids"].split("/")))
        )
    return found


def _notebook_text(path: Path) -> str:
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def _sources() -> list[tuple[str, str]]:
    texts = [(path.name, path.read_text()) for path in [ROOT / "README.md"] if path.exists()]
    return texts + [(f"notebooks/{p.name}", _notebook_text(p)) for p in sorted(NOTEBOOKS.glob("*.ipynb"))]


def rounds_to(value: float, printed: str) -> bool:
    """Whether `value` printed with as many digits as `printed` has is `printed`."""
    digits = printed.replace(",", "")
    decimals = len(digits.partition(".")[2])
    step = 10.0**-decimals
    if not decimals:  # 3190 may stand for 3187: trailing zeros are not claimed
        step = 10.0 ** (len(digits) - len(digits.rstrip("0")))
    return abs(value - float(digits)) <= 0.5 * step * (1 + 1e-9)


def _problem(
    citation: Citation, known: Mapping[str, records.Record], stale: Callable[[records.Record], bool]
) -> str | None:
    missing = [i for i in citation.ids if i not in known]
    if missing:
        return f"no record {', '.join(missing)} in data/"
    cited = [known[i] for i in citation.ids]
    for record in cited:
        if record.suspect:
            return f"record {record.id} is suspect: {record.why_suspect}"
        if stale(record):
            return (
                f"record {record.id} was measured with an older kernel; measure again and cite the new record"
            )
    value = cited[0].value if citation.kind == "record" else cited[0].value / cited[1].value
    if not rounds_to(value, citation.printed):
        return f"{citation.printed} is printed but the record says {value:.6g}"
    return None


def kernel_hashes() -> set[str]:
    """What a record of a kernel as it is now carries; one that carries another hash is stale."""
    from trapetum.build import current_sha256s

    return current_sha256s()


def check(citations: list[Citation], known: Mapping[str, records.Record], hashes: set[str]) -> list[str]:
    """One sentence for each citation that does not hold."""

    def stale(record: records.Record) -> bool:
        return record.kernel_sha256 is not None and record.kernel_sha256 not in hashes

    checked = ((c, _problem(c, known, stale)) for c in citations)
    return [f"{c.place}: {problem}" for c, problem in checked if problem]


def verify() -> tuple[list[Citation], list[str]]:
    """Check every citation of the README and the notebooks.

    Returns:
        the citations, and a sentence for each that does not hold and each line of `data/` that cannot be read.
    """
    loaded = records.load(*(p for p in (DATA / "records", DATA / "published") if p.is_dir()))
    citations = [c for place, text in _sources() for c in citations_in(text, place)]
    known = {r.id: r for r in loaded.records}
    return citations, [str(p) for p in loaded.problems] + check(citations, known, kernel_hashes())
