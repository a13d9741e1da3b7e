"""Take a decode step apart by leaving out its parts one after the other, and split the rest by bytes and counts.

    as it is  >  no sampling  >  nor norms  >  nor attention  >  nor products
              sampling        norms        attention          products       what is left

Each part is the difference of two measured times, so the parts add up to the token by construction. All variants
take turns in every round, so that what the machine does meanwhile shows as a spread and not as a part. A tree of modules
can only leave out its products.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

from trapetum import law, records, timing
from trapetum import waterfall as wf
from trapetum.bench.generating import (
    NOT_POSSIBLE,
    WINDOW,
    Run,
    engine_options,
    kernel_sha,
    random_prompt,
    refuser,
)
from trapetum.bench.launches import add_launch_time, kernels_a_token
from trapetum.bench.reading import cold_read_gbps
from trapetum.bench.recording import Recorder
from trapetum.bench.variants import Variant, default_methods, variants
from trapetum.decode import stages as stages_of
from trapetum.records import Record

TREES = ("naive", "cast_free")
# What is left out more and more, and the part that each step takes away.
LADDER = (
    ("sampling", wf.SAMPLING),
    ("norms", wf.NORMS),
    ("attention", wf.ATTENTION),
    ("linears", wf.PRODUCTS),
)

Clock = Callable[[], float]  # seconds a token, now


def breakdown(
    model_name: str | None = None,
    device: str = "auto",
    stages: Sequence[str] | None = None,
    profile: str = "quick",
    methods: Sequence[str] | None = None,
    bits: Sequence[int] = (4,),
    lm_head: bool = False,
    kv: str = "fp16",
    new_tokens: int | None = None,
) -> list[Record]:
    """Take a token apart, each method at each stage.

    Args:
        model_name: as for `models.load`; None for the profile's random shape.
        device: "auto", "cpu" or "cuda".
        stages: None for all of the device's.
        profile: "smoke", "quick" or "full".
        methods, bits, lm_head, kv: as for `decode`.
        new_tokens: of the decode to take apart, which sets the context; None for the profile's.

    Returns:
        `token_part` records in us: measured `token` and what each ablation took away (samples: one a round), and derived
        ones that split the products by bytes over the read bandwidth and, in a graph, take their launches out. They
        share `config.run`; `trapetum.waterfall` reads them. On a GPU `launch_time` records too.
    """
    recorder = Recorder(device, profile)
    recorder.cold_read_gbps = cold_read_gbps(recorder)
    if recorder.device == "cuda":
        for pdl in (False, True):
            add_launch_time(recorder, pdl)
    name, shape = model_name or recorder.sizes.model, None
    names = methods or default_methods(recorder.device, name, profile)
    for variant in variants(name, recorder.device, names, bits, lm_head, refuser(recorder)):
        for stage in stages or stages_of(recorder.device):
            _one(recorder, variant, stage, new_tokens, engine_options(kv))
        shape = variant.loaded.shape
        del variant  # before the next one is loaded
    rows = recorder.close()
    return rows + [
        part for group in _groups(rows) for part in derived_parts(group, shape, _launch_us(rows, group))
    ]


def _one(recorder: Recorder, variant: Variant, stage: str, new_tokens: int | None, options: dict) -> None:
    try:
        run = Run(recorder, variant, stage, new_tokens, options)
        run.settle(rehearse=False)
        context, clock = _clock(run)
        times = step_times(_cases(run, stage), clock, recorder.sizes.rounds, recorder.sizes.token_budget_s)
    except NOT_POSSIBLE as error:
        refuser(recorder)(variant.method, {**variant.config, "stage": stage, **options}, error)
        return
    started = records.now_utc()
    kv = variant.kv_name(options.get("kv", "fp16"))
    config = run.config(
        context=context,
        run=f"{started} {stage} {variant.config['bits']} {kv}",
        rounds=len(times[wf.TOKEN]),
    )
    in_a_graph = recorder.device == "cuda" and stage not in TREES
    counts = _launches(run) if in_a_graph else {}
    sha = kernel_sha(recorder, variant)
    for part, (value, samples, source) in parts_of(times).items():
        labelled = {**config, "part": part} | ({"launches": counts[part]} if part in counts else {})
        recorder.add(
            "token_part", samples, variant.method, labelled, value=value, source=source, kernel_sha256=sha
        )


# What is timed


def _clock(run: Run) -> tuple[float, Clock]:
    """The mean context and a function that times a few steps there; a tree cannot pretend, so it generates."""
    steps = min(run.tokens, WINDOW)
    start = max(1, round(run.context - steps / 2))
    prompt, engine = random_prompt(run.variant, start), run.engine

    def generated() -> float:
        times = engine.generate(prompt, steps + 1).token_s
        return sum(times) / len(times)

    def pretended() -> float:
        if (
            run.device == "cuda"
        ):  # the graphs of a new case are captured, and its libraries set up, before the clock runs
            engine.step_times(start, steps)
        return sum(engine.step_times(start, steps)) / steps

    clock = generated if run.stage in TREES else pretended

    def threaded() -> float:
        with timing.using_threads(run.threads):
            return clock()

    return start + steps / 2, threaded


Cases = Mapping[
    str, Callable[[], object]
]  # by the part that the case leaves out as the last: how to enter it


def _cases(run: Run, stage: str) -> Cases:
    engine, cases = run.engine, {wf.TOKEN: nullcontext}
    if stage in TREES:
        if "casts" in engine.parts:
            cases[wf.CASTS] = lambda: engine.without("casts")
        return cases | {wf.PRODUCTS: lambda: engine.without("linears")}
    silenced: list[str] = []
    for name, part in LADDER:
        silenced.append(name)
        cases[part] = lambda names=tuple(silenced): engine.without(*names)
    return cases


def step_times(cases: Cases, clock: Clock, rounds: int, budget_s: float) -> dict[str, list[float]]:
    """Microseconds a token of each case, one a round, the cases taking turns.

    Args:
        cases: by the part left out last; the first leaves out nothing.
        clock: times a token now.
        rounds: how many; a first one more warms up and is dropped.
        budget_s: no round begins after so many seconds, but two are made.
    """
    times: dict[str, list[float]] = {part: [] for part in cases}
    end = time.perf_counter() + budget_s
    for turn in range(rounds + 1):
        for part, enter in cases.items():
            with enter():
                times[part].append(1e6 * clock())
        if turn >= 2 and time.perf_counter() > end:
            break
    return {part: row[1:] for part, row in times.items()}


def parts_of(times: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, list[float], str]]:
    """From the times of the cases to the parts: value in us, samples (one a round), and what was subtracted from what.

    The value is the difference of two medians, so that the parts add up to the token exactly.
    """
    cases = list(times)
    medians = {case: timing.Spread.of(row).median for case, row in times.items()}
    made = {wf.TOKEN: (medians[wf.TOKEN], list(times[wf.TOKEN]), "the whole step")}
    for before, after in zip(cases, cases[1:], strict=False):
        samples = [b - a for b, a in zip(times[before], times[after], strict=True)]
        said = "as it is" if before == wf.TOKEN else f"without {before}"
        source = f"median {said}, less median without {after} too; samples: one a round"
        made[after] = (medians[before] - medians[after], samples, source)
    last = cases[-1]
    made[_rest(cases)] = (medians[last], list(times[last]), "the step with all of that left out")
    return made


def _rest(cases: Sequence[str]) -> str:
    return wf.LEFT if wf.ATTENTION in cases else wf.OTHERS


def _launches(run: Run) -> dict[str, float]:
    """Kernels a token that belong to the products, and that are left when all parts are left out; {} if none is seen."""
    start, names = max(1, round(run.context) - 2 * WINDOW), [name for name, _ in LADDER]
    if start + 2 * WINDOW >= run.max_context:
        return {}

    def count(silenced: Sequence[str]) -> float:
        with run.engine.without(*silenced):
            return kernels_a_token(lambda steps: run.engine.step_times(start, steps), WINDOW, 2 * WINDOW)

    with_products, left = count(names[:-1]), count(names)
    return {wf.PRODUCTS: with_products - left, wf.LEFT: left} if with_products else {}


# What follows


def _groups(rows: Sequence[Record]) -> list[list[Record]]:
    groups: dict[tuple, list[Record]] = {}
    for r in rows:
        if r.quantity == "token_part":
            groups.setdefault((r.method, r.config["run"]), []).append(r)
    return list(groups.values())


def _launch_us(rows: Sequence[Record], group: Sequence[Record]) -> Record | None:
    """The launch that the stage of `group` makes: with programmatic edges at `pdl`."""
    chain = "pdl" if group[0].config["stage"] == "pdl" else "alone"
    found = records.select(rows, quantity="launch_time", chain=chain)
    return found[-1] if found else None


def derived_parts(group: Sequence[Record], shape, launch: Record | None) -> list[Record]:
    """The parts that follow from one run's measured ones.

    Attention, norms and sampling keep the launches that they make; those of the products and of what is left become a
    part of their own where they were counted.

    Args:
        group: the `token_part` records of one run.
        shape: the model's sizes.
        launch: `launch_time` of an empty kernel in a graph, or None.

    Returns:
        `token_part` records: the products as bytes over the read bandwidth, launches and the rest; what is left as
        launches and the rest, which is dispatch.
    """
    by_part = {r.config["part"]: r for r in group}
    products, left = by_part[wf.PRODUCTS], by_part.get(wf.LEFT)
    shares = {r.config["part"]: _launch_share(r, launch) for r in (products, left) if r}
    made = _of_products(products, shape, shares[wf.PRODUCTS])
    if left is None:
        return made
    if not any(shares.values()):
        return [*made, left.replace(config={**left.config, "part": wf.DISPATCH})]
    counts = " and ".join(f"{r.config['launches']:.4g} of {r.config['part']}" for r in (products, left))
    formula = f"launches a token: {counts}, of {launch.value:.4g} us (record {launch.id}), at most all of these parts"
    return [
        *made,
        _derived(left, wf.LAUNCHES, sum(shares.values()), formula, f"{products.id} and {left.id}"),
        _derived(left, wf.DISPATCH, left.value - shares[wf.LEFT], "what is left less its launches"),
    ]


def _launch_share(record: Record, launch: Record | None) -> float:
    """Microseconds that the launches of a part take, at most all of it."""
    count = record.config.get("launches")
    return min(max(record.value, 0.0), count * launch.value) if launch and count else 0.0


def _derived(record: Record, part: str, us: float, formula: str, source: str = "") -> Record:
    config = {**record.config, "part": part}
    return records.derived(
        "token_part", us, record.method, config, record.device, source or record.id, formula,
        software=record.software, utc=record.utc, commit=record.commit, dirty=record.dirty,
    )  # fmt: skip


def _of_products(products: Record, shape, launches_us: float) -> list[Record]:
    config = products.config
    nbytes = wf.product_bytes(
        products.method, config["bits"], config["dtype"], config.get("lm_head", config["dtype"]), shape
    )
    read_gbps, made = config["read_gbps"], []
    for part in (wf.IDEAL, wf.CODEBOOKS, wf.HEAD):
        formula = f"{nbytes[part]} bytes over the read bandwidth of {read_gbps:.5g} GB/s"
        made.append(_derived(products, part, law.floor_us(nbytes[part], read_gbps), formula))
    rest = products.value - launches_us - sum(r.value for r in made)
    formula = "products less all their bytes at the read bandwidth and less their launches"
    return [*made, _derived(products, wf.KERNEL, rest, formula)]
