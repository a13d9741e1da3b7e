"""Choose the launch shape of the codebook GEMV for one product on one GPU: time every candidate, keep a clear winner.

A candidate is timed as it runs in a model: cold weights, launches that overlap (PDL). It must compute what the default
computes, and it replaces the default only if a second measurement, not the one it was picked by, finds it faster by
more than 1 % and by more than the spread of either.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from trapetum import cuda, formats, gemv_plans, plans, timing
from trapetum.shapes import ModelShape

Plan = TypeVar("Plan")
MUST_WIN_BY = 1.01
ROUNDING = 2e-3  # relative L2 distance of two fp16 results that only add in another order


class TuningError(RuntimeError):
    """Nothing can be tuned here; the message says why."""


@dataclass(frozen=True)
class Case:
    """The product y = W x that is tuned for: sizes, bits a code, and rows of x."""

    in_features: int
    out_features: int
    bits: int
    rows: int = 1


class Timed(Protocol[Plan]):
    """One product that can be run with any plan."""

    def output(self, plan: Plan) -> torch.Tensor:
        """The result, in a buffer that held NaN before."""

    def time_us(self, plan: Plan) -> list[float]:
        """Microseconds a call, cold, one value a repeat."""


@dataclass(frozen=True)
class Tuned(Generic[Plan]):
    """What tuning one product found.

    Attributes:
        case: the product.
        default_us: the default plan's median, in us.
        best_us: the median of `plan`, in us.
        plan: the winner, or None where the default stays.
        tried: how many plans were timed, the default included.
        refused: plans that were not timed, with the reason.
    """

    case: Case
    default_us: float
    best_us: float
    plan: Plan | None
    tried: int
    refused: list[tuple[Plan, str]] = field(default_factory=list)


def wins(candidate_us: Sequence[float], default_us: Sequence[float]) -> bool:
    """Whether a candidate's median beats the default's by more than 1 % and by more than either spread (p20 to p80)."""
    candidate, default = timing.Spread.of(candidate_us), timing.Spread.of(default_us)
    gain = default.median - candidate.median
    spread = max(s.p80 - s.p20 for s in (candidate, default))
    return default.median > MUST_WIN_BY * candidate.median and gain > spread


def tune_case(case: Case, default: Plan, candidates: Iterable[Plan], product: Timed[Plan]) -> Tuned[Plan]:
    """Time every candidate of one product.

    Args:
        case: what `product` computes.
        default: the plan that runs untuned.
        candidates: the others; the default among them is skipped.
        product: runs and times a plan.

    Returns:
        the winner, if there is one.
    """
    expected = product.output(default)
    median_us = {default: timing.Spread.of(product.time_us(default)).median}
    refused = []
    for plan in candidates:
        if plan in median_us:
            continue
        reason = _why_not(plan, expected, product)
        if reason:
            refused.append((plan, reason))
        else:
            median_us[plan] = timing.Spread.of(product.time_us(plan)).median
    fastest = min(median_us, key=median_us.get)
    if fastest == default:
        return Tuned(case, median_us[default], median_us[default], None, len(median_us), refused)
    samples = {default: [], fastest: []}
    for _ in range(2):  # in turns, so that both see the same clocks
        for plan, several in samples.items():
            several += product.time_us(plan)
    default_us, best_us = (timing.Spread.of(samples[plan]).median for plan in (default, fastest))
    if not wins(samples[fastest], samples[default]):
        return Tuned(case, default_us, default_us, None, len(median_us), refused)
    return Tuned(case, default_us, best_us, fastest, len(median_us), refused)


def _why_not(plan: Plan, expected: torch.Tensor, product: Timed[Plan]) -> str:
    """Why a candidate is not timed, or ""."""
    try:
        y = product.output(plan)
    except (RuntimeError, ValueError) as error:  # too many registers, too much shared memory, too many tiles
        return str(error).splitlines()[0]
    distance = float((y.double() - expected.double()).norm() / expected.double().norm())
    if distance <= ROUNDING:
        return ""
    return f"its result is off the default's by {distance:.2g}, and rounding allows {ROUNDING:g}"


def tune(
    cases: Iterable[Case],
    candidates: Callable[[Case], Sequence[Plan]],
    product: Callable[[Case], Timed[Plan]],
    keep: Callable[[Case, Plan | None], object],
    say: Callable[[str], None] = lambda line: None,
) -> list[Tuned[Plan]]:
    """Tune several products and keep the winners.

    Args:
        cases: the products.
        candidates: the plans of a case, the default first.
        product: makes the product of a case.
        keep: called with a case and its winner, or None where the default stays.
        say: called with the lines of a table, as they come.

    Returns:
        one result a case.
    """
    found = []
    say(_HEADER)
    for case in cases:
        default, *others = candidates(case)
        tuned = tune_case(case, default, others, product(case))
        keep(case, tuned.plan)
        for line in lines(tuned):
            say(line)
        found.append(tuned)
    return found


_HEADER = f"{'in x out':>14} {'bits':>4} {'rows':>4} {'default us':>10} {'best us':>8} {'tried':>5}  plan"


def lines(tuned: Tuned) -> list[str]:
    """A row of the table, and below it the plans that were not timed, each with its reason."""
    case, plan = tuned.case, "the default"
    if tuned.plan is not None:
        plan = ", ".join(f"{name} {value}" for name, value in asdict(tuned.plan).items())
    shape = f"{case.in_features} x {case.out_features}"
    times = f"{tuned.default_us:>10.2f} {tuned.best_us:>8.2f} {tuned.tried:>5}"
    row = f"{shape:>14} {case.bits:>4} {case.rows:>4} {times}  {plan}"
    return [row, *(f"{'not timed:':>14} {refused} ({reason})" for refused, reason in tuned.refused)]


# --- on a GPU ------------------------------------------------------------------------------------------------------


class CudaProduct:
    """The codebook GEMV of random weights in fp16, cold: over as many copies as `timing.copies_for` says.

    Args:
        case: sizes.
        repeats: samples a measurement.
    """

    def __init__(self, case: Case, repeats: int = 15):
        torch.cuda.empty_cache()  # so that the memory of the case before counts as free
        self._case, self._repeats = case, repeats
        shape, n_codes = (case.out_features, case.in_features), 2**case.bits
        indices = torch.randint(n_codes, shape, dtype=torch.uint8, device="cuda")
        codebook = torch.randn(case.out_features, n_codes, device="cuda") / case.in_features**0.5
        weights = cuda.pack(indices, case.bits), codebook.half()
        x_shape = (case.in_features,) if case.rows == 1 else (case.rows, case.in_features)
        self._x = torch.randn(x_shape, device="cuda").half()
        copies = timing.copies_for(sum(w.nbytes for w in weights), "cuda")
        self._weights = [weights, *(tuple(w.clone() for w in weights) for _ in range(copies - 1))]

    def _call(self, weights, plan, **options) -> torch.Tensor:
        return cuda.gemv(self._x, *weights, self._case.in_features, self._case.bits, plan=plan, **options)

    def output(self, plan) -> torch.Tensor:
        """The result of the first copy, [out] or [rows, out], in a buffer that held NaN before."""
        y = self._x.new_full((*self._x.shape[:-1], self._case.out_features), float("nan"))
        return self._call(self._weights[0], plan, out=y)

    def time_us(self, plan) -> list[float]:
        """Microseconds a call in a PDL chain over all copies, one value a replay."""
        calls = [lambda w=w: self._call(w, plan, pdl=True) for w in self._weights]
        return timing.cuda_graph_us(calls, self._repeats)


def tune_cuda(
    shapes: Iterable[tuple[int, int]],
    bits: Sequence[int] = (4,),
    rows: Sequence[int] = (1,),
    say: Callable[[str], None] = lambda line: None,
) -> list[Tuned]:
    """Tune the codebook GEMV on the current GPU and store the winners where `cuda.gemv` finds them.

    Args:
        shapes: (in_features, out_features).
        bits: 8, 4, 3 or 2.
        rows: rows of x, 1 to `cuda.MAX_ROWS`.
        say: called with the lines of a table, as they come.

    Returns:
        one result a case.

    Raises:
        TuningError: there is no GPU that runs the kernels.
        ValueError: bits or rows that the kernel does not have.
    """
    cases = [Case(*shape, b, r) for shape in dict.fromkeys(shapes) for b in bits for r in rows]
    for case in cases:
        _require_possible(case)
    if why := cuda.why_not():
        raise TuningError(f"nothing to tune: {why}")
    device = torch.cuda.current_device()
    room = cuda.room_of(device)

    def candidates(case: Case) -> list:
        sizes = (case.in_features, case.out_features, case.bits, case.rows, room)
        return [gemv_plans.plan_for(*sizes), *gemv_plans.candidates(*sizes)]

    def keep(case: Case, plan) -> None:
        key = cuda.plan_key(device, case.in_features, case.out_features, case.bits, case.rows)
        plans.store(key, asdict(plan) if plan else None)

    with torch.inference_mode():
        return tune(cases, candidates, CudaProduct, keep, say)


def shapes_of(model: ModelShape) -> list[tuple[int, int]]:
    """The matrices of a model's decode step, (in_features, out_features): its linears, alone and as they are fused."""
    size = {name: (inputs, outputs) for name, inputs, outputs in model.linears()}
    fused = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
    joined = [(size[names[0]][0], sum(size[name][1] for name in names)) for names in fused]
    return list(dict.fromkeys([*size.values(), *joined]))


def _require_possible(case: Case) -> None:
    if case.bits not in formats.BITS:
        raise ValueError(
            f"{case.bits} bits cannot be tuned; choose among {', '.join(map(str, formats.BITS))}."
        )
    if not 1 <= case.rows <= cuda.MAX_ROWS:
        raise ValueError(f"{case.rows} rows cannot be tuned; choose 1 to {cuda.MAX_ROWS}.")
