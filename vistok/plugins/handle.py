"""`Handle`: records every change made to a host model and takes them back in reverse order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from torch import nn

Undo = Callable[[], None]
Self = TypeVar("Self", bound="Attached")


class _Removed:
    """Undo of an instance attribute: puts the old one back, or takes the new one away."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.had = name in vars(module)
        self.old = vars(module).get(name)

    def __call__(self) -> None:
        if self.had:
            vars(self.module)[self.name] = self.old
        else:
            vars(self.module).pop(self.name, None)


class Handle:
    """Changes on instances (never on classes), undone by `remove`, also after an exception."""

    def __init__(self) -> None:
        self._undo: list[Undo] = []

    @property
    def active(self) -> bool:
        """Whether there is anything to undo."""
        return bool(self._undo)

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Register a forward pre-hook `hook(module, args, kwargs)`."""
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: Callable[..., Any], *, always: bool = False) -> None:
        """Register a forward hook `hook(module, args, kwargs, output)`; with `always` it also runs after an error."""
        self._undo.append(module.register_forward_hook(hook, with_kwargs=True, always_call=always).remove)

    def attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of the instance."""
        self._undo.append(_Removed(module, name))
        vars(module)[name] = value

    def remove(self) -> None:
        """Undo everything, last change first. A second call does nothing."""
        while self._undo:
            self._undo.pop()()


class Attached:
    """Something at work on a model until its `with` block is left, or `detach()` is called.

    Attributes:
        handle: Its changes.
        runtime: What works; `enabled` switches it.
    """

    handle: Handle
    runtime: Any

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def attached(self) -> bool:
        """Whether it is on the model."""
        return self.handle.active

    def detach(self) -> None:
        """Take it off; the model is exactly what it was. A second call does nothing.

        A cache that was shortened can only go on while the plug-in is attached.
        """
        self.handle.remove()

    remove = detach

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave new prompts or pictures alone inside the block; caches that are already short stay right."""
        before, self.runtime.enabled = self.runtime.enabled, False
        try:
            yield
        finally:
            self.runtime.enabled = before
