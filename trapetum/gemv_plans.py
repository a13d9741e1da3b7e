"""Launch shapes of `kernels/codebook_gemv.cu`: what there is to choose, what fits a device, and a default. No torch.

`trapetum tune` finds a better one for a product on a device where there is one; see `plans` for where it is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

STEP = {8: 16, 4: 32, 3: 128, 2: 64}  # inputs a step; the layout is pictured in kernels/codebook_gemv.cu
_ENTRIES = {8: 256, 4: 256, 3: 64, 2: 16}  # of the pair table
_TABLE_AT = 1024
_SYSTEM_BYTES = 1024  # that CUDA keeps of every block's shared memory
LANES = 32
MOST_STAGED = 16  # rows of fp16 that the kernel holds: 8 of x, twice as many of fp32


@dataclass(frozen=True)
class Room:
    """What a device offers: multiprocessors, and bytes of shared memory for one block and for all on one."""

    sms: int
    a_block: int
    a_multiprocessor: int


H100 = Room(132, 227 * 1024, 228 * 1024)


@dataclass(frozen=True)
class Plan:
    """A launch shape of `codebook_gemv`.

    Attributes:
        warps: a block.
        ahead: steps that a warp has in flight.
        blocks: blocks that a multiprocessor is to hold at once; bounds the registers.
        channels: output channels a block, 32 or 64.
        stride: bytes between entries of the pair table: 256, or 128 (32 channels only: half the memory, a shift more).
    """

    warps: int
    ahead: int
    blocks: int = 1
    channels: int = 32
    stride: int = 256

    @property
    def defines(self) -> tuple[str, ...]:
        """What the source is compiled with."""
        names = ("warps", "ahead", "blocks", "channels", "stride")
        return tuple(f"{name.upper()}={getattr(self, name)}" for name in names)

    def rounds(self, in_features: int, bits: int) -> int:
        """Turns that all warps take through the inputs."""
        return -(-in_features // (STEP[bits] * self.warps * self.ahead))


def memory(plan: Plan, in_features: int, bits: int, staged: int, limit: int) -> tuple[int, int]:
    """Rounds whose x a block holds at once (0: not even one fits), and its dynamic shared memory in bytes.

    Args:
        staged: rows of fp16 in shared memory: rows of x, twice as many for fp32.
        limit: bytes a block may ask for.
    """
    fixed = _TABLE_AT + _ENTRIES[bits] * plan.stride + staged * 4 * plan.warps * plan.channels
    fixed += 64 * staged if staged > 1 else 0
    round_bytes = 2 * staged * plan.warps * plan.ahead * STEP[bits]
    panel = min(max(0, limit - fixed) // round_bytes, plan.rounds(in_features, bits))
    return panel, fixed + round_bytes * panel


def fits(plan: Plan, in_features: int, bits: int, staged: int, room: Room) -> bool:
    """Whether `plan.blocks` blocks, with all of x each, fit a multiprocessor."""
    panel, shared = memory(plan, in_features, bits, staged, room.a_block)
    held = plan.blocks * (shared + _SYSTEM_BYTES) <= room.a_multiprocessor
    return panel == plan.rounds(in_features, bits) and held


def _one_each(bits: int, staged: int) -> Plan:
    """For as many tiles as multiprocessors or fewer: each block alone must keep enough loads in flight."""
    if bits == 3:
        return Plan(16, 2 if staged <= 2 else 1)
    if staged <= 2 and (bits == 8 or staged == 2):
        return Plan(32, 2)
    return Plan(16, 4) if staged <= 4 else Plan(16, 2)


def _several_each(in_features: int, out_features: int, bits: int, staged: int, sms: int) -> Plan:
    """For more tiles: smaller blocks overlap each other's start and end; an even number where there are two for each."""
    if staged > 2:
        return Plan(16, 1 if bits == 3 else 2, channels=64)
    if staged == 2:
        deep = {8: 2, 4: 2, 3: 1, 2: 1}[bits]
        return Plan(16, deep, 2, 64) if in_features < 8192 else Plan(8, deep + (bits != 3), 2, 64)
    tiles = -(-out_features // LANES)
    two_each = tiles <= 2 * sms
    if bits != 3 and in_features < 8192 and 3 * sms < tiles <= 4 * sms:
        return Plan(8, 4, 2, 64)  # one turn of 64 channels instead of one of 32 and a short second
    if bits == 8:
        return Plan(16, 4, 2, stride=128)
    if bits == 4:
        return Plan(8, 8, 3, stride=128) if in_features < 8192 else Plan(16, 4, 2)
    if bits == 3:
        return Plan(16, 1, 2) if two_each and in_features >= 8192 else Plan(8, 2, 3)
    return Plan(16, 2, 2) if two_each and in_features >= 8192 else Plan(8, 4, 3)


def plan_for(in_features: int, out_features: int, bits: int, staged: int = 1, room: Room = H100) -> Plan:
    """The launch shape of a product before any tuning: the best of sweeps on an H100, then what fits `room`.

    Args:
        staged: rows of x, twice as many for fp32.
    """
    several = -(-out_features // LANES) > room.sms
    if staged > 8:
        wanted = Plan(8, 1, 1, 64)
    else:
        wanted = (
            _several_each(in_features, out_features, bits, staged, room.sms)
            if several
            else _one_each(bits, staged)
        )
    return next(plan for plan in _smaller(wanted, staged) if _usable(plan, in_features, bits, staged, room))


def _smaller(plan: Plan, staged: int) -> Iterator[Plan]:
    """`plan` and others that need less and less shared memory; the last fits every device."""
    yield plan
    yield replace(plan, channels=32, stride=128)
    yield replace(plan, blocks=1)
    yield replace(plan, blocks=1, channels=32, stride=128)
    yield Plan(8, 1, channels=32, stride=128)


def _usable(plan: Plan, in_features: int, bits: int, staged: int, room: Room) -> bool:
    if plan.blocks > 1:
        return fits(plan, in_features, bits, staged, room)
    return memory(plan, in_features, bits, staged, room.a_block)[0] > 0


def candidates(
    in_features: int, out_features: int, bits: int, staged: int = 1, room: Room = H100
) -> list[Plan]:
    """Launch shapes worth timing beside the default, all of which fit `room`."""
    depth = {8: (2, 4, 6), 4: (2, 4, 6), 3: (1, 2), 2: (1, 2, 4)}[bits]
    if staged > 2:
        depth = depth[:2]
    shapes = [
        Plan(w, d, b) for w, b in ((32, 1), (16, 1), (16, 2), (8, 3), (8, 4)) for d in depth if w * d <= 64
    ]
    plans = shapes + [replace(p, stride=128) for p in shapes]
    plans += [Plan(w, d, b, 64) for w, b in ((16, 1), (16, 2), (8, 2)) for d in depth[:2]]
    plans = [p for p in plans if p.warps * p.blocks * staged <= 64]  # more rows need more registers
    default = plan_for(in_features, out_features, bits, staged, room)
    return [p for p in plans if p != default and _usable(p, in_features, bits, staged, room)]
