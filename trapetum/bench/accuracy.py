"""What the codes cost: perplexity and weight error by bits and method."""

import time
from collections.abc import Sequence

import torch

from trapetum import models, swap
from trapetum import perplexity as ppl
from trapetum.bench.recording import Recorder
from trapetum.models import Loaded
from trapetum.quantizers import quantize
from trapetum.quantizers import weight_error as relative_error
from trapetum.records import Record
from trapetum.text import load_text, text_sha256

CALIBRATION_WINDOWS = 16
CHARACTERS_A_TOKEN = 8  # more than any tokenizer here needs, so that the text is never short


class NoText(ValueError):
    """There is no tokenizer, or not enough text."""


def perplexity(
    model_name: str = "builtin",
    device: str = "auto",
    methods: Sequence[str] = ("kmeans",),
    bits: Sequence[int] = (4,),
    profile: str = "quick",
    text: str = "builtin",
    dense: bool = True,
) -> list[Record]:
    """Measure perplexity of a model as it is (method `fp`) and quantized.

    Args:
        model_name: a model with a tokenizer: "builtin", a hub id or a directory (already quantized: as it is).
        device: "auto", "cpu" or "cuda".
        methods: quantizers, names of `trapetum.quantizers.METHODS`.
        bits: each is combined with each method.
        profile: "smoke", "quick" or "full": tokens, window and stride.
        text: as for `trapetum.text.load_text`.
        dense: measure the model as it is, too.

    Returns:
        `perplexity` records (samples: one per window; config: window, stride, tokens, text, interval), and
        `weight_error` and `quantize_time` (s) for each quantization.

    Raises:
        NoText: the model has no tokenizer, or the text is too short to calibrate on what is not scored.
    """
    recorder = Recorder(device, profile)
    loaded = models.load(model_name, recorder.device)
    tokens, unscored = _tokens(loaded, text, recorder)
    if dense or swap.is_quantized(loaded.model):
        _add_perplexity(recorder, loaded, tokens, text, *_as_it_is(loaded.model))
    if swap.is_quantized(loaded.model):
        return recorder.close()
    for b in bits:
        for method in methods:
            loaded = models.load(model_name, recorder.device)
            if _quantize(recorder, loaded, method, b, unscored):
                _add_perplexity(recorder, loaded, tokens, text, method, {"bits": b, "n_codes": 2**b})
    return recorder.close()


def _as_it_is(model) -> tuple[str, dict]:
    if not swap.is_quantized(model):
        return "fp", {"bits": torch.finfo(next(model.parameters()).dtype).bits}
    note = getattr(model.config, "quantization_config", None) or {}
    note = note if isinstance(note, dict) else note.to_dict()
    return note.get("method") or "codebook", {k: note[k] for k in ("bits", "n_codes") if k in note}


def _tokens(loaded: Loaded, text: str, recorder: Recorder) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens to score, and the ones after them, for methods that calibrate."""
    if loaded.tokenizer is None:
        raise NoText(
            f"{loaded.name} has no tokenizer, so no text can be scored; choose builtin or a checkpoint."
        )
    wanted = recorder.sizes.text_tokens
    words = load_text(text, wanted * CHARACTERS_A_TOKEN)
    ids = loaded.tokenizer(words, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    return ids[:wanted], ids[wanted:]


def _possible(method: str, bits: int) -> bool:
    return not (method == "nf4" and bits != 4)


def _calibration(tokens: torch.Tensor, window: int) -> list[torch.Tensor]:
    """Up to 16 windows of tokens that are not scored.

    Raises:
        NoText: the text ends before the first window.
    """
    rows = tokens[: len(tokens) // window * window].view(-1, window)[:CALIBRATION_WINDOWS]
    if not len(rows):
        raise NoText(f"the text has {len(tokens)} tokens beyond the scored ones; calibration needs {window}.")
    return [row.unsqueeze(0) for row in rows]


def _quantize(recorder: Recorder, loaded: Loaded, method: str, bits: int, unscored: torch.Tensor) -> bool:
    """Quantize in place and record error and time; False where the method has no such bits."""
    if not _possible(method, bits):
        return False
    needs = method == "kmeans-weighted"
    calibration = _calibration(unscored, recorder.sizes.window) if needs else None
    report = swap.quantize_model(loaded.model, bits, method, calibration=calibration, progress=False)
    config = {"model": loaded.name, "bits": bits, "n_codes": report.n_codes, "layers": len(report.errors)}
    samples = list(report.errors.values())
    recorder.add("weight_error", samples, method, config, value=report.mean_error, source=_MEAN)
    recorder.add("quantize_time", [report.seconds], method, config)
    return True


_MEAN = "mean over the layers of ||W - Q||^2 / ||W||^2; samples: one a layer"


def _add_perplexity(
    recorder: Recorder, loaded: Loaded, tokens: torch.Tensor, text: str, method: str, scheme: dict
) -> None:
    size = recorder.sizes
    start = time.perf_counter()
    found = ppl.perplexity(loaded.model, tokens, size.window, size.stride)
    seconds = time.perf_counter() - start
    per_window = [_window_perplexity(n, c) for n, c in zip(found.nll, found.counts, strict=True) if c]
    config = {
        "model": loaded.name,
        **scheme,
        "window": found.window,
        "stride": found.stride,
        "tokens": found.tokens,
        "text": text,
        "text_sha256": text_sha256(str(tokens.tolist()))[:12],
        "interval": list(found.interval),
        "seconds": round(seconds, 2),
    }
    source = "exp of the mean negative log-likelihood of all scored tokens; samples: one a window"
    recorder.add("perplexity", per_window, method, config, value=found.value, source=source)


def _window_perplexity(nll: float, count: int) -> float:
    return float(torch.tensor(nll / count, dtype=torch.float64).exp())


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
        methods: quantizers that need no calibration.
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
        for method in filter(lambda m: _possible(m, b), methods):
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
