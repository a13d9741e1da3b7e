"""One product under Nsight Compute: what the GPU's own counters say of the codebook kernel, beside our timing.

`ncu` starts a second process that launches the kernel a few times, writes over the L2 before every launch and replays
each launch until all counters are read, flushing the caches before every replay. It locks the clocks to their base
unless told otherwise; here it is told otherwise, so that shares of a peak are those of a kernel at its usual clocks.
"""

import csv
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from trapetum import machine
from trapetum.bench.multiply import make_product
from trapetum.bench.products import N_CODES, Product
from trapetum.bench.reading import cold_read_gbps
from trapetum.bench.recording import Recorder
from trapetum.records import Record

KERNEL = "codebook_gemv"
LAUNCHES = 5  # the first is dropped
FLUSH_BYTES = 256 << 20  # more than any L2
TIMEOUT_S = 300
CONFLICTS = "bank conflicts of shared wavefronts"

# Shares of a peak, in percent. Issue slots are counted over the cycles in which a scheduler had warps.
PEAKS = {
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue slots": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "shared memory": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
}
_TIME = "gpu__time_duration.sum"
_READ = "dram__bytes_read.sum"
_CLOCK = "smsp__cycles_elapsed.avg.per_second"
_CONFLICTS = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum"
_WAVEFRONTS = "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum"
METRICS = (*PEAKS.values(), _TIME, _READ, _CLOCK, _CONFLICTS, _WAVEFRONTS)

_PREFIXES = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_PREFIXED = re.compile(r"([numKMGT]?)(?:byte|B|second|s|[Hh]z)")
_PER = re.compile(r"cycle/([num]?)(?:second|s)")
_NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?([eE][-+]?\d+)?")
_CHILD = "import sys; from trapetum.bench import profiled; profiled.launch(*map(int, sys.argv[1:]))"

Launch = dict[str, float]  # by metric: seconds, bytes, Hz, counts, or percent


class ProfileError(RuntimeError):
    """Nsight Compute gave no counters; the message says why and what to do."""


def ncu() -> str | None:
    """The `ncu` to use, or None: PATH's, then CUDA_HOME's, then /usr/local/cuda's."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    inside = (str(Path(home, "bin", "ncu")) for home in homes if home)
    return shutil.which("ncu") or next((path for path in inside if os.access(path, os.X_OK)), None)


def why_not(device: str = "auto") -> str:
    """Why no kernel can be profiled here, as one sentence; empty when one can."""
    if machine.choose_device(device) != "cuda":
        return "Nsight Compute profiles CUDA kernels: there is no GPU here to profile one on."
    if ncu():
        return ""
    return (
        "ncu was not found in PATH, CUDA_HOME/bin or /usr/local/cuda/bin; install Nsight Compute (it comes with the "
        "CUDA toolkit), or set CUDA_HOME to a toolkit that has it."
    )


def profile_kernel(
    device: str = "auto", shape: tuple[int, int] = (8192, 28672), bits: int = 4, profile: str = "quick"
) -> list[Record]:
    """Read the counters of one codebook product with one row of x.

    Args:
        device: "auto" or "cuda".
        shape: (in_features, out_features).
        bits: 8, 4, 3 or 2.
        profile: "smoke", "quick" or "full": how much is read for the bandwidth's ceiling.

    Returns:
        one `gemv_time` in us (`config.timer` "nsight") and four `peak_fraction` records, whose `config.peak` is a key of
        `PEAKS` or `CONFLICTS`; one sample a launch. `config.beside` is "profile".

    Raises:
        ValueError: no such bits.
        RuntimeError: no GPU, no Nsight Compute, or (`ProfileError`) it could not read the counters.
        ArithmeticError: the product is wrong; nothing wrong is profiled.
    """
    if bits not in N_CODES:
        raise ValueError(f"bits must be one of {', '.join(map(str, N_CODES))}, not {bits}.")
    if why := why_not(device):
        raise RuntimeError(why)
    recorder = Recorder("cuda", profile)
    recorder.cold_read_gbps = cold_read_gbps(recorder)
    with torch.inference_mode():
        product = make_product("codebook", *shape, bits, "cuda")
        product.checked_error()
    _add(recorder, shape, product, launches_of(_run(*shape, bits))[1:])
    return recorder.close()


def launch(in_features: int, out_features: int, bits: int) -> None:
    """What runs under Nsight Compute: `LAUNCHES` launches over random weights, each after the L2 was written over."""
    product = make_product("codebook", in_features, out_features, bits, "cuda")
    call = product.calls(1)[0]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=product.tensors[0].device)
    with torch.inference_mode():
        for _ in range(LAUNCHES):
            flush.zero_()
            call()
    torch.cuda.synchronize()


# Nsight Compute


def command(program: str, in_features: int, out_features: int, bits: int) -> list[str]:
    """The command line that profiles one product with `program`."""
    options = ["--csv", "--print-units", "base", "--metrics", ",".join(METRICS)]
    options += ["--kernel-name", KERNEL, "--clock-control", "none", "--cache-control", "all"]
    return [program, *options, sys.executable, "-c", _CHILD, *map(str, (in_features, out_features, bits))]


def _run(in_features: int, out_features: int, bits: int) -> str:
    """Standard output of a profiled run, or `ProfileError`."""
    process = subprocess.Popen(
        command(ncu(), in_features, out_features, bits),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"LC_ALL": "C"},  # a decimal point, whatever the user's language
        start_new_session=True,
    )
    try:
        said, errors = process.communicate(timeout=TIMEOUT_S)
    except BaseException as stopped:
        os.killpg(process.pid, signal.SIGKILL)  # ncu and what it profiles
        process.wait()
        if isinstance(stopped, subprocess.TimeoutExpired):
            raise ProfileError(
                f"ncu did not end within {TIMEOUT_S} s; try a smaller --shape, or see whether another profiler is running."
            ) from stopped
        raise
    if why := complaint(said, errors, process.returncode):
        raise ProfileError(why)
    return said


def complaint(said: str, errors: str, status: int) -> str:
    """Why a profiled run gave no counters, as one sentence; empty if it did not fail.

    Args:
        said, errors: its standard output and error.
        status: its exit status.
    """
    every = f"{said}\n{errors}"
    if "ERR_NVGPUCTRPERM" in every:
        return (
            "this user may not read the GPU's performance counters (ERR_NVGPUCTRPERM); run the command as root, in a "
            "container with --cap-add=SYS_ADMIN, or load the nvidia module with NVreg_RestrictProfilingToAdminUsers=0."
        )
    told = re.findall(r"^==ERROR== (.*\S)", every, re.MULTILINE)
    ours = [line for line in errors.splitlines() if line.strip() and not line.startswith("==")]
    if status and ours and (not told or "returned an error code" in told[0]):
        sentence = re.sub(r"^[\w.]+: ", "", ours[-1].strip())  # without the name of the exception
        return f"the run under ncu failed: {sentence}"
    if told:
        return f"ncu failed: {told[0]}"
    if "No kernels were profiled" in every:
        return f"ncu saw no launch of {KERNEL}, so there is nothing to report; is this ncu older than the GPU or the driver?"
    return f"ncu ended with exit status {status} and said nothing about why." if status else ""


def launches_of(text: str) -> list[Launch]:
    """The counters of every launch, in order, from what `ncu --csv` printed.

    Args:
        text: its standard output; lines of the profiler and of the program may stand between.

    Returns:
        `METRICS` by launch, in seconds, bytes, Hz, counts or percent.

    Raises:
        ProfileError: there is no table, fewer than two launches, or a launch lacks a metric.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    start = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ProfileError(
            "ncu printed no table of metrics; run it by hand, `ncu --csv` with a program, to see what it says."
        )
    found: dict[str, Launch] = {}
    for row in csv.DictReader(lines[start:]):
        name, unit, value = (row.get(f"Metric {part}") for part in ("Name", "Unit", "Value"))
        if KERNEL in (row.get("Kernel Name") or "") and name in METRICS:
            found.setdefault(row["ID"], {})[name] = _in_base_units(name, value or "", unit or "")
    if len(found) < 2:
        raise ProfileError(
            f"ncu profiled {len(found)} launches of {KERNEL}, but the first is dropped, so 2 are needed."
        )
    _all_there(found)
    return list(found.values())


def _in_base_units(name: str, value: str, unit: str) -> float:
    if not _NUMBER.fullmatch(value.strip()):
        raise ProfileError(
            f"ncu gives {name} as {value!r}, which is no number: this GPU or this ncu does not count it."
        )
    number = float(value.replace(",", ""))
    if prefixed := _PREFIXED.fullmatch(unit):
        return number * _PREFIXES[prefixed[1]]
    if per := _PER.fullmatch(unit):
        return number / _PREFIXES[per[1]]
    return number


def _all_there(found: dict[str, Launch]) -> None:
    for at, metrics in found.items():
        if missing := [name for name in METRICS if name not in metrics]:
            raise ProfileError(
                f"ncu left {', '.join(missing)} out of launch {at}; `ncu --query-metrics` lists what this GPU counts."
            )


@cache
def _version(program: str) -> str:
    """Its name with its version, as `ncu --version` has it."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace")
    number = re.search(r"Version (\d[\d.]*\d)", done.stdout)
    return f"Nsight Compute {number[1]}" if number else "Nsight Compute"


# Records


def _add(recorder: Recorder, shape: tuple[int, int], product: Product, launches: Sequence[Launch]) -> None:
    how = f"{_version(ncu())}, --clock-control none (clocks not locked), caches flushed before every replay, metric "
    config = {
        "in_features": shape[0],
        "out_features": shape[1],
        "rows": 1,
        **product.config,
        "weight_bytes": product.weight_bytes,
        "l2": "flushed",
        "chain": "alone",
        "sm_mhz": round(statistics.median(one[_CLOCK] for one in launches) / 1e6),
        "source": "Nsight Compute",
        "beside": "profile",
    }

    def record(quantity: str, samples: list[float], metric: str, **more) -> None:
        origin = {"kernel_sha256": product.kernel_sha256, "source": how + metric}
        recorder.add(quantity, samples, product.method, config | more, **origin)

    microseconds = [1e6 * one[_TIME] for one in launches]
    read = statistics.median(one[_READ] for one in launches)
    moved = {"bytes": product.weight_bytes + product.io_bytes, "dram_read_bytes": round(read)}
    record("gemv_time", microseconds, _TIME, timer="nsight", **moved)
    for peak, metric in PEAKS.items():
        record("peak_fraction", [one[metric] / 100 for one in launches], metric, peak=peak)
    shares = [one[_CONFLICTS] / one[_WAVEFRONTS] if one[_WAVEFRONTS] else 0.0 for one in launches]
    record("peak_fraction", shares, f"{_CONFLICTS} / {_WAVEFRONTS}", peak=CONFLICTS)


def explain(found: Sequence[Record]) -> list[str]:
    """Three sentences on what the counters mean for the kernel, with the numbers of `found`.

    Args:
        found: records of `profile_kernel`; without all five of them there is nothing to say.
    """
    share = {r.config["peak"]: r.value for r in found if r.quantity == "peak_fraction"}
    times = [r for r in found if r.quantity == "gemv_time" and r.config.get("timer") == "nsight"]
    if not times or not share.keys() >= {*PEAKS, CONFLICTS}:
        return []
    return [_on_dram(times[-1], share), _on_issue(share), _on_conflicts(share)]


def _on_dram(time: Record, share: dict[str, float]) -> str:
    of = time.config
    read = of["dram_read_bytes"]
    return (
        f"DRAM: over the {time.value:.1f} us of a launch that runs alone the memory moved {share['dram']:.0%} of what its pins "
        f"could from the first to the last cycle, and read {read / 1e6:.1f} MB, {read / of['bytes']:.2f} times the "
        f"{of['bytes'] / 1e6:.1f} MB that the formula counts for codes, codebook, x and y."
    )


def _on_issue(share: dict[str, float]) -> str:
    nearest = max(PEAKS, key=share.get)
    meaning = {
        "dram": f"so memory, at {share['dram']:.0%}, is the peak that it is nearest to: fewer bytes a weight would help first",
        "issue slots": "a larger share than memory's and shared memory's: fewer instructions a weight would help first",
        "shared memory": (
            f"but shared memory, at {share[nearest]:.0%}, is the peak that it is nearest to: "
            "fewer lookups a weight would help first"
        ),
    }
    issued = share["issue slots"]
    return f"Issue: a scheduler with warps issued an instruction in {issued:.0%} of its cycles, {meaning[nearest]}."


def _on_conflicts(share: dict[str, float]) -> str:
    conflicts, used = share[CONFLICTS], share["shared memory"]
    return (
        f"Conflicts: {conflicts:.1%} of the shared-memory wavefronts are repeats because two lanes met in a bank; without any, "
        f"shared memory would be used at {used * (1 - conflicts):.0%} of its peak instead of {used:.0%}, and since a lookup's "
        "bank is its lane, those that are left come from x and from the sums."
    )
