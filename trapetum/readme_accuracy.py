"""The README's tables of accuracy: the ladder of methods, what a model took to quantize, and what was asked of both."""

from collections.abc import Sequence

from trapetum import records as rec
from trapetum.figures.accuracy import losses
from trapetum.figures.accuracy_ladder import LADDER_ORDER, newest_ladders, of_ladder
from trapetum.readme_cells import cited, filled, markdown, one
from trapetum.readme_targets import Case, Target
from trapetum.records import Record

STRESSED = ", stressed"
WHOLE = "random:llama-2-7b"  # what times of quantizing are about


def _ladders(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Of each trained model of this project, its ladder on held-out text, by name."""
    found = [r for r in records if r.quantity == "perplexity" and r.config.get("text") == "builtin"]
    return {name: rows for name, rows in sorted(newest_ladders(found).items()) if name.startswith("builtin")}


def accuracy(records: Sequence[Record]) -> str:
    """Perplexity and divergence by bits and method, of each model as it is and with outlier channels folded in.

    A ladder without divergences, as older ones are, is left out.
    """
    ladders = _ladders(records).items()
    whole = [(name, rows) for name, rows in ladders if of_ladder(rows, records, "kl_divergence")]
    return "\n".join(_ladder(name, rows, records) for name, rows in whole)


def _ladder(name: str, found: Sequence[Record], records: Sequence[Record]) -> str:
    dense, divergences = one(found, "perplexity", "fp"), of_ladder(found, records, "kl_divergence")
    bits = sorted({r.config["bits"] for r in found if r.method != "fp"}, reverse=True)

    def cells(method: str) -> list[str]:
        pairs = [
            (one(found, "perplexity", method, bits=b), one(divergences, "kl_divergence", method, bits=b))
            for b in bits
        ]
        return [cell for score, kl in pairs for cell in (cited(score, 4), cited(kl))]

    methods = [m for m in LADDER_ORDER if any(r.method == m for r in found)]
    sizes = ", ".join(f"{key} {dense.config[key]}" for key in ("window", "stride", "tokens"))
    header = ["", *(text for b in bits for text in (f"{b} bits", "KL, nats"))]
    rows = [["as it is", cited(dense, 4), *[""] * (2 * len(bits) - 1)], *([m, *cells(m)] for m in methods)]
    return f"{name}, {sizes}:\n\n{markdown(header, rows)}"


def quantizing(records: Sequence[Record]) -> str:
    """Seconds to quantize a whole model by method and phase."""
    rows = []
    for r in rec.select(records, quantity="quantize_time", model=WHOLE):
        phases = [f"{phase} {seconds:.0f}" for phase, seconds in r.config["phases"].items() if seconds >= 1]
        held = f"{r.config['peak_gb']:.1f}" if r.config.get("peak_gb") else ""
        shown = f"{r.config['calibration_tokens']:,}" if r.config["calibration_tokens"] else "none"
        rows.append([f"{r.method}, {r.config['bits']} bits", shown, cited(r), ", ".join(phases), held])
    return filled(["all layers of Llama-2-7B shapes", "tokens shown", "s", "of these", "peak GB"], rows)


# What was asked


def _loss(ladder: Sequence[Record], method: str, bits: int):
    """The loss of one rung, nats a token, or None."""
    found = [x for x in losses(ladder) if x.record.method == method and x.record.config["bits"] == bits]
    return found[0] if found else None


def _left(name: str, ladder: Sequence[Record], of: str, bits: int) -> Case | None:
    """The loss of lnq-guided as a share of another method's."""
    ours, theirs = _loss(ladder, "lnq-guided", bits), _loss(ladder, of, bits)
    if ours is None or theirs is None or theirs.nats <= 0:
        return None
    return Case(ours.record, None, name, max(0.0, ours.nats) / theirs.nats)


def _seconds(records: Sequence[Record], method: str) -> Case | None:
    found = one(records, "quantize_time", method, model=WHOLE, bits=4, profile=(None, "full"))
    return Case(found, None, f"{found.config['layers']} layers") if found else None


def targets(records: Sequence[Record]) -> list[Target]:
    """What quantizing was asked for on one device; nothing where neither a stressed ladder nor a time was recorded.

    Args:
        records: of the device.
    """
    found = []
    for name, ladder in _ladders(records).items():
        if not name.endswith(STRESSED):
            continue
        for of, bits, most in (("lloyd", 4, 0.25), ("kmeans", 4, 0.5), ("kmeans", 3, 1 / 3)):
            what = f"loss of lnq-guided over that of {of}, {bits} bits"
            found.append(Target(what, round(most, 2), False, _left(name, ladder, of, bits)))
    for method, most, goal in (("kmeans", 30, "goal 10"), ("lnq-guided", 900, "goal 300")):
        case = _seconds(records, method)
        if case:
            found.append(Target(f"{method} of all 7B layers, s", most, False, case, "", goal))
    return found
