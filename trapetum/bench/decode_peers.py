"""Whole decodes by others, in this process: transformers, the own engine with PyTorch's int4 weights, torchao.

Same prompt, same number of tokens, same records as `trapetum.bench.generating.decode`. One model is in memory at a time.
A peer that cannot run here ends as a `call_accepted` record of 0 whose `config.error` says why, and never as an exception.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata

import torch

from trapetum import models, swap, timing
from trapetum.bench import torchao_models
from trapetum.bench.generating import FEWEST_TOKENS, WARM_UP_TOKENS, WINDOW, speed_samples, window_samples
from trapetum.bench.peers import plain, reason
from trapetum.bench.products import NotPossible
from trapetum.bench.reading import cold_read_gbps
from trapetum.bench.recording import Recorder
from trapetum.bench.transformers_decoding import TransformersDecoder
from trapetum.checkpoint import ModelError
from trapetum.decode import Engine, Generation
from trapetum.llama_step import activation_dtype
from trapetum.models import DTYPES, Loaded
from trapetum.records import Record
from trapetum.tinygemm import best_group, tinygemm_model

EAGER, COMPILED, TINYGEMM = "transformers-eager", "transformers-compiled", "tinygemm-int4"
PEERS = (EAGER, COMPILED, TINYGEMM, *torchao_models.WAYS)
_OWN_STAGE = {"cuda": "graph", "cpu": "lean"}  # the last one whose products are PyTorch operators
_COMPILE_TOKENS = 8  # a captured step is run, recorded and then replayed: the clock must see the third only
CPU_DTYPES = ("fp32", "bf16", "fp16")

Generate = Callable[[Sequence[int], int], Generation]


@dataclass
class Contender:
    """A model ready to decode, whoever wrote the loop.

    Attributes:
        method: the peer's name in records.
        loaded: the model.
        config: what a record's config says of it.
        start: `start(max_context)` gives `generate(prompt_ids, new_tokens)`.
        close: gives back what `start` holds besides memory that Python frees.
        warm_up: tokens before the first one that is timed.
    """

    method: str
    loaded: Loaded
    config: dict
    start: Callable[[int], Generate]
    close: Callable[[], None] = field(default=lambda: None)
    warm_up: int = WARM_UP_TOKENS

    @property
    def weight_bytes(self) -> int:
        """Bytes of all distinct weights, also those that a peer's tensor class wraps, and codes."""
        model = self.loaded.model
        tensors = [inner for weight in model.parameters() for inner in plain(weight)]
        tensors += [kept for _, layer in swap.coded_layers(model) for kept in layer.buffers()]
        return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors}.values())

    @property
    def token_weight_bytes(self) -> int:
        """Bytes of weights read for one token: all but the rows of the embedding that are not looked up."""
        model = self.loaded.model
        embedding = model.get_input_embeddings().weight
        tied = getattr(model.get_output_embeddings(), "weight", None) is embedding
        return self.weight_bytes - (0 if tied else embedding.nbytes)

    def token_bytes(self, context: float) -> int:
        """Bytes that one token needs at `context` cached tokens: weights, and the live cache at the activations' width."""
        width = activation_dtype(self.loaded.model).itemsize
        return int(self.token_weight_bytes + self.loaded.shape.kv_bytes(context, width))


def _config(name: str, dtype: str, **more) -> dict:
    bits = torch.finfo(DTYPES[dtype]).bits
    return {"model": name, "bits": bits, "linears": "dense", "dtype": dtype, "lm_head": dtype, **more}


def _by_transformers(name: str, dtype: str, compile: bool) -> dict:
    cache, stage = ("static", "compiled") if compile else ("dynamic", "eager")
    release = metadata.version("transformers")
    return _config(name, dtype, stage=stage, cache=cache, compile=compile, transformers=release)


def _eager(name: str, device: str, config: dict) -> Contender:
    """transformers with its growing cache, one call a token."""
    loaded = models.load(name, device, config["dtype"])
    return Contender(EAGER, loaded, config, lambda n: TransformersDecoder(loaded.model, n).generate)


def transformers_eager(name: str, device: str, dtype: str) -> Contender:
    """transformers in `dtype` with its growing cache."""
    return _eager(name, device, _by_transformers(name, dtype, compile=False))


def _with_compiled_step(method: str, loaded: Loaded, config: dict) -> Contender:
    """A transformers model with a static cache and a compiled step."""
    held: list[TransformersDecoder] = []

    def start(max_context: int) -> Generate:
        held.append(TransformersDecoder(loaded.model, max_context, compiled=True))
        return held[0].generate

    def close() -> None:
        for decoder in held:
            decoder.close()

    return Contender(method, loaded, config, start, close, _COMPILE_TOKENS)


def _require_cuda(method: str, device: str) -> None:
    if device != "cuda":
        raise NotPossible(
            f"{method} is a static cache with a compiled step, which replays CUDA graphs; on the {device} compare with {EAGER}."
        )


def _compiled(name: str, device: str, config: dict) -> Contender:
    """transformers with a static cache and its step under `torch.compile`."""
    _require_cuda(COMPILED, device)
    return _with_compiled_step(COMPILED, models.load(name, device, config["dtype"]), config)


def _tinygemm(name: str, device: str, config: dict) -> Contender:
    """The own engine with PyTorch's int4 product in its linears; the head stays dense."""
    loaded = models.load(name, device, config["dtype"])
    group, stage = best_group(loaded.model), config["stage"]
    tinygemm_model(loaded.model, group)
    config = {**config, "group_size": group}
    return Contender(TINYGEMM, loaded, config, lambda n: Engine(loaded, stage, max_context=n).generate)


def _torchao(method: str, name: str, device: str, config: dict) -> Contender:
    """transformers with a static cache, a compiled step and torchao's weights, those of the head included."""
    _require_cuda(method, device)
    torchao_models.require_installed()
    loaded = models.load(name, device, config["dtype"])
    torchao_models.quantize(
        method, loaded.model, lambda: TransformersDecoder(loaded.model, 8).generate([1], 2)
    )
    return _with_compiled_step(method, loaded, config)


def peers_on(device: str) -> tuple[str, ...]:
    """The peers that are measured on "cpu" or "cuda" unless others are asked for."""
    return (EAGER, TINYGEMM) if device == "cpu" else PEERS


def _makers(peer: str, name: str, device: str) -> list[tuple[dict, Callable[[str, str, dict], Contender]]]:
    """(config, maker) for each model that a peer is measured with."""
    if peer == EAGER:
        dtypes = CPU_DTYPES if device == "cpu" else ("fp16",)
        return [(_by_transformers(name, dtype, compile=False), _eager) for dtype in dtypes]
    if peer == COMPILED:
        return [(_by_transformers(name, "fp16", compile=True), _compiled)]
    if peer == TINYGEMM:  # in bf16, which is all that its CUDA kernel multiplies
        config = _config(name, "bf16", stage=_OWN_STAGE[device]) | {"bits": 4, "linears": "tinygemm"}
        return [(config, _tinygemm)]
    way = torchao_models.WAYS[peer]
    config = _by_transformers(name, way.dtype, compile=True) | {"linears": "torchao", "lm_head": "torchao"}
    return [(config | way.config | {"torchao": torchao_models.version()}, partial(_torchao, peer))]


def decode_peers(
    model_name: str | None = None,
    device: str = "auto",
    profile: str = "quick",
    new_tokens: int | None = None,
    peers: Sequence[str] | None = None,
) -> list[Record]:
    """Decode at batch 1 with other people's code.

    Args:
        model_name: as for `models.load`; None for the profile's random shape.
        device: "auto", "cpu" or "cuda".
        profile: "smoke", "quick" or "full".
        new_tokens: decode steps per run; None for the profile's. Cut on slow peers (`config.new_tokens` is what ran).
        peers: of `PEERS`; None for `peers_on` the device.

    Returns:
        `decode_speed` and `window_speed` (tok/s), `time_to_first_token` (s), `decode_memory` (GB), `model_memory` (GB, all
        weights) and `model_bandwidth` (GB/s, bytes of the weights that a token reads times tokens a second); or one
        `call_accepted` of 0 with the reason in `config.error`.

    Raises:
        ValueError: an unknown peer.
        ModelError: the model cannot be had.
    """
    recorder = Recorder(device, profile)
    unknown = [peer for peer in peers or () if peer not in PEERS]
    if unknown:
        raise ValueError(f"peer {unknown[0]!r} is unknown; it is one of {', '.join(PEERS)}.")
    recorder.cold_read_gbps = cold_read_gbps(recorder)
    name = model_name or recorder.sizes.model
    for peer in peers or peers_on(recorder.device):
        for config, make in _makers(peer, name, recorder.device):
            _measure(recorder, peer, config, partial(make, name, recorder.device, config), new_tokens)
            _forget(recorder.device)
    return recorder.close()


def _forget(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _measure(recorder: Recorder, peer: str, config: dict, make: Callable[[], Contender], new_tokens) -> None:
    """All records of one peer, or the one that says why there are none."""
    contender = None
    try:
        contender = make()
        run = PeerRun(recorder, contender, new_tokens)
        add_records(recorder, run, run.measure())
    except ModelError:
        raise
    except Exception as error:  # whatever another release of a package, or its compiler, raises
        config = contender.config if contender else config
        recorder.add("call_accepted", [0.0], peer, {**config, "error": reason(error)})
    finally:
        if contender:
            contender.close()


class PeerRun:
    """One contender with the prompt and the number of tokens of `trapetum.bench.generating`.

    Attributes:
        contender: what runs.
        prompt: token ids.
        first_s: seconds of the first generation, compiling included, after `settle`.
        tokens: decode steps of a run, after `settle`; the token that the prefill makes comes before them.
        threads: of a CPU, after `settle`; None on a GPU.
    """

    def __init__(self, recorder: Recorder, contender: Contender, new_tokens: int | None = None):
        self.contender, self.device, self._sizes = contender, recorder.device, recorder.sizes
        self._read_gbps = recorder.cold_read_gbps
        self._wanted = new_tokens or self._sizes.new_tokens
        vocab = contender.loaded.model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(0, vocab, (self._sizes.prompt_tokens,), generator=generator).tolist()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        context = len(self.prompt) + max(self._wanted, WARM_UP_TOKENS, contender.warm_up) + 1
        self._generate, self.first_s, self.threads = contender.start(context), 0.0, None

    def _warm_up(self, threads: int | None) -> float:
        """Seconds a token, from a few."""
        with timing.using_threads(threads):
            return min(self._generate(self.prompt[:1], WARM_UP_TOKENS).token_s)

    def settle(self) -> None:
        """Compile, warm up, choose the number of threads, and how many tokens the budget allows."""
        start = time.perf_counter()
        self._generate(self.prompt, self.contender.warm_up)
        self.first_s = time.perf_counter() - start
        counts = timing.thread_choices() if self.device == "cpu" else [None]
        token_s = {threads: self._warm_up(threads) for threads in counts}
        self.threads = timing.pick_threads(token_s) if self.device == "cpu" else None
        affordable = int(self._sizes.token_budget_s / max(token_s[self.threads], 1e-9))
        self.tokens = max(min(self._wanted, affordable), min(self._wanted, FEWEST_TOKENS))
        if self.device == "cuda":
            # a growing cache asks for new sizes at every length: once before the clock runs
            self._generate(self.prompt, self.tokens + 1)

    def once(self) -> Generation:
        """One timed run."""
        with timing.using_threads(self.threads):
            return self._generate(self.prompt, self.tokens + 1)

    def measure(self) -> list[Generation]:
        """Settle, then make the runs."""
        self.settle()
        return [self.once() for _ in range(self._sizes.runs)]

    def config(self, **more) -> dict:
        """What a record's config says of this run; `context=` in `more` also sets the bytes of a token."""
        context = more.get("context", len(self.prompt) + self.tokens / 2)
        base = {
            **self.contender.config,
            "context": context,
            "new_tokens": self.tokens,
            "prompt_tokens": len(self.prompt),
            "bytes": self.contender.token_bytes(context),
            "read_gbps": self._read_gbps,
        }
        if self.contender.config.get("compile"):
            base["compile_s"] = round(self.first_s, 1)
        if self.device == "cpu":
            available = torch.get_num_threads()
            base |= {"threads": self.threads, "threads_available": available}
            base["fewer_threads_faster"] = self.threads < available
        return {**base, **more}


def add_records(recorder: Recorder, run: PeerRun, generations: list[Generation]) -> None:
    """Speed, its windows, time to the first token, memory, size and bandwidth of one peer."""
    method, config, contender = run.contender.method, run.config(), run.contender
    speeds = speed_samples(generations)
    recorder.add("decode_speed", speeds, method, config)
    for window, samples in window_samples(generations).items():
        last = run.tokens // WINDOW * WINDOW - WINDOW // 2
        context = len(run.prompt) + (WINDOW // 2 if window.startswith("first") else last)
        recorder.add("window_speed", samples, method, run.config(context=float(context), window=window))
    recorder.add("time_to_first_token", [g.ttft_s for g in generations], method, config)
    _add_memory(recorder, contender, config)
    recorder.add("model_memory", [contender.weight_bytes / 1e9], method, config)
    per_token = contender.token_weight_bytes / 1e9
    recorder.add("model_bandwidth", [per_token * speed for speed in speeds], method, config)


def _add_memory(recorder: Recorder, contender: Contender, config: dict) -> None:
    """GPU: the allocator's peak since the decode was set up. CPU: the weights, which is what can be counted."""
    nbytes, source = contender.weight_bytes, "bytes of all weights"
    if recorder.device == "cuda":
        nbytes, source = torch.cuda.max_memory_allocated(), "torch.cuda.max_memory_allocated"
    recorder.add("decode_memory", [nbytes / 1e9], contender.method, config, source=source)
