"""Where the time of a token goes: parts that are measured one by one and add up to the decode they explain."""

from collections.abc import Iterable

from trapetum import law, records
from trapetum.records import Record
from trapetum.shapes import ModelShape

PARTS = ("weights", "codebooks", "output head", "products above the floor", "all but products")


def format_of(method: str, bits: int) -> str:
    """The format of the linear layers that a decode of `method` reads, a key of `trapetum.shapes.FORMATS`."""
    return f"codebook-{bits}" if method == "codebook" else method


def token_parts(
    speed: Record, linears: Record, floor: Record, shape: ModelShape, roof_gbps: float
) -> list[tuple[str, float]]:
    """The time of one token in parts, each from its own measurement or from bytes over the read bandwidth.

    Args:
        speed: `decode_speed` (tok/s) of the decode to explain.
        linears: `linears_time` (us): all products of a token in a row, same weights, outside the model.
        floor: `decode_speed` of the same model and stage with linears that do nothing.
        shape: the model's sizes.
        roof_gbps: measured read bandwidth, GB/s.

    Returns:
        (label, us) by `PARTS`: codes (or dense weights), codebooks and head at the read bandwidth; what the
        products took above their own bytes at that bandwidth; and everything that is no product. What is then missing to
        the measured time is not explained, and `figures.waterfall` shows it.
    """
    bits = speed.config["bits"]
    head = format_of("codebook", bits) if speed.config.get("lm_head") == "codebook" else speed.config["dtype"]
    parts = shape.parts_per_token(format_of(speed.method, bits), 0, head)
    matrices = parts["attention weights"] + parts["MLP weights"]
    codes = shape.linear_weights * bits / 8
    above = linears.value - law.floor_us(linears.config["bytes"], roof_gbps)
    nbytes = (codes, matrices - codes, parts["output head"])
    return list(
        zip(PARTS, [*(law.floor_us(b, roof_gbps) for b in nbytes), above, 1e6 / floor.value], strict=True)
    )


def token_us(speed: Record) -> float:
    """Microseconds a token."""
    return 1e6 / speed.value


def explain(
    pool: Iterable[Record], method: str, shape: ModelShape, roof_gbps: float, stage: str
) -> tuple[Record, list[tuple[str, float]]] | None:
    """The decode of `method` at `stage` in `pool` with its parts, or None where a measurement is missing.

    Args:
        pool: records of one device and model.
        method: `codebook`, or a dense decode such as `fp16`.
    """
    pool = records.latest(pool)
    speeds = records.select(pool, quantity="decode_speed", method=method, stage=stage)
    floors = records.select(pool, quantity="decode_speed", method="no-linears", stage=stage)
    product = "codebook" if method == "codebook" else f"linear-{method}"
    chains = records.select(pool, quantity="linears_time", method=product, chain="alone")
    chains = [r for r in chains if r.config.get("path") != "exact"]
    if not (speeds and floors and chains):
        return None
    return speeds[-1], token_parts(speeds[-1], chains[-1], floors[-1], shape, roof_gbps)
