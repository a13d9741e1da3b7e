"""Facts about this machine's processor and memory, from /proc and /sys, each with a fallback and None when unknown."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

_PROC = Path("/proc")
_SYS = Path("/sys")

# What `arch` says of the vector instructions, widest first, with the flags of /proc/cpuinfo that each needs.
_LEVELS = (
    ("avx512vnni", {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}),
    ("avx512bw", {"avx512f", "avx512bw"}),
    ("avx2", {"avx2", "fma"}),
    ("neon", {"asimd"}),
)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _integer(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text is not None and re.fullmatch(r"\d+", text) else None


def _sysctl(name: str) -> str | None:
    """One value of macOS's sysctl; None elsewhere."""
    if sys.platform != "darwin":
        return None
    done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True)
    return done.stdout.strip() or None


def _cpuinfo(*keys: str) -> list[str]:
    """Every value of the first of `keys` that /proc/cpuinfo has."""
    text = _read(_PROC / "cpuinfo") or ""
    for key in keys:
        found = re.findall(rf"^{re.escape(key)}\s*:[ \t]*(\S.*)$", text, re.MULTILINE)
        if found:
            return found
    return []


def name() -> str:
    """The processor's model name, e.g. `Intel(R) Xeon(R) Processor`; at worst its instruction set, e.g. `aarch64`."""
    from_proc = next(iter(_cpuinfo("model name", "Model", "Hardware", "cpu model")), None)
    found = from_proc or _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()
    return re.sub(r"\s+", " ", found).strip() or "unknown processor"


def flags() -> set[str]:
    """The instruction-set flags in /proc/cpuinfo's spelling; empty where they cannot be read."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return {"asimd"}
    return set(" ".join(_cpuinfo("flags", "Features")[:1]).split())


def vector_level() -> str:
    """`avx512vnni`, `avx512bw`, `avx2`, `neon`, or `portable` where none of them is reported."""
    have = flags()
    return next((level for level, needed in _LEVELS if needed <= have), "portable")


def arch() -> str:
    """Instruction set and vector level, e.g. `x86_64 avx512vnni`."""
    return f"{platform.machine()} {vector_level()}"


def usable_cpus() -> set[int]:
    """The logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def threads() -> int:
    """Threads that a kernel uses: torch's number if torch is loaded, else `OMP_NUM_THREADS`, else all usable."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return torch.get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(asked) if asked.isdigit() and int(asked) > 0 else len(usable_cpus())


def _size_bytes(text: str | None) -> int | None:
    """Bytes of a size as /sys writes it: `307200K`, `32M` or plain bytes."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text or "")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]] if match else None


def _last_level(cpu: int) -> tuple[str, int] | None:
    """Which processors share `cpu`'s last-level cache, and its bytes."""
    caches = []
    for index in (_SYS / f"devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*"):
        level, size = _integer(index / "level"), _size_bytes(_read(index / "size"))
        if level and size and _read(index / "type") != "Instruction":
            caches.append((level, _read(index / "shared_cpu_list") or str(cpu), size))
    return max(caches)[1:] if caches else None


def last_level_cache_bytes() -> int | None:
    """Bytes of last-level cache that the usable processors have between them; None if the system does not say."""
    found = {cache for cpu in usable_cpus() if (cache := _last_level(cpu))}
    if found:
        return sum(size for _, size in found)
    for key in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        if key in os.sysconf_names and os.sysconf(key) > 0:
            return os.sysconf(key)
    sizes = (_sysctl("hw.l3cachesize"), _sysctl("hw.perflevel0.l2cachesize"), _sysctl("hw.l2cachesize"))
    return next((int(size) for size in sizes if size and size.isdigit() and int(size) > 0), None)


def memory_bytes() -> int | None:
    """Bytes of memory that this process may use: the machine's, or its control group's if that is less."""
    limits = [
        _integer(_SYS / "fs/cgroup/memory.max"),
        _integer(_SYS / "fs/cgroup/memory/memory.limit_in_bytes"),
    ]
    try:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError):
        pass
    return min((limit for limit in limits if limit), default=None)


def clocks() -> dict[str, float]:
    """`cpu_mhz`, the mean over processors now, and `max_cpu_mhz`; without what the system does not say."""
    now = [float(mhz) for mhz in _cpuinfo("cpu MHz") if re.fullmatch(r"\d+(\.\d+)?", mhz)]
    fastest = _integer(_SYS / "devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    found = {"cpu_mhz": round(sum(now) / len(now), 1) if now else None}
    found["max_cpu_mhz"] = fastest / 1000 if fastest else None
    return {key: mhz for key, mhz in found.items() if mhz}


def temperature() -> float | None:
    """The package's temperature in degrees Celsius, or None."""
    for zone in sorted((_SYS / "class/thermal").glob("thermal_zone*")):
        if (_read(zone / "type") or "") in ("x86_pkg_temp", "cpu-thermal", "cpu_thermal"):
            return (_integer(zone / "temp") or 0) / 1000 or None
    for chip in sorted((_SYS / "class/hwmon").glob("hwmon*")):
        if _read(chip / "name") in ("coretemp", "k10temp", "zenpower"):
            return (_integer(chip / "temp1_input") or 0) / 1000 or None
    return None


def rapl_package() -> Path | None:
    """The folder of the first package's RAPL counter, whether it is readable or not."""
    return next(iter(sorted((_SYS / "class/powercap").glob("*rapl:0"))), None)


def power_limit_w() -> float | None:
    """The package's long-term power limit in watts where RAPL tells it, else None."""
    package = rapl_package()
    limit = _integer(package / "constraint_0_power_limit_uw") if package else None
    return limit / 1e6 if limit else None
