"""Requests that wait, in the order in which they are to run.

Better priorities come first, then earlier arrivals. A request that has waited ``bound`` steps in all is *aged* from
then on: it stands before all that are not, behind those that were aged before it, and keeps its place for good.
Nothing here costs time in proportion to how many wait, but for moving list entries (a memmove).
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

from euryale.scheduler.request import Request


class WaitingQueue:
    """A sorted queue. ``parked`` requests wait for something else than their turn and are passed by others.

    Steps are counted by the caller; a request waits a step if it is here before and after the step is planned."""

    def __init__(self, bound: int) -> None:
        """``bound``: steps, at least 0; with 0 the order is that of arrival."""
        self._bound = bound
        self._requests: dict[int, Request] = {}  # all that wait, by key
        self._since: dict[int, int] = {}  # the step at which each came
        self._turns: list[tuple[tuple[int, int, int], Request]] = []  # sorted; all but the parked ones
        self._due: list[tuple[int, int, Request]] = []  # sorted: when who is aged, of those that are not
        self._parked: set[int] = set()
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Those whose turn may come, in their order, then the parked ones."""
        yield from [request for _, request in self._turns]
        yield from [self._requests[key] for key in self._requests if key in self._parked]

    @property
    def first(self) -> Request | None:
        """Whose turn it is."""
        return self._turns[0][1] if self._turns else None

    def find(self, key: int) -> Request | None:
        return self._requests.get(key)

    def enter(self, request: Request, step: int) -> None:
        """A new request."""
        request.arrival, request.num_waited, request.aged_since = self._arrivals, 0, None
        self._arrivals += 1
        self.enter_again(request, step)

    def enter_again(self, request: Request, step: int) -> None:
        """A request that was here before: it takes its old place."""
        self._requests[request.key], self._since[request.key] = request, step
        insort(self._turns, (_turn(request), request))
        if request.aged_since is None:
            insort(self._due, (self._due_step(request), request.arrival, request))

    def leave(self, request: Request, step: int) -> None:
        """The request runs or ends."""
        if request.key in self._parked:
            self._parked.remove(request.key)
        else:
            del self._turns[bisect_left(self._turns, (_turn(request),))]
        if request.aged_since is None:
            del self._due[bisect_left(self._due, (self._due_step(request), request.arrival))]
        request.num_waited += step - self._since.pop(request.key)
        del self._requests[request.key]

    def park(self, request: Request) -> None:
        """Let others pass the request until ``wake``."""
        del self._turns[bisect_left(self._turns, (_turn(request),))]
        self._parked.add(request.key)

    def wake(self, request: Request) -> None:
        """Back to its place, if it is here and parked."""
        if request.key in self._parked:
            self._parked.remove(request.key)
            insort(self._turns, (_turn(request), request))

    def count(self, step: int) -> None:
        """Note who is aged at this step."""
        while self._due and self._due[0][0] <= step:
            since, _, request = self._due.pop(0)
            has_turn = request.key not in self._parked
            if has_turn:
                del self._turns[bisect_left(self._turns, (_turn(request),))]
            request.aged_since = since
            if has_turn:
                insort(self._turns, (_turn(request), request))

    def _due_step(self, request: Request) -> int:
        return self._since[request.key] + self._bound - request.num_waited


def _turn(request: Request) -> tuple[int, int, int]:
    """What requests are sorted by; no two have the same."""
    if request.aged_since is not None:
        return 0, request.aged_since, request.arrival
    return 1, request.params.priority, request.arrival
