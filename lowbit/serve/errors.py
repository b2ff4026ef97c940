"""Errors in OpenAI's shape."""

from __future__ import annotations

import json
from collections.abc import Mapping

from fastapi.responses import Response

from lowbit.serve.protocol import Error, ErrorBody

KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error",
    429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "timeout_error",
}  # fmt: skip


class ApiError(Exception):
    """What a client is told: a status, a sentence, the field at fault and a code for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.status, self.headers = status, dict(headers or {})
        self.body = ErrorBody(error=Error(message=_plain(message), type=kind, param=_maybe(param), code=code))

    def response(self) -> Response:
        return Response(self.json(), self.status, self.headers, media_type="application/json")

    def json(self) -> str:
        return json.dumps(self.body.model_dump(mode="json"))


def _plain(text: str) -> str:
    """Without lone surrogates, which a client may send in JSON and UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")[:2000]


def _maybe(text: str | None) -> str | None:
    return None if text is None else _plain(text)
