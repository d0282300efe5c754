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
        for start in range(0, len(tokens) - self._page_size + 1, self._page_size):
            page = np.ascontiguousarray(tokens[start : start + self._page_size], dtype=np.int32)
            before = hashes[-1] if hashes else self._hash(salt.encode()) if salt else b""
            hashes.append(self._hash(before + page.tobytes()))

    def _hash(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, key=self._key, digest_size=_BYTES).digest()
