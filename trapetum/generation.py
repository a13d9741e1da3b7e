"""`trapetum generate`: text in, text streamed out, and what it cost per token."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from trapetum import machine, models
from trapetum.bench.generating import engine_options
from trapetum.bench.variants import Variant
from trapetum.decode import Engine, Generation, last_engine
from trapetum.energy import EnergyMeter

_UNFINISHED = "\ufffd"  # what a tokenizer prints for half a character


@dataclass(frozen=True)
class How:
    """How to decode.

    Attributes:
        stage: of `decode.stages(device)`; None for the last that can run the model.
        kv: the cache: "fp16" (as the activations), "int8" or "int4".
        rows: tokens verified at once; above 1 the others are drafts, looked up in the text so far.
        temperature: 0 for greedy; above, tokens after the first are drawn from softmax(logits / temperature).
        seed: of the draws.
    """

    stage: str | None = None
    kv: str = "fp16"
    rows: int = 1
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """One generation with its cost.

    Attributes:
        text: what was generated (token ids where the model has no tokenizer).
        tokens: how many.
        ttft_s: seconds to the first token.
        tokens_per_s: speed after the first token.
        gbps: bytes of weights and cache moved a second, GB/s.
        joules_per_token: gross, or None where energy cannot be measured.
        why_no_energy: the reason, or an empty string.
        stage, kv, rows, temperature, device, model: how it ran.
        tokens_a_step: tokens over the steps that were queued for them; above 1 only with drafts that held.
    """

    text: str
    tokens: int
    ttft_s: float
    tokens_per_s: float
    gbps: float
    joules_per_token: float | None
    why_no_energy: str
    stage: str
    device: str
    model: str
    kv: str = "fp16"
    rows: int = 1
    temperature: float = 0.0
    tokens_a_step: float = 1.0


def encode(loaded: models.Loaded, text: str) -> torch.Tensor:
    """Token ids [n] of `text`; refuses a model without a tokenizer."""
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.name} has no tokenizer, so it cannot read a text.")
    return loaded.tokenizer(text, return_tensors="pt").input_ids[0]


class _Stream:
    """Turns tokens into text pieces as they arrive; a character is held back until it is whole."""

    def __init__(self, tokenizer, say: Callable[[str], None]):
        self._tokenizer, self._say, self._ids, self._said = tokenizer, say, [], ""

    def __call__(self, token: int) -> None:
        self._ids.append(token)
        text = self.text
        if not text.endswith(_UNFINISHED):
            self._say(text[len(self._said) :])
            self._said = text

    @property
    def text(self) -> str:
        if self._tokenizer is None:
            return "".join(f"{i} " for i in self._ids)
        return self._tokenizer.decode(self._ids)


def _prompt_ids(loaded: models.Loaded, prompt: str) -> torch.Tensor:
    """The prompt's tokens; for random weights, which cannot read, as many tokens as it has words."""
    if loaded.tokenizer is None:
        return torch.arange(1, 1 + max(1, len(prompt.split())))
    return encode(loaded, prompt)


def _load(name: str, bits: int | None, device: str) -> models.Loaded:
    if bits is None or name.startswith("random:"):
        return models.load(name, device, bits=bits)
    return models.load(name, device, quantize=models.QuantizeSpec(bits))


def run(
    model: str,
    prompt: str,
    new_tokens: int,
    how: How | None = None,
    bits: int | None = None,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> Result:
    """Generate and measure.

    Args:
        model: as for `models.load`.
        prompt: text to go on from, repeated first.
        new_tokens: at most so many; fewer where the text ends.
        how: stage, cache, drafts and sampling; None for the last stage that can run the model, greedy.
        bits: quantize first (random codes for random weights).
        device: "auto", "cpu" or "cuda".
        say: takes each piece of text as it arrives.

    Raises:
        ValueError: an unknown cache format, or what the stage cannot do.
        ModelError: the model cannot be had.
    """
    how = how or How()
    options = engine_options(how.kv, how.rows)  # refuses an unknown cache before a model is loaded
    device = machine.choose_device(device)
    loaded = _load(model, bits, device)
    ids = _prompt_ids(loaded, prompt)
    options["max_context"] = len(ids) + new_tokens
    engine = Engine(loaded.model, how.stage, **options) if how.stage else last_engine(loaded.model, **options)
    how = replace(how, stage=engine.stage)
    if loaded.tokenizer is not None:
        say(prompt)
    stream, meter = _Stream(loaded.tokenizer, say), EnergyMeter(device)
    eos = getattr(loaded.tokenizer, "eos_token_id", None)
    with meter if meter.available else nullcontext():
        made = engine.generate(ids, new_tokens, stream, eos, how.temperature, how.seed)
    joules = meter.reading.joules / len(made.tokens) if meter.available else None
    energy = joules, meter.why_not
    return _result(loaded, made, stream.text, energy, how, device, len(ids), _tokens_a_step(engine, made))


def _tokens_a_step(engine: Engine, made: Generation) -> float:
    """Tokens over the steps queued for them, 1 without drafts; the first token comes from the prompt, not from a step."""
    return len(made.token_s) / engine.steps if engine.rows > 1 and engine.steps else 1.0


def _result(
    loaded: models.Loaded,
    made: Generation,
    text: str,
    energy: tuple[float | None, str],
    how: How,
    device: str,
    prompt_tokens: int,
    tokens_a_step: float,
) -> Result:
    method = "codebook" if models.is_quantized(loaded.model) else "dense"
    context = prompt_tokens + len(made.tokens) / 2
    step_bytes = Variant(method, loaded, {}).token_bytes(context, how.kv)
    speed = made.tokens_per_s
    gbps = step_bytes * speed / tokens_a_step / 1e9
    return Result(
        text, len(made.tokens), made.ttft_s, speed, gbps, *energy, how.stage, device, loaded.name,
        how.kv, how.rows, how.temperature, tokens_a_step,
    )  # fmt: skip


def describe(result: Result) -> str:
    """The closing lines of `trapetum generate`."""
    energy = (
        f"{result.joules_per_token:.3g} J/token (gross)"
        if result.joules_per_token is not None
        else f"J/token not measured: {result.why_no_energy}"
    )
    more = [
        f", cache in {result.kv}" if result.kv != "fp16" else "",
        f", {result.tokens_a_step:.2f} tokens a step of {result.rows} rows" if result.rows > 1 else "",
        f", temperature {result.temperature:g}" if result.temperature else "",
    ]
    return (
        f"{result.model} at stage {result.stage} on {result.device}{''.join(more)}: {result.tokens} tokens, "
        f"first after {1e3 * result.ttft_s:.0f} ms\n"
        f"{result.tokens_per_s:.1f} tok/s, {result.gbps:.1f} GB/s of weights and cache, {energy}"
    )
