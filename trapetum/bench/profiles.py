"""How much each profile measures: every size of the bench in one place."""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Sizes:
    """Sizes of one profile on one device.

    Attributes:
        shapes: (in_features, out_features) of the products.
        bits: bits of the codebook weights.
        read_bytes: buffer of the read-bandwidth probe.
        repeats: graph replays (GPU) or rounds (CPU) per figure.
        budget_s: seconds after which a CPU stops starting rounds, per shape.
        model: the model that is decoded.
        new_tokens, prompt_tokens, runs: decode: tokens per run, length of the prompt, timed runs.
        token_budget_s: a decode on a slow stage is cut to the tokens that fit this many seconds.
        energy_s: length of one energy window; below 5 s the counter's step is no longer small beside it.
        idle_s, quiet_s: length of the idle window, and how long the device is left alone before it.
        contexts: cached tokens at which speed and memory are measured.
        text_tokens, window, stride: perplexity.
        rotation: share of the usual rotation over distinct weights; half is still more than a CPU's cache, since the
            methods take turns.
        rows: of x, in the comparison of small batches.
        batch_shapes: (in_features, out_features) of that comparison.
        law_shapes: (in_features, out_features) over a range of bytes, to fit `t0 + bytes / BW` on; none of them is in
            `shapes` of the quick profile, so that a run measures nothing twice.
    """

    shapes: tuple[tuple[int, int], ...]
    bits: tuple[int, ...]
    read_bytes: int
    repeats: int
    budget_s: float
    model: str
    new_tokens: int
    prompt_tokens: int
    runs: int
    token_budget_s: float
    energy_s: float
    idle_s: float
    text_tokens: int
    window: int = 512
    stride: int = 256
    rotation: float = 1.0
    quiet_s: float = 1.0
    contexts: tuple[int, ...] = (512, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
    rounds: int = 3  # of an ablation
    law_shapes: tuple[tuple[int, int], ...] = ()
    rows: tuple[int, ...] = (1, 2, 4, 8, 16)
    batch_shapes: tuple[tuple[int, int], ...] = ((4096, 4096),)


_LLAMA_LIKE = ((4096, 4096), (11008, 4096), (4096, 11008))
_LAW_CPU = ((1024, 1024), (2048, 1024), (2048, 2048), (2048, 5632), (3072, 8192), (4096, 8192))
_LAW_GPU = (
    (4096, 1024),
    (4096, 12288),
    (14336, 4096),
    (8192, 8192),
    (5120, 13824),
    (4096, 22016),
    (28672, 8192),
)
_BATCH_GPU = ((4096, 4096), (11008, 4096), (4096, 22016), (8192, 28672))
_CONTEXTS_CPU = (512, 2048, 4096, 8192)
_LAW_SMOKE = ((512, 1024), (1024, 2048), (2048, 2048), (2048, 4096))
_SMOKE = dict(
    law_shapes=_LAW_SMOKE,
    rows=(1, 2, 4),
    batch_shapes=((1024, 1024),),
    new_tokens=4,
    prompt_tokens=4,
    runs=1,
    token_budget_s=2.0,
    energy_s=0.3,
    idle_s=0.2,
    rotation=0.5,
    quiet_s=0.0,
    contexts=(64, 128),
    rounds=2,
)
_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)
_QUICK = dict(prompt_tokens=4, runs=1, energy_s=1.5, idle_s=1.0, text_tokens=8192)
_FULL = dict(
    rows=_ROWS, new_tokens=512, prompt_tokens=6, runs=5, energy_s=5.0, idle_s=5.0, rounds=5, text_tokens=65536
)


def _sizes() -> dict[tuple[str, str], Sizes]:
    from trapetum.shapes import GEMV_SHAPES, QUICK_SHAPES

    every, quick = tuple(map(tuple, GEMV_SHAPES)), tuple(map(tuple, QUICK_SHAPES))
    cpu, gpu = "random:llama-0.9b", "random:llama-2-7b"
    smoke = dict(model="random:llama-tiny", text_tokens=512, window=128, stride=64, **_SMOKE)
    return {
        ("smoke", "cpu"): Sizes(((1024, 1024),), (4,), GIB // 16, 3, 1.0, **smoke),
        ("smoke", "cuda"): Sizes(((1024, 1024),), (4, 2), GIB // 4, 5, 1.0, **smoke),
        ("quick", "cpu"): Sizes(
            _LLAMA_LIKE,
            (4,),
            GIB // 2,
            7,
            2.5,
            cpu,
            new_tokens=16,
            token_budget_s=2.0,
            law_shapes=_LAW_CPU,
            batch_shapes=((2048, 2048),),
            contexts=_CONTEXTS_CPU,
            **_QUICK,
        ),
        ("quick", "cuda"): Sizes(
            quick,
            (8, 4, 3, 2),
            GIB,
            15,
            2.5,
            gpu,
            new_tokens=128,
            token_budget_s=10.0,
            law_shapes=_LAW_GPU,
            **_QUICK,
        ),
        ("full", "cpu"): Sizes(
            every,
            (8, 4, 3, 2),
            GIB,
            15,
            20.0,
            cpu,
            token_budget_s=30.0,
            law_shapes=_LAW_CPU,
            contexts=_CONTEXTS_CPU,
            **_FULL,
        ),
        ("full", "cuda"): Sizes(
            every,
            (8, 4, 3, 2),
            4 * GIB,
            25,
            20.0,
            gpu,
            token_budget_s=60.0,
            law_shapes=_LAW_GPU,
            batch_shapes=_BATCH_GPU,
            **_FULL,
        ),
    }


PROFILES = ("smoke", "quick", "full")


def sizes(profile: str, device: str) -> Sizes:
    """The sizes of a profile on "cpu" or "cuda".

    Raises:
        ValueError: an unknown profile.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r} is unknown; it is one of {', '.join(PROFILES)}.")
    return _sizes()[profile, device]
