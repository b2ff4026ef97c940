"""The routes: OpenAI's models, completions and chat completions, and what goes with them.

app = create_app([Served.of("tiny", digest, model, tokenizer)], Limits())
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Security
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

import lowbit
from lowbit.serve import page, protocol
from lowbit.serve.answers import Chat, Completions, Kind, pieces, whole
from lowbit.serve.asking import Asked, requests
from lowbit.serve.describe import SAID, answers, describe, failures, one_shape
from lowbit.serve.errors import ApiError
from lowbit.serve.limits import Gate, Limits
from lowbit.serve.served import Served
from lowbit.serve.service import Service

T = TypeVar("T")


def create_app(models: Sequence[Served], limits: Limits) -> FastAPI:
    """The application; ``app.state.service`` is its :class:`Service`. Engines stop when its lifespan ends."""
    service = Service(models, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)

    key = [] if limits.key is None else [Security(HTTPBearer(auto_error=False))]  # documents what the Gate demands
    app = FastAPI(
        title="lowbit", version=lowbit.__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Low-bit language models behind OpenAI's API.",
    )  # fmt: skip
    app.state.service = service
    app.add_middleware(Gate, limits=limits)
    one_shape(app)

    @app.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page.page(), headers=page.headers())

    @app.get("/health", responses=answers(protocol.Health, 503), response_model=None)
    async def health() -> Response:
        """Whether the server lives, and what it holds; 503 when it takes no requests."""
        found = service.health()
        return _json(found, 200 if found.status == "ok" else 503)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **failures(401)}, response_model=None,
             response_class=Response, dependencies=key)  # fmt: skip
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses=answers(protocol.ModelList, 401), response_model=None, dependencies=key)
    async def list_models() -> Response:
        return _json(protocol.ModelList(data=[m.card() for m in service.models.values()]))

    @app.get("/v1/models/{model:path}", responses=answers(protocol.ModelCard, 401, 404), response_model=None,
             dependencies=key)  # fmt: skip
    async def one_model(model: str) -> Response:
        return _json(service.pick(model).card())

    @app.post("/v1/completions", responses=answers(protocol.Completion, *SAID, stream=True), response_model=None,
              dependencies=key)  # fmt: skip
    async def completions(body: protocol.CompletionBody, request: Request) -> Response:
        """Continue texts, or token ids; with ``echo`` and ``logprobs``, score them."""
        served = service.pick(body.model)
        given = protocol.several(body.prompt)
        served.admit(len(given) * (body.n or 1))
        prompts = await run_in_threadpool(served.prompts, given)
        new = 16 if body.max_tokens is None else body.max_tokens
        for ids in prompts:
            served.check(ids, new, "prompt")
        score = bool(body.echo) and body.logprobs is not None
        wanted = requests(body, prompts, [new] * len(prompts), body.logprobs, score, served, limits.seconds)
        repeated = None
        if body.echo:
            texts = await run_in_threadpool(served.texts, given)
            repeated = [text for text in texts for _ in range(body.n or 1)]
        kind = Completions(served.name, served.digest, served.spell, repeated, body.logprobs)
        return await _answer(service, request, body, served, wanted, kind, sum(map(len, prompts)))

    @app.post("/v1/chat/completions", responses=answers(protocol.ChatCompletion, *SAID, stream=True),
              response_model=None, dependencies=key)  # fmt: skip
    async def chat(body: protocol.ChatBody, request: Request) -> Response:
        """Answer a conversation, written as the model's own chat template has it."""
        served = service.pick(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs goes with logprobs", param="top_logprobs")
        served.admit(body.n or 1)
        ids = await run_in_threadpool(served.chat, body.messages)
        asked = body.max_completion_tokens or body.max_tokens
        new = max(served.context - len(ids), 1) if asked is None else asked
        served.check(ids, new, "messages")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        wanted = requests(body, [ids], [new], logprobs, False, served, limits.seconds)
        kind = Chat(served.name, served.digest, served.spell, logprobs)
        return await _answer(service, request, body, served, wanted, kind, len(ids))

    @app.post("/tokenize", responses=answers(protocol.Tokenized, 400, 401, 404, 408, 413), response_model=None,
              dependencies=key)  # fmt: skip
    async def tokenize(body: protocol.TokenizeBody) -> Response:
        served = service.pick(body.model)
        ids = await run_in_threadpool(served.encode, body.prompt, body.add_special_tokens)
        return _json(protocol.Tokenized(tokens=ids, count=len(ids), max_model_len=served.context))

    @app.post("/detokenize", responses=answers(protocol.Detokenized, 400, 401, 404, 408, 413), response_model=None,
              dependencies=key)  # fmt: skip
    async def detokenize(body: protocol.DetokenizeBody) -> Response:
        served = service.pick(body.model)
        if max(body.tokens, default=0) >= served.vocab:
            raise ApiError(400, f"a token beyond the vocabulary of {served.vocab}", param="tokens")
        return _json(protocol.Detokenized(prompt=await run_in_threadpool(served.decode, body.tokens)))

    describe(app)
    return app


async def _answer(
    service: Service, request: Request, body: protocol.SamplingBody, served: Served, wanted: list[Any], kind: Kind,
    read: int,
) -> Response:  # fmt: skip
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options goes with stream", param="stream_options")
    asked = service.ask(served, wanted)
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return _EventStream(asked, pieces(asked, kind, len(wanted), read, with_usage))
    try:
        return await run_in_threadpool(_json, await _unless_gone(request, whole(asked, kind, len(wanted), read)))
    finally:
        asked.close()


class _EventStream(StreamingResponse):
    """Server-sent events; however it ends, its sequences are let go."""

    def __init__(self, asked: Asked, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._asked.close()


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, or ApiError as soon as the client hangs up: nobody would read it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(400, "the client has gone")
        return task.result()
    finally:
        for pending in (task, watch):
            pending.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def _json(body: BaseModel, status: int = 200) -> Response:
    return JSONResponse(protocol.sent(body), status)
