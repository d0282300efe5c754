"""The demo checkpoint's README: data, licence, sizes, losses, heads, tree and sample completions."""

import json
import math
import platform
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from euryale.runtime.model.medusa_checkpoint import MERGED_PREFIX
from euryale.training import corpus
from euryale.training.demo import pretrain

_SAMPLE_PROMPTS = ("def ", "class ", "import ")
# Greedy answers of a model this small soon repeat themselves; sampled answers read better.
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}

_CARD = """---
license: psf-2.0
---
# Euryale demo: a small Python model with Medusa heads

A Llama-architecture model and {num_heads} Medusa heads (arXiv 2401.10774) in one checkpoint, small enough to be kept
beside the code that serves them, so that tree decoding can be seen with real text on any machine. Made by Euryale's own
`training/`.

**Limits.** A toy: it writes text that looks like Python and means nothing. Do not run what it writes, and do
not judge models of useful size by its numbers.

## Data and licence

The source of Python {python}'s standard library, as installed with the interpreter: {train_files} files for training
and {held_files} held out ({held_tokens} tokens), selected by a hash of the file's name. That source is Copyright (c)
2001 Python Software Foundation; All Rights Reserved, under the PSF License Version 2. As the model can repeat pieces
of it, the checkpoint is offered under the same PSF License Version 2. The code that made it is Apache-2.0.

## Sizes

{sizes}

Context: {context} tokens. Byte-level BPE; id 0 is the end-of-text token and begins every file.

## Training

{training}

In the last steps of the backbone's first training every second batch holds prompt-like text: it starts at a top-level
`def`, `class` or `import`. Half of it is tokenized like a prompt that ends with a space.

Medusa-1 trained the heads on the text with a frozen backbone. Medusa-2 then trained both together, with a weight of 0.2
on the heads' loss.

Held-out loss, over all held-out text: **{loss:.3f} nats per token**, {bits_per_byte:.3f} bits per byte; before Medusa-2
{loss_before:.3f} ({change:+.2f} %).

## Heads and tree

{heads}
## Completions

Sampled at temperature 0.7 and top-p 0.95, the defaults in `generation_config.json` (seed 1 of PyTorch's generator).

{samples}

## Rebuild

    {command}

on a CPU, with Python {python}. Another version of Python has other text and gives other numbers.
"""
_HEADS = """Greedy decoding accepts a draft token when it equals the backbone's next token, so the heads are measured on
greedy continuations of held-out prompts ({num_positions} positions), and against the held-out text itself
({num_text_positions} positions). Top-n: the token is among the head's top n candidates.

{accuracy_table}

![Rank of the target among the head candidates](accuracy.png)

`tree.json` holds {tree[num_draft_tokens]} draft tokens and emits **{tree[tokens_per_step]:.2f} tokens per step** (plain
decoding: 1, the chain of top candidates: {chain:.2f}). Below, trees of other sizes, searched on
{num_searched_positions} of these positions and measured on the other {num_measured_positions}. "Expected" averages over
all positions instead of those where steps start. "Independent" is a tree of that size searched as if the heads were
independent.

{tree_table}

![The tree, draft tokens coloured by acceptance probability](tree.png)

"""


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def samples(backbone: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, new_tokens: int = 80) -> str:
    """Return completions sampled with the generation defaults, as Markdown code blocks."""
    blocks = []
    for prompt in _SAMPLE_PROMPTS:
        torch.manual_seed(1)
        tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
        options = {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0, **SAMPLING}
        written = backbone.generate(tokens, max_new_tokens=new_tokens, **options)[0].tolist()
        end = written.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in written else len(written)
        blocks.append(f"```python\n{tokenizer.decode(written[:end])}\n```")
    return "\n\n".join(blocks)


def held_out_numbers(
    backbone: LlamaForCausalLM, before: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, length: int
) -> dict:
    """Return the losses of both checkpoints (bfloat16 weights) on the held-out files, and the corpus' sizes."""
    train_files, held_files = corpus.split(corpus.standard_library_files())
    stream = corpus.token_stream(tokenizer, held_files)
    loss, loss_before = (pretrain.held_out_loss(m, stream, length, limit=len(stream)) for m in (backbone, before))
    held_bytes = sum(len(corpus.read(path).encode()) for path in held_files)
    return {
        "train_files": len(train_files),
        "held_files": len(held_files),
        "loss": loss,
        "loss_before": loss_before,
        "change": 100 * (loss / loss_before - 1),
        "bits_per_byte": loss / math.log(2) * len(stream) / held_bytes,
        "held_tokens": len(stream),
    }


def heads_section(calibration: dict) -> str:
    """Return the accuracies of the heads and the tokens per step of trees, as Markdown."""
    accuracies = []
    for k, (own, text) in enumerate(zip(calibration["accuracy"], calibration["text_accuracy"], strict=True)):
        for what, values in (("own continuation", own), ("held-out text", text)):
            top = [sum(values[:n]) for n in range(1, 6)]
            accuracies.append([f"{k} (token t+{k + 2})", what, *(f"{100 * value:.1f} %" for value in top)])
    columns = ("tokens_per_step", "expected", "independent")
    trees = [[str(row["num_draft_tokens"]), *(f"{row[name]:.2f}" for name in columns)] for row in calibration["trees"]]
    return _HEADS.format(
        accuracy_table=table(["head", "measured on", "top-1", "top-2", "top-3", "top-4", "top-5"], accuracies),
        tree_table=table(["draft tokens", "tokens per step", "expected", "independent"], trees),
        **calibration,
    )


def sizes_table(directory: Path, backbone: LlamaForCausalLM) -> tuple[str, int]:
    """Return a table of the parameters of backbone and heads, and the number of heads."""
    with safe_open(directory / "model.safetensors", "pt") as file:
        names = [n for n in file.keys() if n.startswith(MERGED_PREFIX)]  # noqa: SIM118
        parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    num_heads = 1 + max(int(name.split(".")[1]) for name in names)
    blocks = sum(name.startswith(f"{MERGED_PREFIX}0.") and name.endswith("linear.bias") for name in names)
    lm_head = "its own lm_head" if f"{MERGED_PREFIX}0.{blocks}.weight" in names else "the backbone's lm_head"
    shape = backbone.config
    body = f"{shape.num_hidden_layers} layers, hidden {shape.hidden_size}, vocabulary {shape.vocab_size}"
    rows = [
        [f"backbone: {body}, tied embeddings", f"{backbone.num_parameters() / 1e6:.2f} M"],
        [f"heads: {num_heads}, each {blocks} residual blocks and {lm_head}", f"{parameters / 1e6:.2f} M"],
        ["`model.safetensors`", f"{(directory / 'model.safetensors').stat().st_size / 1e6:.1f} MB"],
    ]
    return table(["", "parameters (bfloat16)"], rows), num_heads


def training_table(trainings: dict) -> str:
    """Return a table of the trainings' tokens and optimizers; values of ``trainings`` are (options, optimizer)."""
    cells = [
        [what, f"{o.tokens / 1e6:.1f} M", f"{o.batch} x {o.length}", name] for what, (o, name) in trainings.items()
    ]
    return table(["", "tokens, with repetitions", "batch", "optimizer"], cells)


def write(directory: Path, before: Path, trainings: dict, command: str) -> str:
    """Return the README of the checkpoint in ``directory``, which was made from the backbone in ``before``.

    Measures losses and samples completions.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    model, model_before = (
        LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (directory, before)
    )
    context = model.config.max_position_embeddings
    sizes, num_heads = sizes_table(directory, model)
    return _CARD.format(
        python=platform.python_version(),
        num_heads=num_heads,
        context=context,
        sizes=sizes,
        training=training_table(trainings),
        heads=heads_section(json.loads((directory / "calibration.json").read_text())),
        samples=samples(model, tokenizer),
        command=command,
        **held_out_numbers(model, model_before, tokenizer, min(1024, context)),
    )
