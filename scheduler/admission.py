"""Admission and preemption: which requests run, and on which KV pages.

A request is admitted when pages for its known tokens are available; pages for future output are not reserved. It gets
more pages as it grows.

When pages run short, draft tokens give way first. Then a running request is preempted: the lowest priority, and among
equals the most recently admitted one. A waiting request of higher priority may preempt running ones too. A preempted
request frees its pages, keeps its output, and waits. Once it runs again, prompt and output are recomputed as known
tokens, so that no token changes.

A request that has waited ``starvation_bound`` steps in total is aged (see ``scheduler/waiting_queue.py``). No request
overtakes it, and no priority preempts it. If it was preempted before, it is admitted with all pages it can ever need
and is never preempted again. Hence two requests that each need more than half of the pages both finish.

A lower number of ``SamplingParams.priority`` is a higher priority.
"""

import numpy as np

from euryale.scheduler.limits import SchedulerLimits
from euryale.scheduler.page_pool import PageHasher, PagePool
from euryale.scheduler.request import FinishReason, Request
from euryale.scheduler.waiting_queue import WaitingQueue

STARVATION_BOUND = 5000


class Admission:
    """Owns the ``waiting`` requests, the ``running`` ones in the order of admission, and the ``pages``.

    Call ``begin_step`` before a step is planned, and ``hold_for_drafts`` for each tree. After the step call ``settle``
    for each request that it advanced, and ``end`` for those that finished."""

    def __init__(self, limits: SchedulerLimits, enable_prefix_caching: bool, starvation_bound: int) -> None:
        """``enable_prefix_caching``: requests with a common prefix use the same pages, which stay cached until their
        memory is needed. ``starvation_bound`` in steps; 0 admits requests in the order of arrival."""
        self.limits = limits
        self.pages = PagePool(limits.num_pages, limits.page_size)
        self.waiting = WaitingQueue(starvation_bound)
        self.running: list[Request] = []
        self.num_prompt_tokens = 0  # of requests admitted for the first time
        self.num_cached_tokens = 0  # of these tokens, those found in cached pages
        self.num_preempted_for_pages = self.num_preempted_for_priority = 0
        self.num_recomputed = 0  # tokens computed again after a preemption
        self._hasher = PageHasher(limits.page_size) if enable_prefix_caching else None
        # Hashes of the pages that running requests will compute, and the requests that wait for each.
        self._pending: dict[bytes, list[Request]] = {}
        self._step = 0
        self._preempted_now: set[int] = set()  # keys; not admitted again before the next step

    def add(self, request: Request) -> None:
        """Queue a request. Its prompt is hashed now, so that a step that admits many requests is not delayed.

        Raises ValueError as ``SchedulerLimits.check``."""
        self.limits.check(request)
        self._hash_known(request)
        self.waiting.enter(request, self._step)

    def cancel(self, key: int) -> Request | None:
        """End the request now, free its pages and return it; None if there is no such request. Call between steps."""
        request = self.waiting.find(key)
        if request is not None:
            self.waiting.leave(request, self._step)
        else:
            request = next((r for r in self.running if r.key == key), None)
            if request is None:
                return None
            self.end(request)
        request.finish_reason = FinishReason.CANCELLED
        return request

    def end(self, request: Request) -> None:
        """Remove a running request and free its pages."""
        self.running.remove(request)
        self._give_back(request)

    def begin_step(self) -> None:
        """Decide which requests run in the next step. Each of them has pages for all its known tokens afterwards."""
        self.waiting.age(self._step)
        self._preempted_now.clear()
        self._grow()
        if self.waiting and not self._preempted_now:
            self._admit()
        self._step += 1

    def room_for_drafts(self, requests: list[Request]) -> list[int]:
        """Return how many tokens could be committed after the known ones of each of the running ``requests``.

        Counts the request's own pages and an equal part of the available ones; the first requests get the remainder."""
        per_request, remainder = divmod(self.pages.num_free, max(1, len(requests)))
        size = self.pages.page_size
        return [(len(r.pages) + per_request + (i < remainder)) * size - r.num_known for i, r in enumerate(requests)]

    def hold_for_drafts(self, request: Request, depth: int) -> None:
        """Allocate pages for ``depth`` tokens after the known ones, at most as ``room_for_drafts`` said. ``settle``
        frees those that stay empty."""
        lacking = self.pages.pages_for(request.num_known + depth) - len(request.pages)
        if lacking > 0:
            self._take(request, lacking)

    def settle(self, request: Request) -> None:
        """Free the pages that the running request's draft tokens did not fill, and cache its pages that are full now.

        Speculation holds no page from one step to the next."""
        size, known = self.pages.page_size, request.num_known
        if (len(request.pages) - 1) * size >= known and not request.is_protected:
            needed = self.pages.pages_for(known)
            self.pages.free(request.pages[needed:])
            del request.pages[needed:]
        full = min(request.num_computed, known) // size  # an answer may end within the accepted path
        if self._hasher is None or full == request.num_cached_pages:
            return
        hashes = request.page_hashes
        if len(hashes) < full:
            self._hasher.extend(
                hashes, request.known_tokens(len(hashes) * size, full * size), request.params.cache_salt
            )
        for place in range(request.num_cached_pages, full):
            self.pages.cache(request.pages[place], hashes[place])
            self._no_longer_pending(hashes[place])
        request.num_cached_pages = full

    # ---- growth

    def _grow(self) -> None:
        """Allocate a page for each running request whose last known token has none, preempting others if necessary."""
        size = self.pages.page_size
        for request in list(self.running):
            # A preempted request has no pages; a protected one has all it can need.
            while request.pages and len(request.pages) * size < request.num_known:
                if not self._take(request, 1):
                    self._preempt(self._victim())
                    self.num_preempted_for_pages += 1

    def _take(self, request: Request, count: int) -> bool:
        """Allocate ``count`` pages for the request; return False, without allocating any, if there are fewer."""
        pages = self.pages.allocate(count)
        if pages is None:
            return False
        held = len(request.pages)
        request.page_ids[held : held + count] = pages
        request.pages += pages
        return True

    # ---- preemption

    def _victim(self) -> Request:
        """Return the preemption victim when pages run short: lowest priority, then most recently admitted.

        Aged requests come after all others. There always is a victim: a request that lacks a page is not protected."""
        candidates = [r for r in reversed(self.running) if not r.is_protected]
        return max(candidates, key=lambda r: (r.aged_since is None, r.params.priority))

    def _victims_for(self, request: Request) -> list[Request]:
        """Return the running requests that may be preempted for a waiting one, in the order of preemption."""
        priority = request.params.priority
        lower = [r for r in reversed(self.running) if r.params.priority > priority and r.aged_since is None]
        return sorted(lower, key=lambda r: -r.params.priority)

    def _preempt(self, request: Request) -> None:
        """Move a running request back to the waiting ones. It keeps its output and frees its pages."""
        request.num_lost, request.num_computed = request.num_computed, 0
        request.num_preempted += 1
        self.end(request)
        self.waiting.enter_again(request, self._step)
        self._preempted_now.add(request.key)

    # ---- admission

    def _admit(self) -> None:
        """Admit waiting requests in their order. One that does not fit blocks those behind it, so that none starves.

        A request whose next page is being computed by a running request is parked, and others overtake it."""
        for _ in range(self.limits.max_num_seqs):  # bounds the time of a step, however long the queue
            request = self.waiting.first
            if request is None or request.key in self._preempted_now:
                return
            victims = self._victims_for(request)
            has_room = len(self.running) < self.limits.max_num_seqs
            if not victims and not (has_room and self.pages.num_free):
                return
            hashes = self._hash_known(request)
            cached = self.pages.acquire_cached(hashes)
            missing = hashes[len(cached) :]
            if missing and missing[0] in self._pending:
                self.pages.free(cached)
                self._park(request, missing)
                continue
            needed = self.pages.pages_for(request.num_known)
            if request.is_protected:
                needed = self.limits.max_pages(request)
            if not self._make_room(needed - len(cached), victims):
                self.pages.free(cached)
                return
            self._start(request, cached, needed - len(cached))
            self._pending.update((page_hash, []) for page_hash in missing if page_hash not in self._pending)

    def _make_room(self, num_pages: int, victims: list[Request]) -> bool:
        """Return whether one more request can run with ``num_pages`` new pages.

        One further page is left for each running request that can still grow. Preempts as many of ``victims`` as this
        takes, in their order, or none if all of them would not suffice."""
        num_free_seqs, num_spare = self.limits.max_num_seqs - len(self.running), self.pages.num_free - num_pages
        if num_free_seqs > 0 and num_spare >= len(self.running):
            return True  # the common case, decided without visiting each request
        num_spare -= sum(_can_grow(r) for r in self.running)
        count = 0
        while num_free_seqs <= 0 or num_spare < 0:
            if count == len(victims):
                return False
            num_free_seqs += 1
            num_spare += self.pages.count_exclusive(victims[count].pages) + _can_grow(victims[count])
            count += 1
        for victim in victims[:count]:
            self._preempt(victim)
        self.num_preempted_for_priority += count
        return True

    def _start(self, request: Request, cached: list[int], num_new_pages: int) -> None:
        """Move a waiting request to the running ones, with its ``cached`` pages and so many new ones."""
        self.waiting.leave(request, self._step)
        request.page_ids = np.zeros(self.limits.max_pages(request), dtype=np.int32)
        request.page_ids[: len(cached)] = cached
        request.pages, request.num_cached_pages = list(cached), len(cached)
        self._take(request, num_new_pages)
        request.num_computed = len(cached) * self.pages.page_size
        if request.num_preempted:
            self.num_recomputed += max(request.num_lost - request.num_computed, 0)
        else:
            self.num_cached_tokens += request.num_computed
            self.num_prompt_tokens += len(request.prompt)
        self.running.append(request)

    # ---- cached pages

    def _hash_known(self, request: Request) -> list[bytes]:
        """Return the hashes of the full pages of known tokens, without the page that holds the last token.

        The last token is always computed, since its logits give the next one. The list is empty if prompt logprobs are
        still to be computed, because these need every row of the prompt."""
        if self._hasher is None or request.wants_prompt_logprobs:
            return []
        hashes, size = request.page_hashes, self.pages.page_size
        full = request.num_known // size
        if len(hashes) < full:
            self._hasher.extend(
                hashes, request.known_tokens(len(hashes) * size, full * size), request.params.cache_salt
            )
        return hashes[: (request.num_known - 1) // size]

    def _park(self, request: Request, hashes: list[bytes]) -> None:
        """Park a waiting request until the last consecutive pending page of ``hashes`` is cached or given up."""
        last = next((i for i, page_hash in enumerate(hashes) if page_hash not in self._pending), len(hashes)) - 1
        self._pending[hashes[last]].append(request)
        self.waiting.park(request)

    def _no_longer_pending(self, page_hash: bytes) -> None:
        """Wake the requests that wait for a page, which was cached or given up."""
        for request in self._pending.pop(page_hash, ()):
            self.waiting.wake(request)

    def _give_back(self, request: Request) -> None:
        """Free the request's pages and give up those it had not computed yet."""
        for page_hash in request.page_hashes[request.num_cached_pages :]:
            self._no_longer_pending(page_hash)
        self.pages.free(request.pages)
        request.pages = []


def _can_grow(request: Request) -> bool:
    """Return whether the request may need more pages than it holds."""
    return len(request.pages) < len(request.page_ids)
