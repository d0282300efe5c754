"""The demo corpus: the source of the running interpreter's standard library.

This module finds the source files, splits them and tokenizes them. It does not depend on any model.
"""

import hashlib
import os
import re
import sysconfig
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

STANDARD_LIBRARY = "stdlib"  # its name in --data
HELD_OUT_PERCENT = 3.0
END_OF_TEXT = "<|endoftext|>"
# Directories of data tables, and packages outside the standard library.
_EXCLUDED = {"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__", "lib2to3", "config-3"}
_CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '\n' }}"
    "{% else %}{{ '# ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
)


def standard_library_files() -> list[Path]:
    """Return every ``.py`` file of the standard library in a fixed order. ValueError if there is none."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _EXCLUDED]  # os.walk skips removed names
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    files = [p for p in sorted(found) if 200 < p.stat().st_size < 400_000]
    if not files:
        raise ValueError(f"no Python source under {root}: install the interpreter's standard library source")
    return files


def is_held_out(key: str, percent: float = HELD_OUT_PERCENT) -> bool:
    """Return whether the document is held out, as decided by a hash of its ``key``: the same on every machine."""
    number = int(hashlib.sha256(key.encode()).hexdigest(), 16)
    return number % 100 + number // 100 % 100 / 100 < percent


def split(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Return the training files and the held-out files, split by a hash of their names."""
    return [p for p in files if not is_held_out(p.name)], [p for p in files if is_held_out(p.name)]


def read(path: Path) -> str:
    """Return the text of a source file; undecodable bytes become U+FFFD."""
    return path.read_text(encoding="utf-8", errors="replace")


def train_tokenizer(files: list[Path], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose id 0 is the end-of-text token, which also begins every file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((read(p) for p in files), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=context,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, files: list[Path]) -> np.ndarray:
    """Return all files as one uint16 stream, each file preceded by the end-of-text token."""
    parts = []
    for path in files:
        encoded = tokenizer(
            read(path), add_special_tokens=False, verbose=False
        )  # verbose warns of texts beyond the context
        parts.append([tokenizer.bos_token_id, *encoded["input_ids"]])
    return np.concatenate([np.asarray(p, dtype=np.uint16) for p in parts])


def streams(tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray]:
    """Return the training stream and the held-out stream of the standard library, uint16 each."""
    train_files, held_files = split(standard_library_files())
    return token_stream(tokenizer, train_files), token_stream(tokenizer, held_files)


def openings(tokenizer: PreTrainedTokenizerFast, files: list[Path], length: int, limit: int, seed: int) -> np.ndarray:
    """Return up to ``limit`` excerpts, int64 [n, length], that start at a top-level ``def``, ``class``, ``import`` or
    ``from``.

    They resemble prompts. In every second excerpt the space after the keyword is a separate token, as in a prompt that
    ends with "def ". In running text the space belongs to the next word.
    """
    rng = np.random.default_rng(seed)
    found: list[str] = []
    for path in files:
        text = read(path)
        starts = [m.start() for m in re.finditer(r"^(?:def|class|import|from) (?=\w)", text, re.MULTILINE)]
        found += [text[s : s + 8 * length] for s in starts]
    selected = [found[i] for i in rng.permutation(len(found))[: 2 * limit]]
    rows: list[list[int]] = []
    for i, text in enumerate(selected):
        cut = text.index(" ") + 1 if i % 2 else 0
        parts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text[:cut], text[cut:]) if t]
        tokens = [token for part in parts for token in part]
        if len(tokens) >= length:
            rows.append(tokens[:length])
    return np.asarray(rows[:limit], dtype=np.int64).reshape(-1, length)


def windows(stream: np.ndarray, length: int, batch: int, step: int, seed: int) -> np.ndarray:
    """Return batch ``step`` of the endless, seeded order of windows: int64 [batch, length].

    The result depends on the arguments only, so that a resumed training sees the same batches. ValueError for too
    little text.
    """
    per_epoch = (len(stream) - length) // length
    if per_epoch < batch:
        raise ValueError(f"{len(stream)} tokens are too few for a batch of {batch} windows of {length}: add text")
    epoch, index = divmod(step, per_epoch // batch)
    rng = np.random.default_rng((seed, epoch))
    offset = int(rng.integers(length))
    starts = rng.permutation(per_epoch)[index * batch : (index + 1) * batch] * length + offset
    return np.stack([stream[s : s + length] for s in starts]).astype(np.int64)
