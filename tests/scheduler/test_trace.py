"""Statistics and traces of draft tokens: counts are correct, files survive kills, bad paths are refused."""

import json

import numpy as np
import pytest
from support import ROOT, run_script

from euryale.benchmarks import plot_trace
from euryale.scheduler import trace
from euryale.scheduler.request import Request
from euryale.scheduler.sampling_params import SamplingParams
from euryale.scheduler.scheduler import Scheduler, SchedulerLimits, SegmentResult
from euryale.scheduler.speculation.draft_budget import DraftBudget
from euryale.scheduler.speculation.drafter import RequestStepResult, StaticDrafter
from euryale.scheduler.speculation.dynamic_drafter import DynamicDrafter
from euryale.scheduler.speculation.tree import default_tree
from euryale.scheduler.stats import EngineStats
from euryale.scheduler.step_cost import Profile, StepCosts
from euryale.scheduler.step_result import HeadCandidates
from euryale.scheduler.trace import Trace

HEADS, RANKS = 3, 10
LIMITS = SchedulerLimits(
    max_model_len=200, max_num_seqs=4, max_num_batched_tokens=64, vocab_size=5000, num_pages=60, page_size=16
)
COSTS = Profile(requests=[1, 4], plain=[2e-3, 2e-3], extra=[0, 60], speculating=[[2e-3, 2.1e-3], [2e-3, 2.1e-3]])


def next_token(tokens: list[int]) -> int:
    return (7 * tokens[-1] + 3) % 4999


def results(plan, known: dict[int, list[int]], rng) -> list[SegmentResult]:
    """A scripted model whose heads have the correct token at a random rank, or not at all if that is RANKS."""
    found = []
    for segment in (s for s in plan.segments if s.emits_tokens):
        tokens = known[segment.params.seed]
        root, node, path = segment.num_new_tokens - 1, 0, []
        while True:
            tokens.append(next_token(tokens))
            below = [i + 1 for i, p in enumerate(segment.parents) if p == node]
            node = next((n for n in below if segment.tokens[root + n] == tokens[-1]), 0)
            if not node:
                break
            path.append(node)
        ahead = list(tokens)
        ids = np.zeros((HEADS, RANKS), dtype=np.int32)
        for h in range(HEADS):
            ahead.append(next_token(ahead))
            ids[h] = 4999 - np.arange(RANKS) - 1 * (ahead[-1] > 4980) * 100
            if (rank := rng.integers(RANKS + 1)) < RANKS:
                ids[h, rank] = ahead[-1]
        candidates = HeadCandidates(ids, -np.arange(RANKS, dtype=np.float32) * np.ones((HEADS, 1), dtype=np.float32))
        taken = tokens[len(tokens) - len(path) - 1 :]
        found.append(SegmentResult(tokens=taken, accepted_nodes=path, head_candidates=candidates))
    return found


def run(drafter, path=None) -> tuple[EngineStats, list[dict], list[RequestStepResult]]:
    """Run four requests to their ends; return the statistics, the record of every step, and all step results."""
    scheduler = Scheduler(LIMITS, drafter, enable_prefix_caching=False)
    stats, rng = EngineStats(scheduler), np.random.default_rng(0)
    known, records, tested = {}, [], []
    file = Trace(path) if path else None
    for key in range(4):
        prompt = np.array([17 + key, 5, 900 * key + 11], dtype=np.int32)
        known[key] = prompt.tolist()
        params = SamplingParams(max_tokens=40, seed=key)
        scheduler.add(Request(key=key, prompt=prompt, params=params))
    while scheduler.has_work:
        planned = scheduler.plan(0, 0)
        step = scheduler.advance(planned, results(planned.plan, known, rng))
        scheduler.observe(step, 2e-3)
        stats.count_step(step)
        records.append(trace.record(scheduler, step, len(records)))
        tested += step.results
        if file:
            file.write(scheduler, step)
    if file:
        file.flush()
    return stats, records, tested


def drafter(kind: str):
    if kind == "static":
        return StaticDrafter(default_tree(HEADS, 15))
    return DynamicDrafter(HEADS, 15, DraftBudget(StepCosts(COSTS), 60)) if kind == "dynamic" else None


@pytest.mark.parametrize("kind", ["static", "dynamic", "plain"])
def test_statistics_count_draft_tokens(kind):
    stats, records, tested = run(drafter(kind))
    values = stats.values()
    accepted = [len(t.accepted_nodes) for t in tested]
    assert (
        values["num_draft_tokens"]
        == sum(t.num_draft_tokens for t in tested)
        == sum(r["num_draft_tokens"] for r in records)
    )
    assert values["num_accepted_tokens"] == sum(accepted) == sum(r["num_accepted_tokens"] for r in records)
    assert values["num_rejected_tokens"] == values["num_draft_tokens"] - values["num_accepted_tokens"]
    assert values["num_proposed_tokens"] == sum(r["num_proposed_tokens"] for r in records) >= values["num_draft_tokens"]
    assert values["num_speculative_steps"] == sum(r["num_draft_tokens"] > 0 for r in records)
    assert values["accepted_tokens_by_depth"] == {
        str(d): sum(n >= d for n in accepted) for d in range(1, max(accepted) + 1)
    }
    ranks = [rank for record in records for request in record["requests"] for rank in request["ranks"]]
    counted = {"other" if r is None else str(r): ranks.count(r) for r in set(ranks)}
    assert {r: n for r, n in values["accepted_tokens_by_rank"].items() if n} == counted
    assert (values["num_accepted_tokens"] > 20) == (kind != "plain"), "or nothing was tested here"
    if kind == "static":
        assert "other" not in counted, "a static tree knows no other tokens"
        assert values["predicted_steps"] == 0
    if kind == "dynamic":
        assert values["predicted_seconds"] > 0
        assert values["predicted_steps_seconds"] == pytest.approx(2e-3 * values["predicted_steps"])
        assert values["expected_accepted_tokens"] == pytest.approx(
            sum(r["expected_accepted_tokens"] or 0 for r in records), abs=0.5
        )


def test_ranks_of_a_path():
    ids = np.array([[4, 5, 6], [7, 8, 9]], dtype=np.int32)
    candidates = HeadCandidates(ids, np.zeros((2, 3), dtype=np.float32))
    request = Request(key=0, prompt=np.ones(1, dtype=np.int32), params=SamplingParams())
    path = [6, 7, 4, 1]  # the third is deeper than there are heads, the last is the bonus token
    assert trace.path_ranks(RequestStepResult(request, path, [3, 4, 5], 8, candidates)) == [2, 0, None]
    assert trace.path_ranks(RequestStepResult(request, [9, 1], [1], 8, candidates)) == [None]
    assert trace.path_ranks(RequestStepResult(request, path, [3, 4, 5], 8, None)) == [None] * 3
    assert trace.path_ranks(RequestStepResult(request, [6], [], 0, candidates)) == []


def test_a_file_holds_several_runs_and_incomplete_lines_are_skipped(tmp_path):
    path = tmp_path / "trace.jsonl"
    _, first, _ = run(drafter("dynamic"), path)
    with path.open("ab") as file:
        file.write(b'{"t": 3, "step"')  # a run that was killed while writing
    run(drafter("static"), path)
    found = list(trace.read(path))
    assert len(found) == 2
    assert [r | {"t": 0} for r in found[0]] == [r | {"t": 0} for r in first]
    times = [r["t"] for r in found[0]]
    assert times == sorted(times)
    assert sum(r["num_draft_tokens"] for r in found[1]) > 0


def test_lines_are_buffered_for_a_second_at_most(tmp_path, monkeypatch):
    path, now = tmp_path / "trace.jsonl", [0.0]
    monkeypatch.setattr(trace.time, "monotonic", lambda: now[0])
    file = Trace(path)
    file._put('{"t": 1}')
    file.flush_old()
    assert list(trace.read(path)) == [[]]
    now[0] += 1.1
    file.flush_old()
    assert list(trace.read(path)) == [[{"t": 1}]]


def test_a_full_disk_ends_only_the_trace(caplog):
    file = Trace("/dev/full")  # even its first line fails
    assert "the trace ends here" in caplog.text
    file._put("{}")
    file.flush()
    assert caplog.text.count("the trace ends here") == 1


@pytest.mark.parametrize("content", [None, b"", b'{"t": 1}\n', b'{"trace": 99}\n'])
def test_an_invalid_trace_is_refused(tmp_path, content):
    path = tmp_path / "trace.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="trace"):
        list(trace.read(path))


def test_a_path_that_cannot_be_written_is_refused_at_start(tmp_path):
    (tmp_path / "prompts").write_text("")
    command = ["--model", str(ROOT / "demo" / "model"), "--prompts", str(tmp_path / "prompts")]
    command += ["--out", str(tmp_path / "out"), "--trace", str(tmp_path / "missing" / "trace.jsonl")]
    done = run_script(ROOT / "launch" / "generate.py", *command)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: cannot write the trace")
    assert "Traceback" not in done.stderr


def test_an_engine_traces_its_steps_and_they_are_plotted(tmp_path, capsys):
    prompts, path = tmp_path / "prompts.jsonl", tmp_path / "trace.jsonl"
    prompts.write_text(json.dumps({"id": 1, "prompt": "def read_lines(path):\n"}) + "\n")
    command = ["--model", str(ROOT / "demo" / "model")]
    command += ["--prompts", str(prompts), "--out", str(tmp_path / "out.jsonl"), "--trace", str(path)]
    command += ["--max-tokens", "24", "--tree", "dynamic:4"]
    run_script(ROOT / "launch" / "generate.py", *command).check_returncode()
    answer = json.loads((tmp_path / "out.jsonl").read_text())
    (steps,) = trace.read(path)
    given = [r["num_accepted_tokens"] + 1 for r in steps if r["requests"]]
    assert given[:-1] == answer["tokens_per_step"][:-1]
    assert given[-1] >= answer["tokens_per_step"][-1], "the last path may be longer than the answer"
    assert steps[0]["prompt_rows"] > 0
    assert all(r["seconds"] > 0 and r["pages_free"] > 0 for r in steps)
    plot_trace.main(plot_trace.parser_of_arguments().parse_args([str(path), "--out", str(tmp_path / "pictures")]))
    assert json.loads(capsys.readouterr().out) == {"runs": 1, "steps": len(steps)}
    for name in ("accepted", "budget", "cost"):
        assert (tmp_path / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="holds 1 run"):
        plot_trace.main(plot_trace.parser_of_arguments().parse_args([str(path), "--out", str(tmp_path), "--run", "5"]))
