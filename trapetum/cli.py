"""The command `trapetum`. Each command prints for a person, or JSON where `--json` is given.

Exit codes: 0 done, 1 done but something failed (a chapter, a check), 2 the input cannot be used.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated

import typer

from trapetum import __version__

app = typer.Typer(
    name="trapetum",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure why batch-1 LLM decode is memory-bound, and what 4-bit codebook weights buy.",
)
bench_app = typer.Typer(no_args_is_help=True, help="Measure kernels, bandwidth or decode; print the records.")
app.add_typer(bench_app, name="bench")

Profile = Annotated[str, typer.Option(help="How much is measured: smoke, quick or full.")]
Device = Annotated[str, typer.Option(help="Where to measure: auto, cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Save = Annotated[Path | None, typer.Option(help="Also append the records to this JSON Lines file.")]
Model = Annotated[str, typer.Argument(help="builtin, a hub id, a directory, or random:<shape>.")]
Stage = Annotated[
    str | None,
    typer.Option(help="naive, cast_free, and graph, fused, pdl (CUDA) or lean (CPU); default the last."),
]


def _one_sentence(command: Callable) -> Callable:
    """Bad input ends in one sentence and exit code 2; `TRAPETUM_TRACEBACK=1` shows where it came from."""

    @wraps(command)
    def guarded(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, RuntimeError, OSError, TypeError) as error:
            if os.environ.get("TRAPETUM_TRACEBACK"):
                raise
            sentence = (str(error).strip() or repr(error)).splitlines()[0]
            typer.echo(f"trapetum: {sentence}", err=True)
            raise typer.Exit(2) from error

    return guarded


def _command(parent: typer.Typer, example: str, name: str | None = None) -> Callable:
    """Register a command with an example under its help; `name` where the function's is a word of Python."""

    def register(function: Callable) -> Callable:
        guarded = _one_sentence(function)
        return parent.command(name, epilog=f"Example: {example}")(guarded)

    return register


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"trapetum {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


# What this machine is


@_command(app, "trapetum doctor --json")
def doctor(json_output: Json = False) -> None:
    """Say what this machine is, what can and cannot be measured on it, and why."""
    import torch  # noqa: F401  (before the C kernel, so that both share one OpenMP runtime)

    from trapetum import machine

    device = machine.choose_device("auto")
    described, capabilities = machine.describe(device), machine.capabilities()
    if json_output:
        report = {"device": described, "software": machine.software()}
        report["capabilities"] = [c._asdict() for c in capabilities]
        typer.echo(json.dumps(report, indent=1))
        return
    for name, value in described.items():
        typer.echo(f"{name:>15}  {value}")
    typer.echo()
    for capability in capabilities:
        typer.echo(f"{'yes' if capability.available else 'no':>4}  {capability.name}: {capability.why}")


# The report


@_command(app, "trapetum report --profile full --save-records")
def report(
    profile: Profile = "quick",
    device: Device = "auto",
    model: Annotated[str, typer.Option(help="The model that is quantized and evaluated.")] = "builtin",
    only: Annotated[str | None, typer.Option(help="Chapters, e.g. 01,03,07.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take up the last run (or --out).")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    save_records: Annotated[
        bool, typer.Option("--save-records", help="Also append the records to data/records/.")
    ] = False,
) -> None:
    """Execute the notebooks on this machine and bind them into one HTML page."""
    from trapetum import bench, machine
    from trapetum import report as reporting

    bench.sizes(profile, "cpu")  # refuses an unknown profile
    chosen = machine.choose_device(device)
    request = reporting.Request(profile, chosen, model, reporting.choose_chapters(only))
    if resume:
        folder = out or reporting.latest_folder()
    else:
        folder = out or reporting.new_folder(chosen)
        if (folder / "run.json").exists():
            raise reporting.ReportError(
                f"{folder} already holds a run; add --resume or choose another --out."
            )
    failed = reporting.run(request, folder.absolute(), resume, typer.echo)
    if save_records:
        for path in reporting.save_records(folder):
            typer.echo(f"Records appended to {os.path.relpath(path)}")
    typer.echo(f"Report: {os.path.relpath(folder / 'report.html')}")
    if failed:
        typer.echo(f"trapetum: {reporting.failures_as_text(failed)}", err=True)
        raise typer.Exit(1)


# Bench


def _print_records(found: list, json_output: bool, save: Path | None) -> None:
    from trapetum import records

    if save:
        records.append(save, found)
    if json_output:
        typer.echo(json.dumps([json.loads(records.to_json(r)) for r in found], indent=1))
        return
    if not found:
        typer.echo("nothing could be measured; `trapetum doctor` says why.")
        return
    keys = [
        key
        for key in (
            "stage",
            "runtime",
            "model",
            "in_features",
            "out_features",
            "rows",
            "bits",
            "variant",
            "l2",
            "timer",
            "peak",
            "chain",
            "path",
            "outliers",
            "threads",
            "linears",
            "part",
            "window",
            "context",
            "kv",
            "accounting",
            "baseline",
        )
        if any(key in r.config for r in found)
    ]
    header = ["quantity", "method", *keys, "median", "p20", "p80", "n", "GB/s", ""]
    rows = [header, *(_row(record, keys) for record in found)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for reason in sorted({r.why_suspect for r in found if r.suspect}):
        typer.echo(f"suspect: {reason}")
    for refusal in dict.fromkeys(_refusal(r) for r in found if r.quantity == "call_accepted" and not r.value):
        typer.echo(refusal)


def _refusal(record) -> str:
    """What could not be measured, and why, as a sentence."""
    config = record.config
    bits = f"{config['bits']}-bit " if record.method == "codebook" and config.get("bits") else ""
    where = [f"{word} {config[word]}" for word in ("stage", "context", "kv", "rows") if config.get(word)]
    what = ", ".join([bits + record.method, *where])
    return f"not measured: {what}: {config.get('error', 'no reason was recorded')}"


def _row(record, keys: list[str]) -> list[str]:
    from trapetum import records

    def number(value) -> str:
        return "" if value is None else f"{value:.4g}"

    bandwidth = records.implied_gbps(record)
    return [
        record.quantity,
        record.method,
        *(str(record.config.get(key, "")) for key in keys),
        f"{number(record.value)} {record.unit}",
        number(record.p20),
        number(record.p80),
        str(record.n),
        number(bandwidth),
        "suspect" if record.suspect else "",
    ]


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"{text!r} is no shape; write in x out, e.g. 4096x11008.")
    return int(parts[0]), int(parts[1])


Bits = Annotated[list[int] | None, typer.Option(help="Bits of the codebook weights; may be repeated.")]
Methods = Annotated[list[str] | None, typer.Option("--method", help="Only these methods; may be repeated.")]


Shapes = Annotated[
    list[str] | None, typer.Option("--shape", help="IN x OUT, e.g. 4096x11008; may be repeated.")
]
Config = Annotated[
    str | None,
    typer.Option(
        "--config", help="Shapes of a model: a config.json, its directory, a hub id, or a shape's name."
    ),
]


def _shapes(shape: list[str] | None, config: str | None) -> list[tuple[int, int]] | None:
    """The shapes asked for, each once, or None where none is."""
    from trapetum import bench

    asked = [_shape(s) for s in shape or []] + (bench.shapes_of(config) if config else [])
    return list(dict.fromkeys(asked)) or None


def _tell(sentence: str) -> None:
    """About what is left out: not among the results."""
    typer.echo(sentence, err=True)


Outliers = Annotated[
    list[float] | None,
    typer.Option(
        help="Time codes with and without this share of the weights apart in fp16, e.g. 0.0045; may be repeated."
    ),
]


@_command(bench_app, "trapetum bench gemv --shape 4096x4096 --bits 4 --l2 cold")
def gemv(
    shape: Shapes = None,
    config: Config = None,
    bits: Bits = None,
    method: Methods = None,
    l2: Annotated[str, typer.Option(help="cold, warm or both.")] = "both",
    outliers: Outliers = None,
    profile: Profile = "quick",
    device: Device = "auto",
    json_output: Json = False,
    save: Save = None,
) -> None:
    """Time one matrix-vector product in every method, in the same process; on a GPU also in installed peers."""
    from trapetum import bench, machine
    from trapetum.bench import peers, with_outliers

    states = {"both": ("cold", "warm"), "cold": ("cold",), "warm": ("warm",)}
    if l2 not in states:
        raise ValueError(f"--l2 is {l2!r}; choose cold, warm or both.")
    shapes = _shapes(shape, config)
    if outliers:
        method = [*(method or ["codebook"]), *map(with_outliers.method_of, outliers)]
    if not method and machine.choose_device(device) == "cuda":
        for sentence in peers.missing():
            _tell(sentence)
    found = bench.gemv(device, shapes, method, bits, states[l2], profile, _tell)
    _print_records(found, json_output, save)


Rows = Annotated[list[int] | None, typer.Option(help="Rows of x; may be repeated.")]


@_command(bench_app, "trapetum bench batch --shape 4096x4096 --rows 1 --rows 4 --rows 16")
def batch(
    shape: Shapes = None,
    config: Config = None,
    rows: Rows = None,
    bits: Bits = None,
    method: Methods = None,
    profile: Profile = "quick",
    device: Device = "auto",
    json_output: Json = False,
    save: Save = None,
) -> None:
    """Time a few rows at once, and say from how many on it is faster to write the dense weights out."""
    from trapetum import bench, figures

    shapes = _shapes(shape, config)
    found = bench.small_batches(device, shapes, rows, method, bits or (4,), profile, _tell)
    _print_records(found, json_output, save)
    if not json_output:
        for sentence in figures.crossover_sentences(found):
            typer.echo(sentence)


@_command(bench_app, "trapetum bench dequant --shape 4096x4096 --bits 4")
def dequant(
    shape: Shapes = None,
    config: Config = None,
    bits: Bits = None,
    profile: Profile = "quick",
    device: Device = "auto",
    json_output: Json = False,
    save: Save = None,
) -> None:
    """Measure codes to dense weights in GB/s, and dequantize-then-multiply against the fused product."""
    from trapetum import bench

    _print_records(bench.dequant(device, _shapes(shape, config), bits, profile), json_output, save)


@_command(bench_app, "trapetum bench token --model llama-2-7b")
def token(
    model: Annotated[str | None, typer.Option(help="Name of a shape; default by device.")] = None,
    method: Methods = None,
    bits: Bits = None,
    profile: Profile = "quick",
    device: Device = "auto",
    json_output: Json = False,
    save: Save = None,
) -> None:
    """Time all matrix-vector products of one token in a row, every weight distinct."""
    from trapetum import bench

    _print_records(bench.gemv_chain(device, model, method, bits, profile), json_output, save)


@_command(bench_app, "trapetum bench crosscheck --shape 4096x4096")
def crosscheck(
    shape: Annotated[str, typer.Option(help="IN x OUT.")] = "4096x4096",
    profile: Profile = "quick",
    device: Device = "auto",
    json_output: Json = False,
    save: Save = None,
) -> None:
    """Compare our timing of one product with Triton's do_bench and do_bench_cudagraph, and explain the difference."""
    from trapetum import bench
    from trapetum.bench.crosscheck import explain

    found = bench.compare_timers(device, _shape(shape), profile=profile)
    _print_records(found, json_output, save)
    if not json_output:
        for sentence in explain(found):
            typer.echo(sentence)


@_command(bench_app, "trapetum bench profile --shape 8192x28672 --bits 4")
def profile(
    shape: Annotated[str, typer.Option(help="IN x OUT.")] = "8192x28672",
    bits: Annotated[int, typer.Option(help="Bits of the codebook weights.")] = 4,
    profile: Profile = "quick",
    device: Device = "auto",
    json_output: Json = False,
    save: Save = None,
) -> None:
    """Read the counters of one product with Nsight Compute: DRAM, issue slots, shared memory and its conflicts."""
    from trapetum import bench
    from trapetum.bench.profiled import explain

    found = bench.profile_kernel(device, _shape(shape), bits, profile)
    _print_records(found, json_output, save)
    if not json_output:
        for sentence in explain(found):
            typer.echo(sentence)


@_command(bench_app, "trapetum bench ladder --shape 4096x4096 --rung d_mixed_sums --rung f_pdl")
def ladder(
    shape: Shapes = None,
    rung: Annotated[list[str] | None, typer.Option(help="Only these rungs; may be repeated.")] = None,
    profile: Profile = "quick",
    device: Device = "auto",
    json_output: Json = False,
    save: Save = None,
) -> None:
    """Time the numbered GPU kernels, dead ends too, and count their instructions per weight."""
    from trapetum import bench, disassembly

    shapes = [_shape(s) for s in shape] if shape else None
    found = bench.ladder(device, shapes, rung, profile)
    _print_records(found, json_output, save)
    if disassembly.why_not():
        _tell(f"No instructions per weight: {disassembly.why_not()}")


@_command(bench_app, "trapetum bench bandwidth --device cpu")
def bandwidth(
    profile: Profile = "quick", device: Device = "auto", json_output: Json = False, save: Save = None
) -> None:
    """Measure the read bandwidth: the roof that every decode kernel stands under."""
    from trapetum import bench

    _print_records(bench.bandwidth(device, profile), json_output, save)


Stages = Annotated[list[str] | None, typer.Option("--stage", help="Only these stages; may be repeated.")]
DecodeModel = Annotated[str | None, typer.Option("--model", help="As for generate; default by device.")]
LmHead = Annotated[bool, typer.Option("--lm-head", help="Codes in the output head too.")]
Kv = Annotated[str, typer.Option(help="The cache: fp16 (as the activations), int8 or int4.")]
DraftRows = Annotated[int, typer.Option(min=1, help="Tokens verified at once; above 1 with drafts.")]


def _alone(option: str, **others) -> None:
    """Refuse options that mean nothing beside `option`; `others` are those that were given."""
    given = [f"--{name.replace('_', '-')}" for name, value in others.items() if value]
    if given:
        raise ValueError(f"{option} does not take {', '.join(given)}; leave that out.")


@_command(bench_app, "trapetum bench decode --model random:llama-2-7b --stage pdl")
def decode(
    model: DecodeModel = None,
    stage: Stages = None,
    method: Methods = None,
    bits: Bits = None,
    new_tokens: Annotated[int | None, typer.Option("-n", min=2, help="Tokens a run.")] = None,
    lm_head: LmHead = False,
    kv: Kv = "fp16",
    rows: DraftRows = 1,
    peers: Annotated[
        bool, typer.Option("--peers", help="Other people's code instead: transformers, tinygemm, torchao.")
    ] = False,
    peer: Annotated[list[str] | None, typer.Option(help="Only these peers; may be repeated.")] = None,
    interleaved: Annotated[
        bool, typer.Option("--interleaved", help="On the CPU, in turns with transformers.")
    ] = False,
    profile: Profile = "quick",
    device: Device = "auto",
    json_output: Json = False,
    save: Save = None,
) -> None:
    """Measure decode speed and memory, each method at each stage; or peers; or in turns with transformers."""
    from trapetum import bench

    peers, other = (
        peers or bool(peer),
        {"stage": stage, "method": method, "kv": kv != "fp16", "rows": rows != 1},
    )
    if peers:
        _alone("--peers", interleaved=interleaved, bits=bits, lm_head=lm_head, **other)
        found = bench.decode_peers(model, device, profile, new_tokens, peer)
    elif interleaved:
        _alone("--interleaved", device=device == "cuda", **other)
        found = bench.decode_interleaved(model, profile, new_tokens, bits=_one(bits), lm_head=lm_head)
    else:
        found = bench.decode(
            model, device, stage, profile, new_tokens, method, bits or (4,), lm_head, kv, rows
        )
    _print_records(found, json_output, save)


def _one(bits: list[int] | None) -> int:
    """The one number of bits asked for."""
    if bits and len(bits) > 1:
        raise ValueError(f"give --bits once, not {len(bits)} times.")
    return bits[0] if bits else 4


@_command(bench_app, "trapetum bench standalone --model random:llama-2-7b --profile full")
def standalone(
    model: DecodeModel = None,
    bits: Annotated[int, typer.Option(help="Bits of the codebook weights.")] = 4,
    new_tokens: Annotated[int | None, typer.Option("-n", min=2, help="Tokens of each turn.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of each; default by profile.")] = None,
    kv: Kv = "fp16",
    keep: Annotated[Path | None, typer.Option(help="A new directory to keep the export in.")] = None,
    profile: Profile = "quick",
    json_output: Json = False,
    save: Save = None,
) -> None:
    """Decode on the GPU with the Python engine and with the exported C++ program, in turns."""
    from trapetum import bench

    found = bench.compare_runtimes(model, profile, new_tokens, bits, rounds, kv, keep)
    _print_records(found, json_output, save)


@_command(bench_app, "trapetum bench context --model random:llama-2-7b --context 4096 --kv int8")
def context(
    model: DecodeModel = None,
    context: Annotated[
        list[int] | None, typer.Option(help="Cached tokens; may be repeated. Default by profile.")
    ] = None,
    kv: Annotated[
        list[str] | None, typer.Option(help="The cache: fp16, int8, int4; may be repeated.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="The stage; default the device's last.")] = None,
    method: Methods = None,
    bits: Bits = None,
    lm_head: LmHead = False,
    profile: Profile = "quick",
    device: Device = "auto",
    json_output: Json = False,
    save: Save = None,
) -> None:
    """Measure decode speed and memory against the length of the context, with the cache in 16, 8 or 4 bits."""
    from trapetum import bench

    found = bench.context(model, device, stage, profile, context, kv, method, bits or (4,), lm_head)
    _print_records(found, json_output, save)


@_command(bench_app, "trapetum bench agreement --model builtin --stage lean")
def agreement(
    model: Annotated[str, typer.Option(help="As for generate.")] = "builtin",
    stage: Stages = None,
    method: Methods = None,
    bits: Bits = None,
    lm_head: LmHead = False,
    kv: Kv = "fp16",
    prompts: Annotated[int | None, typer.Option(min=1, help="How many prompts; default by profile.")] = None,
    new_tokens: Annotated[int, typer.Option("-n", min=2, help="Tokens a prompt.")] = 16,
    profile: Profile = "quick",
    device: Device = "auto",
    json_output: Json = False,
    save: Save = None,
) -> None:
    """Compare each stage's greedy tokens and logits with transformers' on the same weights."""
    from trapetum import bench

    found = bench.agreement(
        model, device, stage, profile, method, bits or (4,), lm_head, kv, prompts, new_tokens
    )
    _print_records(found, json_output, save)


LADDER = ("rtn", "rtn-128", "nf4", "lloyd", "kmeans", "kmeans-weighted", "awq", "rotation", "gptq-codebook", "lnq") + (
    "lnq-guided", "kmeans+sparse", "lnq-guided+sparse", "additive"
)  # fmt: skip


@_command(bench_app, "trapetum bench accuracy --method kmeans --method lnq-guided --bits 4 --stress")
def accuracy(
    model: Annotated[
        str, typer.Option(help="builtin, a hub id or a directory; it needs a tokenizer.")
    ] = "builtin",
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", help="May be repeated; METHOD+sparse keeps outliers apart. Default: the ladder."
        ),
    ] = None,
    bits: Bits = None,
    text: Annotated[str, typer.Option(help="What is scored: a file, a dataset, or builtin.")] = "builtin",
    calibrate: Annotated[
        str | None, typer.Option(help="Text to calibrate on; default other documents than the scored ones.")
    ] = None,
    stress: Annotated[
        bool, typer.Option("--stress", help="Fold outlier channels into the weights first.")
    ] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Calibrations of each method.")] = None,
    window: Annotated[int | None, typer.Option(min=2, help="Tokens a forward pass sees.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens between windows.")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of the text.")] = None,
    profile: Profile = "quick",
    device: Device = "auto",
    json_output: Json = False,
    save: Save = None,
) -> None:
    """Score every method of the accuracy ladder on one model: perplexity, divergence, errors, bits a weight.

    Records are saved rung by rung, so that a run that is stopped keeps what it has.
    """
    from trapetum import bench, records

    found: list = []
    steps = bench.accuracy_by_rung(
        model,
        device,
        method or LADDER,
        bits or (4, 3, 2),
        profile,
        text,
        stress,
        seeds,
        window,
        stride,
        tokens,
        calibrate,
    )
    for rows in steps:
        found += rows
        if save:
            records.append(save, rows)
        score = next(r for r in rows if r.quantity == "perplexity")
        _tell(f"{score.method}, {score.config['bits']} bits: perplexity {score.value:.4f}")
    _print_records(found, json_output, None)


@_command(bench_app, "trapetum bench quantize --method lnq-guided --profile full", name="quantize")
def quantizing(
    model: Annotated[str, typer.Option(help="As for generate.")] = "random:llama-2-7b",
    method: Annotated[
        list[str] | None, typer.Option("--method", help="May be repeated. Default: kmeans and lnq-guided.")
    ] = None,
    bits: Bits = None,
    profile: Profile = "quick",
    device: Device = "auto",
    json_output: Json = False,
    save: Save = None,
) -> None:
    """Time how long it takes to quantize a whole model, by phase; methods that need data are shown random tokens."""
    from trapetum import bench

    chosen = method or ("kmeans", "lnq-guided")
    found = bench.quantizing_time(model, device, chosen, bits or (4,), profile)
    _print_records(found, json_output, save)


@_command(bench_app, "trapetum bench breakdown --model random:llama-2-7b --stage graph")
def breakdown(
    model: DecodeModel = None,
    stage: Stages = None,
    method: Methods = None,
    bits: Bits = None,
    new_tokens: Annotated[
        int | None, typer.Option("-n", min=2, help="Tokens of the decode to take apart.")
    ] = None,
    lm_head: LmHead = False,
    kv: Kv = "fp16",
    profile: Profile = "quick",
    device: Device = "auto",
    json_output: Json = False,
    save: Save = None,
) -> None:
    """Take a token's time apart by leaving out its parts, and build the bridge from the first run to the last."""
    from trapetum import bench, waterfall

    found = bench.breakdown(model, device, stage, profile, method, bits or (4,), lm_head, kv, new_tokens)
    _print_records(found, json_output, save)
    taken_apart = waterfall.runs(found)
    if not json_output and len(taken_apart) > 1:
        for step in waterfall.compare(taken_apart[0], taken_apart[-1]):
            typer.echo(f"{step.us:>+12.1f} us  {step.label} ({step.kind})")


@_command(bench_app, "trapetum bench energy --model random:llama-2-7b --stage graph --profile full")
def energy(
    model: DecodeModel = None,
    stage: Stages = None,
    method: Methods = None,
    bits: Bits = None,
    lm_head: LmHead = False,
    kv: Kv = "fp16",
    profile: Profile = "quick",
    device: Device = "auto",
    json_output: Json = False,
    save: Save = None,
) -> None:
    """Measure the energy of a token, gross and net of idle with the weights resident."""
    from trapetum import bench, machine
    from trapetum.energy import EnergyMeter

    meter = EnergyMeter(machine.choose_device(device))
    if not meter.available:
        raise RuntimeError(f"energy cannot be measured here: {meter.why_not}")
    found = bench.energy(model, device, stage, profile, method, bits or (4,), lm_head, kv)
    _print_records(found, json_output, save)


# Tuning


@_command(app, "trapetum tune --shape 4096x4096 --bits 4 --rows 1")
def tune(
    shape: Annotated[
        list[str] | None, typer.Option(help="IN x OUT, e.g. 4096x11008; may be repeated.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="All matrices of a model shape, e.g. llama-2-7b.")] = None,
    bits: Bits = None,
    rows: Annotated[list[int] | None, typer.Option(help="Rows of x; may be repeated.")] = None,
    json_output: Json = False,
) -> None:
    """Find the fastest launch shape of each product on this GPU and keep it for later runs."""
    from trapetum import shapes, tuning

    wanted = [_shape(s) for s in shape or ()]
    if model:
        wanted += tuning.shapes_of(shapes.model(model))
    say = (lambda line: None) if json_output else typer.echo
    found = tuning.tune_cuda(wanted or shapes.GEMV_SHAPES, bits or (4,), rows or (1,), say)
    if json_output:
        typer.echo(json.dumps([asdict(tuned) for tuned in found], indent=1))


# Models


@_command(app, "trapetum quantize builtin out/builtin-4bit --bits 4 --calibrate builtin")
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="A new directory for the quantized model.")],
    bits: Annotated[int, typer.Option(help="8, 4, 3 or 2.")] = 4,
    method: Annotated[
        str | None,
        typer.Option(
            help="rtn, nf4, lloyd, kmeans (the default), rotation, additive; with data kmeans-weighted, awq, "
            "gptq-codebook, lnq, lnq-guided (the default with --calibrate)."
        ),
    ] = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Quantize the output head too.")] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="Text to calibrate on: a file, builtin, wikitext-2 or a hub dataset (of these the training part)."
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Windows of the text, at most.")] = 128,
    length: Annotated[
        int, typer.Option(min=2, help="Tokens of a window; at most the model's context.")
    ] = 2048,
    seed: Annotated[int, typer.Option(help="Of the windows, and of rotations.")] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            help="Take up a run that was interrupted (its layers are in OUT.partial), or start over."
        ),
    ] = True,
    outliers: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Share of the weights kept apart in fp16, e.g. 0.0045.")
    ] = 0.0,
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Quantize a model to codebooks and save it as safetensors that transformers can load.

    Without --calibrate the weights are quantized as they are read, so that the dense model is never in memory. With it the
    model is loaded dense and quantized layer by layer; under torchrun the processes share the layers.
    """
    from trapetum import machine
    from trapetum.quantize_job import Job, processes, quantize_to

    method = method or ("lnq-guided" if calibrate else "kmeans")
    device = machine.choose_device(device)
    job = Job(bits, method, lm_head, calibrate, sequences, length, seed, resume, outliers)
    with processes(device) as first:
        say = typer.echo if first and not json_output else lambda _: None
        done, folder = quantize_to(model, out, job, device, say, not json_output)
    if not first:
        return
    if json_output:
        typer.echo(json.dumps(asdict(done) | {"out": str(folder)}, indent=1))
        return
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    typer.echo(f"{len(done.errors)} layers, {bits} bits, {method}: {done.seconds:.1f} s")
    typer.echo(f"mean relative squared weight error {done.mean_error:.3e}")
    if done.mean_output_error is not None:
        typer.echo(f"mean relative squared output error {done.mean_output_error:.3e}")
    typer.echo(f"{folder}: {size / 1e6:.2f} MB of safetensors")


@_command(app, "trapetum import Llama-2-7B-GPTQ out/llama-2-7b-gptq", "import")
def import_(
    directory: Annotated[
        Path, typer.Argument(help="A GPTQ, AWQ or AQLM checkpoint: config.json, safetensors.")
    ],
    out: Annotated[Path, typer.Argument(help="A new directory for the converted model.")],
    json_output: Json = False,
) -> None:
    """Convert a GPTQ, AWQ or AQLM checkpoint to codebooks exactly, or say why it cannot be and what to do.

    GPTQ (2, 3, 4, 8 bits) and AWQ (4 bits) need one scale and zero point per output channel (group_size -1); scales for groups
    of inputs are refused, since a codebook belongs to a whole channel. AQLM is read with 2x8 and 4x8 codebooks.
    """
    from trapetum import imports

    done = imports.import_model(directory, out, progress=not json_output)
    if json_output:
        typer.echo(json.dumps(asdict(done) | {"folder": str(done.folder)}, indent=1))
        return
    typer.echo(f"{done.layers} layers of {done.bits} bits, as they were in {done.method}")
    typer.echo(f"{done.folder}: {done.nbytes / 1e6:.2f} MB of safetensors")


@_command(app, 'trapetum generate builtin --prompt "Return a" -n 60')
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "Return a",
    new_tokens: Annotated[int, typer.Option("-n", min=2, help="Tokens to make.")] = 64,
    stage: Stage = None,
    bits: Annotated[int | None, typer.Option(help="Quantize to so many bits first.")] = None,
    kv: Kv = "fp16",
    rows: DraftRows = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; above, tokens are drawn.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Generate, streaming the text; then say tok/s, GB/s and J/token."""
    from trapetum import generation

    say = (lambda piece: None) if json_output else _write_piece
    how = generation.How(stage, kv, rows, temperature, seed)
    result = generation.run(model, prompt, new_tokens, how, bits, device, say)
    if json_output:
        typer.echo(json.dumps(asdict(result), indent=1))
        return
    typer.echo("\n")
    typer.echo(generation.describe(result))


@_command(app, "trapetum export random:llama-2-7b out/7b --bits 4")
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="A new directory.")],
    bits: Annotated[int | None, typer.Option(help="Quantize to so many bits first.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of prompt and answer together.")] = 1024,
    kv: Kv = "fp16",
    tokens_a_graph: Annotated[
        int, typer.Option(min=1, max=64, help="Tokens that the program captures into one CUDA graph.")
    ] = 8,
) -> None:
    """Write a model's decode step as cubins, launches and weights, and a C++ program that decodes from them."""
    from trapetum import export as exporting

    folder = exporting.export_model(model, out, bits, context, kv, tokens_a_graph)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    typer.echo(f"{folder}: {size / 1e6:.1f} MB")
    if exporting.cxx_compiler() is None:
        typer.echo("no C++ compiler was found; kernels/standalone/README.md says how to build the program.")
        return
    program = exporting.build_standalone(folder)
    typer.echo(f"decode with: {program} {folder} -n 64 1 2 3   (the prompt as token ids)")


def _write_piece(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


@_command(app, "trapetum perplexity builtin")
def perplexity(
    model: Model = "builtin",
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A dataset, e.g. wikitext-2.")] = None,
    window: Annotated[int, typer.Option(help="Tokens a forward pass sees.")] = 512,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; default half a window.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Use only so many tokens.")] = None,
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Measure perplexity, and say over which window, stride and tokens."""
    from trapetum import generation, machine, models
    from trapetum.perplexity import perplexity as measure
    from trapetum.text import load_text

    if text and dataset:
        raise ValueError("give --text or --dataset, not both.")
    loaded = models.load(model, machine.choose_device(device))
    content = load_text(str(text) if text else dataset or "builtin")
    ids = generation.encode(loaded, content)
    began = time.perf_counter()
    found = measure(loaded.model, ids, window, stride or max(1, window // 2), max_tokens)
    if json_output:
        typer.echo(json.dumps(asdict(found), indent=1))
        return
    low, high = found.interval
    typer.echo(f"perplexity {found.value:.4f} (95 % interval {low:.4f} to {high:.4f})")
    typer.echo(
        f"window {found.window}, stride {found.stride}, {found.tokens} tokens scored, {time.perf_counter() - began:.1f} s"
    )


@_command(app, "trapetum verify")
def verify(json_output: Json = False) -> None:
    """Check that every number cited in the README and the notebooks is a record's, and not a stale one's."""
    from trapetum import verify as checking

    citations, problems = checking.verify()
    if json_output:
        typer.echo(json.dumps({"citations": len(citations), "problems": problems}, indent=1))
    else:
        for problem in problems:
            typer.echo(problem, err=True)
        typer.echo(f"{len(citations)} cited numbers, {len(problems)} problems")
    if problems:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the `trapetum` command."""
    app()
