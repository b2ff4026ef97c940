"""Who may ask, and how much: name of the host, API key, size of a body, time to send it.

Plain ASGI, before anything is parsed.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lowbit.errors import RecipeError
from lowbit.serve.errors import ApiError

_OPEN = frozenset({"/", "/health"})
"""What needs no key: the page, which asks for one, and the answer to whether the server lives."""


@dataclass(frozen=True)
class Limits:
    """``body`` bytes a request, ``seconds`` from a request to its last token, ``grace`` seconds to finish at the end.

    Raises RecipeError for a key that no header can carry.
    """

    body: int = 4 << 20
    seconds: float = 600.0
    upload_seconds: float = 30.0
    grace: float = 10.0
    key: str | None = None

    def __post_init__(self) -> None:
        if self.key is not None and not (self.key.isascii() and self.key.isprintable() and self.key.strip()):
            raise RecipeError("the API key is empty or has characters that no header carries", fix="letters and digits")


class OwnName:
    """Lets through requests to one of ``names``.

    A browser reaches a server of its own machine also under the name of a stranger's site, when that name is made to
    point here (DNS rebinding), and then takes the answers for the site's own.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        self.app, self.names = app, frozenset(name.lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "").lower()
            name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
            if name not in self.names:
                error = ApiError(403, f"no host {name!r} here: this server answers to localhost only", code="host")
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Gate:
    """Lets through what is allowed, its body read whole."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._authorise(str(scope["path"]), headers)
            body = await self._read(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _authorise(self, path: str, headers: Headers) -> None:
        if self.limits.key is None or path in _OPEN:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.limits.key.encode()):
            raise ApiError(
                401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared[:18]) > self.limits.body:
            raise self._too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.upload_seconds):
                while (message := await receive())["type"] == "http.request":
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.limits.body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self.limits.upload_seconds:g} s") from None
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a body of more than {self.limits.body} bytes", headers={"Connection": "close"})
