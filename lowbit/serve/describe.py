"""What the server says of itself and of errors: the OpenAPI document, and one shape for everything that goes wrong."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from lowbit.serve import protocol
from lowbit.serve.errors import ApiError

SAID = {
    400: "a request that means nothing, or that the model cannot take", 401: "no valid API key", 404: "no such model",
    408: "the body came too slowly", 413: "the body is too large", 429: "the queue is full; Retry-After says when",
    500: "the model failed", 503: "the server is shutting down", 504: "the time for a request is over",
}  # fmt: skip


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": protocol.ErrorBody, "description": SAID[status]} for status in statuses}


def answers(model: type[BaseModel], *statuses: int, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """The answers of a route, for its documentation."""
    good: dict[str, Any] = {"model": model, "description": "the answer"}
    if stream:
        good["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    bad = failures(*statuses)
    if model is protocol.Health:
        bad[503]["model"] = model
    return {200: good, **bad}


def describe(app: FastAPI) -> None:
    """An OpenAPI document that is true: errors of validation are 400 here, not 422."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            for path in found["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                found["components"]["schemas"].pop(name, None)
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def one_shape(app: FastAPI) -> None:
    """Every error in one shape."""

    @app.exception_handler(ApiError)
    async def told(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in {"body", *protocol.BRANCHES})
        said = "must be an object" if first["type"].startswith("model_") else str(first["msg"])
        return ApiError(400, f"{place}: {said}" if place else said, param=place or None).response()

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    @app.exception_handler(Exception)
    async def defect(_: Request, error: Exception) -> Response:
        return ApiError(500, f"a defect of the server: {type(error).__name__}; its log has more").response()
