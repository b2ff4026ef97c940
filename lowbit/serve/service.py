"""The models behind one address."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

import psutil

from lowbit.errors import RecipeError
from lowbit.runtime.requests import Request
from lowbit.serve import protocol
from lowbit.serve.asking import Asked
from lowbit.serve.errors import ApiError
from lowbit.serve.limits import Limits
from lowbit.serve.metrics import Metrics
from lowbit.serve.served import Served


class Service:
    """Finds models, queues requests, and ends them all when the server stops."""

    def __init__(self, models: Sequence[Served], limits: Limits) -> None:
        """Raises RecipeError for two models of one name, or none."""
        self.models, self.limits, self.stopping = {m.name: m for m in models}, limits, False
        if not models or len(self.models) < len(models):
            raise RecipeError(
                f"models named {', '.join(m.name for m in models)}", why="a request names the model that it wants",
                fix="--name, or directories of two names",
            )  # fmt: skip
        self.metrics = Metrics({m.name: m.engine.batcher.load for m in models})

    def pick(self, name: str | None) -> Served:
        """A model by its name, without one the first. Raises ApiError."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(map(repr, self.models))
            raise ApiError(404, f"no model {name!r} here; served: {known}", param="model", code="model_not_found")
        return self.models[name]

    def ask(self, served: Served, wanted: list[Request]) -> Asked:
        """Queue the sequences of a request. Raises ApiError."""
        if self.stopping:
            raise ApiError(503, "the server is shutting down", code="shutdown", headers={"Retry-After": "5"})
        return Asked(served, wanted, self.metrics)

    async def drain(self) -> None:
        """Take nothing new; after the grace period, end what still runs with a last event."""
        self.stopping = True
        await asyncio.sleep(self.limits.grace)
        for model in self.models.values():
            model.engine.abort(f"the server is shutting down; {self.limits.grace:g} s of grace are over")

    def close(self) -> None:
        """Stop the engines."""
        self.stopping = True
        for model in self.models.values():
            model.engine.close()

    def health(self) -> protocol.Health:
        alive = all(m.engine.alive for m in self.models.values())
        return protocol.Health(
            status="stopping" if self.stopping else "ok" if alive else "failed",
            memory_bytes=psutil.Process(os.getpid()).memory_info().rss,
            models={name: m.health() for name, m in self.models.items()},
        )
