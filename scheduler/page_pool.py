"""Accounting of KV-cache pages: who holds which, and which are known by what they hold.

A page is *held* by one or more requests, *kept* (held by nobody, but known by page_hash and given out again to whoever
needs the same contents, until its place is needed), or *free*.
"""

import hashlib
import secrets
from collections import OrderedDict

import numpy as np

_BYTES = 16  # of a page_hash: 2^-64 is what 2^32 pages risk of two with the same


class PagePool:
    """A fixed number of equal pages."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        """``page_size`` is in tokens."""
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a page pool needs at least one page of one token, not {num_pages} of {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the least recently held first
        self._holders = [0] * num_pages
        self._page_of_hash: dict[bytes, int] = {}
        self._hash_of_page: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be allocated: the free and the kept ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.page_size)

    def count_exclusive(self, pages: list[int]) -> int:
        """How many of the pages are held by one request only."""
        return list(map(self._holders.__getitem__, pages)).count(1)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages of whatever contents, or None (and nothing taken) if fewer can be had. Kept pages are taken
        when no other is free, and forgotten."""
        if count > self.num_free:
            return None
        return [self._take_free() for _ in range(count)]

    def acquire_cached(self, hashes: list[bytes]) -> list[int]:
        """The pages of the longest run of ``hashes``, from the first on, that is known; held once more each."""
        shared = []
        for page_hash in hashes:
            page = self._page_of_hash.get(page_hash)
            if page is None:
                break
            self._cached.pop(page, None)
            self._holders[page] += 1
            shared.append(page)
        return shared

    def cache(self, page: int, page_hash: bytes) -> None:
        """Make a held page known by what it holds from now on, unless another page is known by that already."""
        assert self._holders[page], f"page {page} is held by nobody"
        if page_hash not in self._page_of_hash and page not in self._hash_of_page:
            self._page_of_hash[page_hash], self._hash_of_page[page] = page, page_hash

    def free(self, pages: list[int]) -> None:
        """Give pages back, a request's pages in their order. This is the only place where a page becomes free: it does
        when nobody holds it any more."""
        for page in reversed(pages):  # a chain is found from its beginning, so that its end is forgotten first
            assert self._holders[page], f"page {page} freed twice"
            self._holders[page] -= 1
            if not self._holders[page]:
                if page in self._hash_of_page:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def _take_free(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            del self._page_of_hash[self._hash_of_page.pop(page)]
        self._holders[page] = 1
        return page


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
