"""What followed the same tokens before: a table of n-grams that says which tokens are likely after a given few.

A *context* is the last one to ORDERS tokens, within a *source*: the calibration text, the tokens of one request, or
those of several requests that may learn from each other. The table is bounded: contexts are hashed to rows, and one
that needs a row takes it from whoever had it. A 32-bit fingerprint keeps strangers apart. The text's contexts have rows
of their own, which nobody takes.

Shape suffixes: N contexts, O orders.
"""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from euryale.scheduler.speculation.constants import (
    FOLD_BITS,
    LIVE_BITS,
    MAX_LIVE_BITS,
    MIX_MULTIPLIER,
    ORDER_OFFSETS,
    ORDERS,
    PLACE_MULTIPLIERS,
    SOURCE_MULTIPLIER,
    SUCCESSORS,
    TEXT_BITS,
    TEXT_SOURCE,
)

FILE = "ngrams.safetensors"

# The text's rows hold the ``total`` likeliest successors with their shares in 65535ths. Those of other sources hold the
# latest successors, as often as they came; where ``total`` modulo SUCCESSORS says is room, or the eldest, which is the
# next to go.
ROW = np.dtype([("fingerprint", "u4"), ("total", "u4"), ("successors", "i4", SUCCESSORS), ("shares", "u2", SUCCESSORS)])


def _windows(tokens: np.ndarray) -> np.ndarray:
    """Each of ``tokens`` int32 behind the ORDERS before it, -1 where there is none: int32 [len(tokens), ORDERS + 1]."""
    padded = np.concatenate([np.full(ORDERS, -1, dtype=np.int32), tokens])
    return np.lib.stride_tricks.sliding_window_view(padded, ORDERS + 1)


def keys_of(last_NO: np.ndarray, source_N: np.ndarray) -> np.ndarray:
    """Names of the contexts of one to ORDERS tokens that end in ``last_NO``, the latest token first: uint64 [N, O]."""
    sums = ((last_NO + 1).astype(np.uint64) * PLACE_MULTIPLIERS).cumsum(axis=1) + ORDER_OFFSETS
    keys = (sums + (source_N.astype(np.uint64) * SOURCE_MULTIPLIER)[:, None]) * MIX_MULTIPLIER
    return (keys ^ (keys >> FOLD_BITS)) * MIX_MULTIPLIER


class NgramTable:
    """``rows``: the text's, then the others', of dtype ROW."""

    def __init__(self, text_bits: int = 0, live_bits: int = LIVE_BITS) -> None:
        """2 ** bits rows each."""
        self.text_bits, self.live_bits = text_bits, live_bits
        self.rows = np.zeros((1 << text_bits) + (1 << live_bits), dtype=ROW)

    def rows_of(self, keys: np.ndarray, is_text: bool) -> np.ndarray:
        """Where the contexts of these names are, or would be: int64."""
        if is_text:
            return (
                (keys >> np.uint64(64 - self.text_bits)).astype(np.int64)
                if self.text_bits
                else np.zeros(len(keys), int)
            )
        return (keys >> np.uint64(64 - self.live_bits)).astype(np.int64) + (1 << self.text_bits)

    @classmethod
    def of_text(cls, documents: list[np.ndarray], text_bits: int = TEXT_BITS) -> "NgramTable":
        """A table that knows ``documents``, int32 each. Of contexts that share a row the one seen most often gets it;
        contexts of ORDERS tokens are left out, being too many."""
        table = cls(text_bits)
        found = np.concatenate([_windows(tokens) for tokens in documents])
        used = found[:, ORDERS - 1 : 0 : -1] >= 0
        keys = keys_of(found[:, ORDERS - 1 :: -1], np.full(len(found), TEXT_SOURCE))[:, : ORDERS - 1][used]
        tokens = np.broadcast_to(found[:, ORDERS:], used.shape)[used]
        order = np.lexsort([tokens, keys])
        keys, tokens = keys[order], tokens[order]
        is_new = np.ones(len(keys), dtype=bool)
        is_new[1:] = (keys[1:] != keys[:-1]) | (tokens[1:] != tokens[:-1])
        starts = np.flatnonzero(is_new)
        counts = np.diff(np.append(starts, len(keys)))
        keys, tokens = keys[starts], tokens[starts]  # every pair of context and successor once
        contexts, begins = np.unique(keys, return_index=True)
        totals, ends = np.add.reduceat(counts, begins), np.append(begins[1:], len(keys))
        rows, by_count = table.rows_of(contexts, is_text=True), np.argsort(-totals, kind="stable")
        for i in by_count[np.unique(rows[by_count], return_index=True)[1]]:  # the most frequent of each row
            likeliest = begins[i] + np.argsort(-counts[begins[i] : ends[i]], kind="stable")[:SUCCESSORS]
            row = table.rows[rows[i]]
            row["fingerprint"], row["total"] = contexts[i].astype(np.uint32), len(likeliest)
            row["successors"][: len(likeliest)] = tokens[likeliest]
            row["shares"][: len(likeliest)] = counts[likeliest] * 65535 // totals[i]
        return table

    @staticmethod
    def bits_for(num_tokens: int) -> int:
        """How many live bits so many tokens need, within bounds: of each the contexts of all orders are kept twice."""
        return min(max(LIVE_BITS, (2 * ORDERS * num_tokens).bit_length()), MAX_LIVE_BITS)

    def save_text(self, directory: Path) -> None:
        """Write what is known of the text."""
        text = self.rows[: 1 << self.text_bits]
        save_file({name: np.ascontiguousarray(text[name]) for name in ROW.names}, directory / FILE)

    @classmethod
    def load_text(cls, directory: Path, vocab_size: int, live_bits: int = LIVE_BITS) -> "NgramTable":
        """A table that knows the text that ``save_text`` wrote; ValueError if there is no such file, or if it names
        tokens that are not below ``vocab_size``."""
        try:
            arrays = load_file(directory / FILE)
            for name in ROW.names:
                kind = ROW[name]
                if arrays[name].dtype != kind.base or arrays[name].shape != (len(arrays["total"]), *kind.shape):
                    raise ValueError(f"its tensor {name} is not of rows of {kind}")
            table = cls(len(arrays["total"]).bit_length() - 1, live_bits)
            for name in ROW.names:
                table.rows[name][: 1 << table.text_bits] = arrays[name]
            successors, totals = table.rows["successors"], table.rows["total"]
            if successors.max() >= vocab_size or successors.min() < -1 or totals.max() > SUCCESSORS:
                raise ValueError(f"it names tokens beyond the vocabulary of {vocab_size}")
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise ValueError(
                f"{directory / FILE} is no table of n-grams ({error}): calibrate the heads again or remove it"
            ) from error
        return table
