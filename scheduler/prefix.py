"""Names of full KV pages: a page is known by its tokens and all before them, so that requests with the same beginning
find each other's pages."""

import hashlib
import secrets

import numpy as np

_BYTES = 16  # of a page_hash: 2^-64 is what 2^32 pages risk of two with the same


class PageHasher:
    """Names pages in chains. The key is drawn anew for every engine, so that nobody can choose tokens whose hashes
    collide."""

    def __init__(self, page_size: int) -> None:
        """``page_size`` in tokens."""
        self._page_size, self._key = page_size, secrets.token_bytes(32)

    def extend(self, hashes: list[bytes], tokens: np.ndarray, salt: str = "") -> None:
        """Add to ``hashes``, those of a sequence's first pages, the hashes of the pages that ``tokens`` int32, which
        come next, fill. Sequences with different salts have no page_hash in common."""
        data, size = np.ascontiguousarray(tokens, dtype=np.int32).tobytes(), 4 * self._page_size
        # The key is in the first hash, and that one in all others.
        before = hashes[-1] if hashes else _hash(self._key + salt.encode())
        for start in range(0, len(data) - size + 1, size):
            before = _hash(before + data[start : start + size])
            hashes.append(before)


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_BYTES).digest()
