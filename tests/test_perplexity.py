"""Perplexity and divergence agree with transformers' own loss, and say what they were taken over."""

import math

import pytest
import torch

from trapetum.paths import BUILTIN_MODEL, ROOT
from trapetum.perplexity import against, bootstrap_interval, divergence, perplexity, spans

VOCABULARY = 97
WIKITEXT = ROOT.parent / "shared" / "wikitext-2" / "test.txt"  # beside a clone, where there is one


@pytest.fixture(scope="module")
def builtin():
    from trapetum.models import load

    if not BUILTIN_MODEL.is_dir():
        pytest.skip("the built-in model is not in data/model")
    return load("builtin", dtype="fp32")


def read_tokens(loaded, text, count):
    return loaded.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0][:count]


def tiny_llama(seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_llama(0)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(VOCABULARY, (203,), generator=torch.Generator().manual_seed(1))


def loss_by_transformers(model, tokens, window, stride):
    """The loop of the transformers documentation: labels of -100 where a token was scored before."""
    total = count = previous = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        ids = tokens[None, begin:end]
        labels = ids.clone()
        labels[:, : previous - begin] = -100
        scored = int((labels[:, 1:] != -100).sum())
        if scored:
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=labels).loss) * scored
            count += scored
        previous = end
        if end == len(tokens):
            break
    return total / count, count


@pytest.mark.parametrize(
    ("window", "stride"), [(64, 64), (64, 16), (50, 49), (32, 1), (203, 203), (300, 300), (202, 202)]
)
def test_agrees_with_transformers(model, tokens, window, stride):
    found = perplexity(model, tokens, window, stride, batch=3)
    loss, count = loss_by_transformers(model, tokens, window, stride)
    assert math.log(found.value) == pytest.approx(loss, abs=1e-4)
    assert (found.tokens, found.window, found.stride) == (count, window, stride)
    assert sum(found.counts) == count and len(found.nll) == len(found.counts)


@pytest.mark.parametrize("stride", [512, 256])
def test_a_trained_model_agrees_with_transformers_on_a_text(builtin, stride):
    from trapetum.text import load_text

    ids = read_tokens(builtin, load_text("builtin", 8000), 1300)
    found = perplexity(builtin.model, ids, 512, stride)
    loss, count = loss_by_transformers(builtin.model, ids, 512, stride)
    assert math.log(found.value) == pytest.approx(loss, abs=1e-4) and found.tokens == count
    assert found.value < 60  # it has learned something, so that the comparison is of more than noise


@pytest.mark.skipif(not WIKITEXT.is_file(), reason="there is no WikiText-2 beside this clone")
def test_any_text_file_can_be_scored(builtin):
    from trapetum.text import load_text

    ids = read_tokens(builtin, load_text(str(WIKITEXT), 8000), 1300)
    found = perplexity(builtin.model, ids, 512, 512)
    loss, _ = loss_by_transformers(builtin.model, ids, 512, 512)
    assert math.log(found.value) == pytest.approx(loss, abs=1e-4)
    assert 100 < found.value < 1e5  # the built-in model knows Python's documentation, not an encyclopedia


def test_perplexity_and_divergence_in_one_pass_are_those_of_two(model, tokens):
    other = tiny_llama(1)
    scored, apart = against(model, other, tokens, 32, 20, batch=3)
    assert scored == perplexity(other, tokens, 32, 20, batch=3)
    assert apart == divergence(model, other, tokens, 32, 20, batch=3)
    assert apart.kl > 0 and scored.value != perplexity(model, tokens, 32, 20).value


def test_batch_size_does_not_matter(model, tokens):
    values = [perplexity(model, tokens, 32, 20, batch=batch).value for batch in (1, 4, None)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_each_token_is_scored_once_when_windows_overlap():
    for n, window, stride in [(100, 10, 3), (101, 10, 9), (2, 8, 4), (57, 16, 1)]:
        scored = [at for start, end, first in spans(n, window, stride) for at in range(first, end)]
        assert scored == list(range(1, n))
        assert all(end - start <= window for start, end, _ in spans(n, window, stride))


def test_max_tokens_cuts_the_text(model, tokens):
    assert perplexity(model, tokens, 32, 32, max_tokens=70) == perplexity(model, tokens[:70], 32, 32)


def test_interval_holds_the_value_and_narrows_with_text(model):
    long = torch.randint(VOCABULARY, (4000,), generator=torch.Generator().manual_seed(2))
    narrow, wide = perplexity(model, long, 40, 40), perplexity(model, long[:400], 40, 40)
    for found in (narrow, wide):
        assert found.interval[0] < found.value < found.interval[1]
    assert narrow.interval[1] - narrow.interval[0] < wide.interval[1] - wide.interval[0]


def test_interval_covers_the_truth_about_as_often_as_it_says():
    import numpy as np

    generator, hits = np.random.default_rng(0), 0
    for trial in range(200):
        nll = generator.normal(2.0, 0.5, 60) * 10
        low, high = bootstrap_interval(nll, np.full(60, 10), n_boot=300, seed=trial)
        hits += low <= math.exp(2.0) <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(tokens):
    model = tiny_llama(3)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, tokens, 64, 64).value == pytest.approx(VOCABULARY, rel=1e-5)


def test_divergence_against_the_definition(model, tokens):
    other = tiny_llama(1)
    found = divergence(model, other, tokens, window=203, stride=203)
    with torch.no_grad():
        p, q = (m(input_ids=tokens[None]).logits[0, :-1].double().log_softmax(-1) for m in (model, other))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(float(expected), abs=1e-4)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.tokens == 202


def test_divergence_from_itself_is_zero(model, tokens):
    found = divergence(model, model, tokens, window=32, stride=16)
    assert found.kl == pytest.approx(0, abs=1e-7) and found.agreement == 1.0
    assert found.tokens == perplexity(model, tokens, 32, 16).tokens


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"window": 1, "stride": 1}, "window 1"),
        ({"window": 8, "stride": 9}, "stride 9"),
        ({"window": 8, "stride": 0}, "stride 0"),
        ({"max_tokens": 1}, "1 tokens"),
    ],
)
def test_refuses_what_does_not_fit(model, tokens, arguments, words):
    with pytest.raises(ValueError, match=words):
        perplexity(model, tokens, **arguments)


def test_refuses_tokens_of_another_tokenizer(model):
    with pytest.raises(ValueError, match="0 to 96"):
        perplexity(model, [1, 2, 97], 8, 8)
    other = tiny_llama(0)
    other.config.vocab_size = 50
    with pytest.raises(ValueError, match="97 and 50"):
        divergence(model, other, [1, 2, 3])
