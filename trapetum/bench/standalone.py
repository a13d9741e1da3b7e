"""The C++ program beside the Python engine: the same exported step, in turns, so that "as fast without Python" is measured."""

import statistics
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trapetum import export, ops
from trapetum.bench.reading import cold_read_gbps
from trapetum.bench.recording import Recorder
from trapetum.bench.variants import Variant, variants
from trapetum.decode import Engine
from trapetum.records import Record

ROUNDS = {"smoke": 2, "quick": 3, "full": 7}
PYTHON, CPP = "python", "c++"
_KEPT_RUN = (
    1  # of two in the program's process: the first brings the clocks up, as the Python engine's warm-up does
)


@dataclass(frozen=True)
class Turn:
    """One generation of a runtime: its tokens, and the speed after the first in tok/s."""

    tokens: list[int]
    tokens_per_s: float


def take_turns(runtimes: dict[str, Callable[[], Turn]], rounds: int) -> dict[str, list[Turn]]:
    """Call each runtime once a round; who begins alternates.

    Returns:
        the turns by runtime, one a round.
    """
    found: dict[str, list[Turn]] = {name: [] for name in runtimes}
    for number in range(rounds):
        order = list(runtimes) if number % 2 == 0 else list(reversed(runtimes))
        for name in order:
            found[name].append(runtimes[name]())
    return found


@torch.inference_mode()
def launched_tokens(step: export.Step, prompt: Sequence[int], count: int) -> list[int]:
    """Tokens by the step's launches from Python, the prompt fed token by token as the program does.

    The engine's prefill takes a prompt's rows at once and rounds otherwise, so that with random weights, whose logits are often
    nearly tied, its tokens soon part from these; the program's must not.

    Args:
        step: of one row, with `state.tokens` and `state.position` among its tensors; its state is overwritten.
        prompt: token ids.
        count: new tokens.
    """
    tensors, made = step.tensors(), []
    token, position = tensors["state.tokens"], tensors["state.position"]
    for place in range(len(prompt) + count - 1):
        if place < len(prompt):
            token.fill_(prompt[place])
            position.fill_(place)
            step.embed()
        step.advance()
        if place >= len(prompt) - 1:
            made.append(token.clone())
    return torch.cat(made).tolist()


def agreement(turns: Sequence[Turn], wanted: Sequence[int]) -> list[float]:
    """Per turn, the share of `wanted` that was made at the same place."""
    return [statistics.fmean(a == b for a, b in zip(wanted, turn.tokens, strict=True)) for turn in turns]


def add_turns(
    recorder: Recorder,
    turns: dict[str, list[Turn]],
    wanted: Sequence[int],
    config: dict,
    sha: str | None,
) -> None:
    """`decode_speed` of both runtimes, the program's `speedup` over Python within each round, and `token_agreement`.

    Where the program's tokens are not `wanted` its speed is marked suspect: a faster wrong answer proves nothing.
    """
    run = {**config, "interleaved": True, "run": uuid.uuid4().hex[:12], "rounds": len(turns[PYTHON])}
    same = agreement(turns[CPP], wanted)
    doubt = (
        ""
        if min(same) == 1
        else f"only {min(same):.0%} of the tokens are those of the same launches from Python."
    )
    for runtime, made in turns.items():
        about = {**run, "runtime": runtime, "beside": PYTHON if runtime == CPP else CPP}
        speeds, why = [turn.tokens_per_s for turn in made], doubt if runtime == CPP else ""
        recorder.add("decode_speed", speeds, "codebook", about, doubt=why, kernel_sha256=sha)
    pairs = zip(turns[CPP], turns[PYTHON], strict=True)
    about = {**run, "runtime": CPP, "beside": PYTHON, "baseline": PYTHON}
    ratios = [cpp.tokens_per_s / python.tokens_per_s for cpp, python in pairs]
    recorder.add("speedup", ratios, "codebook", about, doubt=doubt, kernel_sha256=sha)
    source = "tokens of the program against those of the same launches made one by one from Python"
    recorder.add("token_agreement", same, "codebook", about, kernel_sha256=sha, source=source)


def _prompt(vocabulary: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (length,), generator=generator).tolist()


def _runtimes(
    engine: Engine, folder: Path, prompt: Sequence[int], count: int
) -> dict[str, Callable[[], Turn]]:
    def python() -> Turn:
        engine.generate(prompt, count)  # brings the clocks up
        made = engine.generate(prompt, count)
        return Turn(made.tokens, made.tokens_per_s)

    def cpp() -> Turn:
        output = export.run_standalone(folder, prompt, count, runs=1 + _KEPT_RUN)[_KEPT_RUN]
        return Turn(output.tokens, output.tokens_per_s)

    return {PYTHON: python, CPP: cpp}


def _measure(
    recorder: Recorder, variant: Variant, folder: Path, new_tokens: int, rounds: int, kv: str
) -> None:
    length = recorder.sizes.prompt_tokens
    context = length + new_tokens
    engine = Engine(variant.loaded, export.STAGE, max_context=context, kv=kv)
    export.export_engine(engine, variant.loaded, folder)
    export.build_standalone(folder)
    prompt = _prompt(variant.loaded.shape.vocab, length)
    wanted = launched_tokens(export.step_of(engine), prompt, new_tokens)
    turns = take_turns(_runtimes(engine, folder, prompt, new_tokens), rounds)
    config = {
        **variant.config,
        "stage": export.STAGE,
        "kv": kv,
        "context": length + new_tokens / 2,
        "new_tokens": new_tokens,
        "prompt_tokens": length,
        "bytes": variant.token_bytes(length + new_tokens / 2, kv),
    }
    add_turns(recorder, turns, wanted, config, ops.kernel_sha256(recorder.device))


def compare_runtimes(
    model_name: str | None = None,
    profile: str = "quick",
    new_tokens: int | None = None,
    bits: int = 4,
    rounds: int | None = None,
    kv: str = "fp16",
    folder: str | Path | None = None,
) -> list[Record]:
    """Decode with the Python engine and with the exported program in turns, on the first GPU.

    Each turn of the program is a process of its own, which loads the weights and warms up before its clock starts.

    Args:
        model_name: as for `models.load`; None for the profile's random shape.
        profile: "smoke", "quick" or "full".
        new_tokens: of each turn; None for the profile's.
        bits: of the codebook weights.
        rounds: turns of each; None for the profile's.
        kv: how the cache is kept: "fp16", "int8" or "int4".
        folder: a new directory to keep the export in; None for a temporary one.

    Returns:
        `decode_speed` of both (`config.runtime` "python" or "c++", `config.beside` the other; one sample a round), `speedup`
        of the program over Python (the ratio taken within each round) and `token_agreement`.

    Raises:
        ExportError: the step cannot be exported, or the program cannot be built or failed.
    """
    recorder = Recorder("cuda", profile)
    recorder.cold_read_gbps = cold_read_gbps(recorder)
    (variant,) = variants(model_name or recorder.sizes.model, "cuda", ["codebook"], [bits])
    count, rounds = new_tokens or recorder.sizes.new_tokens, rounds or ROUNDS[profile]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder) if folder else Path(temporary) / "export"
        _measure(recorder, variant, place, count, rounds, kv)
    return recorder.close()
