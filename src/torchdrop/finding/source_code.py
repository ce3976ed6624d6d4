"""Look for additions in the source code of a class whose forward cannot be traced."""

from __future__ import annotations

import ast
import inspect
import textwrap

from torch import nn

from torchdrop.finding.linearity import ModuleProperties, is_nonlinear_function
from torchdrop.tracing.operations import names_of_additions
from torchdrop.tracing.own_forward import signature_of_forward

__all__ = ["is_operation", "may_loop_over_branches", "source_has_addition"]


def source_has_addition(module: nn.Module) -> bool:
    """Whether a method of the class of ``module`` adds two values; True without its source."""
    methods = _methods(module)
    if methods is None:
        return True
    # Names of variables that hold a length: to add a length is to compute an index.
    lengths = {
        target.id
        for node in methods
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("len(")
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    additions = names_of_additions()
    for node in methods:
        # ``x + y`` and ``x += y``
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add):
            operand = node.right if isinstance(node, ast.BinOp) else node.value
            number = isinstance(operand, ast.Constant)  # not ``i + 1`` or ``calls += 1``
            if not number and not (isinstance(operand, ast.Name) and operand.id in lengths):
                return True
        if isinstance(node, ast.Attribute) and node.attr in additions:
            return True
    return any(
        is_operation(m) and source_has_addition(m) for m in module.modules() if m is not module
    )


def is_operation(module: nn.Module) -> bool:
    """Whether ``module`` only wraps an operation: the user wrote it, without parameters or buffers.

    Networks that were converted from another format have such modules for additions.
    """
    if type(module).__module__.startswith(("torch.", "torchdrop.")):
        return False
    return next(module.parameters(), None) is None and next(module.buffers(), None) is None


def may_loop_over_branches(module: nn.Module) -> bool:
    """Whether ``module`` may add branches in a loop over a list of its children.

    A residual branch is not linear, while for example the convolutions that a feature pyramid adds
    in a loop are. So the answer is True if ``module`` has a list of children and one of these is
    not linear: a module in the list, another child that can be called with one argument (an
    activation), or a function that a method of the class calls.
    """
    lists = [c for c in module.children() if isinstance(c, nn.ModuleList | nn.ModuleDict)]
    if not lists:
        return False
    elements = [element for each in lists for element in each.children()]
    elements += [c for c in module.children() if c not in lists and _takes_one_argument(c)]
    if not all(map(ModuleProperties().linear, elements)):
        return True
    calls = [node.func for node in _methods(module) or () if isinstance(node, ast.Call)]
    names = {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in calls}
    return any(map(is_nonlinear_function, names))


def _takes_one_argument(module: nn.Module) -> bool:
    """Whether ``module`` can be called with one argument, as an activation can."""
    try:
        signature_of_forward(module).bind(None)
    except TypeError:
        return False
    return True


def _methods(module: nn.Module) -> list[ast.AST] | None:
    """Return the syntax nodes of the methods that ``module`` has, inherited ones included.

    Left out are ``__init__``, which does not run in a forward, and the methods of torch. None if
    the source is not available.
    """
    methods: dict[str, list[ast.FunctionDef]] = {}
    for kind in type(module).__mro__:
        if kind.__module__.startswith(("torch.nn.modules.", "builtins")):
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        except (OSError, TypeError, SyntaxError, ValueError):
            return None
        for method in ast.walk(tree):
            if isinstance(method, ast.FunctionDef):
                # An overridden method runs only if the method that overrides it calls super().
                overriding = methods.setdefault(method.name, [])
                if not overriding or "super()" in ast.unparse(overriding[-1]):
                    overriding.append(method)
    methods.pop("__init__", None)
    return [node for each in methods.values() for method in each for node in ast.walk(method)]
