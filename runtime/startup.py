"""From an EngineConfig to a rank's step runner, with every check that a bad checkpoint should meet before a
request does."""

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from euryale.kernels.linear import quantize
from euryale.parallel.group import Group
from euryale.parallel.sharding import Layout
from euryale.runtime.config import EngineConfig, ModelConfig, load_model_config
from euryale.runtime.kv_cache import KVCache, count_pages
from euryale.runtime.model import generation_config, medusa_checkpoint, rope
from euryale.runtime.model.checkpoint import Checkpoint, fingerprint
from euryale.runtime.model.decoder import SHARDING, Decoder
from euryale.runtime.model.medusa_heads import MedusaHeads
from euryale.runtime.model.weights import Weights
from euryale.runtime.step import StepRunner
from euryale.runtime.step_graphs import StepGraphs
from euryale.scheduler.limits import SchedulerLimits
from euryale.scheduler.speculation.acceptance_stats import AcceptanceStats
from euryale.scheduler.speculation.ngram_table import FILE as NGRAMS
from euryale.scheduler.speculation.ngram_table import NgramTable
from euryale.scheduler.speculation.tree import TreeConfig, parse_tree_option

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
        parts = _load_parts(config, group)
    except ValueError as problem:
        error = str(problem)
    except Exception as problem:  # a fault of ours or of the machine: the others must hear of it all the same
        logger.exception("loading failed")
        error = repr(problem)
    group.agree(error)
    decoder, heads, tree, model, layout, marks, known = parts
    group.agree_on(_flags_to_share(config) | {"--tree": tree, "what the files of --model and --medusa hold": marks})
    max_len = config.max_model_len or model.max_positions
    num_pages = count_pages(config, model, layout.num_kv_heads, max_len, group)
    rows = config.max_num_batched_tokens
    cache = KVCache(model, layout, num_pages, config.page_size, rows)
    limits = SchedulerLimits(
        max_model_len=max_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        vocab_size=model.vocab_size,
        num_pages=num_pages,
        page_size=config.page_size,
        end_ids=generation_config.end_ids(config.model, model),
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


def _flags_to_share(config: EngineConfig) -> dict[str, object]:
    """The flags that must be the same on all nodes: not paths, which may differ, as long as the files do not."""
    values = {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(config).items()}
    return {name: value for name, value in values.items() if name not in ("--model", "--medusa", "--tree", "--trace")}


def _load_parts(config: EngineConfig, group: Group):
    model = load_model_config(config.model, config.dtype)
    max_len = config.max_model_len or model.max_positions
    rope.check(model, max_len)
    if max_len > model.max_positions:
        raise ValueError(
            f"--max-model-len {max_len} is more than the {model.max_positions} tokens the model was made for"
        )
    quantize.check(config.quantization, group.device, model.dtype)
    layout = Layout(group, model.num_heads, model.num_kv_heads, model.head_dim)
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
    decoder = Decoder(model, weights, max(max_len + (tree.depth if tree else 0), config.max_num_batched_tokens))
    checkpoint.refuse_unused(("rotary_emb.inv_freq", *(("lm_head.weight",) if model.tied else ())))
    heads = None
    if tensors:
        heads = MedusaHeads(tensors, weights, decoder.lm_head, decoder.shard)
    known = _calibration(config, tensors.num_heads, model.vocab_size) if tree and tree.shape is None else (None, None)
    return decoder, heads, tree, model, layout, _fingerprint(config, checkpoint, model, tree), known


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
    path = directory / "calibration.json"
    try:
        content = json.loads(path.read_text()).get("acceptance_stats") if path.is_file() else None
        return text, AcceptanceStats.from_json(content, num_heads) if content else None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used ({error}): calibrate the heads again or remove it") from error


def _fingerprint(config: EngineConfig, checkpoint: Checkpoint, model: ModelConfig, tree: TreeConfig | None) -> str:
    """Names all that answers depend on: weights, heads, tree, tokenizer and settings files, dtype, quantization."""
    small = [p for p in sorted(Path(config.model).iterdir()) if p.suffix in (".json", ".jinja", ".model")]
    heads = sorted(Path(config.medusa).glob("medusa_lm_head.*")) if config.medusa else []
    return fingerprint([*small, *checkpoint.files(), *heads], f"{model.dtype} {config.quantization} {tree}")
