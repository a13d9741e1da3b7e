"""What a freshly trained model scores and says: held-out perplexities, their records, greedy samples."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

import torch

from trapetum import machine, records
from trapetum.perplexity import perplexity
from trapetum.records import Record

PROMPTS = (
    "Return a",
    "The :mod:",
    "class ",
    'The "with" statement',
    'def read(self, size=-1):\n    """',
    "Raises ValueError if",
)


def heldout_perplexity(model, streams: Mapping[str, torch.Tensor], context: int) -> dict[str, dict]:
    """Perplexity by kind of held-out text: value, interval, window, stride, tokens, samples (one a window)."""
    found = {}
    for kind, stream in streams.items():
        if len(stream) > context:
            p = perplexity(model, stream, window=context, stride=context)
            samples = [math.exp(n / c) for n, c in zip(p.nll, p.counts, strict=True)]
            found[kind] = {k: v for k, v in asdict(p).items() if k not in ("nll", "counts")} | {
                "samples": samples
            }
    return found


@torch.inference_mode()
def samples(model, tokenizer, prompts: Sequence[str] = PROMPTS, new_tokens: int = 80) -> dict[str, str]:
    """Greedy continuations: prompt -> what the model adds."""
    found = {}
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
        room = model.config.max_position_embeddings - ids.shape[1]
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(new_tokens, room),
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        found[prompt] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return found


def variety(texts: Iterable[str], length: int = 12) -> float:
    """Share of the stretches of `length` characters that occur once in their text: near 0 for a loop, 1 for none."""
    once = total = 0
    for text in texts:
        counts = Counter(text[i : i + length] for i in range(len(text) - length + 1))
        once += sum(n == 1 for n in counts.values())
        total += counts.total()
    return once / total if total else 0.0


def as_records(summary: Mapping) -> list[Record]:
    """A run's training time and held-out perplexities as measured records of this machine.

    Args:
        summary: what `train` returned, on this machine and just now.

    Returns:
        one `train_time` record (s) and one `perplexity` record a kind of text (samples: one a window).
    """
    origin = machine.provenance("cpu" if summary["device"] == "cpu" else "cuda")
    config = {"model": summary["shape"], "bits": 16, "trained_tokens": summary["trained_tokens"]}
    found = [records.measured("train_time", [summary["seconds"]], "fp", config, **origin)]
    for kind, p in summary["perplexity"].items():
        what = {k: p[k] for k in ("window", "stride", "tokens")} | {"interval": list(p["interval"])}
        what |= {"text": f"held-out {kind}", "text_sha256": summary["heldout_sha256"][:12]}
        more = {"value": p["value"], "source": _SOURCE}
        found.append(records.measured("perplexity", p["samples"], "fp", config | what, **more, **origin))
    return found


_SOURCE = "exp of the mean negative log-likelihood of all scored tokens; samples: one a window"


def report(summary: Mapping) -> str:
    """Held-out perplexities and samples of a run, for a terminal."""
    lines = [f"kept step {summary['kept']['step']}, validation loss {summary['kept']['validation_loss']:.4f}"]
    for kind, p in summary["perplexity"].items():
        low, high = p["interval"]
        lines.append(
            f"held-out {kind}: perplexity {p['value']:.2f} ({low:.2f} to {high:.2f}), "
            f"window {p['window']}, stride {p['stride']}, {p['tokens']} tokens"
        )
    for prompt, said in summary["samples"].items():
        lines.append(f"--- {prompt!r}\n{prompt}{said}")
    return "\n".join(lines)
