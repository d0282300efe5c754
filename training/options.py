"""Options of the training commands: one frozen dataclass per command, from which its flags are generated."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from euryale.runtime.config import DTYPES, flag
from euryale.scheduler.speculation.tree import MAX_NODES
from euryale.training.backbone import QUANTIZATIONS
from euryale.training.corpus import HELD_OUT_PERCENT, STANDARD_LIBRARY

SCHEDULES = ("cosine", "constant")
LABELS = ("text", "backbone")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The model, the data and the output."""

    model: str = flag("", "directory of the backbone in Hugging Face format")
    out: str = flag("", "output directory or file")
    data: tuple[str, ...] = flag((), f"JSONL or text files, or {STANDARD_LIBRARY}")
    held_out: tuple[str, ...] = flag((), "files to measure on (default: a part of --data, selected by a hash)")
    held_out_percent: float = flag(HELD_OUT_PERCENT, "percentage of --data to hold out without --held-out")
    seed: int = flag(0, "seed of all random numbers (default: 0)")
    device: str = flag("auto", "device to run on; auto: GPUs if available", ("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        for name in ("model", "out", "data"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        if not 0 <= self.held_out_percent < 100:
            raise ValueError(f"--held-out-percent must be within [0, 100), not {self.held_out_percent}")


@dataclass(frozen=True, kw_only=True)
class PromptOptions(DataOptions):
    """Prompts from the data: the rows' own prompts, or excerpts of running text."""

    num_prompts: int = flag(2048, "maximum number of prompts, evenly spaced in the data")
    prompt_tokens: int = flag(64, "tokens of a prompt taken from running text")
    max_tokens: int = flag(192, "maximum tokens of an answer")
    max_num_seqs: int = flag(32, "answers generated at the same time")
    dtype: str = flag("auto", "weights and activations of the answering engine", ("auto", *DTYPES))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_prompts", "prompt_tokens", "max_tokens", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DistillOptions(PromptOptions):
    """The backbone's own answers as training data (section 2.3.2). --out is a JSONL file."""

    medusa: str = flag("", "Medusa heads that speed up generation; the answers do not depend on them")
    temperature: float = flag(0.0, "sampling temperature; 0: greedy")
    top_k: int = flag(0, "sample from this many most probable tokens; 0: from all")
    top_p: float = flag(1.0, "sample from the most probable tokens with this total probability")
    ignore_eos: bool = flag(False, "continue after end-of-sequence tokens")


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(PromptOptions):
    """Accuracy of the heads, acceptance probabilities of draft tokens, and the best static tree (section 2.3.3).

    They are measured on held-out prompts and the backbone's greedy answers. --out is the directory of tree.json and the
    other results (default: that of the heads).
    """

    heads: str = flag("", "directory of the heads (default: those merged into --model)")
    out: str = flag("", "directory of the results (default: that of the heads)")
    nodes: int = flag(10, "draft tokens of tree.json")
    compare: tuple[str, ...] = flag((), "trees to compare with a searched tree of the same size")
    num_prompts: int = flag(512, "maximum number of held-out prompts, evenly spaced")
    max_tokens: int = flag(128, "maximum tokens of an answer")
    text_windows: int = flag(64, "windows of held-out text to measure accuracy on")
    length: int = flag(1024, "tokens per window of held-out text")

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", self.out or self.heads or self.model)
        super().__post_init__()
        if not 1 <= self.nodes < MAX_NODES or self.num_prompts < 4 or self.text_windows < 1:
            raise ValueError(
                f"--nodes must be between 1 and {MAX_NODES - 1}, --num-prompts at least 4, --text-windows at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOptions):
    """Options of both training methods."""

    num_heads: int = flag(4, "number of Medusa heads")
    num_layers: int = flag(1, "residual blocks per head")
    heads: str = flag("", "start from these heads instead of new ones")
    shared_lm_head: bool = flag(False, "heads use the backbone's lm_head instead of their own")
    labels: str = flag("text", "targets of the heads: the text, or the backbone's argmax", LABELS)
    head_decay: float = flag(0.8, "weight of head k's loss: this to the power of k")
    tokens: float = flag(0.0, "training tokens, with repetitions (default: set by --epochs)")
    epochs: float = flag(1.0, "passes over the data without --tokens")
    length: int = flag(1024, "tokens per window")
    batch: int = flag(4, "windows per batch and rank")
    accumulate: int = flag(1, "batches per optimizer step")
    lr: float = flag(1e-3, "learning rate")
    schedule: str = flag("cosine", "learning rate schedule after the warm-up", SCHEDULES)
    warmup_steps: int = flag(40, "steps of linear learning rate warm-up")
    weight_decay: float = flag(0.0, "weight decay (AdamW)")
    clip: float = flag(1.0, "maximum norm of the gradient")
    precision: str = flag("bfloat16", "dtype of activations; master weights are float32", ("bfloat16", "float32"))
    compile: bool = flag(False, "compile the model (one rank only)")
    checkpoint_steps: int = flag(200, "steps between checkpoints, each with a measurement")
    held_out_windows: int = flag(64, "held-out windows per measurement")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_heads", "length", "batch", "accumulate", "checkpoint_steps", "held_out_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.num_layers < 0 or self.warmup_steps < 0:
            raise ValueError("--num-layers and --warmup-steps must not be negative")
        if not 0 < self.clip < math.inf or not 0 < self.lr < math.inf:
            raise ValueError("--clip and --lr must be above 0")
        if self.shared_lm_head and not self.num_layers:
            raise ValueError("--shared-lm-head needs --num-layers of at least 1: the heads would have no parameters")
        if self.length < self.num_heads + 2:
            raise ValueError(
                f"{self.num_heads} heads look {self.num_heads + 1} tokens ahead and windows have {self.length}: "
                "raise --length or lower --num-heads"
            )
        if self.tokens < 0 or self.epochs <= 0:
            raise ValueError("--tokens must not be negative and --epochs must be above 0")

    def steps(self, num_windows: int, size: int) -> int:
        """Return the optimizer steps of the whole training on ``size`` ranks."""
        windows = self.tokens / self.length if self.tokens else self.epochs * num_windows
        return max(1, math.ceil(windows / self.windows_per_step(size)))

    def windows_per_step(self, size: int) -> int:
        """Return the windows whose gradients make one optimizer step on ``size`` ranks."""
        return self.batch * self.accumulate * size


@dataclass(frozen=True, kw_only=True)
class Medusa1Options(TrainOptions):
    """Training of heads on a frozen backbone (Medusa paper, arXiv 2401.10774, section 2.2.1)."""

    quantize: str = flag("none", "quantization of the frozen backbone's linear layers, to save memory", QUANTIZATIONS)
    cache_hidden_states: bool = flag(False, "compute the backbone's hidden states once and store them on disk")


@dataclass(frozen=True, kw_only=True)
class Medusa2Options(TrainOptions):
    """Joint training of heads and backbone (section 2.2.2), stage two.

    Stage one, the training of the heads alone, runs first unless --heads gives its result.
    """

    stage_one_lr: float = flag(1e-3, "learning rate of stage one, which has as many steps as stage two")
    lr: float = flag(1e-4, "learning rate of the backbone")
    heads_lr_factor: float = flag(4.0, "the heads' learning rate as a multiple of --lr")
    head_weight: float = flag(0.2, "weight of the heads' loss relative to the backbone's")
    head_warmup_steps: int = flag(100, "steps in which --head-weight rises from 0")
    lora_rank: int = flag(0, "train LoRA adapters of this rank instead of all weights")
    self_distill: bool = flag(False, "train the backbone on its own distribution without adapters instead of the text")
    gradient_checkpointing: bool = flag(False, "recompute activations instead of storing them")
    save_adapters: bool = flag(False, "also write the adapters alone")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank < 0:
            raise ValueError(f"--lora-rank must be at least 0, not {self.lora_rank}")
        if (self.self_distill or self.save_adapters) and not self.lora_rank:
            raise ValueError("--self-distill and --save-adapters need adapters: give --lora-rank")

    def stage_one(self) -> Medusa1Options:
        """Return the options of stage one, whose output is a subdirectory of --out."""
        common = {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainOptions)}
        return Medusa1Options(**common | {"lr": self.stage_one_lr, "out": str(Path(self.out, "stage-one"))})


# Options that do not affect the result, or only through ``windows_per_step``.
_NO_EFFECT: tuple[str, ...] = (
    "device",
    "out",
    "checkpoint_steps",
    "held_out_windows",
    "batch",
    "accumulate",
    "compile",
    "medusa",
)
_NO_EFFECT += ("gradient_checkpointing", "max_num_seqs", "cache_hidden_states")


def changed(settings: dict, saved: dict) -> list[str]:
    """Return the flags whose value differs from ``saved``, read from JSON, and affects the result."""
    now = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    differing = [name for name, value in now.items() if name not in _NO_EFFECT and saved.get(name, value) != value]
    named = {"windows_per_step": "--batch times --accumulate times ranks"}
    return [named.get(name, f"--{name.replace('_', '-')}") for name in differing]
