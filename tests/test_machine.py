"""The description of this machine: complete, quick, free of torch, and honest where a fact cannot be had."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from trapetum import build, machine, machine_cpu, machine_gpu, records

DEVICE_FIELDS = [
    "name",
    "arch",
    "sms",
    "l2_bytes",
    "memory_bytes",
    "driver",
    "power_limit_w",
    "clocks",
    "temperature",
]

CPUINFO = """processor\t: 0
model name\t: AMD EPYC  9554 64-Core Processor
cpu MHz\t\t: 3000.000
flags\t\t: fpu avx2 fma avx512f avx512bw avx512vl avx512_vnni

processor\t: 1
model name\t: AMD EPYC  9554 64-Core Processor
cpu MHz\t\t: 3500.500
flags\t\t: fpu avx2 fma avx512f avx512bw avx512vl avx512_vnni
"""


@pytest.fixture
def fake_system(tmp_path, monkeypatch):
    """An empty /proc and /sys to fill; `put(path, text)` writes a file below them."""
    monkeypatch.setattr(machine_cpu, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine_cpu, "_SYS", tmp_path / "sys")
    monkeypatch.setattr(machine_cpu, "usable_cpus", lambda: {0, 1, 2})

    def put(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")

    return put


def put_cache(put, cpu, index, level, kind, size, shared):
    folder = f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
    for name, text in {"level": level, "type": kind, "size": size, "shared_cpu_list": shared}.items():
        put(f"{folder}/{name}", text)


def test_description_of_this_cpu_fills_a_record():
    device = machine.describe("cpu")
    assert list(device) == DEVICE_FIELDS
    assert device["name"] and device["sms"] >= 1 and device["memory_bytes"] > 2**28
    record = records.measured("gemv_time", [1.0], "codebook", {"bits": 4}, **machine.provenance("cpu"))
    moving = {"clocks": {}, "temperature": None}
    assert record.device | moving == json.loads(json.dumps(device)) | moving
    assert set(record.software) == {"python", "torch", "cuda", "trapetum", "os"}


def test_quick_and_without_torch():
    code = (
        "import sys, time; start = time.perf_counter(); from trapetum import machine; machine.provenance('cpu');"
        "print(time.perf_counter() - start); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 5


def test_cpu_facts_from_proc(fake_system):
    fake_system("proc/cpuinfo", CPUINFO)
    assert machine_cpu.name() == "AMD EPYC 9554 64-Core Processor"
    assert machine_cpu.clocks() == {"cpu_mhz": 3250.2}
    assert machine_cpu.arch().endswith(" avx512vnni")


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        ("avx512f avx512bw avx2 fma", "avx512bw"),
        ("avx2 fma", "avx2"),
        ("avx2", "portable"),
        ("fp asimd", "neon"),
        ("", "portable"),
    ],
)
def test_vector_level(fake_system, flags, level):
    fake_system("proc/cpuinfo", f"flags : {flags}")
    assert machine_cpu.vector_level() == level


def test_arm_names_its_features_differently(fake_system):
    fake_system("proc/cpuinfo", "processor : 0\nFeatures : fp asimd evtstrm")
    assert machine_cpu.vector_level() == "neon"


def test_name_falls_back_where_proc_says_nothing(fake_system, monkeypatch):
    monkeypatch.setattr(machine_cpu.platform, "processor", lambda: "")
    monkeypatch.setattr(machine_cpu.platform, "machine", lambda: "riscv64")
    assert machine_cpu.name() == "riscv64"


def test_last_level_cache_is_counted_once_for_each_group_of_processors(fake_system):
    for cpu, shared in ((0, "0-1"), (1, "0-1"), (2, "2-3")):
        put_cache(fake_system, cpu, 0, 1, "Data", "48K", str(cpu))
        put_cache(fake_system, cpu, 3, 3, "Unified", "32768K", shared)
    assert machine_cpu.last_level_cache_bytes() == 2 * 32 * 2**20


def test_instruction_caches_do_not_count(fake_system):
    put_cache(fake_system, 0, 0, 1, "Data", "48K", "0")
    put_cache(fake_system, 0, 1, 1, "Instruction", "64K", "0")
    assert machine_cpu.last_level_cache_bytes() == 48 * 2**10


def test_unknown_cache_is_none_not_zero(fake_system, monkeypatch):
    monkeypatch.setattr(machine_cpu.os, "sysconf_names", {})
    assert machine_cpu.last_level_cache_bytes() is None


def test_memory_is_what_the_control_group_allows(fake_system):
    whole = machine_cpu.memory_bytes()
    fake_system("sys/fs/cgroup/memory.max", "max")
    assert machine_cpu.memory_bytes() == whole
    fake_system("sys/fs/cgroup/memory.max", 2**29)
    assert machine_cpu.memory_bytes() == 2**29


def test_temperature_and_power_limit(fake_system):
    assert machine_cpu.temperature() is None and machine_cpu.power_limit_w() is None
    fake_system("sys/class/hwmon/hwmon1/name", "k10temp")
    fake_system("sys/class/hwmon/hwmon1/temp1_input", 51250)
    assert machine_cpu.temperature() == 51.25
    fake_system("sys/class/thermal/thermal_zone0/type", "x86_pkg_temp")
    fake_system("sys/class/thermal/thermal_zone0/temp", 47000)
    assert machine_cpu.temperature() == 47.0
    fake_system("sys/class/powercap/intel-rapl:0/constraint_0_power_limit_uw", 120000000)
    assert machine_cpu.power_limit_w() == 120.0


def test_threads_follow_the_environment_until_torch_decides(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    assert machine_cpu.threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert machine_cpu.threads() == len(machine_cpu.usable_cpus())
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_num_threads=lambda: 7))
    assert machine_cpu.threads() == 7


def test_choose_device(monkeypatch):
    monkeypatch.setattr(machine_gpu, "why_no_cuda", lambda: "the card is on fire")
    assert machine.choose_device("cpu") == machine.choose_device("auto") == "cpu"
    with pytest.raises(
        machine.DeviceError, match="cuda was asked for, but the card is on fire; use cpu or auto"
    ):
        machine.choose_device("cuda")
    with pytest.raises(ValueError, match="must be one of auto, cpu, cuda, not 'tpu'"):
        machine.choose_device("tpu")
    monkeypatch.setattr(machine_gpu, "why_no_cuda", lambda: "")
    assert machine.choose_device("auto") == machine.choose_device("cuda") == "cuda"
    assert machine.choose_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("driver", "torch", "words"),
    [
        (False, None, "no NVIDIA driver"),
        (True, SimpleNamespace(__version__="2.13.0+cpu", version=SimpleNamespace(cuda=None)), "without CUDA"),
        (
            True,
            SimpleNamespace(
                __version__="2.13.0",
                version=SimpleNamespace(cuda="13.0"),
                cuda=SimpleNamespace(is_available=lambda: False),
            ),
            "sees no usable NVIDIA GPU",
        ),
    ],
)
def test_why_no_cuda(monkeypatch, driver, torch, words):
    monkeypatch.setattr(machine_gpu, "driver_present", lambda: driver)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert words in machine_gpu.why_no_cuda()


class FakeNvml:
    class NVMLError(Exception):
        pass

    def nvmlDeviceGetHandleByUUID(self, name):
        if name != "MIG-1234":
            raise self.NVMLError
        return "gpu"

    def nvmlSystemGetDriverVersion(self):
        return b"580.65.06"

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu):
        return 700_000

    def nvmlDeviceGetClockInfo(self, gpu, kind):
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetMaxClockInfo(self, gpu, kind):
        raise self.NVMLError

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        return 31


@pytest.fixture
def fake_gpu(monkeypatch):
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        multi_processor_count=132,
        L2_cache_size=50 * 2**20,
        total_memory=80 * 2**30,
        uuid="1234",
    )
    cuda = SimpleNamespace(
        current_device=lambda: 0, get_device_properties=lambda index: properties, is_available=lambda: True
    )
    version = SimpleNamespace(cuda="13.0")
    monkeypatch.setitem(
        sys.modules, "torch", SimpleNamespace(cuda=cuda, version=version, __version__="2.11.0")
    )
    monkeypatch.setattr(machine_gpu, "nvml", lambda: FakeNvml())
    monkeypatch.setattr(machine_gpu, "driver_present", lambda: True)


def test_description_of_a_gpu(fake_gpu):
    device = machine.describe("cuda")
    assert list(device) == DEVICE_FIELDS
    assert device["arch"] == "sm_90" and device["sms"] == 132 and device["driver"] == "580.65.06"
    assert device["power_limit_w"] == 700.0 and device["temperature"] == 31.0
    assert device["clocks"] == {"sm_mhz": 1980, "memory_mhz": 2619}


def test_description_of_a_gpu_without_nvml(fake_gpu, monkeypatch):
    monkeypatch.setattr(machine_gpu, "nvml", lambda: None)
    device = machine.describe("cuda")
    assert device["name"] == "NVIDIA H100 80GB HBM3" and device["l2_bytes"] == 50 * 2**20
    assert (
        device["driver"] is device["power_limit_w"] is device["temperature"] is None
        and device["clocks"] == {}
    )


def test_after_holds_clocks_and_temperature_of_both_ends(fake_gpu, monkeypatch):
    before = machine.describe("cuda")
    monkeypatch.setattr(FakeNvml, "nvmlDeviceGetTemperature", lambda self, gpu, sensor: 64)
    device = machine.after(before)
    assert device["temperature"] == {"before": 31.0, "after": 64.0}
    assert device["clocks"]["before"]["sm_mhz"] == 1980 and device["name"] == before["name"]


def test_git_state_of_a_clone(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    monkeypatch.setattr(machine, "ROOT", tmp_path)
    git("init")
    (tmp_path / "data" / "records").mkdir(parents=True)
    (tmp_path / "kernel.c").write_text("1")
    (tmp_path / "data" / "records" / "a.jsonl").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    state = machine.git_state()
    assert len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "data" / "records" / "a.jsonl").write_text("2")
    (tmp_path / "new.txt").write_text("untracked")
    assert machine.git_state() == state
    (tmp_path / "kernel.c").write_text("2")
    assert machine.git_state() == {"commit": state["commit"], "dirty": True}


def test_git_state_of_a_copied_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv("TRAPETUM_COMMIT", raising=False)
    assert machine.git_state() == {"commit": None, "dirty": None}
    monkeypatch.setenv("TRAPETUM_COMMIT", "abc123")
    assert machine.git_state() == {"commit": "abc123", "dirty": False}


def test_software_names_torch_as_installed_and_as_imported():
    import torch

    assert machine.software()["torch"] == torch.__version__
    assert machine.software()["cuda"] == torch.version.cuda


def test_cuda_version_is_read_from_torch_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "torch" / "version.py").write_text("cuda = '13.0'")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert machine.software()["cuda"] == "13.0"


def test_capabilities_each_give_a_reason_and_take_no_time():
    start = time.perf_counter()
    found = {capability.name: capability for capability in machine.capabilities()}
    assert time.perf_counter() - start < 20
    assert all(capability.why for capability in found.values())
    assert found["PyTorch"].available
    assert {"CUDA", "CuPy", "cuda-bindings", "NVRTC", "C compiler", "OpenMP", "NVML energy counter"} <= set(
        found
    )
    assert {"RAPL energy counter", "vector instructions"} <= set(found)


def test_capabilities_without_a_compiler(monkeypatch):
    monkeypatch.setattr(build, "c_compiler", lambda: None)
    found = {capability.name: capability for capability in machine.capabilities()}
    assert not found["C compiler"].available and "CC names none" in found["C compiler"].why
    assert not found["OpenMP"].available


def test_rapl_counter_that_only_root_can_read(fake_system, monkeypatch):
    fake_system("sys/class/powercap/intel-rapl:0/energy_uj", 1)
    assert machine._rapl().available
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    assert "sudo chmod a+r" in machine._rapl().why


@pytest.mark.gpu
def test_description_of_this_gpu():
    import torch

    device = machine.describe("cuda")
    assert device["name"] == torch.cuda.get_device_name() and device["sms"] > 0 and device["l2_bytes"] > 2**20
    assert device["driver"] and device["power_limit_w"] > 10 and device["clocks"]["sm_mhz"] > 0
    assert machine.choose_device("auto") == "cuda"
