"""Write a decode step as files that `kernels/standalone/decode.cpp` runs without Python.

    plan.txt               buffers and launches of one token, one a line; `kernels/standalone/plan.h` describes the format
    kernels/<sha256>.cubin the compiled kernels
    weights.safetensors    what the buffers start with where it is not one byte throughout
    decode                 the program, where there is a C++ compiler

The launches are noted, not made (`launch.recorded`), so an export changes nothing in the step.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trapetum import cuda, models, swap
from trapetum.decode import TOKENS_A_GRAPH, Engine
from trapetum.export_plan import (
    ROLES,
    About,
    Buffers,
    ExportError,
    Kernels,
    Recorded,
    Step,
    layout_of,
    plan_text,
    record,
    write_weights,
)
from trapetum.kernel_cache import write_atomically
from trapetum.models import Loaded, QuantizeSpec
from trapetum.paths import KERNELS, require_clone

STANDALONE = KERNELS / "standalone"
PROGRAM = "decode"
PLAN, WEIGHTS, CUBINS = "plan.txt", "weights.safetensors", "kernels"
STAGE = "pdl"  # the engine's stage that is exported
_MANY_TOKENS = 1 << 16  # to take the bytes of one cached token from, blocks of a quantized cache included


# --- the folder --------------------------------------------------------------------------------------------------------


def _check_step(step: Step, about: About) -> None:
    tokens = step.tensors().get(ROLES["token"])
    if tokens is not None and tokens.numel() != 1:
        raise ExportError(
            f"the step feeds {tokens.numel()} rows at once, and the program feeds one; make it with rows=1."
        )
    if not 1 <= about.tokens_a_graph <= 64:
        raise ExportError(f"tokens_a_graph is {about.tokens_a_graph}; choose 1 to 64.")


def _require_new(folder: Path) -> None:
    if folder.is_symlink() or folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ExportError(f"{folder} exists already; name a new directory.")


def _write(folder: Path, step: Recorded, about: About) -> None:
    kernels = Kernels(step.launches)
    kept = {buffer.name: buffer.tensor for buffer in step.buffers.all if buffer.fill is None}
    layout = layout_of(kept)
    (folder / PLAN).write_text(plan_text(about, step, kernels, layout))
    (folder / CUBINS).mkdir()
    for digest, path in kernels.cubins.items():
        shutil.copyfile(path, folder / CUBINS / f"{digest}.cubin")
    with open(folder / WEIGHTS, "wb") as file:
        write_weights(file, kept, layout)


def export(step: Step, about: About, folder: str | Path) -> Path:
    """Write a step to a new directory; it appears whole or not at all.

    Args:
        step: a decode step of one row.
        about: what the plan says of the model.
        folder: a new directory, or an empty one.

    Returns:
        the directory.

    Raises:
        ExportError: the step cannot be exported, or the directory holds something.
        OSError: the directory cannot be written.
    """
    folder = Path(folder)
    _require_new(folder)
    _check_step(step, about)
    noted = Recorded(Buffers(step.tensors()), record(step.embed), record(step.advance))
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.absolute().name}."))
    try:
        temporary.chmod(0o755)  # mkdtemp makes private folders
        _write(temporary, noted, about)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


# --- a model -------------------------------------------------------------------------------------------------------------


def _eos_of(loaded: Loaded) -> tuple[int, ...]:
    """Tokens that end a text; none for random weights, which write none."""
    if loaded.kind == "random":
        return ()
    config = getattr(loaded.model, "generation_config", None)
    found = [getattr(config, "eos_token_id", None), getattr(loaded.tokenizer, "eos_token_id", None)]
    listed = [one for ids in found for one in (ids if isinstance(ids, list | tuple) else [ids])]
    return tuple(sorted({token for token in listed if token is not None and 0 <= token < loaded.shape.vocab}))


def _token_bytes(model: torch.nn.Module) -> int:
    """Bytes of weights read for a token: all but the embedding, which counts where it is the head too."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = getattr(head, "weight", None) is embedding
    return swap.weight_bytes(model) - (0 if tied else embedding.nbytes)


def about_model(
    loaded: Loaded, context: int, kv: str = "fp16", tokens_a_graph: int = TOKENS_A_GRAPH
) -> About:
    """What a plan says of a model on this machine's current GPU.

    Args:
        loaded: the model, on its GPU.
        context: places of the cache.
        kv: how the cache is kept.
        tokens_a_graph: how many tokens the program captures into one graph.
    """
    embedding, shape = loaded.model.get_input_embeddings().weight, loaded.shape
    major, minor = torch.cuda.get_device_capability(embedding.device)
    sizes = {name: getattr(shape, name) for name in ("layers", "hidden", "intermediate", "heads", "kv_heads")}
    cached = shape.kv_bytes(_MANY_TOKENS, embedding.element_size(), kv) // _MANY_TOKENS
    return About(
        loaded.name,
        f"sm_{major}{minor}",
        embedding.shape[0],
        context,
        _eos_of(loaded),
        _token_bytes(loaded.model),
        cached,
        tokens_a_graph,
        sizes,
    )


def step_of(engine: Engine) -> Step:
    """The step that an engine replays.

    Raises:
        ExportError: the engine's stage calls PyTorch.
    """
    step = engine.step
    if step is None:
        raise ExportError(
            f"the stage {engine.stage} calls PyTorch for each token, so there is nothing to export; choose the stage "
            f"fused or {STAGE}."
        )
    return step


def export_engine(
    engine: Engine, loaded: Loaded, folder: str | Path, tokens_a_graph: int = TOKENS_A_GRAPH
) -> Path:
    """Write the step of an engine.

    Args:
        engine: at the stage `fused` or `pdl`, with one row.
        loaded: its model.
        folder, tokens_a_graph: as for `export` and `About`.

    Returns:
        the directory.

    Raises:
        ExportError: the engine's stage has no step that can be exported, or as `export`.
    """
    return export(step_of(engine), about_model(loaded, engine.max_context, engine.kv, tokens_a_graph), folder)


def export_model(
    name: str,
    folder: str | Path,
    bits: int | None = None,
    context: int = 1024,
    kv: str = "fp16",
    tokens_a_graph: int = TOKENS_A_GRAPH,
) -> Path:
    """Load a model on the GPU and write its decode step, with the program where there is a compiler.

    Args:
        name: as for `models.load`.
        folder: a new directory.
        bits: quantize to so many bits while loading (random codes for random weights); None takes the weights as they are.
        context: places of the cache.
        kv: how the cache is kept: "fp16", "int8" or "int4".
        tokens_a_graph: how many tokens the program captures into one graph.

    Returns:
        the directory.

    Raises:
        ExportError: there is no GPU, or as `export`.
    """
    if cuda.why_not():
        raise ExportError(f"an export compiles for the GPU of this machine: {cuda.why_not()}")
    _require_new(Path(folder))
    random = bits is None or name.startswith("random:")
    how = {"bits": bits} if random else {"quantize": QuantizeSpec(bits)}
    loaded = models.load(name, "cuda", **how)
    engine = Engine(loaded, STAGE, max_context=context, kv=kv)
    return export_engine(engine, loaded, folder, tokens_a_graph)


# --- the program -------------------------------------------------------------------------------------------------------


def cxx_compiler() -> str | None:
    """The system's C++ compiler: `$CXX` if set, else the first of c++, g++, clang++, or None."""
    candidates = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def build_command(compiler: str, out: Path) -> list[str]:
    """The command that builds the program as `out`."""
    source = STANDALONE / f"{PROGRAM}.cpp"
    return [compiler, "-std=c++17", "-O2", f"-I{KERNELS}", str(source), "-o", str(out), "-ldl"]


def build_standalone(folder: str | Path) -> Path:
    """Build the program into `folder` with the system's C++ compiler.

    Returns:
        its path.

    Raises:
        ExportError: there is no compiler, or it refuses the source.
    """
    require_clone()
    compiler, target = cxx_compiler(), Path(folder) / PROGRAM
    if compiler is None:
        raise ExportError(
            "no C++ compiler was found; install g++ or clang++, or name one in the CXX variable."
        )
    with tempfile.TemporaryDirectory() as place:
        built = Path(place) / PROGRAM
        done = subprocess.run(build_command(compiler, built), capture_output=True, text=True)
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise ExportError(f"{compiler} does not build {STANDALONE / PROGRAM}.cpp: {said}")
        write_atomically(target, built.read_bytes())
    target.chmod(0o755)
    return target


@dataclass(frozen=True)
class Output:
    """What the program printed of one run.

    Attributes:
        tokens: new token ids.
        first_token_s: seconds from the start to the first token.
        tokens_per_s: speed after the first token; None for a single token.
        gb_per_s: of weights and cache; None where the plan does not say the bytes.
    """

    tokens: list[int]
    first_token_s: float
    tokens_per_s: float | None = None
    gb_per_s: float | None = None


def _outputs(text: str) -> list[Output]:
    """The runs in what the program printed."""
    runs: list[dict] = []
    for line in text.splitlines():
        word, *values = line.split() or [""]
        if word == "tokens":
            runs.append({"tokens": [int(value) for value in values]})
        elif word in ("first_token_s", "tokens_per_s", "gb_per_s"):
            runs[-1][word] = float(values[0])
    return [Output(**run) for run in runs]


def run_standalone(
    folder: str | Path, prompt: Sequence[int], new_tokens: int, runs: int = 1, ignore_eos: bool = True
) -> list[Output]:
    """Decode with the program of an exported directory.

    Args:
        folder: an export with its program.
        prompt: token ids.
        new_tokens: at most so many.
        runs: how often, in one process.
        ignore_eos: go on behind a token that ends the text.

    Raises:
        ExportError: the program failed; its sentence.
    """
    folder = Path(folder).absolute()
    command = [str(folder / PROGRAM), str(folder), "-n", str(new_tokens), "--runs", str(runs)]
    command += ["--ignore-eos"] if ignore_eos else []
    prompt_words = " ".join(map(str, prompt))
    done = subprocess.run(
        command, input=prompt_words, capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        raise ExportError(f"the program failed: {done.stderr.strip() or f'exit code {done.returncode}.'}")
    return _outputs(done.stdout)
