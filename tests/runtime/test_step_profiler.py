"""The profile of step times: how it is measured, and how it is stored."""

import dataclasses
import json

import numpy as np
import pytest

from euryale.runtime import step_profiler as profile
from euryale.scheduler.limits import SchedulerLimits
from euryale.scheduler.step_cost import Profile, StepCosts

LIMITS = SchedulerLimits(
    max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64, vocab_size=50, num_pages=64, page_size=16
)
MEASURED = Profile(requests=[1, 4], plain=[1.0, 1.2], extra=[0, 8], speculating=[[1.1, 1.6], [1.4, 2.2]])


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Store a profile and return its file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert profile.cached({"model": "a"}, lambda: MEASURED) == MEASURED
    (file,) = (tmp_path / "euryale").iterdir()
    return file


def again() -> tuple[Profile, list]:
    """The profile at another start, and whether it was measured."""
    calls = []
    return profile.cached({"model": "a"}, lambda: calls.append(1) or MEASURED), calls


def test_a_profile_is_stored_under_its_key(kept):
    assert again() == (MEASURED, [])
    other = dataclasses.replace(MEASURED, plain=[2.0, 2.4])
    assert profile.cached({"model": "b"}, lambda: other) == other


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": []},
        {"requests": []},
        {"requests": ["1", "4"]},
        {"per_token": "abc"},
        {"per_token": -1.0},
        {"plain": [float("nan"), 1.2]},
        {"speculating": [[1.1, 1.6], [1.4]]},
        {"speculating": None},
        {"more": 1},
    ],
    ids=str,
)
def test_a_file_that_cannot_be_used_is_measured_anew_and_written_over(kept, changes):
    kept.write_text(json.dumps(MEASURED.to_json() | changes))
    assert again() == (MEASURED, [1])
    assert again() == (MEASURED, [])


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\x00"], ids=str)
def test_garbage_is_measured_anew(kept, content):
    kept.write_bytes(content)
    assert again() == (MEASURED, [1])


def test_a_directory_in_the_way_costs_no_start(kept):
    kept.unlink()
    kept.mkdir()
    assert again() == (MEASURED, [1])
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_timed_requests_have_pages_of_their_own():
    """Common pages would be read only once, and context would look cheap."""
    seen = []
    profile.measure(
        lambda segments: seen.append([p for s in segments for p in s.pages.tolist()]),
        LIMITS,
        num_heads=0,
        steps=False,
        time_step=lambda step: step() or 1e-3,
    )
    assert max(map(len, seen)) >= LIMITS.num_pages - 4, "one of the steps reads nearly all there are"
    assert all(len(pages) == len(set(pages)) for pages in seen)


def test_a_speculative_step_includes_the_choice_of_draft_tokens():
    """Its time is not padded to the next number of requests, unlike the device's."""
    found = profile.measure(
        lambda segments: None, LIMITS, 3, True, time_step=lambda step: step() or 1.0, time_choice=lambda n: 0.1 * n
    )
    assert found.requests == [1, 2, 4]
    costs = StepCosts(found)
    for requests in (1, 2, 3, 4):
        assert costs.plain(requests) == pytest.approx(1.0)
        assert costs.speculating(requests, np.zeros(1, dtype=int))[0] == pytest.approx(1 + 0.1 * requests)
    real = profile.measure(lambda segments: None, LIMITS, 3, False, time_step=lambda step: step() or 1.0)
    assert all(0 < seconds < 1 for seconds in real.drafting)
