"""Configuration: the engine's settings (flags are generated from them) and the backbone's shape."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig

from euryale.kernels.linear.quantize import QUANTIZATIONS
from euryale.scheduler.admission import STARVATION_BOUND
from euryale.scheduler.speculation.tree import MAX_NODES

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def flag(default, help: str, choices: tuple[str, ...] | None = None):
    """A dataclass field that becomes a command-line flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What one worker group runs. Every field is a flag of the same name in ``launch/``."""

    model: str = flag("", "directory of the backbone in Hugging Face format")
    medusa: str = flag("", "directory of the Medusa heads (default: those inside --model, if any)")
    tree: str = flag(
        "dynamic",
        "candidate trees: dynamic (made for each step, as large as pays), dynamic:N (always N guesses a request), "
        "static:FILE (JSON paths; static alone: tree.json beside the heads), chain, off",
    )
    max_tree_nodes: int = flag(64, "guesses of one request in a step of dynamic trees, 1 to 127")
    draft_from_text: bool = flag(True, "dynamic trees use the n-grams of calibration text stored beside the heads")
    draft_from_traffic: bool = flag(True, "dynamic trees learn n-grams of what was served lately")
    draft_from_context: bool = flag(True, "dynamic trees learn n-grams of the request's own prompt and answer")
    max_itl: float = flag(
        0.0, "milliseconds that prompts let running streams wait for a token, e.g. 50 (default: no bound)"
    )
    cost_cache: bool = flag(True, "keep the measured cost of steps for the next start on this machine")
    dtype: str = flag("auto", "weights and activations", ("auto", *DTYPES))
    quantization: str = flag(
        "none", "weights of all matrix products: int8, int4, or on GPUs from Hopper on fp8", QUANTIZATIONS
    )
    max_model_len: int = flag(0, "longest prompt plus answer in tokens (default: what the model was made for)")
    max_num_seqs: int = flag(64, "requests decoded at the same time")
    max_num_batched_tokens: int = flag(512, "rows of one step: certain tokens and tree nodes together")
    kv_cache_memory: float = flag(0.0, "GiB of KV cache per rank (default: what the requests can use, at most 1 GiB)")
    enable_prefix_caching: bool = flag(True, "requests that begin alike share KV pages, which are kept for later ones")
    starvation_bound: int = flag(
        STARVATION_BOUND, "steps a request may wait before nobody passes it any more or preempts it again"
    )
    gpu_memory_utilization: float = flag(0.9, "share of a GPU's memory to fill when --kv-cache-memory is not given")
    page_size: int = flag(16, "tokens of one KV-cache page")
    step_timeout: float = flag(30.0, "seconds a rank waits for the others before the group is given up, at least 5")
    device: str = flag("auto", "what to run on; auto: the GPUs if there are any", ("auto", "cpu", "cuda"))
    loop: str = flag(
        "auto",
        "overlapped: answers are delivered and requests taken in while the next step runs; auto: so on GPUs",
        ("auto", "plain", "overlapped"),
    )
    trace: str = flag("", "file to which each step adds a JSON line: load, guesses, what was accepted, time and pages")
    eager: bool = flag(False, "call every kernel from Python instead of replaying recorded steps; slower")

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("--model is missing: give the directory of a model in Hugging Face format")
        for name in ("max_num_seqs", "max_num_batched_tokens", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least --max-num-seqs "
                f"({self.max_num_seqs}): every running request needs a row; raise the one or lower the other"
            )
        if not 1 <= self.max_tree_nodes < MAX_NODES:
            raise ValueError(f"--max-tree-nodes must be from 1 to {MAX_NODES - 1}, not {self.max_tree_nodes}")
        if not 0 <= self.max_itl < 1e9:
            raise ValueError(f"--max-itl is a number of milliseconds, 0 for no bound, not {self.max_itl}")
        if self.max_model_len < 0:
            raise ValueError(
                f"--max-model-len is a number of tokens, 0 for what the model allows, not {self.max_model_len}"
            )
        if not 0 <= self.kv_cache_memory < 1e6:
            raise ValueError(f"--kv-cache-memory is a number of GiB, 0 for the default, not {self.kv_cache_memory}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"--gpu-memory-utilization is a share above 0 and at most 1, not {self.gpu_memory_utilization}"
            )
        if self.starvation_bound < 0:
            raise ValueError(f"--starvation-bound must be at least 0 steps, not {self.starvation_bound}")
        if not self.step_timeout >= 5:
            raise ValueError(f"--step-timeout must be at least 5 seconds, not {self.step_timeout}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone's shape. ``windows``: the sliding window of each layer in tokens, None for full attention.
    ``hf`` is the transformers config it was read from."""

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_positions: int
    tied: bool
    windows: tuple[int | None, ...]
    has_qkv_bias: bool
    has_o_bias: bool
    has_mlp_bias: bool
    dtype: torch.dtype
    hf: object = dataclasses.field(repr=False, compare=False)

    @property
    def has_qk_norm(self) -> bool:
        return self.family == "qwen3"


def load_model_config(directory: str, dtype: str) -> ModelConfig:
    """Read ``config.json``; ValueError for a model this runtime cannot run exactly."""
    if not (Path(directory) / "config.json").is_file():
        raise ValueError(f"{directory} holds no config.json: give the directory of a model in Hugging Face format")
    try:
        hf = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library's errors are of many kinds
        raise ValueError(f"cannot read {directory}/config.json: {error}") from error
    if hf.model_type not in SUPPORTED:
        raise ValueError(f"model_type {hf.model_type!r} is not supported: it must be one of {', '.join(SUPPORTED)}")
    if hf.hidden_act != "silu":
        raise ValueError(f"hidden_act {hf.hidden_act!r} is not supported: it must be 'silu'")
    if getattr(hf, "quantization_config", None):
        raise ValueError("quantized checkpoints are not supported: give float32, float16 or bfloat16 weights")
    num_heads = hf.num_attention_heads
    if min(num_heads, hf.hidden_size, hf.num_hidden_layers, hf.intermediate_size, hf.vocab_size) < 1:
        raise ValueError(f"{directory}/config.json has a size below 1: copy it again")
    biased = bool(getattr(hf, "attention_bias", False))
    return ModelConfig(
        family=hf.model_type,
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_heads=num_heads,
        num_kv_heads=getattr(hf, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // num_heads,
        vocab_size=hf.vocab_size,
        rms_norm_eps=hf.rms_norm_eps,
        max_positions=hf.max_position_embeddings,
        tied=hf.tie_word_embeddings,
        windows=_windows(hf),
        has_qkv_bias=biased or hf.model_type == "qwen2",
        has_o_bias=biased,
        has_mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        dtype=_dtype(hf, dtype),
        hf=hf,
    )


def _windows(hf) -> tuple[int | None, ...]:
    window = getattr(hf, "sliding_window", None)
    types = getattr(hf, "layer_types", None)
    if types is None:
        return (window if hf.model_type == "mistral" else None,) * hf.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _dtype(hf, wanted: str) -> torch.dtype:
    if wanted != "auto":
        return DTYPES[wanted]
    stored = hf.dtype if isinstance(hf.dtype, torch.dtype) else getattr(torch, str(hf.dtype or "float32"))
    # float16's range is too small for some activations; bfloat16 holds what float16 checkpoints were trained with.
    return torch.float32 if stored == torch.float32 else torch.bfloat16
