"""The tail of a decode step on the device: logits to token, token to the next x, drafts by prompt lookup.

`next_token` is one launch of `kernels/next_token.cu`; `reference_next_token` does the same in plain Python and float64.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from trapetum.launch import integer, kernel, pointer

SOURCE = "next_token.cu"
MAX_ROWS = 8  # tokens fed a step
MAX_NGRAM = 7
NGRAM = 3  # tokens that a draft is looked up by, at most
LEAST_TEMPERATURE = 1e-3  # below it float32 scores have no room for the noise
_MOST_PLACES = 2**28  # of history, as the kernel packs a place
_VECTOR = 8  # logits a thread
_DTYPE_CODE = {torch.float16: 0, torch.bfloat16: 1}


# --- state ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class State:
    """What a decode step keeps between launches, made once by `State.make`; tensors on one device.

    `history` is also what the host reads: after any number of steps `history[: position + 1]` is the prompt and the tokens so
    far, and `generated` says which of them are new.

    Attributes:
        tokens: int64 [rows], what to feed; the first is certain, the others are drafts.
        position: int64 [1], cache slot of `tokens[0]`.
        history: int32 [max_context + rows + 1], the token of each cache slot.
        made: int64 [1], tokens that `next_token` has made since `reset`, those beyond the limit included.
        temperature: float32 [1], 0 for the arg max.
        seed: int64 [1], of the noise at a temperature above 0.
        keys: int64 [rows], the kernel's scratch, zero between launches.
        counter: int32 [1], the kernel's scratch, zero between launches.
        limit: the last value of `position`; there it stays, and the same token is fed again.
        start: slot of the first token that was not in the prompt.
    """

    tokens: Tensor
    position: Tensor
    history: Tensor
    made: Tensor
    temperature: Tensor
    seed: Tensor
    keys: Tensor
    counter: Tensor
    limit: int
    start: int = 0

    @classmethod
    def make(cls, max_context: int, rows: int = 1, device="cuda", limit: int | None = None) -> "State":
        """An empty state.

        Args:
            max_context: slots of the cache.
            rows: tokens fed a step, 1 to `MAX_ROWS`.
            device: where the tensors go.
            limit: the last value of `position`. None is `max_context - rows`, so that no step feeds a slot beyond the cache;
                a cache with `rows - 1` slots more may take `max_context - 1`.

        Raises:
            ValueError: a size out of range.
        """
        if not 1 <= rows <= MAX_ROWS:
            raise ValueError(f"a step feeds 1 to {MAX_ROWS} tokens, not {rows}.")
        limit = max_context - rows if limit is None else limit
        if not 0 <= limit < max_context <= _MOST_PLACES - MAX_ROWS - 1:
            raise ValueError(
                f"a context of {max_context} slots with {rows} rows and limit {limit} is not possible; the limit must be "
                f"at least 0 and below the context, and the context below {_MOST_PLACES - MAX_ROWS}."
            )

        def zeros(size, dtype=torch.int64):
            return torch.zeros(size, dtype=dtype, device=device)

        return cls(
            tokens=zeros(rows),
            position=zeros(1),
            history=zeros(max_context + rows + 1, torch.int32),
            made=zeros(1),
            temperature=zeros(1, torch.float32),
            seed=zeros(1),
            keys=zeros(rows),
            counter=zeros(1, torch.int32),
            limit=limit,
        )

    @property
    def rows(self) -> int:
        """Tokens fed a step."""
        return self.tokens.numel()

    def reset(self, ids, token) -> None:
        """Begin after a prefill of `ids` whose next token is `token`; drafts are that token again.

        Args:
            ids: the prompt, integers [n] as a tensor or a list.
            token: an int, or an integer tensor of one element, which is not read by the host.

        Raises:
            ValueError: the prompt passes the limit.
        """
        ids = torch.as_tensor(ids).reshape(-1)
        if len(ids) > self.limit:
            raise ValueError(f"the prompt has {len(ids)} tokens, but the position may not pass {self.limit}.")
        token = torch.as_tensor(token, device=self.tokens.device).reshape(1)
        self.history[: len(ids)] = ids
        self.history[len(ids)] = token[0]
        self.tokens.copy_(token.expand(self.rows))
        self.made.zero_()
        self.keys.zero_()
        self.counter.zero_()
        self.position.fill_(len(ids))
        self.start = len(ids)

    def move(self, position: int) -> None:
        """Pretend that `tokens[0]` is at `position`, with whatever history holds before it.

        Raises:
            ValueError: the position passes the limit.
        """
        if not 0 <= position <= self.limit:
            raise ValueError(f"position {position} is not one of 0 to {self.limit}.")
        self.history[position] = self.tokens[0]
        self.position.fill_(position)
        self.made.zero_()
        self.start = position

    def sample(self, temperature: float = 0.0, seed: int = 0) -> None:
        """Choose arg max (temperature 0) or sampling; holds from the next launch on, in captured graphs too.

        Args:
            temperature: 0, or at least `LEAST_TEMPERATURE`.
            seed: any integer that int64 holds.

        Raises:
            ValueError: a temperature out of range, or above 0 with several rows, whose verification is greedy.
        """
        if temperature != 0 and not LEAST_TEMPERATURE <= temperature < float("inf"):
            raise ValueError(
                f"the temperature must be 0 or at least {LEAST_TEMPERATURE} and finite, not {temperature}."
            )
        if temperature and self.rows > 1:
            raise ValueError(
                f"a step of {self.rows} rows verifies drafts greedily and cannot sample at temperature {temperature}; "
                "take rows=1 or temperature 0."
            )
        self.temperature.fill_(temperature)
        self.seed.fill_(seed)

    def generated(self) -> list[int]:
        """The tokens after the prompt so far, from `reset`'s on; waits for the device."""
        last = min(self.start + int(self.made), self.limit + 1)
        return self.history[self.start : last + 1].tolist()

    def copy(self, device=None) -> "State":
        """An independent copy, on `device` or where this one is."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        copied = {
            k: v.clone().to(device or v.device) if isinstance(v, Tensor) else v for k, v in values.items()
        }
        return State(**copied)


# --- launches ------------------------------------------------------------------------------------------------------


def threads_for(rows: int) -> int:
    """Threads a block: with several rows one block searches the history, with one there is less to wait for."""
    return 256 if rows == 1 else 1024


def defines(dtype: torch.dtype, rows: int, ngram: int = NGRAM) -> tuple[str, ...]:
    """What the source is compiled with."""
    return (f"XTYPE={_DTYPE_CODE[dtype]}", f"ROWS={rows}", f"NGRAM={ngram}", f"THREADS={threads_for(rows)}")


def _require(name: str, tensor: Tensor, shape: tuple, dtype: torch.dtype, device: torch.device) -> None:
    if (
        tensor.dtype != dtype
        or tensor.shape != shape
        or tensor.device != device
        or not tensor.is_contiguous()
    ):
        raise ValueError(
            f"{name} must be a contiguous {dtype} {list(shape)} on {device}, not {tensor.dtype} {list(tensor.shape)} on "
            f"{tensor.device}{'' if tensor.is_contiguous() else ', not contiguous'}."
        )


def _require_operands(logits: Tensor | None, state: State, embedding: Tensor, x: Tensor) -> None:
    rows, device, dtype = state.rows, state.tokens.device, embedding.dtype
    if dtype not in _DTYPE_CODE or embedding.dim() != 2 or embedding.numel() == 0:
        raise ValueError(
            f"the embedding must be a non-empty float16 or bfloat16 [vocab, hidden], not {dtype} {list(embedding.shape)}."
        )
    _require("the embedding", embedding, tuple(embedding.shape), dtype, device)
    _require("x", x, (rows, embedding.shape[1]), dtype, device)
    if logits is None:
        return
    vocab = logits.shape[-1]
    _require("the logits", logits, (rows, vocab), dtype, device)
    if not 1 <= vocab <= len(embedding):
        raise ValueError(
            f"logits of {vocab} tokens do not fit an embedding of {len(embedding)}; each token needs a row of it."
        )


def embed(state: State, embedding: Tensor, x: Tensor, pdl: bool = False) -> None:
    """x = embedding[tokens]: once before the first step, `next_token` does it for those that follow.

    Args:
        state: whose tokens are taken.
        embedding: fp16 or bf16 [vocab, hidden], contiguous.
        x: [rows, hidden] in the embedding's dtype, written.
        pdl: as for `next_token`.

    Raises:
        ValueError: operands do not fit each other.
    """
    _require_operands(None, state, embedding, x)
    function = kernel(SOURCE, "embed", defines(x.dtype, state.rows), x.get_device())
    arguments = [pointer(t) for t in (state.tokens, embedding, x)]
    arguments += [integer(v) for v in embedding.shape]
    function.launch((1, 1, 1), (threads_for(state.rows), 1, 1), 0, arguments, pdl)


def next_token(
    logits: Tensor, state: State, embedding: Tensor, x: Tensor, pdl: bool = False, ngram: int = NGRAM
) -> None:
    """Choose tokens, verify the drafts, move on, draft again, and look up the next x: one launch.

    Row r of the logits predicts what follows `tokens[r]`. With one row the token is the arg max (the lowest index of equals,
    a NaN is the largest, as `torch.argmax` on the CPU), or a sample where `state.sample` set a temperature. With several,
    the drafts that agree with the predictions before them are accepted, and one token is made beyond them.

    Args:
        logits: fp16 or bf16 [rows, vocab], contiguous.
        state: read and moved on.
        embedding: [vocab or more, hidden] in the logits' dtype, contiguous.
        x: [rows, hidden] in the logits' dtype, written.
        pdl: let this launch overlap the kernel before it, which must itself wait for the one before it. Ignored below sm_90.
        ngram: tokens that drafts are looked up by, at most; 1 to `MAX_NGRAM`.

    Raises:
        ValueError: operands do not fit each other.
        RuntimeError: CUDA refused the launch.
    """
    _require_operands(logits, state, embedding, x)
    _require_ngram(ngram)
    (rows, vocab), threads = logits.shape, threads_for(state.rows)
    function = kernel(SOURCE, "next_token", defines(logits.dtype, rows, ngram), logits.get_device())
    held = (
        state.tokens,
        state.position,
        state.history,
        state.made,
        state.temperature,
        state.seed,
        state.keys,
    )
    arguments = [pointer(t) for t in (logits, embedding, x, *held, state.counter)]
    arguments += [integer(v) for v in (vocab, embedding.shape[1], state.limit)]
    function.launch((-(-vocab // (_VECTOR * threads)), rows, 1), (threads, 1, 1), 0, arguments, pdl)


def _require_ngram(ngram: int) -> None:
    if not 1 <= ngram <= MAX_NGRAM:
        raise ValueError(f"drafts are looked up by 1 to {MAX_NGRAM} tokens, not {ngram}.")


# --- the same in plain Python --------------------------------------------------------------------------------------


def philox(counter: np.ndarray, key: int) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011).

    Args:
        counter: uint32 [..., 4].
        key: 64 bits, as an integer of any sign.

    Returns:
        uint32 [..., 4], four random words a counter.
    """
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = np.moveaxis(counter.astype(np.uint64), -1, 0)
    key0, key1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            second >> np.uint64(32) ^ c1 ^ np.uint64(key0),
            second & low,
            first >> np.uint64(32) ^ c3 ^ np.uint64(key1),
            first & low,
        )
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1).astype(np.uint32)


def gumbel(vocab: int, position: int, seed: int) -> np.ndarray:
    """The noise of every token at a position: float64 [vocab], standard Gumbel."""
    counter = np.zeros((-(-vocab // 4), 4), np.uint32)
    counter[:, 0] = np.arange(len(counter))
    counter[:, 1], counter[:, 2] = position & 0xFFFFFFFF, position >> 32
    words = philox(counter, seed).reshape(-1)[:vocab]
    uniform = np.minimum((words + 0.5) / 2**32, 1 - 2**-24)
    return -np.log(-np.log1p(-uniform))


def scores(logits: Tensor, position: int, temperature: float, seed: int) -> Tensor:
    """What the arg max is taken of: float64 [vocab], the logits, or logits / temperature + noise above temperature 0."""
    wide = logits.double()
    if temperature <= 0:
        return wide
    return wide / temperature + torch.from_numpy(gumbel(len(logits), position, seed))


def find_match(history: list[int], ngram: int = NGRAM) -> int | None:
    """Where the last `ngram` tokens of `history` stand before, or the last fewer: the place of their last token.

    Longer matches go first, of equals the latest. None where not even the last token is found.
    """
    end = len(history) - 1
    for length in range(min(ngram, end), 0, -1):
        suffix = history[end - length + 1 :]
        for place in range(end - 1, length - 2, -1):
            if history[place - length + 1 : place + 1] == suffix:
                return place
    return None


def draft(history: list[int], count: int, ngram: int = NGRAM) -> list[int]:
    """`count` tokens that may follow `history`, by prompt lookup (Saxena 2023); its last token again where nothing is found."""
    place = find_match(history, ngram)
    if place is None:
        return [history[-1]] * count
    longer = list(history)
    for k in range(count):
        longer.append(longer[place + 1 + k])
    return longer[len(history) :]


def _valid(token: int, vocab: int) -> int:
    """A token that is none counts as the last one, so that no lookup passes the embedding."""
    return token if 0 <= token < vocab else vocab - 1


def reference_next_token(
    logits: Tensor, state: State, embedding: Tensor, x: Tensor, ngram: int = NGRAM
) -> None:
    """What `next_token` does, on CPU tensors, with float64 scores; arguments as there."""
    _require_operands(logits, state, embedding, x)
    _require_ngram(ngram)
    rows, vocab = logits.shape
    place = min(max(int(state.position), 0), state.limit)
    temperature = float(state.temperature) if rows == 1 else 0.0
    choice = [int(scores(row, place, temperature, int(state.seed)).argmax()) for row in logits]
    fed = state.tokens.tolist()
    accepted = 0
    while accepted < rows - 1 and fed[accepted + 1] == choice[accepted]:
        accepted += 1
    made = [_valid(fed[0], vocab), *choice[: accepted + 1]]
    for r, token in enumerate(made[1:]):
        if place + r <= state.limit:
            state.history[place + 1 + r] = token
    end = min(place + accepted + 1, state.limit)
    known = [*state.history[:end].tolist(), made[end - place]]
    drafts = [_valid(token, vocab) for token in draft(known, rows - 1, ngram)]
    state.tokens.copy_(torch.tensor([known[-1], *drafts]))
    state.position.fill_(end)
    state.made += accepted + 1
    x.copy_(embedding[state.tokens])
