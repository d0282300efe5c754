"""Accounting of KV-cache pages, with a prefix cache.

A page is *held* by one or more requests, *cached* or *free*. No request holds a cached page, but its contents are still
valid: a request whose prefix has the same page hash acquires it again. The least recently held cached page is evicted
when no page is free.
"""

import hashlib
import secrets
from collections import OrderedDict

import numpy as np

_HASH_BYTES = 16  # among 2^32 pages, two have the same hash with a probability of 2^-64


class PagePool:
    """A fixed number of equal pages."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        """``page_size`` in tokens. Raises ValueError if either number is below 1."""
        if num_pages < 1 or page_size < 1:
            raise ValueError(
                f"a page pool needs at least one page of one token, not {num_pages} pages of {page_size} tokens"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently held first
        self._holders = [0] * num_pages
        self._page_of_hash: dict[bytes, int] = {}
        self._hash_of_page: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be allocated: the free and the cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that no request holds and whose contents can be reused."""
        return len(self._cached)

    def pages_for(self, num_tokens: int) -> int:
        """Return how many pages ``num_tokens`` tokens take."""
        return -(-num_tokens // self.page_size)

    def count_exclusive(self, pages: list[int]) -> int:
        """Return how many of the pages are held by a single request."""
        return list(map(self._holders.__getitem__, pages)).count(1)

    def allocate(self, count: int) -> list[int] | None:
        """Return ``count`` pages with undefined contents, held once each; None, without taking any, if there are fewer.

        Cached pages are evicted once no page is free."""
        if count > self.num_free:
            return None
        return [self._take_free() for _ in range(count)]

    def acquire_cached(self, hashes: list[bytes]) -> list[int]:
        """Return the pages of the longest known prefix of ``hashes``, each held once more."""
        found = []
        for page_hash in hashes:
            page = self._page_of_hash.get(page_hash)
            if page is None:
                break
            self._cached.pop(page, None)
            self._holders[page] += 1
            found.append(page)
        return found

    def cache(self, page: int, page_hash: bytes) -> None:
        """Make a held page findable by its hash, unless another page with that hash is."""
        assert self._holders[page], f"page {page} is not held"
        if page_hash not in self._page_of_hash and page not in self._hash_of_page:
            self._page_of_hash[page_hash], self._hash_of_page[page] = page, page_hash

    def free(self, pages: list[int]) -> None:
        """Release ``pages``, given in the order of their tokens. A page that no request holds any more becomes cached
        or free; nothing else frees pages."""
        for page in reversed(pages):  # a prefix is looked up from its start, so its last page is evicted first
            assert self._holders[page], f"page {page} freed twice"
            self._holders[page] -= 1
            if not self._holders[page]:
                if page in self._hash_of_page:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def _take_free(self) -> int:
        """Return a free page, or an evicted one, held once."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            del self._page_of_hash[self._hash_of_page.pop(page)]
        self._holders[page] = 1
        return page


class PageHasher:
    """Hashes pages by their contents and by all tokens before them, as a chain.

    A random key for each engine prevents crafted collisions."""

    def __init__(self, page_size: int) -> None:
        """``page_size`` in tokens."""
        self._page_size, self._key = page_size, secrets.token_bytes(32)

    def extend(self, hashes: list[bytes], tokens: np.ndarray, salt: str = "") -> None:
        """Append the hashes of the pages that ``tokens`` int32 [T] fill to ``hashes``, those of the pages before them.

        Tokens after the last full page are ignored. Sequences with different ``salt`` have no hash in common."""
        data, size = np.ascontiguousarray(tokens, dtype=np.int32).tobytes(), 4 * self._page_size
        # Every hash depends on the one before it, and the first on the key.
        previous = hashes[-1] if hashes else _hash(self._key + salt.encode())
        for start in range(0, len(data) - size + 1, size):
            previous = _hash(previous + data[start : start + size])
            hashes.append(previous)


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_HASH_BYTES).digest()
