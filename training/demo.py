"""Rebuild the whole demo checkpoint: backbone, Medusa heads, calibrated tree, model card.

``python -m euryale.training.demo --out DIR``. A stage whose output is already in DIR is skipped, and a killed one
goes on at its last checkpoint when the same command is given again. ``DIR/work`` holds these checkpoints and is
no part of the result: remove it when all is done.
"""

import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from euryale.training import calibrate, corpus, heads, pretrain
from euryale.training.calibrate import CalibrateOptions
from euryale.training.heads import HeadsOptions
from euryale.training.pretrain import PretrainOptions

MAX_BYTES = 24_000_000
HEADS_FILE = f"medusa/{heads.WEIGHTS_NAME}"
TREE_FILES = ("medusa/tree.json", "medusa/calibration.json")
RESULT = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "medusa/config.json",
    HEADS_FILE,
    *TREE_FILES,
)
_SAMPLE_PROMPTS = ("def ", "class ", "import ")
# Greedy answers of so small a model soon repeat themselves; drawn ones read better.
_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}

_CARD = """---
license: psf-2.0
---
# Euryale demo: a small Python model with Medusa heads

A Llama-architecture model and {num_heads} Medusa heads (arXiv 2401.10774), small enough to be kept beside the code
that serves them, so that tree decoding can be seen with real text on any machine. Made by Euryale's own `training/`.

**Limits.** A toy: it writes text that looks like Python and means nothing. Do not run what it writes, and do not
judge models of useful size by its numbers.

## Data and licence

The source of Python {python}'s standard library, as installed with the interpreter: {train_files} files for training
and {held_files} held out ({held_tokens} tokens), told apart by a hash of the file's name. That source is Copyright (c)
2001 Python Software Foundation; All Rights Reserved, under the PSF License Version 2. As the model can repeat pieces
of it, the checkpoint is offered under the same PSF License Version 2. The code that made it is Apache-2.0.

## Sizes

{sizes}

Context: {context} tokens. Byte-level BPE; id 0 is the end-of-text token and begins every file.

## Training

{training}

In the last {polish_steps} steps of the backbone every other batch shows beginnings: text from a top-level `def`,
`class` or `import` on, half of it cut into tokens as a prompt that ends in a blank is.

The heads learn what the backbone itself would say (self-distillation, section 2.3.2 of the paper): their labels are
its greedy choices, two thirds of the steps on {num_answers} answers it wrote to pieces of the training files, one
third on these files.

Held-out loss of the backbone, over all held-out text: **{loss:.3f} nats per token**, {bits_per_byte:.3f} bits per byte.

## Heads and tree

{heads}
## Completions

Drawn at temperature 0.7 and top-p 0.95, the defaults in `generation_config.json` (seed 1 of PyTorch's generator).

{samples}

## Rebuild

    {command}

on a CPU, with Python {python}: another version of Python means other text and other numbers.
"""
_HEADS = """A greedy step accepts a guess when it is what the backbone would have written, so the heads are judged on
greedy continuations of held-out prompts ({num_positions} positions), and against the held-out text itself
({num_text_positions} positions). Top-n: the token is among the head's n likeliest.

{accuracy_table}

`medusa/tree.json` holds {tree[nodes]} guesses and emits **{tree[tokens_per_step]:.2f} tokens per step** (plain
decoding: 1). Below, trees of other sizes, searched on {num_searched_positions} of these positions and measured on the
other {num_measured_positions}. "Expected" averages over all positions instead of those a decoder stops at, and
"independent" is a tree of that size searched as if the heads were independent.

{tree_table}
"""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The command's flags; those of a stage keep the meaning they have there. The defaults make the demo."""

    out: Path
    vocab_size: int = PretrainOptions.vocab_size
    hidden_size: int = PretrainOptions.hidden_size
    num_layers: int = PretrainOptions.num_layers
    tokens: float = PretrainOptions.tokens
    polish_steps: int = PretrainOptions.polish_steps
    batch: int = PretrainOptions.batch
    length: int = PretrainOptions.length
    answers: int = HeadsOptions.answers
    heads_tokens: float = HeadsOptions.tokens
    heads_batch: int = HeadsOptions.batch
    num_heads: int = HeadsOptions.num_heads
    nodes: int = CalibrateOptions.nodes
    prompts: int = CalibrateOptions.prompts
    new_tokens: int = CalibrateOptions.new_tokens
    compile: bool = PretrainOptions.compile

    def for_backbone(self) -> PretrainOptions:
        names = (
            "out",
            "vocab_size",
            "hidden_size",
            "num_layers",
            "tokens",
            "polish_steps",
            "batch",
            "length",
            "compile",
        )
        return PretrainOptions(**{name: getattr(self, name) for name in names})

    def for_heads(self) -> HeadsOptions:
        return HeadsOptions(
            model=self.out,
            num_heads=self.num_heads,
            answers=self.answers,
            tokens=self.heads_tokens,
            batch=self.heads_batch,
            compile=self.compile,
        )

    def for_tree(self) -> CalibrateOptions:
        return CalibrateOptions(model=self.out, nodes=self.nodes, prompts=self.prompts, new_tokens=self.new_tokens)

    def command(self) -> str:
        """The command line that repeats this."""
        default = DemoOptions(out=self.out)
        flags = [n for n in self.__dataclass_fields__ if n != "out" and getattr(self, n) != getattr(default, n)]
        shown = [f"--{n.replace('_', '-')} {getattr(self, n)}" for n in flags if n != "compile"]
        return " ".join(["python -m euryale.training.demo --out DIR", *shown])


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def samples(backbone: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, new_tokens: int = 80) -> str:
    """Completions drawn as the generation config says, as Markdown code blocks."""
    blocks = []
    for prompt in _SAMPLE_PROMPTS:
        torch.manual_seed(1)
        tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
        options = {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0, **_SAMPLING}
        written = backbone.generate(tokens, max_new_tokens=new_tokens, **options)[0].tolist()
        end = written.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in written else len(written)
        blocks.append(f"```python\n{tokenizer.decode(written[:end])}\n```")
    return "\n\n".join(blocks)


def held_out_numbers(backbone: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, length: int) -> dict:
    """Loss of the written checkpoint (bfloat16 weights) on held-out files and what they weigh."""
    train_files, held_files = corpus.split(corpus.standard_library_files())
    stream = corpus.token_stream(tokenizer, held_files)
    loss = pretrain.held_out_loss(backbone, stream, length, limit=len(stream))
    held_bytes = sum(len(corpus.read(path).encode()) for path in held_files)
    return {
        "train_files": len(train_files),
        "held_files": len(held_files),
        "loss": loss,
        "bits_per_byte": loss / math.log(2) * len(stream) / held_bytes,
        "held_tokens": len(stream),
    }


def heads_section(calibration: dict) -> str:
    """Accuracies of the heads and what trees make of them."""
    accuracies = []
    for k, (own, text) in enumerate(zip(calibration["accuracy"], calibration["text_accuracy"], strict=True)):
        for what, values in (("own continuation", own), ("held-out text", text)):
            top = [sum(values[:n]) for n in range(1, 6)]
            accuracies.append([f"{k} (token t+{k + 2})", what, *(f"{100 * value:.1f} %" for value in top)])
    columns = ("tokens_per_step", "expected", "independent")
    trees = [[str(row["nodes"]), *(f"{row[name]:.2f}" for name in columns)] for row in calibration["trees"]]
    return _HEADS.format(
        accuracy_table=table(["head", "judged on", "top-1", "top-2", "top-3", "top-4", "top-5"], accuracies),
        tree_table=table(["guesses", "tokens per step", "expected", "independent"], trees),
        **calibration,
    )


def sizes_table(args: DemoOptions, backbone: LlamaForCausalLM) -> str:
    """Parameters and files of the backbone and the heads."""
    with safe_open(args.out / HEADS_FILE, "pt") as file:
        head_parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    shape = backbone.config
    body = f"{shape.num_hidden_layers} layers, hidden {shape.hidden_size}, vocabulary {shape.vocab_size}"
    rows = [
        (f"backbone: {body}, tied embeddings", backbone.num_parameters(), "model.safetensors"),
        (f"heads: {args.num_heads}, each 1 residual block and its own lm_head", head_parameters, HEADS_FILE),
    ]
    cells = [[what, f"{n / 1e6:.2f} M", f"{(args.out / file).stat().st_size / 1e6:.1f} MB"] for what, n, file in rows]
    return table(["", "parameters", "file (bfloat16)"], cells)


def training_table(args: DemoOptions) -> str:
    """Steps, tokens and optimizers of both trainings."""
    rows = [
        ("backbone", args.for_backbone(), "Muon (matrices), AdamW (embedding, norms)"),
        ("heads, backbone frozen (Medusa-1)", args.for_heads(), "Muon (blocks), AdamW (lm_heads, biases)"),
    ]
    cells = [[what, str(o.steps), f"{o.steps * o.batch * o.length / 1e6:.2f} M", name] for what, o, name in rows]
    return table(["", "steps", "tokens, repetitions counted", "optimizer"], cells)


def model_card(args: DemoOptions) -> str:
    """The README of the checkpoint in ``args.out``; measures its loss and writes samples of its text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    backbone = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    return _CARD.format(
        python=platform.python_version(),
        num_heads=args.num_heads,
        num_answers=args.answers,
        polish_steps=args.polish_steps,
        context=backbone.config.max_position_embeddings,
        sizes=sizes_table(args, backbone),
        training=training_table(args),
        heads=heads_section(json.loads((args.out / "medusa/calibration.json").read_text())),
        samples=samples(backbone, tokenizer),
        command=args.command(),
        **held_out_numbers(backbone, tokenizer, args.length),
    )


def check_size(directory: Path) -> int:
    """Bytes of the finished checkpoint; ValueError if a file is missing or it is too large to be committed."""
    if missing := [name for name in RESULT if not (directory / name).is_file()]:
        raise ValueError(f"{directory} is incomplete, {', '.join(missing)} missing: run the command again")
    size = sum((directory / name).stat().st_size for name in RESULT)
    if size > MAX_BYTES:
        raise ValueError(f"{directory} weighs {size / 1e6:.1f} MB, more than {MAX_BYTES / 1e6:.0f}: lower the sizes")
    return size


def run(args: DemoOptions) -> int:
    """Run the stages whose output is missing; returns the bytes of the result."""
    out = args.out
    if not (out / "model.safetensors").exists():
        pretrain.run(args.for_backbone())
    if not (out / HEADS_FILE).exists():
        heads.run(args.for_heads())
    if not all((out / name).exists() for name in TREE_FILES):
        calibrate.run(args.for_tree())
    generation = {"bos_token_id": 0, "eos_token_id": 0, **_SAMPLING}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for name in ("model.safetensors", HEADS_FILE):
        (out / name).chmod(0o644)  # some writers leave them to their owner alone
    if not (out / "README.md").exists():
        (out / "README.md").write_text(model_card(args))
    size = check_size(out)
    print(json.dumps({"out": str(out), "megabytes": round(size / 1e6, 1)}))
    return size


if __name__ == "__main__":
    run(pretrain.options_from_flags(DemoOptions, __doc__))
