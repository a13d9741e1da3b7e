"""Speed and memory of a decode against the length of its context, with the cache in 16, 8 or 4 bits."""

from collections.abc import Sequence

import torch

from trapetum import timing
from trapetum.bench.generating import NOT_POSSIBLE, add_memory, engine_options, kernel_sha, refuser
from trapetum.bench.reading import cold_read_gbps
from trapetum.bench.recording import Recorder
from trapetum.bench.variants import Variant, default_methods, forget, variants
from trapetum.decode import Engine
from trapetum.decode import stages as stages_of
from trapetum.records import Record

STEPS = 32  # timed at each context: whole launches of several tokens
KV = ("fp16", "int8", "int4")
_ROOM = 1.05  # scratch of the step beside weights and cache


def context(
    model_name: str | None = None,
    device: str = "auto",
    stage: str | None = None,
    profile: str = "quick",
    contexts: Sequence[int] | None = None,
    kvs: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    bits: Sequence[int] = (4,),
    lm_head: bool = False,
) -> list[Record]:
    """Time decode steps at long contexts without filling the cache first: its contents do not change the time.

    Args:
        model_name: as for `models.load`; None for the profile's random shape. Random weights take any context.
        device: "auto", "cpu" or "cuda".
        stage: None for the device's last.
        profile: "smoke", "quick" or "full".
        contexts: cached tokens at the last timed step; None for the profile's.
        kvs: how the cache is kept: "fp16" (as the activations), "int8", "int4"; None for all on a GPU, the first on a CPU.
        methods, bits, lm_head: as for `decode`.

    Returns:
        `context_speed` (tok/s; `config.context`, `config.kv`, `config.bytes` of one token there) and `decode_memory` (GB,
        beside `config.estimate_gb`; on a GPU less what the process held before the model) records. A context that does not
        fit the free memory or the model's own limit is a `call_accepted` of 0 with the reason, the estimate and the
        free bytes in config.
    """
    recorder = Recorder(device, profile)
    recorder.cold_read_gbps = cold_read_gbps(recorder)
    name = model_name or recorder.sizes.model
    names = methods or default_methods(recorder.device, name, profile)
    stage = stage or stages_of(recorder.device)[-1]
    lengths = contexts or recorder.sizes.contexts
    _require_room_for_steps(lengths)
    held = _held(recorder.device)
    for variant in variants(name, recorder.device, names, bits, lm_head, refuser(recorder)):
        if (
            variant.loaded.kind == "random"
        ):  # the shape has a limit only where a checkpoint was trained with one
            config = variant.loaded.model.config
            config.max_position_embeddings = max(config.max_position_embeddings, *lengths)
        for kv in kvs or (KV if recorder.device == "cuda" else KV[:1]):
            for length in lengths:
                _at(recorder, variant, stage, length, kv, held)
        del variant  # before the next one is loaded
    return recorder.close()


def _require_room_for_steps(lengths: Sequence[int]) -> None:
    if min(lengths) <= STEPS:
        raise ValueError(
            f"a context of {min(lengths)} tokens has no room for the {STEPS} timed steps; choose more than {STEPS}."
        )


def _at(recorder: Recorder, variant: Variant, stage: str, length: int, kv: str, held: int) -> None:
    config = {
        **variant.config,
        "stage": stage,
        "context": length,
        "kv": variant.kv_name(kv),
        "new_tokens": STEPS,
        "read_gbps": recorder.cold_read_gbps,
        "estimate_gb": variant.estimate_bytes(length, kv) / 1e9,
    }
    refusal = _no_room(variant, length, kv, recorder.device) or _beyond_limit(variant, length)
    if refusal:
        refuser(recorder)(variant.method, config | {"free_bytes": _free(recorder.device)}, refusal)
        return
    try:
        _measure(recorder, variant, config, kv, held)
    except NOT_POSSIBLE as error:
        refuser(recorder)(variant.method, config | {"free_bytes": _free(recorder.device)}, error)


def _free(device: str) -> int:
    forget()
    return timing.free_bytes(device)


def _held(device: str) -> int:
    """Bytes of the GPU that other code of the process has, live engines and the workspaces of libraries among them."""
    forget()
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _no_room(variant: Variant, length: int, kv: str, device: str) -> str:
    """The sentence that says a cache of `length` tokens does not fit, or "" if it does."""
    whole, free = variant.estimate_bytes(length, kv), _free(device)
    need = whole - variant.estimate_bytes(1, kv)  # the weights are there already
    if _ROOM * need <= free:
        return ""
    return (
        f"{length} tokens take an estimated {whole / 1e9:.1f} GB, {need / 1e9:.1f} GB of it for the {kv} cache, and "
        f"{free / 1e9:.1f} GB are free on {device}."
    )


def _beyond_limit(variant: Variant, length: int) -> str:
    limit = variant.loaded.model.config.max_position_embeddings
    return "" if length <= limit else f"{length} tokens are beyond the model's own limit of {limit}."


def _measure(recorder: Recorder, variant: Variant, config: dict, kv: str, held: int) -> None:
    length = config["context"]
    if recorder.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    engine = Engine(variant.loaded, config["stage"], max_context=length, **engine_options(kv))
    config["bytes"] = variant.token_bytes(
        length - STEPS / 2, kv
    )  # once the codes lie as the kernel reads them
    start = length - STEPS  # so that no step reads beyond the context in the name
    engine.step_times(start, STEPS)
    runs = [engine.step_times(start, STEPS) for _ in range(max(3, recorder.sizes.runs))]
    sha = kernel_sha(recorder, variant)
    speeds = [len(times) / sum(times) for times in runs]
    recorder.add("context_speed", speeds, variant.method, config, kernel_sha256=sha)
    if recorder.device == "cpu":
        add_memory(recorder, variant, config)
    else:
        _add_peak(recorder, variant, config, torch.cuda.max_memory_allocated(), held)


def _add_peak(recorder: Recorder, variant: Variant, config: dict, peak: int, held: int) -> None:
    source = f"torch.cuda.max_memory_allocated, less {held / 1e9:.3f} GB that were allocated before the model"
    sha = kernel_sha(recorder, variant)
    recorder.add(
        "decode_memory", [(peak - held) / 1e9], variant.method, config, source=source, kernel_sha256=sha
    )
