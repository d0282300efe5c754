"""From tokens to text while they arrive: whole characters only, and nothing that may belong to a stop string.

Works for any tokenizer whose text only grows at its end as tokens are appended, but for an unfinished character.
"""

from collections.abc import Iterable, Sequence
from typing import Any

REPLACEMENT = "\ufffd"
MAX_HELD = 3  # bytes of an unfinished UTF-8 character, hence of replacement characters at the end that may still change
CONTEXT_TOKENS = 8
WINDOW_TOKENS = 16  # how long the window grows before its settled part is dropped
GARBAGE_TOKENS = 32  # how many tokens may go by without one that ends a character


class Detokenizer:
    """The text of one answer, in pieces. The pieces together are the decoded answer, special tokens skipped.

    Only a window of recent tokens is decoded each time, so a token costs the same at the end of a long answer as at
    its beginning. ``context`` are the tokens before the answer: with them a tokenizer that marks words by a leading
    space keeps the space of the first one.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        for length in range(CONTEXT_TOKENS, CONTEXT_TOKENS + MAX_HELD + 1):  # not to begin within a character
            self._window = list(context[-length:])
            self._shown = self._decode(self._window)  # the part of the window's text that was handed out
            if not self._shown.endswith(REPLACEMENT):
                break
        else:  # half a character before the answer: not the answer's to complete
            self._window, self._shown = [], ""
        self._settled = len(self._window)  # the window's tokens up to here end a character and are handed out

    def push(self, tokens: Iterable[int]) -> str:
        """The text that these tokens complete."""
        self._window.extend(tokens)
        text = self._decode(self._window)
        unfinished = len(text) - len(text.rstrip(REPLACEMENT))
        if unfinished == 0:
            piece = text[len(self._shown) :]
            self._settle(text)
            return piece
        if len(self._window) - self._settled > GARBAGE_TOKENS:
            return self._cut(text)
        # A byte-fallback tokenizer turns a whole run of bytes into replacement characters while its end is
        # unfinished, whole characters included; then nothing can be said yet.
        if unfinished > MAX_HELD or not text.startswith(self._shown):
            return ""
        piece = text[len(self._shown) : len(text) - unfinished]
        self._shown += piece
        return piece

    def finish(self) -> str:
        """What was held back; call it once, at the end of the answer."""
        return self._decode(self._window)[len(self._shown) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""

    def _settle(self, text: str) -> None:
        """Notes that all of the window's text is out, and drops the tokens that later text cannot depend on."""
        if text == self._shown and text and self._settled:
            del self._window[self._settled :]  # special tokens: without text, they must not become the only context
        elif len(self._window) > WINDOW_TOKENS:
            kept = self._window[self._settled :]
            kept_text = self._decode(kept)
            if (kept_text and text.endswith(kept_text)) or not text:
                self._window, text = kept, kept_text
        self._shown = text
        self._settled = len(self._window)

    def _cut(self, text: str) -> str:
        """Hands out most of a window in which nothing ends a character, where its halves decode as the whole does."""
        last = len(self._window) - MAX_HELD
        for position in range(last, last - 8, -1):
            left = self._decode(self._window[:position])
            if left + self._decode(self._window[position:]) == text:
                break
        else:  # no such place: give up exactness for what is no text anyway
            position, left = last, self._decode(self._window[:last])
        piece = left[len(self._shown) :]
        self._window, self._shown, self._settled = self._window[position:], self._shown[len(left) :], 0
        return piece


class StopMatcher:
    """Finds the first stop string to be completed, however the text is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is certain to come before any stop string, and the stop string if one is complete.

        Of several, the one that ends first counts, then the one that begins first; so one character at a time and
        all at once give the same result.
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
        """What was held back, for an answer that ended without a stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """The length of the longest end of ``text`` that begins ``stop``."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
