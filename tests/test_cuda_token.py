"""The tail of a decode step: its plain Python twin anywhere, the kernel against the twin on a GPU."""

import math

import numpy as np
import pytest
import torch

from trapetum import build, cuda_token
from trapetum.cuda_token import State, reference_next_token

gpu = pytest.mark.gpu
HALF = (torch.float16, torch.bfloat16)
VOCABULARIES = (1, 7, 257, 32000, 32001, 128256)


# --- compilation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90"])
def test_compiles_without_spills(arch):
    pytest.importorskip("cuda.bindings.nvrtc")
    cases = [(dtype, rows, 3) for dtype in HALF for rows in (1, 4)] + [(torch.float16, 8, 7), (HALF[0], 2, 1)]
    for case in cases:
        resources = build.compile_cuda(cuda_token.SOURCE, arch, cuda_token.defines(*case)).resources()
        assert set(resources) == {"next_token", "embed"}
        for name, used in resources.items():
            assert used.spill_bytes == 0, f"{name} {case} on {arch} spills {used.spill_bytes} bytes"
            assert 0 < used.registers <= 64


# --- state ---------------------------------------------------------------------------------------------------------


def made_state(prompt, token, max_context=64, rows=1, limit=None, device="cpu"):
    state = State.make(max_context, rows, device, limit)
    state.reset(prompt, token)
    return state


def test_reset_move_and_copy():
    state = made_state([5, 6, 7], torch.tensor(9), rows=3)
    assert state.tokens.tolist() == [9, 9, 9] and state.position.item() == 3 and state.limit == 61
    assert state.history[:5].tolist() == [5, 6, 7, 9, 0] and len(state.history) == 64 + 3 + 1
    assert state.generated() == [9]
    other = state.copy()
    other.move(20)
    assert (other.position.item(), other.history[20].item(), other.generated()) == (20, 9, [9])
    assert state.position.item() == 3 and state.history[20].item() == 0
    state.made.fill_(3), state.keys.fill_(1), state.counter.fill_(1)
    state.reset(torch.tensor([[1, 2]]), 4)
    assert not any(t.any() for t in (state.made, state.keys, state.counter)) and state.generated() == [4]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: State.make(16, 9, "cpu"), "1 to 8 tokens, not 9"),
        (lambda: State.make(2, 3, "cpu"), "context of 2 slots with 3 rows and limit -1"),
        (lambda: State.make(16, 1, "cpu", limit=16), "limit 16 is not possible"),
        (lambda: made_state(range(16), 0, 16), "prompt has 16 tokens, .* may not pass 15"),
        (lambda: made_state([1], 0, 16).move(16), "position 16 is not one of 0 to 15"),
        (lambda: made_state([1], 0).sample(-1.0), "temperature must be 0 or at least"),
        (lambda: made_state([1], 0).sample(1e-9), "temperature must be 0 or at least"),
        (lambda: made_state([1], 0).sample(math.nan), "temperature must be 0 or at least"),
        (lambda: made_state([1], 0, rows=2).sample(1.0), "cannot sample at temperature 1.0; take rows=1"),
    ],
)
def test_what_is_not_possible_is_said(act, words):
    with pytest.raises(ValueError, match=words):
        act()


def operands(vocab, hidden=8, rows=1, dtype=torch.float16, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(vocab, hidden, generator=generator).to(dtype).to(device)
    return embedding, torch.full((rows, hidden), math.nan, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits": torch.zeros(1, 9)}, "logits must be a contiguous torch.float16"),
        ({"logits": torch.zeros(2, 9).half()}, r"logits must be .* \[1, 9\]"),
        ({"logits": torch.zeros(1, 11).half()}, "logits of 11 tokens do not fit an embedding of 10"),
        ({"x": torch.zeros(1, 7).half()}, r"x must be .* \[1, 8\]"),
        ({"embedding": torch.zeros(10, 8)}, "embedding must be a non-empty float16"),
        ({"ngram": 0}, "1 to 7 tokens, not 0"),
    ],
)
@pytest.mark.parametrize("function", [reference_next_token, cuda_token.next_token])
def test_operands_that_do_not_fit_are_named(function, change, words):
    embedding, x = operands(10)
    given = {"logits": torch.zeros(1, 9).half(), "state": made_state([1], 0), "embedding": embedding, "x": x}
    with pytest.raises(ValueError, match=words):
        function(**(given | change))


# --- the twin: one row ---------------------------------------------------------------------------------------------


def logits_for(choices, vocab, dtype=torch.float16):
    """Logits whose arg max by row is `choices`."""
    logits = torch.zeros(len(choices), vocab, dtype=dtype)
    logits[torch.arange(len(choices)), torch.tensor(choices)] = 1
    return logits


def test_a_greedy_step():
    embedding, x = operands(10)
    state = made_state([1, 2], 3)
    for token in (4, 9, 0):
        reference_next_token(logits_for([token], 10), state, embedding, x)
        assert state.tokens.tolist() == [token] and torch.equal(x[0], embedding[token])
    assert state.position.item() == 5 and state.made.item() == 3
    assert state.generated() == [3, 4, 9, 0] and state.history[:6].tolist() == [1, 2, 3, 4, 9, 0]


def test_at_the_limit_the_step_repeats_itself():
    embedding, x = operands(10)
    state = made_state([1, 2], 3, max_context=4)
    for token in (4, 5, 5, 5):
        reference_next_token(logits_for([token], 10), state, embedding, x)
    assert state.position.item() == 3 and state.tokens.item() == 4 and torch.equal(x[0], embedding[4])
    assert state.generated() == [3, 4, 5] and state.history.tolist() == [1, 2, 3, 4, 5, 0]


SPECIAL = {
    "ties": ([2.0, 7.0, 7.0, -1.0], 1),
    "signed zeros": ([-1.0, -0.0, 0.0, -0.0], 1),
    "all minus infinity": ([-math.inf] * 4, 0),
    "infinity": ([1.0, math.inf, math.inf, 5.0], 1),
    "a NaN": ([1.0, math.inf, math.nan, math.nan], 2),
    "negative": ([-3.0, -2.0, -2.5, -2.0], 1),
}


@pytest.mark.parametrize(("values", "winner"), SPECIAL.values(), ids=SPECIAL)
def test_special_values_as_torch_argmax(values, winner):
    embedding, x = operands(4)
    state = made_state([1], 0)
    logits = torch.tensor([values]).half()
    reference_next_token(logits, state, embedding, x)
    assert state.tokens.item() == winner == logits.float().argmax().item()


# --- the twin: verification and drafts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "ngram", "place"),
    [
        ([1], 3, None),
        ([1, 2, 3], 3, None),
        ([1, 2, 3, 1], 3, 0),
        ([5, 1, 2, 6, 1, 2, 7, 8, 1, 2], 3, 5),  # of equals the latest
        ([5, 1, 2, 6, 1, 2, 5, 1, 2], 3, 2),  # the longest before the latest
        ([5, 1, 2, 6, 1, 2, 5, 1, 2], 2, 5),  # unless it is longer than asked for
        ([4, 4, 4], 3, 1),
        ([2, 3, 9, 1, 2, 3], 3, 1),  # the match may be cut off by the beginning
    ],
)
def test_find_match(history, ngram, place):
    assert cuda_token.find_match(history, ngram) == place


def test_drafts_go_on_with_the_copy_at_the_end():
    assert cuda_token.draft([7, 1, 2, 3, 9, 7, 1], 3) == [2, 3, 9]
    assert cuda_token.draft([1, 2, 1], 5) == [2, 1, 2, 1, 2]
    assert cuda_token.draft([8, 8], 3) == [8, 8, 8]
    assert cuda_token.draft([1, 2, 3], 2) == [3, 3]


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_as_many_drafts_are_accepted_as_are_right_in_a_row(right):
    embedding, x = operands(20, rows=4)
    state = made_state([1, 2], 3, rows=4)
    state.tokens.copy_(torch.tensor([3, 10, 11, 12]))
    choices = [10, 11, 12, 13]
    if right < 3:
        choices[right] = 19
    reference_next_token(logits_for(choices, 20), state, embedding, x)
    assert state.generated() == [3, *choices[: right + 1]]
    assert state.position.item() == 3 + right and state.made.item() == right + 1
    assert state.tokens[0].item() == choices[right] and torch.equal(x, embedding[state.tokens])


def rule(history, vocab):
    """A model that repeats itself: what follows depends on the last two tokens."""
    return (history[-1] * 3 + history[-2] + 1) % vocab


def rule_logits(history, drafts, vocab):
    """Its logits for tokens fed after `history`, which ends in the certain one."""
    return logits_for([rule([*history, *drafts[:r]], vocab) for r in range(len(drafts) + 1)], vocab)


@pytest.mark.parametrize("ngram", [1, 2, 3])
@pytest.mark.parametrize("rows", range(1, 9))
def test_speculation_makes_the_tokens_of_decoding_one_by_one(rows, ngram):
    vocab, wanted = 5, 60
    expected = [1, 2, 3]
    while len(expected) < 3 + wanted:
        expected.append(rule(expected, vocab))
    embedding, x = operands(vocab, rows=rows)
    state, steps = made_state([1, 2], 3, 128, rows), 0
    while state.made.item() < wanted:
        known = state.history[: state.position.item() + 1].tolist()
        logits = rule_logits(known, state.tokens[1:].tolist(), vocab)
        reference_next_token(logits, state, embedding, x, ngram)
        steps += 1
    assert [1, 2, *state.generated()][: len(expected)] == expected
    assert steps == wanted if rows == 1 else steps <= wanted
    assert steps < wanted or rows == 1 or ngram == 1  # one token does not tell what follows here


@pytest.mark.parametrize("limit", [5, 8, None])
def test_several_rows_stop_at_the_limit(limit):
    """Everything is accepted in a cycle of one token, so the position jumps past the limit."""
    embedding, x = operands(6, rows=4)
    state = made_state([4, 4], 4, max_context=9, rows=4, limit=limit)
    last = state.limit
    state.history[last + 2 :] = -7
    for _ in range(6):
        reference_next_token(logits_for([4] * 4, 6), state, embedding, x)
        assert state.position.item() <= last
    assert state.position.item() == last and (state.history[last + 2 :] == -7).all()
    assert state.history[: last + 2].tolist() == [4] * (last + 2) and state.generated() == [4] * (
        last + 2 - 2
    )


# --- the twin: sampling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers that its authors publish with Random123
        ("00000000 00000000 00000000 00000000", "0000000000000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffffffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "299f31d0a4093822", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = np.array([int(w, 16) for w in counter.split()], np.uint32)
    assert cuda_token.philox(words, int(key, 16)).tolist() == [int(w, 16) for w in expected.split()]
    both = cuda_token.philox(np.stack([words, words]), int(key, 16) - 2**64)  # int64 holds the same bits
    assert both.shape == (2, 4) and (both[0] == both[1]).all() and both[1, 0] == int(expected[:8], 16)


def test_gumbel_noise_has_its_mean_and_variance():
    noise = cuda_token.gumbel(200_000, 3, 11)
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - math.pi**2 / 6) < 0.03
    assert np.isfinite(noise).all()


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_softmax(temperature):
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -2.0])
    draws = [cuda_token.scores(logits, p, temperature, 5).argmax().item() for p in range(6000)]
    counts = np.bincount(draws, minlength=6)
    probabilities = torch.softmax(logits.double() / temperature, 0).numpy()
    assert chi_square(counts, probabilities) < 20.5  # 5 degrees of freedom: 1 in 1000
    assert chi_square(counts, np.full(6, 1 / 6)) > 100


def test_a_sample_depends_on_seed_and_position_alone():
    embedding, x = operands(50)
    logits, taken = torch.zeros(1, 50).half(), {}
    for seed in (0, 1, -1):
        for again in range(2):
            state = made_state([1, 2, 3], 4)
            state.sample(1.0, seed)
            for _ in range(10):
                reference_next_token(logits, state, embedding, x)
            taken[seed, again] = state.generated()
        assert taken[seed, 0] == taken[seed, 1]
    assert len({tuple(tokens) for tokens in taken.values()}) == 3


# --- the kernel against the twin -----------------------------------------------------------------------------------


def clones(state, *tensors):
    """A CPU copy of state and tensors, for the twin."""
    return state.copy("cpu"), *(t.cpu() for t in tensors)


def assert_same(state, x, expected, expected_x):
    for name in ("tokens", "position", "history", "made"):
        assert torch.equal(getattr(state, name).cpu(), getattr(expected, name)), name
    assert not state.keys.any() and not state.counter.any()
    assert torch.equal(x.cpu(), expected_x)


def step_both(logits, state, embedding, x, ngram=3):
    x.fill_(math.nan)
    twin, host_logits, host_embedding, host_x = clones(state, logits, embedding, x)
    reference_next_token(host_logits, twin, host_embedding, host_x, ngram)
    cuda_token.next_token(logits, state, embedding, x, ngram=ngram)
    assert_same(state, x, twin, host_x)


@gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_greedy_matches_the_twin(vocab, dtype):
    embedding, x = operands(vocab, 64, dtype=dtype, device="cuda")
    state = made_state([0, 0], 0, device="cuda")
    state.history[5:] = -5  # what a step must not touch is seen to be untouched
    for seed in range(5):
        logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()
        step_both(logits, state, embedding, x)
        step_both((logits * 4).round() / 4, state, embedding, x)  # many ties


@gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("vocab", VOCABULARIES[2:])
def test_the_winner_may_be_anywhere(vocab, dtype):
    embedding, x = operands(vocab, 64, dtype=dtype, device="cuda")
    state = made_state([0], 0, 1024, device="cuda")
    places = {0, 1, 7, 8, 255, 256, vocab // 2, vocab - 9, vocab - 2, vocab - 1} | {
        min(2047 + k, vocab - 1) for k in range(3)
    }
    for place in sorted(places):
        for fill, value in (
            (0.0, 1.0),
            (-math.inf, -5.0),
            (-3.0, math.inf),
            (math.inf, math.nan),
            (-1.0, -0.0),
        ):
            logits = torch.full((1, vocab), fill, dtype=dtype, device="cuda")
            logits[0, place] = value
            step_both(logits, state, embedding, x)
            assert state.tokens.item() == place
            logits[0, place:] = value  # the lowest of equals
            step_both(logits, state, embedding, x)
            assert state.tokens.item() == place


@gpu
@pytest.mark.parametrize("fill", [-math.inf, math.nan, 0.0, -0.0, math.inf])
@pytest.mark.parametrize("rows", [1, 5])
def test_equal_logits_give_the_first_token(fill, rows):
    embedding, x = operands(32000, 64, rows, device="cuda")
    state = made_state([3], 3, rows=rows, device="cuda")
    logits = torch.full((rows, 32000), fill, dtype=torch.float16, device="cuda")
    for _ in range(4):
        step_both(logits, state, embedding, x)
        assert state.tokens[0].item() == 0


@gpu
@pytest.mark.parametrize("hidden", [1, 64, 100, 2048, 4096, 8192])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_embedding_rows_of_any_width(hidden, rows):
    embedding, x = operands(300, hidden, rows, device="cuda")
    state = made_state([1, 2, 1], 2, rows=rows, device="cuda")
    x.fill_(math.nan)
    cuda_token.embed(state, embedding, x)
    assert torch.equal(x, embedding[state.tokens])
    for seed in range(4):
        logits = torch.randn(rows, 300, generator=torch.Generator().manual_seed(seed)).half().cuda()
        step_both(logits, state, embedding, x)


@gpu
@pytest.mark.parametrize("offset", [1, 3])
def test_tensors_that_start_between_16_bytes(offset):
    embedding, _ = operands(1001, 64, 2, device="cuda")
    state = made_state([1, 2, 1], 2, rows=2, device="cuda")
    room = torch.full((3, 4096), math.nan, dtype=torch.float16, device="cuda")
    x = room[0, offset : offset + 128].view(2, 64)
    logits = room[1:].view(-1)[offset : offset + 2002].view(2, 1001)
    for seed in range(4):
        logits.copy_(torch.randn(2, 1001, generator=torch.Generator().manual_seed(seed)))
        step_both(logits, state, embedding, x)
    assert room[0, :offset].isnan().all() and room[0, offset + 128 :].isnan().all()


def near_ones(state, vocab, generator, dtype):
    """Logits that accept a random number of the drafts."""
    rows = state.rows
    logits = torch.randn(rows, vocab, generator=generator).to(dtype)
    right = int(torch.randint(rows + 1, (1,), generator=generator))
    for r, token in enumerate(state.tokens[1:].tolist()[:right]):
        logits[r, token] = 30
    if right < rows:  # a token that was seen before, so that drafts are found
        seen = state.history[: int(state.position) + 1].tolist()
        logits[right, seen[int(torch.randint(len(seen), (1,), generator=generator))]] = 30
    return logits.cuda()


@gpu
@pytest.mark.parametrize("ngram", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", range(2, 9))
def test_verification_and_drafts_match_the_twin(rows, ngram):
    vocab, generator = 257, torch.Generator().manual_seed(rows)
    embedding, x = operands(vocab, 64, rows, device="cuda")
    state = made_state(torch.randint(6, (40,), generator=generator), 3, 400, rows, device="cuda")
    state.history[state.limit + 2 :] = -5
    for _ in range(60):
        step_both(near_ones(state, vocab, generator, torch.float16), state, embedding, x, ngram)


@gpu
@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("vocab", [32000, 128256])
def test_whole_vocabularies_with_several_rows(vocab, rows):
    generator = torch.Generator().manual_seed(1)
    embedding, x = operands(vocab, 64, rows, torch.bfloat16, "cuda")
    state = made_state(torch.randint(vocab, (20,), generator=generator), 3, 200, rows, device="cuda")
    for _ in range(10):
        step_both(near_ones(state, vocab, generator, torch.bfloat16), state, embedding, x)


@gpu
@pytest.mark.parametrize("at", [2, 3, 4, 50, 4093, 16380, 16384, 70001, 131070 - 9])
def test_a_match_anywhere_in_a_long_history_is_found(at):
    """Tokens that occur once, so that the only match is the one planted; a shorter and later one must not win."""
    length, rows = 131072, 4
    embedding, x = operands(200_000, 8, rows, device="cuda")
    prompt = torch.arange(length - 8, dtype=torch.int32)
    prompt[-1] = at - 2
    if at + 6 < length - 8:
        prompt[-4] = at
    state = made_state(prompt, at - 1, length, rows, device="cuda")
    logits = logits_for([at, 9, 9, 9], 200_000).cuda()
    step_both(logits, state, embedding, x)
    assert state.tokens[0].item() == at
    if at + 20 < length:
        assert state.tokens.tolist() == [at, *prompt[at + 1 : at + 4].tolist()]


@gpu
@pytest.mark.parametrize("kind", ["none", "all"])
def test_no_match_and_matches_everywhere(kind):
    length, rows = 40_000, 8
    embedding, x = operands(60_000, 8, rows, device="cuda")
    prompt = torch.arange(length - 50) if kind == "none" else torch.full((length - 50,), 5)
    state = made_state(prompt, 5, length, rows, device="cuda")
    step_both(logits_for([59_999 if kind == "none" else 5] * 8, 60_000).cuda(), state, embedding, x)
    assert state.tokens.tolist() == [59_999 if kind == "none" else 5] * 8


@gpu
@pytest.mark.parametrize("rows", [1, 4])
def test_limits_and_poisoned_tokens(rows):
    embedding, x = operands(257, 64, rows, device="cuda")
    state = made_state([1, 2, 3], 4, 12, rows, limit=11, device="cuda")
    state.history[4:] = 1_000_000_000
    generator = torch.Generator().manual_seed(2)
    for _ in range(12):
        step_both(torch.randn(rows, 257, generator=generator).half().cuda(), state, embedding, x)
    assert state.position.item() == 11 and (state.history[13:] == 1_000_000_000).all()
    state.history[:11] = -3
    state.history[6] = state.tokens[0]  # a match that poison follows
    step_both(torch.randn(rows, 257, generator=generator).half().cuda(), state, embedding, x)


@gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_graph_replays_make_the_tokens_of_single_steps(rows, pdl):
    """A model in the graph: logits are a product with x, so every token depends on the one before."""
    vocab, hidden, steps, a_graph = 1000, 64, 120, 3
    embedding, x = operands(vocab, hidden, rows, device="cuda")
    head = torch.randn(hidden, vocab, generator=torch.Generator().manual_seed(3)).half().cuda()
    logits = torch.empty(rows, vocab, dtype=torch.float16, device="cuda")
    state = made_state([1, 2], 3, 2000, rows, device="cuda")

    def step():
        torch.mm(x, head, out=logits)
        cuda_token.next_token(logits, state, embedding, x, pdl)

    def start():
        state.reset([1, 2], 3)
        cuda_token.embed(state, embedding, x)

    start()
    for _ in range(steps):
        step()
    expected = state.copy("cpu")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(a_graph):
            step()
    for _ in range(2):
        start()
        for _ in range(steps // a_graph):
            graph.replay()
        for name in ("tokens", "position", "history", "made"):
            wanted, got = getattr(expected, name), getattr(state, name).cpu()
            upto = int(expected.position) + 1 if name == "history" else len(wanted)
            assert torch.equal(got[:upto], wanted[:upto]), name
    assert int(state.made) >= steps


@gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("vocab", [7, 257, 32000, 128256])
def test_samples_are_the_best_scores_of_the_twin(vocab, dtype):
    """float32 may take the other of two scores that differ by rounding, and no other."""
    embedding, x = operands(vocab, 64, dtype=dtype, device="cuda")
    state, same = made_state([0], 0, 256, device="cuda"), 0
    for step in range(40):
        temperature, seed = (0.3, 1.0, 2.5)[step % 3], step * 7_777_777_777_777 - 5
        state.sample(temperature, seed)
        logits = (3 * torch.randn(1, vocab, generator=torch.Generator().manual_seed(step))).to(dtype)
        logits[0, vocab // 2 :: 3] = -math.inf
        wide = cuda_token.scores(logits[0], int(state.position), temperature, seed)
        cuda_token.next_token(logits.cuda(), state, embedding, x)
        token = state.tokens.item()
        assert wide[token] >= wide.max() - 1e-4
        assert torch.equal(x[0], embedding[token]) and state.history[int(state.position)].item() == token
        same += token == wide.argmax().item()
    assert same >= 39


@gpu
def test_sampled_frequencies_in_one_graph_with_a_new_seed_and_temperature():
    vocab, draws = 6, 6000
    row = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -2.0])
    logits, (embedding, x) = row.half()[None].cuda(), operands(vocab, 64, device="cuda")
    state = made_state([0], 0, draws + 10, device="cuda")
    cuda_token.next_token(logits, state, embedding, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(100):
            cuda_token.next_token(logits, state, embedding, x)
    taken = []
    for temperature, seed in ((1.0, 1), (2.0, 1), (1.0, 2), (1.0, 1), (0.0, 1)):
        state.reset([0], 0)
        state.sample(temperature, seed)
        for _ in range(draws // 100):
            graph.replay()
        taken.append(state.generated()[1:])
        if temperature:
            probabilities = torch.softmax(row.double() / temperature, 0).numpy()
            assert chi_square(np.bincount(taken[-1], minlength=6), probabilities) < 20.5
    assert taken[0] == taken[3] != taken[2] and set(taken[4]) == {3} and len(taken[0]) == draws


@gpu
def test_a_logit_of_minus_infinity_is_never_sampled():
    embedding, x = operands(1000, 64, device="cuda")
    state = made_state([0], 0, 300, device="cuda")
    state.sample(5.0, 3)
    logits = torch.full((1, 1000), -math.inf, dtype=torch.float16, device="cuda")
    logits[0, [17, 900]] = 0
    for _ in range(200):
        cuda_token.next_token(logits, state, embedding, x)
    assert set(state.generated()[1:]) == {17, 900}
