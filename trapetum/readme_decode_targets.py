"""What was asked of whole decodes, and what the records say; a figure that nobody measured yet says so."""

from collections.abc import Sequence

from trapetum import records as rec
from trapetum.readme_cells import as_long, beside, one, plain, share_of_bound, stage_number, usual, weights
from trapetum.readme_targets import Case, Target, over, worst
from trapetum.records import Record

MODEL = "random:llama-2-7b"
TOKENS = 512
KV_16 = ("fp16", "bf16")

# Why a target is missed; shown only then.
_WHY = {
    "fp32": "transformers' fp32 decode reads at the memory bandwidth, so the ratio of a token's bytes is the limit",
    "int8 cache over fp16 cache, 4096 tokens": "by less than a percent; the weights outweigh the cache at this length",
    "int8 cache over fp16 cache, 16384 tokens": "unpacking the codes takes more instructions than memory gives time for",
    "int4 cache over fp16 cache, 16384 tokens": "unpacking the codes takes more instructions than memory gives time for",
    "peak memory of the 512 tokens, GB": "embedding, head and cache are fp16; with codes in the head it is less (below)",
    "J/token, own fp16 over 4-bit, gross": "fp16 draws less power at the slower graph stage; pdl over pdl meets it (below)",
}


def _where(record: Record) -> str:
    words = [record.config["stage"], weights(record)]
    return ", ".join(word for word in words if word)


def _decodes(records: Sequence[Record], method: str, **config) -> list[Record]:
    """Plain decodes of enough tokens of the model that targets are about."""
    found = rec.select(plain(records), method=method, model=MODEL, **config)
    return [r for r in found if usual(r) and r.config["new_tokens"] >= TOKENS]


def _fastest(records: Sequence[Record]) -> Record | None:
    """The fastest plain 4-bit decode with a 16-bit head, which the dense decode beside it has too."""
    found = [r for r in _decodes(records, "codebook", bits=4) if r.config.get("lm_head") != "codebook"]
    return max(found, key=lambda r: r.value, default=None)


def _graph(records: Sequence[Record], ours: Record) -> Record | None:
    found = [r for r in _decodes(records, "fp16", stage="graph") if as_long(r, ours)]
    return max(found, key=lambda r: r.value, default=None)


def _published(published: Sequence[Record]) -> Record | None:
    """gpt-fast's int4 decode, from the notes on peers."""
    found = rec.select(
        published, quantity="decode_speed", method="gpt-fast", model="llama-2-7b", bits=4, kind="published"
    )
    return next((r for r in found if "H100" in r.device.get("name", "")), None)


def _peer(records: Sequence[Record], ours: Record) -> Record | None:
    """The fastest decode of the model by other people's code, as long as `ours`."""
    from trapetum.bench.decode_peers import PEERS

    found = rec.select(records, quantity="decode_speed", method=PEERS, model=MODEL)
    return max((r for r in found if as_long(r, ours)), key=lambda r: r.value, default=None)


def _bound(records: Sequence[Record], ours: Record) -> Case | None:
    share = share_of_bound(ours, records)
    return Case(ours, None, _where(ours), share) if share else None


def _each_stage(records: Sequence[Record]) -> Case | None:
    """The codebook stage that gains least over the one before it, lengths alike."""
    best: dict[int, Record] = {}
    for r in rec.select(plain(records), method="codebook", bits=4, model=MODEL):
        known = best.get(stage_number(r))
        if usual(r) and (
            known is None or (r.config["new_tokens"], r.value) > (known.config["new_tokens"], known.value)
        ):
            best[stage_number(r)] = r
    order = [best[number] for number in sorted(best)]
    pairs = zip(order, order[1:], strict=False)
    cases = (
        over(after, before, f"{after.config['stage']} over {before.config['stage']}")
        for before, after in pairs
        if as_long(after, before)
    )
    return worst(cases, at_least=True)


def _energy(records: Sequence[Record]) -> Case | None:
    """Joules of the thriftiest fp16 stage from `graph` on over those of the thriftiest 4-bit one, gross."""
    found = [r for r in plain(records, "energy_per_token") if usual(r) and r.config.get("model") == MODEL]
    found = [r for r in found if r.config.get("accounting") == "gross" and stage_number(r) >= 2]
    dense = [r for r in found if r.method == "fp16"]
    ours = [r for r in found if r.method == "codebook" and r.config.get("bits") == 4]
    best = [min(group, key=lambda r: r.value, default=None) for group in (dense, ours)]
    where = f"fp16 {best[0].config['stage']} over {_where(best[1])}" if all(best) else ""
    return over(*best, where)


def _context(records: Sequence[Record], kv: str, context: int) -> Case | None:
    """Speed with a quantized cache over that with a 16-bit one, 4-bit weights, the last stage."""
    same = {"method": "codebook", "bits": 4, "model": MODEL, "context": context}
    found = rec.select(records, quantity="context_speed", kv=kv, **same)
    ours = max(found, key=stage_number, default=None)
    if ours is None:
        return None
    same |= {name: ours.config.get(name) for name in ("stage", "lm_head")}
    return over(ours, one(records, "context_speed", kv=KV_16, **same), _where(ours))


def _standalone(records: Sequence[Record]) -> Case | None:
    found = rec.select(records, quantity="speedup", runtime="c++", baseline="python", model=MODEL)
    return Case(found[-1], None, f"{found[-1].config['stage']}, in turns") if found else None


def h100(records: Sequence[Record], published: Sequence[Record] = ()) -> list[Target]:
    """What a decode of 7B shapes on an H100 was asked for; nothing where no decode was measured.

    Args:
        records: of one device.
        published: figures of others.
    """
    if not plain(records):
        return []
    ours = _fastest(records)
    where = _where(ours) if ours else ""
    graph, int4 = (_graph(records, ours), _published(published)) if ours else (None, None)
    peer = _peer(records, ours) if ours else None
    held = beside(ours, records, "decode_memory") if ours else None
    speed = Case(ours, None, where) if ours else None
    share = _bound(records, ours) if ours else None
    asked = [
        ("decode, 4-bit, 512 tokens, tok/s", 480, speed, "goal 600, stretch 700"),
        ("the same over own fp16 graph", 2.7, over(ours, graph, where), ""),
        ("the same over gpt-fast int4 (published)", 1.45, over(ours, int4, where), ""),
        ("the same over the fastest peer run here", 2, over(ours, peer, peer.method if peer else ""), ""),
        ("the same, share of the byte bound", 0.55, share, "goal 0.7"),
        ("each stage over the one before, 4-bit", 1, _each_stage(records), ""),
        ("J/token, own fp16 over 4-bit, gross", 2.5, _energy(records), "goal 3"),
        ("int8 cache over fp16 cache, 4096 tokens", 1.15, _context(records, "int8", 4096), ""),
        ("int8 cache over fp16 cache, 16384 tokens", 1.4, _context(records, "int8", 16384), ""),
        ("int4 cache over fp16 cache, 16384 tokens", 1.8, _context(records, "int4", 16384), ""),
        ("C++ program over Python", 0.97, _standalone(records), ""),
    ]
    peak = "peak memory of the 512 tokens, GB"
    memory = Target(peak, 4.0, False, Case(held, None, where) if held else None, _WHY[peak])
    return [
        *(Target(what, bound, True, case, _WHY.get(what, ""), goal) for what, bound, case, goal in asked),
        memory,
    ]


def cpu(records: Sequence[Record]) -> list[Target]:
    """What a decode of a shape beyond the cache of a CPU was asked for; nothing where no decode was measured."""

    def gain(baseline: str) -> Case | None:
        found = rec.select(
            records, quantity="speedup", interleaved=True, baseline=f"transformers-eager {baseline}"
        )
        newest = max(found, key=lambda r: r.utc or "", default=None)
        where = (
            f"{newest.config['model'].removeprefix('random:')}, {newest.config['stage']}, in turns"
            if newest
            else ""
        )
        return Case(newest, None, where) if newest else None

    if not plain(records):
        return []
    best = "decode over transformers' best dtype"
    return [
        Target(best, 2, True, gain("best dtype"), goal="goal 3.3"),
        Target("decode over transformers' fp32", 8.5, True, gain("fp32"), _WHY["fp32"]),
    ]
