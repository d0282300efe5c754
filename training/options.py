"""Settings of the training commands: one frozen dataclass per command, from which its flags are generated."""

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
    """Which model, on what, and where to."""

    model: str = flag("", "directory of the backbone in Hugging Face format")
    out: str = flag("", "where the result goes")
    data: tuple[str, ...] = flag((), f"JSONL or text files, or {STANDARD_LIBRARY}")
    held_out: tuple[str, ...] = flag((), "files to measure on (default: a part of --data, told apart by a hash)")
    held_out_percent: float = flag(HELD_OUT_PERCENT, "share of --data that is held out when --held-out is not given")
    seed: int = flag(0, "everything that is drawn depends on it (default: 0)")
    device: str = flag("auto", "what to run on; auto: the GPUs if there are any", ("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        for name in ("model", "out", "data"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        if not 0 <= self.held_out_percent < 100:
            raise ValueError(f"--held-out-percent must be within [0, 100), not {self.held_out_percent}")


@dataclass(frozen=True, kw_only=True)
class PromptOptions(DataOptions):
    """Prompts from the data: a row's own, or pieces of running text."""

    num_prompts: int = flag(2048, "at most so many prompts, evenly spaced in the data")
    prompt_tokens: int = flag(64, "tokens of a prompt that is a piece of running text")
    max_tokens: int = flag(192, "longest answer")
    max_num_seqs: int = flag(32, "answers written at the same time")
    dtype: str = flag("auto", "weights and activations of the engine that answers", ("auto", *DTYPES))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_prompts", "prompt_tokens", "max_tokens", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DistillOptions(PromptOptions):
    """The backbone's own answers as training data (section 2.3.2). --out is a JSONL file."""

    medusa: str = flag("", "Medusa heads to write faster with; the answers do not depend on them")
    temperature: float = flag(0.0, "0 is greedy")
    top_k: int = flag(0, "draw from so many likeliest tokens; 0: from all")
    top_p: float = flag(1.0, "draw from the likeliest tokens of this probability together")
    ignore_eos: bool = flag(False, "go on after end-of-sequence tokens")


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(PromptOptions):
    """Accuracy of heads, acceptance probabilities of draft tokens and the best static tree (section 2.3.3), on held-out
    prompts and the backbone's greedy answers to them. --out is where tree.json and its companions go (default: beside
    the heads)."""

    heads: str = flag("", "directory of the heads (default: those merged into --model)")
    out: str = flag("", "directory of the results (default: that of the heads)")
    nodes: int = flag(10, "guesses of tree.json, the root not counted")
    compare: tuple[str, ...] = flag((), "trees to compare with the searched one of the same number of guesses")
    num_prompts: int = flag(512, "at most so many held-out prompts, evenly spaced")
    max_tokens: int = flag(128, "longest answer")
    text_windows: int = flag(64, "windows of held-out text on which accuracy is measured too")
    length: int = flag(1024, "tokens of such a window")

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", self.out or self.heads or self.model)
        super().__post_init__()
        if not 1 <= self.nodes < MAX_NODES or self.num_prompts < 4 or self.text_windows < 1:
            raise ValueError(
                f"--nodes must be between 1 and {MAX_NODES - 1}, --num-prompts at least 4, --text-windows at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOptions):
    """What both methods share."""

    num_heads: int = flag(4, "Medusa heads")
    num_layers: int = flag(1, "residual blocks of each head")
    heads: str = flag("", "start from these heads instead of fresh ones")
    shared_lm_head: bool = flag(False, "heads use the backbone's lm_head instead of one of their own each")
    labels: str = flag("text", "what heads learn: the text, or what the backbone would say there", LABELS)
    head_decay: float = flag(0.8, "the weight of head k's loss is this to the power of k")
    tokens: float = flag(0.0, "tokens to train on, repetitions counted (default: what --epochs makes)")
    epochs: float = flag(1.0, "how often every window is seen when --tokens is not given")
    length: int = flag(1024, "tokens of a window")
    batch: int = flag(4, "windows of a step on one rank")
    accumulate: int = flag(1, "batches whose gradients make one optimizer step")
    lr: float = flag(1e-3, "learning rate")
    schedule: str = flag("cosine", "learning rate after the warm-up", SCHEDULES)
    warmup_steps: int = flag(40, "steps in which the learning rate rises")
    weight_decay: float = flag(0.0, "weight decay (AdamW)")
    clip: float = flag(1.0, "largest norm of the gradient")
    precision: str = flag("bfloat16", "of activations; master weights are float32", ("bfloat16", "float32"))
    compile: bool = flag(False, "compile the model (one rank only)")
    checkpoint_steps: int = flag(200, "steps between two checkpoints and measurements")
    held_out_windows: int = flag(64, "held-out windows measured at a checkpoint")

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
            raise ValueError("--shared-lm-head needs --num-layers of at least 1: nothing else would be learned")
        if self.length < self.num_heads + 2:
            raise ValueError(
                f"{self.num_heads} heads look {self.num_heads + 1} tokens ahead and windows have {self.length}: "
                "raise --length or lower --num-heads"
            )
        if self.tokens < 0 or self.epochs <= 0:
            raise ValueError("--tokens must not be negative and --epochs must be above 0")

    def steps(self, num_windows: int, size: int) -> int:
        """Optimizer steps of the whole training on ``size`` ranks."""
        windows = self.tokens / self.length if self.tokens else self.epochs * num_windows
        return max(1, math.ceil(windows / self.windows_per_step(size)))

    def windows_per_step(self, size: int) -> int:
        """Windows whose gradients make one optimizer step on ``size`` ranks."""
        return self.batch * self.accumulate * size


@dataclass(frozen=True, kw_only=True)
class Medusa1Options(TrainOptions):
    """Heads on a frozen backbone (Medusa paper, arXiv 2401.10774, section 2.2.1)."""

    quantize: str = flag("none", "the frozen backbone's linear weights, to save memory", QUANTIZATIONS)
    cache_hidden_states: bool = flag(False, "compute the backbone once and keep its hidden states on disk")


@dataclass(frozen=True, kw_only=True)
class Medusa2Options(TrainOptions):
    """Heads and backbone together (section 2.2.2), stage two; stage one, the heads alone, comes first unless --heads
    brings its result."""

    stage_one_lr: float = flag(1e-3, "learning rate of stage one, which is as long as stage two")
    lr: float = flag(1e-4, "learning rate of the backbone")
    heads_lr_factor: float = flag(4.0, "the heads' learning rate, in that of the backbone")
    head_weight: float = flag(0.2, "weight of the heads' loss beside the backbone's")
    head_warmup_steps: int = flag(100, "steps in which that weight rises from 0")
    lora_rank: int = flag(0, "train LoRA adapters of this rank instead of all weights")
    self_distill: bool = flag(False, "teach the backbone what it says without adapters instead of the text")
    gradient_checkpointing: bool = flag(False, "compute activations twice instead of keeping them")
    save_adapters: bool = flag(False, "write the adapters by themselves too")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank < 0:
            raise ValueError(f"--lora-rank must not be negative, not {self.lora_rank}")
        if (self.self_distill or self.save_adapters) and not self.lora_rank:
            raise ValueError(
                "--self-distill and --save-adapters need --lora-rank: the teacher is the model without them"
            )

    def stage_one(self) -> Medusa1Options:
        """The same training of the heads alone, beside the result."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainOptions)}
        return Medusa1Options(**shared | {"lr": self.stage_one_lr, "out": str(Path(self.out, "stage-one"))})


# Settings that change no result, or only one that ``windows_per_step`` stands for.
_FREE = ("device", "out", "checkpoint_steps", "held_out_windows", "batch", "accumulate", "compile", "medusa")
_FREE += ("gradient_checkpointing", "max_num_seqs", "cache_hidden_states")


def changed(settings: dict, saved: dict) -> list[str]:
    """Flags whose ``saved`` value, read from JSON, is another one and means another result."""
    now = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    differing = [name for name, value in now.items() if name not in _FREE and saved.get(name, value) != value]
    named = {"windows_per_step": "--batch times --accumulate times ranks"}
    return [named.get(name, f"--{name.replace('_', '-')}") for name in differing]
