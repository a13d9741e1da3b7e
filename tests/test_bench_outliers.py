"""What outliers apart cost a product, measured beside the product without them."""

import json

import pytest
import torch
from typer.testing import CliRunner

from trapetum import bench, sparse, timing
from trapetum.bench import products, reading, with_outliers
from trapetum.cli import app
from trapetum.memory import outlier_bytes
from trapetum.records import latest

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def small_rotations(monkeypatch):
    monkeypatch.setattr(timing, "rotation_bytes", lambda device, cache=None: 1 << 20)
    monkeypatch.setattr(reading, "_known_gbps", {})


def test_the_name_says_the_share():
    assert with_outliers.method_of(0.0045) == "codebook+sparse"
    assert with_outliers.method_of(0.01) == "codebook+sparse@0.01"
    with pytest.raises(ValueError, match="share of outliers is 2"):
        with_outliers.method_of(2)
    with pytest.raises(ValueError, match="no share of outliers behind its @"):
        products.build("codebook+sparse@some", 256, 128, 4, "cpu")


def test_random_outliers_are_as_many_as_asked_for_and_valid():
    made = with_outliers.random_outliers(50, 300, 0.3, "cpu")
    made.check()
    assert len(made.values) == sparse.count(0.3, 50, 300)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_product_is_right_and_its_bytes_are_both_parts(device, bits):
    plain = products.build("codebook", 300, 260, bits, device)
    made = products.build("codebook+sparse@0.02", 300, 260, bits, device)
    assert made.checked_error() < 5e-3 and made.method == "codebook+sparse"
    assert made.weight_bytes == plain.weight_bytes + outlier_bytes(300, 260, 0.02)
    assert made.config["outliers"] == 0.02 and made.kernel_sha256 != plain.kernel_sha256
    first = made.bind(*made.tensors)()
    assert torch.equal(first, made.bind(*made.tensors)())


@pytest.mark.parametrize("device", DEVICES)
def test_records_of_both_in_one_process(device):
    rows = bench.gemv(device, [(256, 128)], ["codebook", "codebook+sparse"], [4], ("cold",), "smoke")
    timed = [r for r in rows if r.quantity == "gemv_time"]
    chains = {"alone", "pdl"} if device == "cuda" else {"alone"}
    assert {(r.method, r.config["chain"]) for r in timed} == {
        (method, chain) for method in ("codebook", "codebook+sparse") for chain in chains
    }
    outliers = [r for r in timed if r.method == "codebook+sparse"]
    assert all(r.config["outliers"] == 0.0045 and r.config["l2"] == "cold" for r in outliers)
    assert outliers[0].config["bytes"] > timed[0].config["bytes"]
    other = outliers[0].replace(config=outliers[0].config | {"outliers": 0.01})
    assert latest([outliers[0], other]) == [outliers[0], other]  # another share is another subject


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [2, 8, 19])
def test_several_rows(device, rows):
    made = products.weights("codebook+sparse", 300, 260, 4, device).at(rows)
    assert made.checked_error() < 5e-3


def test_the_command_times_codes_with_and_without():
    arguments = [
        "bench",
        "gemv",
        "--shape",
        "256x128",
        "--outliers",
        "0.0045",
        "--outliers",
        "0.02",
        "--l2",
        "cold",
    ]
    done = CliRunner().invoke(app, [*arguments, "--profile", "smoke", "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    timed = [r for r in json.loads(done.stdout) if r["quantity"] == "gemv_time"]
    found = {(r["method"], r["config"].get("outliers")) for r in timed}
    assert {("codebook", None), ("codebook+sparse", 0.0045), ("codebook+sparse", 0.02)} == found
