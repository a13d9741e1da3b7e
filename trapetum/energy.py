"""Energy: the GPU's own counter (NVML), the CPU's (RAPL), or a sentence why there is none.

The NVML counter moves in steps of up to about 100 ms, so a window is measured from tick to tick of the
counter and should last 5 s or more; a shorter one carries its resolution with it. A power trace, integrated
beside it, is the cross-check. Gross is all that the device drew; net leaves out what it draws idle.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from trapetum import machine

RAPL_ROOT = Path("/sys/class/powercap")
SAMPLE_S = 0.01


class NoEnergyCounter(RuntimeError):
    """This machine has no energy counter that can be read; the message says why."""


@dataclass(frozen=True)
class EnergyReading:
    """Energy of one window.

    Attributes:
        joules: gross energy of the window.
        seconds: length of the window.
        mean_w: mean power, `joules / seconds`.
        method: "nvml-total-energy", "nvml-power-trace" or "rapl".
        units: how many units of work (tokens) were done in it.
        idle_w: idle power, if it was measured.
        trace_joules: the same energy from the integrated power trace, None where there is none.
        resolution_s: the longest step seen between two ticks of the counter.
        before, after: temperature (degrees Celsius) and clocks (MHz) just before and just after the window, as far as
            the device tells them.
    """

    joules: float
    seconds: float
    mean_w: float
    method: str
    units: float = 0.0
    idle_w: float | None = None
    trace_joules: float | None = None
    resolution_s: float = 0.0
    before: dict = field(default_factory=dict)
    after: dict = field(default_factory=dict)

    @property
    def net_joules(self) -> float | None:
        """Energy above idle, or None if idle power is unknown."""
        return None if self.idle_w is None else self.joules - self.idle_w * self.seconds

    def per_unit_j(self, net: bool = False) -> float:
        """Joules per unit of work.

        Raises:
            ValueError: no work was counted, or `net` was asked for without an idle power.
        """
        joules = self.net_joules if net else self.joules
        if not self.units or joules is None:
            raise ValueError("joules per unit need a count of units, and net ones the idle power.")
        return joules / self.units


class Counter(Protocol):
    """A running total of energy."""

    method: str

    def joules(self) -> float: ...

    def watts(self) -> float | None: ...


class NvmlCounter:
    """The total-energy counter and the power sensor of one NVIDIA GPU."""

    method = "nvml-total-energy"

    def __init__(self, index: int = 0):
        self._nvml, self._handle = _nvml_handle(index)
        try:
            self.joules()
        except self._nvml.NVMLError as error:
            raise NoEnergyCounter(f"this GPU has no total-energy counter (NVML: {error}).") from error

    def joules(self) -> float:
        """Joules since the driver was loaded (the counter is in mJ)."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3

    def watts(self) -> float | None:
        """Present power in W (the sensor is in mW), None where the board has no sensor."""
        try:
            return self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3
        except self._nvml.NVMLError:
            return None


class NvmlPowerTrace(NvmlCounter):
    """The power sensor of a GPU without an energy counter, integrated by trapezes between calls of `joules`."""

    method = "nvml-power-trace"

    def __init__(self, index: int = 0):
        self._nvml, self._handle = _nvml_handle(index)
        self._total_j, self._at_s, self._last_w = 0.0, time.perf_counter(), self.watts()
        if self._last_w is None:
            raise NoEnergyCounter("this GPU has neither an energy counter nor a power sensor.")

    def joules(self) -> float:
        """Joules since this object was made; steps of up to a second are only as good as the power in between."""
        now_s, watts = time.perf_counter(), self.watts()
        self._total_j += (watts + self._last_w) / 2 * (now_s - self._at_s)
        self._at_s, self._last_w = now_s, watts
        return self._total_j


def _nvml_handle(index: int):
    """NVML's handle of torch's device `index`, by UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except ImportError as error:
        raise NoEnergyCounter("the nvidia-ml-py package is not installed.") from error
    except pynvml.NVMLError as error:
        raise NoEnergyCounter(f"NVML does not start here ({error}).") from error
    try:
        uuid = _torch_uuid(index)
        if uuid is not None:
            return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)
    except pynvml.NVMLError as error:
        raise NoEnergyCounter(f"NVML does not know GPU {index} ({error}).") from error


def _torch_uuid(index: int) -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    uuid = str(getattr(torch.cuda.get_device_properties(index), "uuid", "") or "")
    return f"GPU-{uuid.removeprefix('GPU-')}" if uuid else None


class RaplCounter:
    """The CPU packages' energy counters under /sys/class/powercap, wrap-around undone."""

    method = "rapl"

    def __init__(self, root: Path = RAPL_ROOT):
        packages = [d for d in sorted(root.glob("intel-rapl:*")) if d.name.count(":") == 1]
        if not packages:
            raise NoEnergyCounter(
                f"{root} has no RAPL domain (a virtual machine or a container hides it, or the CPU has none)."
            )
        try:
            self._limits_uj = [int((d / "max_energy_range_uj").read_text()) for d in packages]
            self._files = [d / "energy_uj" for d in packages]
            self._last_uj = self._read_uj()
        except PermissionError as error:
            raise NoEnergyCounter(
                f"{error.filename} may only be read by root; as root, `chmod a+r` it and run again."
            ) from error
        except (OSError, ValueError) as error:
            raise NoEnergyCounter(f"the RAPL counters under {root} cannot be read ({error}).") from error
        self._total_uj = 0

    def _read_uj(self) -> list[int]:
        return [int(f.read_text()) for f in self._files]

    def joules(self) -> float:
        """Joules of all packages since this object was made."""
        now = self._read_uj()
        for before, after, limit in zip(self._last_uj, now, self._limits_uj, strict=True):
            self._total_uj += after - before if after >= before else after - before + limit
        self._last_uj = now
        return self._total_uj / 1e6

    def watts(self) -> float | None:
        """RAPL has no power sensor."""
        return None


def find_counter(device: str) -> Counter:
    """The energy counter of a device.

    Args:
        device: "cpu" or "cuda".

    Raises:
        NoEnergyCounter: there is none that can be read; the message says why.
    """
    if device == "cpu":
        return RaplCounter()
    try:
        return NvmlCounter()
    except NoEnergyCounter:
        return NvmlPowerTrace()


@dataclass(frozen=True)
class _Sample:
    at_s: float
    joules: float
    watts: float | None


class EnergyMeter:
    """Measures the energy of a block: `with EnergyMeter("cuda") as meter: ...`, then `meter.reading`.

    Attributes:
        available: whether a counter can be read.
        why_not: why it cannot, or "".
        reading: the last window's `EnergyReading`.
    """

    def __init__(self, device: str = "cuda", counter: Counter | None = None):
        self.device, self.why_not, self.reading = device, "", None
        try:
            self._counter = counter or find_counter(device)
        except NoEnergyCounter as error:
            self._counter, self.why_not = None, str(error)

    @property
    def available(self) -> bool:
        """Whether energy can be measured here."""
        return self._counter is not None

    def __enter__(self) -> "EnergyMeter":
        if self._counter is None:
            raise NoEnergyCounter(f"energy cannot be measured on {self.device}: {self.why_not}")
        self._samples = [self._sample()]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._stop.set()
        self._thread.join()
        self._samples.append(self._sample())
        self.reading = _reading(self._samples, self._counter.method)

    def _sample(self) -> _Sample:
        return _Sample(time.perf_counter(), self._counter.joules(), self._counter.watts())

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self._samples.append(self._sample())

    def measure(self, fn: Callable[[], object], seconds: float, idle_w: float | None = None) -> EnergyReading:
        """Run `fn` again and again for at least `seconds` and read the energy.

        Args:
            fn: does the work, waits for its end, returns how many units (tokens) it did; None counts as one.
            seconds: the least length of the window (5 s or more for a figure to be reported).
            idle_w: idle power, for the net figure.

        Raises:
            NoEnergyCounter: energy cannot be measured here.
        """
        units, end, before = 0.0, None, state(self.device)
        with self:
            while end is None or time.perf_counter() < end:
                end = end or time.perf_counter() + seconds
                done = fn()
                units += 1.0 if done is None else float(done)
        states = {"before": before, "after": state(self.device)}
        self.reading = replace(self.reading, units=units, idle_w=idle_w, **states)
        return self.reading

    def idle_power_w(self, seconds: float = 2.0, quiet_s: float = 0.0) -> float:
        """Mean power in W while nothing is asked of the device; an open CUDA context and resident weights count as idle.

        Args:
            seconds: length of the window.
            quiet_s: how long to leave the device alone before it, so that clocks and power have come down.
        """
        time.sleep(quiet_s)
        with self:
            time.sleep(seconds)
        return self.reading.mean_w


def state(device: str) -> dict:
    """Temperature in degrees Celsius and clocks in MHz of "cpu" or "cuda" now; empty where the device cannot be asked."""
    try:
        described = machine.describe(device)
    except machine.DeviceError:
        return {}
    now = {"temperature": described["temperature"], **described["clocks"]}
    return {name: value for name, value in now.items() if value is not None and not name.startswith("max_")}


def _ticks(samples: list[_Sample]) -> list[_Sample]:
    """The samples at which the counter was first seen at a new value."""
    pairs = zip(samples, samples[1:], strict=False)
    return [after for before, after in pairs if after.joules != before.joules]


def _reading(samples: list[_Sample], method: str) -> EnergyReading:
    """Mean power between the first and the last tick of the counter, applied to the whole window."""
    first, last = samples[0], samples[-1]
    seconds = last.at_s - first.at_s
    ticks = _ticks(samples[:-1])  # the closing sample is not on a tick
    if len(ticks) >= 2:
        mean_w = (ticks[-1].joules - ticks[0].joules) / (ticks[-1].at_s - ticks[0].at_s)
        resolution_s = max(b.at_s - a.at_s for a, b in zip(ticks, ticks[1:], strict=False))
    else:
        mean_w, resolution_s = (last.joules - first.joules) / seconds, seconds
    return EnergyReading(
        joules=mean_w * seconds,
        seconds=seconds,
        mean_w=mean_w,
        method=method,
        trace_joules=_trace_joules(samples),
        resolution_s=resolution_s,
    )


def _trace_joules(samples: list[_Sample]) -> float | None:
    """The power trace integrated by trapezes, in J."""
    if any(s.watts is None for s in samples):
        return None
    pairs = zip(samples, samples[1:], strict=False)
    return sum((a.watts + b.watts) / 2 * (b.at_s - a.at_s) for a, b in pairs)
