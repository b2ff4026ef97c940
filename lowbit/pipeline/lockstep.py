"""Lockstep: one forward pass of a block over all batches, held at chosen linears while their weights are replaced.

True-sequential methods want every linear's inputs computed by the already quantized linears before it. Running the
block again for every stage costs more than twice a forward pass; here every batch runs in a thread of its own, stops
when it reaches a gate, and goes on when the driver has encoded what the gate's inputs were wanted for. Only one
thread runs at a time, in a fixed order, so results are those of a plain loop. The price is memory: the activations
inside the block of all batches at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from torch import nn

from lowbit.arrays import Tensor
from lowbit.models.stream import Stream
from lowbit.pipeline.spill import Hidden


class Lockstep:
    """A context in which ``until(gate, see)`` brings every batch to a gate; leaving it frees all threads."""

    def __init__(self, stream: Stream, i: int, block: nn.Module, hidden: Hidden, gates: list[nn.Module]) -> None:
        self._runs = [
            _idle().begin(lambda batch=batch: stream.run(i, block, hidden.data[batch]))  # type: ignore[misc]
            for batch in hidden.batches()
        ]
        self._hidden, self._gates = hidden, gates
        self._handles = [gate.register_forward_pre_hook(self._hook) for gate in gates]

    def until(self, gate: nn.Module, see: Callable[[Tensor], None]) -> None:
        """Run every batch until it calls ``gate``; ``see`` gets each one's input, in order of batches."""
        for run in self._runs:
            run.step()
            if run.at is gate and run.x is not None:
                see(run.x)
                run.x = None

    def finish(self) -> None:
        """Run every batch to the end and put the outputs in place of the hidden states."""
        for run, batch in zip(self._runs, self._hidden.batches(), strict=True):
            while not run.done:
                run.step()
            assert run.result is not None  # a run that is done has a result or has raised
            self._hidden.data[batch] = run.result
            self._hidden.moved = batch.stop
            run.result = None
        self._hidden.moved = 0

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for run in self._runs:
            run.abandon()
            _IDLE.append(run)
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        current = threading.current_thread()
        assert isinstance(current, _Run)
        current.pause(module, inputs[0])


class _Abandoned(BaseException):
    """Unwinds a forward pass that nobody waits for any more."""


class _Run(threading.Thread):
    """A thread that takes one batch's forward pass after another, advanced by ``step`` from gate to gate."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._forward: Callable[[], Tensor] | None = None
        self._under_way = self._given_up = False
        self.at: nn.Module | None = None
        self.x: Tensor | None = None
        self.result: Tensor | None = None
        self.error: BaseException | None = None
        self.done = True

    def begin(self, forward: Callable[[], Tensor]) -> _Run:
        """Take on a forward pass; it runs when it is stepped."""
        self._forward, self.done = forward, False
        self.at = self.x = self.result = self.error = None
        return self

    def run(self) -> None:
        while True:
            self._go.acquire()
            assert self._forward is not None
            try:
                self.result = self._forward()
            except _Abandoned:
                pass
            except BaseException as error:  # handed to the driver, which raises it
                self.error = error
            self.at, self.done, self._forward = None, True, None
            self._stopped.release()

    def step(self) -> None:
        """Let it run to its next gate or its end; raises what it raised."""
        if self.done:
            return
        if self.ident is None:
            self.start()
        self._under_way = True
        self._go.release()
        self._stopped.acquire()
        if self.error is not None:
            raise self.error

    def pause(self, gate: nn.Module, x: Tensor) -> None:
        """Called inside the forward pass: wait for the next step."""
        self.at, self.x = gate, x
        self._stopped.release()
        self._go.acquire()
        if self._given_up:
            raise _Abandoned

    def abandon(self) -> None:
        """Unwind the forward pass where it waits, and hold nothing of it any more."""
        if self._under_way and not self.done:
            self._given_up = True
            self._go.release()
            self._stopped.acquire()
        self._under_way = self._given_up = False
        self._forward = self.at = self.x = self.result = self.error = None
        self.done = True


_IDLE: list[_Run] = []


def _idle() -> _Run:
    """A thread without work: one of an earlier block, unless it was lost in a fork, or a new one."""
    while _IDLE:
        run = _IDLE.pop()
        if run.is_alive() or run.ident is None:
            return run
    return _Run()
