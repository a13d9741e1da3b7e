"""How a token is made at each stage: the transformers tree, the own step run eagerly, as a CUDA graph, and fused."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trapetum.fused_step import PARTS, FusedStep
from trapetum.llama_step import Live, LlamaStep, Padded, activation_dtype
from trapetum.swap import CODED, coded_layers

_SMALLEST_BUCKET = 128
_WARM_UPS = 3


class TreeDecoder:
    """The transformers module tree, called once a token.

    `naive`: a growing cache, and the codebook kernel between casts to float32 and back. `cast_free`: no casts (on the CPU
    the activations stay float32, as the kernel takes them, and only a 16-bit head converts its input), and on CUDA
    a static cache; on the CPU a static cache would be read to its full length, so it stays a growing one.
    """

    def __init__(self, model: nn.Module, casts: bool, max_context: int):
        self._model, self._casts, self._max_context = model, casts, max_context
        self._device = model.get_input_embeddings().weight.device
        self._codebooks = [layer for _, layer in coded_layers(model)]
        self._growing = casts or self._device.type == "cpu"
        self.parts = ("linears", "casts") if casts and self._codebooks else ("linears",)

    def prepare(self, prompt: int, count: int) -> None:
        """Arrange the codes for the kernel before the clock starts."""
        for layer in self._codebooks:
            layer.prepare()

    def _cache(self):
        from transformers import DynamicCache, StaticCache

        if self._growing:
            return DynamicCache(config=self._model.config)
        return StaticCache(config=self._model.config, max_cache_len=self._max_context)

    @contextmanager
    def _arranged(self):
        """Casts set as the stage says, and hooks for float32 activations, for the length of one generation."""
        for layer in self._codebooks:
            layer.casts = self._casts
        hooks = [] if self._casts else self._float32_hooks()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer in self._codebooks:
                layer.casts = False

    def _float32_hooks(self) -> list:
        embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        dtype = activation_dtype(self._model)
        if embedding.weight.dtype == dtype:
            return []
        hooks = [embedding.register_forward_hook(lambda _, __, y: y.to(dtype))]
        if isinstance(head, nn.Linear):
            hooks.append(head.register_forward_pre_hook(lambda _, args: (args[0].to(head.weight.dtype),)))
        return hooks

    @torch.inference_mode()
    def _logits(self, ids: Tensor, cache) -> Tensor:
        return self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def tokens(self, ids: Tensor, count: int) -> Iterator[int]:
        """Greedy tokens after the prompt `ids` [n]."""
        cache, token = self._cache(), ids.unsqueeze(0)
        with self._arranged():
            for _ in range(count):
                token = self._logits(token, cache).argmax(-1, keepdim=True)
                yield int(token)

    def forced_logits(self, ids: Tensor, tokens: Sequence[int]) -> Iterator[Tensor]:
        """Logits [1, vocab] after the prompt `ids` [n], and after each of `tokens` that are fed behind it."""
        cache = self._cache()
        with self._arranged():
            yield self._logits(ids.unsqueeze(0), cache)
            for token in tokens:
                yield self._logits(torch.tensor([[token]], device=self._device), cache)

    def _muted(self) -> list:
        """Let every linear layer return zeros that exist already; the layers."""
        layers = [m for m in self._model.modules() if isinstance(m, (nn.Linear, *CODED))]
        dtype = activation_dtype(self._model)
        for layer in layers:
            zeros = torch.zeros(layer.out_features, dtype=dtype, device=self._device)
            layer.forward = lambda x, zeros=zeros: zeros.to(x.dtype).expand(*x.shape[:-1], -1)
        return layers

    @contextmanager
    def without(self, parts: frozenset[str]):
        """Leave out the linear layers, or the casts around codebook products; the cache stays as the stage has it."""
        layers = self._muted() if "linears" in parts else []
        casts, self._casts = self._casts, self._casts and "casts" not in parts
        try:
            yield
        finally:
            self._casts = casts
            for layer in layers:
                del layer.forward


class LeanDecoder:
    """The own step, run eagerly with the cache sliced to its live length."""

    parts = PARTS

    def __init__(self, model: nn.Module, max_context: int):
        self.llama = LlamaStep(model, max_context)

    def prepare(self, prompt: int, count: int) -> None:
        """Nothing to prepare."""

    @torch.inference_mode()
    def _next(self, token: Tensor, position: int) -> Tensor:
        logits = self.llama.step(token, Live(self.llama, position))
        return token if "sampling" in self.llama.without else logits.argmax(-1)

    @torch.inference_mode()
    def _first(self, ids: Tensor) -> Tensor:
        return self.llama.prefill(ids).argmax(-1)

    def tokens(self, ids: Tensor, count: int) -> Iterator[int]:
        """Greedy tokens after the prompt `ids` [n]."""
        token = self._first(ids)
        yield int(token)
        for position in range(len(ids), len(ids) + count - 1):
            token = self._next(token, position)
            yield int(token)

    def _place(self, position: int):
        return Live(self.llama, position)

    @torch.inference_mode()
    def forced_logits(self, ids: Tensor, tokens: Sequence[int]) -> Iterator[Tensor]:
        """Logits [1, vocab] after the prompt `ids` [n], and after each of `tokens` that are fed behind it."""
        yield self.llama.prefill(ids).clone()
        for position, token in enumerate(tokens, start=len(ids)):
            fed = torch.tensor([token], device=self.llama.device)
            yield self.llama.step(fed, self._place(position)).clone()

    @contextmanager
    def without(self, parts: frozenset[str]):
        """Leave out parts of the step; without linears every product returns zeros that exist already."""
        llama = self.llama
        kept = llama.layers, llama.head, llama.without
        llama.without |= parts - {"linears"}
        if "linears" in parts:
            llama.layers, llama.head = llama.silenced()
        try:
            yield
        finally:
            llama.layers, llama.head, llama.without = kept

    @torch.inference_mode()
    def step_times(self, length: int, count: int) -> list[float]:
        """Seconds of each of `count` tokens from position `length` on, whatever the cache holds there."""
        token = torch.zeros(1, dtype=torch.long, device=self.llama.device)
        times = []
        for position in range(length, length + count):
            before = time.perf_counter()
            token = self._next(token, position)
            int(token)
            times.append(time.perf_counter() - before)
        return times


def bucket_for(length: int, max_context: int) -> int:
    """Places of the cache that a captured step reads for a live length: the next power of two, at least 128."""
    return min(max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length()), max_context)


class GraphDecoder(LeanDecoder):
    """The own step, position and argmax included, captured once per length bucket and replayed.

    The next replay is queued before a token is read back, so the device does not wait for Python. With `capture` False
    the same step runs eagerly, launch by launch.
    """

    def __init__(self, model: nn.Module, max_context: int, capture: bool = True):
        super().__init__(model, max_context)
        self.capture, self._max_context = capture, max_context
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = None

    def prepare(self, prompt: int, count: int) -> None:
        """Capture the steps that a generation will replay."""
        lengths = range(prompt + 1, prompt + count)
        for bucket in sorted({bucket_for(length, self._max_context) for length in lengths}):
            if self.capture and bucket not in self._graphs:
                self._graphs[bucket] = self._captured(bucket)

    @torch.inference_mode()
    def _captured(self, bucket: int) -> torch.cuda.CUDAGraph:
        llama, device = self.llama, self.llama.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # compiles kernels and sets libraries up, which a capture must not do
            for _ in range(_WARM_UPS):
                llama.position.zero_()
                llama.advance(bucket)
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            llama.advance(bucket)
        return graph

    @torch.inference_mode()
    def _start(self, ids: Tensor) -> None:
        self.llama.token.copy_(self._first(ids))
        self.llama.position.fill_(len(ids))

    def _place(self, position: int):
        self.llama.position.fill_(position)
        return Padded(self.llama, bucket_for(position + 1, self._max_context))

    @torch.inference_mode()
    def _queue(self, length: int) -> None:
        bucket = bucket_for(length, self._max_context)
        if self.capture:
            self._graphs[bucket].replay()
        else:
            self.llama.advance(bucket)

    def _fetch(self, host: Tensor) -> torch.cuda.Event:
        host.copy_(self.llama.token, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return done

    def tokens(self, ids: Tensor, count: int) -> Iterator[int]:
        """Greedy tokens after the prompt `ids` [n]; one step ahead of what it yields."""
        host = torch.zeros(count, 1, dtype=torch.long).pin_memory()
        self._start(ids)
        done = self._fetch(host[0])
        for made in range(1, count + 1):
            ready = done
            if made < count:
                self._queue(len(ids) + made)
                done = self._fetch(host[made])
            ready.synchronize()
            yield int(host[made - 1])

    @contextmanager
    def without(self, parts: frozenset[str]):
        """Leave out parts of the step, in graphs captured for it."""
        graphs, self._graphs = self._graphs, {}
        try:
            with super().without(parts):
                yield
        finally:
            self._graphs = graphs

    @torch.inference_mode()
    def step_times(self, length: int, count: int) -> list[float]:
        """Seconds a token over `count` tokens from position `length` on: one number `count` times, by CUDA events."""
        self.prepare(length, count + 1)
        self.llama.position.fill_(length)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for place in range(length, length + count):
            self._queue(place + 1)
        after.record()
        after.synchronize()
        return [before.elapsed_time(after) / 1e3 / count] * count


def queued_ahead(count: int, queue: Callable[[int], int], fetch: Callable[[], "_Fetched"]) -> Iterator[int]:
    """`count` tokens, the first of which is there already; the next steps are queued before the host waits for any.

    Args:
        count: tokens.
        queue: queues steps towards so many tokens and returns how many steps; each makes one token at least.
        fetch: begins to bring the tokens made by what is queued so far; `tokens()` waits for them and returns all of them.
    """
    ready, seen, sure = fetch(), 0, 1
    while seen < count:
        ahead = None
        if sure < count:
            sure += queue(count - sure)
            ahead = fetch()
        fresh = ready.tokens()[seen:count]
        yield from fresh
        seen += len(fresh)
        sure, ready = max(sure, seen), ahead or ready


class FusedDecoder:
    """The fused step, captured as one CUDA graph of a token and one of several.

    Args:
        model: on a GPU.
        max_context: tokens of prompt and answer together.
        kv: how the cache is kept.
        rows: tokens fed a step, the first and drafts.
        pdl: overlap each kernel with the one before it.
        several: tokens (steps) of the longer graph; 1 for none.
        capture: False runs the same launches one by one.

    Attributes:
        step: what is replayed.
        steps: how many were queued since the decoder was made.
    """

    parts = PARTS

    def __init__(
        self,
        model: nn.Module,
        max_context: int,
        kv: str = "fp16",
        rows: int = 1,
        pdl: bool = False,
        several: int = 1,
        capture: bool = True,
    ):
        self.llama = LlamaStep(model, max_context, cache=False)
        self.step = FusedStep(self.llama, max_context, kv, rows, pdl)
        self._several, self._capture = several, capture
        self.steps = 0
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def prepare(self, prompt: int, count: int) -> None:
        """Capture the graphs that a generation will replay."""
        for steps in {1, self._several}:
            if self._capture and steps not in self._graphs:
                self._graphs[steps] = self._captured(steps)

    @torch.inference_mode()
    def _captured(self, steps: int) -> torch.cuda.CUDAGraph:
        device = self.llama.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # compiles and loads kernels, which a capture must not do
            self.step.state.reset([], 0)
            self.step.embed()
            self.step.advance()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(steps):
                self.step.advance()
        return graph

    def _queue(self, wanted: int) -> int:
        """Queue steps towards `wanted` tokens; how many steps."""
        steps = self._several if wanted >= self._several else 1
        if self._capture:
            self._graphs[steps].replay()
        else:
            for _ in range(steps):
                self.step.advance()
        self.steps += steps
        return steps

    def _fetch(self, first: int, count: int) -> "_Fetched":
        return _Fetched(self.step.state, first, count)

    @torch.inference_mode()
    def _start(self, ids: Tensor) -> None:
        self.step.start(ids)

    def tokens(self, ids: Tensor, count: int, temperature: float = 0.0, seed: int = 0) -> Iterator[int]:
        """Tokens after the prompt `ids` [n]: greedy, or sampled after the first; queued ahead of what it yields."""
        self.step.state.sample(temperature, seed)
        self._start(ids)
        yield from queued_ahead(count, self._queue, lambda: self._fetch(len(ids), count))

    @torch.inference_mode()
    def forced_logits(self, ids: Tensor, tokens: Sequence[int]) -> Iterator[Tensor]:
        """Logits [1, vocab] after the prompt `ids` [n], and after each of `tokens` fed behind it, launch by launch."""
        step, state = self.step, self.step.state
        yield self.llama.prefill_rows(ids, [cache.store for cache in step.caches]).clone()
        state.sample()
        state.reset(ids, 0)
        for position, token in enumerate(tokens, start=len(ids)):
            state.tokens.fill_(token)
            state.move(position)
            step.embed()
            step.advance()
            yield step.logits[:1].clone()

    @contextmanager
    def without(self, parts: frozenset[str]):
        """Leave out parts of the step, in graphs captured for it."""
        kept = self._graphs, self.step.without
        self._graphs, self.step.without = {}, self.step.without | parts
        try:
            yield
        finally:
            self._graphs, self.step.without = kept

    @torch.inference_mode()
    def step_times(self, length: int, count: int) -> list[float]:
        """Seconds a step over `count` steps from position `length` on: one number `count` times, by CUDA events."""
        self.prepare(length, count)
        self.step.state.reset([], 0)
        self.step.state.move(length)
        self.step.embed()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        left = count
        while left:
            left -= self._queue(left)
        after.record()
        after.synchronize()
        return [before.elapsed_time(after) / 1e3 / count] * count


class _Fetched:
    """The tokens that a state will have made once the device comes to it, on their way to the host."""

    def __init__(self, state, first: int, count: int):
        self._made = torch.empty(1, dtype=torch.long, pin_memory=True)
        self._tokens = torch.empty(count, dtype=torch.int32, pin_memory=True)
        self._made.copy_(state.made, non_blocking=True)
        self._tokens.copy_(state.history[first : first + count], non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def tokens(self) -> list[int]:
        """Wait, and return what there is."""
        self._done.synchronize()
        return self._tokens[: 1 + int(self._made)].tolist()
