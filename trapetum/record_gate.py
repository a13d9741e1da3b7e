"""Is a record believable, and still current: the bandwidth it implies, the plausibility gate, staleness."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

# A cold read is measured with a spread, so two per cent above its median is still believed.
COLD_READ_MARGIN = 1.02
_DECODES = ("decode_speed", "window_speed", "context_speed")


class Ceilings(NamedTuple):
    """What bounds a device's reads, in GB/s (None: not known).

    Attributes:
        peak_gbps: the datasheet's memory bandwidth.
        cold_read_gbps: the read bandwidth measured on this device with a cold cache.
    """

    peak_gbps: float | None = None
    cold_read_gbps: float | None = None


def _numeric(mapping: Mapping, name: str) -> float | None:
    value = mapping.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _seconds(record) -> float | None:
    """Seconds in which the record moved `config.bytes`, where that can be said."""
    if record.quantity == "gemv_time":
        return record.value * 1e-6
    return 1 / record.value if record.quantity in _DECODES else None


def implied_gbps(record) -> float | None:
    """The bandwidth in GB/s that a record implies, wherever the bytes came from (memory or cache).

    `gemv_time` and the speeds of a decode: `config.bytes` (moved by one call, by one token) over the time.
    `read_bandwidth`, `dequant_bandwidth`: the value itself. None for other quantities or without `config.bytes`.
    """
    if record.quantity in ("read_bandwidth", "dequant_bandwidth"):
        return record.value
    moved, seconds = _numeric(record.config, "bytes"), _seconds(record)
    return None if moved is None or seconds is None else moved / seconds / 1e9


def _cache_bytes(record) -> float:
    """Bytes that may have come from the last-level cache: all of it when warm, none when cold or unsaid.

    A decode reads the same weights for every token, so it counts as warm unless its config says `cold`.
    """
    unsaid = "warm" if record.quantity in _DECODES else "cold"
    return (_numeric(record.device, "l2_bytes") or 0.0) if record.config.get("l2", unsaid) == "warm" else 0.0


def memory_gbps(record) -> float | None:
    """The least bandwidth in GB/s that a record needs from memory: `implied_gbps` less what the cache can hold."""
    implied, moved = implied_gbps(record), _numeric(record.config, "bytes")
    if implied is None or not moved:
        return implied
    return implied * max(0.0, 1 - _cache_bytes(record) / moved)


def _complaint(record, peak_gbps: float | None, cold_read_gbps: float | None) -> str:
    implied = memory_gbps(record)
    if implied is None:
        return ""
    where = "of memory traffic beyond the cache" if _cache_bytes(record) else "of memory traffic"
    if peak_gbps is not None and implied > peak_gbps:
        return f"It implies {implied:.5g} GB/s {where}, more than the device's peak of {peak_gbps:.5g} GB/s."
    if cold_read_gbps is not None and implied > COLD_READ_MARGIN * cold_read_gbps:
        return (
            f"It implies {implied:.5g} GB/s {where}, more than {COLD_READ_MARGIN} times the {cold_read_gbps:.5g} GB/s "
            "that a cold read reaches on this device."
        )
    return ""


def gate(record, peak_gbps: float | None, cold_read_gbps: float | None = None):
    """The plausibility gate: `record` itself if believable, else a copy marked suspect with a sentence why.

    Suspect is what needs more from memory than `peak_gbps`, or than 1.02 times `cold_read_gbps`. With `config.l2`
    `cold` or unsaid, every byte counts; with `warm` (and for a decode) only the bytes beyond `device.l2_bytes` do,
    because the rest may have stayed in the cache. A record that is suspect already stays so.

    Args:
        record: a `trapetum.records.Record` of any kind.
        peak_gbps: the device's published memory bandwidth in GB/s; None if unknown.
        cold_read_gbps: its measured cold read bandwidth in GB/s; None if unknown.

    Returns:
        a `Record`.
    """
    why = "" if record.suspect else _complaint(record, peak_gbps, cold_read_gbps)
    return record.replace(suspect=True, why_suspect=why) if why else record


Current = Callable[[str], str | Collection[str] | None] | Mapping[str, str | Collection[str] | None]


def is_stale(record, current: Current) -> bool:
    """Whether a measured record ran a kernel whose source has changed since.

    Args:
        record: a `trapetum.records.Record`; never stale without a kernel hash, or when not measured.
        current: from method to the SHA-256 of its kernel source today, or to several (one a device type);
            a function or a mapping. None, or a method that is not in it: unknown, so not called stale.
    """
    if record.kind != "measured" or record.kernel_sha256 is None:
        return False
    today = current.get(record.method) if isinstance(current, Mapping) else current(record.method)
    if today is None:
        return False
    return record.kernel_sha256 not in ({today} if isinstance(today, str) else set(today))
