"""Nsight Compute's counters: its table, its refusals as sentences, the records, with a made-up `ncu`; a real one on a GPU."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from trapetum import bench, records
from trapetum.bench import profiled
from trapetum.bench.recording import Recorder
from trapetum.cli import app

SHAPE = (256, 64)
H100 = {"name": "NVIDIA H100 80GB HBM3", "arch": "sm_90", "l2_bytes": 50 * 2**20}
COLUMNS = (
    "ID,Process ID,Process Name,Host Name,Kernel Name,Context,Stream,Block Size,Grid Size,Device,CC,"
    "Section Name,Metric Name,Metric Unit,Metric Value"
).split(",")
DRAM, ISSUE, SHARED = profiled.PEAKS.values()
TIME, READ, CLOCK, CONFLICTS, WAVEFRONTS = profiled.METRICS[3:]
UNITS = {TIME: "ns", READ: "byte", CLOCK: "hz", DRAM: "%", ISSUE: "%", SHARED: "%"}
BASE = {
    DRAM: "75.00",
    ISSUE: "43.00",
    SHARED: "58.00",
    TIME: "40,000",
    READ: "1,234,567.00",
    CLOCK: "1,755,000,000.00",
    CONFLICTS: "80,000",
    WAVEFRONTS: "5,230,000",
}


def quoted(cells):
    return ",".join('"' + str(cell).replace('"', '""') + '"' for cell in cells)


def table(launches, units=UNITS, more=(), kernel=profiled.KERNEL):
    """What `ncu --csv --metrics` prints for `launches`, each a dict of metric to printed value."""
    lines = ["==PROF== Connected to process 4711 (/usr/bin/python3.11)"]
    lines += [
        f'==PROF== Profiling "{kernel}" - {k}: 0%....50%....100% - 4 passes' for k in range(len(launches))
    ]
    lines += ["==PROF== Disconnected from process 4711", quoted([*COLUMNS, *more])]
    for k, launch in enumerate(launches):
        for name, value in launch.items():
            start = (k, 4711, "python3.11", "127.0.0.1", kernel, 1, 7, "(32, 4, 1)", "(2, 1, 1)", 0, "9.0")
            section = "Command line profiler metrics"
            lines.append(quoted([*start, section, name, units.get(name, ""), value, *("" for _ in more)]))
    return "\n".join(lines) + "\n"


def five():
    """Five launches; the first is cold in every respect and must not count."""
    first = BASE | {TIME: "900,000", DRAM: "3.00", CONFLICTS: "5,000,000", CLOCK: "345,000,000"}
    later = (("40,000", 72), ("41,000", 74), (42000, 76), ("43,000.00", 78))
    later = [BASE | {TIME: time, DRAM: dram} for time, dram in later]
    return [first, *later]


# The table


def test_a_table_is_read_between_the_other_lines():
    found = profiled.launches_of("the program says this\n" + table(five()))
    assert len(found) == 5 and all(one.keys() == set(profiled.METRICS) for one in found)
    assert found[0][TIME] == pytest.approx(900e-6) and found[1][TIME] == pytest.approx(40e-6)
    assert found[1][READ] == 1_234_567 and found[1][CLOCK] == 1.755e9
    assert found[1][DRAM] == 72 and found[1][WAVEFRONTS] == 5_230_000


def test_more_columns_and_other_kernels_do_not_matter():
    mixed = table(five(), more=("Rule Name", "Rule Type")) + table([BASE | {TIME: "1"}], kernel="fill").split(
        'Value"\n'
    )[1].replace('"0",', '"9",', 1)
    assert profiled.launches_of(mixed) == profiled.launches_of(table(five()))


@pytest.mark.parametrize(
    ("metric", "unit", "printed", "value"),
    [
        (TIME, "usecond", "40.5", 40.5e-6),
        (TIME, "us", "40.5", 40.5e-6),
        (TIME, "msecond", "1.5", 1.5e-3),
        (READ, "Mbyte", "117.4", 117.4e6),
        (CLOCK, "cycle/nsecond", "1.75", 1.75e9),
        (CLOCK, "cycle/second", "1,750,000,000", 1.75e9),
        (CLOCK, "Ghz", "1.75", 1.75e9),
        (WAVEFRONTS, "", "1e+07", 1e7),
    ],
)
def test_units(metric, unit, printed, value):
    launches = [one | {metric: printed} for one in five()]
    found = profiled.launches_of(table(launches, UNITS | {metric: unit}))
    assert found[2][metric] == pytest.approx(value)


@pytest.mark.parametrize("printed", ["n/a", "", "75,00", "(!) nan"])
def test_what_is_no_number_is_a_sentence(printed):
    with pytest.raises(profiled.ProfileError, match="is no number: this GPU or this ncu does not count it"):
        profiled.launches_of(table([BASE, BASE | {DRAM: printed}]))


def test_a_missing_metric_is_named():
    short = [{name: value for name, value in one.items() if name != CONFLICTS} for one in five()]
    with pytest.raises(profiled.ProfileError, match=f"ncu left {CONFLICTS} out of launch 0"):
        profiled.launches_of(table(short))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==PROF== Connected to process 1\n", "printed no table"),
        (table([]), "profiled 0 launches of codebook_gemv"),
        (table([BASE]), "profiled 1 launches"),
        (table(five(), kernel="fill"), "profiled 0 launches"),
    ],
)
def test_too_little_is_a_sentence(text, message):
    with pytest.raises(profiled.ProfileError, match=message):
        profiled.launches_of(text)


@pytest.mark.parametrize(
    ("said", "errors", "status", "message"),
    [
        (
            "==ERROR== ERR_NVGPUCTRPERM - no permission\n",
            "",
            1,
            "performance counters (ERR_NVGPUCTRPERM); run the command as root",
        ),
        ("", "==ERROR== ERR_NVGPUCTRPERM - no permission\n", 0, "NVreg_RestrictProfilingToAdminUsers=0"),
        ("==ERROR== Failed to find metric dram__x\n", "", 1, "ncu failed: Failed to find metric dram__x"),
        (
            "==ERROR== The application returned an error code (1).\n",
            "Traceback (most recent call last):\ntrapetum.x.NotPossible: this GPU: none.\n",
            1,
            "the run under ncu failed: this GPU: none.",
        ),
        ("==WARNING== No kernels were profiled.\n", "", 0, "no launch of codebook_gemv"),
        ("", "", 9, "exit status 9"),
    ],
)
def test_a_refusal_is_a_sentence(said, errors, status, message):
    why = profiled.complaint(said, errors, status)
    assert message in why and "\n" not in why


def test_what_went_well_is_no_complaint():
    assert profiled.complaint(table(five()), "a warning of a library\n", 0) == ""


# ncu


def put(folder, body):
    """An executable `ncu` in `folder` that runs `body` as Python."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ncu"
    path.write_text(f"#!{sys.executable} -S\nimport os, sys, time\n{body}\n")
    path.chmod(0o755)
    return path


def only_on(patch, *folders):
    patch.setenv("PATH", os.pathsep.join(map(str, folders)))
    patch.delenv("CUDA_HOME", raising=False)


def test_ncu_is_found_in_path_then_in_cuda_home(tmp_path, monkeypatch):
    one, other = put(tmp_path / "path", ""), put(tmp_path / "home" / "bin", "")
    only_on(monkeypatch, one.parent)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert profiled.ncu() == str(one)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert profiled.ncu() == str(other)


def test_without_ncu_or_a_gpu_it_is_one_sentence(monkeypatch):
    monkeypatch.setattr(profiled.machine, "choose_device", lambda device: "cpu")
    with pytest.raises(RuntimeError, match="there is no GPU here"):
        bench.profile_kernel()
    monkeypatch.setattr(profiled.machine, "choose_device", lambda device: "cuda")
    monkeypatch.setattr(profiled, "ncu", lambda: None)
    with pytest.raises(RuntimeError, match="ncu was not found in PATH.*install Nsight Compute"):
        bench.profile_kernel()
    with pytest.raises(ValueError, match="bits must be one of 8, 4, 3, 2, not 5"):
        bench.profile_kernel(bits=5)


@pytest.fixture
def without_gpu(tmp_path, monkeypatch):
    """All of `profile_kernel` but the GPU; returns what puts an `ncu` in place."""
    only_on(monkeypatch, tmp_path)
    monkeypatch.setattr(profiled.machine, "choose_device", lambda device: "cuda")
    monkeypatch.setattr(profiled, "Recorder", lambda device, profile: Recorder("cpu", profile))
    monkeypatch.setattr(profiled, "cold_read_gbps", lambda recorder: 3000.0)
    make = profiled.make_product
    monkeypatch.setattr(
        profiled, "make_product", lambda method, i, o, bits, device: make(method, i, o, bits, "cpu")
    )
    monkeypatch.setattr(profiled.machine, "provenance", lambda device: {
        "device": H100, "software": {}, "commit": "abc", "dirty": False
    })  # fmt: skip
    monkeypatch.setattr(profiled.machine, "after", lambda device: device)
    profiled._version.cache_clear()
    return lambda body: put(tmp_path, body)


@pytest.fixture
def good(without_gpu, tmp_path):
    """An `ncu` that keeps its arguments and prints five launches."""
    (tmp_path / "table.csv").write_text(table(five()))
    return without_gpu(f"""
here = {str(tmp_path)!r}
if sys.argv[1:] == ["--version"]:
    print("NVIDIA (R) Nsight Compute Command Line Profiler\\nVersion 2024.3.2.0 (build 1) (public-release)")
else:
    open(here + "/arguments", "w").write("\\n".join([os.environ["LC_ALL"], *sys.argv[1:]]))
    print(open(here + "/table.csv").read(), end="")
""")


def test_records_of_a_profile(good):
    time, *shares = bench.profile_kernel(shape=SHAPE)
    assert (time.quantity, time.value, time.unit) == ("gemv_time", pytest.approx(41.5), "us")
    assert time.samples == pytest.approx((40, 41, 42, 43))
    assert time.config["timer"] == "nsight" and time.config["dram_read_bytes"] == 1_234_567
    assert time.config["bytes"] > time.config["weight_bytes"] == 256 * 64 // 2 + 64 * 16 * 2
    of = {r.config["peak"]: r for r in shares}
    assert {peak: r.value for peak, r in of.items()} == {
        "dram": pytest.approx(0.75),
        "issue slots": pytest.approx(0.43),
        "shared memory": pytest.approx(0.58),
        profiled.CONFLICTS: pytest.approx(80 / 5230),
    }
    assert of["dram"].samples == pytest.approx((0.72, 0.74, 0.76, 0.78))
    for r in (time, *shares):
        assert r.n == 4 and r.method == "codebook" and r.kernel_sha256 and not r.suspect
        assert {k: r.config[k] for k in ("l2", "chain", "rows", "bits", "source", "beside", "sm_mhz")} == {
            "l2": "flushed", "chain": "alone", "rows": 1, "bits": 4, "source": "Nsight Compute",
            "beside": "profile", "sm_mhz": 1755,
        }  # fmt: skip
        assert r.source.startswith("Nsight Compute 2024.3.2.0, --clock-control none")
    assert DRAM in of["dram"].source and CONFLICTS in of[profiled.CONFLICTS].source
    assert records.select([time, *shares], beside=None) == []


def test_what_ncu_is_asked(good, tmp_path):
    bench.profile_kernel(shape=SHAPE, bits=3)
    locale, *asked = (tmp_path / "arguments").read_text().split("\n")
    assert locale == "C"
    options = asked[: asked.index(sys.executable)]
    for pair in (
        ("--clock-control", "none"),
        ("--kernel-name", "codebook_gemv"),
        ("--metrics", ",".join(profiled.METRICS)),
    ):
        assert options[options.index(pair[0]) + 1] == pair[1]
    assert "--csv" in options and asked[-3:] == ["256", "64", "3"]


def test_more_bandwidth_than_a_cold_read_has_is_suspect(good, tmp_path):
    (tmp_path / "table.csv").write_text(table([one | {TIME: "2"} for one in five()]))
    time = bench.profile_kernel(shape=SHAPE)[0]
    assert time.suspect and "GB/s of memory traffic" in time.why_suspect


def test_three_sentences_with_the_numbers(good, tmp_path):
    dram, issue, conflicts = profiled.explain(bench.profile_kernel(shape=SHAPE))
    assert "over the 41.5 us" in dram and "75%" in dram and "read 1.2 MB" in dram
    assert "in 43% of its cycles" in issue and "memory, at 75%, is the peak that it is nearest to" in issue
    assert (
        "1.5% of the shared-memory wavefronts" in conflicts
        and "at 57% of its peak instead of 58%" in conflicts
    )
    for metric, words in ((ISSUE, "fewer instructions a weight"), (SHARED, "fewer lookups a weight")):
        (tmp_path / "table.csv").write_text(table([one | {metric: "93.0"} for one in five()]))
        found = bench.profile_kernel(shape=SHAPE)
        assert words in profiled.explain(found)[1]
    assert profiled.explain(found[:-1]) == profiled.explain([]) == []


def test_a_wrong_product_is_not_profiled(good, monkeypatch, tmp_path):
    monkeypatch.setattr("trapetum.bench.products.TOLERANCE", dict.fromkeys((torch.float32,), 1e-12))
    with pytest.raises(ArithmeticError, match="codebook is off by"):
        bench.profile_kernel(shape=SHAPE)
    assert not (tmp_path / "arguments").exists()


def test_no_permission_ends_as_a_sentence(without_gpu):
    without_gpu('print("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"); sys.exit(1)')
    said = CliRunner().invoke(app, ["bench", "profile", "--shape", "256x64"])
    assert said.exit_code == 2
    (line,) = said.stderr.strip().splitlines()
    assert line.startswith("trapetum: ") and "run the command as root" in line


def test_a_run_that_fails_says_why(without_gpu, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    without_gpu(f"at = sys.argv.index({sys.executable!r})\nos.execv(sys.executable, sys.argv[at:])")
    with pytest.raises(profiled.ProfileError, match="the run under ncu failed: .*(CUDA|cuda|NVIDIA|GPU)"):
        bench.profile_kernel(shape=SHAPE)


def test_a_run_that_hangs_is_ended(without_gpu, monkeypatch, tmp_path):
    without_gpu(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)")
    monkeypatch.setattr(profiled, "TIMEOUT_S", 1.5)
    with pytest.raises(profiled.ProfileError, match="did not end within 1.5 s"):
        bench.profile_kernel(shape=SHAPE)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_every_launch_follows_a_flush(monkeypatch):
    order = []
    buffer = SimpleNamespace(zero_=lambda: order.append("flush"))
    product = SimpleNamespace(
        tensors=(torch.zeros(1),), calls=lambda copies: [lambda: order.append("launch")] * copies
    )
    monkeypatch.setattr(profiled, "make_product", lambda *asked: order.append(asked) or product)
    monkeypatch.setattr(profiled.torch, "empty", lambda size, **how: order.append(size) or buffer)
    monkeypatch.setattr(profiled.torch.cuda, "synchronize", lambda: order.append("end"))
    profiled.launch(*SHAPE, 4)
    made = ("codebook", *SHAPE, 4, "cuda")
    assert order == [made, 256 << 20, *["flush", "launch"] * 5, "end"]


# The command line


def test_the_command_prints_records_and_sentences(good):
    run = lambda *more: CliRunner().invoke(  # noqa: E731
        app, ["bench", "profile", "--shape", "256x64", *more], env={"COLUMNS": "200"}
    )
    assert "Example: trapetum bench profile" in run("--help").stdout
    lines = run().stdout.splitlines()
    assert sum(line.startswith("peak_fraction") for line in lines) == 4 and "issue slots" in "".join(lines)
    assert [line.split(":")[0] for line in lines[-3:]] == ["DRAM", "Issue", "Conflicts"]
    assert len(json.loads(run("--json").stdout)) == 5


@pytest.mark.gpu
@pytest.mark.skipif(profiled.ncu() is None, reason="needs ncu (Nsight Compute)")
def test_a_real_profile():
    """16 MB of codes: they come from memory, since the cache was written over, and the counters agree with the formula."""
    try:
        time, *shares = bench.profile_kernel(shape=(4096, 8192), profile="smoke")
    except profiled.ProfileError as error:
        if "ERR_NVGPUCTRPERM" in str(error):
            pytest.skip(str(error))
        raise
    of = {r.config["peak"]: r.value for r in shares}
    assert time.n == profiled.LAUNCHES - 1 and time.config["sm_mhz"] > 100
    assert 0.98 <= time.config["dram_read_bytes"] / time.config["bytes"] <= 1.15
    assert 0.1 < of["dram"] <= 1 and 0.05 < of["issue slots"] <= 1 and 0.05 < of["shared memory"] <= 1
    assert of[profiled.CONFLICTS] < 0.2
    assert len(profiled.explain([time, *shares])) == 3
