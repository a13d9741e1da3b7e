"""From records to points of a trade-off: one way to decode a model on a device, with its speed, memory, accuracy, energy.

A decode's speed, memory and energy are separate records, and perplexity belongs to the weights alone; here they are
joined. Perplexities of different protocols are never mixed: accuracy is the rise over the unquantized model of the
same protocol, in per cent.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from trapetum import hardware
from trapetum.figures.accuracy import protocol_of
from trapetum.figures.style import by_itself, device_name, label_of, stale, unusual
from trapetum.records import Record, select
from trapetum.shapes import KV_BLOCK, MODELS, ModelShape

AXES = ("tok_s", "memory_gb", "loss_pct", "j_per_token")
NOT_SYSTEMS = ("byte-limit", "no-linears", "read")
# Quantizers whose result is one codebook an output channel: they decode with the same kernel at the same speed.
CODEBOOK_QUANTIZERS = ("kmeans", "kmeans-weighted", "lloyd", "nf4", "rtn", "squeezellm", "lnq", "lnq-guided")
_ALIASES = {"marlin-awq": "awq", "marlin-gptq": "gptq", "exllama-v2": "gptq"}
_MUST_AGREE = ("stage", "host", "format", "quant", "cache_size", "kernel")
_SHOULD_AGREE = ("new_tokens", "context", "dtype", "compile", "range", "profile", "lm_head")
_SHORT_CONTEXT = 64


@dataclass(frozen=True)
class Point:
    """One way to decode one model on one device.

    Attributes:
        label, system, method, bits: what it is; the label also names the quantizer where it decides the accuracy.
        device, model: where, and of what; points compare only within the same pair.
        values: by axis (`tok_s`, `memory_gb`, `loss_pct`, `j_per_token`): the number as recorded; missing if unknown.
        kinds: by axis: the kind of that number.
        records: by axis: the record behind it.
        context: mean cached tokens at which it was recorded, or None if not said.
        kv_bytes: bytes of keys and values one cached token adds; None if the shape is unknown.
        roof_gbps: read bandwidth of the device; None if unknown.
    """

    label: str
    system: str
    method: str
    bits: float | None
    device: str
    model: str
    values: dict[str, float]
    kinds: dict[str, str]
    records: dict[str, Record]
    context: float | None = None
    kv_bytes: float | None = None
    roof_gbps: float | None = None
    suspect: bool = field(default=False)
    stale: bool = field(default=False)

    def at(self, context: float | None) -> dict[str, float]:
        """The values at another context: the cache grows, and each token reads it once at the roof's bandwidth.

        Holds while attention streams the live cache at full bandwidth: an optimistic bound for long contexts.

        Args:
            context: cached tokens; None for the values as recorded.

        Returns:
            values by axis; empty where the recorded context, the shape or the bandwidth is not known.
        """
        if context is None:
            return self.values
        if None in (self.context, self.kv_bytes, self.roof_gbps):
            return {}
        more_bytes = (context - self.context) * self.kv_bytes
        seconds = 1 / self.values["tok_s"]
        later = max(seconds + more_bytes / self.roof_gbps / 1e9, 1e-9)
        moved = dict(self.values, tok_s=1 / later)
        if "memory_gb" in moved:
            moved["memory_gb"] += more_bytes / 1e9
        if "j_per_token" in moved:
            moved["j_per_token"] *= later / seconds
        return moved

    def kind(self, x: str, y: str, context: float | None = None) -> str:
        """Kind of the point in the plane of two axes: both coordinates' if they agree, else derived (joined)."""
        kinds = {self.kinds[axis] for axis in (x, y) if self.kinds.get(axis)}
        return kinds.pop() if len(kinds) == 1 and context is None else "derived"


def canonical_device(record: Record) -> str:
    """The device's name in the GPU table if it is there, so that `NVIDIA H100 80GB HBM3` and `H100 SXM` are one."""
    gpu = hardware.find(str(record.device.get("name") or ""))
    return gpu.name if gpu else device_name(record)


def pick(found: dict[tuple[str, str], list], *records: Iterable[Record]) -> list:
    """The group to show first, of those with a dense and a quantized way: of the first `records` that has one.

    Args:
        found: what `groups` returned.
        *records: e.g. this run's decodes, then the recorded GPU's; if none of them fits, the largest group is taken.

    Returns:
        points; an empty list if no group has both.
    """
    whole = {
        place: points for place, points in found.items() if fastest(points, True) and fastest(points, False)
    }
    for wanted in records:
        places = {(canonical_device(r), canonical_model(r)) for r in wanted}
        for place, points in whole.items():
            if place in places:
                return points
    return next(iter(whole.values()), [])


def fastest(points: Iterable["Point"], dense: bool) -> "Point | None":
    """The fastest dense (16 bits or more), or quantized, point that is not suspect; measured ones before published."""
    fitting = [p for p in points if ((p.bits or 0) >= 16) == dense and not p.suspect]
    return max(fitting, key=lambda p: (p.kinds["tok_s"] == "measured", p.values["tok_s"]), default=None)


def canonical_model(record: Record) -> str:
    """The model's name; random weights of a shape count as that shape."""
    return str(record.config.get("model", "")).removeprefix("random:")


def tradeoffs(records: Sequence[Record]) -> list[Point]:
    """All points that the records give: one for each `decode_speed` record, and one more for each quantizer known.

    Args:
        records: any; `decode_speed`, `decode_memory`, `energy_per_token` (gross), `perplexity` and `read_bandwidth`
            are used. Decodes taken in turns with others are left out.
    """
    roofs = _roofs(records)
    losses = _losses(records)
    pool = {
        "memory_gb": _by_place(select(records, quantity="decode_memory")),
        "j_per_token": _by_place(r for r in select(records, quantity="energy_per_token") if _is_gross(r)),
    }
    made: dict[tuple, Point] = {}
    for speed in select(records, quantity="decode_speed"):
        if speed.method not in NOT_SYSTEMS and canonical_model(speed) and by_itself(speed):
            for point in _points_of(speed, pool, losses, roofs):
                made.setdefault(
                    (point.label, point.device, point.model, *sorted(point.values.items())), point
                )
    return list(made.values())


def _is_gross(record: Record) -> bool:
    return record.config.get("accounting", "gross") == "gross"


def _roofs(records: Sequence[Record]) -> dict[str, float]:
    """Read bandwidth by device, GB/s: the best unsuspect cold read measured, else the best published one."""
    roofs: dict[str, float] = {}
    for kind in ("measured", "published"):
        known = set(roofs)
        for r in select(records, quantity="read_bandwidth", method="read", kind=kind, suspect=False):
            name = canonical_device(r)
            if name not in known and r.config.get("l2", "cold") == "cold":
                roofs[name] = max(r.value, roofs.get(name, 0.0))
    return roofs


def roof_of(device: str, roofs: dict[str, float]) -> float | None:
    """Read bandwidth of a device in GB/s: measured or published read, else the datasheet's."""
    gpu = hardware.find(device)
    return roofs.get(device) or (gpu.bandwidth_gbps if gpu else None)


def _place(record: Record) -> tuple:
    return (
        canonical_device(record),
        canonical_model(record),
        record.method,
        record.config.get("bits"),
        record.kind,
    )


def _by_place(records: Iterable[Record]) -> dict[tuple, list[Record]]:
    places: dict[tuple, list[Record]] = {}
    for r in records:
        places.setdefault(_place(r), []).append(r)
    return places


def _partner(speed: Record, candidates: Sequence[Record]) -> Record | None:
    """The record of the same run: nothing that must agree differs, and most of what should agree does."""

    def differs(r: Record) -> bool:
        other = any(r.config.get(k) not in (None, speed.config.get(k)) for k in _MUST_AGREE)
        return other or unusual(r.config) != unusual(speed.config)

    def agreement(r: Record) -> int:
        return sum(r.config.get(k) == speed.config.get(k) for k in (*_MUST_AGREE, *_SHOULD_AGREE))

    return max((r for r in candidates if not differs(r)), key=agreement, default=None)


def _losses(records: Sequence[Record]) -> dict[tuple, tuple[float, Record]]:
    """By (model, quantizer, bits): per cent above the unquantized model of the same protocol, and the record."""
    found = select(records, quantity="perplexity", suspect=False)
    bases: dict[str, float] = {}
    for r in found:
        if r.method == "fp":
            bases.setdefault(protocol_of(r), r.value)
    losses: dict[tuple, tuple[float, Record]] = {}
    for r in sorted(found, key=lambda r: (r.kind != "measured", not r.config.get("window"))):
        base = bases.get(protocol_of(r))
        if base and r.method != "fp":
            key = canonical_model(r), r.method, r.config.get("bits")
            losses.setdefault(key, (100 * (r.value / base - 1), r))
    return losses


def _points_of(speed: Record, pool: dict, losses: dict, roofs: dict[str, float]) -> list[Point]:
    values, records = {"tok_s": speed.value}, {"tok_s": speed}
    for axis, places in pool.items():
        partner = _partner(speed, places.get(_place(speed), []))
        if partner is not None:
            values[axis], records[axis] = partner.value, partner
    kinds = {axis: r.kind for axis, r in records.items()}
    if "memory_gb" not in values and speed.config.get("bytes"):
        values["memory_gb"], kinds["memory_gb"] = speed.config["bytes"] / 1e9, "derived"
    if _is_dense(speed):
        return [_point(speed, _name(speed), {**values, "loss_pct": 0.0}, kinds, records, roofs)]
    model, bits = canonical_model(speed), speed.config.get("bits")
    made = []
    for quantizer in _quantizers(speed):
        if (model, quantizer, bits) in losses:
            loss, source = losses[model, quantizer, bits]
            name = _name(speed) + (f" + {quantizer}" if speed.method == "codebook" else "")
            more = (
                {**values, "loss_pct": loss},
                {**kinds, "loss_pct": source.kind},
                {**records, "loss_pct": source},
            )
            made.append(_point(speed, name, *more, roofs))
    return made or [_point(speed, _name(speed), values, kinds, records, roofs)]


def _is_dense(speed: Record) -> bool:
    whole = (speed.config.get("bits") or 0) >= 16 and not speed.config.get("sparsity")
    return speed.config.get("linears") == "dense" or whole


def _quantizers(speed: Record) -> tuple[str, ...]:
    return CODEBOOK_QUANTIZERS if speed.method == "codebook" else (_ALIASES.get(speed.method, speed.method),)


def _name(speed: Record) -> str:
    c = speed.config
    more = [
        str(c[k]) for k in ("stage", "host", "format", "quant") if c.get(k) and str(c[k]) not in speed.method
    ]
    flags = [word for key, word in (("flash_attention", "flash"), ("estimate", "estimate")) if c.get(key)]
    return ", ".join([label_of(speed), *more, *unusual(c), *flags])


def _point(
    speed: Record, label: str, values: dict, kinds: dict, records: dict, roofs: dict[str, float]
) -> Point:
    device, model = canonical_device(speed), canonical_model(speed)
    shape = MODELS.get(model)
    return Point(
        label, _name(speed), speed.method, speed.config.get("bits"), device, model, values, kinds, records,
        context=_context(speed), kv_bytes=_kv_bytes(shape, speed.config) if shape else None,
        roof_gbps=roof_of(device, roofs), suspect=any(r.suspect for r in records.values()),
        stale=any(stale(r) for r in records.values()),
    )  # fmt: skip


def _kv_bytes(shape: ModelShape, config: dict) -> float:
    """Bytes that one more cached token adds to what a step reads."""
    if config.get("kv") in ("int8", "int4"):
        return shape.layers * shape.kv_block_bytes(config["kv"]) / KV_BLOCK
    return shape.kv_bytes(1, 4 if config.get("dtype") == "fp32" else 2)


def _context(speed: Record) -> float | None:
    context, new = speed.config.get("context"), speed.config.get("new_tokens")
    if isinstance(context, (int, float)):
        return float(context)
    if context == "short":
        return _SHORT_CONTEXT
    return new / 2 if isinstance(new, (int, float)) else None


def groups(points: Iterable[Point]) -> dict[tuple[str, str], list[Point]]:
    """Points by (device, model), most first: only within a group may they be compared."""
    found: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        found.setdefault((point.device, point.model), []).append(point)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))
