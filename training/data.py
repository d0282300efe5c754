"""Training text: from files to documents of token ids, each token marked as learned from or only read.

Sources are JSONL files whose rows hold ``text``, ``prompt`` and ``completion``, chat ``messages``, or the
``prompt_tokens`` and ``tokens`` that ``launch/train.py distill`` writes; plain text files; and the word ``stdlib``,
the Python standard library's source. This file does not know batches or models.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from euryale.training import corpus

STANDARD_LIBRARY = "stdlib"


@dataclass(frozen=True)
class Piece:
    """One source document before tokenization: ``segments`` of (text or token ids, whether to learn from it). ``key``
    decides whether it is held out, ``ends`` whether the end-of-sequence token follows."""

    key: str
    segments: tuple[tuple[str | list[int], bool], ...]
    ends: bool = True


@dataclass(frozen=True)
class Document:
    """``tokens`` int32 [n], ``learned`` bool [n]: which of them are predicted in training, not only read."""

    tokens: np.ndarray
    learned: np.ndarray

    @property
    def prompt(self) -> np.ndarray:
        """The tokens before the first that is learned; all of them if none is."""
        found = np.flatnonzero(self.learned)
        return self.tokens[: found[0]] if len(found) else self.tokens


def read_pieces(sources: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """Every document of the sources in order; ValueError, naming file and line, for what cannot be used."""
    for source in sources:
        path = Path(source)
        if source == STANDARD_LIBRARY:
            for file in corpus.standard_library_files():
                yield Piece(file.name, ((corpus.read(file), True),))
        elif not path.is_file():
            raise ValueError(f"there is no file {source}: give JSONL or text files, or the word {STANDARD_LIBRARY}")
        elif path.suffix in (".jsonl", ".json"):
            yield from _read_jsonl(path, tokenizer)
        else:
            yield Piece(path.name, ((_text_of(path), True),))


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _read_jsonl(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    # Not splitlines(): JSON strings may hold other line separators than the newline.
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("a row must be an object")
            piece = _piece(line, row, tokenizer)
        except ValueError as error:  # JSON errors are ValueErrors too
            raise ValueError(f"{path}, line {number}: {error}") from error
        if piece is not None:
            yield piece


def _piece(key: str, row: dict, tokenizer: PreTrainedTokenizerBase) -> Piece | None:
    """The document of a JSONL row, None for an answer that failed."""
    if row.get("error"):
        return None
    if "prompt_tokens" in row:
        segments = [(_ids(row, "prompt_tokens"), False)]
        return Piece(key, (*segments, (_ids(row, "tokens"), True)) if "tokens" in row else tuple(segments), ends=False)
    if "messages" in row:
        return Piece(key, chat_segments(row["messages"], tokenizer), ends=False)
    if "prompt" in row:
        segments = [(_string(row, "prompt"), False)]
        return Piece(key, (*segments, (_string(row, "completion"), True)) if "completion" in row else tuple(segments))
    if "text" in row:
        return Piece(key, ((_string(row, "text"), True),))
    raise ValueError("a row needs text, prompt (and completion), messages, or prompt_tokens (and tokens)")


def _string(row: dict, name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"{name} must be a string, not {type(row[name]).__name__}")
    return row[name]


def _ids(row: dict, name: str) -> list[int]:
    if not isinstance(row[name], list) or any(type(t) is not int for t in row[name]):
        raise ValueError(f"{name} must be a list of token ids")
    return row[name]


def chat_segments(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, bool], ...]:
    """A chat in the tokenizer's template, cut where answers begin and end: only answers are learned from.

    Every answer is what the template adds behind the generation prompt, so it is tokenized as it is when served.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ValueError('messages must be a list of {"role", "content"} objects')
    if tokenizer.chat_template is None:
        raise ValueError("the model's tokenizer has no chat template: give prompt and completion instead of messages")

    def render(count: int, add_generation_prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates raise errors of their own
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    segments, done = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, answered = render(i, True), render(i + 1, False)
        if not asked.startswith(done) or not answered.startswith(asked):
            raise ValueError("the chat template rewrites earlier messages: give one prompt and completion per answer")
        segments += [(asked[len(done) :], False), (answered[len(asked) :], True)]
        done = answered
    rest = "" if done and messages[-1]["role"] == "assistant" else render(len(messages), True)[len(done) :]
    return tuple(segments) + (((rest, False),) if rest else ())


def tokenize(pieces: list[Piece], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[Document]:
    """The documents' token ids. What starts with plain text gets the tokenizer's special tokens in front; a chat does
    not, as its template writes them. ValueError for ids the model does not have."""
    starts = _encode(tokenizer, [p.segments[0][0] for p in pieces if _is_plain(p)], special=True)
    others = _encode(tokenizer, [s for p in pieces for s, _ in p.segments[_is_plain(p) :] if isinstance(s, str)])
    documents = []
    for piece in pieces:
        tokens, learned = [], []
        for i, (segment, is_learned) in enumerate(piece.segments):
            ids = segment if isinstance(segment, list) else next(starts if i == 0 and _is_plain(piece) else others)
            tokens += ids
            learned += [is_learned] * len(ids)
        if piece.ends and tokenizer.eos_token_id is not None and learned and learned[-1]:
            tokens, learned = [*tokens, tokenizer.eos_token_id], [*learned, True]
        if wrong := [t for t in tokens if not 0 <= t < vocab_size]:
            raise ValueError(
                f"the data hold token {wrong[0]} but the model's vocabulary has {vocab_size}: "
                "they were written with another model's tokenizer"
            )
        documents.append(Document(np.asarray(tokens, dtype=np.int32), np.asarray(learned, dtype=bool)))
    return documents


def _is_plain(piece: Piece) -> bool:
    """Whether the tokenizer's own special tokens belong in front."""
    return piece.ends and isinstance(piece.segments[0][0], str)


def _encode(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool = False, part: int = 256
) -> Iterator[list[int]]:
    """Token ids of every text; with ``special`` the tokenizer's start, but never its end."""
    end = tokenizer.eos_token_id
    with tqdm(total=len(texts), desc="tokenizing", unit="text", disable=len(texts) < part, leave=False) as bar:
        for first in range(0, len(texts), part):
            chosen = texts[first : first + part]
            # Not verbose: texts may well be longer than the model's context.
            for ids in tokenizer(chosen, add_special_tokens=special, verbose=False)["input_ids"]:
                yield ids[:-1] if special and len(ids) > 1 and ids[-1] == end else ids
            bar.update(len(chosen))
