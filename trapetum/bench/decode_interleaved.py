"""The codebook model beside transformers on a CPU, all in memory, taking turns: every round each generates the same tokens.

A machine that other work shares is not equally fast from one minute to the next. Turns let all contenders meet the same
neighbours, and a ratio is taken within a round.
"""

import uuid
from collections.abc import Sequence

from trapetum import models, ops, timing
from trapetum.bench.decode_peers import CPU_DTYPES, EAGER, Contender, PeerRun, transformers_eager
from trapetum.bench.reading import cold_read_gbps
from trapetum.bench.recording import Recorder
from trapetum.bench.variants import variants
from trapetum.decode import Engine
from trapetum.decode import stages as stages_of
from trapetum.models import DTYPES
from trapetum.records import Record

ROUNDS = {"smoke": 2, "quick": 3, "full": 7}
_ROOM = 1.2  # beyond the weights: activations, packing
_BEST = "best dtype"


def decode_interleaved(
    model_name: str | None = None,
    profile: str = "quick",
    new_tokens: int | None = None,
    rounds: int | None = None,
    dtypes: Sequence[str] = CPU_DTYPES,
    bits: int = 4,
    lm_head: bool = False,
) -> list[Record]:
    """Decode at batch 1 on the CPU with the own engine's codebook model and with transformers, in turns.

    Args:
        model_name: as for `models.load`; None for the profile's random shape.
        profile: "smoke", "quick" or "full".
        new_tokens: decode steps of each turn; None for the profile's, cut where the slowest would not fit the profile's budget.
        rounds: turns of each; None for the profile's.
        dtypes: of transformers' models: "fp32", "bf16", "fp16".
        bits: of the codebook weights.
        lm_head: codes in the output head too.

    Returns:
        `decode_speed` of each with one sample a round and the same `config.run`, and `speedup` of the codebook model over each
        of transformers' dtypes and over the fastest of them, the ratio taken within each round (`config.baseline`).

    Raises:
        ValueError: an unknown dtype, or no round.
        MemoryError: the models do not fit in memory together.
    """
    recorder = Recorder("cpu", profile)
    rounds = ROUNDS[profile] if rounds is None else rounds
    _require(dtypes, rounds)
    name = model_name or recorder.sizes.model
    recorder.cold_read_gbps = cold_read_gbps(recorder)
    _require_room(name, dtypes)
    contenders = [
        _codebook(name, bits, lm_head),
        *(transformers_eager(name, "cpu", dtype) for dtype in dtypes),
    ]
    runs = [PeerRun(recorder, contender, new_tokens) for contender in contenders]
    _settle(runs)
    _add(recorder, runs, _take_turns(runs, rounds))
    return recorder.close()


def _require(dtypes: Sequence[str], rounds: int) -> None:
    unknown = [dtype for dtype in dtypes if dtype not in DTYPES]
    if unknown or not dtypes:
        raise ValueError(
            f"transformers runs in {', '.join(DTYPES)}; asked for {', '.join(unknown) or 'none'}."
        )
    if rounds < 1:
        raise ValueError(f"{rounds} rounds were asked for; ask for at least 1.")


def _require_room(name: str, dtypes: Sequence[str]) -> None:
    """Refuse what would swap. Only a random shape's size is known before it is loaded."""
    shape = models.MODELS.get(name.removeprefix("random:"))
    if shape is None:
        return
    widths = [DTYPES[dtype].itemsize for dtype in dtypes]
    need = (
        _ROOM * shape.parameters * (sum(widths) + 2)
    )  # the codebook model's 16-bit embedding and head, and its codes
    free = timing.free_bytes("cpu")
    if need > free:
        raise MemoryError(
            f"{name} in {', '.join(dtypes)} and in codes takes {need / 1e9:.1f} GB together, and {free / 1e9:.1f} GB are "
            "free; take fewer dtypes or a smaller shape."
        )


def _codebook(name: str, bits: int, lm_head: bool = False) -> Contender:
    """The own engine at the CPU's last stage."""
    variant = next(variants(name, "cpu", ["codebook"], [bits], lm_head))
    stage = stages_of("cpu")[-1]
    return Contender(
        "codebook",
        variant.loaded,
        {**variant.config, "stage": stage},
        lambda n: Engine(variant.loaded, stage, max_context=n).generate,
    )


def _settle(runs: Sequence[PeerRun]) -> None:
    """Each by itself; then all generate as many tokens as the slowest can afford."""
    for run in runs:
        run.settle()
    tokens = min(run.tokens for run in runs)
    for run in runs:
        run.tokens = tokens


def _take_turns(runs: Sequence[PeerRun], rounds: int) -> list[list[float]]:
    """Tokens per second by contender, one a round; a first round is not kept."""
    speeds = [[run.once().tokens_per_s for run in runs] for _ in range(rounds + 1)][1:]
    return [list(of_one) for of_one in zip(*speeds, strict=True)]


def _add(recorder: Recorder, runs: Sequence[PeerRun], speeds: list[list[float]]) -> None:
    about = {"interleaved": True, "run": uuid.uuid4().hex[:12], "rounds": len(speeds[0])}
    ours, *theirs = runs
    sha = ops.kernel_sha256("cpu")
    for run, samples in zip(runs, speeds, strict=True):
        of_ours = {"kernel_sha256": sha} if run is ours else {}
        recorder.add("decode_speed", samples, run.contender.method, run.config(**about), **of_ours)
    baselines = {
        run.contender.config["dtype"]: samples for run, samples in zip(theirs, speeds[1:], strict=True)
    }
    best = max(baselines, key=lambda dtype: timing.Spread.of(baselines[dtype]).median)
    for label, dtype in [*((dtype, dtype) for dtype in baselines), (_BEST, best)]:
        ratios = [a / b for a, b in zip(speeds[0], baselines[dtype], strict=True)]
        config = ours.config(**about, baseline=f"{EAGER} {label}", baseline_dtype=dtype)
        recorder.add("speedup", ratios, "codebook", config, kernel_sha256=sha)
