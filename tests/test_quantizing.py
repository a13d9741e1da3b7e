"""The driver of calibrated quantization: the same codes whatever the order, the stops and the number of processes."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from tests.test_calibration import inputs_and_gradients, linears, make, rows
from trapetum import calibration, checkpoint, memory, models, partial, quantize_job, quantizing, swap
from trapetum.blocks import Blocks
from trapetum.calibration import CalibrationError, made_of
from trapetum.partial import Partial, PartialError
from trapetum.paths import ROOT
from trapetum.quantizers import METHODS, quantize
from trapetum.quantizing import quantize_calibrated
from trapetum.shapes import MODELS

EVERY = [name for name in METHODS if name != "additive"]
LAYER = "model.layers.1.mlp.up_proj"


def quantized(method, bits=4, kind="llama", dtype=torch.float32, **options):
    model = make(kind, dtype)
    tokens = options.pop("tokens", made_of(rows()))
    report = quantize_calibrated(model, bits, method, tokens, progress=False, **options)
    return model, report


def assert_same(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# What it does


@pytest.mark.parametrize("method", EVERY)
def test_every_method_quantizes_every_layer(method):
    model, report = quantized(method)
    layers = dict(swap.codebook_layers(model))
    assert len(layers) == 14 and "lm_head" not in layers
    assert list(report.errors) == list(report.output_errors) == list(layers)
    assert all(0 < error < 0.1 for error in [*report.errors.values(), *report.output_errors.values()])
    assert (report.bits, report.n_codes, report.method) == (4, 16, method)
    with torch.inference_mode():
        assert torch.isfinite(model(rows()[0][None]).logits).all()
    assert model.trapetum_quantization["method"] == model.trapetum_method == method


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_quantizers_own_on_the_models_inputs(dtype):
    model, report = quantized("kmeans-weighted", bits=3, kind="qwen2", dtype=dtype)
    dense = make("qwen2", dtype)
    inputs = [inputs_and_gradients(dense.float(), row)[0] for row in rows()]
    for name, layer in swap.codebook_layers(model):
        square = torch.cat([one[name] for one in inputs]).square().mean(0)
        expected = quantize(
            linears(dense)[name].weight, 3, "kmeans-weighted", input_weight=square
        ).dequantize()
        weight = linears(dense)[name].weight
        lost, least = ((w - weight).square() @ square for w in (layer.dequantize(), expected))
        torch.testing.assert_close(lost, least, rtol=1e-3, atol=1e-9)
        if layer.bias is not None:
            assert torch.equal(layer.bias, linears(dense)[name].bias.to(dtype))


def test_output_errors_are_those_of_the_outputs():
    model, report = quantized("lnq", bits=3)
    dense = make()
    inputs = [inputs_and_gradients(dense, row)[0] for row in rows()]
    for name, layer in swap.codebook_layers(model):
        x = torch.cat([one[name] for one in inputs]).double()
        weight = linears(dense)[name].weight.detach().double()
        lost = x @ (weight - layer.dequantize(torch.float64)).T
        expected = float(lost.square().sum() / (x @ weight.T).square().sum())
        assert report.output_errors[name] == pytest.approx(expected, rel=1e-3)


def test_calibration_pays_where_it_is_measured():
    errors = {method: quantized(method, bits=3)[1].mean_output_error for method in ("rtn", "kmeans", "lnq")}
    assert errors["lnq"] < 0.8 * errors["kmeans"] < 0.8 * errors["rtn"]


def test_objectives_are_logged_and_never_rise():
    _, report = quantized("lnq-guided", groups=2)
    assert list(report.objectives) == list(report.errors)
    for values in report.objectives.values():
        assert len(values) >= 3 and values[-1] < values[0]
        assert all(b <= a * (1 + 1e-5) for a, b in zip(values, values[1:], strict=False))
    assert not quantized("kmeans")[1].objectives
    assert report.phases.keys() == {"gradients", "statistics", "transform", "quantize"}
    assert 0.5 * report.seconds < sum(report.phases.values()) <= report.seconds


@pytest.mark.parametrize("kind", ["llama", "tied"])
@pytest.mark.parametrize("method", ["kmeans-weighted", "lnq-guided"])
def test_the_head_where_it_is_asked_for(kind, method):
    model, report = quantized(method, kind=kind, lm_head=True)
    assert len(report.errors) == 15 and list(report.errors)[-1] == "lm_head"
    embedding = make(kind).model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    difference = model.lm_head.dequantize() - make(kind).lm_head.weight.detach()
    assert float(difference.square().mean().sqrt()) < 0.01


def test_a_method_that_needs_nothing_gives_the_codes_it_gives_without():
    calibrated, report = quantized("kmeans")
    plain = make()
    alone = swap.quantize_model(plain, 4, "kmeans", progress=False)
    assert_same(calibrated, plain)
    assert report.errors == alone.errors and not alone.output_errors and report.output_errors


def test_rotation_needs_no_tokens():
    with_tokens, _ = quantized("rotation")
    model = make()
    report = swap.quantize_model(model, 4, "rotation", progress=False)
    assert_same(model, with_tokens)
    assert not report.output_errors and model.trapetum_quantization["notes"][0].startswith("Residual stream")
    other, _ = quantized("rotation", tokens=made_of(rows(), seed=1))
    assert not torch.equal(other.model.layers[0].mlp.up_proj.codes, model.model.layers[0].mlp.up_proj.codes)


def test_scaled_models_keep_their_function():
    """AWQ at 8 bits: what is divided out of norms and rows is in the codes."""
    model, _ = quantized("awq", bits=8)
    dense, tokens = make(), rows()[0][None]
    assert not torch.equal(
        model.model.layers[0].input_layernorm.weight, dense.model.layers[0].input_layernorm.weight
    )
    with torch.inference_mode():
        found, expected = model(tokens).logits, dense(tokens).logits
    assert float((found - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("method", ["kmeans", "lnq"])
def test_outliers_are_kept_apart(method):
    model, report = quantized(method, outliers=0.01)
    _, without = quantized(method)
    layer = model.get_submodule(LAYER)
    assert layer.outliers is not None and report.mean_error < 0.95 * without.mean_error
    assert model.trapetum_quantization["outliers"] == 0.01


def test_the_same_seed_gives_the_same_codes():
    assert_same(quantized("lnq-guided")[0], quantized("lnq-guided")[0])
    other = quantized("lnq-guided", tokens=made_of(rows(seed=5)))[0]
    assert not torch.equal(
        other.get_submodule(LAYER).codes, quantized("lnq-guided")[0].get_submodule(LAYER).codes
    )


def test_what_the_saved_config_says(tmp_path):
    model, _ = quantized("lnq-guided", tokens=made_of(rows(), "the text", seed=4), groups=3)
    said = checkpoint.quantization_config(model)["recipe"]
    tokens = {"text": "the text", "sequences": 3, "length": 19, "seed": 4}
    assert said["calibration"] == tokens | {"sha256": calibration.rows_sha256(rows())}
    assert said["groups"] == 3 and model.trapetum_quantization["method"] == "lnq-guided"
    models.save(model, None, tmp_path / "saved")
    assert_same(models.load(str(tmp_path / "saved")).model, model)


def test_rows_of_ids_as_before():
    model, other = make(), make()
    report = swap.quantize_model(model, 3, "kmeans-weighted", calibration=rows(), progress=False)
    assert (
        report.errors
        == quantize_calibrated(other, 3, "kmeans-weighted", made_of(rows()), progress=False).errors
    )
    assert_same(model, other)


def test_a_bar_tells_the_time_left(capsys):
    quantize_calibrated(make(), 4, "lnq-guided", made_of(rows()), progress=True)
    told = capsys.readouterr().err
    assert "gradients: 100%" in told and "quantize to 4 bits: 100%" in told and "<00:00" in told


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "no quantization method 'magic'"),
        ({"method": "rtn-128"}, "rtn-128 keeps a scale and a zero point"),
        ({"bits": 5}, "5"),
        ({"tokens": None}, "needs calibration tokens; give some"),
        ({"tokens": made_of([[3, 256]])}, "run from 3 to 256, and the model knows 0 to 255"),
        ({"tokens": made_of([[1] * 65])}, "has 65 tokens, and the model's context is 64"),
        ({"groups": 0}, "groups is 0"),
        ({"outliers": 0.7}, "the share of outliers is 0.7"),
    ],
)
def test_refused_in_a_sentence(options, message):
    with pytest.raises(ValueError) as raised:
        quantized(**{"method": "lnq-guided"} | options)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_quantized_model_is_refused():
    model, _ = quantized("kmeans")
    with pytest.raises(ValueError, match="no dense linear layers left"):
        quantize_calibrated(model, 4, "kmeans", made_of(rows()), progress=False)


def test_a_weight_that_is_not_finite_is_named():
    model = make()
    model.model.layers[0].mlp.gate_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="model.layers.0.mlp"):
        quantize_calibrated(model, 4, "kmeans-weighted", made_of(rows()), progress=False)


def test_too_little_memory_is_told_before_anything_long(monkeypatch):
    monkeypatch.setattr(quantizing, "_free_bytes", lambda device: 10_000)
    model = make()
    with pytest.raises(CalibrationError, match=r"3 sequences of up to 19 tokens takes 0.0 GB .* give fewer"):
        quantize_calibrated(model, 4, "lnq", made_of(rows()), progress=False)
    assert not swap.is_quantized(model)


def test_memory_of_seven_billion_weights_fits_a_card():
    parts = memory.calibration_bytes(MODELS["llama-2-7b"], 128 * 2048, 2048, 4)
    assert parts["token weights"] == 224 * 262144 * 4 * 4
    assert parts["hidden states"] == 262144 * 4096 * 2
    assert 20e9 < sum(parts.values()) - parts["token weights"] < 40e9
    plain = memory.calibration_bytes(MODELS["llama-2-7b"], 128 * 2048, 2048)
    assert plain["token weights"] == 0 and plain["Hessians"] < parts["Hessians"] / 4


# Taken up again


@pytest.mark.parametrize(
    ("method", "keep"),
    [("kmeans-weighted", "half"), ("rotation", "half"), ("awq", "all"), ("awq", "half"), ("awq", "damaged")]
    + [("lnq-guided", keep) for keep in ("all", "half", "gradients", "damaged")],
)
def test_a_folder_of_finished_layers_gives_the_same(tmp_path, method, keep):
    folder, options = tmp_path / "run.partial", {"outliers": 0.01 if method == "kmeans-weighted" else 0.0}
    whole, report = quantized(method, resume_dir=folder, **options)
    assert_same(quantized(method, **options)[0], whole)
    layers = sorted(path for path in folder.glob("*.safetensors") if "proj" in path.name)
    assert len(layers) == 14 and partial.is_partial(folder) and partial.finished(folder) >= 14
    for path in layers[:: {"all": 99, "half": 2, "gradients": 1, "damaged": 3}[keep]][keep == "all" :]:
        path.write_bytes(path.read_bytes()[:-5]) if keep == "damaged" else path.unlink()
    again, second = quantized(method, resume_dir=folder, **options)
    assert_same(again, whole)
    assert (second.errors, second.output_errors) == (report.errors, report.output_errors)
    assert len(list(folder.glob("*proj.safetensors"))) == 14


def test_finished_layers_are_not_done_again(tmp_path, monkeypatch):
    quantized("lnq-guided", resume_dir=tmp_path / "p")
    for name in ("quantized_layer", "hessians"):
        monkeypatch.setattr(quantizing, name, None)
    quantized("lnq-guided", resume_dir=tmp_path / "p")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"method": "lnq"}, "method 'kmeans-weighted', now 'lnq'"),
        ({"bits": 3}, "bits 4, now 3"),
        ({"tokens": made_of(rows(seed=1))}, "calibration "),
        ({"tokens": made_of(rows(), seed=1)}, "seed 0, now 1"),
        ({"outliers": 0.01}, "outliers 0.0, now 0.01"),
        ({"kind": "tied"}, "model "),
    ],
)
def test_layers_of_another_run_are_refused(tmp_path, change, key):
    quantized("kmeans-weighted", resume_dir=tmp_path / "p")
    with pytest.raises(PartialError) as raised:
        quantized(**{"method": "kmeans-weighted", "resume_dir": tmp_path / "p"} | change)
    said = str(raised.value)
    assert (
        f"{tmp_path / 'p'} holds the layers of another run" in said and key in said and "--no-resume" in said
    )


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "diary.txt").write_text("dear diary")
    with pytest.raises(PartialError, match=r"holds no run.json and is not empty"):
        Partial(tmp_path, {})
    (tmp_path / "run.json").write_text("[")
    with pytest.raises(PartialError, match=r"is damaged"):
        Partial(tmp_path, {})


def test_a_fingerprint_sees_one_bit_and_one_swap():
    model = make()
    before = partial.fingerprint(model)
    weight = model.model.layers[1].mlp.up_proj.weight.data
    assert partial.fingerprint(make()) == before
    weight[3, [4, 9]] = weight[3, [9, 4]]
    assert partial.fingerprint(model) != before
    weight[3, [4, 9]] = weight[3, [9, 4]]
    weight.view(torch.int32)[7, 7] ^= 1
    assert partial.fingerprint(model) != before


# Killed, and shared: children of one process that has everything imported, one thread each

_CHILDREN = """
    import os, random, signal, sys, time, traceback
    from pathlib import Path
    import torch
    from safetensors.torch import save_file
    from tests.test_calibration import make, rows
    from trapetum.calibration import made_of
    from trapetum.quantizing import quantize_calibrated
    import transformers.models.llama.modeling_llama

    torch.set_num_threads(1)

    def work(method, file, partial=None, rank=None, store=None):
        if rank is not None:
            torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        model = make("llama", torch.bfloat16)
        report = quantize_calibrated(model, 3, method, made_of(rows()), progress=False, resume_dir=partial)
        errors = [*report.errors.values(), *report.output_errors.values()]
        tensors = model.state_dict() | {"errors": torch.tensor(errors, dtype=torch.float64)}
        save_file(tensors, file, metadata={"format": "pt"})
        if rank is not None:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()

    def child(*arguments):
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            work(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def wait(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def kill_often(method, folder, chance):
        part, kills = folder / "killed.partial", 0
        for stop in sorted(chance.sample(range(17 if method == "lnq-guided" else 14), 5)):
            pid = child(method, folder / "killed", part)
            while len(list(part.glob("*.safetensors"))) < stop:
                time.sleep(0.0005)
            time.sleep(chance.random() * 0.01)
            os.kill(pid, signal.SIGKILL)
            kills += wait(pid) == -signal.SIGKILL
        assert kills >= 4, kills
        assert wait(child(method, folder / "killed", part)) == 0

    def share(method, folder, name, partial=None):
        pids = [child(method, folder / f"{name}{rank}", partial, rank, folder / f"{name}.store") for rank in (0, 1)]
        assert [wait(pid) for pid in pids] == [0, 0]

    for method in sys.argv[2:]:
        folder = Path(sys.argv[1]) / method
        folder.mkdir()
        assert wait(child(method, folder / "alone")) == 0
        kill_often(method, folder, random.Random(7))
        share(method, folder, "rank")
        share(method, folder, "kept", folder / "two.partial")
        share(method, folder, "again", folder / "two.partial")
"""
METHODS_OF_CHILDREN = ("awq", "lnq-guided")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What children wrote: model and errors of a run alone, killed often, and shared by two processes."""
    folder = tmp_path_factory.mktemp("children")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_CHILDREN), str(folder), *METHODS_OF_CHILDREN],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("method", METHODS_OF_CHILDREN)
@pytest.mark.parametrize("name", ["killed", "rank0", "rank1", "kept0", "kept1", "again0", "again1"])
def test_killed_at_random_moments_or_shared_by_two_the_codes_are_the_same(made, method, name):
    expected, found = (load_file(made / method / file) for file in ("alone", name))
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


# From a name to a directory


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny model with a tokenizer, as a directory."""
    builtin = models.load("builtin")
    shape = models.shape_of(models.config_of(MODELS["llama-tiny"], vocab_size=4096), "tiny")
    model = models.random_model(shape, dtype=torch.float32, max_position_embeddings=64)
    return str(models.save(model, builtin.tokenizer, tmp_path_factory.mktemp("model") / "dense"))


TEXT = str(ROOT / "LICENSE")


def job(**options):
    return quantize_job.Job(**{"bits": 3, "method": "lnq-guided", "text": TEXT, "sequences": 3} | options)


def test_a_job_is_taken_up_and_leaves_nothing(dense, tmp_path, monkeypatch):
    out, said = tmp_path / "out", []
    put, count = Partial.put, [0]

    def stop(self, name, done):
        put(self, name, done)
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Partial, "put", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize_job.quantize_to(dense, out, job(), say=said.append, progress=False)
    monkeypatch.setattr(Partial, "put", put)
    assert not out.exists() and partial.finished(tmp_path / "out.partial") == 3 + 4
    with pytest.raises(PartialError, match="bits 3, now 4"):
        quantize_job.quantize_to(dense, out, job(bits=4), progress=False)
    report, folder = quantize_job.quantize_to(dense, out, job(), say=said.append, progress=False)
    assert folder == out and len(report.errors) == 14 and not (tmp_path / "out.partial").exists()
    assert said[-1] == f"going on from {tmp_path / 'out.partial'}: 7 results of an interrupted run are there"
    assert said[0] == f"calibration: 3 sequences of 64 tokens of {TEXT}, seed 0"
    quantize_job.quantize_to(dense, tmp_path / "once", job(), progress=False)
    assert_same(models.load(str(out)).model, models.load(str(tmp_path / "once")).model)


def test_a_job_starts_over_if_told_to(dense, tmp_path):
    out = tmp_path / "out"
    quantize_calibrated(
        make(), 4, "kmeans", made_of(rows()), progress=False, resume_dir=tmp_path / "out.partial"
    )
    with pytest.raises(PartialError, match="start over with --no-resume"):
        quantize_job.quantize_to(dense, out, job(), progress=False)
    quantize_job.quantize_to(dense, out, job(resume=False), progress=False)
    assert not (tmp_path / "out.partial").exists() and out.is_dir()


@pytest.mark.parametrize(
    "options", [{"method": "kmeans"}, {"method": "rotation"}, {"method": "kmeans", "outliers": 0.01}]
)
def test_jobs_without_a_text(dense, tmp_path, options):
    report, folder = quantize_job.quantize_to(
        dense, tmp_path / "out", job(text=None, **options), progress=False
    )
    assert len(report.errors) == 14 and not report.output_errors
    assert models.load(str(folder)).model.trapetum_method == options["method"]


def test_a_directory_of_something_else_is_refused_first(dense, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("dear diary")
    with pytest.raises(models.ModelError, match="is not a model that trapetum quantized"):
        quantize_job.quantize_to(dense, tmp_path / "out", job(), progress=False)
    assert not (tmp_path / "out.partial").exists()


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["kmeans-weighted", "awq", "lnq", "lnq-guided"])
def test_on_a_gpu_a_stopped_run_gives_the_same(tmp_path, method):
    tokens = made_of(rows())
    models_ = [make(dtype=torch.float16, device="cuda") for _ in range(3)]
    folder = tmp_path / "p"
    first = quantize_calibrated(models_[0], 4, method, tokens, progress=False)
    quantize_calibrated(models_[1], 4, method, tokens, progress=False, resume_dir=folder)
    for path in sorted(folder.glob("*proj.safetensors"))[::2]:
        path.unlink()
    quantize_calibrated(models_[2], 4, method, tokens, progress=False, resume_dir=folder)
    assert_same(models_[0], models_[1])
    assert_same(models_[0], models_[2])
    assert all(tensor.is_cuda for tensor in models_[2].state_dict().values())
    on_cpu = make(dtype=torch.float16)
    cpu = quantize_calibrated(on_cpu, 4, method, tokens, progress=False)
    assert first.mean_output_error == pytest.approx(cpu.mean_output_error, rel=0.1)


@pytest.mark.gpu
def test_memory_on_a_gpu_stays_below_the_estimate():
    shape = models.shape_of(
        models.config_of(MODELS["builtin"], hidden_size=1024, intermediate_size=2816), "wide"
    )
    model = models.random_model(shape, "cuda", torch.float16)
    tokens = made_of(torch.randint(shape.vocab, (16, 512)))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    quantize_calibrated(model, 4, "lnq-guided", tokens, progress=False)
    parts = memory.calibration_bytes(shape, 16 * 512, 512, 4)
    allowed = sum(size for part, size in parts.items() if part not in ("model", "token weights"))
    assert (
        torch.cuda.max_memory_allocated() - before < allowed + 2**29
    )  # and what a kernel's library reserves


@pytest.mark.gpu
def test_free_memory_counts_what_torch_holds_in_reserve():
    device = torch.device("cuda")
    before = quantizing._free_bytes(device)
    assert 0 < before <= torch.cuda.get_device_properties(device).total_memory
    del_me = torch.empty(2**30, dtype=torch.uint8, device=device)
    assert quantizing._free_bytes(device) == pytest.approx(before - 2**30, abs=2**27)
    del del_me
    assert quantizing._free_bytes(device) == pytest.approx(before, abs=2**27)


def test_blocks_are_the_models():
    """One sequence stage by stage gives the model's own logits."""
    model, tokens = make("qwen2"), rows()[0]
    blocks = Blocks(model)
    with torch.inference_mode():
        *_, last = blocks.through(blocks.embed(tokens))
        found = blocks.run(blocks.head, blocks.running(blocks.head), last)
        torch.testing.assert_close(found, model(tokens[None]).logits)
