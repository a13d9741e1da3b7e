"""What one persistent kernel a token could win: a token's reads in one cooperative kernel and in chains of kernels.

A decoder in one kernel must wait for the whole grid between the phases of a token, since a phase takes all of what the one
before it wrote. Here a token's phases only read (`kernels/persistent_floor.cu`), so each way's time is a floor under every
decoder of that kind, and the difference of two is what the one could win over the other before any arithmetic.

The barrier is safe because all blocks are resident: the launch is cooperative, one block a multiprocessor is asked for only
after CUDA has said that it fits, and a block that waits for seconds gives up, which becomes a `FloorError`.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trapetum import cuda, records, timing
from trapetum.bench.reading import cold_read_gbps
from trapetum.bench.recording import Recorder
from trapetum.build import source_sha256
from trapetum.launch import Kernel, integer, kernel, pointer
from trapetum.records import Record
from trapetum.shapes import ModelShape, matrix_bytes
from trapetum.shapes import model as model_shape

SOURCE = "persistent_floor.cu"
POLLS = 1 << 22  # of a barrier: seconds, where an open one is seen within a microsecond
TOKENS_A_GRAPH = 8
TRIALS = 5  # replays of a launch shape before one is chosen
WORTH_IT = 1.05  # a persistent kernel is kept from this speedup on
_VECTOR = 16
_KEEPER = 32  # threads of the warp that keeps the barrier
_POISON = 0x5A5A5A5A
_FIRST_WITH_PDL = (9, 0)


# --- what a token reads ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """What may start only when the phase before it is complete.

    Attributes:
        name: `qkv`, `attention`, `out`, `gate_up`, `down` or `head`.
        nbytes: bytes read, a multiple of 16.
    """

    name: str
    nbytes: int


def phases_of(shape: ModelShape, fmt: str = "codebook-4", context: int = 0, kv: str = "fp16") -> list[Phase]:
    """The phases of one token in order: five a layer, then the head.

    Norms, biases and the embedding row (under 0.1 %) are left out; bytes are rounded up to whole vectors of 16.

    Args:
        shape: the model.
        fmt: of the linears, a key of `shapes.FORMATS`; the head is fp16.
        context: cached tokens, whose keys and values the attention reads.
        kv: format of the cache, a key of `shapes.KV_FORMATS`.

    Raises:
        ValueError: an unknown format.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = {
        "qkv": matrix_bytes(shape.hidden, queries + 2 * keys, fmt),
        "attention": shape.kv_bytes(context, kv=kv) // shape.layers,
        "out": matrix_bytes(queries, shape.hidden, fmt),
        "gate_up": matrix_bytes(shape.hidden, 2 * shape.intermediate, fmt),
        "down": matrix_bytes(shape.intermediate, shape.hidden, fmt),
    }
    every = shape.layers * list(layer.items()) + [("head", matrix_bytes(shape.hidden, shape.vocab, "fp16"))]
    return [Phase(name, -(-nbytes // _VECTOR) * _VECTOR) for name, nbytes in every]


def starts_of(phases: Sequence[Phase]) -> list[int]:
    """First 16-byte vector of each phase in a buffer that holds them one behind the other, and the end of the last."""
    starts = [0]
    for phase in phases:
        starts.append(starts[-1] + phase.nbytes // _VECTOR)
    return starts


# --- how it is read --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """A launch shape.

    Attributes:
        blocks: a multiprocessor (a persistent kernel has 1).
        readers: reading threads a block, a multiple of 32.
        in_flight: 16-byte loads of a batch; a thread has two batches.
    """

    blocks: int
    readers: int
    in_flight: int

    def defines(self, *more: str) -> tuple[str, ...]:
        """What the kernel is compiled with."""
        return (f"READERS={self.readers}", f"IN_FLIGHT={self.in_flight}", *more)


PERSISTENT_GRIDS = (Grid(1, 480, 4), Grid(1, 480, 8), Grid(1, 992, 4))
CHAIN_GRIDS = (Grid(1, 512, 4), Grid(2, 512, 4), Grid(1, 256, 8))


class FloorError(RuntimeError):
    """The blocks of a persistent kernel cannot be resident together, or its barriers or its reads went wrong."""


class Token:
    """The bytes of one token on a GPU, phase after phase, and the ways to read them.

    Args:
        phases: from `phases_of`.
        device: index of the GPU.

    Attributes:
        starts: as `starts_of` gives them.
        nbytes: of all phases.
        sms: multiprocessors of the GPU.
        sums: int32, what the last reading left: sums of 32-bit words, one a reading warp and phase.
        state: int32 [4] of the barriers: arrived, left, gave up, stale marks.

    Raises:
        MemoryError: the bytes do not fit.
    """

    def __init__(self, phases: Sequence[Phase], device: int = 0):
        self.phases, self.starts = list(phases), starts_of(phases)
        self.nbytes, self.device, self.sms = self.starts[-1] * _VECTOR, device, cuda.room_of(device).sms
        free = timing.free_bytes("cuda")
        if self.nbytes > free:
            raise MemoryError(
                f"a token of {self.nbytes / 1e9:.1f} GB does not fit the {free / 1e9:.1f} GB that are free."
            )
        where = f"cuda:{device}"
        self.buffer = torch.empty(self.nbytes // 4, dtype=torch.int32, device=where).random_()
        self._parts = [self.buffer[4 * a : 4 * b] for a, b in zip(self.starts, self.starts[1:], strict=False)]
        self._starts = torch.tensor(self.starts, dtype=torch.int64, device=where)
        self.state = torch.zeros(4, dtype=torch.int32, device=where)
        self._marks = torch.zeros(self.sms, dtype=torch.int32, device=where)
        warps = max(grid.blocks * grid.readers // 32 for grid in (*PERSISTENT_GRIDS, *CHAIN_GRIDS))
        self.sums = torch.empty(len(phases) * self.sms * warps, dtype=torch.int32, device=where)

    def persistent(
        self, grid: Grid, barrier: bool = True, read: bool = True, check: bool = False, polls: int = POLLS
    ) -> Callable[[], None]:
        """One cooperative launch for the token, one block a multiprocessor.

        Args:
            grid: launch shape.
            barrier: wait for the whole grid between phases.
            read: read the bytes.
            check: let blocks look at each other's marks after each barrier; counted in `state`.
            polls: of a barrier, before a block gives up.

        Raises:
            FloorError: not all blocks can be resident at once, so they could not wait for each other.
        """
        defines = grid.defines(f"BARRIER={int(barrier)}", f"READ={int(read)}", f"CHECK={int(check)}")
        function = kernel(SOURCE, "persistent_token", defines, self.device)
        threads, shared_bytes = grid.readers + _KEEPER, 8 * len(self.starts)
        require_resident(function, grid, threads, shared_bytes)
        arguments = [pointer(self.buffer), pointer(self._starts), integer(len(self.phases))]
        arguments += [pointer(self.sums), pointer(self.state), pointer(self._marks), integer(polls)]
        shape = (grid.blocks * self.sms, 1, 1), (threads, 1, 1), shared_bytes
        return lambda: function.launch(*shape, arguments, cooperative=True)

    def chain(self, grid: Grid, pdl: bool) -> Callable[[], None]:
        """A launch for each phase; with `pdl` its first batch is on its way while the phase before still reads."""
        function = kernel(SOURCE, "read_phase", grid.defines(), self.device)
        blocks = grid.blocks * self.sms
        step = blocks * grid.readers // 32
        every = [
            [pointer(part), (part.nbytes // _VECTOR, ctypes.c_uint64), pointer(self.sums[n * step :])]
            for n, part in enumerate(self._parts)
        ]

        def launch() -> None:
            for arguments in every:
                function.launch((blocks, 1, 1), (grid.readers, 1, 1), 0, arguments, pdl)

        return launch

    def unordered(self) -> Callable[[], None]:
        """A programmatic launch for each phase that reads all before it waits: no phase depends on another."""

        def launch() -> None:
            for part in self._parts:
                cuda.read(part, pdl=True)

        return launch

    # Whether it was read

    def words(self) -> list[int]:
        """The sum of all 32-bit words of each phase, modulo 2^32, by PyTorch."""
        return [int(part.sum(dtype=torch.int64)) % 2**32 for part in self._parts]

    def left_by(self, launch: Callable[[], None], grid: Grid) -> list[int]:
        """The same sums as a reading leaves them."""
        self.sums.fill_(_POISON)
        self._marks.zero_()
        launch()
        per_phase = self.sms * grid.blocks * grid.readers // 32
        used = self.sums[: len(self.phases) * per_phase].view(len(self.phases), per_phase)
        return [value % 2**32 for value in used.sum(1, dtype=torch.int64).tolist()]

    def require_open(self) -> None:
        """Refuse a measurement in which a block gave up waiting.

        Raises:
            FloorError: one did.
        """
        arrived, left, gave_up, stale = self.state.tolist()
        self.state.zero_()
        if gave_up or stale or arrived or left:
            raise FloorError(
                f"the grid barrier did not hold: {gave_up} gave up, {stale} went on too early, {arrived} arrivals and {left} "
                "departures are left over; use the GPU alone and try again."
            )


def require_resident(function: Kernel, grid: Grid, threads: int, shared_bytes: int) -> None:
    """Refuse blocks that would wait for others that have not begun.

    Args:
        function: anything with `blocks_at_once(threads, shared_bytes)`.
        grid: launch shape.
        threads, shared_bytes: of a block.

    Raises:
        FloorError: a multiprocessor does not hold `grid.blocks` of them.
    """
    fit = function.blocks_at_once(threads, shared_bytes)
    if fit < grid.blocks:
        raise FloorError(
            f"{grid.blocks} blocks of {threads} threads and {shared_bytes} bytes of shared memory were asked for on each "
            f"multiprocessor, which holds {fit}; they would wait for each other forever, so choose fewer threads."
        )


# --- the records -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    """A way to read a token: its launch shapes, what makes the launch, whether its sums tell what was read, and whether it
    needs programmatic edges."""

    name: str
    grids: tuple[Grid, ...]
    launch: Callable[[Token, Grid], Callable[[], None]]
    sums: bool = True
    pdl: bool = False
    source: str = SOURCE


WAYS = (
    _Way("persistent", PERSISTENT_GRIDS, lambda token, grid: token.persistent(grid)),
    _Way("no barriers", PERSISTENT_GRIDS, lambda token, grid: token.persistent(grid, barrier=False)),
    _Way(
        "barriers only", PERSISTENT_GRIDS, lambda token, grid: token.persistent(grid, read=False), sums=False
    ),
    _Way("pdl chain", CHAIN_GRIDS, lambda token, grid: token.chain(grid, True), pdl=True),
    _Way("graph chain", CHAIN_GRIDS, lambda token, grid: token.chain(grid, False)),
    _Way(
        "unordered pdl chain",
        (Grid(2, 1024, 4),),  # that of `cuda.read`
        lambda token, grid: token.unordered(),
        sums=False,
        pdl=True,
        source=cuda.READ_SOURCE,
    ),
)


def ways_on(capability: tuple[int, int]) -> list[_Way]:
    """The ways that a GPU of this compute capability has: programmatic edges begin with 9.0."""
    return [way for way in WAYS if not way.pdl or capability >= _FIRST_WITH_PDL]


def persistent_floor(
    shape_name: str | None = None,
    device: str = "auto",
    profile: str = "quick",
    fmt: str = "codebook-4",
    context: int | None = None,
) -> list[Record]:
    """Time the reads of a token as one persistent kernel and as chains of kernels, each in its fastest launch shape.

    Args:
        shape_name: of `shapes.MODELS`, with or without "random:"; None for the profile's.
        device: "auto" or "cuda"; there is nothing to measure on a CPU.
        profile: "smoke", "quick" or "full".
        fmt: of the linears, a key of `shapes.FORMATS`.
        context: cached tokens; None for the mean of the profile's decode.

    Returns:
        `token_floor` records in us: `config.way` is "persistent" (one cooperative kernel, barriers between phases), "no
        barriers", "barriers only" (nothing is read, `config.bytes` is 0), "pdl chain" (a kernel a phase, its first loads before
        the wait), "graph chain" (no programmatic edges) or "unordered pdl chain" (all loads before the wait); below sm_90 there
        is no pdl. Then a derived `speedup` of the persistent kernel over `config.baseline` ("pdl chain", or "graph chain" where
        there is no other): `config.worth_it` says whether it reaches 1.05. What does not fit is a `call_accepted` of 0 with the
        reason in `config.error`.

    Raises:
        RuntimeError: the CUDA kernels cannot run here.
        FloorError: a way did not read every byte, or a barrier did not hold.
        ValueError: an unknown shape or format.
    """
    recorder = Recorder(device, profile)
    if recorder.device != "cuda" or not cuda.available():
        why = cuda.why_not() or "it needs a GPU, and the CPU was asked for."
        raise RuntimeError(f"the floor of a persistent kernel cannot be measured: {why}")
    name = (shape_name or recorder.sizes.model).removeprefix("random:")
    size = recorder.sizes
    context = size.prompt_tokens + size.new_tokens // 2 if context is None else context
    config = {"model": f"random:{name}", "weights": fmt, "context": context, "tokens_a_graph": TOKENS_A_GRAPH}
    phases = phases_of(model_shape(name), fmt, context)
    recorder.cold_read_gbps = cold_read_gbps(recorder)
    torch.cuda.empty_cache()  # the buffer of that read
    try:
        token = Token(phases, torch.cuda.current_device())
    except (MemoryError, torch.OutOfMemoryError) as error:
        recorder.add("call_accepted", [0.0], "read", {**config, "error": str(error).splitlines()[0]})
        return recorder.close()
    with torch.inference_mode():
        expected = token.words()
        for way in ways_on(torch.cuda.get_device_capability()):
            _measure(recorder, token, way, expected, config)
    rows = recorder.close()
    return rows + [speedup_of(rows)]


def _verified(token: Token, way: _Way, grid: Grid, expected: list[int]) -> Callable[[], None]:
    launch = way.launch(token, grid)
    if not way.sums:
        return launch
    found = token.left_by(launch, grid)
    token.require_open()
    wrong = [phase for phase, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    if wrong:
        raise FloorError(
            f"{way.name} with {grid} did not read all of {len(wrong)} phases, phase {wrong[0]} among them."
        )
    return launch


def _token_us(launch: Callable[[], None], repeats: int) -> list[float]:
    return timing.cuda_graph_us([launch], repeats, TOKENS_A_GRAPH)


def _measure(recorder: Recorder, token: Token, way: _Way, expected: list[int], config: dict) -> None:
    launches = {grid: _verified(token, way, grid, expected) for grid in way.grids}
    trials = {grid: timing.Spread.of(_token_us(launch, TRIALS)).median for grid, launch in launches.items()}
    best = min(trials, key=trials.get)
    samples = _token_us(launches[best], recorder.sizes.repeats)
    token.require_open()
    nbytes = 0 if way.name == "barriers only" else token.nbytes
    detail = {
        "way": way.name,
        "phases": len(token.phases),
        "bytes": nbytes,
        "l2": "cold",
        "blocks": best.blocks * token.sms,
        "readers": best.readers,
        "in_flight": best.in_flight,
        "tried": len(trials),
        "read_gbps": recorder.cold_read_gbps,
    }
    doubt = doubt_of(nbytes, timing.Spread.of(samples).median, recorder)
    sha = source_sha256(way.source)
    recorder.add("token_floor", samples, "read", {**config, **detail}, doubt, kernel_sha256=sha)


def doubt_of(nbytes: int, us: float, recorder: Recorder) -> str:
    """Why a time for so many bytes is not to be believed as a cold one, or ""."""
    if not nbytes:
        return ""
    if nbytes <= recorder.cache_bytes:
        return f"All weights ({nbytes / 1e6:.0f} MB) fit the cache."
    gbps, peak = nbytes / us / 1e3, recorder.ceilings.peak_gbps
    return (
        f"It implies {gbps:.5g} GB/s, more than the device's peak of {peak:.5g} GB/s."
        if peak and gbps > peak
        else ""
    )


def speedup_of(rows: Sequence[Record]) -> Record:
    """What the persistent floor gains over the best chain with a kernel a phase: a derived `speedup`.

    Args:
        rows: `token_floor` records of one run.

    Returns:
        time of "pdl chain" ("graph chain" where that is missing) over that of "persistent"; `config.worth_it` is whether it
        reaches `WORTH_IT`.

    Raises:
        KeyError: a time is missing.
    """
    by_way = {row.config["way"]: row for row in rows if row.quantity == "token_floor"}
    baseline = "pdl chain" if "pdl chain" in by_way else "graph chain"
    chain, persistent = by_way[baseline], by_way["persistent"]
    gain = chain.value / persistent.value
    kept = ("model", "weights", "context", "phases", "bytes", "profile")
    config = {key: persistent.config[key] for key in kept if key in persistent.config}
    config |= {"way": "persistent", "baseline": baseline, "needed": WORTH_IT, "worth_it": gain >= WORTH_IT}
    formula = f"time of the {baseline} / time of the persistent kernel"
    source = f"{chain.id} and {persistent.id}"
    suspect = chain.suspect or persistent.suspect
    why = "One of its two times is suspect." if suspect else ""
    made = records.derived("speedup", gain, "read", config, persistent.device, source, formula)
    return made.replace(suspect=suspect, why_suspect=why) if suspect else made
