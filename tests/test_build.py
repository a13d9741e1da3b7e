"""Compiling and keeping kernels where something is wrong: a damaged or unwritable cache, NVRTC, headers, driver, source."""

import re
import sys
import warnings
from pathlib import Path

import pytest

from trapetum import build, kernel_cache

SOURCE, ARCH = "read_bandwidth.cu", "sm_90"
CUBIN = b"\x7fELF the machine code " * 100


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRAPETUM_CACHE", str(folder))
    monkeypatch.setattr(kernel_cache, "_moved", {})
    return folder


@pytest.fixture
def unwritable(cache):
    """A regular file where the folder should be stops root too."""
    cache.write_text("not a folder")
    return cache


@pytest.fixture
def compiled(monkeypatch):
    """Compilations so far, without the compiler."""
    pytest.importorskip("cuda.bindings.nvrtc")
    runs = []

    def run(nvrtc, source, name, options):
        runs.append(name)
        return CUBIN, "Compiling entry function 'read_bytes'\nUsed 20 registers\n"

    monkeypatch.setattr(build, "_run_nvrtc", run)
    return runs


def warned(action):
    """What an action returns, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return action(), [str(w.message) for w in caught]


def one_sentence(text: str) -> bool:
    return text.endswith(".") and "\n" not in text


def compile_once():
    return warned(lambda: build.compile_cuda(SOURCE, ARCH))


# --- the cache -----------------------------------------------------------------------------------------------------


def test_the_second_time_nothing_is_compiled(compiled):
    (first, said), (second, said_again) = compile_once(), compile_once()
    assert compiled == [SOURCE] and said == said_again == [] and first == second
    assert first.path.read_bytes() == CUBIN and first.resources()["read_bytes"].registers == 20
    build.compile_cuda(SOURCE, "sm_80")
    build.compile_cuda(SOURCE, ARCH, ("A=1",))
    assert len(compiled) == 3


DAMAGE = {
    "truncated cubin": (".cubin", CUBIN[:700]),
    "empty cubin": (".cubin", b""),
    "garbage in the cubin": (".cubin", b"\x00" + CUBIN[1:]),
    "a cubin of another source": (".cubin", CUBIN + b"more"),
    "empty log": (".log", b""),
    "garbage in the log": (".log", b"\xff\xfe\x00\n\xff"),
    "truncated log": (".log", None),
}


@pytest.mark.parametrize(("suffix", "content"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_said_and_compiled_again(compiled, suffix, content):
    (first, _) = compile_once()
    damaged = first.path.with_suffix(suffix)
    damaged.write_bytes(damaged.read_bytes()[:-5] if content is None else content)
    again, said = compile_once()
    assert compiled == [SOURCE] * 2 and again == first and again.path.read_bytes() == CUBIN
    assert len(said) == 1 and one_sentence(said[0])
    assert str(first.path) in said[0] and "damaged" in said[0] and "compiled again" in said[0]
    assert compile_once() == (first, [])


@pytest.mark.parametrize("suffix", [".cubin", ".log"])
def test_a_missing_half_is_compiled_again_without_a_word(compiled, suffix):
    first, _ = compile_once()
    first.path.with_suffix(suffix).unlink()
    assert compile_once() == (first, []) and len(compiled) == 2


def test_an_unwritable_cache_is_said_once_and_a_private_folder_used(compiled, unwritable):
    first, said = compile_once()
    assert first.path.read_bytes() == CUBIN and unwritable not in first.path.parents
    assert first.path.parent.stat().st_mode & 0o077 == 0
    assert len(said) == 1 and one_sentence(said[0])
    assert str(unwritable / "cuda") in said[0] and "TRAPETUM_CACHE" in said[0]
    assert compile_once() == (first, []) and compiled == [SOURCE]
    other, said = warned(lambda: build.compile_cuda(SOURCE, ARCH, ("A=1",)))
    assert said == [] and other.path != first.path


def test_a_folder_in_the_place_of_the_cubin(compiled):
    first, _ = compile_once()
    first.path.unlink()
    (first.path / "inside").mkdir(parents=True)
    second, said = compile_once()
    assert second.path.read_bytes() == CUBIN and second.path != first.path
    assert len(said) == 1 and "TRAPETUM_CACHE" in said[0]


def test_nowhere_to_write_is_one_sentence(compiled, unwritable, monkeypatch):
    monkeypatch.setattr(kernel_cache, "_private_folder", lambda: unwritable / "temporary")
    with pytest.raises(
        OSError, match="neither .* nor a temporary folder .* can be written; set TRAPETUM_CACHE"
    ) as raised:
        build.compile_cuda(SOURCE, ARCH)
    assert one_sentence(str(raised.value))


def test_nothing_temporary_is_left_behind(compiled, cache):
    first, _ = compile_once()
    assert {p.suffix for p in first.path.parent.iterdir()} == {".cubin", ".log"}


def test_a_damaged_library_is_compiled_again():
    if build.c_compiler() is None:
        pytest.skip("needs a C compiler")
    path = build.compile_c("kmeans.c")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    again, said = warned(lambda: build.compile_c("kmeans.c"))
    assert again == path and len(path.read_bytes()) == len(whole)
    assert len(said) == 1 and "damaged" in said[0]


def test_a_library_in_an_unwritable_cache_still_loads(unwritable):
    import ctypes

    if build.c_compiler() is None:
        pytest.skip("needs a C compiler")
    path, said = warned(lambda: build.compile_c("kmeans.c"))
    assert ctypes.CDLL(str(path)) and len(said) == 1 and "TRAPETUM_CACHE" in said[0]


# --- a cubin that the driver refuses -------------------------------------------------------------------------------


class Driver:
    """Refuses the first `times` loads, as CuPy words it."""

    def __init__(self, times, error="CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid"):
        self.times, self.error, self.loaded = times, error, []

    def __call__(self, path: Path):
        self.loaded.append(path)
        if len(self.loaded) <= self.times:
            raise RuntimeError(self.error)
        return path.read_bytes()


def test_a_refused_cubin_is_compiled_again_once(compiled):
    driver = Driver(1)
    assert build.load_cuda(SOURCE, ARCH, (), driver) == CUBIN
    assert compiled == [SOURCE] * 2 and len(driver.loaded) == 2


@pytest.mark.parametrize("name", ["INVALID_IMAGE", "NO_BINARY_FOR_GPU", "UNSUPPORTED_PTX_VERSION"])
def test_a_cubin_that_stays_refused_names_both_versions(compiled, name, monkeypatch):
    monkeypatch.setattr(build, "driver_version", lambda: (12, 8))
    monkeypatch.setattr(build, "nvrtc_version", lambda: (13, 5))
    driver = Driver(9, f"CUDA_ERROR_{name}: no")
    with pytest.raises(
        build.BuildError, match="CUDA 12.8.*NVRTC 13.5.*update the driver, or install"
    ) as raised:
        build.load_cuda(SOURCE, ARCH, (), driver)
    assert name in str(raised.value) and SOURCE in str(raised.value) and ARCH in str(raised.value)
    assert len(driver.loaded) == 2 and one_sentence(str(raised.value))


def test_an_error_that_is_not_the_cubins_passes(compiled):
    driver = Driver(9, "CUDA_ERROR_OUT_OF_MEMORY: out of memory")
    with pytest.raises(RuntimeError, match="OUT_OF_MEMORY"):
        build.load_cuda(SOURCE, ARCH, (), driver)
    assert len(driver.loaded) == 1 and compiled == [SOURCE]


@pytest.mark.gpu
def test_a_damaged_cubin_with_a_matching_log_is_compiled_again_on_a_gpu():
    """The log cannot tell here; the driver does."""
    import torch

    from trapetum import cuda, launch

    major, minor = torch.cuda.get_device_capability()
    cubin = build.compile_cuda(SOURCE, f"sm_{major}{minor}")
    kernel_cache.keep(cubin.path, b"\x7fELF" + bytes(5000), "")
    launch.kernel.cache_clear()
    buffer = torch.ones(1 << 20, device="cuda")
    cuda.read(buffer)
    torch.cuda.synchronize()
    assert len(cubin.path.read_bytes()) != 5004


# --- compiler, headers, driver -------------------------------------------------------------------------------------


def fake_driver(monkeypatch, version, status=0):
    from cuda.bindings import driver

    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (driver.CUresult(status), version))


@pytest.mark.parametrize(
    ("version", "status", "known"), [(12080, 0, (12, 8)), (13000, 0, (13, 0)), (0, 0, None), (0, 100, None)]
)
def test_driver_version(version, status, known, monkeypatch):
    pytest.importorskip("cuda.bindings.driver")
    fake_driver(monkeypatch, version, status)
    assert build.driver_version() == known


def test_a_driver_older_than_nvrtc_is_one_sentence_with_both_versions(monkeypatch):
    pytest.importorskip("cuda.bindings.driver")
    monkeypatch.setattr(build, "nvrtc_version", lambda: (13, 5))
    fake_driver(monkeypatch, 12080)
    assert one_sentence(build.why_not())
    assert re.search(
        "driver supports CUDA 12.8 .* NVRTC 13.5 .* update the driver, or install .* 12.8", build.why_not()
    )
    fake_driver(monkeypatch, 13000)  # an older minor version loads
    assert build.why_not() == ""
    fake_driver(monkeypatch, 14010)
    assert build.why_not() == ""


def test_no_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(
        build.BuildError, match=r"cuda-bindings package; install it with `pip install"
    ) as raised:
        build.compile_cuda(SOURCE, ARCH)
    assert build.why_not() == str(raised.value) and one_sentence(build.why_not())
    assert build.driver_version() is None


def test_bindings_without_nvrtc(monkeypatch):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")

    def missing():
        raise RuntimeError("Failure finding libnvrtc.so\nin many places")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", missing)
    with pytest.raises(build.BuildError, match="NVRTC.* was not found; install it with") as raised:
        build.compile_cuda(SOURCE, ARCH)
    assert build.why_not() == str(raised.value) and one_sentence(build.why_not())


def test_no_headers(monkeypatch, tmp_path):
    import importlib.util

    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_TOOLKIT", str(tmp_path / "toolkit"))
    with pytest.raises(
        build.BuildError, match="cuda_fp16.h was not found; install .* or set CUDA_HOME"
    ) as raised:
        build.compile_cuda(SOURCE, ARCH)
    assert build.why_not() == str(raised.value) and one_sentence(build.why_not())


@pytest.mark.parametrize("arch", ["sm_70", "sm_999", "gfx"])
def test_an_architecture_that_nvrtc_does_not_know(arch):
    pytest.importorskip("cuda.bindings.nvrtc")
    with pytest.raises(
        build.BuildError, match=f"NVRTC .* does not compile for {arch}, only for .*sm_90"
    ) as raised:
        build.compile_cuda(SOURCE, arch)
    assert one_sentence(str(raised.value))


def test_a_source_with_an_error_names_file_place_and_error(monkeypatch, tmp_path, cache):
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setattr(build, "KERNELS", tmp_path)
    (tmp_path / "broken.cu").write_text('extern "C" __global__ void f() { int unused; nothing(); }\n')
    with pytest.raises(build.BuildError) as raised:
        build.compile_cuda("broken.cu", ARCH)
    first = str(raised.value).splitlines()[0]
    assert "kernels/broken.cu does not compile" in first and ARCH in first
    assert 'broken.cu(1): error: identifier "nothing" is undefined' in first
    assert not list(cache.rglob("*.cubin"))


def test_a_c_source_with_an_error_names_file_and_error(monkeypatch, tmp_path, cache):
    if build.c_compiler() is None:
        pytest.skip("needs a C compiler")
    monkeypatch.setattr(build, "KERNELS", tmp_path)
    (tmp_path / "broken.c").write_text("int f(void) { return nothing; }\n")
    with pytest.raises(build.BuildError) as raised:
        build.compile_c("broken.c")
    first = str(raised.value).splitlines()[0]
    assert "kernels/broken.c does not compile" in first and "error" in first and "nothing" in first
    assert not list(cache.rglob("*.so"))


def test_no_c_compiler(monkeypatch):
    monkeypatch.setattr(build, "c_compiler", lambda: None)
    with pytest.raises(build.BuildError, match="no C compiler was found; install gcc or clang") as raised:
        build.compile_c("kmeans.c")
    assert one_sentence(str(raised.value))
