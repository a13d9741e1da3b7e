"""Whole decodes: tokens a second, memory, time to the first token, the framework's own share, energy."""

from collections.abc import Sequence

import torch

from trapetum import ops, swap, timing
from trapetum.bench.reading import cold_read_gbps
from trapetum.bench.recording import Recorder
from trapetum.bench.variants import Variant, default_methods, variants
from trapetum.decode import Engine, Generation
from trapetum.decode import stages as stages_of
from trapetum.energy import EnergyMeter, EnergyReading
from trapetum.records import Record

WARM_UP_TOKENS = 3
FEWEST_TOKENS = 4
CHUNKS = 8


def decode(
    model_name: str | None = None,
    device: str = "auto",
    stages: Sequence[str] | None = None,
    profile: str = "quick",
    new_tokens: int | None = None,
    methods: Sequence[str] | None = None,
    bits: Sequence[int] = (4,),
    lm_head: bool = False,
    floor: bool = True,
) -> list[Record]:
    """Decode at batch 1, each method at each stage.

    Args:
        model_name: as for `models.load`; None for the profile's random shape.
        device: "auto", "cpu" or "cuda".
        stages: None for all of the device's.
        profile: "smoke", "quick" or "full".
        new_tokens: tokens per run; None for the profile's. Cut on slow stages (`config.new_tokens` is what ran).
        methods: "fp32", "fp16", "bf16", "16-bit" (the faster one), "codebook"; None for the device's usual ones.
        bits: of the codebook weights.
        lm_head: codes in the output head too.
        floor: also decode with linears that do nothing: the method is then `no-linears`, `config.linears` "none".

    Returns:
        `decode_speed` (tok/s; `config.context` is the mean number of cached tokens, `config.bytes` the bytes of one
        token there), `time_to_first_token` (s) and `decode_memory` (GB) records.
    """
    recorder = Recorder(device, profile)
    recorder.cold_read_gbps = cold_read_gbps(recorder)
    name = model_name or recorder.sizes.model
    names = methods or default_methods(recorder.device, name, profile)
    for variant in variants(name, recorder.device, names, bits, lm_head):
        for stage in stages or stages_of(recorder.device):
            _decode_one(recorder, variant, stage, new_tokens, floor)
        del variant  # before the next one is loaded
    return recorder.close()


def _decode_one(
    recorder: Recorder, variant: Variant, stage: str, new_tokens: int | None, floor: bool
) -> None:
    if recorder.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = _Run(recorder, variant, stage, new_tokens)
    generations = run.generate()
    _add_speed(recorder, run, generations)
    _add_memory(recorder, run)
    if floor and variant.method == "codebook":
        with run.engine.without_linears():
            _add_floor(recorder, run, run.generate())


class _Run:
    """One engine with a prompt and a number of tokens that fits the budget."""

    def __init__(self, recorder: Recorder, variant: Variant, stage: str, new_tokens: int | None = None):
        self.variant, self.stage, self._sizes = variant, stage, recorder.sizes
        self.device = recorder.device
        self._wanted = new_tokens or self._sizes.new_tokens
        vocab = variant.loaded.model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(0, vocab, (self._sizes.prompt_tokens,), generator=generator).tolist()
        context = len(self.prompt) + max(self._wanted, WARM_UP_TOKENS)
        self.engine = Engine(variant.loaded, stage, max_context=context)

    def _warm_up(self, threads: int | None) -> float:
        """Seconds a token, from a few."""
        with timing.using_threads(threads):
            return min(self.engine.generate(self.prompt[:1], WARM_UP_TOKENS).token_s)

    def settle(self) -> None:
        """Warm up, choose the number of threads, and how many tokens the budget allows."""
        counts = timing.thread_choices() if self.device == "cpu" else [None]
        token_s = {threads: self._warm_up(threads) for threads in counts}
        self.threads = timing.pick_threads(token_s) if self.device == "cpu" else None
        affordable = int(self._sizes.token_budget_s / token_s[self.threads])
        self.tokens = max(min(self._wanted, affordable), min(self._wanted, FEWEST_TOKENS))
        if (
            self.device == "cuda"
        ):  # a growing cache asks for new sizes at every length: once before the clock runs
            self.engine.generate(self.prompt, self.tokens)

    def once(self) -> Generation:
        """One timed run."""
        with timing.using_threads(self.threads):
            return self.engine.generate(self.prompt, self.tokens)

    def generate(self) -> list[Generation]:
        """Settle, then make the runs."""
        self.settle()
        return [self.once() for _ in range(self._sizes.runs)]

    @property
    def context(self) -> float:
        """Mean number of cached tokens."""
        return len(self.prompt) + self.tokens / 2

    def config(self, **more) -> dict:
        """What a record's config says of this run."""
        base = {
            **self.variant.config,
            "stage": self.stage,
            "context": self.context,
            "new_tokens": self.tokens,
            "prompt_tokens": len(self.prompt),
            "bytes": self.variant.token_bytes(self.context),
        }
        if self.device == "cpu":
            available = torch.get_num_threads()
            base |= {"threads": self.threads, "threads_available": available}
            base["fewer_threads_faster"] = self.threads < available
        return {**base, **more}


def speed_samples(generations: Sequence[Generation]) -> list[float]:
    """Tokens per second: one sample a run, or of up to eight stretches of one run where there are fewer than 3."""
    if len(generations) >= 3:
        return [g.tokens_per_s for g in generations]
    spans = [t for g in generations for t in g.token_s]
    step = -(-len(spans) // CHUNKS)
    chunks = [spans[i : i + step] for i in range(0, len(spans), step)]
    return [len(c) / sum(c) for c in chunks]


def _sha(recorder: Recorder, variant: Variant) -> str | None:
    return ops.kernel_sha256(recorder.device) if variant.method == "codebook" else None


def _add_speed(recorder: Recorder, run: _Run, generations: list[Generation]) -> None:
    config, method = run.config(), run.variant.method
    sha = _sha(recorder, run.variant)
    recorder.add("decode_speed", speed_samples(generations), method, config, kernel_sha256=sha)
    first = [g.ttft_s for g in generations]
    recorder.add("time_to_first_token", first, method, config, kernel_sha256=sha)


def _add_memory(recorder: Recorder, run: _Run) -> None:
    """GPU: the allocator's peak since before the engine was made. CPU: the weights, which is what can be counted."""
    if recorder.device == "cuda":
        nbytes, source = torch.cuda.max_memory_allocated(), "torch.cuda.max_memory_allocated"
    else:
        nbytes, source = swap.weight_bytes(run.variant.loaded.model), "bytes of all weights"
    config, sha = run.config(), _sha(recorder, run.variant)
    recorder.add(
        "decode_memory", [nbytes / 1e9], run.variant.method, config, source=source, kernel_sha256=sha
    )


def _add_floor(recorder: Recorder, run: _Run, generations: list[Generation]) -> None:
    kv_bytes = run.variant.token_bytes(run.context) - run.variant.token_weight_bytes
    config = run.config(linears="none", bytes=kv_bytes)
    recorder.add("decode_speed", speed_samples(generations), "no-linears", config)


def energy(
    model_name: str | None = None,
    device: str = "auto",
    stage: str | None = None,
    profile: str = "quick",
    methods: Sequence[str] | None = None,
    bits: Sequence[int] = (4,),
) -> list[Record]:
    """Measure the energy of a generated token.

    Args:
        model_name: as for `models.load`; None for the profile's random shape.
        device: "auto", "cpu" or "cuda".
        stage: None for the device's last.
        profile: "smoke", "quick" or "full"; only full has windows of 5 s and five of them.
        methods, bits: as for `decode`.

    Returns:
        `energy_per_token` records in J, gross and net of idle (`config.accounting`), with the counter, the window, its
        resolution and the integrated power trace in config. Empty where energy cannot be measured:
        `EnergyMeter(device).why_not` says why.
    """
    recorder = Recorder(device, profile)
    meter = EnergyMeter(recorder.device)
    if not meter.available:
        return []
    if recorder.device == "cuda":
        torch.zeros(1, device="cuda")  # the open context is part of idle
    idle_w = meter.idle_power_w(recorder.sizes.idle_s)
    name = model_name or recorder.sizes.model
    names = methods or default_methods(recorder.device, name, profile)
    for variant in variants(name, recorder.device, names, bits):
        run = _Run(recorder, variant, stage or stages_of(recorder.device)[-1])
        _add_energy(recorder, run, _windows(recorder, run, meter, idle_w))
        del variant, run  # before the next one is loaded
    return recorder.close()


def _windows(recorder: Recorder, run: _Run, meter: EnergyMeter, idle_w: float) -> list[EnergyReading]:
    run.settle()

    def work() -> int:
        return len(run.once().tokens)

    return [meter.measure(work, recorder.sizes.energy_s, idle_w) for _ in range(recorder.sizes.runs)]


def _add_energy(recorder: Recorder, run: _Run, readings: list[EnergyReading]) -> None:
    first = readings[0]
    trace_j = [r.trace_joules / r.units for r in readings if r.trace_joules is not None]
    config = run.config(
        counter=first.method,
        window_s=round(min(r.seconds for r in readings), 3),
        resolution_s=round(max(r.resolution_s for r in readings), 4),
        idle_w=round(first.idle_w, 2),
        mean_w=round(timing.Spread.of([r.mean_w for r in readings]).median, 2),
        trace_j=timing.Spread.of(trace_j).median if trace_j else None,
    )
    sha = _sha(recorder, run.variant)
    for accounting, net in (("gross", False), ("net", True)):
        samples = [r.per_unit_j(net) for r in readings]
        labelled = {**config, "accounting": accounting}
        recorder.add("energy_per_token", samples, run.variant.method, labelled, kernel_sha256=sha)
