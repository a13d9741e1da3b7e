"""`make readme`: write the README's tables and pictures from the committed records.

A table stands between `<!-- table:NAME -->` and `<!-- end -->`; every number in it is followed by the record it comes
from, so that `trapetum verify` can check it. Pictures go to `data/pictures/`.
"""

import re
from collections.abc import Callable, Sequence

from trapetum import readme_accuracy, readme_decode, readme_decode_targets, readme_targets, waterfall
from trapetum import records as rec
from trapetum.build import write_atomically
from trapetum.paths import DATA, PUBLISHED, RECORDS, ROOT
from trapetum.readme_cells import (
    OWN_DENSE,
    cited,
    current,
    devices,
    is_gpu,
    longest,
    main_model,
    markdown,
    one,
    plain,
    ratio,
    stage_number,
    usual,
)
from trapetum.records import Record

PICTURES = DATA / "pictures"
_BLOCK = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


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
        dense = one(records, "gemv_time", "linear-fp16", **where)
        alone = one(records, "gemv_time", "codebook", bits=4, chain="alone", **where)
        chain = one(records, "gemv_time", "codebook", bits=4, chain="pdl", **where)
        peer = one(records, "gemv_time", "tinygemm-int4", **where)
        floor = one(records, "gemv_time", "read", bits=4, chain="alone", **where)
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
    return markdown([*header, "alone", "in a chain"], rows)


def gemv_cpu(records: Sequence[Record]) -> str:
    """Times of one product on a CPU, beyond the last-level cache, all methods interleaved."""
    rows = []
    for in_features, out_features in _shapes(records):
        where = dict(in_features=in_features, out_features=out_features, l2="cold")
        dense = [one(records, "gemv_time", f"linear-{d}", **where) for d in ("fp32", "bf16", "fp16")]
        peer = one(records, "gemv_time", "torch-int4", **where)
        ours = one(records, "gemv_time", "codebook", bits=4, path="int16", **where)
        floor = one(records, "gemv_time", "read", bits=4, **where)
        if not all(dense):
            continue
        best = min(dense[1:], key=lambda r: r.value)
        times = [cited(r) for r in (*dense, peer, ours, floor)]
        rows.append([f"{in_features} x {out_features}", *times, ratio(dense[0], ours), ratio(best, ours)])
    header = ["in x out", "fp32", "bf16", "fp16", "torch int4", "codebook int16", "read only"]
    return markdown([*header, "against fp32", "against the better 16-bit"], rows)


Table = Callable[[Sequence[Record]], str]


def _on(gpu: bool | None, table: Table, caption: str = "") -> Table:
    """The table of each device that has one: of GPUs, of CPUs, or of all (None), under a caption where there is any."""

    def made(records: Sequence[Record]) -> str:
        groups = [(name, group) for name, group in devices(records).items() if gpu in (None, is_gpu(group))]
        tables = [(name, table(group)) for name, group in groups]
        text = "\n".join(f"{name}:\n\n{text}" for name, text in tables if _says_something(text))
        return f"{caption}\n\n{text}" if text and caption else text

    return made


def _says_something(text: str) -> bool:
    """Whether a table has more than its head, or a line under it."""
    return text.count("\n| ") > 1 or "\n- " in text


def targets(records: Sequence[Record]) -> str:
    """What was asked of kernels and decodes and what was measured, by device."""
    published, tables = rec.select(records, kind="published"), []
    for name, group in devices(records).items():
        asked = []
        if not is_gpu(group):
            asked = [*readme_targets.cpu(group), *readme_decode_targets.cpu(group)]
        elif "H100" in name:
            asked = [*readme_targets.h100(group), *readme_decode_targets.h100(group, published)]
        elif "H200" in name:
            asked = readme_targets.h200(group)
        asked = [*asked, *readme_accuracy.targets(group)]
        if asked:
            tables.append(f"{name}:\n\n{readme_targets.table(asked, cited, ratio)}")
    return "\n\n".join(tables) + "\n"


def taken_apart(records: Sequence[Record]) -> dict[str, tuple[waterfall.Run, waterfall.Run]]:
    """By device, GPUs first, a dense and a 4-bit token of the main model taken apart at the same stage, the last there is."""
    pairs = {}
    for name, group in devices(records).items():
        ours = [r for r in records if r.kind != "published" and r.device.get("name") == name]
        model = main_model(group) or next(iter({r.config["model"] for r in _tokens(ours)}), None)
        runs = [
            run for run in waterfall.runs(ours) if run.token.config["model"] == model and usual(run.token)
        ]
        for run in sorted(runs, key=lambda run: stage_number(run.token)):
            stage = run.token.config["stage"]
            dense = [r for r in runs if r.token.method in OWN_DENSE and r.token.config["stage"] == stage]
            if run.token.method == "codebook" and dense:
                pairs[name] = min(dense, key=lambda r: r.us), run
    return pairs


def _tokens(records: Sequence[Record]) -> list[Record]:
    return rec.select(records, quantity="token_part", part=waterfall.TOKEN)


def waterfall_pictures(records: Sequence[Record]) -> str:
    """The pictures of tokens taken apart, where there are any."""
    names = dict.fromkeys(_kind(records, name) for name in taken_apart(records))
    said = {"gpu": "on the recorded GPU", "cpu": "on the recorded CPU"}
    return "".join(
        f"![Where the time of a token goes {said[kind]}, dense and 4-bit](data/pictures/waterfall-{kind}.png)\n"
        for kind in names
    )


def _kind(records: Sequence[Record], device: str) -> str:
    return "gpu" if is_gpu(devices(records)[device]) else "cpu"


_CONTEXTS = (
    "**Speed and memory against the context**, with the cache in 16, 8 and 4 bits. The steps are timed at that length "
    "with whatever the cache holds, which does not change their time; GB is the allocator's peak."
)
_MODELS = "**Other models**, batch 1, greedy, 16-bit cache, each at the last stage that was measured:"
_PEERS = (
    "**Beside other people's code**, same prompt and as many tokens, batch 1, greedy, slowest first; the weights' size "
    "is of all of them, the head's and the embedding's included:"
)
_TURNS = (
    "**In turns with transformers**: in every round each makes as many tokens as the others, so that all meet the same "
    "neighbours on a shared machine, and the ratio is taken within a round:"
)
_STANDALONE = (
    "**Without Python**: the exported C++ program and the Python engine, in turns, on the same step:"
)
_ONE_KERNEL = (
    "**One kernel a token**, the `persistent` stage: nothing but a token's reads, in one cooperative kernel with a barrier "
    "between its phases and in chains of kernels. The stage would be kept if it won by 5 %:"
)
_AGREEMENT = (
    "**Against transformers**: greedy tokens and logits beside those of transformers on the dequantized weights in the "
    "same dtype. A near-tie is a place where the two tokens' logits lie closer together than the logits of the two "
    "programs do where they agree; any other disagreement is a fault."
)

TABLES: dict[str, Table] = {
    "gemv-gpu": _on(True, gemv_gpu),
    "gemv-cpu": _on(False, gemv_cpu),
    "decode-gpu": _on(True, readme_decode.stages),
    "decode-cpu": _on(False, readme_decode.stages),
    "contexts": _on(None, readme_decode.contexts, _CONTEXTS),
    "models": _on(None, readme_decode.models, _MODELS),
    "peers": _on(None, readme_decode.peers, _PEERS),
    "turns": _on(False, readme_decode.turns, _TURNS),
    "standalone": _on(True, readme_decode.standalone, _STANDALONE),
    "one-kernel": _on(True, readme_decode.one_kernel, _ONE_KERNEL),
    "agreement": _on(None, readme_decode.agreement, _AGREEMENT),
    "waterfall": waterfall_pictures,
    "accuracy": _on(None, readme_accuracy.accuracy),
    "quantizing": _on(None, readme_accuracy.quantizing),
    "energy": _on(True, readme_decode.energy),
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
        kind = "gpu" if is_gpu(group) else "cpu"
        four = _four_bits(group)
        if any(r.method == "codebook" for r in four) and f"speedups-{kind}.png" not in made:
            title = f"One product against the fastest dense one, {name}"
            made[f"speedups-{kind}.png"] = figures.speedups(four, figures.FASTEST, title)
        speeds = _for_picture(group)
        roofs = [r.value for r in group if r.quantity == "read_bandwidth"]
        if any(r.method == "codebook" for r in speeds) and f"decode-{kind}.png" not in made:
            made[f"decode-{kind}.png"] = figures.decode_stages(speeds, max(roofs, default=None))
    for name, (dense, ours) in taken_apart(records).items():
        made.setdefault(f"waterfall-{_kind(records, name)}.png", figures.waterfall(dense, ours))
    return made


def _for_picture(records: Sequence[Record]) -> list[Record]:
    """The longest plain decode of the main model at each stage; slow stages may have made fewer tokens."""
    model = main_model(records)
    found = [r for r in plain(records) if r.config["model"] == model and usual(r)]
    return longest(r for r in found if r.config.get("lm_head") != "codebook" or not is_gpu([r]))


def known_records() -> list[Record]:
    """What the README is made from: current measurements, and published figures."""
    return [*current(rec.load(RECORDS).records), *rec.load(PUBLISHED).records]


def main() -> None:
    """Rewrite the README's tables and pictures."""
    import plotly.io

    known = known_records()
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
