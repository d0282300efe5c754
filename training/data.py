"""Training data: files are read into documents of token ids with a loss mask.

Sources are JSONL files, plain text files, and the word ``stdlib`` for the Python standard library's source. A JSONL row
has ``text``, ``prompt`` and ``completion``, chat ``messages``, or the ``prompt_tokens`` and ``tokens`` of
``launch/train.py distill``. This module knows tokenizers, but neither batches nor models.
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
    """One source document before tokenization.

    Has ``text``, or ``tokens`` if they are known. ``learned`` holds the (start, stop) ranges of characters, or tokens,
    that contribute to the loss. ``key`` decides whether the document is held out. The template of a ``chat`` writes all
    special tokens itself.
    """

    key: str
    text: str = ""
    tokens: tuple[int, ...] = ()
    learned: tuple[tuple[int, int], ...] = ()
    chat: bool = False

    @property
    def is_all_learned(self) -> bool:
        """Whether all characters contribute to the loss."""
        return self.learned == ((0, len(self.text)),)


@dataclass(frozen=True)
class Document:
    """``tokens`` int32 [n]; ``learned`` bool [n], the loss mask."""

    tokens: np.ndarray
    learned: np.ndarray

    @property
    def prompt(self) -> np.ndarray:
        """The tokens before the last answer, or all tokens if the last token belongs to no answer."""
        unlearned = np.flatnonzero(~self.learned)
        return self.tokens[: unlearned[-1] + 1] if len(unlearned) else self.tokens[:0]


def read_pieces(sources: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """Yield every document of the sources in order. ValueError with file and line for invalid input."""
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
    # splitlines() would also split at other line separators, which JSON strings may hold.
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
    """Return the documents of a JSONL row: usually one.

    A chat can give several if its template drops earlier content; a failed answer gives none.
    """
    if row.get("error"):
        return []
    if "prompt_tokens" in row:
        ids, answer_ids = _ids(row, "prompt_tokens"), _ids(row, "tokens") if "tokens" in row else []
        learned = ((len(ids), len(ids) + len(answer_ids)),)
        return [Piece(key, tokens=(*ids, *answer_ids), learned=learned)]
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
    """Return the documents of a chat, rendered with the tokenizer's template.

    Only answers contribute to the loss: the text that follows each generation prompt. Some templates render earlier
    turns differently later, for example without a model's reasoning. Then every answer becomes a separate document.
    ValueError for invalid messages.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise ValueError('messages must be a list of {"role", "content"} objects')
    if tokenizer.chat_template is None:
        raise ValueError("the model's tokenizer has no chat template: give prompt and completion instead of messages")

    def render(count: int, is_asking: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=is_asking)
        except Exception as error:  # templates raise many kinds of errors
            raise ValueError(f"the chat template rejects these messages: {error}") from error

    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    pieces = []
    for i in turns:
        asked, answered = render(i, True), render(i + 1, False)
        if not answered.startswith(asked):
            raise ValueError("the chat template changes a question after its answer: give prompt and completion")
        pieces.append(Piece(key, answered, learned=((len(asked), len(answered)),), chat=True))
    whole = pieces[-1].text if turns and turns[-1] == len(messages) - 1 else render(len(messages), True)
    if all(whole.startswith(piece.text) for piece in pieces):
        return [Piece(key, whole, learned=tuple(span for piece in pieces for span in piece.learned), chat=True)]
    return pieces if turns and turns[-1] == len(messages) - 1 else [*pieces, Piece(key, whole, chat=True)]


def tokenize(pieces: list[Piece], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[Document]:
    """Return the pieces as documents.

    Text outside chats gets the tokenizer's special tokens in front. It also gets the end-of-sequence token if its last
    token contributes to the loss. ValueError for ids outside the vocabulary.
    """
    kinds = {(p.chat, p.is_all_learned) for p in pieces if not p.tokens}
    encoded = {kind: _encode([p for p in pieces if _is_of(p, kind)], tokenizer, *kind) for kind in kinds}
    documents = []
    for piece in pieces:
        if piece.tokens:
            tokens = list(piece.tokens)
            learned = _marked(piece, [(i, i + 1) for i in range(len(tokens))])
        else:
            tokens, learned = next(encoded[piece.chat, piece.is_all_learned])
            if not piece.chat and tokenizer.eos_token_id is not None and learned and learned[-1]:
                tokens, learned = [*tokens, tokenizer.eos_token_id], [*learned, True]
        if wrong := [t for t in tokens if not 0 <= t < vocab_size]:
            raise ValueError(
                f"the data hold token {wrong[0]} but the model's vocabulary has {vocab_size}: "
                "use data of this model's tokenizer"
            )
        documents.append(Document(np.asarray(tokens, dtype=np.int32), np.asarray(learned, dtype=bool)))
    return documents


def _is_of(piece: Piece, kind: tuple[bool, bool]) -> bool:
    return not piece.tokens and (piece.chat, piece.is_all_learned) == kind


def _marked(piece: Piece, offsets: list[tuple[int, int]]) -> list[bool]:
    """Return whether each token, given as (start, stop), starts inside a learned range; empty ranges are special
    tokens."""
    return [any(start <= first < stop for start, stop in piece.learned) and last > first for first, last in offsets]


def _encode(
    pieces: list[Piece], tokenizer: PreTrainedTokenizerBase, is_chat: bool, is_all_learned: bool, part: int = 256
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield the token ids and the loss mask of every piece; all pieces are of one kind.

    Pieces outside chats get the tokenizer's special tokens, except the end-of-sequence token. ``part``: texts per call.
    """
    if not is_all_learned and not tokenizer.is_fast:
        raise ValueError("the model's tokenizer gives no character offsets of tokens: give rows with text or token ids")
    special = not is_chat
    # Offsets of running text are not needed and would take gigabytes.
    options = {"add_special_tokens": special, "return_offsets_mapping": not is_all_learned}
    with tqdm(total=len(pieces), desc="tokenizing", unit="text", disable=len(pieces) < part, leave=False) as bar:
        for first in range(0, len(pieces), part):
            batch = pieces[first : first + part]
            # verbose warns of texts beyond the model's context.
            found = tokenizer([p.text for p in batch], verbose=False, **options)
            for i, (piece, ids) in enumerate(zip(batch, found["input_ids"], strict=True)):
                if special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
                    ids = ids[:-1]
                offsets = None if is_all_learned else found["offset_mapping"][i][: len(ids)]
                yield ids, [True] * len(ids) if offsets is None else _marked(piece, offsets)
            bar.update(len(batch))


def load_documents(
    args: DataOptions, vocab_size: int, needs_held_out: bool = True
) -> tuple[list[Document], list[Document], PreTrainedTokenizerBase]:
    """Return the training documents, the held-out documents and the tokenizer. ValueError if either list is empty;
    held-out documents may be missing unless ``needs_held_out``."""
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
