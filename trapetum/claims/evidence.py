"""What a claim is judged by: the records at hand, sorted by how much they weigh, and the verdict that comes out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trapetum import hardware
from trapetum import records as rec
from trapetum.records import Record
from trapetum.shapes import MODELS, ModelShape

OUTCOMES = ("reproduced", "refuted", "not testable here")
BASES = ("measured", "compiled", "published", "arithmetic", "nothing")


TOLERANCE = 0.10  # a figure within a tenth of the claimed one counts as reproduced


def near(value: float, claimed: float, tolerance: float = TOLERANCE) -> bool:
    """Whether `value` is within `tolerance` (relative) of the claimed one."""
    return abs(value / claimed - 1) <= tolerance


class Implied(NamedTuple):
    """A consequence of a claim: what, how much, in which unit."""

    label: str
    value: float
    unit: str


@dataclass(frozen=True)
class Verdict:
    """What the records say of a claim.

    Attributes:
        outcome: `reproduced`, `refuted` or `not testable here`.
        reason: one or two sentences with the numbers.
        basis: what it rests on: `measured` records, `compiled` code, other people's `published` measurements,
            `arithmetic` on the claim's own figures, or `nothing`.
        records: the records used.

    Raises:
        ValueError: an outcome or a basis that is not in the list.
    """

    outcome: str
    reason: str
    basis: str
    records: tuple[Record, ...] = ()

    def __post_init__(self):
        if self.outcome not in OUTCOMES or self.basis not in BASES:
            raise ValueError(f"{self.outcome!r} on {self.basis!r} is no verdict.")


def verdict(holds: bool, reason: str, basis: str, used: Iterable[Record]) -> Verdict:
    """`reproduced` if the claim holds, else `refuted`."""
    return Verdict("reproduced" if holds else "refuted", reason, basis, tuple(used))


def not_testable(reason: str, used: Iterable[Record] = ()) -> Verdict:
    """No record decides it; the reason says which one would."""
    return Verdict("not testable here", reason, "nothing", tuple(used))


def text(value: float, digits: int = 3) -> str:
    """A number for a sentence: whole ones in full, others with `digits` significant digits, no exponent."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{float(f'{value:.{digits}g}'):,.10g}"


def shape_of(record: Record) -> str:
    """The model shape a record is about, however its model is named: `random:llama-2-7b`, a hub id, `llama-2-7b`."""
    name = str(record.config.get("model", "")).lower().rsplit("/", 1)[-1]
    return name.removeprefix("random:").removesuffix("-hf")


def device_name(record: Record) -> str:
    """The record's device as a reader knows it."""
    return str(record.device.get("name", "an unnamed device"))


class Evidence:
    """The records that a judgement may use.

    Args:
        records: all there are, of any kind.
        device: name of the machine at hand; its measurements go before other machines' of the same kind.
    """

    def __init__(self, records: Sequence[Record], device: str | None = None):
        usable = [r for r in records if not r.suspect]
        self.device = device
        self._measured = [r for r in usable if r.kind == "measured"]
        self._derived = [r for r in usable if r.kind == "derived"]
        self._published = [r for r in records if r.kind == "published"]

    def measured(self, quantity: str, on: str = "", model: str | None = None, **filters) -> list[Record]:
        """Measured records that the gate believed, this machine's first, then the newest first.

        Args:
            quantity: e.g. `gemv_time`.
            on: part of the device's name, e.g. `H100`; "" for any device.
            model: a shape, as in `shape_of`.
            **filters: as for `records.select`.
        """
        found = rec.select(self._measured, quantity=quantity, **filters)
        found = [r for r in found if on in device_name(r) and model in (None, shape_of(r))]
        newest = sorted(found, key=lambda r: r.utc or "", reverse=True)
        return sorted(newest, key=lambda r: device_name(r) != self.device)

    def decodes(self, on: str = "", model: str | None = None, **filters) -> list[Record]:
        """Measured `decode_speed` records of plain decodes: alone, one card, one token a step, a 16-bit cache.

        Args:
            on, model, **filters: as for `measured`.
        """
        plain = {"beside": None, "interleaved": None, "rows": (None, 1), "kv": (None, "fp16")}
        plain["world_size"] = (None, 1)
        return self.measured("decode_speed", on, model, **{**plain, **filters})

    def derived(self, quantity: str, **filters) -> list[Record]:
        """Derived records, e.g. of compiled code."""
        return rec.select(self._derived, quantity=quantity, **filters)

    def published(
        self, quantity: str, document: str = "", place: str = "", model: str | None = None, **filters
    ) -> list[Record]:
        """Published records whose source starts with `document` and has `place` in it, in the order of the files."""
        found = rec.select(self._published, quantity=quantity, **filters)
        return [
            r
            for r in found
            if r.source.startswith(document) and place in r.source and model in (None, shape_of(r))
        ]

    def claimed(self, quantity: str, document: str, place: str = "", **filters) -> Record:
        """The one published record meant.

        Raises:
            LookupError: there is none, because `data/published/` is incomplete.
        """
        found = self.published(quantity, document, place, **filters)
        if not found:
            raise LookupError(
                f"no published {quantity} of {document!r} {place!r} {filters} is among the records; "
                "load data/published/ too."
            )
        return found[0]


def first(records: Sequence[Record]) -> Record | None:
    """The first record, or None."""
    return records[0] if records else None


def gpu(name: str) -> hardware.Gpu:
    """The published facts of a GPU that must be in the table.

    Raises:
        LookupError: it is not.
    """
    found = hardware.find(name)
    if found is None:
        raise LookupError(f"{name} is not in trapetum.hardware.GPUS.")
    return found


def model(name: str) -> ModelShape:
    """A model shape by name."""
    return MODELS[name]
