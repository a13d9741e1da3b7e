"""The parts of a token's time: right in an arithmetic example, and absent where a measurement is."""

import pytest

from trapetum import law, records, waterfall
from trapetum.shapes import MODELS

SHAPE = MODELS["llama-2-7b"]
ROOF = 3000.0


def made(quantity, value, method, **config):
    base = {"model": "random:llama-2-7b", "bits": 4, "stage": "graph", "dtype": "fp16", "lm_head": "fp16"}
    return records.measured(quantity, [value], method, base | config, {"name": "a card"}, {})


SPEED = made("decode_speed", 300.0, "codebook", linears="codebook")
FLOOR = made("decode_speed", 1000.0, "no-linears", linears="none")
CHAIN = made("linears_time", 1700.0, "codebook", chain="alone", bytes=3.4e9)


def test_parts_come_from_bytes_and_measurements():
    parts = dict(waterfall.token_parts(SPEED, CHAIN, FLOOR, SHAPE, ROOF))
    assert tuple(parts) == waterfall.PARTS
    assert parts["weights"] == pytest.approx(SHAPE.linear_weights / 2 / ROOF / 1e3)
    assert parts["output head"] == pytest.approx(SHAPE.lm_head_weights * 2 / ROOF / 1e3)
    assert parts["products above the floor"] == pytest.approx(1700 - 3.4e9 / ROOF / 1e3)
    assert parts["all but products"] == pytest.approx(1000)
    codebook = law.codebook_bytes(4096, 4096, 4) - 4096 * 4096 / 2
    assert 0 < parts["codebooks"] < 0.05 * parts["weights"] and codebook > 0


def test_dense_weights_have_no_codebooks():
    dense = made("decode_speed", 150.0, "fp16", bits=16, linears="dense")
    chain = made("linears_time", 5100.0, "linear-fp16", chain="alone", bytes=13.2e9)
    parts = dict(waterfall.token_parts(dense, chain, FLOOR, SHAPE, ROOF))
    assert parts["codebooks"] == 0
    assert parts["weights"] == pytest.approx(2 * SHAPE.linear_weights / ROOF / 1e3)


def test_explain_takes_the_newest_and_wants_all_three():
    pool = [SPEED, FLOOR, CHAIN]
    speed, parts = waterfall.explain(pool, "codebook", SHAPE, ROOF, "graph")
    assert speed is SPEED and len(parts) == 5
    for missing in pool:
        rest = [r for r in pool if r is not missing]
        assert waterfall.explain(rest, "codebook", SHAPE, ROOF, "graph") is None
    assert waterfall.explain(pool, "fp16", SHAPE, ROOF, "graph") is None


def test_token_time():
    assert waterfall.token_us(SPEED) == pytest.approx(1e6 / 300)
