"""One thread that the model belongs to, and the queue before it."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from longfit.docqa.server.asked import Cancelled
from longfit.docqa.server.errors import ApiError

logger = logging.getLogger("longfit.serve")


class Job:
    """Work for the model, and what it tells those who wait for it.

    Attributes:
        work: called with the job, in the worker's thread; what it raises goes to those who wait.
        cancelled: set when nobody waits any more; work looks at it and ends.
    """

    def __init__(self, work: Callable[["Job"], Any]) -> None:
        self.work, self.cancelled = work, threading.Event()
        self._listener: tuple[asyncio.AbstractEventLoop, asyncio.Queue[tuple[str, Any]]] | None = None

    def listen(self) -> asyncio.Queue[tuple[str, Any]]:
        """Events of the job, from now on, for a coroutine of this event loop: whatever `emit` was given, and at the
        end ("end", what the work returned) or ("error", exception)."""
        self._listener = asyncio.get_running_loop(), asyncio.Queue()
        return self._listener[1]

    def emit(self, kind: str, value: Any) -> None:
        """Tell those who wait."""
        if self._listener is None:
            return
        loop, events = self._listener
        try:
            loop.call_soon_threadsafe(events.put_nowait, (kind, value))
        except RuntimeError:  # the server has stopped: nobody listens
            self.cancelled.set()

    def check(self) -> None:
        """Go on, or not.

        Raises:
            Cancelled: nobody waits any more.
        """
        if self.cancelled.is_set():
            raise Cancelled

    def run(self) -> None:
        """Do the work, unless it was cancelled before its turn came."""
        if self.cancelled.is_set():
            return
        try:
            self.emit("end", self.work(self))
        except BaseException as error:
            if self._listener is None:
                logger.error("work that nobody waits for failed", exc_info=error)
            self.emit("error", error)


class Worker:
    """Runs jobs one at a time, in the order in which they came."""

    def __init__(self, most_waiting: int) -> None:
        self.most_waiting = most_waiting
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._running: Job | None = None
        self._stopped = False
        self._seconds = 1.0  # of a job, lately
        self._thread = threading.Thread(target=self._work, name="longfit-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that wait and have not been cancelled."""
        with self._changed:
            return sum(not job.cancelled.is_set() for job in self._jobs)

    def submit(self, job: Job, always: bool = False) -> Job:
        """Put a job at the end of the queue.

        Args:
            always: whatever the length of the queue (work that the server gives itself).

        Raises:
            ApiError: 429, the queue is full; 503, the server stops.
        """
        with self._changed:
            if self._stopped:
                raise ApiError(503, "the server is stopping", "stopping", retry_after=10)
            waiting = sum(not other.cancelled.is_set() for other in self._jobs)
            if waiting >= self.most_waiting and not always:
                seconds = min(60, max(1, round(self._seconds * waiting / 2)))
                raise ApiError(
                    429, f"{waiting} requests are waiting for the model already; try again", "queue_full", None, seconds
                )
            self._jobs.append(job)
            self._changed.notify()
        return job

    def stop(self) -> None:
        """Cancel what runs and what waits, and wait for the thread to end."""
        with self._changed:
            self._stopped = True
            left = [*self._jobs, *([self._running] if self._running else [])]
            waiting = list(self._jobs)
            self._jobs.clear()
            self._changed.notify()
        for job in left:
            job.cancelled.set()
        for job in waiting:
            job.emit("error", ApiError(503, "the server is stopping", "stopping", retry_after=10))
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.wait_for(lambda: self._jobs or self._stopped)
                if self._stopped:
                    return
                self._running = job = self._jobs.popleft()
            started = time.monotonic()
            job.run()
            del job
            self._seconds += (time.monotonic() - started - self._seconds) / 4
