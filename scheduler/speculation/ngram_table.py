"""A table of n-grams: which tokens followed a given context before.

A *context* is the last one to ORDERS tokens within a *source*. A source is the calibration text, the tokens of one
request, or the traffic of all requests with the same cache salt. The table has a fixed size: contexts are hashed to
rows, and a new context overwrites the one in its row. A 32-bit fingerprint detects contexts of the same row. The text
has rows of its own, which are never overwritten.

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

# Rows of the text hold the ``total`` likeliest successors, with their fractions in units of 1/65535 in ``fractions``.
# Rows of other sources hold the latest successors, with repetitions. The next one goes to place ``total`` modulo
# SUCCESSORS, which is empty or has the oldest one.
ROW = np.dtype(
    [("fingerprint", "u4"), ("total", "u4"), ("successors", "i4", SUCCESSORS), ("fractions", "u2", SUCCESSORS)]
)
_COLUMNS = ("fingerprint", "total", "successors", "fractions")


def _windows(tokens: np.ndarray) -> np.ndarray:
    """Return each of ``tokens`` int32 [T] after the ORDERS tokens before it, padded with -1: int32 [T, ORDERS + 1]."""
    padded = np.concatenate([np.full(ORDERS, -1, dtype=np.int32), tokens])
    return np.lib.stride_tricks.sliding_window_view(padded, ORDERS + 1)


def keys_of(last_NO: np.ndarray, source_N: np.ndarray) -> np.ndarray:
    """Return the hashes of the contexts of one to ORDERS tokens, uint64 [N, O].

    ``last_NO`` int32: the last tokens, latest first. ``source_N`` int64: ids of their sources."""
    sums = ((last_NO + 1).astype(np.uint64) * PLACE_MULTIPLIERS).cumsum(axis=1) + ORDER_OFFSETS
    keys = (sums + (source_N.astype(np.uint64) * SOURCE_MULTIPLIER)[:, None]) * MIX_MULTIPLIER
    return (keys ^ (keys >> FOLD_BITS)) * MIX_MULTIPLIER


class NgramTable:
    """``rows`` [2**text_bits + 2**live_bits] of dtype ROW: those of the text, then those of other sources."""

    def __init__(self, text_bits: int = 0, live_bits: int = LIVE_BITS) -> None:
        """Make an empty table with 2**``text_bits`` rows for the text and 2**``live_bits`` others."""
        self.text_bits, self.live_bits = text_bits, live_bits
        self.rows = np.zeros((1 << text_bits) + (1 << live_bits), dtype=ROW)

    def rows_of(self, keys: np.ndarray, is_text: bool) -> np.ndarray:
        """Return the row index of each context hash: int64 [N]."""
        if is_text:
            if not self.text_bits:
                return np.zeros(len(keys), dtype=np.int64)
            return (keys >> np.uint64(64 - self.text_bits)).astype(np.int64)
        return (keys >> np.uint64(64 - self.live_bits)).astype(np.int64) + (1 << self.text_bits)

    @classmethod
    def of_text(cls, documents: list[np.ndarray], text_bits: int = TEXT_BITS) -> "NgramTable":
        """Return a table of the calibration text ``documents``, each int32 [T].

        If several contexts have the same row, the most frequent one gets it. Contexts of ORDERS tokens are left out,
        since there are too many."""
        table = cls(text_bits)
        windows = np.concatenate([_windows(tokens) for tokens in documents])
        used = windows[:, ORDERS - 1 : 0 : -1] >= 0
        keys = keys_of(windows[:, ORDERS - 1 :: -1], np.full(len(windows), TEXT_SOURCE))[:, : ORDERS - 1][used]
        tokens = np.broadcast_to(windows[:, ORDERS:], used.shape)[used]
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
            row["fractions"][: len(likeliest)] = counts[likeliest] * 65535 // totals[i]
        return table

    @staticmethod
    def bits_for(num_tokens: int) -> int:
        """Return the ``live_bits`` for ``num_tokens`` tokens, within bounds.

        Each token has contexts of all orders, in its request's source and in the traffic's."""
        return min(max(LIVE_BITS, (2 * ORDERS * num_tokens).bit_length()), MAX_LIVE_BITS)

    def save_text(self, directory: Path) -> None:
        """Write the rows of the text to FILE in ``directory``."""
        text = self.rows[: 1 << self.text_bits]
        save_file({name: np.ascontiguousarray(text[name]) for name in _COLUMNS}, directory / FILE)

    @classmethod
    def load_text(cls, directory: Path, vocab_size: int, live_bits: int = LIVE_BITS) -> "NgramTable":
        """Return a table with the text that ``save_text`` wrote.

        Raises ValueError if the file cannot be read or has tokens outside the vocabulary."""
        try:
            arrays = load_file(directory / FILE)
            for name in _COLUMNS:
                kind = ROW[name]
                if arrays[name].dtype != kind.base or arrays[name].shape != (len(arrays["total"]), *kind.shape):
                    columns = f", {kind.shape[0]}" if kind.shape else ""
                    raise ValueError(f"its tensor {name} must be {kind.base} [rows{columns}]")
            table = cls(len(arrays["total"]).bit_length() - 1, live_bits)
            for name in _COLUMNS:
                table.rows[name][: 1 << table.text_bits] = arrays[name]
            successors, totals = table.rows["successors"], table.rows["total"]
            if successors.max() >= vocab_size or successors.min() < -1:
                raise ValueError(f"it has tokens outside the vocabulary of {vocab_size}: it belongs to another model")
            if totals.max() > SUCCESSORS:
                raise ValueError(f"its tensor total exceeds {SUCCESSORS}")
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise ValueError(
                f"{directory / FILE} is not an n-gram table ({error}): calibrate the heads again or remove it"
            ) from error
        return table
