"""The accuracy ladder: what the codes of each method cost a model, by bits, and what they take to store.

The text that is scored and the text that methods calibrate on are different documents: of the standard library, held-out
modules and topics against those that the built-in model was trained on; of a data set, the test part against the training
part; of a file, what comes first against what comes after it. Models run in float32, so that what is measured is the codes
and not the rounding of activations.
"""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trapetum import calibration, equivalence, models, swap
from trapetum.bench.accuracy_rungs import Rung, climb, rungs, stored_bits
from trapetum.bench.recording import Recorder
from trapetum.calibration import Calibration
from trapetum.layer_error import layer_errors
from trapetum.models import Loaded
from trapetum.perplexity import Divergence, Perplexity, against, bootstrap_interval
from trapetum.perplexity import perplexity as score
from trapetum.quantizers import METHODS, quantize
from trapetum.quantizers import weight_error as relative_error
from trapetum.records import Record
from trapetum.text import load_text, text_sha256

#: By profile: calibration seeds, sequences of a calibration, windows that layer errors are taken over.
EFFORT = {"smoke": (1, 4, 1), "quick": (1, 32, 4), "full": (3, 128, 8)}
LONGEST = 2048  # tokens of a calibration sequence
CHARACTERS_A_TOKEN = 8  # more than any tokenizer here needs, so that the text is never short


class NoText(ValueError):
    """There is no tokenizer, or not enough text."""


@dataclass(frozen=True)
class Protocol:
    """What every model of a ladder is scored on.

    Attributes:
        tokens: token ids to score, one dimension.
        window, stride: as for `trapetum.perplexity.perplexity`.
        text: the text's name.
        layer_windows: how many windows layer errors are taken over.
    """

    tokens: torch.Tensor
    window: int
    stride: int
    text: str
    layer_windows: int

    @property
    def config(self) -> dict:
        """What a record says of it."""
        sha256 = text_sha256(str(self.tokens.tolist()))[:12]
        return {"window": self.window, "stride": self.stride, "text": self.text, "text_sha256": sha256}


@dataclass(frozen=True)
class Climbed:
    """A rung with one seed: how the quantized model scored."""

    perplexity: Perplexity
    divergence: Divergence
    layers: list[float]
    weights: dict[str, float]
    bits: float
    seconds: float


def accuracy(*args, **options) -> list[Record]:
    """All records of `accuracy_by_rung`, which takes the same arguments."""
    return [record for found in accuracy_by_rung(*args, **options) for record in found]


def accuracy_by_rung(
    model_name: str = "builtin",
    device: str = "auto",
    methods: Sequence[str] = ("kmeans",),
    bits: Sequence[int] = (4,),
    profile: str = "quick",
    text: str = "builtin",
    stress: bool = False,
    seeds: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    calibrate: str | None = None,
    dense: bool = True,
) -> Iterator[list[Record]]:
    """Score a model as it is (method `fp`) and quantized, rung by rung.

    Two copies of the model are in memory at once, in float32.

    Args:
        model_name: a model with a tokenizer: "builtin", a hub id or a directory (already quantized: as it is).
        device: "auto", "cpu" or "cuda".
        methods: names of `trapetum.quantizers.METHODS`, `rtn-128` or `additive`; with `+sparse` 0.45 % of the weights are
            kept apart. A method that has no such bits is left out there.
        bits: each is combined with each method.
        profile: "smoke", "quick" or "full": tokens, window and stride, seeds and size of the calibration.
        text: what is scored, as for `trapetum.text.load_text`.
        stress: fold outlier channels into the weights first (`trapetum.equivalence.stress`). The function stays the same; the
            model's name in the records differs, so that nothing mixes the two.
        seeds: calibrations, each of other windows of the text; default by profile. Methods without data need one.
        window, stride, tokens: default by profile.
        calibrate: the text to calibrate on, as for `trapetum.calibration.read`; default the other documents of `text`.
        dense: score the model as it is, too.

    Yields:
        the records of one rung: `perplexity` (samples: one a window; config: window, stride, tokens, text, interval, and
        `by_seed`), `kl_divergence` and `top1_agreement` (samples: one a seed), `layer_error` and `weight_error` (samples:
        one a layer), `bits_per_weight` and `quantize_time`.

    Raises:
        NoText: the model has no tokenizer, or the text is too short to calibrate on what is not scored.
        ValueError: an unknown method.
    """
    steps, recorder = list(rungs(methods, bits)), Recorder(device, profile)
    loaded = models.load(model_name, recorder.device, dtype="fp32")
    more_seeds, sequences, layer_windows = EFFORT[profile]
    ids, unscored = _tokens(loaded, text, tokens or recorder.sizes.text_tokens)
    window = window or recorder.sizes.window
    sizes = recorder.sizes
    protocol = Protocol(ids, window, stride or min(window, sizes.stride), Path(text).name, layer_windows)
    named = {"model": _name(loaded)}
    if stress:
        named = {"model": f"{_name(loaded)}, stressed", "stress": equivalence.stress(loaded.model).text}
    if dense or swap.is_quantized(loaded.model):
        yield _as_it_is(recorder, loaded.model, protocol, named)
    if swap.is_quantized(loaded.model):
        return
    shown = Shown(loaded, calibrate or text, sequences, None if calibrate else unscored)
    windows = (
        [shown.take(seed) for seed in range(seeds or more_seeds)] if any(s.seeded for s in steps) else []
    )
    for step in steps:
        recorder = Recorder(device, profile)
        tries = windows if step.seeded else [None]
        found = [_climbed(loaded.model, step, one, protocol) for one in tries]
        yield _records(recorder, step, tries, found, protocol, named)


def _name(loaded: Loaded) -> str:
    """The model's name; of a directory its last part, since where it lies is nobody's business."""
    return Path(loaded.name).name if loaded.kind == "directory" else loaded.name


def _tokens(loaded: Loaded, text: str, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens to score, and the ones that come after them."""
    if loaded.tokenizer is None:
        raise NoText(
            f"{loaded.name} has no tokenizer, so no text can be scored; choose builtin or a checkpoint."
        )
    words = load_text(text, 2 * wanted * CHARACTERS_A_TOKEN)
    ids = loaded.tokenizer(words, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    return ids[:wanted], ids[wanted:]


@dataclass(frozen=True)
class Shown:
    """The text that methods calibrate on.

    Attributes:
        loaded: the model, for its tokenizer and context.
        text: a name that `trapetum.calibration.read` knows, or a file.
        sequences: of a calibration.
        rest: for a file that is also scored: its tokens behind the scored ones; else None.
    """

    loaded: Loaded
    text: str
    sequences: int
    rest: torch.Tensor | None

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return min(LONGEST, self.loaded.model.config.max_position_embeddings)

    def take(self, seed: int) -> Calibration:
        """Windows by seed.

        Raises:
            NoText: the file ends before the first window.
        """
        vocab = self.loaded.model.config.vocab_size
        if self.rest is None or not Path(self.text).is_file():
            return calibration.take(
                self.loaded.tokenizer, self.text, self.sequences, self.length, seed, vocab
            )
        length = min(self.length, len(self.rest) // 2)
        if length < 2:
            raise NoText(
                f"the text has {len(self.rest)} tokens beyond the scored ones, too few to calibrate on; give a longer text, "
                "score fewer tokens (--tokens), or name another text to calibrate on."
            )
        starts = torch.randint(
            len(self.rest) - length + 1, (self.sequences,), generator=torch.Generator().manual_seed(seed)
        )
        rows = [self.rest[at : at + length] for at in starts.tolist()]
        return calibration.made_of(rows, f"{Path(self.text).name}, behind what is scored", seed)


def _as_it_is(recorder: Recorder, model: nn.Module, protocol: Protocol, named: dict) -> list[Record]:
    method, scheme = "fp", {"bits": torch.finfo(next(model.parameters()).dtype).bits}
    if swap.is_quantized(model):
        note = getattr(model.config, "quantization_config", None) or {}
        note = note if isinstance(note, dict) else note.to_dict()
        method, scheme = (
            note.get("method") or "codebook",
            {k: note[k] for k in ("bits", "n_codes") if k in note},
        )
    start = time.perf_counter()
    found = score(model, protocol.tokens, protocol.window, protocol.stride)
    _add_perplexity(recorder, [found], method, named | scheme, protocol, time.perf_counter() - start)
    return recorder.close()


def _climbed(reference: nn.Module, step: Rung, tokens: Calibration | None, protocol: Protocol) -> Climbed:
    """Quantize a copy of the model and score it."""
    model = copy.deepcopy(reference)
    report = climb(model, step, tokens)
    found = against(reference, model, protocol.tokens, protocol.window, protocol.stride)
    some = protocol.tokens[: protocol.window * protocol.layer_windows]
    errors = layer_errors(reference, model, some, min(protocol.window, len(some)))
    return Climbed(*found, errors, report.errors, stored_bits(reference, model), report.seconds)


def _records(
    recorder: Recorder,
    step: Rung,
    shown: Sequence[Calibration | None],
    found: Sequence[Climbed],
    protocol: Protocol,
    named: dict,
) -> list[Record]:
    scheme = named | step.config
    if shown[0] is not None:
        said = {"text": shown[0].text, "sequences": len(shown[0].rows), "tokens": shown[0].tokens}
        scheme |= {"seeds": [one.seed for one in shown], "calibration": said}
    scored = protocol.config | {"tokens": found[0].perplexity.tokens}
    stored = round(found[0].bits, 4)
    _add_perplexity(
        recorder, [f.perplexity for f in found], step.method, scheme | {"stored_bits": stored}, protocol
    )
    against_fp = scheme | scored | {"baseline": "fp"}
    recorder.add(
        "kl_divergence", [max(0.0, f.divergence.kl) for f in found], step.method, against_fp, source=_SEEDS
    )
    recorder.add(
        "top1_agreement", [f.divergence.agreement for f in found], step.method, against_fp, source=_SEEDS
    )
    layers = [_mean(values) for values in zip(*(f.layers for f in found), strict=True)]
    recorder.add(
        "layer_error",
        layers,
        step.method,
        scheme | {"layers": len(layers)},
        value=_mean(layers),
        source=_LAYERS,
    )
    weights = [_mean(values) for values in zip(*(f.weights.values() for f in found), strict=True)]
    recorder.add(
        "weight_error",
        weights,
        step.method,
        scheme | {"layers": len(weights)},
        value=_mean(weights),
        source=_MEAN,
    )
    recorder.add("bits_per_weight", [f.bits for f in found], step.method, scheme, source=_BITS)
    recorder.add("quantize_time", [f.seconds for f in found], step.method, scheme)
    return recorder.close()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_MEAN = "mean over the layers of ||W - Q||^2 / ||W||^2; samples: one a layer, mean over seeds"
_LAYERS = "mean over decoder layers of ||added' - added|| / ||added|| on exact inputs; samples: one a layer, mean over seeds"
_SEEDS = "samples: one a calibration seed"
_BITS = "bytes of the model less those of its unquantized part in 16 bits, over the weights of the quantized linears"
_PERPLEXITY = "exp of the mean negative log-likelihood of all scored tokens and seeds; samples: one a window, mean over seeds"


def _add_perplexity(
    recorder: Recorder,
    found: Sequence[Perplexity],
    method: str,
    scheme: dict,
    protocol: Protocol,
    seconds: float | None = None,
) -> None:
    pooled = pool(found)
    per_window = [math.exp(n / c) for n, c in zip(pooled.nll, pooled.counts, strict=True) if c]
    config = {**scheme, **protocol.config, "tokens": pooled.tokens, "interval": list(pooled.interval)}
    config |= {"dtype": "fp32"}
    config |= {"by_seed": [one.value for one in found]} if len(found) > 1 else {}
    config |= {"seconds": round(seconds, 2)} if seconds is not None else {}
    recorder.add("perplexity", per_window, method, config, value=pooled.value, source=_PERPLEXITY)


def pool(found: Sequence[Perplexity]) -> Perplexity:
    """Several models on the same windows as one: mean losses window by window, and the interval over windows of those."""
    first, n = found[0], len(found)
    nll = tuple(sum(losses) / n for losses in zip(*(one.nll for one in found), strict=True))
    value = math.exp(sum(nll) / first.tokens)
    interval = first.interval if n == 1 else bootstrap_interval(np.array(nll), np.array(first.counts))
    return replace(first, nll=nll, value=value, interval=interval)


def weight_error(
    weight: torch.Tensor | None = None,
    methods: Sequence[str] = ("rtn", "lloyd", "kmeans"),
    bits: Sequence[int] = (8, 4, 3, 2),
    profile: str = "quick",
    name: str = "normal",
    device: str = "cpu",
) -> list[Record]:
    """Measure the relative squared error of quantizing one matrix.

    Args:
        weight: [out_features, in_features]; None for Gaussian weights of a size that the profile names.
        methods: quantizers that need no calibration; those that cannot do some bits are left out there.
        bits: each is combined with each method.
        profile: "smoke", "quick" or "full".
        name: what the weight is, for config.
        device: where to quantize.

    Returns:
        `weight_error` and `quantize_time` records, one of each per method and bits.
    """
    recorder = Recorder(device, profile)
    if weight is None:
        side = {"smoke": 128, "quick": 1024, "full": 4096}[profile]
        weight = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    weight = weight.to(recorder.device)
    for b in bits:
        for method in (m for m in methods if b in METHODS[m].bits):
            start = time.perf_counter()
            quantized = quantize(weight, b, method, name=name)
            seconds = time.perf_counter() - start
            config = {
                "weight": name,
                "in_features": weight.shape[1],
                "out_features": weight.shape[0],
                "bits": b,
                "n_codes": quantized.n_codes,
            }
            recorder.add("weight_error", [float(relative_error(weight, quantized))], method, config)
            recorder.add("quantize_time", [seconds], method, config)
    return recorder.close()
