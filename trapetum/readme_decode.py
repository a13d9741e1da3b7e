"""The README's tables of whole decodes: by stage, by context, by model, beside peers, in turns, against transformers' tokens.

GB/s and shares of the byte bound stand without a citation of their own: both follow from the record of the speed in
the same row (`config.bytes`, `config.read_gbps`). A table without a row is "".
"""

from collections.abc import Iterable, Sequence

from trapetum import records as rec
from trapetum.figures.style import by_itself, unusual
from trapetum.readme_cells import (
    OWN_DENSE,
    as_long,
    beside,
    cited,
    filled,
    gbps,
    longest,
    main_model,
    not_run,
    notes,
    one,
    percent,
    plain,
    ratio,
    refusals,
    share_of_bound,
    stage_number,
    usual,
    weights,
)
from trapetum.records import Record

KV_16 = ("fp16", "bf16", "fp32")


def name_of(model: str) -> str:
    """A model in words: random weights are called so."""
    return f"{model.removeprefix('random:')} (random weights)" if model.startswith("random:") else model


# By stage


def stages(records: Sequence[Record]) -> str:
    """Speed, bandwidth, first token and memory of one model by stage, and the speedup over dense weights of the same stage."""
    model = main_model(records)
    speeds = longest(r for r in plain(records) if r.config["model"] == model)
    speeds.sort(key=lambda r: (stage_number(r), r.method == "codebook", not usual(r)))
    rows = [_stage_row(r, speeds, records) for r in speeds]
    refused = [
        f"{r.config['stage']}, {weights(r)}: {r.config['error']}"
        for r in refusals(records, model=model)
        if r.method in (*OWN_DENSE, "codebook") and _of_a_stage(r) and not _ran(r, records)
    ]
    return filled(
        [
            "stage, weights",
            "tokens",
            "tok/s, first 32",
            "last 32",
            "all",
            "tokens a step",
            "GB/s",
            "of the byte bound",
            "first token, s",
            "peak GB",
            "estimated GB",
            "over dense",
        ],
        rows,
    ) + notes(refused)


def _of_a_stage(refused: Record) -> bool:
    """Whether a whole decode was refused, not one context or a comparison of tokens."""
    config = refused.config
    return "stage" in config and "context" not in config and "baseline" not in config


def _ran(refused: Record, records: Iterable[Record]) -> bool:
    """Whether what was refused once was measured another time."""
    same = {name: refused.config.get(name) for name in ("model", "stage", "bits", "kv", "rows")}
    return bool(rec.select(records, quantity="decode_speed", method=refused.method, **same))


def _stage_row(r: Record, speeds: Sequence[Record], records: Sequence[Record]) -> list[str]:
    windows = [beside(r, records, "window_speed", window=f"{end} 32") for end in ("first", "last")]
    estimate, accepted = r.config.get("estimate_gb"), r.config.get("accepted")
    return [
        f"{r.config['stage']}, {weights(r)}",
        str(r.config["new_tokens"]),
        *map(cited, windows),
        cited(r),
        f"{accepted:.2f}" if accepted else "",
        gbps(r),
        percent(share_of_bound(r, records)),
        cited(beside(r, records, "time_to_first_token")),
        cited(beside(r, records, "decode_memory")),
        f"{estimate:.2f}" if estimate else "-",
        ratio(r, _dense(r, speeds)) if r.method == "codebook" else "",
    ]


def _dense(ours: Record, speeds: Iterable[Record]) -> Record | None:
    """The fastest dense decode of the own engine at the same stage and about the same length, or None."""
    rivals = [
        r
        for r in speeds
        if r.config.get("linears") == "dense"
        and r.config["stage"] == ours.config["stage"]
        and unusual(r.config) == unusual(ours.config)
        and as_long(r, ours)
    ]
    return max(rivals, key=lambda r: r.value, default=None)


# By context


def contexts(records: Sequence[Record]) -> str:
    """Speed and memory against the cached tokens, with the cache in 16, 8 and 4 bits; one table for each kind of weights."""
    timed = rec.select(records, quantity="context_speed")
    kinds = dict.fromkeys(
        (r.config["model"], r.config["stage"], r.method, r.config.get("bits"), r.config.get("lm_head"))
        for r in timed
    )
    return "\n".join(_of_contexts(records, *kind) for kind in kinds)


def _of_contexts(records, model, stage, method, bits, lm_head) -> str:
    same = {"model": model, "stage": stage, "method": method, "bits": bits, "lm_head": lm_head}
    timed = rec.select(records, quantity="context_speed", **same)
    refused = [r for r in refusals(records, **same) if "context" in r.config]
    kvs = [kv for kv in (*KV_16, "int8", "int4") if any(r.config.get("kv") == kv for r in timed)]
    header = ["cached tokens"]
    for kv in kvs:
        gain = [f"over {kvs[0]}"] if kv != kvs[0] else []
        header += [f"tok/s, cache in {kv}", *gain, "GB"]
    rows = []
    for context in sorted({r.config["context"] for r in [*timed, *refused]}):
        at = {kv: one(timed, "context_speed", kv=kv, context=context) for kv in kvs}
        row = [f"{context:,}"]
        for kv in kvs:
            gain = [ratio(at[kv], at[kvs[0]])] if kv != kvs[0] else []
            held = one(records, "decode_memory", kv=kv, context=context, **same)
            no = next(
                (r for r in refused if (r.config.get("kv"), r.config["context"]) == (kv, context)), None
            )
            row += [not_run(no) if no and not at[kv] else cited(at[kv]), *gain, cited(held)]
        rows.append(row)
    without_kv = timed[0].replace(config={**timed[0].config, "kv": None})
    return f"{name_of(model)}, {weights(without_kv)}, stage {stage}:\n\n" + filled(header, rows)


# By model


def models(records: Sequence[Record]) -> str:
    """Each model at the last stage that its codebook weights were decoded at; "" for fewer than two models.

    Where dense weights do not fit one card, a decode split over several stands for them.
    """
    speeds = longest(plain(records))
    names = dict.fromkeys(r.config["model"] for r in speeds)
    if len(names) < 2:
        return ""
    rows, refused = [], []
    for model in names:
        found = [r for r in speeds if r.config["model"] == model]
        ours = _last([r for r in found if r.method == "codebook" and usual(r)])
        dense = (
            _dense(ours, found) if ours else _last([r for r in found if r.method in OWN_DENSE and usual(r)])
        )
        dense = dense or _last([r for r in found if r.config.get("world_size", 1) > 1])
        no = next((r for r in refusals(records, model=model) if r.method in OWN_DENSE), None)
        if no and (dense is None or not usual(dense)):
            refused.append(f"{name_of(model)}, {weights(no)}: {no.config['error']}")
        rows.append(_model_row(model, ours, dense, no, records))
    header = ["model", "stage", "codebook, tok/s", "GB/s", "of the byte bound", "peak GB", "estimated GB"]
    return filled([*header, "dense, tok/s", "peak GB, dense", "over dense"], rows) + notes(refused)


def _last(speeds: Sequence[Record]) -> Record | None:
    """The decode of the last stage, the fastest of several."""
    return max(speeds, key=lambda r: (stage_number(r), r.value), default=None)


def _model_row(
    model: str, ours: Record | None, dense: Record | None, no: Record | None, records
) -> list[str]:
    shown = ours or dense
    estimate = ours.config.get("estimate_gb") if ours else None
    cards = f" ({', '.join(unusual(dense.config))})" if dense and not usual(dense) else ""
    return [
        f"{name_of(model)}, {weights(ours)}" if ours else name_of(model),
        shown.config["stage"],
        cited(ours),
        gbps(ours),
        percent(share_of_bound(ours, records)) if ours else "-",
        cited(beside(ours, records, "decode_memory")) if ours else "-",
        f"{estimate:.2f}" if estimate else "-",
        cited(dense) + cards if dense else not_run(no) if no else "-",
        cited(beside(dense, records, "decode_memory")) if dense else "-",
        ratio(ours, dense) if ours and dense and as_long(ours, dense) else "-",
    ]


# Beside other people's code


def peers(records: Sequence[Record]) -> str:
    """Other people's decodes of the main model, slowest first, with the own engine's last stage among them."""
    model = main_model(records)
    theirs = [r for r in _peers(records, "decode_speed") if r.config["model"] == model]
    refused = [r for r in _peers(records, "call_accepted") if r in refusals(records, model=model)]
    if not theirs and not refused:
        return ""
    own = [r for r in longest(plain(records)) if usual(r) and r.config["model"] == model]
    last = max(map(stage_number, own), default=-1)
    own = [r for r in own if stage_number(r) == last]
    ours = _plain_head(own)
    rows = [_peer_row(r, ours, records) for r in sorted([*longest(theirs), *own], key=lambda r: r.value)]
    header = [
        "",
        "tokens",
        "tok/s",
        "GB/s",
        "of the read bandwidth",
        "first token, s",
        "peak GB",
        "weights, GB",
    ]
    measured = {r.method for r in theirs}
    said = [f"{r.method}: {r.config['error']}" for r in refused if r.method not in measured]
    return filled([*header, "codebook over it"], rows) + notes(said)


def _plain_head(own: Iterable[Record]) -> Record | None:
    """The fastest codebook decode whose head is dense, as the peers' heads are; any, where there is no such."""
    coded = [r for r in own if r.method == "codebook"]
    alike = [r for r in coded if r.config.get("lm_head") != "codebook"]
    return max(alike or coded, key=lambda r: r.value, default=None)


def _peers(records: Iterable[Record], quantity: str) -> list[Record]:
    from trapetum.bench.decode_peers import PEERS

    return [r for r in rec.select(records, quantity=quantity, method=PEERS) if by_itself(r)]


def _peer_row(r: Record, ours: Record | None, records: Sequence[Record]) -> list[str]:
    own = r.method in (*OWN_DENSE, "codebook")
    return [
        f"**this engine, {weights(r)}**" if own else weights(r),
        str(r.config["new_tokens"]),
        cited(r),
        gbps(r),
        percent(share_of_bound(r, records)),
        cited(beside(r, records, "time_to_first_token")),
        cited(beside(r, records, "decode_memory")),
        cited(beside(r, records, "model_memory")),
        ratio(ours, r) if ours and r.method != "codebook" and as_long(ours, r) else "",
    ]


# In turns


def turns(records: Sequence[Record]) -> str:
    """The codebook model and transformers in each dtype on a CPU, of one run in which they took turns."""
    taken = rec.select(records, quantity="decode_speed", interleaved=True, beside=None)
    ours = max((r for r in taken if r.method == "codebook"), key=lambda r: r.utc or "", default=None)
    if ours is None:
        return ""
    run = ours.config["run"]
    gains = rec.select(records, quantity="speedup", interleaved=True, run=run)
    gains = {r.config["baseline_dtype"]: r for r in gains}
    rows = [
        [f"**this engine, {weights(ours)}**", str(ours.config["new_tokens"]), cited(ours), gbps(ours), ""]
    ]
    for r in sorted(rec.select(taken, run=run), key=lambda r: -r.value):
        if r is not ours:
            gain = cited(gains.get(r.config["dtype"]), 3, "x")
            rows.append([weights(r), str(r.config["new_tokens"]), cited(r), gbps(r), gain])
    return filled([name_of(ours.config["model"]), "tokens", "tok/s", "GB/s", "codebook over it"], rows)


def standalone(records: Sequence[Record]) -> str:
    """The exported C++ program beside the Python engine, in turns."""
    rows = []
    for gain in rec.select(records, quantity="speedup", runtime="c++", baseline="python"):
        run = {"run": gain.config["run"]}
        python, cpp = (one(records, "decode_speed", beside=b, **run) for b in ("c++", "python"))
        same = one(records, "token_agreement", beside="python", **run)
        rows.append(
            [
                f"{name_of(gain.config['model'])}, {weights(gain)}",
                str(gain.config["new_tokens"]),
                *map(cited, (python, cpp)),
                cited(gain, 3, "x"),
                cited(same),
            ]
        )
    header = ["", "tokens", "Python, tok/s", "C++, tok/s", "C++ over Python", "share of equal tokens"]
    return filled(header, rows)


# One kernel a token


def one_kernel(records: Sequence[Record]) -> str:
    """The bare reads of a token as one persistent kernel and as chains of kernels."""
    rows = []
    for r in rec.select(records, quantity="token_floor"):
        chain = one(records, "token_floor", model=r.config["model"], way="pdl chain")
        words = [name_of(r.config["model"]), r.config["way"]]
        gain = ratio(chain, r) if r.config["bytes"] and r is not chain else ""
        rows.append([", ".join(words), str(r.config["context"]), cited(r), gain])
    return filled(["", "cached tokens", "us", "over the pdl chain"], rows)


# Against transformers' tokens


def agreement(records: Sequence[Record]) -> str:
    """Each stage's greedy tokens and logits against transformers' on the same weights."""
    found = rec.select(records, quantity="token_agreement", variant="prompts", baseline="transformers")
    found.sort(key=lambda r: (r.config["model"], stage_number(r)))
    rows = [_agreement_row(r, records) for r in found]
    header = ["model, stage, weights", "prompts", "tokens each", "prompts with all tokens equal"]
    header += ["tokens equal after the same ones", "largest logit difference", "over the logits' deviation"]
    return filled([*header, "disagreements: near-ties, faults"], rows)


def _agreement_row(r: Record, records: Sequence[Record]) -> list[str]:
    config = r.config
    same = {name: config.get(name) for name in ("model", "stage", "bits", "kv", "lm_head", "dtype")}

    def of(quantity: str, variant: str) -> Record | None:
        return one(records, quantity, r.method, variant=variant, **same)

    gap = of("logit_gap", "disagreements")
    agreed = r.value == 1 and not gap
    return [
        f"{name_of(config['model'])}, {config['stage']}, {weights(r)}, {config['dtype']}",
        str(config["prompts"]),
        str(config["new_tokens"]),
        cited(r),
        cited(of("token_agreement", "tokens")),
        cited(of("logit_error", "absolute")),
        cited(of("logit_error", "relative")),
        "none" if agreed else f"{gap.config['near_ties']}, {gap.config['faults']}" if gap else "-",
    ]


# Energy


def energy(records: Sequence[Record]) -> str:
    """Energy of a token by stage, gross and net of idle, and how many times less than dense weights of the same stage."""
    model = main_model(records)
    found = [r for r in plain(records, "energy_per_token") if r.config.get("model") == model]
    gross = [r for r in longest(r for r in found if r.config.get("accounting") == "gross")]
    rows = []
    for r in sorted(gross, key=lambda r: (stage_number(r), r.method == "codebook")):
        net = beside(r, found, "energy_per_token", accounting="net")
        dense = [
            d for d in gross if d.method in OWN_DENSE and d.config["stage"] == r.config["stage"] and usual(r)
        ]
        less = ratio(min(dense, key=lambda d: d.value), r) if dense and r.method == "codebook" else ""
        power = [f"{r.config[k]:.0f}" if r.config.get(k) else "-" for k in ("mean_w", "idle_w")]
        rows.append([f"{r.config['stage']}, {weights(r)}", cited(r), cited(net), *power, less])
    header = ["stage, weights", "gross J/token", "net of idle J/token", "mean W", "idle W"]
    return filled([*header, "dense over it, gross"], rows)
