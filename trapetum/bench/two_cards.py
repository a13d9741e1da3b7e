"""Decode with a 16-bit model that is split over cards: the baseline of a model that does not fit one.

    torchrun --nproc-per-node 2 -m trapetum.bench.two_cards --model random:llama-2-70b --new-tokens 128 --save FILE
    python -m trapetum.bench.two_cards --model random:llama-2-70b        starts its processes itself

Every process runs the same decode; the first one measures and makes the records.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from trapetum import records, timing
from trapetum.bench.generating import random_prompt, refuser, speed_samples, window_samples
from trapetum.bench.profiles import PROFILES, Sizes, sizes
from trapetum.bench.reading import cold_read_gbps
from trapetum.bench.recording import Recorder
from trapetum.bench.variants import NAMES, Variant, forget
from trapetum.decode import Generation
from trapetum.records import Record
from trapetum.tensor_parallel import (
    Cards,
    SplitEngine,
    SplitError,
    card_estimate,
    joined,
    load_split,
    require_splittable,
)

MODEL = "random:llama-2-70b"


# --- one process -----------------------------------------------------------------------------------------------------


def measure(
    cards: Cards, model_name: str = MODEL, new_tokens: int | None = None, profile: str = "quick"
) -> list[Record]:
    """Decode at batch 1 with a model that these cards share; every process calls it alike.

    Args:
        cards: the group that this process is in.
        model_name: "random:" and a shape.
        new_tokens: decode steps of a run; None for the profile's.
        profile: "smoke", "quick" or "full": prompt, number of runs.

    Returns:
        in the first process `decode_speed`, `window_speed` (tok/s), `time_to_first_token` (s) and `decode_memory` (GB of the
        fullest card). `config.world_size` is the number of cards; `config.bytes` those that one card moves for a token, so
        that the gate compares with one card's bandwidth; `config.stage` "graph", or "eager" with the reason in
        `config.why_eager`. What does not fit or cannot be split is a `call_accepted` of 0 with the reason in `config.error`. In
        the others nothing.
    """
    device = "cpu" if cards.device == "cpu" else "cuda"
    size = sizes(profile, device)
    recorder = Recorder(device, profile) if cards.rank == 0 else None
    if recorder:
        recorder.cold_read_gbps = cold_read_gbps(recorder)
        forget()  # the buffer of that read
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    prompt, tokens = size.prompt_tokens, new_tokens or size.new_tokens
    engine, variant, why = _prepared(cards, model_name, prompt + tokens + 1)
    if not cards.all_say(not why):
        if recorder:
            config = {
                "model": model_name,
                "world_size": cards.size,
                "linears": "dense",
                "bits": _bits(device),
            }
            refuser(recorder)(_method(device), config, why)
        return recorder.close() if recorder else []
    generations = _generations(engine, random_prompt(variant, prompt), tokens, size)
    peak_gb = cards.largest(_peak_bytes(variant) / 1e9)
    if recorder:
        config = _config(recorder, cards, variant, engine, prompt, tokens)
        _add(recorder, variant.method, config, generations, peak_gb)
    return recorder.close() if recorder else []


def _method(device: str) -> str:
    return "fp32" if device == "cpu" else "fp16"


def _bits(device: str) -> int:
    return 32 if device == "cpu" else 16


def _prepared(cards: Cards, name: str, context: int) -> tuple[SplitEngine | None, Variant | None, str]:
    """This card's engine and model, or why no card has one: all agree before anything is made, so that none waits."""
    why = _problem(cards, name, context)
    if not cards.all_say(not why):
        return None, None, why or "another card has no room for its part."
    loaded = load_split(name, cards)
    dtype = NAMES[loaded.model.get_input_embeddings().weight.dtype]
    config = {"model": name, "bits": torch.finfo(loaded.model.dtype).bits, "linears": "dense", "dtype": dtype}
    return SplitEngine(loaded, cards, context), Variant(dtype, loaded, config), ""


def _problem(cards: Cards, name: str, context: int) -> str:
    """Why this card cannot hold its part, as a sentence, or ""."""
    try:
        shape = require_splittable(name, cards.size)
    except SplitError as error:
        return str(error)
    if cards.device == "cpu":  # where it is only tried out
        return ""
    need, free = sum(card_estimate(shape, context, cards.size).values()), timing.free_bytes("cuda")
    if need <= free:
        return ""
    return f"{name} in 16 bits takes {need / 1e9:.1f} GB on each of {cards.size} cards, and {free / 1e9:.1f} GB are free."


def _generations(engine: SplitEngine, prompt: list[int], tokens: int, size: Sizes) -> list[Generation]:
    engine.generate(prompt, tokens + 1)  # captures, and sets libraries up
    return [engine.generate(prompt, tokens + 1) for _ in range(size.runs)]


def _peak_bytes(variant: Variant) -> int:
    on_gpu = variant.loaded.model.device.type == "cuda"
    return torch.cuda.max_memory_allocated() if on_gpu else variant.token_weight_bytes


def _config(
    recorder: Recorder, cards: Cards, variant: Variant, engine: SplitEngine, prompt: int, tokens: int
) -> dict:
    """What the records say, for the mean context of the decode."""
    shape, context = variant.loaded.shape, prompt + tokens / 2
    cache = shape.kv_bytes(context, variant.config["bits"] // 8) / cards.size
    stage = "eager" if engine.stage == "graph" and engine.why_eager else engine.stage
    config = {
        **variant.config,
        "world_size": cards.size,
        "split": "tensor parallel",
        "stage": stage,
        "context": context,
        "new_tokens": tokens,
        "prompt_tokens": prompt,
        "bytes": int(variant.token_weight_bytes + cache),
        "read_gbps": recorder.cold_read_gbps,
    }
    if recorder.device == "cuda":
        parts = card_estimate(shape, prompt + tokens + 1, cards.size, prompt)
        config["estimate_gb"] = sum(parts.values()) / 1e9
    return config | ({"why_eager": engine.why_eager} if stage == "eager" else {})


def _add(
    recorder: Recorder, method: str, config: dict, generations: Sequence[Generation], peak_gb: float
) -> None:
    recorder.add("decode_speed", speed_samples(generations), method, config)
    for window, samples in window_samples(generations).items():
        recorder.add("window_speed", samples, method, {**config, "window": window})
    recorder.add("time_to_first_token", [g.ttft_s for g in generations], method, config)
    source = (
        "largest torch.cuda.max_memory_allocated"
        if recorder.device == "cuda"
        else "bytes of a part's weights"
    )
    recorder.add("decode_memory", [peak_gb], method, config, source=source)


# --- all processes ---------------------------------------------------------------------------------------------------


def two_cards(
    model_name: str = MODEL,
    new_tokens: int | None = None,
    profile: str = "quick",
    cards: int = 2,
    device: str = "auto",
) -> list[Record]:
    """Start a process a card and let them `measure`.

    Args:
        model_name, new_tokens, profile: as for `measure`.
        cards: how many share the model.
        device: "auto", "cpu" (gloo, to try it out) or "cuda" (NCCL).

    Returns:
        the first process' records; a `call_accepted` of 0 where there are fewer cards.
    """
    recorder = Recorder(device, profile)
    if recorder.device == "cuda" and torch.cuda.device_count() < cards:
        error = f"{cards} cards were asked for, and this machine has {torch.cuda.device_count()}."
        config = {"model": model_name, "world_size": cards, "linears": "dense", "bits": _bits("cuda")}
        refuser(recorder)(_method("cuda"), config, error)
        return recorder.close()
    with tempfile.TemporaryDirectory() as folder:
        arguments = cards, recorder.device, folder, model_name, new_tokens, profile
        torch.multiprocessing.spawn(_process, arguments, nprocs=cards)
        return records.load(Path(folder, "made.jsonl")).records


def _process(
    rank: int, size: int, device: str, folder: str, name: str, new_tokens: int | None, profile: str
) -> None:
    if device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    with joined(rank, size, device, f"file://{folder}/meet") as cards:
        records.append(Path(folder, "made.jsonl"), measure(cards, name, new_tokens, profile))


# --- the command -----------------------------------------------------------------------------------------------------


def _under_torchrun(options: argparse.Namespace) -> list[Record]:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = Recorder(options.device, options.profile).device
    with joined(rank, size, device) as cards:
        return measure(cards, options.model, options.new_tokens, options.profile)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print, from the command line (also as each process of `torchrun`).

    Args:
        arguments: of the command; None for those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trapetum.bench.two_cards", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", default=MODEL, help="random: and a shape")
    parser.add_argument("--new-tokens", type=int, help="decode steps of a run")
    parser.add_argument("--profile", default="quick", choices=PROFILES)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--cards", type=int, default=2, help="processes to start (torchrun says it itself)")
    parser.add_argument("--save", type=Path, help="append the records to this file")
    options = parser.parse_args(arguments)
    if "RANK" in os.environ:
        rows = _under_torchrun(options)
    else:
        rows = two_cards(options.model, options.new_tokens, options.profile, options.cards, options.device)
    for row in rows:
        print(f"{row.quantity}: {row.config.get('error') or f'{row.value:.4g} {row.unit}'}")
    if options.save:
        records.append(options.save, rows)


if __name__ == "__main__":
    main()
