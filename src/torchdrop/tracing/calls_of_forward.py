"""Watch which functions a forward calls while it is traced.

A profiler sees every function, however the forward got hold of it: ``from torch import
is_grad_enabled``, a context manager of another library, a helper in another module.
"""

from __future__ import annotations

import dis
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import CodeType, FrameType, FunctionType
from typing import Any

from torchdrop.internals import mode_of_builtin, mode_of_code
from torchdrop.tracing.modes import MODE_KINDS
from torchdrop.tracing.untraceable import UntraceableError

__all__ = ["CallWatch", "FirstImportError"]

# Calls made by these packages count as made by their callers.
_PASSED_OVER = ("torch", "contextlib")

# The name and the file of the function of Python that imports a module for the first time.
_IMPORT = ("_find_and_load", "<frozen importlib._bootstrap>")


class FirstImportError(BaseException):
    """Raised where a forward imports a module that was not imported before; holds its name.

    The module has to be imported first, because its code must not be traced, and because an import
    such as ``from torch import zeros`` in it would keep the wrapper that torch.fx puts in place of
    ``torch.zeros`` during a trace. Not an Exception, so that no forward catches it.
    """


class CallWatch:
    """Records which functions of the user a forward calls, and which modes it asks for or sets.

    Args:
        imported: The names of the modules at whose import earlier attempts to trace the forward
            stopped; each was then imported. This attempt adds the one at which it stops.

    Attributes:
        modes: The kinds of modes, of :data:`MODE_KINDS`, that the forward or a function that it
            calls asks for or sets. All kinds if another profiler is active, because the calls
            cannot be seen then.
        functions: The code of each function that ran, other than those of torch, torchdrop and
            Python itself, with its global variables.
    """

    def __init__(self, imported: set[str]) -> None:
        self._imported = imported
        self.modes: set[str] = set()
        self.functions: dict[CodeType, dict[str, Any]] = {}
        self._known: set[CodeType] = set()
        self._paused: Callable[[], bool] = lambda: False

    @contextmanager
    def watching(self, forward: Callable[..., Any], paused: Callable[[], bool]) -> Iterator[None]:
        """Watch the calls that are made inside, in this thread.

        Args:
            forward: The forward that will run.
            paused: Returns whether calls are to be ignored at the moment.

        Raises:
            UntraceableError: A function that is called sets a global variable.
        """
        self._paused = paused
        if sys.getprofile() is not None:
            self.modes.update(MODE_KINDS)
            if isinstance(forward, FunctionType):
                self._note_function(forward.__code__, forward.__globals__)
            yield
            return
        sys.setprofile(self._on_event)
        try:
            yield
        finally:
            sys.setprofile(None)

    def _on_event(self, frame: FrameType, event: str, called: Any) -> None:
        """Record one call; Python calls this method as its profiler."""
        if event == "call":
            code = frame.f_code
            if (code.co_name, code.co_filename) == _IMPORT:
                self._note_import(frame.f_locals["name"])
            elif code not in self._known and not self._paused() and not _is_in_gc_callback(frame):
                mode = mode_of_code(code)
                if mode is not None:
                    self._note_mode(mode, frame)
                else:
                    self._note_function(code, frame.f_globals)
        elif event == "c_call":
            mode = mode_of_builtin(called)
            if mode is not None:
                self._note_mode(mode, frame)

    def _note_import(self, name: str) -> None:
        """Raise :class:`FirstImportError` unless the import of ``name`` was tried before."""
        if name not in self._imported:
            self._imported.add(name)
            raise FirstImportError(name)

    def _note_mode(self, mode: str, frame: FrameType | None) -> None:
        """Record that a mode is asked for or set in ``frame``, unless torchdrop itself does it."""
        if mode in self.modes or self._paused():
            return
        while frame is not None and _package_of(frame.f_globals) in _PASSED_OVER:
            frame = frame.f_back
        if frame is None or _package_of(frame.f_globals) != "torchdrop":
            self.modes.add(mode)

    def _note_function(self, code: CodeType, scope: dict[str, Any]) -> None:
        """Record a function of the user; raise if it sets a global variable."""
        self._known.add(code)
        package = _package_of(scope)
        if package in ("torch", "torchdrop") or package in sys.stdlib_module_names:
            return
        if code.co_name == "<module>":  # the body of a module that is being imported
            return
        for name in _globals_set_by(code):
            # Raised before the function runs, so the variable is not set.
            raise UntraceableError(f"it sets the global variable {name}")
        self.functions[code] = scope


@lru_cache(maxsize=4096)
def _globals_set_by(code: CodeType) -> tuple[str, ...]:
    """Return the names of the global variables that ``code`` sets or deletes."""
    return tuple(
        str(instruction.argval)
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")
    )


def _is_in_gc_callback(frame: FrameType | None) -> bool:
    """Whether ``frame`` runs inside a callback of the garbage collector.

    Such a callback may run at any time and does not belong to the forward. Python crashes if an
    error is raised in it.
    """
    codes = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    while codes and frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


def _package_of(scope: dict[str, Any]) -> str:
    return str(scope.get("__name__", "")).partition(".")[0]
