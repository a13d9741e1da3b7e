"""Perplexity over sliding windows, with its interval, and the divergence between two models.

A perplexity without its window, stride and token count means nothing, so the result carries all three.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

_LOGITS_AT_ONCE = 2**26  # 256 MiB in float32


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was taken over.

    Attributes:
        value: exp of the mean negative log-likelihood per token.
        window: tokens a forward pass sees.
        stride: tokens between the starts of two windows.
        tokens: tokens that were scored.
        nll: summed negative log-likelihood of each window's scored tokens, nats.
        counts: scored tokens of each window.
        interval: 95 % bootstrap interval of `value`, resampling windows.
    """

    value: float
    window: int
    stride: int
    tokens: int
    nll: tuple[float, ...]
    counts: tuple[int, ...]
    interval: tuple[float, float]


@dataclass(frozen=True)
class Divergence:
    """How far a model's next-token distributions are from a reference's.

    Attributes:
        kl: mean Kullback-Leibler divergence KL(reference || model) per token, nats.
        agreement: share of tokens where both rank the same token first.
        window, stride, tokens: as in `Perplexity`.
    """

    kl: float
    agreement: float
    window: int
    stride: int
    tokens: int


def spans(tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """The windows over a text: (start, end, first scored position), the position counted in the whole text.

    Each token is scored once at most, with as much context as its window has; the first token of a window is scored
    only if the window before overlaps it, so at `stride == window` each window scores `window - 1` tokens.

    Raises:
        ValueError: the text, window or stride is too short, or the stride leaves gaps.
    """
    if not 1 <= stride <= window or window < 2:
        raise ValueError(
            f"window {window} and stride {stride} do not fit; use 2 <= window and 1 <= stride <= window."
        )
    if tokens < 2:
        raise ValueError(f"a text of {tokens} tokens has nothing to predict; give at least 2.")
    found, scored = [], 1
    for start in range(0, tokens, stride):
        end = min(start + window, tokens)
        first = max(scored, start + 1)
        if first < end:
            found.append((start, end, first))
        scored = end
        if end == tokens:
            break
    return found


def _batches(tokens: torch.Tensor, window: int, stride: int, batch: int) -> Iterator[tuple]:
    """Padded inputs [batch, window] and the mask [batch, window - 1] of the predictions that are scored."""
    places = spans(len(tokens), window, stride)
    for at in range(0, len(places), batch):
        group = places[at : at + batch]
        longest = max(end - start for start, end, _ in group)
        ids = torch.zeros(len(group), longest, dtype=torch.long)
        mask = torch.zeros(len(group), longest - 1, dtype=torch.bool)
        for row, (start, end, first) in enumerate(group):
            ids[row, : end - start] = tokens[start:end]
            mask[row, first - start - 1 : end - start - 1] = True
        yield ids, mask


def _logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Next-token logits [batch, n - 1, vocabulary] in float32; padding lies behind what is scored, so no mask."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1].float()


def _prepare(
    model, tokens, window: int, max_tokens: int | None, batch: int | None
) -> tuple[torch.Tensor, int]:
    tokens = torch.as_tensor(tokens, dtype=torch.long).flatten().cpu()[:max_tokens]
    vocabulary = model.config.vocab_size
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise ValueError(
            f"tokens run from {int(tokens.min())} to {int(tokens.max())}, but the model knows 0 to {vocabulary - 1}; "
            "tokenize with the model's own tokenizer."
        )
    return tokens, batch or max(1, _LOGITS_AT_ONCE // (window * vocabulary))


def bootstrap_interval(
    nll: np.ndarray, counts: np.ndarray, n_boot: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """The percentile interval of exp(sum nll / sum counts) over windows drawn with replacement.

    It is the sampling error of the text, not of the model; neighbouring windows are taken as independent.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(nll), size=(n_boot, len(nll)))
    values = np.exp(nll[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _losses(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods [batch, n - 1] in float64, 0 where nothing is scored."""
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view_as(mask).double().masked_fill(~mask, 0)


class _Windows:
    """Sums over windows as they are scored."""

    def __init__(self, window: int, stride: int):
        self.window, self.stride, self.nll, self.counts = window, stride, [], []

    def add(self, losses: torch.Tensor, mask: torch.Tensor) -> None:
        self.nll += losses.sum(1).tolist()
        self.counts += mask.sum(1).tolist()

    def done(self) -> Perplexity:
        nll, counts, total = tuple(self.nll), tuple(self.counts), sum(self.counts)
        interval = bootstrap_interval(np.array(nll), np.array(counts))
        return Perplexity(math.exp(sum(nll) / total), self.window, self.stride, total, nll, counts, interval)


@torch.inference_mode()
def perplexity(
    model,
    tokens,
    window: int = 512,
    stride: int = 512,
    max_tokens: int | None = None,
    batch: int | None = None,
) -> Perplexity:
    """Measure a model's perplexity on a text.

    Args:
        model: a causal language model of transformers, on any device.
        tokens: token ids, int, one dimension.
        window: tokens a forward pass sees, at most the model's context.
        stride: tokens between windows; smaller than `window` gives each scored token more context and costs time.
        max_tokens: use only this many tokens from the start.
        batch: windows a forward pass; by default as many as keep the logits under 256 MiB.

    Returns:
        the perplexity, its interval and what it was taken over.

    Raises:
        ValueError: too few tokens, a token outside the vocabulary, or window and stride do not fit.

    Source: the strided evaluation of the transformers documentation ("Perplexity of fixed-length models").
    """
    tokens, batch = _prepare(model, tokens, window, max_tokens, batch)
    device, found = next(model.parameters()).device, _Windows(window, stride)
    for ids, mask in _batches(tokens, window, stride, batch):
        ids, mask = ids.to(device), mask.to(device)
        found.add(_losses(_logits(model, ids), ids, mask), mask)
    return found.done()


def divergence(
    reference, model, tokens, window: int = 512, stride: int = 512, max_tokens: int | None = None, batch=None
) -> Divergence:
    """Compare a model, say a quantized one, with its reference, token by token.

    Args:
        reference, model: causal language models with one vocabulary; each stays on its device.
        tokens, window, stride, max_tokens, batch: as in `perplexity`.

    Returns:
        the mean divergence and how often the first choices agree.

    Raises:
        ValueError: as in `perplexity`, or the vocabularies differ.
    """
    return against(reference, model, tokens, window, stride, max_tokens, batch)[1]


@torch.inference_mode()
def against(
    reference, model, tokens, window: int = 512, stride: int = 512, max_tokens: int | None = None, batch=None
) -> tuple[Perplexity, Divergence]:
    """`perplexity` of `model` and its `divergence` from `reference` in one pass over the text; arguments as there.

    Raises:
        ValueError: as `divergence`.
    """
    sizes = reference.config.vocab_size, model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the vocabularies differ ({sizes[0]} and {sizes[1]} tokens); compare like with like."
        )
    tokens, batch = _prepare(reference, tokens, window, max_tokens, batch)
    here, there = (next(m.parameters()).device for m in (reference, model))
    found, kl, same = _Windows(window, stride), 0.0, 0.0
    for ids, mask in _batches(tokens, window, stride, batch):
        ids, mask = ids.to(here), mask.to(here)
        logits = _logits(model, ids.to(there)).to(here)
        found.add(_losses(logits, ids, mask), mask)
        p, q = _logits(reference, ids).log_softmax(-1), logits.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum(-1).double()[mask].sum())
        same += float((p.argmax(-1) == q.argmax(-1))[mask].sum())
    total = sum(found.counts)
    return found.done(), Divergence(kl / total, same / total, window, stride, total)
