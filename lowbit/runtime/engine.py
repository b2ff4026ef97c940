"""The thread that runs a batcher."""

from __future__ import annotations

import logging
import threading

from lowbit.runtime.batching import Batcher
from lowbit.runtime.requests import Request

_log = logging.getLogger(__name__)


class Engine:
    """Steps a batcher for as long as there is work. Everything here may be called from any thread."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self._wake, self._stopping, self._abort = threading.Event(), False, ""
        self._thread = threading.Thread(target=self._run, name="lowbit-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> int:
        """As :meth:`Batcher.submit`."""
        number = self.batcher.submit(request)
        self._wake.set()
        return number

    def cancel(self, number: int) -> None:
        """As :meth:`Batcher.cancel`."""
        self.batcher.cancel(number)
        self._wake.set()

    def abort(self, message: str) -> None:
        """End every request with ``Failed("shutdown", message)``."""
        self._abort = message
        self._wake.set()

    def close(self) -> None:
        """Stop after the token that is under way; what still runs is told that the server is shutting down."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping:
            if self._abort:
                message, self._abort = self._abort, ""
                self.batcher.fail_all("shutdown", message)
            self._wake.clear()
            try:
                busy = self.batcher.step()
            except Exception as error:  # the requests hear of it, the server goes on with the next ones
                _log.exception("a pass over the model failed")
                self.batcher.fail_all("model", f"the model failed: {type(error).__name__}: {error}")
                busy = True
            if not busy:
                self._wake.wait(timeout=0.5)  # requests that wait may be late
        self.batcher.fail_all("shutdown", "the server is shutting down")
