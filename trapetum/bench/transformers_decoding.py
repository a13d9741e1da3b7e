"""Greedy decoding by transformers itself: its growing cache run eagerly, or its static cache with a compiled step."""

import inspect
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from trapetum.bench.products import NotPossible
from trapetum.decode import Generation

_COMPILE = {"mode": "reduce-overhead", "fullgraph": True}


class TransformersDecoder:
    """Batch-1 greedy generation with a transformers model, a token a call of its forward.

    Plain: a growing cache, and each token is read back before the next call, as `generate` does.
    Compiled: a static cache, the step under `torch.compile(mode="reduce-overhead", fullgraph=True)`, prefill eager; token and
    position stay on the device, and the next step is queued before a token is read back.

    Attributes:
        model: a causal language model on one device.
        max_context: places of the static cache.
    """

    def __init__(self, model: nn.Module, max_context: int, compiled: bool = False, static: bool = False):
        """Make a decoder; nothing is compiled before the first token.

        Args:
            model: in eval mode.
            max_context: tokens of prompt and answer together.
            compiled: compile the step. On CUDA only.
            static: a static cache, also where nothing is compiled.

        Raises:
            NotPossible: compiling was asked for where there are no CUDA graphs.
        """
        self.model, self.max_context = model, max_context
        self.device = model.get_input_embeddings().weight.device
        if compiled and self.device.type != "cuda":
            raise NotPossible(
                f"mode reduce-overhead is CUDA graphs, and the model is on {self.device.type}; transformers runs eagerly here."
            )
        self._cache, self._compiled = None, compiled
        self._places = _takes_places(model)
        self._step = self._one
        if compiled or static:
            self._cache = self._static_cache()
        if compiled:
            torch._dynamo.reset()  # graphs of a peer before this one would count towards the limit of recompilations
            self._step = torch.compile(self._one, **_COMPILE)

    def _static_cache(self):
        from transformers import StaticCache

        return StaticCache(config=self.model.config, max_cache_len=self.max_context)

    def _fresh_cache(self):
        """An empty cache: the static one keeps its addresses, which captured graphs hold."""
        if self._cache is not None:
            self._cache.reset()
            return self._cache
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def _forward(self, token: Tensor, cache, **places) -> Tensor:
        output = self.model(token, past_key_values=cache, use_cache=True, logits_to_keep=1, **places)
        return output.logits[:, -1].argmax(-1, keepdim=True)

    def _one(self, token: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """The token after `token` [1, 1] at `position` [1] of the static cache, and the next position."""
        places = {"position_ids": position.unsqueeze(0)}
        if self._places:
            places["cache_position"] = position
        return self._forward(token, self._cache, **places), position + 1

    def _start(self, ids: Tensor) -> Tensor:
        return self._forward(ids.unsqueeze(0), self._fresh_cache())

    @torch.no_grad()
    def _grown(self, ids: Tensor, count: int) -> Iterator[int]:
        cache = self._fresh_cache()
        token = ids.unsqueeze(0)
        for _ in range(count):
            token = self._forward(token, cache)
            yield int(token)

    @torch.no_grad()
    def _placed(self, ids: Tensor, count: int) -> Iterator[int]:
        token, position = self._start(ids), torch.tensor([len(ids)], device=self.device)
        for made in range(1, count + 1):
            ready = _Fetch(token)
            if made < count:
                token, position = self._next(token, position)
            yield ready.value()

    def _next(self, token: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()
        token, position = self._step(token, position)
        return token.clone(), position.clone()  # the next replay writes where these lie

    def generate(self, prompt_ids: Sequence[int], new_tokens: int) -> Generation:
        """Generate `new_tokens` tokens greedily after `prompt_ids`, timed as `trapetum.decode.Engine.generate` times them.

        Raises:
            NotPossible: prompt and answer need more than `max_context` places.
        """
        if len(prompt_ids) + new_tokens > self.max_context:
            raise NotPossible(
                f"{len(prompt_ids)} + {new_tokens} tokens need more than the {self.max_context} places of this cache."
            )
        ids = torch.tensor(list(prompt_ids), device=self.device)
        make = self._placed if self._cache is not None else self._grown
        tokens, times = [], [time.perf_counter()]
        for token in make(ids, new_tokens):
            times.append(time.perf_counter())
            tokens.append(token)
        spans = [after - before for before, after in zip(times, times[1:], strict=False)]
        return Generation(tokens, spans[0], spans[1:])

    def close(self) -> None:
        """Give back what compiling holds: captured graphs and their memory."""
        self._cache, self._step = None, None
        if self._compiled:
            torch._dynamo.reset()


class _Fetch:
    """A token on its way to the host; on CUDA later work can be queued before it is waited for."""

    def __init__(self, token: Tensor):
        self._done = None
        if not token.is_cuda:
            self._host = token
            return
        self._host = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
        self._host.copy_(token, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def value(self) -> int:
        if self._done is not None:
            self._done.synchronize()
        return int(self._host)


def _takes_places(model: nn.Module) -> bool:
    """Whether this release of transformers is told the places of the cache; later ones keep them in the cache."""
    inner = getattr(model, "model", model)
    return "cache_position" in inspect.signature(inner.forward).parameters
