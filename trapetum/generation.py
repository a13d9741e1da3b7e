"""`trapetum generate`: text in, text streamed out, and what it cost per token."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trapetum import machine, models
from trapetum.bench.variants import Variant
from trapetum.decode import Engine, Generation, stages
from trapetum.energy import EnergyMeter

_UNFINISHED = "\ufffd"  # what a tokenizer prints for half a character


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
        stage, device, model: how it ran.
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
    stage: str | None = None,
    bits: int | None = None,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> Result:
    """Generate and measure.

    Args:
        model: as for `models.load`.
        prompt: text to go on from, repeated first.
        new_tokens: at most so many; fewer where the text ends.
        stage: of `decode.stages(device)`; default the last.
        bits: quantize first (random codes for random weights).
        say: takes each piece of text as it arrives.
    """
    device = machine.choose_device(device)
    loaded = _load(model, bits, device)
    stage = stage or stages(device)[-1]
    ids = _prompt_ids(loaded, prompt)
    engine = Engine(loaded.model, stage, max_context=len(ids) + new_tokens)
    if loaded.tokenizer is not None:
        say(prompt)
    stream, meter = _Stream(loaded.tokenizer, say), EnergyMeter(device)
    eos = getattr(loaded.tokenizer, "eos_token_id", None)
    if meter.available:
        with meter:
            made = engine.generate(ids, new_tokens, stream, eos)
    else:
        made = engine.generate(ids, new_tokens, stream, eos)
    joules = meter.reading.joules / len(made.tokens) if meter.available else None
    return _result(loaded, made, stream.text, joules, meter.why_not, stage, device, len(ids))


def _result(loaded, made: Generation, text, joules, why, stage, device, prompt_tokens) -> Result:
    method = "codebook" if models.is_quantized(loaded.model) else "dense"
    context = prompt_tokens + len(made.tokens) / 2
    token_bytes = Variant(method, loaded, {}).token_bytes(context)
    speed = made.tokens_per_s
    return Result(
        text, len(made.tokens), made.ttft_s, speed, token_bytes * speed / 1e9, joules, why, stage, device, loaded.name
    )  # fmt: skip


def describe(result: Result) -> str:
    """The closing lines of `trapetum generate`."""
    energy = (
        f"{result.joules_per_token:.3g} J/token (gross)"
        if result.joules_per_token is not None
        else f"J/token not measured: {result.why_no_energy}"
    )
    return (
        f"{result.model} at stage {result.stage} on {result.device}: {result.tokens} tokens, "
        f"first after {1e3 * result.ttft_s:.0f} ms\n"
        f"{result.tokens_per_s:.1f} tok/s, {result.gbps:.1f} GB/s of weights and cache, {energy}"
    )
