"""Which of four terms binds a matrix-vector product: its bytes, its instructions, its launch, or latency.

    T = launch + max(bytes, instructions) + latency

bytes         bytes moved / measured read bandwidth
instructions  the longer of two: weights * instructions a weight / (128 * SMs * clock), since an SM issues 4 warp
              instructions of 32 lanes a clock; weights * lookups a weight / (32 * SMs * clock), since its shared memory serves
              one wavefront of 128 bytes, 32 lanes of 4 bytes, a clock
launch        what a kernel that only reads takes for no bytes: t0 of its fit on the same device
latency       the rest: loads and sums that wait, SMs that run out of blocks early, and work that is not counted

Bytes and instructions overlap in a good kernel, so the longer one counts and the shorter one is free. The sum stops
holding where a kernel does not overlap them (then latency holds the shorter one), where the clock is not the one
recorded (power limits), and where a cache holds part of the bytes (latency is then negative).

How many instructions a weight takes is read from `instructions_per_weight` records, which come from the disassembly.
Without one it is derived from the inner loop, as the least it must execute; per lane, loads of weights included:

    codebook, 4 bits   16 weights: 8 byte-permutes, 8 lookups, 1 load of x, 2 tensor-core instructions, 1/2 load:
                       19.5 / 16
    codebook, 3 bits   the same, and 9 instructions more for 32 weights that take the 6-bit pairs out of three words
    codebook, 2 bits   the same, and 3 more for two words of 8 weights: a mask each, a shift for every second
    codebook, 8 bits   16 weights: 16 byte-permutes, 16 lookups, 8 byte-permutes to pairs, 1 load of x, 2 tensor-core
                       instructions, 1 load: 44 / 16
    additive, C x 8    16 weights: 2 C byte-permutes, 2 C lookups of 16 bytes, 2 C tensor-core instructions, 1 load of x,
                       C/8 load: (1 + 6 1/8 C) / 16
    fp16 dense         8 weights: 1 load, 1 load of x, 4 multiply-adds of two halves: 6 / 8; sums in fp32 take more
    read only          16 bytes: 1 load, 4 exclusive-ors, for 128 / bits weights

Lookups a weight: 1/2 with a table of pairs (2, 3, 4 bits), 1 with 8 bits, C/2 with C additive codebooks (16 bytes for 8
weights each), and 1/16 for x.

The derived counts are of lanes at work; integer instructions that issue at half rate (byte-permutes on sm_80 to sm_90) are
counted at the full one. So they are lower bounds, and what they miss is in latency.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from trapetum import hardware, law
from trapetum.records import Record

LANES_PER_CLOCK = 128  # 4 schedulers issue one warp instruction of 32 lanes each
LOOKUPS_PER_CLOCK = 32  # one wavefront of 32 banks of 4 bytes
TERMS = ("bytes", "instructions", "launch", "latency")

_CODEBOOK_INSTRUCTIONS = {4: 19.5 / 16, 3: 19.5 / 16 + 9 / 32, 2: 19.5 / 16 + 3 / 16, 8: 44 / 16}
_CODEBOOKS = {"additive-2x8": 2, "additive-4x8": 4}
_X_LOOKUPS = 1 / 16
_HALF_INSTRUCTIONS = 6 / 8
_READ_INSTRUCTIONS = 5  # for 16 bytes


class Work(NamedTuple):
    """What one weight takes of an SM: instructions and shared-memory lookups of a lane, and where that is from."""

    instructions: float
    lookups: float
    source: str


def derived_work(method: str, bits: int | None) -> Work | None:
    """The least work a weight takes by the derivation above; None for kernels whose inner loop is not known here."""
    why = "derived from the inner loop"
    if method == "codebook" and bits in _CODEBOOK_INSTRUCTIONS:
        return Work(_CODEBOOK_INSTRUCTIONS[bits], (1 if bits == 8 else 1 / 2) + _X_LOOKUPS, why)
    if books := _CODEBOOKS.get(method):
        return Work((1 + 49 / 8 * books) / 16, books / 2 + _X_LOOKUPS, why)
    if method in ("linear-fp16", "mv-fp16"):
        return Work(_HALF_INSTRUCTIONS, 0.0, why)
    if method == "read" and bits:
        return Work(_READ_INSTRUCTIONS * bits / 128, 0.0, why)
    return None


def work(method: str, bits: int | None, counted: Iterable[Record] = (), arch: str = "") -> Work | None:
    """Work a weight takes: counted in the disassembly if there is a record of it, else derived, else None.

    Args:
        method, bits: as in a `gemv_time` record.
        counted: `instructions_per_weight` records; those of the same method, bits and one row are used, of `arch` if
            there are any. Of several launch shapes (`config.variant`) the one with the fewest instructions counts.
        arch: e.g. `sm_90`.
    """
    derived = derived_work(method, bits)
    found = [r for r in counted if r.quantity == "instructions_per_weight" and r.method == method]
    found = [r for r in found if r.config.get("bits") == bits and one_row(r)]
    found = [r for r in found if arch in (r.config.get("arch"), r.device.get("arch"))] or found
    if not found:
        return derived
    newest = {r.config.get("variant"): r for r in sorted(found, key=lambda r: r.utc or "")}
    least = min(newest.values(), key=lambda r: r.value)
    lookups = least.config.get("lookups_per_weight", derived.lookups if derived else 0.0)
    return Work(least.value, lookups, f"record {least.id}")


def one_row(record: Record) -> bool:
    """Whether a record is of a product with one row of activations."""
    return all(record.config.get(name) in (None, 1) for name in ("rows", "batch"))


class Rates(NamedTuple):
    """What a device does at best.

    Attributes:
        read_gbps: measured read bandwidth.
        launch_us: fixed time of a kernel that only reads, never below zero.
        sms, clock_ghz: multiprocessors and their clock; None on a CPU, where work is not counted.
    """

    read_gbps: float
    launch_us: float
    sms: int | None = None
    clock_ghz: float | None = None


def _clock_ghz(device: Mapping) -> float | None:
    """The clock in GHz that a GPU had after the measurement, else its highest, else the datasheet's."""
    clocks = device.get("clocks") or {}
    for when, name in (("after", "sm_mhz"), ("after", "max_sm_mhz")):
        mhz = (clocks.get(when) or {}).get(name)
        if mhz:
            return mhz / 1e3
    card = hardware.find(device.get("name", ""))
    return card.boost_ghz if card else None


def rates(device: Mapping, read_gbps: float, launch_us: float) -> Rates:
    """The rates of one device.

    Args:
        device: the `device` of a record.
        read_gbps: its measured read bandwidth in GB/s.
        launch_us: fixed time of a kernel that only reads; a fit's below zero counts as none.
    """
    if not str(device.get("arch", "")).startswith("sm_"):
        return Rates(read_gbps, max(launch_us, 0.0))
    return Rates(read_gbps, max(launch_us, 0.0), device.get("sms"), _clock_ghz(device))


def instructions_us(weights: float, work: Work | None, sms: int | None, clock_ghz: float | None) -> float:
    """Microseconds that `weights` take of the issue slots or of shared memory, whichever is longer.

    A lower bound: all SMs busy from start to end, at every clock. NaN where the work or the device's rate is not known.
    """
    if work is None or not sms or not clock_ghz:
        return float("nan")
    clocks = max(work.instructions / LANES_PER_CLOCK, work.lookups / LOOKUPS_PER_CLOCK) * weights / sms
    return clocks / (clock_ghz * 1e3)


def weights_per_clock(work: Work) -> float:
    """Weights that one SM can decode and multiply a clock at best."""
    return 1 / max(work.instructions / LANES_PER_CLOCK, work.lookups / LOOKUPS_PER_CLOCK)


@dataclass(frozen=True)
class Terms:
    """The time of one product by term, in microseconds; `instructions_us` is NaN where it is not known."""

    time_us: float
    bytes_us: float
    instructions_us: float
    launch_us: float

    @property
    def instructions_bind(self) -> bool:
        """Whether the instructions take longer than the bytes (False where they are not known)."""
        return self.instructions_us > self.bytes_us

    @property
    def longer_us(self) -> float:
        """The longer one of bytes and instructions: what the two take together when they overlap."""
        return self.instructions_us if self.instructions_bind else self.bytes_us

    @property
    def latency_us(self) -> float:
        """What the other terms leave; negative when they overstate."""
        return self.time_us - self.launch_us - self.longer_us

    @property
    def binds(self) -> str:
        """The longest of the four terms, one of `TERMS`."""
        longer = "instructions" if self.instructions_bind else "bytes"
        times = {longer: self.longer_us, "launch": self.launch_us, "latency": self.latency_us}
        return max(times, key=times.get)

    def share(self, term: str) -> float:
        """A term's share of the measured time."""
        return getattr(self, f"{term}_us") / self.time_us


def terms(record: Record, rates: Rates, work: Work | None) -> Terms:
    """Take the time of a `gemv_time` record with `config.bytes` apart."""
    weights = record.config["in_features"] * record.config["out_features"]
    return Terms(
        time_us=record.value,
        bytes_us=law.floor_us(record.config["bytes"], rates.read_gbps),
        instructions_us=instructions_us(weights, work, rates.sms, rates.clock_ghz),
        launch_us=rates.launch_us,
    )
