"""Find records by their fields, and lay them out as a pandas table."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

_NESTED = ("config", "device", "software")
_FLAT = (
    "id quantity value unit samples p20 p80 n kind method "
    "kernel_sha256 commit dirty utc source suspect why_suspect"
).split()


def _flattened(prefix: str, mapping: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}.{key}"
        flat |= _flattened(name, value) if isinstance(value, Mapping) else {name: value}
    return flat


def row(record) -> dict[str, Any]:
    """One record as flat columns: its own fields, then `config.bits`, `device.name`, `software.torch` and so on."""
    flat = {name: getattr(record, name) for name in _FLAT}
    for name in _NESTED:
        flat |= _flattened(name, getattr(record, name))
    return flat


def frame(records: Iterable):
    """The records as a pandas DataFrame, one row each, with nested fields flattened as `config.bits`, `device.name`.

    Columns that only some records have are NaN or None elsewhere; no records give an empty table with the plain fields.
    """
    import pandas

    rows = [row(record) for record in records]
    columns = list(dict.fromkeys([*_FLAT, *(name for line in rows for name in line)]))
    return pandas.DataFrame(rows, columns=columns)


def _matches(value, wanted) -> bool:
    if isinstance(wanted, Collection) and not isinstance(wanted, (str, bytes, Mapping)):
        return value in wanted
    return value == wanted


def select(
    records: Iterable, quantity=None, method=None, kind=None, device=None, suspect=None, **config
) -> list:
    """The records that match every filter given, in their order.

    A filter is a value or a collection of accepted values; None does not filter (inside `**config` it means absent).

    Args:
        records: of `trapetum.records.Record`.
        quantity, method, kind: as in the record.
        device: `device.name`, exactly.
        suspect: True or False.
        **config: keys of `config`, e.g. `bits=4, l2="cold", in_features=(4096, 8192)`.
    """
    plain = {"quantity": quantity, "method": method, "kind": kind, "suspect": suspect}
    plain = {name: wanted for name, wanted in plain.items() if wanted is not None}

    def wanted(record) -> bool:
        return (
            all(_matches(getattr(record, name), value) for name, value in plain.items())
            and (device is None or _matches(record.device.get("name"), device))
            and all(_matches(record.config.get(name), value) for name, value in config.items())
        )

    return [record for record in records if wanted(record)]


# What tells one measurement from another; the rest of a config (copies, threads, profile) is how it was made. Turns with
# another method (interleaved, beside), runtimes, cards and what a ratio is taken to do not replace each other.
_SUBJECT = (
    "in_features out_features model text bits n_codes group_size path variant l2 chain calls stage context "
    "new_tokens batch rows window stride linears lm_head kv part accounting host format range beside timer peak arch "
    "interleaved runtime baseline baseline_dtype dtype world_size way outliers"
).split()


def latest(records: Iterable) -> list:
    """Without repeats: of records with the same quantity, method, kind, device and subject, the newest, at its place.

    The subject is what `config` says of the thing measured (sizes, bits, cache state, model, stage), not of how
    (threads, copies, profile). Records without a time, as published ones are, count in their order.
    """
    newest: dict[tuple, Any] = {}
    for record in records:
        config = tuple(str(record.config.get(name)) for name in _SUBJECT)
        key = (record.quantity, record.method, record.kind, record.device.get("name"), config)
        if key not in newest or (record.utc or "") >= (newest[key].utc or ""):
            newest[key] = record
    return list(newest.values())


def explain(record) -> list[tuple[str, str, str]]:
    """A record field by field, for a reader who sees the first one: (field, what it says here, what it is for)."""
    own, config, device = record, dict(record.config), record.device
    spread = f"{own.p20:.4g} to {own.p80:.4g} {own.unit}" if own.p20 is not None else "one figure"
    named = ", ".join(f"{key} {value}" for key, value in config.items() if value is not None)
    versions = ", ".join(f"{key} {value}" for key, value in own.software.items() if value)
    clone = f"{own.commit[:10]}{', with uncommitted changes' if own.dirty else ''}" if own.commit else "none"
    return [
        ("quantity, value, unit", f"{own.quantity}: {own.value:.4g} {own.unit}", "the median of the samples"),
        ("p20, p80, n", f"{spread}, n {own.n}", "the spread; a difference inside it is none"),
        ("kind", own.kind, "measured by this code, published by somebody, or derived by a formula"),
        ("method", own.method, "what ran"),
        ("config", named, "what it takes to repeat it"),
        (
            "device",
            f"{device.get('name', '')} ({device.get('arch', '')})",
            "where; clocks and temperature too",
        ),
        ("software", versions, "what else it depends on"),
        ("commit", clone, "the code"),
        (
            "kernel_sha256",
            (own.kernel_sha256 or "none")[:10],
            "our kernel's source; if it changed, the figure is stale",
        ),
        ("utc", own.utc or "none", "when"),
        ("suspect", own.why_suspect or "no", "whether it implies more bandwidth than there is"),
        ("id", own.id, "hash of all of the above: what a number on a page is traced by"),
    ]
