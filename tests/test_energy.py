"""Energy: counters that tick and wrap, the sentence where there is none, gross and net."""

import time

import pytest
import torch

from trapetum import energy
from trapetum.energy import EnergyMeter, EnergyReading, NoEnergyCounter, RaplCounter, _Sample


class SteadyCounter:
    """Draws a constant power, and like NVML's counter moves only in steps."""

    method = "test"

    def __init__(self, watts=200.0, step_s=0.05):
        self.power_w, self.step_s = watts, step_s

    def joules(self):
        return self.power_w * self.step_s * (time.perf_counter() // self.step_s)

    def watts(self):
        return self.power_w


def test_steps_of_the_counter_do_not_bias_the_mean():
    reading = EnergyMeter("cuda", SteadyCounter()).measure(lambda: time.sleep(0.02), seconds=0.42)
    assert reading.mean_w == pytest.approx(200, rel=0.25)
    assert reading.joules == pytest.approx(reading.mean_w * reading.seconds)
    assert reading.trace_joules == pytest.approx(200 * reading.seconds, rel=0.01)
    assert 0.02 < reading.resolution_s < 0.3
    assert reading.units >= 2


def test_mean_is_taken_between_ticks():
    joules = [0, 0, 20, 20, 40, 40, 60, 60]
    samples = [_Sample(0.1 * i, j, 100.0) for i, j in enumerate(joules)]
    reading = energy._reading(samples, "test")
    assert reading.mean_w == pytest.approx(100)
    assert reading.joules == pytest.approx(70)
    assert reading.resolution_s == pytest.approx(0.2)


def test_window_shorter_than_a_tick_falls_back_and_says_so():
    samples = [_Sample(0.0, 0.0, None), _Sample(0.05, 0.0, None), _Sample(0.1, 10.0, None)]
    reading = energy._reading(samples, "test")
    assert reading.mean_w == pytest.approx(100) and reading.resolution_s == pytest.approx(0.1)
    assert reading.trace_joules is None


def test_units_are_summed_and_net_leaves_out_idle():
    meter = EnergyMeter("cuda", SteadyCounter())
    reading = meter.measure(lambda: time.sleep(0.05) or 8, seconds=0.3, idle_w=50.0)
    assert reading.units % 8 == 0 and reading.units >= 8
    assert reading.net_joules == pytest.approx(reading.joules - 50 * reading.seconds)
    assert reading.per_unit_j(net=True) < reading.per_unit_j()


def test_work_that_yields_nothing_still_ends():
    reading = EnergyMeter("cuda", SteadyCounter()).measure(lambda: 0, seconds=0.05)
    with pytest.raises(ValueError, match="count of units"):
        reading.per_unit_j()


def test_net_without_idle_power_is_refused():
    with pytest.raises(ValueError, match="idle power"):
        EnergyReading(1.0, 1.0, 1.0, "test", units=2).per_unit_j(net=True)


def test_idle_power():
    assert EnergyMeter("cuda", SteadyCounter(30.0)).idle_power_w(0.3) == pytest.approx(30, rel=0.2)


def test_idle_waits_until_the_device_is_quiet(monkeypatch):
    slept = []
    monkeypatch.setattr(energy.time, "sleep", slept.append)
    EnergyMeter("cuda", SteadyCounter(30.0, 1e-6)).idle_power_w(0.3, 1.5)
    assert slept == [1.5, 0.3]


def test_a_window_has_the_state_before_and_after_it(monkeypatch):
    described = [
        {"temperature": 40.0, "clocks": {"sm_mhz": 345, "max_sm_mhz": 1980}},
        {"temperature": None, "clocks": {"sm_mhz": 1900}},
    ]
    monkeypatch.setattr(energy.machine, "describe", lambda device: described.pop(0))
    reading = EnergyMeter("cpu", SteadyCounter()).measure(lambda: 1, seconds=0.05)
    assert reading.before == {"temperature": 40.0, "sm_mhz": 345} and reading.after == {"sm_mhz": 1900}


def test_a_device_that_cannot_be_asked_has_no_state(monkeypatch):
    def absent(device):
        raise energy.machine.DeviceError("no such device.")

    monkeypatch.setattr(energy.machine, "describe", absent)
    assert energy.state("cuda") == {}


def rapl_package(root, number, energy_uj, limit_uj=1_000_000):
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit_uj}\n")
    return folder / "energy_uj"


def test_rapl_sums_packages_and_undoes_the_wrap(tmp_path):
    first, second = rapl_package(tmp_path, 0, 900_000), rapl_package(tmp_path, 1, 100)
    rapl_package(tmp_path, "0:0", 5)  # a core domain inside package 0: counted in it already
    counter = RaplCounter(tmp_path)
    first.write_text("100000")
    second.write_text("300100")
    assert counter.joules() == pytest.approx(0.2 + 0.3)
    first.write_text("150000")
    assert counter.joules() == pytest.approx(0.55)


def test_no_rapl_is_one_clear_sentence(tmp_path):
    with pytest.raises(NoEnergyCounter, match="no RAPL domain"):
        RaplCounter(tmp_path)


def test_rapl_for_root_only_says_what_to_do(tmp_path, monkeypatch):
    rapl_package(tmp_path, 0, 1)

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(tmp_path), "read_text", refuse)
    with pytest.raises(NoEnergyCounter, match="chmod a\\+r"):
        RaplCounter(tmp_path)


def test_meter_without_a_counter_says_why(monkeypatch):
    def none(device):
        raise NoEnergyCounter("there is no counter for the test.")

    monkeypatch.setattr(energy, "find_counter", none)
    meter = EnergyMeter("cpu")
    assert not meter.available and meter.why_not == "there is no counter for the test."
    with pytest.raises(NoEnergyCounter, match="cannot be measured on cpu: there is no counter"):
        meter.measure(lambda: 1, seconds=0.1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_machine_has_a_meter_or_a_reason(device):
    meter = EnergyMeter(device)
    assert meter.available == (meter.why_not == "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_counter_and_trace_agree():
    meter = EnergyMeter("cuda")
    assert meter.available, meter.why_not
    x = torch.rand(4096, 4096, device="cuda")

    def work():
        for _ in range(20):
            x @ x
        torch.cuda.synchronize()

    reading = meter.measure(work, seconds=2.0)
    assert 20 < reading.mean_w < 2000
    assert reading.joules == pytest.approx(reading.trace_joules, rel=0.3)
