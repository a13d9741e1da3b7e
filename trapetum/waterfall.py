"""Where the time of a token goes: parts measured by leaving them out one after the other, which add up to the token.

`trapetum.bench.breakdown` makes the records (`token_part`, us). Those of one measurement share `config.run`: the whole
token, what each ablation took away, and what follows from these by bytes and counts. Here they become a `Run`, a run is
checked to close, and `compare` makes the bridge from any run to any other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trapetum.records import Record, select
from trapetum.shapes import ModelShape, matrix_bytes

TOKEN = "token"  # the whole of it
PRODUCTS, LEFT = "products", "what is left"  # measured, then split further by bytes and counts
IDEAL, CODEBOOKS, HEAD, KERNEL = "ideal bytes", "codebook overhead", "output head", "kernel efficiency"
LAUNCHES, DISPATCH, CASTS = "launches", "dispatch", "casts"
ATTENTION, NORMS, SAMPLING = "attention and cache", "norms", "sampling"
OTHERS = "all but products"  # where a stage cannot leave out more than its products

PARTS = (IDEAL, CODEBOOKS, HEAD, KERNEL, LAUNCHES, DISPATCH, OTHERS, CASTS, ATTENTION, NORMS, SAMPLING)
_SPLIT = (TOKEN, PRODUCTS, LEFT)
_WITHIN_OTHERS = (LAUNCHES, DISPATCH, ATTENTION, NORMS, SAMPLING)
TOLERANCE = 0.03
_NEAR = 16  # tokens that two contexts may differ by and still count as one


class WaterfallError(ValueError):
    """The parts are not those of one measurement; the message says what is wrong."""


@dataclass(frozen=True)
class Part:
    """One part of a token's time, or one step of a bridge.

    Attributes:
        label: one of `PARTS`, or the name of a run at the ends of a bridge.
        us: microseconds; negative where leaving the part out made the token slower, or where a step saves time.
        kind: "measured", or "derived" (from bytes, counts, or as a difference of measured runs).
    """

    label: str
    us: float
    kind: str


@dataclass(frozen=True)
class Run:
    """One token taken apart.

    Attributes:
        token: the record of the whole token.
        records: the records of its parts, in the order of `PARTS`.
    """

    token: Record
    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        """What ran, e.g. `4-bit codebook, pdl`."""
        config = self.token.config
        weights = f"{config['bits']}-bit codebook" if self.token.method == "codebook" else self.token.method
        return ", ".join(str(word) for word in (weights, config.get("stage")) if word)

    @property
    def us(self) -> float:
        """Measured microseconds of the token."""
        return self.token.value

    @property
    def ideal_us(self) -> float:
        """Microseconds if the codes (or dense weights) were read at the read bandwidth and nothing else happened."""
        return self.of(IDEAL)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts, in the order of `PARTS`."""
        return tuple(Part(r.config["part"], r.value, r.kind) for r in self.records)

    def of(self, label: str) -> float:
        """Microseconds of one part, 0 where the run has none."""
        return sum(part.us for part in self.parts if part.label == label)

    @property
    def missing_us(self) -> float:
        """What the parts do not explain of the token."""
        return self.us - sum(part.us for part in self.parts)

    def checked(self, tolerance: float = TOLERANCE) -> "Run":
        """This run, if its parts add up to the token within a share `tolerance`.

        Raises:
            WaterfallError: they do not, or a part occurs twice.
        """
        labels = [part.label for part in self.parts]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise WaterfallError(f"{self.name}: {', '.join(twice)} is counted twice.")
        if abs(self.missing_us) > tolerance * self.us:
            raise WaterfallError(
                f"{self.name}: the parts add up to {self.us - self.missing_us:.4g} us and the token took {self.us:.4g}; "
                f"they may differ by {tolerance:.0%}, so a part is missing or counted twice."
            )
        return self


def runs(pool: Iterable[Record]) -> list[Run]:
    """The runs among some records, in the order of their measurement; parts without a whole token are left out.

    Raises:
        WaterfallError: a run has two whole tokens.
    """
    groups: dict[tuple, list[Record]] = {}
    for record in {r.id: r for r in select(pool, quantity="token_part")}.values():
        key = record.device.get("name"), record.method, record.config.get("run")
        groups.setdefault(key, []).append(record)
    made = [_run(group) for group in groups.values() if any(r.config["part"] == TOKEN for r in group)]
    return sorted(made, key=lambda run: run.token.utc or "")


def _run(group: Sequence[Record]) -> Run:
    tokens = [r for r in group if r.config["part"] == TOKEN]
    if len(tokens) > 1:
        raise WaterfallError(f"run {tokens[0].config.get('run')} has {len(tokens)} whole tokens, not one.")
    order = {label: number for number, label in enumerate(PARTS)}
    leaves = [r for r in group if r.config["part"] not in _SPLIT]
    unknown = sorted({r.config["part"] for r in leaves} - set(PARTS))
    if unknown:
        raise WaterfallError(f"there is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}.")
    return Run(tokens[0], tuple(sorted(leaves, key=lambda r: order[r.config["part"]])))


def find(pool: Iterable[Record], method: str | None = None, **config) -> Run | None:
    """The newest run with this method and config, e.g. `find(pool, "codebook", stage="graph", bits=4)`, or None.

    Args:
        pool: any records.
        method: "codebook", or a dense decode such as "fp16"; None for any.
        **config: as for `records.select`, asked of the whole token.
    """
    found = [run for run in runs(pool) if select([run.token], method=method, **config)]
    return found[-1] if found else None


def explained(run: Run, speed: Record) -> float:
    """The share of a decode's time per token that the parts of `run` add up to: an independent check, 1 is all of it.

    Args:
        run: a token taken apart.
        speed: `decode_speed` (tok/s) of the same model, method and stage.

    Raises:
        WaterfallError: the two are of different things.
    """
    for key in ("model", "stage", "bits", "lm_head", "kv", "context"):
        ours, other = run.token.config.get(key), speed.config.get(key)
        same = abs(ours - other) <= max(_NEAR, 0.1 * other) if key == "context" else ours == other
        if not same:
            raise WaterfallError(
                f"the token has {key} {ours} and the decode {other}; compare a token with its own decode."
            )
    return (run.us - run.missing_us) * speed.value / 1e6


def compare(first: Run, second: Run, tolerance: float = TOLERANCE) -> list[Part]:
    """The bridge from one run to the other: the first token's time, what each part adds or saves, the second's time.

    Where one of the runs could leave out only its products, the other's finer parts are joined to match it.

    Args:
        first, second: any two runs.
        tolerance: as for `Run.checked`.

    Returns:
        the two ends and between them one step a part that either run has, in the order of `PARTS`; what the parts do not
        explain is a step `not explained`, so that the steps add up exactly.

    Raises:
        WaterfallError: one of the runs does not close.
    """
    first.checked(tolerance)
    second.checked(tolerance)
    coarse = any(part.label == OTHERS for run in (first, second) for part in run.parts)
    before, after = (_merged(run, coarse) for run in (first, second))
    steps = [
        _step(label, before.get(label), after.get(label))
        for label in PARTS
        if label in before or label in after
    ]
    gap = second.missing_us - first.missing_us
    ends = [Part(run.name, run.us, run.token.kind) for run in (first, second)]
    unexplained = [Part("not explained", gap, "derived")] if abs(gap) > 1e-9 * second.us else []
    return [ends[0], *steps, *unexplained, ends[1]]


def _merged(run: Run, coarse: bool) -> dict[str, Part]:
    """Parts by label; with `coarse` all that is no product and no cast is one part."""
    merged: dict[str, Part] = {}
    for part in run.parts:
        label = OTHERS if coarse and part.label in _WITHIN_OTHERS else part.label
        known = merged.get(label)
        kind = part.kind if known is None or known.kind == part.kind else "derived"
        merged[label] = Part(label, part.us + (known.us if known else 0.0), kind)
    return merged


def _step(label: str, before: Part | None, after: Part | None) -> Part:
    kinds = {part.kind for part in (before, after) if part}
    us = (after.us if after else 0.0) - (before.us if before else 0.0)
    return Part(label, us, kinds.pop() if len(kinds) == 1 else "derived")


def product_bytes(method: str, bits: int, dtype: str, lm_head: str, shape: ModelShape) -> dict[str, int]:
    """The bytes that the products of a token must read, by part.

    Args:
        method: "codebook", or a dense dtype.
        bits: of a weight of the linear layers.
        dtype: of what stays dense: "fp16", "bf16" or "fp32".
        lm_head: how the output head is kept: "codebook" or a dtype.
        shape: the model's sizes.

    Returns:
        bytes of codes (or dense weights), of codebooks, and of the output head with its codebooks.
    """
    fmt = f"codebook-{bits}" if method == "codebook" else method
    head = f"codebook-{bits}" if lm_head == "codebook" else dtype
    matrices = shape.layers * sum(
        matrix_bytes(inputs, outputs, fmt) for _, inputs, outputs in shape.linears()
    )
    codes = shape.layers * sum(-(-inputs * bits // 8) * outputs for _, inputs, outputs in shape.linears())
    return {IDEAL: codes, CODEBOOKS: matrices - codes, HEAD: matrix_bytes(shape.hidden, shape.vocab, head)}
