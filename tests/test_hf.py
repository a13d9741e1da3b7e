"""`import trapetum` is enough for transformers to read a quantized directory, and costs no torch import."""

import subprocess
import sys

import pytest
import torch

import trapetum
from trapetum import models, swap
from trapetum.hf import TrapetumConfig
from trapetum.linear import CodebookLinear

READ = """
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained({folder!r})
assert type(model.model.layers[0].mlp.up_proj).__name__ == "CodebookLinear"
print(model(torch.tensor([[5, 9, 200]])).logits[0, -1, :8].tolist())
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = models.load("random:llama-tiny", dtype=torch.float32).model
    models.quantize_model(model, bits=4, progress=False)
    return models.save(model, None, tmp_path_factory.mktemp("quantized") / "model")


def logits(model):
    with torch.inference_mode():
        return model(torch.tensor([[5, 9, 200]])).logits


def test_importing_trapetum_imports_neither_torch_nor_transformers():
    out = run(
        "import sys, trapetum; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_trapetum_load_is_models_load(folder):
    loaded = trapetum.load(str(folder), dtype="bf16")
    assert loaded.kind == "directory" and loaded.model.dtype == torch.bfloat16
    assert loaded.model.hf_quantizer.quantization_config.method == "kmeans"


@pytest.mark.parametrize(
    "imports",
    [
        "import trapetum",
        "import transformers, trapetum",
        "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained; import trapetum, trapetum",
        "import trapetum.hf",
    ],
)
def test_auto_model_reads_the_directory(folder, imports):
    printed = run(imports + READ.format(folder=str(folder)))
    expected = logits(models.load(str(folder)).model)[0, -1, :8].tolist()
    assert printed.strip() == str(expected)


def test_16_bit_activations_leave_codebooks_as_they_are(folder):
    from transformers import AutoModelForCausalLM

    exact = models.load(str(folder)).model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for (_, layer), (_, other) in zip(swap.codebook_layers(model), swap.codebook_layers(exact), strict=True):
        assert layer.codebook.dtype == torch.float16 and torch.equal(layer.codebook, other.codebook)
    assert model.lm_head.weight.dtype == torch.bfloat16
    error = (logits(model).float() - logits(exact)).norm() / logits(exact).norm()
    assert error < 0.03


def test_save_pretrained_of_transformers_round_trips(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(model)
    model.model.layers[0].mlp.up_proj.prepare()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert isinstance(again.model.layers[0].mlp.up_proj, CodebookLinear)
    assert torch.equal(logits(again), before)


def test_dequantize_gives_the_dense_twin(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(model)
    dense = model.dequantize()
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear
    torch.testing.assert_close(logits(dense), before, rtol=1e-5, atol=1e-5)


def test_generate_of_transformers_runs_on_codes(folder):
    model = models.load(str(folder)).model
    prompt = torch.tensor([[5, 9, 200]])
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    out = model.generate(prompt, **options)[0].tolist()
    twin = models.dequantize_model(models.load(str(folder)).model)
    assert out == twin.generate(prompt, **options)[0].tolist()


def test_config_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="group_size"):
        TrapetumConfig(bits=4, group_size=128)
    config = TrapetumConfig(bits=4, exceptions={"lm_head": [8, 256]})
    assert config.scheme("lm_head") == (8, 256) and config.scheme("model.layers.0.mlp.up_proj") == (4, 16)
