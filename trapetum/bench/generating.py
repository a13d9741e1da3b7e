"""Whole decodes: tokens a second in all and in windows, memory, time to the first token, energy."""

import statistics
from collections.abc import Callable, Sequence

import torch

from trapetum import ops, swap, timing
from trapetum.bench.reading import cold_read_gbps
from trapetum.bench.recording import Recorder
from trapetum.bench.variants import Variant, default_methods, forget, variants
from trapetum.decode import DecodeError, Engine, Generation
from trapetum.decode import stages as stages_of
from trapetum.energy import EnergyMeter, EnergyReading
from trapetum.llama_step import UnsupportedModel
from trapetum.models import Loaded
from trapetum.records import Record
from trapetum.shapes import require_kv
from trapetum.text import load_text

WARM_UP_TOKENS = 3
FEWEST_TOKENS = 4
CHUNKS = 8
DRAFT_PROMPT = 64
WINDOW = 32  # tokens; the later stages make several a launch, at most so many, so no sum ends inside a launch
NOT_POSSIBLE = (DecodeError, UnsupportedModel, torch.OutOfMemoryError, MemoryError)


def decode(
    model_name: str | None = None,
    device: str = "auto",
    stages: Sequence[str] | None = None,
    profile: str = "quick",
    new_tokens: int | None = None,
    methods: Sequence[str] | None = None,
    bits: Sequence[int] = (4,),
    lm_head: bool = False,
    kv: str = "fp16",
    rows: int = 1,
) -> list[Record]:
    """Decode at batch 1, each method at each stage.

    Args:
        model_name: as for `models.load`; None for the profile's random shape.
        device: "auto", "cpu" or "cuda".
        stages: None for all of the device's.
        profile: "smoke", "quick" or "full".
        new_tokens: decode steps per run; None for the profile's. Cut on slow stages (`config.new_tokens` is what ran).
        methods: "fp32", "fp16", "bf16", "16-bit" (the faster one), "codebook"; None for the device's usual ones.
        bits: of the codebook weights.
        lm_head: codes in the output head too.
        kv: how the cache is kept: "fp16" (as the activations), "int8" or "int4".
        rows: tokens verified at once; above 1 the engine drafts by prompt lookup, `config.accepted` is the mean of tokens that
            a step made, and `config.bytes` those of a step over it.

    Returns:
        `decode_speed` (tok/s; `config.context` is the mean number of cached tokens, `config.bytes` the bytes of one
        token there, `config.read_gbps` the read bandwidth of this run), `window_speed` (tok/s, `config.window` "first 32"
        or "last 32"), `time_to_first_token` (s) and `decode_memory` (GB, beside `config.estimate_gb`). What does not fit
        or cannot run is a `call_accepted` of 0 with the reason in `config.error`.
    """
    recorder = Recorder(device, profile)
    recorder.cold_read_gbps = cold_read_gbps(recorder)
    name = model_name or recorder.sizes.model
    names = methods or default_methods(recorder.device, name, profile)
    for variant in variants(name, recorder.device, names, bits, lm_head, refuser(recorder)):
        for stage in stages or stages_of(recorder.device):
            _decode_one(recorder, variant, stage, new_tokens, engine_options(kv, rows))
        del variant  # before the next one is loaded
    return recorder.close()


def engine_options(kv: str = "fp16", rows: int = 1) -> dict:
    """What an `Engine` is told of cache and rows: only what is not its default.

    Raises:
        ValueError: an unknown cache format.
    """
    require_kv(kv)
    return ({"kv": kv} if kv != "fp16" else {}) | ({"rows": rows} if rows != 1 else {})


def refuser(recorder: Recorder) -> Callable[[str, dict, str], None]:
    """What to call with a method, its config and a sentence where something cannot be measured: it becomes a record."""

    def refuse(method: str, config: dict, error: str) -> None:
        first_line = (str(error).strip() or "out of memory").splitlines()[0]
        recorder.add("call_accepted", [0.0], method, {**config, "error": first_line})

    return refuse


def _decode_one(
    recorder: Recorder, variant: Variant, stage: str, new_tokens: int | None, options: dict
) -> None:
    forget()
    if recorder.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        run = Run(recorder, variant, stage, new_tokens, options)
        generations = run.generate()
    except NOT_POSSIBLE as error:
        refuser(recorder)(variant.method, {**variant.config, "stage": stage, **options}, error)
        return
    _add_speed(recorder, run, generations)
    add_memory(recorder, variant, run.config())


class Run:
    """One engine with a prompt and a number of tokens that fits the budget.

    Attributes:
        variant, stage, device: what runs and where.
        engine: made for it.
        prompt: token ids.
        tokens: decode steps of a run, after `settle`; the token that the prefill makes comes before them.
        threads: of a CPU, after `settle`; None on a GPU.
    """

    def __init__(
        self,
        recorder: Recorder,
        variant: Variant,
        stage: str,
        new_tokens: int | None = None,
        options: dict | None = None,
    ):
        self.variant, self.stage, self._sizes = variant, stage, recorder.sizes
        self.device, self._read_gbps = recorder.device, recorder.cold_read_gbps
        self._wanted = new_tokens or self._sizes.new_tokens
        self._options, self._accepted = options or {}, None
        self.prompt = _prompt(variant, self._sizes.prompt_tokens, self._options.get("rows", 1))
        self.max_context = len(self.prompt) + max(self._wanted, WARM_UP_TOKENS) + 1
        self.engine = Engine(variant.loaded, stage, max_context=self.max_context, **self._options)

    def _warm_up(self, threads: int | None) -> float:
        """Seconds a token, from a few."""
        with timing.using_threads(threads):
            return min(self.engine.generate(self.prompt[:1], WARM_UP_TOKENS).token_s)

    def settle(self, rehearse: bool = True) -> None:
        """Warm up, choose the number of threads, and how many tokens the budget allows.

        Args:
            rehearse: on a GPU also make one whole untimed run, since a growing cache asks for new sizes at every length.
        """
        counts = timing.thread_choices() if self.device == "cpu" else [None]
        token_s = {threads: self._warm_up(threads) for threads in counts}
        self.threads = timing.pick_threads(token_s) if self.device == "cpu" else None
        self.tokens = _affordable(self._wanted, self._sizes.token_budget_s / max(token_s[self.threads], 1e-9))
        if rehearse and self.device == "cuda":
            self.engine.generate(self.prompt, self.tokens + 1)

    def once(self) -> Generation:
        """One timed run."""
        with timing.using_threads(self.threads):
            return self.engine.generate(self.prompt, self.tokens + 1)

    def generate(self) -> list[Generation]:
        """Settle, then make the runs."""
        self.settle()
        before = self.engine.steps
        generations = [self.once() for _ in range(self._sizes.runs)]
        if self.engine.rows > 1:
            self._accepted = sum(len(g.token_s) for g in generations) / (self.engine.steps - before)
        return generations

    @property
    def context(self) -> float:
        """Mean number of cached tokens."""
        return len(self.prompt) + self.tokens / 2

    def config(self, **more) -> dict:
        """What a record's config says of this run; `context=` in `more` also sets the bytes of a token."""
        context = more.get("context", self.context)
        nbytes = self.variant.token_bytes(context, self._options.get("kv", "fp16"))
        base = {
            **self.variant.config,
            **self._options,
            "stage": self.stage,
            "context": context,
            "new_tokens": self.tokens,
            "prompt_tokens": len(self.prompt),
            "bytes": int(nbytes / (self._accepted or 1)),
            "read_gbps": self._read_gbps,
        }
        if self._accepted:
            base["accepted"] = self._accepted
        if self.device == "cpu":
            available = torch.get_num_threads()
            base |= {"threads": self.threads, "threads_available": available}
            base["fewer_threads_faster"] = self.threads < available
        estimate_gb = (
            self.variant.estimate_bytes(self.max_context, prompt=len(self.prompt), **self._options) / 1e9
        )
        return {**base, "estimate_gb": estimate_gb, **more}


def _prompt(variant: Variant, length: int, rows: int) -> list[int]:
    """Random tokens; for drafts, which are looked up in what was said before, the beginning of a text where one can be read."""
    if rows > 1 and variant.loaded.tokenizer is not None:
        return text_tokens(variant.loaded)[: max(length, DRAFT_PROMPT)]
    return random_prompt(variant, length)


def text_tokens(loaded: Loaded, characters: int = 64 * 1024) -> list[int]:
    """The built-in text's first characters in the model's tokens."""
    words = load_text("builtin", characters)
    made = loaded.tokenizer(words, return_tensors="pt", add_special_tokens=False, verbose=False)
    return made.input_ids[0].tolist()


def random_prompt(variant: Variant, length: int) -> list[int]:
    """Token ids from a fixed seed."""
    vocab = variant.loaded.model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(0)).tolist()


def _affordable(wanted: int, tokens: float) -> int:
    """As many of the tokens wanted as the budget allows, whole windows if there are two; a few in any case."""
    count = max(min(wanted, int(tokens)), min(wanted, FEWEST_TOKENS))
    return count if count == wanted or count < 2 * WINDOW else count // WINDOW * WINDOW


def speed_samples(generations: Sequence[Generation]) -> list[float]:
    """Tokens per second: one sample a run, or of up to eight stretches of one run where there are fewer than 3.

    From two windows on, a stretch is whole windows, since the tokens of one launch arrive together.
    """
    if len(generations) >= 3:
        return [g.tokens_per_s for g in generations]
    spans = [t for g in generations for t in g.token_s]
    step = -(-len(spans) // CHUNKS)
    if len(spans) >= 2 * WINDOW:
        step = -(-step // WINDOW) * WINDOW
    chunks = [spans[i : i + step] for i in range(0, len(spans), step)]
    return [len(c) / sum(c) for c in chunks]


def window_samples(generations: Sequence[Generation]) -> dict[str, list[float]]:
    """Tokens per second over the first and the last 32 tokens, one sample a run; empty for runs under 64 tokens.

    The last window begins at a multiple of 32 tokens after the first, as a launch of several tokens does.
    """
    count = len(generations[0].token_s) // WINDOW * WINDOW
    if count < 2 * WINDOW:
        return {}
    windows = {f"first {WINDOW}": slice(0, WINDOW), f"last {WINDOW}": slice(count - WINDOW, count)}
    return {name: [WINDOW / sum(g.token_s[at]) for g in generations] for name, at in windows.items()}


def kernel_sha(recorder: Recorder, variant: Variant) -> str | None:
    """Hash of our product's source where the variant's linears run in it."""
    return ops.kernel_sha256(recorder.device) if variant.method == "codebook" else None


def _add_speed(recorder: Recorder, run: Run, generations: list[Generation]) -> None:
    config, method = run.config(), run.variant.method
    sha = kernel_sha(recorder, run.variant)
    recorder.add("decode_speed", speed_samples(generations), method, config, kernel_sha256=sha)
    for window, samples in window_samples(generations).items():
        last = run.tokens // WINDOW * WINDOW - WINDOW // 2
        context = len(run.prompt) + (WINDOW // 2 if window.startswith("first") else last)
        within = run.config(context=float(context), window=window)
        recorder.add("window_speed", samples, method, within, kernel_sha256=sha)
    first = [g.ttft_s for g in generations]
    recorder.add("time_to_first_token", first, method, config, kernel_sha256=sha)


def add_memory(recorder: Recorder, variant: Variant, config: dict) -> Record:
    """GPU: the allocator's peak since its statistics were reset. CPU: the weights, which is what can be counted."""
    if recorder.device == "cuda":
        nbytes, source = torch.cuda.max_memory_allocated(), "torch.cuda.max_memory_allocated"
    else:
        nbytes, source = swap.weight_bytes(variant.loaded.model), "bytes of all weights"
    sha = kernel_sha(recorder, variant)
    return recorder.add(
        "decode_memory", [nbytes / 1e9], variant.method, config, source=source, kernel_sha256=sha
    )


def energy(
    model_name: str | None = None,
    device: str = "auto",
    stages: Sequence[str] | None = None,
    profile: str = "quick",
    methods: Sequence[str] | None = None,
    bits: Sequence[int] = (4,),
    lm_head: bool = False,
    kv: str = "fp16",
) -> list[Record]:
    """Measure the energy of a generated token.

    Idle power is measured for each run by itself: the weights are resident, the engine has been warmed up, and the device
    has been quiet for a second.

    Args:
        model_name: as for `models.load`; None for the profile's random shape.
        device: "auto", "cpu" or "cuda".
        stages: None for the device's last.
        profile: "smoke", "quick" or "full"; only full has windows of 5 s and five of them.
        methods, bits, lm_head, kv: as for `decode`.

    Returns:
        `energy_per_token` records in J, gross and net of idle (`config.accounting`), with the counter, the window, its
        resolution, the integrated power trace, and clocks and temperature before and after each window in config.
        What does not fit or cannot run is a `call_accepted` of 0. Empty where energy cannot be measured:
        `EnergyMeter(device).why_not` says why.
    """
    recorder = Recorder(device, profile)
    meter = EnergyMeter(recorder.device)
    if not meter.available:
        return []
    name = model_name or recorder.sizes.model
    names = methods or default_methods(recorder.device, name, profile)
    for variant in variants(name, recorder.device, names, bits, lm_head, refuser(recorder)):
        for stage in stages or stages_of(recorder.device)[-1:]:
            _energy_one(recorder, variant, stage, meter, engine_options(kv))
        del variant  # before the next one is loaded
    return recorder.close()


def _energy_one(recorder: Recorder, variant: Variant, stage: str, meter: EnergyMeter, options: dict) -> None:
    try:
        run = Run(recorder, variant, stage, options=options)
        run.settle()
    except NOT_POSSIBLE as error:
        refuser(recorder)(variant.method, {**variant.config, "stage": stage, **options}, error)
        return
    _add_energy(recorder, run, _windows(recorder, run, meter))


def _windows(recorder: Recorder, run: Run, meter: EnergyMeter) -> list[EnergyReading]:
    idle_w = meter.idle_power_w(recorder.sizes.idle_s, recorder.sizes.quiet_s)

    def work() -> int:
        return len(run.once().tokens)

    return [meter.measure(work, recorder.sizes.energy_s, idle_w) for _ in range(recorder.sizes.runs)]


def _add_energy(recorder: Recorder, run: Run, readings: list[EnergyReading]) -> None:
    first = readings[0]
    trace_j = [r.trace_joules / r.units for r in readings if r.trace_joules is not None]
    config = run.config(
        counter=first.method,
        window_s=round(min(r.seconds for r in readings), 3),
        resolution_s=round(max(r.resolution_s for r in readings), 4),
        idle_w=round(first.idle_w, 2),
        idle_state="weights resident, warmed up, quiet",
        mean_w=round(statistics.median(r.mean_w for r in readings), 2),
        trace_j=statistics.median(trace_j) if trace_j else None,
        before=[r.before for r in readings],
        after=[r.after for r in readings],
    )
    sha = kernel_sha(recorder, run.variant)
    for accounting, net in (("gross", False), ("net", True)):
        samples = [r.per_unit_j(net) for r in readings]
        labelled = {**config, "accounting": accounting}
        recorder.add("energy_per_token", samples, run.variant.method, labelled, kernel_sha256=sha)
