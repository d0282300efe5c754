"""Training text: from files to documents of token ids, each token marked as learned from or only read.

Sources are JSONL files whose rows hold ``text``, ``prompt`` and ``completion``, chat ``messages``, or the
``prompt_tokens`` and ``tokens`` that ``launch/train.py distill`` writes; plain text files; and the word ``stdlib``,
the Python standard library's source. This file does not know batches, nor models but their tokenizers.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from euryale.frontend.tokenizer import load_tokenizer
from euryale.training import corpus
from euryale.training.corpus import STANDARD_LIBRARY
from euryale.training.options import DataOptions


@dataclass(frozen=True)
class Piece:
    """One source document before tokenization: ``text``, or ``tokens`` where they are known. ``learned``: which
    characters, or tokens, to learn from, as (start, stop). ``key`` decides whether it is held out. A ``chat``'s
    template writes all special tokens itself."""

    key: str
    text: str = ""
    tokens: tuple[int, ...] = ()
    learned: tuple[tuple[int, int], ...] = ()
    chat: bool = False

    @property
    def is_all_learned(self) -> bool:
        return self.learned == ((0, len(self.text)),)


@dataclass(frozen=True)
class Document:
    """``tokens`` int32 [n], ``learned`` bool [n]: which of them are predicted in training, not only read."""

    tokens: np.ndarray
    learned: np.ndarray

    @property
    def prompt(self) -> np.ndarray:
        """All tokens if the last is not an answer's, else those before the last answer."""
        unlearned = np.flatnonzero(~self.learned)
        return self.tokens[: unlearned[-1] + 1] if len(unlearned) else self.tokens[:0]


def read_pieces(sources: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """Every document of the sources in order; ValueError, naming file and line, for what cannot be used."""
    for source in sources:
        path = Path(source)
        if source == STANDARD_LIBRARY:
            for file in corpus.standard_library_files():
                yield _all_learned(file.name, corpus.read(file))
        elif not path.is_file():
            raise ValueError(f"there is no file {source}: give JSONL or text files, or the word {STANDARD_LIBRARY}")
        elif path.suffix in (".jsonl", ".json"):
            yield from _read_jsonl(path, tokenizer)
        else:
            yield _all_learned(path.name, _text_of(path))


def _all_learned(key: str, text: str) -> Piece:
    return Piece(key, text, learned=((0, len(text)),))


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
                raise ValueError("a row must be an object, one per line")
            yield from _pieces(line, row, tokenizer)
        except ValueError as error:  # JSON errors are ValueErrors too
            raise ValueError(f"{path}, line {number}: {error}") from error


def _pieces(key: str, row: dict, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The documents of a JSONL row: one, several of a chat whose template forgets, none of an answer that failed."""
    if row.get("error"):
        return []
    if "prompt_tokens" in row:
        prompt, answer = _ids(row, "prompt_tokens"), _ids(row, "tokens") if "tokens" in row else []
        learned = ((len(prompt), len(prompt) + len(answer)),)
        return [Piece(key, tokens=(*prompt, *answer), learned=learned)]
    if "messages" in row:
        return chat_pieces(key, row["messages"], tokenizer)
    if "prompt" in row:
        prompt, answer = _string(row, "prompt"), _string(row, "completion") if "completion" in row else ""
        return [Piece(key, prompt + answer, learned=((len(prompt), len(prompt + answer)),))]
    if "text" in row:
        return [_all_learned(key, _string(row, "text"))]
    raise ValueError("a row needs text, prompt (and completion), messages, or prompt_tokens (and tokens)")


def _string(row: dict, name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"{name} must be a string, not {type(row[name]).__name__}")
    return row[name]


def _ids(row: dict, name: str) -> list[int]:
    if not isinstance(row[name], list) or any(type(t) is not int for t in row[name]):
        raise ValueError(f"{name} must be a list of token ids")
    return row[name]


def chat_pieces(key: str, messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """A chat in the tokenizer's template. What the template adds behind the generation prompt is an answer; only
    answers are learned from. A template that renders earlier turns differently later on, as those that drop a model's
    thoughts do, makes every answer a document of its own."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ValueError('messages must be a list of {"role", "content"} objects')
    if tokenizer.chat_template is None:
        raise ValueError("the model's tokenizer has no chat template: give prompt and completion instead of messages")

    def render(count: int, is_asking: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=is_asking)
        except Exception as error:  # templates raise errors of their own
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    pieces = []
    for i in turns:
        asked, answered = render(i, True), render(i + 1, False)
        if not answered.startswith(asked):
            raise ValueError("the chat template changes the question once it is answered: give prompt and completion")
        pieces.append(Piece(key, answered, learned=((len(asked), len(answered)),), chat=True))
    whole = pieces[-1].text if turns and turns[-1] == len(messages) - 1 else render(len(messages), True)
    if all(whole.startswith(piece.text) for piece in pieces):
        return [Piece(key, whole, learned=tuple(span for piece in pieces for span in piece.learned), chat=True)]
    return pieces if turns and turns[-1] == len(messages) - 1 else [*pieces, Piece(key, whole, chat=True)]


def tokenize(pieces: list[Piece], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[Document]:
    """The documents' token ids. What is not a chat gets the tokenizer's special tokens in front, and if its end is
    learned from, the end-of-sequence token behind. ValueError for ids the model does not have."""
    kinds = {(p.chat, p.is_all_learned) for p in pieces if not p.tokens}
    encoded = {kind: _encode([p for p in pieces if _is_of(p, kind)], tokenizer, *kind) for kind in kinds}
    documents = []
    for piece in pieces:
        if piece.tokens:
            tokens = list(piece.tokens)
            learned = _marked(piece, [(place, place + 1) for place in range(len(tokens))])
        else:
            tokens, learned = next(encoded[piece.chat, piece.is_all_learned])
            if not piece.chat and tokenizer.eos_token_id is not None and learned and learned[-1]:
                tokens, learned = [*tokens, tokenizer.eos_token_id], [*learned, True]
        if wrong := [t for t in tokens if not 0 <= t < vocab_size]:
            raise ValueError(
                f"the data hold token {wrong[0]} but the model's vocabulary has {vocab_size}: "
                "they were written with another model's tokenizer"
            )
        documents.append(Document(np.asarray(tokens, dtype=np.int32), np.asarray(learned, dtype=bool)))
    return documents


def _is_of(piece: Piece, kind: tuple[bool, bool]) -> bool:
    return not piece.tokens and (piece.chat, piece.is_all_learned) == kind


def _marked(piece: Piece, places: list[tuple[int, int]]) -> list[bool]:
    """Whether tokens at these (start, stop) begin in what is learned; an empty place is a special token's."""
    return [any(start <= first < stop for start, stop in piece.learned) and last > first for first, last in places]


def _encode(
    pieces: list[Piece], tokenizer: PreTrainedTokenizerBase, is_chat: bool, is_all_learned: bool, part: int = 256
) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids of every piece, all of one kind, and whether each is learned. The tokenizer's special tokens are added
    to what is no chat, but never its end."""
    if not is_all_learned and not tokenizer.is_fast:
        raise ValueError("the model's tokenizer cannot say where its tokens lie in the text: give text, or token ids")
    special = not is_chat
    # The places of every token of running text would take gigabytes.
    options = {"add_special_tokens": special, "return_offsets_mapping": not is_all_learned}
    with tqdm(total=len(pieces), desc="tokenizing", unit="text", disable=len(pieces) < part, leave=False) as bar:
        for first in range(0, len(pieces), part):
            chosen = pieces[first : first + part]
            # Not verbose: texts may well be longer than the model's context.
            found = tokenizer([p.text for p in chosen], verbose=False, **options)
            for i, (piece, ids) in enumerate(zip(chosen, found["input_ids"], strict=True)):
                if special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
                    ids = ids[:-1]
                places = None if is_all_learned else found["offset_mapping"][i][: len(ids)]
                yield ids, [True] * len(ids) if places is None else _marked(piece, places)
            bar.update(len(chosen))


def load_documents(
    args: DataOptions, vocab_size: int, needs_held_out: bool = True
) -> tuple[list[Document], list[Document], PreTrainedTokenizerBase]:
    """Documents to train on and documents held out, with the tokenizer; ValueError if either are none."""
    tokenizer = load_tokenizer(args.model, vocab_size)
    pieces = list(read_pieces(args.data, tokenizer))
    if args.held_out:
        trained, held = pieces, list(read_pieces(args.held_out, tokenizer))
    else:
        sides = [corpus.is_held_out(piece.key, args.held_out_percent) for piece in pieces]
        trained = [p for p, side in zip(pieces, sides, strict=True) if not side]
        held = [p for p, side in zip(pieces, sides, strict=True) if side]
    for name, found in (("to train on", trained), ("held out", held)):
        if not found and (needs_held_out or found is trained):
            raise ValueError(
                f"of {len(pieces)} documents none is {name}: give more --data, --held-out FILE or another "
                "--held-out-percent"
            )
    held = held if needs_held_out else []
    return tokenize(trained, tokenizer, vocab_size), tokenize(held, tokenizer, vocab_size), tokenizer
