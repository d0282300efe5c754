"""From tokens to text while they arrive: whole characters only, and nothing that may belong to a stop string.

Works for any tokenizer whose text only grows at its end as tokens are appended, but for an unfinished character.
"""

from collections.abc import Iterable, Sequence
from typing import Any

REPLACEMENT = "\ufffd"
MAX_HELD = 3  # bytes of an unfinished UTF-8 character, hence of replacement characters that may still change
CONTEXT_TOKENS = 8
WINDOW_TOKENS = 16  # how long the window grows before its settled part is dropped
GARBAGE_TOKENS = 64  # how long it grows where no token ends a character


class Detokenizer:
    """The text of one answer, in pieces. The pieces together are the decoded answer, special tokens skipped.

    Only a window of recent tokens is decoded each time, so a token costs the same at the end of a long answer as at
    its beginning. ``context`` are the tokens before the answer: with them a tokenizer that marks words by a leading
    space keeps the space of the first one.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(context[-CONTEXT_TOKENS:])
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):  # half a character before the answer: nothing the answer could complete
            self._window, text = [], ""
        self._emitted = len(text)  # characters of the window's text that were handed out
        self._settled = len(self._window)  # the window's tokens up to here end a character and are handed out

    def push(self, tokens: Iterable[int]) -> str:
        """The text that these tokens complete."""
        self._window.extend(tokens)
        text = self._decode(self._window)
        held = len(text) - len(text.rstrip(REPLACEMENT)) if text.endswith(REPLACEMENT) else 0
        end = len(text) - min(held, MAX_HELD)
        piece = text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        if not held:
            self._settle(text, changed=bool(piece))
        elif len(self._window) > GARBAGE_TOKENS:
            self._cut(text)
        return piece

    def finish(self) -> str:
        """What was held back; call it once, at the end of the answer."""
        return self._decode(self._window)[self._emitted :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""

    def _settle(self, text: str, *, changed: bool) -> None:
        """Notes that the window ends with a whole character, and drops what the next one no longer depends on."""
        if not changed and self._emitted and self._settled:
            del self._window[self._settled :]  # special tokens: without text, they must not become the only context
        elif len(self._window) > WINDOW_TOKENS:
            kept = self._window[self._settled :]
            kept_text = self._decode(kept)
            if kept_text and text.endswith(kept_text):
                self._window, self._emitted = kept, len(kept_text)
            elif not text:
                self._window = []
        self._settled = len(self._window)

    def _cut(self, text: str) -> None:
        """Shortens a window in which nothing ever ends a character, where two halves decode to the same text."""
        for position in range(len(self._window) - MAX_HELD, len(self._window) - 12, -1):
            left = self._decode(self._window[:position])
            if len(left) <= self._emitted and left + self._decode(self._window[position:]) == text:
                break
        else:  # no such place: give up exactness for what is no text anyway
            position = len(self._window) - MAX_HELD
            left = text[: max(0, len(text) - len(self._decode(self._window[position:])))]
        self._window = self._window[position:]
        self._emitted = max(0, self._emitted - len(left))
        self._settled = 0


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
