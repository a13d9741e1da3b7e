"""Generate one sequence greedily, at a chosen stage of the road from the module tree to one CUDA graph a token.

    naive      the transformers tree, growing cache, codebook kernel between casts
    cast_free  the tree without casts, static cache (on CUDA)
    graph      CUDA: the own step of `llama_step`, position and argmax included, replayed as one graph
    fused      CUDA: the step of `fused_step`, five kernels a layer, replayed as one graph
    pdl        CUDA: the same, each kernel overlapping the one before it, several tokens a graph
    lean       CPU: the step of `llama_step`, run eagerly

Dense and codebook weights go through the same stages, so both get every improvement.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from trapetum.decoders import FusedDecoder, GraphDecoder, LeanDecoder, TreeDecoder
from trapetum.models import Loaded

STAGES = ("naive", "cast_free", "graph", "fused", "pdl")
FUSED_STAGES = ("fused", "pdl")
TOKENS_A_GRAPH = 8  # at the stage pdl
_CPU_STAGES = ("naive", "cast_free", "lean")


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
    """

    def __init__(self, loaded, stage: str, max_context: int = 1024, kv: str = "fp16", rows: int = 1):
        self.model = loaded.model if isinstance(loaded, Loaded) else loaded
        self.device = self._one_device()
        self.stage, self.max_context = stage, min(max_context, self.model.config.max_position_embeddings)
        self.kv, self.rows = kv, rows
        self._vocab = self.model.get_input_embeddings().weight.shape[0]
        self._decoder = self._make_decoder()

    def _one_device(self) -> torch.device:
        tensors = list(self.model.parameters()) + list(self.model.buffers())
        devices = {str(tensor.device) for tensor in tensors}
        if len(devices) > 1:
            raise DecodeError(
                f"the model is spread over {', '.join(sorted(devices))}; move it to one device first."
            )
        return tensors[0].device

    def _make_decoder(self):
        if self.stage not in stages(self.device):
            raise DecodeError(
                f"no stage {self.stage!r} on {self.device.type}; choose one of {', '.join(stages(self.device))}."
            )
        if self.stage in FUSED_STAGES:
            pdl = self.stage == "pdl"
            several = TOKENS_A_GRAPH if pdl else 1
            return FusedDecoder(self.model, self.max_context, self.kv, self.rows, pdl, several)
        if self.kv != "fp16" or self.rows != 1:
            raise DecodeError(
                f"a cache in {self.kv} and steps of {self.rows} rows need the stage {' or '.join(FUSED_STAGES)}, "
                f"not {self.stage!r}."
            )
        if self.stage == "graph":
            return GraphDecoder(self.model, self.max_context)
        if self.stage == "lean":
            return LeanDecoder(self.model, self.max_context)
        return TreeDecoder(self.model, self.stage == "naive", self.max_context)

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
            DecodeError: empty prompt, a token outside the vocabulary, no room in the context, or sampling at another stage.
        """
        if temperature and self.stage not in FUSED_STAGES:
            raise DecodeError(
                f"the stage {self.stage!r} is greedy; sampling needs the stage {' or '.join(FUSED_STAGES)}."
            )
        ids = self._checked(prompt_ids, new_tokens)
        stop = {eos} if isinstance(eos, int) else set(eos or ())
        self._decoder.prepare(len(ids), new_tokens)
        tokens, times = [], [time.perf_counter()]
        sampling = {"temperature": temperature, "seed": seed} if temperature else {}
        for token in self._decoder.tokens(ids, new_tokens, **sampling):
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
            parts: of "linears", "attention", "norms", "sampling"; the module tree (naive, cast_free) only knows "linears".

        Raises:
            DecodeError: a part that this stage cannot leave out.
        """
        unknown = [part for part in parts if part not in self._decoder.parts]
        if unknown:
            raise DecodeError(
                f"the stage {self.stage!r} cannot leave out {unknown[0]!r}; it can leave out {', '.join(self._decoder.parts)}."
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
        return self._decoder.step_times(length, count)
