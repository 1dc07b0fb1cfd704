r"""Several forwards that walk through a model together, so that each block is brought in once for all of them.

Every forward has a thread, and one thread runs at a time.  Before a block a thread waits; when all wait, the block is
brought in, and one after the other runs through it to the next.  A loss may be computed in any way, by any code, and
nothing of the batch needs to be repeated or known.

What code changes around a forward (hooks, a replaced ``forward``, the training flag) belongs to the thread that changed
it: module states are exchanged with the threads.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from zokernel.private_apis import ModuleState

Surroundings = Callable[[], AbstractContextManager[None]]
T = TypeVar("T")
P = TypeVar("P")


class _Stop(BaseException):
    """Ends a thread whose result nobody waits for any more."""


class Lockstep(Generic[T, P]):
    """Runs functions in turns, from one pause to the next.

    Args:
        arrive: Called with a place, before any thread goes on from it.
        turn: Called with the number of a function and the place it goes on from (None at its beginning).
        modules: Modules whose hooks, ``forward`` and training flag each function has for itself.

    Example:
        >>> log = []
        >>> lockstep = Lockstep(log.append, lambda number, place: None, [])
        >>> def walk(number):
        ...     for place in ("a", "b"):
        ...         lockstep.pause(place)
        ...         log.append(number)
        ...     return number
        >>> lockstep.run([lambda: walk(0), lambda: walk(1)])
        [0, 1]
        >>> log
        ['a', 0, 1, 'b', 0, 1]
    """

    def __init__(
        self, arrive: Callable[[P], None], turn: Callable[[int, P | None], None], modules: Sequence[nn.Module]
    ):
        self._arrive, self._turn, self._modules = arrive, turn, modules
        self._running: int | None = None
        self._stopping = False
        self._reports: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._wake: list[threading.Semaphore] = []

    @property
    def active(self) -> bool:
        """Whether the calling code is run by one of the functions."""
        return self._running is not None

    def pause(self, place: P) -> None:
        """Wait until it is this function's turn to go on from a place."""
        number = self._running
        assert number is not None
        self._reports.put(("paused", place))
        self._wake[number].acquire()
        if self._stopping:
            raise _Stop

    def run(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """Return what the functions return; an exception of one ends all."""
        count = len(functions)
        self._wake, self._stopping = [threading.Semaphore(0) for _ in functions], False
        base = ModuleState(self._modules)
        states = [base.copy() for _ in functions]
        places: dict[int, P | None] = dict.fromkeys(range(count))
        results: dict[int, T] = {}
        surroundings = _surroundings()
        pool = ThreadPoolExecutor(count, "zokernel-forward")
        for number, function in enumerate(functions):
            pool.submit(contextvars.copy_context().run, self._execute, number, function, surroundings)
        try:
            while places:
                place = next(iter(places.values()))
                numbers = [number for number, other_place in places.items() if other_place is place]
                if place is not None:
                    self._arrive(place)
                for number in numbers:
                    self._turn(number, place)
                    states[number].install()
                    kind, value = self._resume(number)
                    states[number] = ModuleState(self._modules)
                    if kind == "paused":
                        places[number] = value
                        continue
                    del places[number]
                    if kind == "raised":
                        raise value
                    results[number] = value
        finally:
            self._stop(places)
            base.install()
            pool.shutdown()
        return [results[number] for number in range(count)]

    def _resume(self, number: int) -> tuple[str, Any]:
        self._running = number
        self._wake[number].release()
        report = self._reports.get()
        self._running = None
        return report

    def _stop(self, unfinished: Any) -> None:
        """Let every function that has not ended end now, one at a time."""
        self._stopping = True
        if self._running is not None:  # interrupted while it ran: it ends at its next pause, or by itself
            kind, _ = self._reports.get()
            if kind != "paused":
                unfinished.pop(self._running, None)
        for number in list(unfinished):
            while self._resume(number)[0] == "paused":
                pass
        self._running = None

    @torch.no_grad()
    def _execute(self, number: int, function: Callable[[], T], surroundings: Surroundings) -> None:
        self._wake[number].acquire()
        try:
            if self._stopping:
                raise _Stop
            with surroundings():
                report: tuple[str, Any] = ("returned", function())
        except BaseException as error:
            report = ("raised", error)
        self._reports.put(report)


def _surroundings() -> Surroundings:
    """Return a context in which another thread computes as this one: its autocast, and its GPU and stream."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    low = {kind: torch.get_autocast_dtype(kind) for kind in kinds}
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            for kind, dtype in low.items():
                stack.enter_context(torch.autocast(kind, dtype))
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            yield

    return entered
