"""Who runs, and on which pages.

A request is let in when the pages of its known tokens can be had, without a thought of those it will write; it gets
more as it grows. When they run short, drafts do without first, and then a running request gives its pages back, waits
again, and is recomputed with what it has answered as known tokens: the worst priority first, of these the one let in
last. So the best of them always goes on. A better priority that waits may do the same to a worse one that runs. What
is preempted keeps its output, and no token changes.

A request that has waited ``starvation_bound`` steps in all is aged (``scheduler/waiting_queue.py``): nobody passes
it any more, and no priority preempts it. If it was preempted before, nothing does so again: it is let in with all the
pages it can ever need. Of two requests that need more than half of the pages each, both come to their ends that way.
"""

import numpy as np

from euryale.scheduler.limits import SchedulerLimits
from euryale.scheduler.page_pool import PageHasher, PagePool
from euryale.scheduler.request import FinishReason, Request
from euryale.scheduler.waiting_queue import WaitingQueue

STARVATION_BOUND = 5000


class Admission:
    """The requests, ``waiting`` and ``running`` (in the order in which they were let in), and the ``pages``.

    Before a step is planned call ``begin_step``, then ``hold_for_drafts`` for each tree; after it ``settle`` for each
    request that it advanced, or ``end``."""

    def __init__(self, limits: SchedulerLimits, enable_prefix_caching: bool, starvation_bound: int) -> None:
        """``enable_prefix_caching``: requests that begin alike use the same pages, and these are kept for later ones
        while there is room. ``starvation_bound`` in steps; with 0 requests are let in in the order of arrival."""
        self.limits = limits
        self.pages = PagePool(limits.num_pages, limits.page_size)
        self.waiting = WaitingQueue(starvation_bound)
        self.running: list[Request] = []
        self.num_prompt_tokens = self.num_cached_tokens = (
            0  # prompt tokens of requests that began, and those found computed
        )
        self.num_preempted_for_pages = self.num_preempted_for_priority = 0
        self.num_recomputed = 0  # tokens
        self._hasher = PageHasher(limits.page_size) if enable_prefix_caching else None
        # Names of pages that running requests will compute, and who waits for them.
        self._pending: dict[bytes, list[Request]] = {}
        self._step = 0
        self._preempted_now: set[int] = set()  # keys; they wait for a step at least

    def add(self, request: Request) -> None:
        """Queue a request; ValueError as ``SchedulerLimits.check``. Its prompt is hashed now, so that a step that
        begins with many does not wait for it."""
        self.limits.check(request)
        self._hash_known(request)
        self.waiting.enter(request, self._step)

    def cancel(self, key: int) -> Request | None:
        """End the request now and free its pages; None if it is not here (any more). Call between steps."""
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
        """A running request is done."""
        self.running.remove(request)
        self._give_back(request)

    def begin_step(self) -> None:
        """Settle who runs in the next step: every running request has pages for all its known tokens then."""
        self.waiting.count(self._step)
        self._preempted_now.clear()
        self._grow()
        if self.waiting and not self._preempted_now:
            self._admit()
        self._step += 1

    def room_for_drafts(self, requests: list[Request]) -> list[int]:
        """How many tokens could be committed after the known ones of each running request: in its own pages, and in its
        share of those that can be had, the first requests' one page more."""
        share, more = divmod(self.pages.num_free, max(1, len(requests)))
        size = self.pages.page_size
        return [(len(r.pages) + share + (i < more)) * size - r.num_known for i, r in enumerate(requests)]

    def hold_for_drafts(self, request: Request, depth: int) -> None:
        """Take pages for ``depth`` tokens after the known ones, which there is room for; ``settle`` gives those back
        that were not needed."""
        lacking = self.pages.pages_for(request.num_known + depth) - len(request.pages)
        if lacking > 0:
            self._take(request, lacking)

    def settle(self, request: Request) -> None:
        """Make the running request's full pages known that are computed by now, and take back what its drafts did not
        fill: speculation holds no page from one step to the next."""
        size, known = self.pages.page_size, request.num_known
        if (len(request.pages) - 1) * size >= known and not request.is_protected:
            needed = self.pages.pages_for(known)
            self.pages.free(request.pages[needed:])
            del request.pages[needed:]
        full = min(request.num_computed, known) // size  # an answer may end before the accepted path does
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
        """A page for each running request whose last known token has none, if need be from another."""
        size = self.pages.page_size
        for request in list(self.running):
            # A preempted request has no pages; one that is protected has all.
            while request.pages and len(request.pages) * size < request.num_known:
                if not self._take(request, 1):
                    self._preempt(self._victim())
                    self.num_preempted_for_pages += 1

    def _take(self, request: Request, count: int) -> bool:
        pages = self.pages.allocate(count)
        if pages is None:
            return False
        held = len(request.pages)
        request.page_ids[held : held + count] = pages
        request.pages += pages
        return True

    # ---- preemption

    def _victim(self) -> Request:
        """Who gives way when pages run short: the aged last, the worst priority first, of these the one let in last;
        there is one, for whoever lacks a page is not protected."""
        found = [r for r in reversed(self.running) if not r.is_protected]
        return max(found, key=lambda r: (r.aged_since is None, r.params.priority))

    def _worse_than(self, request: Request) -> list[Request]:
        """Running requests of a worse priority that may be preempted for it, the first to be so first."""
        best = request.params.priority
        found = [r for r in reversed(self.running) if r.params.priority > best and r.aged_since is None]
        return sorted(found, key=lambda r: -r.params.priority)

    def _preempt(self, request: Request) -> None:
        """Back to waiting, with the output and without the pages."""
        request.num_lost, request.num_computed = request.num_computed, 0
        request.num_preempted += 1
        self.end(request)
        self.waiting.enter_again(request, self._step)
        self._preempted_now.add(request.key)

    # ---- admission

    def _admit(self) -> None:
        """Let waiting requests in, in their order: one that does not fit holds back those behind it, so that none
        starves. One whose next page a running request is computing lets others pass."""
        for _ in range(self.limits.max_num_seqs):  # so that a step's time does not grow with the queue
            request = self.waiting.first
            if request is None or request.key in self._preempted_now:
                return
            victims = self._worse_than(request)
            has_seat = len(self.running) < self.limits.max_num_seqs
            if not victims and not (has_seat and self.pages.num_free):
                return
            hashes = self._hash_known(request)
            shared = self.pages.acquire_cached(hashes)
            if len(shared) < len(hashes) and hashes[len(shared)] in self._pending:
                self.pages.free(shared)
                self._park(request, hashes[len(shared) :])
                continue
            needed = self.pages.pages_for(request.num_known)
            if request.is_protected:
                needed = self.limits.max_pages(request)
            if not self._make_room(needed - len(shared), victims):
                self.pages.free(shared)
                return
            self._start(request, shared, needed - len(shared))
            self._pending.update(
                (page_hash, []) for page_hash in hashes[len(shared) :] if page_hash not in self._pending
            )

    def _make_room(self, num_pages: int, victims: list[Request]) -> bool:
        """Whether there are a seat and so many pages, and one more for each running request that can still grow;
        preempts the first of ``victims`` that this takes, or none if all of them do not help."""
        seats, room = self.limits.max_num_seqs - len(self.running), self.pages.num_free - num_pages
        if seats > 0 and room >= len(self.running):
            return True  # without a look at each
        room -= sum(_can_grow(r) for r in self.running)
        count = 0
        while seats <= 0 or room < 0:
            if count == len(victims):
                return False
            seats += 1
            room += self.pages.count_exclusive(victims[count].pages) + _can_grow(victims[count])
            count += 1
        for victim in victims[:count]:
            self._preempt(victim)
        self.num_preempted_for_priority += count
        return True

    def _start(self, request: Request, shared: list[int], num_new: int) -> None:
        self.waiting.leave(request, self._step)
        request.page_ids = np.zeros(self.limits.max_pages(request), dtype=np.int32)
        request.page_ids[: len(shared)] = shared
        request.pages, request.num_cached_pages = list(shared), len(shared)
        self._take(request, num_new)
        request.num_computed = len(shared) * self.pages.page_size
        if request.num_preempted:
            self.num_recomputed += max(request.num_lost - request.num_computed, 0)
        else:
            self.num_cached_tokens += request.num_computed
            self.num_prompt_tokens += len(request.prompt)
        self.running.append(request)

    # ---- shared pages

    def _hash_known(self, request: Request) -> list[bytes]:
        """Names of the known tokens' full pages but for the one with the last token, which is computed in any case:
        what follows it is what the request asks for. None where the prompt's rows are to be reported on: they all have
        to be computed."""
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
        """Let others pass until the last of the pages that are coming one after the other is there, or will not be."""
        last = next((i for i, page_hash in enumerate(hashes) if page_hash not in self._pending), len(hashes)) - 1
        self._pending[hashes[last]].append(request)
        self.waiting.park(request)

    def _no_longer_pending(self, page_hash: bytes) -> None:
        for request in self._pending.pop(page_hash, ()):
            self.waiting.wake(request)

    def _give_back(self, request: Request) -> None:
        for page_hash in request.page_hashes[request.num_cached_pages :]:
            self._no_longer_pending(page_hash)
        self.pages.free(request.pages)
        request.pages = []


def _can_grow(request: Request) -> bool:
    return len(request.pages) < len(request.page_ids)
