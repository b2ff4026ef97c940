"""The server as a process: it listens, says where, and stops when it is told to without cutting anybody off."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from lowbit.errors import RecipeError
from lowbit.serve.limits import OwnName
from lowbit.serve.service import Service


class Server(uvicorn.Server):
    """uvicorn that drains its engines, and ends a stop on request with exit status 0.

    On a loopback address it answers to ``localhost``, to that address and to ``host``, the name that was asked for.
    """

    def __init__(
        self, app: FastAPI, listening: socket.socket, on_start: Callable[[str], object], host: str = "localhost"
    ) -> None:
        self.service: Service = app.state.service
        address = str(listening.getsockname()[0])
        names = {"localhost", "127.0.0.1", "::1", address, host}
        super().__init__(
            uvicorn.Config(
                OwnName(app, names) if is_loopback(address) else app,
                log_level="warning", lifespan="on", timeout_graceful_shutdown=int(self.service.limits.grace) + 5,
                server_header=False,
            )
        )  # fmt: skip
        self._listening, self._on_start = listening, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = self._listening.getsockname()[:2]
        self._on_start(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Nothing new is taken; what runs may finish within the grace period, and is told when it is over."""
        draining = asyncio.create_task(self.service.drain())
        await super().shutdown(sockets)
        draining.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, without raising the signal once more: a stop that was asked for is no failure."""
        if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Serve until a signal."""
        self.run(sockets=[self._listening])


def bound(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises RecipeError when there is none to have."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise RecipeError(f"cannot listen: {error}", where=f"{host}:{port}", fix="another --port") from error
    return listening


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
