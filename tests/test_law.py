"""The law: known values of each formula, and a fit that finds the parameters that made the data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trapetum import hardware, law

SIZES = [2e6, 8e6, 2.2e7, 4.5e7, 9e7, 1.17e8]


def made(t0_us, bandwidth_gbps, sizes=SIZES):
    return [t0_us + law.floor_us(size, bandwidth_gbps) for size in sizes]


def test_codebook_bytes_at_known_sizes():
    assert law.codebook_bytes(4096, 4096, 4) == 4096 * 4096 // 2 + 4096 * 16 * 2
    assert law.codebook_bytes(4096, 4096, 8, 64) == 4096 * 4096 + 4096 * 64 * 2
    assert law.codebook_bytes(5, 3, 3) == 3 * (2 + 8 * 2)
    assert law.bits_per_weight(4096, 4096, 4) == 4.0625
    assert law.bits_per_weight(11008, 4096, 4) == pytest.approx(4.0233, abs=1e-4)


@settings(deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([2, 3, 4, 8]))
def test_bits_per_weight_is_the_bits_and_the_overhead(in_features, out_features, bits):
    overhead = law.bits_per_weight(in_features, out_features, bits) - bits - 16 * 2**bits / in_features
    assert -1e-9 <= overhead < 8 / in_features


def test_codebook_sizes_agree_with_the_model_shapes():
    from trapetum import shapes

    for bits in (2, 3, 4, 8):
        assert law.codebook_bytes(1000, 77, bits) == shapes.matrix_bytes(1000, 77, f"codebook-{bits}")


@pytest.mark.parametrize(
    ("method", "weight_bytes"),
    [
        ("fp16", 2 * 3072 * 768),
        ("linear-fp16", 2 * 3072 * 768),
        ("mv-fp16", 2 * 3072 * 768),
        ("linear-fp32", 4 * 3072 * 768),
        ("int8", 3072 * 768),
        (4, 3072 * 768 // 2 + 768 * 32),
        ("codebook-4", 3072 * 768 // 2 + 768 * 32),
    ],
)
def test_gemv_bytes_add_input_and_output(method, weight_bytes):
    assert law.gemv_bytes(3072, 768, method) == weight_bytes + 2 * (3072 + 768)
    assert law.gemv_bytes(3072, 768, method, activation_bytes=4) == weight_bytes + 4 * (3072 + 768)


def test_the_floor_of_a_4096_square_on_an_h100_is_ten_microseconds():
    moved = law.gemv_bytes(4096, 4096, "fp16")
    assert law.floor_us(moved, 3350) == pytest.approx(10.02, abs=0.01)
    assert law.gbps(moved, law.floor_us(moved, 3350)) == pytest.approx(3350)
    assert law.mbu(moved, 2 * law.floor_us(moved, 3350), 3350) == pytest.approx(0.5)


def test_roofline_meets_itself_at_the_ridge():
    peak, bandwidth = 989.4e12, 3.35e12
    corner = law.ridge(peak, bandwidth)
    assert corner == pytest.approx(295.3, abs=0.1)
    assert law.roofline(corner, peak, bandwidth) == pytest.approx(peak)
    assert law.roofline(1, peak, bandwidth) == bandwidth
    assert law.roofline(10 * corner, peak, bandwidth) == peak


def test_intensity_of_a_batch_one_gemv_is_about_one():
    moved = law.gemv_bytes(4096, 4096, "fp16")
    assert law.arithmetic_intensity(2 * 4096 * 4096, moved) == pytest.approx(1, rel=1e-3)


@settings(deadline=None, max_examples=50)
@given(st.floats(0.1, 50), st.floats(5, 8000))
def test_fit_recovers_what_made_the_data(t0_us, bandwidth_gbps):
    found = law.fit(SIZES, made(t0_us, bandwidth_gbps), n_boot=50)
    assert found.t0_us == pytest.approx(t0_us, rel=1e-6, abs=1e-6)
    assert found.bandwidth_gbps == pytest.approx(bandwidth_gbps, rel=1e-6)
    assert found.residual_us < 1e-6 * found.predict(max(SIZES)) and found.n == len(SIZES)
    assert found.predict(1e7) == pytest.approx(t0_us + law.floor_us(1e7, bandwidth_gbps))


def test_fit_weighs_relative_errors():
    times = made(2, 3000)
    times[-1] *= 1.10  # 4 us on the largest shape must not move the small ones by microseconds
    found = law.fit(SIZES, times, n_boot=10)
    plain = np.polyfit(SIZES, times, 1)[1]
    assert abs(found.t0_us - 2) < 0.5 * abs(plain - 2)
    assert found.residual_us == pytest.approx(
        max(abs(found.predict(s) - t) for s, t in zip(SIZES, times, strict=True))
    )


def test_intervals_hold_the_truth_about_as_often_as_they_claim():
    rng = np.random.default_rng(1)
    sizes = np.linspace(2e6, 1.2e8, 13)
    hits = 0
    for trial in range(100):
        times = (3 + sizes / 2.5e6) * rng.normal(1, 0.03, len(sizes))
        low, high = law.fit(sizes, times, n_boot=200, seed=trial).bandwidth_interval
        hits += low <= 2500 <= high
    assert 80 <= hits <= 99


def test_intervals_grow_with_the_noise_and_repeat_with_the_seed():
    rng = np.random.default_rng(0)
    quiet, loud = (
        [(t * rng.normal(1, noise, 15)).tolist() for t in made(3, 2500)] for noise in (0.001, 0.05)
    )
    fits = [law.fit(SIZES, [float(np.median(x)) for x in samples], samples) for samples in (quiet, loud)]
    widths = [high - low for low, high in (f.bandwidth_interval for f in fits)]
    assert widths[1] > 5 * widths[0]
    again = law.fit(SIZES, [float(np.median(x)) for x in quiet], quiet)
    assert again == fits[0]
    assert fits[0].t0_interval[0] <= fits[0].t0_us <= fits[0].t0_interval[1]


def test_leave_one_out_predicts_points_on_the_line_and_shows_the_one_off_it():
    times = made(3, 2500)
    times[2] *= 2
    pairs = law.leave_one_out(SIZES, times)
    assert [measured for measured, _ in pairs] == times
    off = [abs(predicted / measured - 1) for measured, predicted in pairs]
    assert off[2] == pytest.approx(0.5, abs=1e-6)
    assert law.leave_one_out(SIZES, made(3, 2500))[0][1] == pytest.approx(made(3, 2500)[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: law.fit([1e6], [1.0]), "two different sizes; got 1"),
        (lambda: law.fit([1e6, 1e6], [1.0, 2.0]), "two different sizes; got 1"),
        (lambda: law.fit([1e6, 2e6], [1.0]), r"each size needs one time: got shapes \(2,\) and \(1,\)"),
        (lambda: law.fit([1e6, 2e6], [1.0, float("nan")]), "point 1 is 2000000.0 bytes in nan us"),
        (lambda: law.fit([1e6, 2e6], [0.0, 1.0]), "point 0 is"),
        (lambda: law.fit([1e6, 2e6], [2.0, 1.0]), "the times do not grow with the bytes"),
        (
            lambda: law.fit([1e6, 2e6], [1.0, 2.0], [[1.0], []]),
            "each of the 2 points needs at least one sample",
        ),
        (lambda: law.leave_one_out([1e6, 2e6], [1.0, 2.0]), "at least three points; got 2"),
        (
            lambda: law.leave_one_out([1e6, 2e6, 3e6], [1, 2, 3], "ab"),
            "each of the 3 points needs one group; got 2",
        ),
        (lambda: law.leave_one_out([1e6, 2e6, 3e6], [1, 2, 3], "aab"), "at least three points; got 2"),
        (lambda: law.shift([1e6, 2e6], [1.0, 2.0], [2.0, 1.0]), "the times do not grow with the bytes"),
        (lambda: law.shift([1e6, 2e6], [1.0, 2.0], [1.0]), "each size needs one time"),
        (lambda: law.memory_share(1, 1, 1), r"read equally fast \(ratio 1\)"),
        (lambda: law.memory_share(0, 1, 1.4), "first_us must be above zero, not 0"),
        (lambda: law.codebook_bytes(64, 64, 4, 17), "17 codes do not fit in 4 bits; at most 16 do"),
        (lambda: law.codebook_bytes(0, 64, 4), "in_features must be above zero, not 0"),
        (lambda: law.gemv_bytes(64, 64, "int5"), "weight format 'int5' is unknown; give one of fp32"),
        (lambda: law.floor_us(1, 0), "bandwidth_gbps must be above zero"),
        (lambda: law.gbps(1, -1), "time_us must be above zero, not -1"),
    ],
)
def test_what_cannot_be_computed_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_group_is_left_out_as_a_whole():
    sizes, times = [2e6, 2e6, 8e6, 2.2e7, 4.5e7], [*made(3, 2500, [2e6, 2e6, 8e6, 2.2e7, 4.5e7])]
    times[0] *= 2
    alone, together = (
        law.leave_one_out(sizes, times, groups) for groups in (None, ["a", "a", "b", "c", "d"])
    )
    assert together[1][1] == pytest.approx(times[1]), "its doubled twin did not teach the fit"
    assert alone[1][1] > 1.1 * times[1]


def noisy(t0_us, bandwidth_gbps, rng, noise=0.01):
    samples = [(t * rng.normal(1, noise, 15)).tolist() for t in made(t0_us, bandwidth_gbps)]
    return [float(np.median(x)) for x in samples], samples


def shifted(first, second):
    return law.shift(SIZES, first[0], second[0], first[1], second[1], n_boot=300)


def test_a_shift_finds_what_moved_between_two_devices():
    rng = np.random.default_rng(5)
    first = noisy(3, 2800, rng)
    faster, slower_launch, same = noisy(3, 2800 * 1.435, rng), noisy(5, 2800, rng), noisy(3, 2800, rng)
    assert shifted(first, faster).ratio == pytest.approx(1.435, rel=0.03)
    assert shifted(first, faster).t0_agrees and shifted(first, faster).moved(1.435) == "as"
    assert shifted(first, same).moved(1.435) == "less" and shifted(first, same).moved(0.7) == "more"
    moved = shifted(first, slower_launch)
    assert moved.t0_us == pytest.approx(2, abs=0.2) and not moved.t0_agrees
    assert moved.t0_interval[0] <= moved.t0_us <= moved.t0_interval[1] and moved.n == len(SIZES)
    assert shifted(first, faster) == shifted(first, faster)


def test_what_a_shape_does_to_both_devices_cancels_in_their_shift():
    quirks = np.array([1.3, 0.8, 1.15, 0.9, 1.05, 1.0])
    first, second = (np.array(made(3, gbps)) * quirks for gbps in (2800, 2800 * 1.435))
    found = law.shift(SIZES, first, second)
    width = found.ratio_interval[1] / found.ratio_interval[0]
    own = law.fit(SIZES, first).bandwidth_interval
    assert width - 1 < 0.3 * (own[1] / own[0] - 1)


def test_differences_below_the_margins_are_none():
    close = law.Shift(0.05, 1.44, (0.04, 0.06), (1.438, 1.445), 14)
    assert close.t0_agrees and close.moved(1.435) == "as"
    far = law.Shift(0.5, 1.5, (0.4, 0.6), (1.49, 1.52), 14)
    assert not far.t0_agrees and far.moved(1.435) == "more"


def test_the_share_that_shrank_with_the_memory():
    assert law.memory_share(162, 162 / 1.435, 1.435) == pytest.approx(1)
    assert law.memory_share(60, 60, 1.435) == 0
    assert law.memory_share(2 + 40, 2 + 40 / 1.5, 1.5) == pytest.approx(40 / 42)
    assert law.memory_share(60, 61, 1.435) < 0


def test_an_h100_needs_many_weights_a_clock():
    h100, rtx = (hardware.find(name) for name in ("H100 SXM", "RTX 4090"))
    needed = [law.weights_per_clock(4, g.bandwidth_gbps, g.sms, g.boost_ghz) for g in (h100, rtx)]
    assert needed == pytest.approx([25.6, 6.25], rel=0.01)
