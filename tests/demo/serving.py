"""An explorer in a process of its own, as a visitor meets it; also run as a script, with bundled models of a folder.

A process of its own, so that its memory, its threads and its end are those of a visitor's server.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moevision.demo.models import Entry

START_S = 300  # of a machine that does much else
GALLERY = 160


class Running:
    """A started server.

    Attributes:
        url: where it is, with a slash at the end.
        doors: further addresses by their names, those in `DOORS`, "other" and "photos".
        lines: what it has printed, errors included.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.url, self.lines = process, "", []
        self.doors: dict[str, str] = {}
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self.process.stdout as output:
            for line in output:
                self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def wait_for(self, start: str) -> str:
        """The first line to come that starts like this; a bounded wait."""
        end = time.monotonic() + START_S
        while (left := end - time.monotonic()) > 0:
            try:
                line = self._queue.get(timeout=left)
            except queue.Empty:
                break
            if line is None:
                break
            self.lines.append(line)
            if line.startswith(start):
                return line
        raise AssertionError(f"the server never said {start!r}:\n" + "\n".join(self.lines))

    def stop(self) -> int:
        """Interrupt it as Ctrl-C does, and give back its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        code = self.process.wait(timeout=120)
        self._reader.join(timeout=60)
        while not self._queue.empty():
            line = self._queue.get_nowait()
            if line is not None:
                self.lines.append(line)
        return code

    def rss_mb(self) -> float:
        """Memory of the process that is in use, in MB (Linux)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def wakes(self) -> int:
        """How often its threads have woken up so far (Linux)."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/status")
        return sum(
            int(task.read_text().split("\nvoluntary_ctxt_switches:")[1].split()[0])
            for task in tasks
        )


def _listen_to_ctrl_c() -> None:
    """A shell that starts tests in the background ignores SIGINT, and so would everything that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def running(*arguments: str, env: dict[str, str] | None = None) -> Iterator[Running]:
    """Start `python ...`, wait until it says where the explorer is, and stop it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-u", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
        preexec_fn=_listen_to_ctrl_c,
    )
    server = Running(process)
    try:
        server.url = server.wait_for("The explorer is at").split()[-1]
        server.doors = dict(line.split()[1:] for line in server.lines if line.startswith("door "))
        yield server
    finally:
        server.stop()


@contextmanager
def served(entries: list[Entry]) -> Iterator[str]:
    """The address of an explorer of these models in a thread of this process, where no start is under test."""
    from moevision.demo.gate import Serving
    from moevision.demo.server import Server
    from moevision.demo.service import Explorer
    from tests.shared import free_port  # a script, which this file also is, need not find `tests`

    with Server(Explorer(entries), Serving(port=free_port())) as server:
        yield server.url


def asked_for(request: Any) -> str:
    """The name of the server function that a browser's request calls."""
    return str(request.url.rpartition("/")[2])


TUNNEL = "https://abc.tunnel.example"
LOGIN = ("class", "secret")
WRONG_S = 0.25  # that a wrong password takes, in the place of a second
# Further ways into the explorer of `serve`; a process for each would cost ten seconds more.
DOORS: dict[str, dict[str, Any]] = {
    "locked": {"auth": LOGIN},
    "shared": {"share": True},
    "locked-shared": {"auth": LOGIN, "share": True, "allow_host": ("*.lab.example",)},
}


def serve(home: str, other_home: str, photos_home: str) -> None:
    """Serve the bundled models in `home` to everyone, and by each of `DOORS`; the others' at "other" and "photos".

    `TUNNEL` stands for what gradio's tunnel for `--share` would be.
    """
    from gradio import networking

    from moevision.demo import server as its_module
    from moevision.demo.galleries import Galleries
    from moevision.demo.gate import Serving
    from moevision.demo.models import open_entries
    from moevision.demo.server import Server
    from moevision.demo.service import Explorer

    def explorer_of(home: str, gallery: int) -> Explorer:
        entries = open_entries(None, home=Path(home))
        explorer = Explorer(entries, Galleries(entries, limit=gallery))
        explorer.galleries.start(explorer.pages.prepare)
        explorer.galleries.thread.join(START_S)
        return explorer

    networking.setup_tunnel = lambda *_: TUNNEL
    its_module.WRONG_LOGIN_S = WRONG_S
    explorer, other = explorer_of(home, GALLERY), explorer_of(other_home, GALLERY // 5)
    photos = explorer_of(photos_home, GALLERY)
    doors = {name: (explorer, door) for name, door in DOORS.items()}
    with ExitStack() as servers:
        for name, (shown, door) in {
            **doors,
            "other": (other, {}),
            "photos": (photos, {}),
            "": (explorer, {}),
        }.items():
            server = servers.enter_context(Server(shown, Serving(public=True, **door)))
            print(
                f"door {name} {server.url}" if name else f"The explorer is at {server.url}",
                flush=True,
            )
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("Stopped.")


if __name__ == "__main__":
    serve(*sys.argv[1:])
