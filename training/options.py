"""Options of the training commands: one frozen dataclass per command, from which its flags are generated."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from euryale.client.params import RULES
from euryale.client.rules import Rule, number, whole
from euryale.runtime.config import DEVICE_HELP, MODEL_HELP
from euryale.runtime.model.config import DTYPES
from euryale.scheduler.flag import check_flags, flag
from euryale.scheduler.speculation.tree import MAX_NODES
from euryale.training.backbone import QUANTIZATIONS
from euryale.training.corpus import HELD_OUT_PERCENT, STANDARD_LIBRARY

SCHEDULES = ("cosine", "constant")
LABELS = ("text", "backbone")


DATA, PROMPTS, SAMPLING, HEADS = "model and data", "prompts and answers", "sampling", "Medusa heads"
TRAINING, BACKBONE, MEASURING = "training", "backbone", "measuring"
EXECUTION = "execution"
COUNT = whole(1, 2**31 - 1)
COUNT_OR_NONE = whole(0, 2**31 - 1)
TOKENS = whole(1, 1 << 20, "tokens")
RATE = number(0, 1e38, above=True)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The model, the data and the output."""

    model: str = flag("", MODEL_HELP, DATA, required=True)
    out: str = flag("", "directory of the result", DATA, required=True)
    data: tuple[str, ...] = flag((), f"JSONL or text files, or {STANDARD_LIBRARY}", DATA, required=True)
    held_out: tuple[str, ...] = flag(
        (), "files to measure on", DATA, empty="a part of --data, chosen by a hash of each document"
    )
    held_out_percent: float = flag(
        HELD_OUT_PERCENT,
        "percent of --data to hold out when --held-out is not given",
        DATA,
        Rule("a number from 0 to below 100", lambda v: number(0, 100).fits(v) and v != 100),
    )
    seed: int = flag(0, "random seed", EXECUTION, whole(0, 2**63 - 1))
    device: str = flag("auto", DEVICE_HELP, EXECUTION, choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        check_flags(self)


@dataclass(frozen=True, kw_only=True)
class PromptOptions(DataOptions):
    """Prompts from the data: the rows' own prompts, or excerpts of running text."""

    num_prompts: int = flag(2048, "maximum number of prompts, evenly spaced in the data", PROMPTS, COUNT)
    prompt_tokens: int = flag(64, "tokens of a prompt that is a piece of running text", PROMPTS, TOKENS)
    max_tokens: int = flag(192, "maximum number of tokens of an answer", PROMPTS, TOKENS)
    max_num_seqs: int = flag(32, "number of answers generated at the same time", PROMPTS, whole(1, 1 << 16, "answers"))
    dtype: str = flag(
        "auto",
        "dtype of weights and activations; auto: as stored, float16 as bfloat16",
        EXECUTION,
        choices=("auto", *DTYPES),
    )


@dataclass(frozen=True, kw_only=True)
class DistillOptions(PromptOptions):
    """The backbone's own answers as training data (section 2.3.2). --out is a JSONL file."""

    out: str = flag("", "JSONL file of the answers", DATA, required=True)
    medusa: str = flag(
        "",
        "directory of Medusa heads that make writing faster and change no answer",
        DATA,
        empty="those merged into --model, if any",
    )
    temperature: float = flag(
        0.0, "sampling temperature, from 0.001 to 100", SAMPLING, RULES["temperature"], empty="greedy"
    )
    top_k: int = flag(0, "sample from this many of the likeliest tokens", SAMPLING, RULES["top_k"], empty="from all")
    top_p: float = flag(
        1.0,
        "sample from the likeliest tokens with this total probability",
        SAMPLING,
        RULES["top_p"],
        empty="from all",
    )
    ignore_eos: bool = flag(False, "continue after end-of-sequence tokens", SAMPLING)


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(PromptOptions):
    """Accuracy of the heads, acceptance probabilities of draft tokens, and the best static tree (section 2.3.3).

    They are measured on held-out prompts and the backbone's greedy answers. --out is the directory of tree.json and the
    other results (default: that of the heads).
    """

    heads: str = flag("", "directory of the heads", DATA, empty="those merged into --model")
    out: str = flag("", "directory of the results", DATA, empty="that of the heads")
    draft_tokens: int = flag(10, "number of draft tokens of tree.json", MEASURING, whole(1, MAX_NODES - 1))
    compare: tuple[str, ...] = flag(
        (), "tree files to compare with the best tree of the same size", MEASURING, empty="none"
    )
    num_prompts: int = flag(512, "maximum number of held-out prompts, evenly spaced", PROMPTS, whole(4, 2**31 - 1))
    max_tokens: int = flag(128, "maximum number of tokens of an answer", PROMPTS, TOKENS)
    text_windows: int = flag(64, "windows of held-out text on which accuracy is measured too", MEASURING, COUNT)
    length: int = flag(1024, "tokens per window of that text", MEASURING, TOKENS)

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", self.out or self.heads or self.model)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class TrainOptions(DataOptions):
    """Options of both training methods."""

    num_heads: int = flag(4, "Medusa heads", HEADS, whole(1, 64, "heads"))
    num_layers: int = flag(1, "residual blocks of each head", HEADS, whole(0, 64, "blocks"))
    heads: str = flag("", "directory of the heads to start from", HEADS, empty="fresh ones")
    shared_lm_head: bool = flag(False, "heads use the backbone's lm_head instead of one of their own each", HEADS)
    labels: str = flag("text", "targets of the heads: the text, or the backbone's own choices", HEADS, choices=LABELS)
    head_decay: float = flag(
        0.8, "weight of a head's loss relative to the head before", HEADS, number(0, 1, above=True)
    )
    tokens: float = flag(
        0.0,
        "tokens to train on, with repetitions",
        TRAINING,
        number(0, 1e15, "tokens"),
        empty="as set by --epochs",
    )
    epochs: float = flag(
        1.0, "number of passes over the data when --tokens is not given", TRAINING, number(0, 1e6, above=True)
    )
    length: int = flag(1024, "tokens per window", TRAINING, TOKENS)
    batch: int = flag(4, "windows per batch on one rank", TRAINING, COUNT)
    accumulate: int = flag(1, "batches whose gradients make one optimizer step", TRAINING, COUNT)
    lr: float = flag(1e-3, "learning rate", TRAINING, RATE)
    schedule: str = flag("cosine", "learning rate after the warm-up", TRAINING, choices=SCHEDULES)
    warmup_steps: int = flag(40, "steps in which the learning rate rises from 0", TRAINING, COUNT_OR_NONE)
    weight_decay: float = flag(0.0, "weight decay of AdamW", TRAINING, number(0, 1e3), empty="none")
    clip: float = flag(1.0, "maximum norm of the gradient", TRAINING, number(0, 1e9, above=True))
    precision: str = flag(
        "bfloat16", "dtype of activations; master weights are float32", EXECUTION, choices=("bfloat16", "float32")
    )
    compile: bool = flag(False, "compile the model; one rank only", EXECUTION)
    checkpoint_steps: int = flag(200, "steps between two checkpoints and measurements", MEASURING, COUNT)
    held_out_windows: int = flag(64, "held-out windows measured at a checkpoint", MEASURING, COUNT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shared_lm_head and not self.num_layers:
            raise ValueError("--shared-lm-head needs --num-layers of at least 1: the heads would have no parameters")
        if self.length < self.num_heads + 2:
            raise ValueError(
                f"{self.num_heads} heads look {self.num_heads + 1} tokens ahead and windows have {self.length}: "
                "raise --length or lower --num-heads"
            )

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

    quantization: str = flag(
        "none", "format of the frozen backbone's linear weights, to save memory", BACKBONE, choices=QUANTIZATIONS
    )
    cache_hidden_states: bool = flag(False, "compute the backbone once and keep its hidden states on disk", BACKBONE)


@dataclass(frozen=True, kw_only=True)
class Medusa2Options(TrainOptions):
    """Joint training of heads and backbone (section 2.2.2), stage two.

    Stage one, the training of the heads alone, runs first unless --heads gives its result.
    """

    stage_one_lr: float = flag(1e-3, "learning rate of stage one, which is as long as stage two", TRAINING, RATE)
    lr: float = flag(1e-4, "learning rate of the backbone", TRAINING, RATE)
    heads_lr_factor: float = flag(4.0, "learning rate of the heads, as a multiple of --lr", TRAINING, RATE)
    head_weight: float = flag(0.2, "weight of the heads' loss beside the backbone's", HEADS, number(0, 1e3))
    head_warmup_steps: int = flag(100, "steps in which that weight rises from 0", HEADS, COUNT_OR_NONE)
    lora_rank: int = flag(
        0, "rank of LoRA adapters to train instead of all weights", BACKBONE, COUNT_OR_NONE, empty="all weights"
    )
    self_distill: bool = flag(
        False,
        "train the backbone towards its own output without adapters (KL divergence) instead of the text",
        BACKBONE,
    )
    gradient_checkpointing: bool = flag(False, "recompute activations instead of storing them", EXECUTION)
    save_adapters: bool = flag(False, "write the adapters to a folder of their own too", BACKBONE)

    def __post_init__(self) -> None:
        super().__post_init__()
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
