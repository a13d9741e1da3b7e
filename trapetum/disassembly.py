"""What a compiled kernel executes: machine instructions for each weight, counted in the disassembly of its inner loop.

`nvdisasm` turns a cubin into text; nothing here needs a GPU.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_SECTION = re.compile(r"^\s*\.section\s+\.text\.([\w$]+)")
_LABEL = re.compile(r"^(\.L_[\w.]+):")
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L_[\w.]+)\)")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


class DisassemblyError(RuntimeError):
    """A cubin could not be disassembled, or holds no loop that reads codes; the message says which."""


def nvdisasm() -> str | None:
    """The `nvdisasm` to use, or None: the pip package's, which fits the pip NVRTC, then CUDA_HOME's, then PATH's."""
    found = []
    nvidia = importlib.util.find_spec("nvidia")
    for base in nvidia.submodule_search_locations if nvidia else []:
        found += sorted(Path(base).glob("*/bin/nvdisasm"), reverse=True)
    found += [
        Path(home, "bin", "nvdisasm") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home
    ]
    usable = (str(path) for path in found if os.access(path, os.X_OK))
    return next(usable, None) or shutil.which("nvdisasm")


def why_not() -> str:
    """Why nothing can be disassembled here, as one sentence; empty when it can."""
    if nvdisasm():
        return ""
    return (
        "nvdisasm was not found, which counts the instructions of a kernel; install it with "
        "`pip install nvidia-cuda-nvdisasm`, or set CUDA_HOME to a CUDA toolkit."
    )


@cache
def text_of(cubin: Path) -> str:
    """The disassembly of a cubin, as `nvdisasm --print-code` prints it.

    Raises:
        DisassemblyError: there is no nvdisasm, or it refuses the file (then with what it said).
    """
    program = nvdisasm()
    if program is None:
        raise DisassemblyError(why_not())
    done = subprocess.run([program, "--print-code", str(cubin)], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "it said nothing").splitlines()[0]
        raise DisassemblyError(f"{program} cannot read {Path(cubin).name}: {said}")
    return done.stdout


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its opcode with all modifiers, e.g. `LDG.E.128.CONSTANT`, and where it branches to.

    Attributes:
        opcode: as printed, without its predicate.
        target: index of the instruction that a branch goes to; None for the rest.
    """

    opcode: str
    target: int | None = None

    @property
    def name(self) -> str:
        """The opcode without modifiers: `LDG`."""
        return self.opcode.partition(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a load brings each thread: 4 unless a modifier says otherwise."""
        return next((_WIDTHS[part] for part in self.opcode.split(".") if part in _WIDTHS), 4)


def parse(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every kernel in a disassembly, in the order of their addresses.

    Args:
        text: what nvdisasm printed.

    Returns:
        kernel name -> instructions; padding NOPs are kept, for a branch's target is an index.
    """
    kernels: dict[str, list[tuple[str, str | None]]] = {}
    labels: dict[str, tuple[str, int]] = {}
    kernel = ""
    for line in text.splitlines():
        if found := _SECTION.match(line):
            kernel = found[1]
            kernels[kernel] = []
        elif kernel and (found := _LABEL.match(line)):
            labels[found[1]] = kernel, len(kernels[kernel])
        elif kernel and (found := _LINE.search(line)):
            target = _TARGET.search(found[2]) if found[1].startswith("BRA") else None
            kernels[kernel].append((found[1], target and target[1]))
    return {
        name: [Instruction(opcode, labels[to][1] if to in labels else None) for opcode, to in lines]
        for name, lines in kernels.items()
    }


@dataclass(frozen=True)
class Loop:
    """The inner loop of a kernel.

    Attributes:
        counted: the instructions of one pass, in order.
        code_bytes: bytes of codes that a thread loads in one pass.
    """

    counted: tuple[Instruction, ...]
    code_bytes: int

    def per_weight(self, bits: int = 4) -> float:
        """Instructions that a thread executes for each weight of `bits` bits it loads."""
        return len(self.counted) * bits / (8 * self.code_bytes)

    def mix(self, bits: int = 4) -> dict[str, float]:
        """The same by opcode name, the most frequent first."""
        names = Counter(instruction.name for instruction in self.counted)
        return {name: n * bits / (8 * self.code_bytes) for name, n in names.most_common()}


def _spans(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Loops as (first, last): what lies between the target of a backward branch and the branch."""
    return [(i.target, at) for at, i in enumerate(code) if i.target is not None and i.target < at]


def _inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _not_every_pass(code: Sequence[Instruction], loop: tuple[int, int], loads: Sequence[int]) -> set[int]:
    """What a forward branch skips and a whole pass does not meet.

    A stretch with a barrier or with a loop of its own; and of two alternatives (the first ends with a branch past the second)
    the one that loads no codes, where the other does: the last, ragged pass.
    """
    skipped: set[int] = set()
    for at in range(loop[0], loop[1]):
        target = code[at].target
        if target is None or not at < target <= loop[1]:
            continue
        stretch = range(at + 1, target)
        nested = any(_inside(span, (at, target - 1)) for span in _spans(code))
        if nested or any(code[k].name == "BAR" for k in stretch):
            skipped |= set(stretch)
            continue
        # the first of two alternatives ends with a branch past the second
        past = code[target - 1].target
        if past is not None and target < past <= loop[1]:
            first, second = stretch, range(target, past)
            reads_first, reads_second = (any(k in side for k in loads) for side in (first, second))
            if reads_first != reads_second:
                skipped |= set(second if reads_first else first)
    return skipped


def inner_loop(code: Sequence[Instruction], load: str) -> Loop:
    """The loop that reads the codes, and the instructions of one pass through it.

    Counted is every instruction between the loop's head and its backward branch, both included, once: the rest of the
    kernel (building the table, staging x, meeting in shared memory) is not. An instruction that a predicate may switch
    off is counted, for it is issued; so is one behind a forward branch (a tail that a full pass goes through), except
    for a stretch with a barrier or a loop of its own (what is done once for a whole panel of x) and for an alternative
    that loads no codes beside one that does (the last pass, which has nothing more to fetch). Of several loops that
    read codes, the innermost count, and of those the one with the most loads: the unrolled one, not its remainder.

    The loop's instructions over the weights that one thread loads in a pass are instructions a weight, since an
    instruction of a warp serves its 32 threads. Divide 128 a clock and multiprocessor by it for the weights that
    the issue slots allow.

    Args:
        code: instructions of one kernel.
        load: regular expression that matches the opcode of the loads of codes and of no other.

    Raises:
        DisassemblyError: no loop reads codes.
    """
    loads = [at for at, i in enumerate(code) if re.search(load, i.opcode)]
    reading = [span for span in _spans(code) if any(span[0] <= at <= span[1] for at in loads)]
    innermost = [span for span in reading if not any(_inside(other, span) for other in reading)]
    if not innermost:
        raise DisassemblyError(f"no loop with a load that matches {load!r} in {len(code)} instructions.")
    best = max(innermost, key=lambda span: sum(span[0] <= at <= span[1] for at in loads))
    skipped = _not_every_pass(code, best, loads)
    kept = [code[at] for at in range(best[0], best[1] + 1) if at not in skipped]
    return Loop(tuple(kept), sum(i.width for i in kept if re.search(load, i.opcode)))
