"""Who may enter, and when: doors for requests that cost time or memory, and a brake on wrong logins.

Without a door a burst of visitors would fill the memory with waiting images. Addresses take turns at it, so that one of
them can't shut the others out.
"""

from __future__ import annotations

import asyncio
import ipaddress
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

from moevision.demo.requests import RequestError

P = ParamSpec("P")
T = TypeVar("T")
WAITING: Final = 64  # requests
DECODERS: Final = 1  # images of visitors that are decoded at once, each in up to 0.4 GB
FREE_LOGINS: Final = 5
MAX_PAUSE_S: Final = 15.0
FORGET_S: Final = 600.0
MAX_ADDRESSES: Final = 4096


class Gate:
    """Runs functions in its own few threads; addresses take turns.

    A free thread takes the oldest function of the address that had its turn longest ago, or never: an address with one
    request waits for one that runs, however many another address has sent. An address alone may have all places. If
    all are taken, the address with most of them loses its newest one to an address with fewer.

    Args:
        workers: how many run at once.
        waiting: how many more may wait for their turn.
    """

    def __init__(self, workers: int, waiting: int = WAITING) -> None:
        self.workers, self.waiting = workers, waiting
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="moevision-demo")
        self._lock = threading.Lock()
        self._queues: dict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = {}  # by address, none of them empty
        self._turns: dict[str, int] = {}  # of an address: the number of its last turn; later turns come later
        self._turn = self._running = 0
        self._closed = False

    def submit(self, address: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start `function` when it is the turn of this address.

        Returns:
            Its result, or RequestError "busy" if its place was given to another address.

        Raises:
            RequestError: with code "busy" if too many are waiting.
        """
        future: Future[T] = Future()
        lost: Future[Any] | None = None
        with self._lock:
            if self._closed:
                raise _stopped()
            if self._running + sum(map(len, self._queues.values())) >= self.workers + self.waiting:
                longest = max(self._queues.values(), key=len, default=deque())
                if len(longest) <= len(self._queues.get(address, ())) + 1:
                    raise _busy()
                lost, _ = longest.pop()
            self._queues.setdefault(address, deque()).append((future, partial(function, *args, **kwargs)))
            if self._running < self.workers:
                self._running += 1
                self._pool.submit(self._work)
        if lost is not None:
            _refuse(lost, _busy())
        return future

    async def run(self, address: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Like `submit`, awaited."""
        return await asyncio.wrap_future(self.submit(address, function, *args, **kwargs))

    def close(self) -> None:
        """Let nobody in any more and wait for those inside."""
        with self._lock:
            self._closed = True
            left = [future for queue in self._queues.values() for future, _ in queue]
            self._queues.clear()
        for future in left:
            _refuse(future, _stopped())
        self._pool.shutdown(wait=True)

    def _work(self) -> None:
        """Run what waits until nothing does."""
        while (job := self._next()) is not None:
            future, call = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        with self._lock:
            if not self._queues:
                self._running -= 1
                return None
            address = min(self._queues, key=lambda one: self._turns.get(one, 0))
            queue = self._queues[address]
            job = queue.popleft()
            if not queue:
                del self._queues[address]
            self._turn += 1
            self._turns.pop(address, None)
            self._turns[address] = self._turn
            if len(self._turns) > MAX_ADDRESSES:
                del self._turns[next(iter(self._turns))]
            return job


def _refuse(future: Future[Any], error: RequestError) -> None:
    if future.set_running_or_notify_cancel():  # nobody may be waiting for it any more
        future.set_exception(error)


def _stopped() -> RequestError:
    return RequestError("The explorer is being stopped.", "busy")


def _busy() -> RequestError:
    return RequestError("Many people are asking at this moment: try again in a few seconds.", "busy")


class Brake:
    """Slows down who guesses a password: never an account, which a whole class shares, but an address.

    `FREE_LOGINS` wrong logins cost nothing, and each further one must wait twice as long as the one before it, up to
    `MAX_PAUSE_S`. A login counts as wrong until it is released, so that many at once don't slip through.
    """

    def __init__(self) -> None:
        self._tries: dict[str, tuple[int, float]] = {}  # of an address: how many, and when the next may be answered

    def pause(self, address: str) -> float | None:
        """Count a login from this address.

        Returns:
            How long it must wait for its answer, in seconds; None if it must not be answered, since too many wait.
        """
        now = time.monotonic()
        count, ready = self._tries.pop(address, (0, now))
        if now - ready > FORGET_S:
            count = 0
        start = max(now, ready)
        refused = start - now > MAX_PAUSE_S
        if not refused:
            count += 1
            ready = start + (min(2.0 ** min(count - FREE_LOGINS, 9), MAX_PAUSE_S) if count >= FREE_LOGINS else 0.0)
        self._tries[address] = (count, ready)
        while len(self._tries) > MAX_ADDRESSES:
            del self._tries[next(iter(self._tries))]
        return None if refused else start - now

    def release(self, address: str) -> None:
        """Forget the wrong logins of an address that had a right one."""
        self._tries.pop(address, None)


def client_address(client: tuple[str, int] | None, proxied: bool, forwarded: bool) -> str:
    """What counts as one address.

    Args:
        client: address and port of the visitor; uvicorn has put in the last untrusted address of `X-Forwarded-For` if
            the connection comes from this computer, or from a proxy named in `FORWARDED_ALLOW_IPS`.
        proxied: whether there is such a proxy or tunnel.
        forwarded: whether the request has the header. Without a proxy it is made up by the visitor: all such requests
            count as from one address.

    Returns:
        An IPv4 address, the first half of an IPv6 address (who has one has the whole network), or a word.
    """
    if forwarded and not proxied:
        return "forwarded"
    host = client[0] if client else "unknown"
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if address.version == 4:
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
