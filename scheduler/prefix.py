"""Names of full KV pages: a page is known by its tokens and all before them, so that requests with the same beginning
find each other's pages."""

import hashlib
import secrets

import numpy as np

_BYTES = 16  # of a name: 2^-64 is what 2^32 pages risk of two with the same


class PageNames:
    """Names pages in chains. The key is drawn anew for every engine, so that nobody can choose tokens whose names
    collide."""

    def __init__(self, page_size: int) -> None:
        """``page_size`` in tokens."""
        self._page_size, self._key = page_size, secrets.token_bytes(32)

    def extend(self, names: list[bytes], tokens: np.ndarray, salt: str = "") -> None:
        """Add to ``names``, those of a sequence's first pages, the names of the pages that ``tokens`` int32, which come
        next, fill. Sequences with different salts have no name in common."""
        for start in range(0, len(tokens) - self._page_size + 1, self._page_size):
            page = np.ascontiguousarray(tokens[start : start + self._page_size], dtype=np.int32)
            before = names[-1] if names else self._name(salt.encode()) if salt else b""
            names.append(self._name(before + page.tobytes()))

    def _name(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, key=self._key, digest_size=_BYTES).digest()
