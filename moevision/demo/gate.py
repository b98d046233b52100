"""A door that lets a few requests in at once, keeps some waiting, and turns the rest away.

Without it a burst of visitors would fill the memory with waiting pictures, and everyone would wait for everyone.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from moevision.demo.requests import RequestError

P = ParamSpec("P")
T = TypeVar("T")


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
