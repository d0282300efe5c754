"""From an EngineConfig to a rank's step runner and the leader's scheduler, with every check that a bad checkpoint
should meet before a request does."""

import contextlib
import dataclasses
import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from euryale.client.rules import MAP, NULL, either
from euryale.kernels.linear import quantize
from euryale.parallel.group import Group
from euryale.parallel.sharding import Layout
from euryale.runtime import step_profiler as profile
from euryale.runtime.config import EngineConfig
from euryale.runtime.kv_cache import KVCache, count_pages, longest_request
from euryale.runtime.model import generation_config, medusa_checkpoint, rope
from euryale.runtime.model.checkpoint import Checkpoint, fingerprint
from euryale.runtime.model.config import ModelConfig, load_model_config
from euryale.runtime.model.decoder import SHARDING, Decoder
from euryale.runtime.model.medusa_heads import MedusaHeads
from euryale.runtime.model.weights import Weights
from euryale.runtime.step import StepRunner
from euryale.runtime.step_graphs import StepGraphs
from euryale.scheduler import json_file
from euryale.scheduler.limits import SchedulerLimits
from euryale.scheduler.scheduler import Scheduler
from euryale.scheduler.speculation.acceptance_stats import AcceptanceStats
from euryale.scheduler.speculation.draft_budget import DraftBudget
from euryale.scheduler.speculation.drafter import Drafter, StaticDrafter
from euryale.scheduler.speculation.dynamic_drafter import DynamicDrafter, Sources
from euryale.scheduler.speculation.ngram_table import FILE as NGRAMS
from euryale.scheduler.speculation.ngram_table import NgramTable
from euryale.scheduler.speculation.tree import TreeConfig, parse_tree_option
from euryale.scheduler.step_cost import Profile, StepCosts
from euryale.scheduler.step_plan import Segment

logger = logging.getLogger("euryale.loading")

_USUAL_LENGTH = 2048  # tokens of a request that the table of n-grams has room for
GRAPH_MEMORY = 4 << 20  # bytes of a recorded decoder's buffers; what needs more has work enough to hide its calls


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """All that an engine needs of a model. ``trees`` None: no speculation. For dynamic trees, else None: ``text``, what
    calibration text says follows what, and ``acceptance_stats``, what calibration learned of guesses; of a heads'
    directory without, an empty table and None."""

    runner: StepRunner
    limits: SchedulerLimits
    trees: TreeConfig | None
    text: NgramTable | None
    acceptance_stats: AcceptanceStats | None
    model: ModelConfig
    fingerprint: str


def load(config: EngineConfig, group: Group) -> Loaded:
    """Load this rank's share. Raises ValueError on every rank if any rank cannot (see ``Group.agree``)."""
    parts, error = None, None
    try:
        with _enough_memory("--max-num-batched-tokens, use more ranks, or a smaller model"):
            parts = _load_parts(config, group)
    except ValueError as problem:
        error = str(problem)
    except Exception as problem:  # a fault of ours or of the machine: the others must hear of it all the same
        logger.exception("loading failed")
        error = repr(problem)
    group.agree(error)
    decoder, heads, tree, model, layout, marks, known, end_ids, longest = parts
    group.agree_on(_flags_to_share(config) | {"--tree": tree, "what the files of --model and --medusa hold": marks})
    num_pages = count_pages(config, model, layout.num_kv_heads, longest, group)
    rows = config.max_num_batched_tokens
    with group.agreed(), _enough_memory("--max-num-batched-tokens, --kv-cache-memory or --max-num-seqs"):
        cache = KVCache(model, layout, num_pages, config.page_size, rows)
    limits = SchedulerLimits(
        max_model_len=min(longest, num_pages * config.page_size),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        vocab_size=model.vocab_size,
        num_pages=num_pages,
        page_size=config.page_size,
        end_ids=end_ids,
    )
    graphs = None if config.eager else make_graphs(cache, model, rows, group)
    runner = StepRunner(decoder, heads if tree else None, cache, tree.num_candidates if tree else 0, graphs)
    text, acceptance_stats = known
    return Loaded(
        runner=runner,
        limits=limits,
        trees=tree,
        text=text,
        acceptance_stats=acceptance_stats,
        model=model,
        fingerprint=marks,
    )


@contextlib.contextmanager
def _enough_memory(lower: str) -> Iterator[None]:
    """Turn the errors of memory that cannot be had into a ValueError that says what to ``lower``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # PyTorch's are RuntimeErrors
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise ValueError(f"not enough memory to serve this: lower {lower}") from error
        raise


def _flags_to_share(config: EngineConfig) -> dict[str, object]:
    """The flags that must be the same on all nodes: not paths, which may differ, as long as the files do not."""
    values = {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(config).items()}
    return {name: value for name, value in values.items() if name not in ("--model", "--medusa", "--tree", "--trace")}


def _load_parts(config: EngineConfig, group: Group):
    model = load_model_config(config.model, config.dtype)
    end_ids = generation_config.end_ids(config.model, model)
    generation_config.default_params(config.model)
    layout = Layout(group, model.num_heads, model.num_kv_heads, model.head_dim)
    longest = longest_request(config, model, layout.num_kv_heads, group)
    rope.check(model, longest)
    quantize.check(config.quantization, group.device, model.dtype)
    checkpoint = Checkpoint(config.model)
    tensors = None
    if config.tree != "off":
        tensors = medusa_checkpoint.load_heads(config.medusa, checkpoint, model.hidden_size, model.vocab_size)
    else:
        checkpoint.used |= {n for n in checkpoint.names if n.startswith(medusa_checkpoint.MERGED_PREFIX)}
    tree = _tree_config(config, tensors.num_heads if tensors else 0, model.vocab_size)
    weights = Weights(checkpoint, layout, SHARDING, model.dtype, config.quantization)
    # Draft rows of a request that is nearly done lie beyond its last token, never beyond the tree's depth; padding
    # begins at 0 and has no more rows than a step.
    decoder = Decoder(model, weights, max(longest + (tree.depth if tree else 0), config.max_num_batched_tokens))
    checkpoint.refuse_unused(("rotary_emb.inv_freq", *(("lm_head.weight",) if model.tied else ())))
    heads = None
    if tensors:
        heads = MedusaHeads(tensors, weights, decoder.lm_head, decoder.shard)
    known = _calibration(config, tensors.num_heads, model.vocab_size) if tree and tree.shape is None else (None, None)
    marks = _fingerprint(config, checkpoint, model, tree)
    return decoder, heads, tree, model, layout, marks, known, end_ids, longest


def make_graphs(cache: KVCache, config: ModelConfig, engine_rows: int, group: Group) -> StepGraphs | None:
    """Recordings of steps; None where the collectives cannot be recorded. On a CPU for so many rows as fit
    GRAPH_MEMORY, on a GPU for ``engine_rows``, the rows of any step."""
    if not group.can_record:
        return None
    widths = config.num_heads * config.head_dim * 3 + config.intermediate_size * 3
    per_row = config.num_layers * (widths / group.size + 4 * config.hidden_size) * config.dtype.itemsize
    on_gpu = group.device.type == "cuda"
    return StepGraphs(cache, group, engine_rows if on_gpu else int(GRAPH_MEMORY / per_row), pads=on_gpu)


def _tree_config(config: EngineConfig, num_heads: int, vocab_size: int) -> TreeConfig | None:
    if config.tree == "off" or not num_heads:
        if config.tree not in ("", "dynamic", "off"):
            raise ValueError(f"--tree {config.tree} needs Medusa heads: give --medusa, or --tree off")
        return None
    trees = parse_tree_option(config.tree, medusa_checkpoint.tree_beside(config.medusa, config.model), num_heads)
    if trees.shape and trees.num_candidates > vocab_size:
        raise ValueError(f"the tree asks for rank {trees.num_candidates - 1} of a vocabulary of {vocab_size}")
    if trees.num_draft_tokens + 1 > config.max_num_batched_tokens:
        raise ValueError(
            f"the tree has {trees.num_draft_tokens + 1} nodes and a step {config.max_num_batched_tokens} rows: "
            "raise --max-num-batched-tokens or give a smaller tree"
        )
    return trees


def _calibration(
    config: EngineConfig, num_heads: int, vocab_size: int
) -> tuple[NgramTable | None, AcceptanceStats | None]:
    """What calibration left beside the heads for dynamic trees, as far as there is anything."""
    directory = Path(config.medusa or config.model)
    bits = NgramTable.bits_for(config.max_num_seqs * _USUAL_LENGTH)
    text = NgramTable(live_bits=bits)
    if config.draft_from_text and (directory / NGRAMS).is_file():
        text = NgramTable.load_text(directory, vocab_size, bits)
    path, remedy = directory / "calibration.json", "calibrate the heads again or remove it"
    if not path.is_file():
        return text, None
    content = json_file.read_object(path, remedy)
    json_file.check(path, content, {"acceptance_stats": either(NULL, MAP)}, remedy=remedy)
    try:
        return text, AcceptanceStats.from_json(content["acceptance_stats"], num_heads) if content.get(
            "acceptance_stats"
        ) else None
    except ValueError as error:
        raise ValueError(f"{path}: {error}: {remedy}") from error


def _fingerprint(config: EngineConfig, checkpoint: Checkpoint, model: ModelConfig, tree: TreeConfig | None) -> str:
    """Names all that answers depend on: weights, heads, tree, tokenizer and settings files, dtype, quantization."""
    small = [p for p in sorted(Path(config.model).iterdir()) if p.suffix in (".json", ".jinja", ".model")]
    heads = sorted(Path(config.medusa).glob("medusa_lm_head.*")) if config.medusa else []
    return fingerprint([*small, *checkpoint.files(), *heads], f"{model.dtype} {config.quantization} {tree}")


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
