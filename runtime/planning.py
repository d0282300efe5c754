"""From an EngineConfig to the leader's scheduler: which drafts it makes, and what it knows of the cost of steps."""

import secrets
from collections.abc import Callable

from euryale.parallel.group import Group
from euryale.runtime import step_profiler as profile
from euryale.runtime.config import EngineConfig
from euryale.runtime.startup import Loaded
from euryale.scheduler.scheduler import Scheduler
from euryale.scheduler.speculation.draft_budget import DraftBudget
from euryale.scheduler.speculation.drafter import Drafter, StaticDrafter
from euryale.scheduler.speculation.dynamic_drafter import DynamicDrafter, Sources
from euryale.scheduler.step_cost import Profile, StepCosts
from euryale.scheduler.step_plan import Segment


def make_scheduler(
    config: EngineConfig, loaded: Loaded, group: Group, run: Callable[[list[Segment]], None]
) -> Scheduler:
    """``run`` runs a step of made-up requests on all ranks, to see what steps cost."""
    trees, costs = loaded.trees, None
    if config.max_itl or (trees and not trees.num_draft_tokens):
        costs = StepCosts(_profile(config, loaded, group, run))
    return Scheduler(
        loaded.limits,
        _make_drafter(config, loaded, costs),
        enable_prefix_caching=config.enable_prefix_caching,
        starvation_bound=config.starvation_bound,
        costs=costs,
        max_prefill_seconds=config.max_itl / 1000,
    )


def _make_drafter(config: EngineConfig, loaded: Loaded, costs: StepCosts | None) -> Drafter | None:
    trees = loaded.trees
    if trees is None:
        return None
    if trees.shape:
        return StaticDrafter(trees.shape)
    return DynamicDrafter(
        loaded.runner.heads.num_heads,
        trees.dynamic_size or config.max_tree_nodes,
        None if trees.dynamic_size else DraftBudget(costs, loaded.limits.max_num_batched_tokens),
        loaded.text,
        loaded.acceptance_stats,
        Sources(text=config.draft_from_text, traffic=config.draft_from_traffic, context=config.draft_from_context),
        secrets.token_bytes(16),
    )


def _profile(config: EngineConfig, loaded: Loaded, group: Group, run: Callable[[list[Segment]], None]) -> Profile:
    """What steps cost, from an earlier start or measured now."""
    graphs, num_heads = loaded.runner.graphs, loaded.runner.heads.num_heads if loaded.runner.heads else 0

    def measure() -> Profile:
        return profile.measure(run, loaded.limits, num_heads, bool(graphs and graphs.pads))

    if not config.cost_cache:
        return measure()
    key = profile.machine_key(group.device) | {
        "model": loaded.fingerprint,
        "ranks": group.size,
        "sizes": [config.max_num_seqs, config.max_num_batched_tokens, config.page_size],
        "eager": config.eager,
    }
    return profile.cached(key, measure)
