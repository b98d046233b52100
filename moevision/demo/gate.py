"""Who may enter, and when: a door for requests that cost time, and a brake on wrong logins.

Without the door a burst of visitors would fill the memory with waiting images, and everyone would wait for everyone.
"""

from __future__ import annotations

import asyncio
import ipaddress
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, ParamSpec, TypeVar

from moevision.demo.requests import RequestError

P = ParamSpec("P")
T = TypeVar("T")
FREE_LOGINS: Final = 5
MAX_PAUSE_S: Final = 15.0
FORGET_S: Final = 600.0
MAX_ADDRESSES: Final = 4096


class Gate:
    """Runs functions in its own few threads.

    Args:
        workers: how many run at once.
        waiting: how many more may wait for their turn.
    """

    def __init__(self, workers: int, waiting: int) -> None:
        self.workers, self.waiting = workers, waiting
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="moevision-demo")
        self._lock = threading.Lock()
        self._inside = 0

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Start `function` when it is its turn.

        Raises:
            RequestError: with code "busy" if too many are waiting.
        """
        with self._lock:
            if self._inside >= self.workers + self.waiting:
                raise RequestError("Many people are asking at this moment: try again in a few seconds.", "busy")
            self._inside += 1
        try:
            future = self._pool.submit(function, *args, **kwargs)
        except RuntimeError as error:  # closed
            self._leave()
            raise RequestError("The explorer is being stopped.", "busy") from error
        future.add_done_callback(lambda _: self._leave())
        return future

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Like `submit`, awaited."""
        return await asyncio.wrap_future(self.submit(function, *args, **kwargs))

    def close(self) -> None:
        """Let nobody in any more and wait for those inside."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1


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
