"""A dense model split over several cards, for a 16-bit baseline of a model that does not fit one.

The split is that of Shoeybi et al., Megatron-LM (arXiv:1909.08053), section 3; with two cards:

    q, k, v, gate, up   rows of the weight: a card has half of the heads and half of the MLP, and its half of the cache
    o, down             columns: each card's product is a summand of the whole one, so they are added (all_reduce)
    head                rows: a card has the logits of half of the vocabulary, sends the largest and its place (all_gather)
    embedding, norms    whole on every card

So a layer communicates twice and a token once more. Everything else is the step of `llama_step` on a model with fewer heads,
and the whole step, communication included, is one CUDA graph a token (the stage `graph`), each card replaying its own.

Not supported: codebook weights, checkpoints (random weights only), biases on o and down, a number of cards that does not
divide heads, key heads, intermediate size and vocabulary, the stages fused and pdl, and cards of different models (a seed gives
them different numbers, which is noticed).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trapetum.architectures import config_of, empty_model, make_rope
from trapetum.decode import Engine
from trapetum.decoders import GraphDecoder, LeanDecoder
from trapetum.llama_step import LlamaStep
from trapetum.memory import memory_estimate
from trapetum.models import Loaded
from trapetum.shapes import ModelShape
from trapetum.shapes import model as model_shape
from trapetum.streaming import fill, random_values

_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
_COLUMNS = ("o_proj", "down_proj")
_SUMMED_ONCE = "the cards' products are added, and with them their biases"
_WARM_UPS = 3
_PATIENCE = timedelta(minutes=5)  # with a card that does not answer


class SplitError(ValueError):
    """A model that cannot be split over so many cards; the message says why."""


# --- the cards -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cards:
    """This process among those that share a model.

    Attributes:
        rank: number of this one, from 0.
        size: how many there are.
        device: "cuda:RANK" or "cpu".
        at_end: what is called before the group ends: a group that a CUDA graph still holds does not end.
    """

    rank: int
    size: int
    device: str
    at_end: list[Callable[[], None]] = field(default_factory=list, compare=False)

    def add(self, values: Tensor) -> Tensor:
        """The sum over all cards, in place; capturable."""
        dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """[size, ...]: the tensors of all cards; capturable."""
        every = values.new_empty(self.size, *values.shape)
        dist.all_gather(list(every.unbind(0)), values.contiguous())
        return every

    def all_say(self, yes: bool) -> bool:
        """Whether every card says yes; all must ask."""
        said = torch.tensor([int(yes)], device=self.device)
        return bool(self.gather(said).min())

    def largest(self, value: float) -> float:
        """The largest of the cards' values; all must ask."""
        return float(self.gather(torch.tensor([value], dtype=torch.float64, device=self.device)).max())


@contextmanager
def joined(rank: int, size: int, device: str, init_method: str = "env://") -> Iterator[Cards]:
    """Within this context the processes of a group can talk: NCCL between GPUs, gloo between CPUs.

    Args:
        rank, size: number of this process, and of all.
        device: "cuda" (this process takes the GPU LOCAL_RANK, or of its rank) or "cpu".
        init_method: how they find each other, as for `torch.distributed.init_process_group`.

    Yields:
        what this process knows of the group.
    """
    if device == "cuda":
        index = int(os.environ.get("LOCAL_RANK", rank))
        torch.cuda.set_device(index)
        where = torch.device("cuda", index)
        backend, more = "nccl", {"device_id": where}
    else:
        where, backend, more = torch.device("cpu"), "gloo", {}
    dist.init_process_group(backend, init_method, _PATIENCE, rank=rank, world_size=size, **more)
    cards = Cards(rank, size, str(where))
    try:
        yield cards
    finally:
        for call in cards.at_end:
            call()
        dist.destroy_process_group()


# --- the weights -----------------------------------------------------------------------------------------------------


def require_divisible(shape: ModelShape, size: int) -> None:
    """Refuse a shape that so many cards cannot share evenly.

    Raises:
        SplitError: naming what does not divide, or the biases that would be added once a card.
    """
    sizes = {"heads": shape.heads, "key heads": shape.kv_heads}
    sizes |= {"intermediate size": shape.intermediate, "vocabulary": shape.vocab}
    uneven = [f"{name} ({value})" for name, value in sizes.items() if value % size]
    if uneven:
        raise SplitError(
            f"{shape.name} cannot be split over {size} cards, because that does not divide its {' and '.join(uneven)}; choose "
            "another number of cards."
        )
    biases = [name for name in shape.biases if name in _COLUMNS]
    if biases:
        raise SplitError(
            f"{shape.name} has biases on {' and '.join(biases)}, which a split does not support: {_SUMMED_ONCE}."
        )


def require_splittable(name: str, size: int) -> ModelShape:
    """The shape of a model that can be split.

    Args:
        name: "random:" and a shape of `shapes.MODELS`.
        size: cards.

    Raises:
        SplitError: another kind of model, or one that so many cards cannot share.
        ValueError: an unknown shape.
    """
    if not name.startswith("random:"):
        raise SplitError(
            f"only random weights can be split, and {name!r} is none; choose one of random:SHAPE."
        )
    shape = model_shape(name.removeprefix("random:"))
    require_divisible(shape, size)
    return shape


def share_of(name: str, value: Tensor, rank: int, size: int) -> Tensor:
    """A card's part of a parameter, contiguous and on its own.

    Args:
        name: of the parameter, as transformers has it.
        value: the whole one.
        rank, size: which of how many parts.

    Returns:
        rows of q, k, v, gate, up (with their biases) and the head, columns of o and down, all of anything else.
    """
    layer = name.split(".")[-2] if "." in name else name
    if size == 1 or layer not in _ROWS + _COLUMNS:
        return value
    return value.chunk(size, 0 if layer in _ROWS else 1)[rank].clone()


def card_estimate(shape: ModelShape, context: int, size: int, prompt: int = 0) -> dict[str, int]:
    """Bytes that one card takes while it decodes in 16 bits, by part, as `memory.memory_estimate` counts them.

    Args:
        shape: the model.
        context: tokens that the cache is made for.
        size: cards.
        prompt: tokens of a prompt that goes through at once; 0 leaves the prefill out.
    """
    whole = memory_estimate(shape, None, context, prompt=prompt)
    shared = {"weights", "output head", "KV cache"}  # a token's buffers and the embedding are on every card
    return {part: nbytes // size if part in shared else nbytes for part, nbytes in whole.items()}


@torch.no_grad()
def split_random(shape: ModelShape, cards: Cards, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """This card's part of the model that `models.random_model` makes of a shape, dtype and seed.

    Every card makes the whole of each tensor in turn and keeps its part, so it never holds more than one whole tensor
    beside its parts.

    Args:
        shape: sizes and architecture.
        cards: the group.
        dtype: of weights and activations.
        seed: of the weights.

    Returns:
        a transformers model whose config has this card's heads and intermediate size; it can run only as `SplitEngine`
        runs it, since nothing in it adds up the parts.

    Raises:
        SplitError: the shape cannot be split, or the cards made different numbers of one seed.
    """
    require_divisible(shape, cards.size)
    values = random_values(cards.device, seed)
    model = empty_model(config_of(shape), dtype)
    fill(model, lambda name, like, kept: share_of(name, values(name, like, kept), cards.rank, cards.size))
    if shape.tied_embeddings:
        rows = share_of("lm_head.weight", model.get_input_embeddings().weight, cards.rank, cards.size)
        model.lm_head.weight = nn.Parameter(rows, requires_grad=False)
    make_rope(model, cards.device)
    config = model.config
    config.num_attention_heads //= cards.size
    config.num_key_value_heads //= cards.size
    config.intermediate_size //= cards.size
    _require_same(model.get_input_embeddings().weight, cards)
    return model.eval().requires_grad_(False)


def _require_same(whole: Tensor, cards: Cards) -> None:
    sums = cards.gather(whole[:64].double().sum())
    if bool((sums != sums[0]).any()):
        raise SplitError(
            f"the {cards.size} cards made different random numbers of the same seed; use cards of one model."
        )


def load_split(name: str, cards: Cards, dtype: torch.dtype | None = None, seed: int = 0) -> Loaded:
    """This card's part of a model with random weights.

    Args:
        name: "random:" and a shape of `shapes.MODELS`.
        cards: the group.
        dtype: default fp16 on GPUs and fp32 on CPUs.
        seed: of the weights.

    Raises:
        SplitError: another kind of model, or one that cannot be split.
        ValueError: an unknown shape.
    """
    if not name.startswith("random:"):
        raise SplitError(
            f"only random weights can be split, and {name!r} is none; choose one of random:SHAPE."
        )
    shape = model_shape(name.removeprefix("random:"))
    dtype = dtype or (torch.float32 if cards.device == "cpu" else torch.float16)
    return Loaded(split_random(shape, cards, dtype, seed), None, name, shape, "random")


# --- the step --------------------------------------------------------------------------------------------------------


class Summed:
    """A product whose columns are split: the sum of all cards' products."""

    def __init__(self, product, cards: Cards):
        self._product, self._cards, self.out_features = product, cards, product.out_features

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in_features / size] to [rows, out_features], the same on all cards."""
        return self._cards.add(self._product(x))

    def rows(self, x: Tensor) -> Tensor:
        """The same for a prompt."""
        return self._cards.add(self._product.rows(x))


class SplitLogits:
    """Logits of which each card has those of its rows of the head.

    Attributes:
        mine: [rows, vocab / size].
    """

    def __init__(self, mine: Tensor, cards: Cards):
        self.mine, self._cards = mine, cards

    def argmax(self, dim: int = -1) -> Tensor:
        """The token with the largest logit, int64 [rows], the same on all cards; of equal ones on two cards the lower."""
        value, place = self.mine.max(dim)
        token = place + self._cards.rank * self.mine.shape[-1]
        pair = torch.stack([value.double(), token.double()])  # a token is exact in float64
        values, tokens = self._cards.gather(pair).unbind(1)
        return tokens.gather(0, values.argmax(0, keepdim=True))[0].long()


class SplitHead:
    """The output head, split by rows."""

    def __init__(self, product, cards: Cards):
        self._product, self._cards, self.out_features = product, cards, product.out_features

    def __call__(self, x: Tensor) -> SplitLogits:
        """[rows, hidden] to this card's logits."""
        return SplitLogits(self._product(x), self._cards)


def share_step(llama: LlamaStep, cards: Cards) -> None:
    """Let a step on a card's part of a model add up and compare with the other cards."""
    llama.layers = [
        replace(layer, out=Summed(layer.out, cards), down=Summed(layer.down, cards)) for layer in llama.layers
    ]
    llama.head = SplitHead(llama.head, cards)


class SplitGraphDecoder(GraphDecoder):
    """The step with its communication, captured on every card; run eagerly on all if one cannot capture it.

    Attributes:
        why_eager: why it is not captured, as a sentence; empty when it is.
    """

    parts = ()

    def __init__(self, model: nn.Module, max_context: int, cards: Cards):
        super().__init__(model, max_context)
        share_step(self.llama, cards)
        self._cards, self.why_eager = cards, ""
        cards.at_end.append(self._forget_graphs)

    def _forget_graphs(self) -> None:
        torch.cuda.synchronize()
        while self._graphs:
            self._graphs.popitem()[1].reset()

    def prepare(self, prompt: int, count: int) -> None:
        """Capture the steps that a generation will replay; all cards must ask."""
        why = ""
        try:
            super().prepare(prompt, count)
        except RuntimeError as error:
            why = f"a step with NCCL was not captured ({str(error).splitlines()[0]}), so it runs eagerly."
        if not self._cards.all_say(not why):
            self.capture = False
            self.why_eager = why or "another card did not capture its step, so all run eagerly."

    @torch.inference_mode()
    def _captured(self, bucket: int) -> torch.cuda.CUDAGraph:
        """As `GraphDecoder`, but only this thread's calls may break the capture: NCCL's own thread queries events."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self.llama.position.zero_()
                self.llama.advance(bucket)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self.llama.advance(bucket)
        return graph


class SplitLeanDecoder(LeanDecoder):
    """The step with its communication on CPUs, run eagerly."""

    parts = ()
    why_eager = "the step runs eagerly on CPUs."

    def __init__(self, model: nn.Module, max_context: int, cards: Cards):
        super().__init__(model, max_context)
        share_step(self.llama, cards)


class SplitEngine(Engine):
    """Greedy generation with a model that is split over cards: every card calls it with the same arguments.

    Args:
        loaded: this card's part, from `load_split` (or the model of `split_random`).
        cards: the group.
        max_context: tokens of prompt and answer together.
    """

    def __init__(self, loaded, cards: Cards, max_context: int = 1024):
        self._cards = cards
        super().__init__(loaded, "lean" if cards.device == "cpu" else "graph", max_context)

    def _make_decoder(self):
        decoder = SplitLeanDecoder if self.device.type == "cpu" else SplitGraphDecoder
        return decoder(self.model, self.max_context, self._cards)

    @property
    def why_eager(self) -> str:
        """Why the step is not replayed from a graph, as a sentence; empty when it is. Known after the first generation."""
        return self._decoder.why_eager
