"""Turns tokens into text as they arrive. The text depends on the tokens only, not on how steps divide them.

Every token stands for bytes, and the text is the UTF-8 decoding of their concatenation.
"""

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

REPLACEMENT = "\ufffd"
BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
# The alphabet of byte-level BPE: printable bytes map to themselves, the others to characters from U+0100 on.
BYTE_LEVEL = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}


class Tokenizer(Protocol):
    """The part of a transformers fast tokenizer that this file uses.

    transformers declares wider results. For these arguments ``decode`` returns a str, and ``convert_ids_to_tokens`` the
    token's name or None.
    """

    def __len__(self) -> int: ...
    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> Any: ...
    def convert_ids_to_tokens(self, ids: int) -> Any: ...


class TokenBytes:
    """The bytes that each token of a vocabulary adds to a text. They need not be whole characters.

    Requires a decoder that maps tokens one by one, except for blanks that it strips from the beginning of a text.
    Byte-level BPE, byte fallback, Metaspace and Strip decoders do. Each token is decoded once and cached.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        # Decoders may strip a blank from the first token, so each token is decoded after one with whole characters.
        texts = ((token, self._decode([token])) for token in range(len(tokenizer)))
        self._first, self._first_text = next(
            (([token], text) for token, text in texts if text and REPLACEMENT not in text), ([], "")
        )

    def __getitem__(self, token: int) -> bytes:
        """Return the token's bytes after other text; empty for special tokens and ids without a token."""
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def at_start(self, tokens: list[int]) -> bytes:
        """Return the bytes of the last of ``tokens``, if the others have no text."""
        try:
            self[tokens[-1]].decode()
        except UnicodeDecodeError:  # part of a character, so no blank that a decoder strips
            return self[tokens[-1]]
        return self._decode(tokens).encode()

    def _read(self, token: int) -> bytes:
        name: str | None = self._tokenizer.convert_ids_to_tokens(token)
        if not name:
            return b""
        text = self._decode([*self._first, token])[len(self._first_text) :]
        if (byte := BYTE_FALLBACK.fullmatch(name)) and text and name not in text:
            return bytes([int(byte[1], 16)])
        if REPLACEMENT in text and all(character in BYTE_LEVEL for character in name):
            return bytes(BYTE_LEVEL[character] for character in name)
        return text.encode()

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class Detokenizer:
    """Decodes one answer into pieces of whole characters. Special tokens have no text.

    Invalid UTF-8 becomes U+FFFD, as in ``bytes.decode("utf-8", "replace")``. ``context``: tokens before the answer. The
    answer's first word keeps its leading blank if they have text.
    """

    def __init__(self, token_bytes: TokenBytes, context: Sequence[int] = ()) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._start: list[int] | None = []  # the tokens so far, without special ones, while the text is empty
        for token in context:
            if self._start is None:
                break
            self._bytes(token)

    def push(self, tokens: Iterable[int]) -> str:
        """Return the characters that ``tokens`` complete."""
        return self._utf8.decode(b"".join(map(self._bytes, tokens)))

    def finish(self) -> str:
        """Return U+FFFD if the answer ends within a character, else no text. Call it once, at the end of the answer."""
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        added = self._token_bytes[token]
        if self._start is None or not added:
            return added
        self._start.append(token)
        added = self._token_bytes.at_start(self._start)
        if added:
            self._start = None
        return added


class StopMatcher:
    """Finds the stop string that is completed first, independently of how the text is divided into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Return the text that cannot be part of a stop string, and the stop string if one is complete.

        Of several, the one that ends first wins, then the one that begins first. The result is the same for one
        character at a time.
        """
        if not self._stops:
            return text, None
        text = self._held + text
        matches = [(begin + len(stop), begin, stop) for stop in self._stops if (begin := text.find(stop)) >= 0]
        if matches:
            _, begin, stop = min(matches)
            self._held = ""
            return text[:begin], stop
        held = max(self._overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def finish(self) -> str:
        """Return the text held back, for an answer that ended without a stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Return the length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
