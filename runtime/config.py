"""The engine's settings, from which its flags are generated."""

from dataclasses import dataclass

from euryale.client.rules import number, whole
from euryale.kernels.linear.quantize import QUANTIZATIONS
from euryale.runtime.model.config import DTYPES
from euryale.scheduler.admission import STARVATION_BOUND
from euryale.scheduler.flag import check_flags, flag
from euryale.scheduler.speculation.tree import MAX_NODES

MODEL, SPECULATION, SCHEDULING = "model", "speculation", "scheduling"
MEMORY, EXECUTION = "KV cache and memory", "execution and diagnostics"
MODEL_HELP = "directory of the backbone in Hugging Face format"
DEVICE_HELP = "device to run on; auto: the GPUs if there are any, else the CPU"


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one worker group. Every field is a flag of the same name in ``launch/``.

    Raises ValueError, naming the flag, for a value that cannot work.
    """

    model: str = flag("", MODEL_HELP, MODEL, required=True)
    medusa: str = flag("", "directory of the Medusa heads", MODEL, empty="those merged into --model, if any")
    dtype: str = flag(
        "auto",
        "dtype of weights and activations; auto: as stored, float16 as bfloat16",
        MODEL,
        choices=("auto", *DTYPES),
    )
    quantization: str = flag(
        "none",
        "format of all weight matrices; fp8 needs a GPU of the Hopper generation or later",
        MODEL,
        choices=QUANTIZATIONS,
    )
    max_model_len: int = flag(
        0,
        "maximum number of tokens of prompt and answer together",
        MODEL,
        whole(0, 2**31 - 1, "tokens"),
        empty="the model's maximum, as far as the KV cache holds it",
    )
    tree: str = flag(
        "dynamic",
        "draft tokens of a step: dynamic (as many as maximise throughput), dynamic:N (N for each request), "
        "static:FILE (a JSON list of paths), static (tree.json beside the heads, else a generic tree), "
        "chain (the likeliest token of each head) or off",
        SPECULATION,
    )
    max_tree_nodes: int = flag(
        64,
        "maximum number of draft tokens of one request in a step with --tree dynamic",
        SPECULATION,
        whole(1, MAX_NODES - 1),
    )
    draft_from_text: bool = flag(
        True, "dynamic trees use the n-grams of calibration text stored beside the heads", SPECULATION
    )
    draft_from_traffic: bool = flag(True, "dynamic trees learn n-grams from recent requests", SPECULATION)
    draft_from_context: bool = flag(True, "dynamic trees learn n-grams from the request itself", SPECULATION)
    cost_cache: bool = flag(
        True, "store the profile of step times in the user's cache directory for the next start", SPECULATION
    )
    max_num_seqs: int = flag(
        64, "maximum number of requests that run at the same time", SCHEDULING, whole(1, 1 << 16, "requests")
    )
    max_num_batched_tokens: int = flag(
        512, "maximum number of tokens of one step, draft tokens included", SCHEDULING, whole(1, 1 << 20, "tokens")
    )
    max_itl: float = flag(
        0.0,
        "upper bound in milliseconds on the delay between two tokens of a running request that prompts may cause",
        SCHEDULING,
        number(0, 1e9, "milliseconds"),
        empty="no bound",
    )
    starvation_bound: int = flag(
        STARVATION_BOUND,
        "number of steps a request may wait; after that only requests that reached this bound earlier are admitted "
        "before it, and no priority preempts it",
        SCHEDULING,
        whole(0, 2**31 - 1, "steps"),
    )
    enable_prefix_caching: bool = flag(True, "requests with a common prefix use the same KV pages for it", SCHEDULING)
    kv_cache_memory: float = flag(
        0.0,
        "size in GiB of the KV cache on each rank",
        MEMORY,
        number(0, 1e6, "GiB"),
        empty="enough for --max-num-seqs requests, at most 1 GiB on a CPU and --gpu-memory-utilization on a GPU",
    )
    gpu_memory_utilization: float = flag(
        0.9, "fraction of a GPU's memory to use in total, from 0 to 1", MEMORY, number(0, 1, above=True)
    )
    page_size: int = flag(16, "number of tokens in one KV page", MEMORY, whole(1, 1 << 12, "tokens"))
    device: str = flag("auto", DEVICE_HELP, EXECUTION, choices=("auto", "cpu", "cuda"))
    loop: str = flag(
        "auto",
        "overlapped: deliver tokens and accept requests while the next step runs; plain: between steps; auto: "
        "overlapped on GPUs",
        EXECUTION,
        choices=("auto", "plain", "overlapped"),
    )
    step_timeout: float = flag(
        30.0,
        "seconds that a rank waits for the others before the group ends; at least 5",
        EXECUTION,
        number(5, 86400, "seconds"),
    )
    eager: bool = flag(False, "call every kernel from Python instead of replaying recorded steps; slower", EXECUTION)
    trace: str = flag(
        "", "file for one JSON record per step: load, draft tokens, time and KV pages", EXECUTION, empty="none"
    )

    def __post_init__(self) -> None:
        check_flags(self)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least --max-num-seqs "
                f"({self.max_num_seqs}): every running request needs a row; raise the first or lower the second"
            )
