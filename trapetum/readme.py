"""`make readme`: write the README's tables and pictures from the committed records.

A table stands between `<!-- table:NAME -->` and `<!-- end -->`; every number in it is followed by the record it comes
from, so that `trapetum verify` can check it. Pictures go to `data/pictures/`.
"""

import re
from collections.abc import Callable, Iterable, Sequence

from trapetum import readme_targets
from trapetum import records as rec
from trapetum.build import write_atomically
from trapetum.paths import DATA, RECORDS, ROOT
from trapetum.records import Record

PICTURES = DATA / "pictures"
_BLOCK = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def cited(record: Record | None, digits: int = 3, unit: str = "") -> str:
    """A record's value for a table cell, with the comment that names the record."""
    if record is None:
        return "-"
    from trapetum.workbook import significant

    return f"{significant(record.value, digits)}{unit}<!-- record:{record.id} -->"


def ratio(above: Record | None, below: Record | None) -> str:
    """above / below as a cited speedup."""
    if above is None or below is None:
        return "-"
    return f"{above.value / below.value:.2f}x<!-- ratio:{above.id}/{below.id} -->"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _one(records: Iterable[Record], quantity: str, method: str | None = None, **config) -> Record | None:
    found = rec.select(records, quantity=quantity, method=method, **{"beside": None, **config})
    return found[-1] if found else None


def devices(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Measured records by device name, GPUs first."""
    groups: dict[str, list[Record]] = {}
    for r in records:
        if r.kind == "measured" and r.device.get("name"):
            groups.setdefault(r.device["name"], []).append(r)
    return dict(
        sorted(groups.items(), key=lambda item: not item[1][0].device.get("arch", "").startswith("sm_"))
    )


def _is_gpu(records: Sequence[Record]) -> bool:
    return str(records[0].device.get("arch", "")).startswith("sm_")


def _shapes(records: Sequence[Record]) -> list[tuple[int, int]]:
    timed = [
        r
        for r in records
        if r.quantity == "gemv_time" and r.method == "codebook" and r.config.get("l2") == "cold"
    ]
    return sorted(
        {(r.config["in_features"], r.config["out_features"]) for r in timed}, key=lambda s: s[0] * s[1]
    )


def gemv_gpu(records: Sequence[Record]) -> str:
    """Times of one product on a GPU, cold L2, against cuBLAS in the same process."""
    rows = []
    for in_features, out_features in _shapes(records):
        where = dict(in_features=in_features, out_features=out_features, l2="cold")
        dense = _one(records, "gemv_time", "linear-fp16", **where)
        alone = _one(records, "gemv_time", "codebook", bits=4, chain="alone", **where)
        chain = _one(records, "gemv_time", "codebook", bits=4, chain="pdl", **where)
        peer = _one(records, "gemv_time", "tinygemm-int4", **where)
        floor = _one(records, "gemv_time", "read", bits=4, chain="alone", **where)
        times = [cited(r) for r in (dense, peer, alone, chain, floor)]
        rows.append([f"{in_features} x {out_features}", *times, ratio(dense, alone), ratio(dense, chain)])
    header = [
        "in x out",
        "cuBLAS fp16",
        "tinygemm int4",
        "codebook, alone",
        "codebook, PDL chain",
        "read only",
    ]
    return _markdown([*header, "alone", "in a chain"], rows)


def gemv_cpu(records: Sequence[Record]) -> str:
    """Times of one product on a CPU, beyond the last-level cache, all methods interleaved."""
    rows = []
    for in_features, out_features in _shapes(records):
        where = dict(in_features=in_features, out_features=out_features, l2="cold")
        dense = [_one(records, "gemv_time", f"linear-{d}", **where) for d in ("fp32", "bf16", "fp16")]
        peer = _one(records, "gemv_time", "torch-int4", **where)
        ours = _one(records, "gemv_time", "codebook", bits=4, path="int16", **where)
        floor = _one(records, "gemv_time", "read", bits=4, **where)
        if not all(dense):
            continue
        best = min(dense[1:], key=lambda r: r.value)
        times = [cited(r) for r in (*dense, peer, ours, floor)]
        rows.append([f"{in_features} x {out_features}", *times, ratio(dense[0], ours), ratio(best, ours)])
    header = ["in x out", "fp32", "bf16", "fp16", "torch int4", "codebook int16", "read only"]
    return _markdown([*header, "against fp32", "against the better 16-bit"], rows)


def decode(records: Sequence[Record]) -> str:
    """Decode speed and memory by stage, and the speedup over the fastest dense model of the same stage and length."""
    speeds = [r for r in records if r.quantity == "decode_speed" and r.config.get("linears") != "none"]
    rows = []
    for stage in dict.fromkeys(r.config["stage"] for r in speeds):
        at = [r for r in speeds if r.config["stage"] == stage]
        for r in sorted(at, key=lambda r: r.method == "codebook"):
            same = {k: r.config[k] for k in ("stage", "model", "bits", "new_tokens")}
            held = _one(records, "decode_memory", r.method, **same)
            rivals = [d for d in at if d.method != "codebook" and _as_long(d, r)]
            gain = (
                ratio(r, max(rivals, key=lambda d: d.value, default=None)) if r.method == "codebook" else ""
            )
            name = f"{r.config['bits']}-bit codebook" if r.method == "codebook" else r.method
            moved = f"{rec.implied_gbps(r) or 0:.0f}"
            rows.append([f"{stage}, {name}", str(r.config["new_tokens"]), cited(r), moved, cited(held), gain])
    return _markdown(
        ["stage, weights", "tokens", "tok/s", "GB/s", "peak GB", "against the fastest dense"], rows
    )


def _as_long(one: Record, other: Record) -> bool:
    """Whether two decodes are of about the same length, so that their caches are."""
    lengths = sorted((one.config["new_tokens"], other.config["new_tokens"]))
    return lengths[1] <= 1.25 * lengths[0]


def accuracy(records: Sequence[Record]) -> str:
    """Perplexity of the built-in model by bits and method."""
    found = [r for r in records if r.quantity == "perplexity" and r.config.get("model") == "builtin"]
    found = [r for r in found if r.config.get("text") == "builtin"]
    methods = [m for m in dict.fromkeys(r.method for r in found) if m != "fp"]
    dense = _one(found, "perplexity", "fp")
    rows = [["as it is (bf16)", cited(dense, 4), *[""] * (len(methods) - 1)]] if dense else []
    for bits in sorted({r.config["bits"] for r in found if r.method != "fp"}, reverse=True):
        rows.append([f"{bits} bits", *(cited(_one(found, "perplexity", m, bits=bits), 4) for m in methods)])
    return _markdown(["", *methods], rows)


def energy(records: Sequence[Record]) -> str:
    """Energy of a token, gross and net of idle."""
    found = [r for r in records if r.quantity == "energy_per_token"]
    rows = []
    for method in dict.fromkeys(r.method for r in found):
        cells = [cited(_one(found, "energy_per_token", method, accounting=a)) for a in ("gross", "net")]
        rows.append([method if method != "codebook" else "4-bit codebook", *cells])
    return _markdown(["weights, stage graph", "gross J/token", "net of idle J/token"], rows)


def _on(gpu: bool, table: Callable[[Sequence[Record]], str]) -> Callable[[Sequence[Record]], str]:
    def made(records: Sequence[Record]) -> str:
        groups = [(name, group) for name, group in devices(records).items() if _is_gpu(group) is gpu]
        tables = [(name, table(group)) for name, group in groups]
        return "\n".join(
            f"{name}:\n\n{text}" for name, text in tables if text.count("\n| ") > 1
        )  # more than a head

    return made


def targets(records: Sequence[Record]) -> str:
    """What was asked of the kernels and what was measured, by device."""
    asked = {"H100": readme_targets.h100, "H200": readme_targets.h200, "": readme_targets.cpu}
    tables = []
    for name, group in devices(records).items():
        key = next((k for k in asked if k and k in name), None) if _is_gpu(group) else ""
        if key is not None and (text := readme_targets.table(group, asked[key], cited, ratio)):
            tables.append(f"{name}:\n\n{text}")
    return "\n\n".join(tables) + "\n"


TABLES: dict[str, Callable[[Sequence[Record]], str]] = {
    "gemv-gpu": _on(True, gemv_gpu),
    "gemv-cpu": _on(False, gemv_cpu),
    "decode-gpu": _on(True, decode),
    "decode-cpu": _on(False, decode),
    "accuracy": _on(False, accuracy),
    "energy": _on(True, energy),
    "targets": targets,
}


def fill(text: str, records: Sequence[Record]) -> str:
    """`text` with each table block written anew.

    Raises:
        KeyError: a block names no table.
    """

    def written(match: re.Match) -> str:
        if match["name"] not in TABLES:
            raise KeyError(f"the README asks for table {match['name']!r}; there are {', '.join(TABLES)}.")
        return f"{match[1]}{TABLES[match['name']](records)}{match[3]}"

    return _BLOCK.sub(written, text)


def _four_bits(records: Sequence[Record]) -> list[Record]:
    """4-bit and dense products, of the shapes that every dense dtype was timed for."""
    timed = rec.select(records, quantity="gemv_time", beside=None)
    shapes = {(r.config["in_features"], r.config["out_features"]) for r in timed if r.method == "linear-bf16"}
    dense = [r for r in timed if r.method.startswith("linear-")]
    ours = [r for r in timed if r.method == "codebook" and r.config["bits"] == 4]
    return [r for r in [*dense, *ours] if (r.config["in_features"], r.config["out_features"]) in shapes]


def pictures(records: Sequence[Record]) -> dict:
    """The README's pictures: file name -> plotly figure."""
    from trapetum import figures

    made = {}
    for name, group in devices(records).items():
        kind = "gpu" if _is_gpu(group) else "cpu"
        four = _four_bits(group)
        if four and f"speedups-{kind}.png" not in made:
            title = f"One product against the fastest dense one, {name}"
            made[f"speedups-{kind}.png"] = figures.speedups(four, figures.FASTEST, title)
        speeds = [r for r in group if r.quantity == "decode_speed" and r.config.get("linears") != "none"]
        longest = max((r.config["new_tokens"] for r in speeds if r.config["stage"] == "naive"), default=None)
        speeds = [r for r in speeds if longest and r.config["new_tokens"] <= 1.25 * longest]
        roofs = [r.value for r in group if r.quantity == "read_bandwidth"]
        if speeds and f"decode-{kind}.png" not in made:
            made[f"decode-{kind}.png"] = figures.decode_stages(speeds, max(roofs, default=None))
    return made


def main() -> None:
    """Rewrite the README's tables and pictures."""
    import plotly.io

    known = rec.latest(r for r in rec.load(RECORDS).records if not r.suspect)
    readme = ROOT / "README.md"
    write_atomically(readme, fill(readme.read_text(), known).encode())
    PICTURES.mkdir(exist_ok=True)
    made = pictures(known)
    paths = [PICTURES / name for name in made]
    heights = [figure.layout.height for figure in made.values()]
    plotly.io.write_images(list(made.values()), paths, width=1000, height=heights, scale=1.5)
    print(f"README.md and {len(paths)} pictures written from {len(known)} records")


if __name__ == "__main__":
    main()
