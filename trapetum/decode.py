"""Generate one sequence greedily, at a chosen stage of the road from the module tree to one CUDA graph a token.

    naive      the transformers tree, growing cache, codebook kernel between casts
    cast_free  the tree without casts, static cache (on CUDA)
    graph      CUDA: the own step of `llama_step`, position and argmax included, replayed as one graph
    fused      CUDA: the step of `fused_step`, five kernels a layer, replayed as one graph
    pdl        CUDA: the same, each kernel overlapping the one before it, several tokens a graph
    lean       CPU: the step of `llama_step`, run eagerly

Dense and codebook weights go through the same stages, so both get every improvement; additive codebooks have no fused
kernels and go as far as graph.
"""

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from trapetum.architectures import shape_of
from trapetum.cuda_token import MAX_ROWS
from trapetum.decoders import FusedDecoder, GraphDecoder, LeanDecoder, TreeDecoder
from trapetum.fused_step import FusedStep
from trapetum.kv_cache import KINDS
from trapetum.llama_step import UnsupportedModel, activation_dtype
from trapetum.memory import memory_estimate
from trapetum.models import Loaded
from trapetum.swap import coded_layers

STAGES = ("naive", "cast_free", "graph", "fused", "pdl")
FUSED_STAGES = ("fused", "pdl")
TOKENS_A_GRAPH = 8  # at the stage pdl
_CPU_STAGES = ("naive", "cast_free", "lean")
_Made = TypeVar("_Made")


class DecodeError(ValueError):
    """A stage, prompt or length that an engine cannot run; the message says what to do."""


def stages(device: str | torch.device) -> tuple[str, ...]:
    """The stages of a device, slowest first."""
    return STAGES if torch.device(device).type == "cuda" else _CPU_STAGES


@dataclass(frozen=True)
class Generation:
    """One generated sequence.

    Attributes:
        tokens: new token ids, a stop token included.
        ttft_s: seconds from the call to the first token (prefill; the capture of graphs is not counted).
        token_s: seconds between one token and the next, `on_token` included; one fewer than tokens.
    """

    tokens: list[int]
    ttft_s: float
    token_s: list[float]

    @property
    def tokens_per_s(self) -> float:
        """Decode speed: tokens after the first, divided by the time between the first and the last."""
        return len(self.token_s) / sum(self.token_s) if self.token_s else float("nan")


class Engine:
    """Greedy batch-1 generation with one model at one stage.

    At the stages `graph` and `lean` the engine stacks q+k+v and gate+up of each layer and makes the model's weights
    views of the stacked ones (no second copy); the model stays usable, but moving it to another device ends the engine's
    use.

    Attributes:
        stage: one of `stages(device)`.
        max_context: tokens of prompt and answer together; never more than the model's own limit.
        kv: how the cache is kept, "fp16" (the activations' dtype), "int8" or "int4"; quantized only at fused and pdl.
        rows: tokens fed a step; with more than 1 the others are drafts by prompt lookup, which the step verifies (fused and
            pdl), and the tokens are those of greedy decoding with this many rows.

    Raises:
        DecodeError: a stage, cache or number of rows that there is not, or not enough memory.
        UnsupportedModel: the stage does not know the model; the message says which does.
    """

    def __init__(self, loaded, stage: str, max_context: int = 1024, kv: str = "fp16", rows: int = 1):
        self.model = loaded.model if isinstance(loaded, Loaded) else loaded
        self.device = self._one_device()
        self.stage, self.max_context = stage, min(max_context, self.model.config.max_position_embeddings)
        self.kv, self.rows = kv, rows
        self._vocab = self.model.get_input_embeddings().weight.shape[0]
        self._require_options()
        self._decoder = self._with_memory(self._make_decoder)

    def _one_device(self) -> torch.device:
        tensors = list(self.model.parameters()) + list(self.model.buffers())
        devices = {str(tensor.device) for tensor in tensors}
        if len(devices) > 1:
            raise DecodeError(
                f"the model is spread over {', '.join(sorted(devices))}; move it to one device first."
            )
        return tensors[0].device

    def _require_options(self) -> None:
        if self.stage not in stages(self.device):
            raise DecodeError(
                f"no stage {self.stage!r} on {self.device.type}; choose one of {', '.join(stages(self.device))}."
            )
        if self.kv not in KINDS:
            raise DecodeError(f"the cache can be kept in {', '.join(KINDS)}, not {self.kv!r}.")
        if not 1 <= self.rows <= MAX_ROWS:
            raise DecodeError(f"a step feeds 1 to {MAX_ROWS} rows, not {self.rows}.")
        if self.max_context < 2:
            raise DecodeError(
                f"a context of {self.max_context} has no room for a prompt and an answer; take at least 2."
            )
        if self.stage not in FUSED_STAGES and (self.kv != "fp16" or self.rows != 1):
            raise DecodeError(
                f"a cache in {self.kv} and steps of {self.rows} rows need the stage {' or '.join(FUSED_STAGES)}, "
                f"not {self.stage!r}."
            )

    def _make_decoder(self):
        if self.stage in FUSED_STAGES:
            pdl = self.stage == "pdl"
            several = TOKENS_A_GRAPH if pdl else 1
            return FusedDecoder(self.model, self.max_context, self.kv, self.rows, pdl, several)
        if self.stage == "graph":
            return GraphDecoder(self.model, self.max_context)
        if self.stage == "lean":
            return LeanDecoder(self.model, self.max_context)
        return TreeDecoder(self.model, self.stage == "naive", self.max_context)

    @property
    def step(self) -> FusedStep | None:
        """The step of this package's own kernels, at the stages fused and pdl."""
        return getattr(self._decoder, "step", None)

    @property
    def steps(self) -> int:
        """Steps queued so far, at the stages fused and pdl; with drafts a step makes one token or more."""
        return getattr(self._decoder, "steps", 0)

    @property
    def parts(self) -> tuple[str, ...]:
        """What `without` can leave out at this stage."""
        return self._decoder.parts

    # Memory

    def _with_memory(self, work: Callable[[], _Made], prompt: int = 0) -> _Made:
        """Do `work`; where memory does not suffice, give back what it took and say how much it needs."""
        try:
            return work()
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        # Only here is the error gone, and with it the frames that hold what was made before it.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise DecodeError(self._no_memory(prompt))

    def _no_memory(self, prompt: int) -> str:
        cache, rest = self._needed(prompt)
        free = "are free"
        if self.device.type == "cuda":
            free = f"{_gb(torch.cuda.mem_get_info(self.device)[0])} are free"
        words = f" and a prompt of {prompt} tokens" if prompt else ""
        kinds = list(KINDS)[list(KINDS).index(self.kv) + 1 :] if self.stage in FUSED_STAGES else []
        smaller = f", kv={' or '.join(repr(kind) for kind in kinds)}" if kinds else ""
        return (
            f"a context of {self.max_context}{words} at the stage {self.stage!r} needs about {_gb(cache + rest)} beside the "
            f"weights, {_gb(cache)} of it for the {self.kv} cache, more than {free} on {self.device}: choose a shorter "
            f"max_context{smaller}, or weights of fewer bits."
        )

    def _needed(self, prompt: int) -> tuple[int, int]:
        """Estimated bytes of the cache, and of what else is needed beside the weights."""
        bits = [layer.bits for _, layer in coded_layers(self.model)]
        shape, bits = shape_of(self.model.config, "this model"), min(bits, default=None)
        parts = memory_estimate(shape, bits, self.max_context, self.kv, rows=self.rows, prompt=prompt)
        wide = activation_dtype(self.model).itemsize // 2  # the estimate is of 16-bit activations
        return wide * parts["KV cache"], wide * (parts["activations"] + parts["prefill"])

    # Generation

    def _checked(self, prompt_ids, new_tokens: int) -> Tensor:
        ids = torch.as_tensor(prompt_ids, dtype=torch.long).reshape(-1)
        if not len(ids):
            raise DecodeError("the prompt is empty; give at least one token (a begin-of-text token will do).")
        if new_tokens < 1:
            raise DecodeError(f"{new_tokens} new tokens were asked for; ask for at least 1.")
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocab:
            raise DecodeError(
                f"token {int(ids.max() if ids.min() >= 0 else ids.min())} is not in the vocabulary of {self._vocab}; "
                "use the tokenizer of this model."
            )
        self._require_room(len(ids), new_tokens)
        return ids.to(self.device)

    def _require_room(self, prompt: int, new_tokens: int) -> None:
        need = prompt + new_tokens
        if need <= self.max_context:
            return
        limit = self.model.config.max_position_embeddings
        cure = f"make the engine with max_context={need}" if need <= limit else f"the model ends at {limit}"
        raise DecodeError(
            f"a prompt of {prompt} tokens and {new_tokens} new ones need a context of {need}, and the engine has "
            f"{self.max_context}: ask for fewer tokens, or {cure}."
        )

    def _require_tokens(self, temperature: float) -> None:
        if temperature and self.stage not in FUSED_STAGES:
            raise DecodeError(
                f"the stage {self.stage!r} is greedy; sampling needs the stage {' or '.join(FUSED_STAGES)}."
            )
        if temperature and self.rows > 1:
            raise DecodeError(
                f"an engine of {self.rows} rows verifies drafts greedily and cannot sample at temperature {temperature}; make "
                "it with rows=1."
            )
        if self.step is not None and "sampling" in self.step.without:
            raise DecodeError(
                "without sampling no token is ever chosen, so there is nothing to generate; time such steps with step_times."
            )

    def _prepare(self, prompt: int, count: int) -> None:
        self._with_memory(lambda: self._decoder.prepare(prompt, count))

    def _stream(self, ids: Tensor, count: int, sampling: dict) -> Iterator[int]:
        """Tokens as they come; the first comes with the prefill, which memory may not suffice for."""
        made = self._decoder.tokens(ids, count, **sampling)
        return chain([self._with_memory(lambda: next(made), len(ids))], made)

    def generate(
        self,
        prompt_ids: Sequence[int] | Tensor,
        new_tokens: int,
        on_token: Callable[[int], None] | None = None,
        eos: int | Iterable[int] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generation:
        """Generate greedily, or sample.

        Args:
            prompt_ids: token ids, at least one.
            new_tokens: how many tokens to make at most.
            on_token: called with each token as it arrives.
            eos: token id or ids to stop after; None runs to the end.
            temperature: 0 for greedy; above, tokens after the first are drawn from softmax(logits / temperature) (fused, pdl).
            seed: of the draws.

        Raises:
            DecodeError: empty prompt, a token outside the vocabulary, no room in the context, not enough memory, sampling
                at another stage or with drafts, or a step that chooses no token.
        """
        self._require_tokens(temperature)
        ids = self._checked(prompt_ids, new_tokens)
        stop = {eos} if isinstance(eos, int) else set(eos or ())
        self._prepare(len(ids), new_tokens)
        tokens, times = [], [time.perf_counter()]
        sampling = {"temperature": temperature, "seed": seed} if temperature else {}
        for token in self._stream(ids, new_tokens, sampling):
            times.append(time.perf_counter())
            tokens.append(token)
            if on_token is not None:
                on_token(token)
            if token in stop:
                break
        spans = [after - before for before, after in zip(times, times[1:], strict=False)]
        return Generation(tokens, spans[0], spans[1:])

    @contextmanager
    def without(self, *parts: str):
        """Within this context parts of the step do nothing, so that the time of the others can be told.

        Args:
            parts: of "linears", "attention", "norms", "sampling"; the module tree (naive, cast_free) only knows "linears",
                and with codebook weights `naive` also "casts". Without "sampling" the stages fused and pdl choose no token.

        Raises:
            DecodeError: a part that this stage cannot leave out.
        """
        unknown = [part for part in parts if part not in self.parts]
        if unknown:
            raise DecodeError(
                f"the stage {self.stage!r} cannot leave out {unknown[0]!r}; it can leave out {', '.join(self.parts)}."
            )
        with self._decoder.without(frozenset(parts)):
            yield self

    def step_times(self, length: int, count: int) -> list[float]:
        """Seconds a step at a context that nobody filled: speed does not depend on what the cache holds.

        Args:
            length: tokens in the cache before the first step.
            count: steps.

        Raises:
            DecodeError: no room in the context, or a stage of the module tree, whose cache grows token by token.
        """
        if not hasattr(self._decoder, "step_times"):
            raise DecodeError(
                f"the stage {self.stage!r} cannot begin at a length; take graph, fused, pdl or lean."
            )
        self._require_room(length, count)
        return self._with_memory(lambda: self._decoder.step_times(length, count))

    @torch.inference_mode()
    def forced_logits(self, prompt_ids: Sequence[int] | Tensor, tokens: Sequence[int]) -> Tensor:
        """The logits of this stage when tokens are fed that it need not have chosen.

        Steps run launch by launch; what a graph replays is the same launches.

        Args:
            prompt_ids: token ids, at least one, fed as a prompt.
            tokens: fed one by one after it, each through the stage's own step.

        Returns:
            [tokens + 1, vocab]: after the prompt, and after each token.

        Raises:
            DecodeError: empty prompt, a token outside the vocabulary, or no room in the context.
        """
        ids = self._checked(prompt_ids, len(tokens) + 1)
        return torch.cat(list(self._decoder.forced_logits(ids, tokens)))


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or one that it came of, is a failed allocation; ending a capture after one fails too."""
    while error is not None:
        words = str(error).lower()
        if (
            isinstance(error, torch.OutOfMemoryError)
            or "out of memory" in words
            or "can't allocate memory" in words
        ):
            return True
        error = error.__context__
    return False


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def last_engine(loaded, max_context: int = 1024, kv: str = "fp16", rows: int = 1) -> Engine:
    """The engine of the last stage that can run the model.

    Args:
        loaded: a model or `models.Loaded`.
        max_context, kv, rows: as for `Engine`; a quantized cache and drafts are for the fused stages only.

    Raises:
        UnsupportedModel: no stage can; what the last stage said.
        DecodeError: as for `Engine`.
    """
    model = loaded.model if isinstance(loaded, Loaded) else loaded
    refused = None
    for stage in reversed(stages(model.get_input_embeddings().weight.device)):
        if refused and (kv, rows) != ("fp16", 1) and stage not in FUSED_STAGES:
            break
        try:
            return Engine(loaded, stage, max_context, kv, rows)
        except UnsupportedModel as error:
            refused = refused or error
    raise refused
