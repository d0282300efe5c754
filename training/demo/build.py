"""Build of the whole demo checkpoint: backbone, Medusa-1, Medusa-2, calibrated tree, model card.

A stage whose output exists in ``DIR/work`` is skipped, and an interrupted stage continues from its last checkpoint when
the command is repeated. ``DIR/work`` is not part of the result and can be removed.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from euryale.client.rules import number, whole
from euryale.parallel.group import Group
from euryale.scheduler.flag import check_flags, flag
from euryale.scheduler.speculation.tree import MAX_NODES
from euryale.training import calibrate, medusa1, medusa2
from euryale.training.corpus import STANDARD_LIBRARY
from euryale.training.demo import model_card, pretrain
from euryale.training.demo.pretrain import OUTPUT, SHAPE, WIDTH, PretrainOptions
from euryale.training.options import (
    COUNT,
    COUNT_OR_NONE,
    EXECUTION,
    HEADS,
    TOKENS,
    TRAINING,
    CalibrateOptions,
    Medusa1Options,
    Medusa2Options,
)

MAX_BYTES = 24_000_000
COPIED = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "tree.json",
    "calibration.json",
    "ngrams.safetensors",
    "tree.png",
    "accuracy.png",
)
GENERATED = ("generation_config.json", "README.md")


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The demo checkpoint, built from the standard library's source. The defaults build the committed one."""

    out: str = flag("", "directory of the checkpoint", OUTPUT, required=True)
    vocab_size: int = flag(
        PretrainOptions.vocab_size, "tokens of the byte-level BPE vocabulary", SHAPE, whole(257, 1 << 20, "tokens")
    )
    hidden_size: int = flag(PretrainOptions.hidden_size, "width of the backbone", SHAPE, WIDTH)
    num_layers: int = flag(PretrainOptions.num_layers, "decoder layers", SHAPE, whole(1, 1 << 10, "layers"))
    tokens: float = flag(
        PretrainOptions.tokens, "tokens of the backbone's training", TRAINING, number(1, 1e15, "tokens")
    )
    polish_steps: int = flag(
        PretrainOptions.polish_steps,
        "final steps in which every second batch holds prompt-like text",
        TRAINING,
        COUNT_OR_NONE,
    )
    heads_tokens: float = flag(1.5e6, "tokens of Medusa-1", TRAINING, number(1, 1e15, "tokens"))
    joint_tokens: float = flag(1.2e6, "tokens of Medusa-2", TRAINING, number(1, 1e15, "tokens"))
    length: int = flag(512, "tokens per window of both", TRAINING, TOKENS)
    batch: int = flag(8, "windows per step of all trainings", TRAINING, COUNT)
    num_heads: int = flag(4, "Medusa heads; they share the backbone's lm_head", HEADS, whole(1, 64, "heads"))
    head_layers: int = flag(2, "residual blocks of a head", HEADS, whole(1, 64, "blocks"))
    draft_tokens: int = flag(5, "number of draft tokens of tree.json", HEADS, whole(1, MAX_NODES - 1))
    calibration_prompts: int = flag(
        CalibrateOptions.num_prompts, "held-out prompts on which the tree is searched", HEADS, whole(4, 2**31 - 1)
    )
    compile: bool = flag(True, "compile the model", EXECUTION)

    def __post_init__(self) -> None:
        check_flags(self)

    @property
    def work(self) -> Path:
        """Directory of the stages' output."""
        return Path(self.out, "work")

    def for_backbone(self) -> PretrainOptions:
        """Return the options of the backbone's training."""
        names = ("vocab_size", "hidden_size", "num_layers", "tokens", "polish_steps", "batch", "compile")
        shared = {name: getattr(self, name) for name in names}
        return PretrainOptions(out=str(self.work / "backbone"), length=2 * self.length, **shared)

    def _from_backbone(self, out: str) -> dict[str, Any]:
        return {"model": str(self.work / "backbone"), "out": str(self.work / out)}

    def _training(self) -> dict[str, Any]:
        names = ("length", "batch", "num_heads", "compile")
        of_heads = {"num_layers": self.head_layers, "shared_lm_head": True}
        return {"data": (STANDARD_LIBRARY,)} | of_heads | {name: getattr(self, name) for name in names}

    def for_heads(self) -> Medusa1Options:
        """Return the options of Medusa-1."""
        return Medusa1Options(**self._from_backbone("heads"), **self._training(), tokens=self.heads_tokens, lr=3e-3)

    def for_joint(self) -> Medusa2Options:
        """Return the options of Medusa-2."""
        fields = self._from_backbone("joint") | self._training()
        return Medusa2Options(**fields, tokens=self.joint_tokens, lr=3e-4, heads=self.for_heads().out)

    def for_tree(self) -> CalibrateOptions:
        """Return the options of the calibration."""
        joint = self.for_joint().out
        return CalibrateOptions(
            model=joint,
            data=(STANDARD_LIBRARY,),
            dtype="float32",
            draft_tokens=self.draft_tokens,
            num_prompts=self.calibration_prompts,
            length=self.length,
        )

    def command(self) -> str:
        """Return the command that reproduces the build."""
        default = DemoOptions(out=self.out)
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("out", "compile")]
        changed = [n for n in names if getattr(self, n) != getattr(default, n)]
        return " ".join(
            ["python launch/train.py demo --out DIR", *(f"--{n.replace('_', '-')} {getattr(self, n)}" for n in changed)]
        )


def assemble(args: DemoOptions) -> None:
    """Copy the result from ``work`` and add the generation defaults and the model card."""
    out, joint = Path(args.out), Path(args.for_joint().out)
    for name in COPIED:
        shutil.copyfile(joint / name, out / name)
    config = json.loads((out / "config.json").read_text())
    end = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    generation = json.dumps(end | model_card.SAMPLING, indent=2)
    (out / "generation_config.json").write_text(generation + "\n")
    if not (out / "README.md").exists():
        trainings = {
            "backbone": (args.for_backbone(), "Muon (matrices), AdamW (embedding, norms)"),
            "heads, backbone frozen (Medusa-1)": (args.for_heads(), "AdamW"),
            "heads and backbone (Medusa-2)": (args.for_joint(), "AdamW"),
        }
        card = model_card.write(out, args.work / "backbone", trainings, args.command())
        (out / "README.md").write_text(card)


def check_size(directory: Path) -> int:
    """Return the bytes of the finished checkpoint. ValueError if a file is missing or the total exceeds MAX_BYTES."""
    names = (*COPIED, *GENERATED)
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise ValueError(f"{directory} is incomplete, {', '.join(missing)} missing: run the command again")
    size = sum((directory / name).stat().st_size for name in names)
    if size > MAX_BYTES:
        raise ValueError(f"{directory} has {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}: lower the sizes")
    return size


def run(args: DemoOptions, group: Group) -> dict:
    """Run the stages without output and return the directory and size of the result."""
    work = args.work
    stages: tuple[tuple[Path, Callable[[], object]], ...] = (
        (work / "backbone" / "model.safetensors", lambda: pretrain.run(args.for_backbone(), group)),
        (work / "heads" / "report.json", lambda: medusa1.run(args.for_heads(), group)),
        (work / "joint" / "report.json", lambda: medusa2.run(args.for_joint(), group)),
        (work / "joint" / "tree.json", lambda: calibrate.run(args.for_tree(), group)),
    )
    for result, run_stage in stages:
        if not result.exists():
            run_stage()
            result.touch()
    assemble(args)
    return {"out": args.out, "megabytes": round(check_size(Path(args.out)) / 1e6, 1)}
