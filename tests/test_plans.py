"""Launch shapes on disk: kept across processes, harmless when damaged, and looked up in well under a microsecond."""

import json
import multiprocessing
import subprocess
import sys
import timeit
import warnings
from dataclasses import dataclass

import pytest

from trapetum import plans

H100 = plans.device_name("NVIDIA H100 80GB HBM3", 132, (9, 0))
PLAN = {"warps": 16, "ahead": 2}


@dataclass(frozen=True)
class Plan:
    warps: int
    ahead: int
    channels: int = 32
    split: bool = False

    def __post_init__(self):
        if self.warps > 32:
            raise ValueError(f"{self.warps} warps do not fit a block")


def key(out_features=4096, device=H100, sha="a" * 64):
    return plans.Key(device, sha, 4096, out_features, 4, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAPETUM_CACHE", str(tmp_path))
    plans.forget()
    yield tmp_path
    plans.forget()


def warned(action):
    """What an action returns, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return action(), [str(w.message) for w in caught]


def test_a_plan_is_found_again_only_under_its_own_key():
    assert plans.load(key()) is None
    assert plans.store(key(), PLAN)
    assert plans.load(key()) == PLAN
    plans.forget()
    assert plans.load(key()) == PLAN
    fewer_sms = plans.device_name("NVIDIA H100 80GB HBM3", 114, (9, 0))
    for other in (key(out_features=11008), key(device=fewer_sms), key(sha="b" * 64)):
        assert plans.load(other) is None
    assert all(plans.load(key()._replace(**{size: 3})) is None for size in ("in_features", "bits", "rows"))


def test_a_truth_stays_one():
    plans.store(key(), PLAN | {"split": True})
    plans.forget()
    assert plans.load_as(Plan, key()).split is True


def test_storing_nothing_goes_back_to_the_default():
    plans.store(key(), PLAN)
    assert plans.load_as(Plan, key()) == Plan(16, 2)
    plans.store(key(), None)
    assert plans.load(key()) is None and plans.load_as(Plan, key()) is None
    plans.forget()
    assert plans.load(key()) is None


def test_a_new_plan_replaces_the_one_in_use():
    plans.store(key(), PLAN)
    assert plans.load_as(Plan, key()) == Plan(16, 2)
    plans.store(key(), {"warps": 8, "ahead": 1, "channels": 64})
    assert plans.load_as(Plan, key()) == Plan(8, 1, 64)


def test_the_caller_cannot_change_what_is_kept():
    given = dict(PLAN)
    plans.store(key(), given)
    given["warps"] = 1
    assert plans.load(key()) == PLAN


def _store_many(first):
    for n in range(first, first + 8):
        plans.store(key(out_features=n), {"warps": n})


def test_processes_that_store_at_once_keep_all_plans():
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_store_many, args=(1 + 8 * p,)) for p in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [plans.load(key(out_features=n)) for n in range(1, 33)] == [{"warps": n} for n in range(1, 33)]


def _content(**changes):
    row = key()._asdict() | {"plan": PLAN}
    del row["device"]
    return {"version": 1, "device": H100, "plans": [row]} | changes


def _row(**changes):
    return _content(plans=[_content()["plans"][0] | changes])


DAMAGED = {
    "empty": "",
    "garbage": b"\x00\xff\x13",
    "truncated": json.dumps(_content())[:-20],
    "a list": "[]",
    "another version": json.dumps(_content(version=2)),
    "another device": json.dumps(_content(device="NVIDIA A100, 108 SMs, sm_80")),
    "a plan of text": json.dumps(_row(plan={"warps": "16"})),
    "a plan of nothing": json.dumps(_row(plan={})),
    "a negative plan": json.dumps(_row(plan={"warps": -1})),
    "a size of text": json.dumps(_row(bits="4")),
    "a key too many": json.dumps(_row(color=1)),
    "no plan": json.dumps(_content(plans=[{"bits": 4}])),
}


def test_the_file_of_the_tests_would_be_read():
    path = plans.path_for(H100)
    path.parent.mkdir()
    path.write_text(json.dumps(_content()))
    assert warned(lambda: plans.load(key())) == (PLAN, [])


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_said_once_and_written_anew(content):
    path = plans.path_for(H100)
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found, said = warned(
        lambda: [plans.load(key()), plans.load(key(out_features=1)), plans.load_as(Plan, key())]
    )
    assert found == [None, None, None]
    assert len(said) == 1 and str(path) in said[0] and "default launch shapes" in said[0]
    stored, said = warned(lambda: plans.store(key(), PLAN))
    assert stored and said == []
    plans.forget()
    assert warned(lambda: plans.load(key())) == (PLAN, [])


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"warps": 4, "ahead": 1, "clusters": 2}, "Plan has no clusters"),
        ({"warps": 4}, "ahead"),
        ({"warps": 64, "ahead": 1}, "64 warps do not fit a block"),
    ],
)
def test_a_plan_of_another_program_is_said_once_and_not_used(plan, said):
    plans.store(key(), plan)
    found, warning = warned(lambda: [plans.load_as(Plan, key()) for _ in range(3)])
    assert found == [None] * 3
    assert len(warning) == 1 and said in warning[0] and str(plan) in warning[0]


@pytest.mark.parametrize("plan", [{}, {"warps": 1.5}, {"warps": 1 << 20}, {1: 1}, [1]])
def test_only_small_integers_are_stored(plan):
    with pytest.raises(ValueError, match="integers from 0 to 65536; this one is"):
        plans.store(key(), plan)
    assert plans.load(key()) is None


def test_an_unwritable_cache_is_said_once_and_the_plan_lasts_for_the_process(cache, monkeypatch):
    monkeypatch.setenv("TRAPETUM_CACHE", str(cache / "file"))
    (cache / "file").write_text("not a folder")
    assert warned(lambda: plans.load(key())) == (None, [])
    stored, said = warned(lambda: [plans.store(key(), PLAN), plans.store(key(), PLAN)])
    assert stored == [False, False]
    assert len(said) == 1 and "TRAPETUM_CACHE" in said[0] and str(cache / "file") in said[0]
    assert plans.load(key()) == PLAN


def test_a_look_up_takes_under_a_microsecond():
    plans.store(key(), PLAN)
    wanted = key()
    for look_up in (lambda: plans.load(wanted), lambda: plans.load_as(Plan, wanted)):
        assert look_up() is not None
        assert min(timeit.repeat(look_up, number=2000, repeat=20)) / 2000 < 1e-6


def test_no_torch_is_needed():
    check = "import sys; from trapetum import plans; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
