"""The queue of waiting requests, in the order of admission.

Higher priorities come first, then earlier arrivals. A request that has waited ``bound`` steps in total is *aged*: from
then on it precedes all requests that are not aged, and follows those aged earlier. It keeps this place for good. Every
operation takes logarithmic time in the number of requests, apart from moving list entries (a memmove).
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

from euryale.scheduler.request import Request


class WaitingQueue:
    """A sorted queue. A parked request is in the queue but out of order: others overtake it until ``wake``.

    The caller counts steps. A request has waited a step if it was in the queue before and after the step was planned.
    """

    def __init__(self, bound: int) -> None:
        """``bound``: steps until a request is aged, at least 0; with 0 the order is that of arrival."""
        self._bound = bound
        self._requests: dict[int, Request] = {}  # by key, parked ones included
        self._since: dict[int, int] = {}  # the step at which each was queued
        self._turns: list[tuple[tuple[int, int, int], Request]] = []  # sorted, without parked ones
        self._due: list[tuple[int, int, Request]] = []  # sorted: at which step each will be aged
        self._parked: set[int] = set()
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Iterate over the requests in their order, then over the parked ones."""
        yield from [request for _, request in self._turns]
        yield from [self._requests[key] for key in self._requests if key in self._parked]

    @property
    def first(self) -> Request | None:
        """The next request to admit; None if there is none, or all are parked."""
        return self._turns[0][1] if self._turns else None

    def find(self, key: int) -> Request | None:
        """Return the request with this key, None if it does not wait here."""
        return self._requests.get(key)

    def enter(self, request: Request, step: int) -> None:
        """Queue a new request at ``step``."""
        request.arrival, request.num_waited, request.aged_since = self._arrivals, 0, None
        self._arrivals += 1
        self.enter_again(request, step)

    def enter_again(self, request: Request, step: int) -> None:
        """Queue a preempted request at ``step``; it keeps its arrival and the steps it has waited."""
        self._requests[request.key], self._since[request.key] = request, step
        insort(self._turns, (_turn(request), request))
        if request.aged_since is None:
            insort(self._due, (self._due_step(request), request.arrival, request))

    def leave(self, request: Request, step: int) -> None:
        """Remove a request at ``step``, since it runs or ends."""
        if request.key in self._parked:
            self._parked.remove(request.key)
        else:
            del self._turns[bisect_left(self._turns, (_turn(request),))]
        if request.aged_since is None:
            del self._due[bisect_left(self._due, (self._due_step(request), request.arrival))]
        request.num_waited += step - self._since.pop(request.key)
        del self._requests[request.key]

    def park(self, request: Request) -> None:
        """Let others overtake the request until ``wake``."""
        del self._turns[bisect_left(self._turns, (_turn(request),))]
        self._parked.add(request.key)

    def wake(self, request: Request) -> None:
        """Return a parked request to its place in the order; other requests are ignored."""
        if request.key in self._parked:
            self._parked.remove(request.key)
            insort(self._turns, (_turn(request), request))

    def age(self, step: int) -> None:
        """Mark the requests that are aged at this step, and move them to their new places."""
        while self._due and self._due[0][0] <= step:
            since, _, request = self._due.pop(0)
            has_turn = request.key not in self._parked
            if has_turn:
                del self._turns[bisect_left(self._turns, (_turn(request),))]
            request.aged_since = since
            if has_turn:
                insort(self._turns, (_turn(request), request))

    def _due_step(self, request: Request) -> int:
        """Return the step at which a waiting request is aged."""
        return self._since[request.key] + self._bound - request.num_waited


def _turn(request: Request) -> tuple[int, int, int]:
    """Return the unique sort key of a request."""
    if request.aged_since is not None:
        return 0, request.aged_since, request.arrival
    return 1, request.params.priority, request.arrival
