"""Train the built-in model: a small Llama and its tokenizer, from text that ships with every Python.

    python -m trapetum.builtin --out data/model --seconds 200

writes `model.safetensors` (bf16), `config.json`, `tokenizer.json` and `tokenizer_config.json`, a log of the run
(`training.jsonl`) and its summary (`training.json`), then prints held-out perplexities and what greedy decoding says.
`--shape builtin-40m` trains a model of six times the parameters in the same way; it is too large for the repository.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from trapetum import pretraining, records, text
from trapetum.build import write_atomically
from trapetum.models import config_of
from trapetum.pretraining import Recipe
from trapetum.shapes import MODELS, ModelShape
from trapetum.trained import as_records, heldout_perplexity, report, samples
from trapetum.training_text import encode_parts, make_tokenizer, prepare_texts, tokenizer_texts

FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.jsonl",
    "training.json",
    "model.safetensors",
)
# Sizes for tests and for trying the notebook on a CPU.
TINY = ModelShape(
    name="builtin-tiny",
    hidden=64,
    layers=2,
    intermediate=160,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=512,
    tied_embeddings=True,
    source="this project",
)


#: By shape, what a run of about 200 s on one data-centre GPU does. The larger model knows the text by heart sooner: lower
#: rate, more dropout, and evaluations twice as often, so that its best weights are not missed.
RECIPES = {
    "builtin": Recipe(),
    "builtin-40m": Recipe(learning_rate=1e-3, dropout=0.3, eval_every=100, patience=6),
    TINY.name: Recipe(),
}


@dataclass(frozen=True)
class Plan:
    """What a profile trains: a recipe, a shape, and at most so many characters of each kind of text."""

    recipe: Recipe
    shape: ModelShape
    limit: int | None


PLANS = {
    "smoke": Plan(Recipe(steps=60, batch=8, context=64, learning_rate=5e-3), TINY, 60_000),
    "quick": Plan(Recipe(seconds=60, batch=16, context=128, learning_rate=5e-3), TINY, 1_000_000),
    "full": Plan(RECIPES["builtin"], MODELS["builtin"], None),
}


def make_model(shape: ModelShape, context: int, seed: int = 0):
    """A `LlamaForCausalLM` of a shape with fresh float32 weights, for sequences of `context` tokens."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    ends = dict(bos_token_id=0, eos_token_id=0)
    config = config_of(shape, max_position_embeddings=context, rms_norm_eps=1e-5, **ends)
    return LlamaForCausalLM(config)


def train(
    out_dir: str | Path,
    recipe: Recipe | None = None,
    shape: ModelShape | None = None,
    device: str = "auto",
    stdlib: Path | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> dict:
    """Train the built-in model from scratch and save it.

    Args:
        out_dir: where the files named in `FILES` go; existing ones are replaced at the end.
        recipe: time, rates and mix; by default the shape's of `RECIPES`, meant for one data-centre GPU.
        shape: by default `MODELS["builtin"]`.
        device: `auto`, `cpu` or `cuda`.
        stdlib, limit: as in `prepare_texts`.
        progress: print a line per evaluation.

    Returns:
        the summary that `training.json` holds: recipe, text and token counts, the log's best row, the held-out
        perplexity by kind with window, stride and tokens, samples, and the Python that the text came from.

    Raises:
        ValueError: too little text for the context.
    """
    started = time.monotonic()
    shape = shape or MODELS["builtin"]
    recipe = recipe or RECIPES.get(shape.name, Recipe())
    device = _device(device)
    say = print if progress else (lambda *_: None)
    texts = prepare_texts(stdlib, limit)
    tokenizer = make_tokenizer(tokenizer_texts(texts["train"]), shape.vocab)
    tokenizer.model_max_length = recipe.context
    streams = _to_device(encode_parts(tokenizer, texts), device)
    say(f"text read, tokenizer trained and text encoded in {time.monotonic() - started:.1f} s")
    for kind, stream in streams["train"].items():
        say(f"  {kind}: {sum(map(len, texts['train'][kind])) / 1e6:.2f} MB, {len(stream) / 1e6:.2f} M tokens")
    model = make_model(shape, recipe.context, recipe.seed).to(device)
    rows: list[dict] = []
    best = pretraining.run(model, streams, recipe, started, _logger(rows, say))
    model = model.to(torch.bfloat16).eval()
    model.config.dtype = torch.bfloat16
    model.config.architectures = ["LlamaForCausalLM"]
    summary = _summary(recipe, shape, texts, streams, best, rows, device)
    summary["perplexity"] = heldout_perplexity(model, streams["heldout"], recipe.context)
    summary["samples"] = samples(model, tokenizer)
    _save(Path(out_dir), model, tokenizer, rows, summary)
    return summary


def _device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but PyTorch sees no GPU here; use --device cpu.")
    return device


def _to_device(streams: Mapping, device: str) -> dict[str, dict[str, torch.Tensor]]:
    return {part: {kind: s.to(device) for kind, s in kinds.items()} for part, kinds in streams.items()}


def _logger(rows: list[dict], say):
    def log(row: dict) -> None:
        rows.append(row)
        train_loss = f"{row['train_loss']:.3f}" if row["train_loss"] is not None else "-"
        say(
            f"step {row['step']:5d}  {row['seconds']:6.1f} s  {row['tokens'] / 1e6:6.1f} M tokens  "
            f"rate {row['learning_rate']:.1e}  train {train_loss}  "
            f"validation {row['validation_loss']:.3f}  held out {row['heldout_loss']:.3f}",
        )

    return log


def _summary(recipe, shape, texts, streams, best, rows, device) -> dict:
    last = rows[-1]
    return {
        "shape": shape.name,
        "vocabulary": shape.vocab,
        "recipe": asdict(recipe) | {"mix": dict(recipe.mix), "final_mix": dict(recipe.final_mix)},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "characters": {
            part: {k: sum(map(len, t)) for k, t in kinds.items()} for part, kinds in texts.items()
        },
        "tokens": {part: {k: len(s) for k, s in kinds.items()} for part, kinds in streams.items()},
        "heldout_sha256": text.text_sha256(
            "\n\n".join(t for kind in text.KINDS for t in texts["heldout"][kind])
        ),
        "kept": best,
        "trained_tokens": last["tokens"],
        "seconds": last["seconds"],
    }


def _save(out_dir: Path, model, tokenizer, rows: Sequence[dict], summary: dict) -> None:
    """Write everything under temporary names, the weights last."""
    from safetensors.torch import save

    shared = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {k: v.contiguous().cpu() for k, v in model.state_dict().items() if k not in shared}
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    found["training.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    found["training.json"] = (json.dumps(_without_samples(summary), indent=1) + "\n").encode()
    found["model.safetensors"] = save(weights, metadata={"format": "pt"})
    for name in FILES:
        write_atomically(out_dir / name, found[name])
        (out_dir / name).chmod(0o644)


def _without_samples(summary: dict) -> dict:
    kinds = {
        kind: {k: v for k, v in p.items() if k != "samples"} for kind, p in summary["perplexity"].items()
    }
    return summary | {"perplexity": kinds}


def read_log(directory: str | Path) -> list[dict]:
    """The rows of a run's `training.jsonl`."""
    return [json.loads(line) for line in (Path(directory) / "training.jsonl").read_text().splitlines()]


def _shapes() -> dict[str, ModelShape]:
    return {name: TINY if name == TINY.name else MODELS[name] for name in RECIPES}


def _arguments() -> argparse.Namespace:
    """What was typed; options of the recipe that were not are None."""
    parser = argparse.ArgumentParser(prog="python -m trapetum.builtin", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--shape", choices=tuple(RECIPES), default="builtin", help="what is trained")
    parser.add_argument("--seconds", type=float, help="wall time of the run (default 200)")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps instead of a time; then a seed fixes the result on a CPU"
    )
    parser.add_argument("--batch", type=int, help="sequences a step")
    parser.add_argument("--context", type=int, help="tokens a sequence")
    parser.add_argument("--learning-rate", type=float, help="default by shape")
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--dropout", type=float, help="default by shape")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--records", type=Path, help="append the run's records to this JSON Lines file")
    parser.add_argument("--stdlib", type=Path, help="folder of another installation's standard library")
    parser.add_argument(
        "--limit", type=int, help="at most this many characters of each kind of text, for trials"
    )
    parser.add_argument("--tiny", action="store_true", help=f"the same as --shape {TINY.name}, for trials")
    return parser.parse_args()


def main() -> None:
    """The command line of `python -m trapetum.builtin`."""
    args = vars(_arguments())
    out, device, stdlib, limit, kept = (args.pop(k) for k in ("out", "device", "stdlib", "limit", "records"))
    name = args.pop("shape")
    shape = _shapes()[TINY.name if args.pop("tiny") else name]
    changes = {key: value for key, value in args.items() if value is not None}
    summary = train(out, replace(RECIPES[shape.name], **changes), shape, device, stdlib, limit)
    print(report(summary))
    if kept:
        records.append(kept, as_records(summary))


if __name__ == "__main__":
    main()
