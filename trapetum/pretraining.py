"""A short training run of a small language model on little text, made to stop before it learns the text by heart.

The learning rate is held until the validation loss stops falling or most of the time is gone, then goes to zero from
the best weights so far; the weights with the lowest validation loss are kept. While the rate falls, the mix leans to
documentation. Every text is seen tens of times, so dropout is on and AdamW's weight decay is several times the usual:
the first run, without dropout, knew the text by heart long before its time was up.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Recipe:
    """What decides a run, apart from the data and the shape.

    Attributes:
        seconds: wall time for the whole run, data preparation included; ignored where `steps` is given.
        steps: optimizer steps; None to go by `seconds`.
        batch, context: sequences a step, and tokens a sequence.
        learning_rate, weight_decay, betas, warmup_steps, clip: AdamW's, the norm at which gradients are clipped.
        hold: share of the run at the full rate, unless the validation loss stops falling before.
        eval_every, patience: steps between evaluations; evaluations without progress that end the hold.
        dropout: of the embeddings and of what each attention and MLP adds, while training.
        mix, final_mix: how often a text is seen against the others, by its kind, while holding and while falling.
        seed: of initial weights and sampling.
    """

    seconds: float = 200.0
    steps: int | None = None
    batch: int = 64
    context: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.5
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 200
    clip: float = 1.0
    hold: float = 0.7
    eval_every: int = 200
    patience: int = 5
    dropout: float = 0.2
    mix: Mapping[str, float] = field(
        default_factory=lambda: {"topics": 3.0, "docstrings": 2.0, "sources": 1.0, "tests": 0.5}
    )
    final_mix: Mapping[str, float] = field(
        default_factory=lambda: {"topics": 4.0, "docstrings": 4.0, "sources": 1.0, "tests": 0.1}
    )
    seed: int = 0

    def __post_init__(self):
        """Fit warm-up and evaluations into a run of few steps."""
        if self.steps is not None:
            tenth = max(1, self.steps // 10)
            object.__setattr__(self, "warmup_steps", min(self.warmup_steps, tenth))
            object.__setattr__(self, "eval_every", min(self.eval_every, tenth))


def rows_by_kind(mix: Mapping[str, float], tokens: Mapping[str, int], batch: int) -> dict[str, int]:
    """Sequences of each kind in a batch, in proportion to its tokens times its weight in `mix`, by largest remainder.

    Going by tokens keeps a kind that a distribution left out nearly empty from being seen over and over.
    """
    wanted = {kind: mix.get(kind, 0.0) * count for kind, count in tokens.items()}
    total = sum(wanted.values())
    exact = {kind: batch * share / total for kind, share in wanted.items()}
    rows = {kind: int(value) for kind, value in exact.items()}
    by_remainder = sorted(exact, key=lambda kind: rows[kind] - exact[kind])
    for kind in by_remainder[: batch - sum(rows.values())]:
        rows[kind] += 1
    return rows


@contextlib.contextmanager
def dropout(model: torch.nn.Module, p: float) -> Iterator[None]:
    """Drop features of a Llama's embeddings and of what each attention and MLP adds, in training mode, for a while.

    Forward hooks do it, so the model stays one of transformers, whose Llama has no dropout there.
    """

    def drop(module, _inputs, output):
        if isinstance(output, tuple):
            return (F.dropout(output[0], p, module.training), *output[1:])
        return F.dropout(output, p, module.training)

    layers = model.model.layers
    places = [model.model.embed_tokens, *(part for layer in layers for part in (layer.self_attn, layer.mlp))]
    hooks = [place.register_forward_hook(drop) for place in places] if p else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Sampler:
    """Draws batches at random places of token streams that live on the device.

    Args:
        streams: kind -> token ids, int32, one dimension, longer than `context`.
        context: tokens a sequence.
        seed: of the places.
    """

    def __init__(self, streams: Mapping[str, torch.Tensor], context: int, seed: int):
        self.streams = {kind: stream for kind, stream in streams.items() if len(stream) > context + 1}
        if not self.streams:
            raise ValueError(f"no text is longer than a sequence of {context} tokens; give more text.")
        self.device = next(iter(self.streams.values())).device
        self.reach = torch.arange(context + 1, device=self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def draw(self, mix: Mapping[str, float], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64 [batch, context]."""
        parts = []
        tokens = {kind: len(stream) for kind, stream in self.streams.items()}
        for kind, rows in rows_by_kind(mix, tokens, batch).items():
            stream = self.streams[kind]
            high = len(stream) - len(self.reach) + 1
            start = torch.randint(high, (rows, 1), generator=self.generator, device=self.device)
            parts.append(stream[start + self.reach])
        drawn = torch.cat(parts).long()
        return drawn[:, :-1], drawn[:, 1:]


class Schedule:
    """Warm up, hold, then fall to zero over a time in proportion to the hold.

    The fall starts at `hold` of the run or when the validation loss has not improved for `patience` evaluations.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.fall_at, self.best, self.best_step, self.stale = recipe, None, math.inf, 0, 0

    def tick(self, step: int, progress: float) -> bool:
        """Start the fall when it is time for it.

        Args:
            step: the step that comes next.
            progress: share of the run that is gone, 0 to 1.

        Returns:
            whether the fall starts now and should start from the best weights, since the last are worse.
        """
        worse = self.stale >= self.recipe.patience
        if self.fall_at is not None or not (worse or progress >= self.recipe.hold):
            return False
        self.fall_at, self.held = max(1, step), max(1, self.best_step if worse else step)
        return worse

    def observe(self, step: int, loss: float) -> None:
        """Take a validation loss, nats per token, into account."""
        if loss < self.best - 2e-3:
            self.best, self.best_step, self.stale = loss, step, 0
        else:
            self.stale += 1

    @property
    def fall_steps(self) -> int:
        """Steps from the start of the fall to the end; a run by time leaves itself 3 % of them as a margin."""
        share = (1 - self.recipe.hold) / self.recipe.hold
        if self.recipe.steps is None:
            return max(1, round(self.held * share * 0.97))
        return max(1, min(self.recipe.steps - self.fall_at, math.ceil(self.held * share)))

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        warm = min(1.0, (step + 1) / self.recipe.warmup_steps)
        fall = 1.0 if self.fall_at is None else max(0.0, 1 - (step - self.fall_at) / self.fall_steps)
        return self.recipe.learning_rate * min(warm, fall)

    def done(self, step: int) -> bool:
        return self.fall_at is not None and step >= self.fall_at + self.fall_steps


def _optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    on_gpu = matrices[0].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=on_gpu)


def _loss(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.device.type == "cuda"):
        logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def mean_loss(model: torch.nn.Module, stream: torch.Tensor, context: int, sequences: int = 48) -> float:
    """Mean loss in nats per token over evenly spaced sequences of a stream."""
    count = min(sequences, (len(stream) - 1) // context)
    starts = torch.linspace(0, len(stream) - context - 1, count, device=stream.device).long()
    rows = stream[starts[:, None] + torch.arange(context + 1, device=stream.device)].long()
    parts = [_loss(model, r[:, :-1], r[:, 1:]) * len(r) for r in rows.split(16)]
    return float(sum(parts) / count)


def evaluate(model: torch.nn.Module, streams: Mapping[str, torch.Tensor], context: int) -> dict[str, float]:
    """`mean_loss` by kind, of the kinds that fill a sequence, in evaluation mode."""
    model.eval()
    found = {kind: mean_loss(model, s, context) for kind, s in streams.items() if len(s) > context + 1}
    model.train()
    if not found:
        raise ValueError(
            f"no text to evaluate on is longer than a sequence of {context} tokens; give more text."
        )
    return found


def _step(model, optimizer, batch, rate: float, clip: float) -> torch.Tensor:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = _loss(model, *batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _keep(model: torch.nn.Module, kept: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        kept[name] = value.detach().clone()


def run(
    model: torch.nn.Module,
    streams: Mapping[str, Mapping[str, torch.Tensor]],
    recipe: Recipe,
    started: float,
    log: Callable[[dict], None],
) -> dict:
    """Train a model in place and leave it with the weights of the lowest validation loss.

    Args:
        model: causal language model of transformers, float32 weights, on its device.
        streams: `train`, `validation` and `heldout`, each kind -> token ids on the same device. Held-out losses are
            logged and decide nothing.
        recipe: the run.
        started: `time.monotonic()` when the run's clock began.
        log: called with each row: step, tokens, seconds, learning_rate, train_loss, validation_loss, heldout_loss.

    Returns:
        the row of the weights kept.
    """
    sampler = Sampler(streams["train"], recipe.context, recipe.seed)
    optimizer, schedule = _optimizer(model, recipe), Schedule(recipe)
    kept, best = {}, None
    loop_started, step, losses = time.monotonic(), 0, []
    model.train()
    torch.manual_seed(recipe.seed)
    with dropout(model, recipe.dropout):
        while True:
            if step % recipe.eval_every == 0 or schedule.done(step):
                row = _row(model, streams, recipe, schedule, started, step, losses)
                log(row)
                losses = []
                if best is None or row["validation_loss"] < best["validation_loss"]:
                    best = row
                    _keep(model, kept)
                if schedule.done(step):
                    break
                schedule.observe(step, row["validation_loss"])
            if schedule.tick(step, _progress(recipe, step, started, loop_started)):
                model.load_state_dict(kept)
            batch = sampler.draw(recipe.mix if schedule.fall_at is None else recipe.final_mix, recipe.batch)
            losses.append(_step(model, optimizer, batch, schedule.rate(step), recipe.clip))
            step += 1
    model.load_state_dict(kept)
    return best


def _progress(recipe: Recipe, step: int, started: float, loop_started: float) -> float:
    """Share of the run that is gone; by time, it counts the loop's share of what preparation left."""
    if recipe.steps is not None:
        return step / recipe.steps
    now, end = time.monotonic(), started + recipe.seconds
    return (now - loop_started) / max(1e-9, end - loop_started)


def _row(model, streams, recipe, schedule, started, step, losses) -> dict:
    validation = evaluate(model, streams["validation"], recipe.context)
    heldout = evaluate(model, streams["heldout"], recipe.context)
    return {
        "step": step,
        "tokens": step * recipe.batch * recipe.context,
        "seconds": round(time.monotonic() - started, 2),
        "learning_rate": schedule.rate(step),
        "train_loss": float(torch.stack(losses).mean()) if losses else None,
        "validation_loss": sum(validation.values()) / len(validation),
        "heldout_loss": sum(heldout.values()) / len(heldout),
        "heldout_loss_by_kind": heldout,
    }
