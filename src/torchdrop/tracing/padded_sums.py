"""Read a sum over a part of the channels as one sum with a shortcut that is padded with zeros.

``cat([b[:, :c] + x, b[:, c:]], 1)``, also written ``b[:, :c] += x``, equals ``b + pad(x)``. In this
form the whole of ``b`` is the branch and can be dropped, as a DropPath on ``b`` would do it.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from torchdrop.tracing.nodes import summands
from torchdrop.tracing.operations import callee, operation_of
from torchdrop.tracing.traced_functions import add_padded

__all__ = ["ancestors", "merge_partial_sums"]


def merge_partial_sums(graph: fx.Graph) -> None:
    """Replace each sum of ``x`` and a part of a tensor computed from ``x`` by ``add_padded``."""
    node: Any
    for node in list(graph.nodes):
        found = _match_concatenation(node) or _match_slice_assignment(node)
        if found is None:
            continue
        add, part, whole, dim, unused = found
        (skip,) = (operand for operand in add.args if operand is not part)
        if not isinstance(skip, fx.Node) or skip not in ancestors(whole):
            continue
        with graph.inserting_before(node):
            operands = (whole, skip) if add.args[0] is part else (skip, whole)
            total = graph.call_function(add_padded, (*operands, dim))
            total.meta.update({k: v for k, v in add.meta.items() if k == "inlined"})
        if node.target is operator.setitem:
            for user in [u for u in whole.users if u > node]:
                user.replace_input_with(whole, total)
        else:
            node.replace_all_uses_with(total)
        for done in (node, add, *unused):
            if not done.users:
                graph.erase_node(done)


# The addition; its operand that is a slice of another tensor; that tensor; the dimension of the
# slice; the other nodes that only the addition needs, users before what they use.
_Found = tuple[fx.Node, fx.Node, fx.Node, int, list[fx.Node]]


def _match_concatenation(node: Any) -> _Found | None:
    """Match ``cat([b[:, :c] + x, b[:, c:]], 1)``."""
    if not operation_of(node).concatenates or node.op != "call_function":
        return None
    if not node.args or not isinstance(node.args[0], list | tuple):
        return None
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if len(node.args[0]) != 2:
        return None
    add, rest = node.args[0]
    if not _is_sum(add) or not isinstance(rest, fx.Node) or {*add.users, *rest.users} != {node}:
        return None
    for part in add.args:
        whole = _complement(part, rest, dim)
        if whole is not None and list(part.users) == [add]:
            unused = [rest, part]
            if isinstance(part.args[0], fx.Node) and part.args[0] is not whole:
                unused.append(part.args[0])  # the call of split that returns both parts
            return add, part, whole, int(dim), unused
    return None


def _match_slice_assignment(node: Any) -> _Found | None:
    """Match ``b[:, :c] += x``."""
    if node.op != "call_function" or node.target is not operator.setitem:
        return None
    whole, key, add = node.args
    if not isinstance(whole, fx.Node) or not _is_sum(add) or list(add.users) != [node]:
        return None
    part = add.args[0]
    sliced = _slice(part)
    if sliced is None or sliced[0] is not whole or not _same_argument(part.args[1], key):
        return None
    _, dim, start, _ = sliced
    before = {user for user in whole.users if user < node}
    # an earlier user of the tensor may be another view of the same memory
    if start not in (None, 0) or before != {part} or list(part.users) != [add]:
        return None
    return add, part, whole, dim, [part]


def _is_sum(node: Any) -> bool:
    """Whether ``node`` adds its two arguments, and does nothing else."""
    both = summands(node) if isinstance(node, fx.Node) else None
    return both is not None and both.gain == 1.0 and node.args == (both.left, both.right)


def _complement(first: Any, rest: Any, dim: Any) -> fx.Node | None:
    """Return the tensor that consists of ``first`` and ``rest`` on dimension ``dim``, if any."""
    source: Any
    split_dim: Any
    one, two = _slice(first), _slice(rest)
    if one is not None and two is not None:
        (source, one_dim, start, stop), (other, two_dim, rest_start, rest_stop) = one, two
        meet = stop is not None and _same_argument(stop, rest_start)
        if source is other and one_dim == two_dim == dim and start in (None, 0) and meet:
            return source if rest_stop is None else None
    if not all(isinstance(n, fx.Node) and n.target is operator.getitem for n in (first, rest)):
        return None
    split = first.args[0]
    if not isinstance(split, fx.Node) or split is not rest.args[0]:
        return None
    if (first.args[1], rest.args[1]) != (0, 1) or set(split.users) != {first, rest}:
        return None
    if callee(split) != "split" or len(split.args) < 2:
        return None
    source, sizes, *more = split.args
    split_dim = split.kwargs.get("dim", more[0] if more else 0)
    pair = isinstance(sizes, list | tuple) and len(sizes) == 2
    return source if pair and split_dim == dim and isinstance(source, fx.Node) else None


def _slice(node: Any) -> tuple[fx.Node, int, Any, Any] | None:
    """Return ``(b, dim, start, stop)`` if ``node`` is a slice of ``b`` on a single dimension."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return None
    source: Any
    key: Any
    source, key = node.args
    keys = list(key) if isinstance(key, tuple) else [key]
    if not isinstance(source, fx.Node):
        return None
    slices = [k for k in keys if isinstance(k, slice)]
    if len(slices) + keys.count(Ellipsis) != len(keys) or any(
        s.step not in (None, 1) for s in slices
    ):
        return None
    sliced = [i for i, k in enumerate(keys) if isinstance(k, slice) and k != slice(None)]
    if len(sliced) != 1:
        return None
    (dim,) = sliced
    start, stop = keys[dim].start, keys[dim].stop
    return source, dim - len(keys) if Ellipsis in keys[:dim] else dim, start, stop


def _same_argument(one: Any, two: Any) -> bool:
    """Whether two arguments are the same number or slice, or nodes that compute the same one."""
    if isinstance(one, fx.Node) and isinstance(two, fx.Node):
        return one is two or (
            one.op == two.op == "call_function"
            and one.target is two.target
            and _same_argument(one.args, two.args)
            and one.kwargs == two.kwargs
        )
    if isinstance(one, tuple) and isinstance(two, tuple):
        return len(one) == len(two) and all(map(_same_argument, one, two))
    if isinstance(one, slice) and isinstance(two, slice):
        return _same_argument((one.start, one.stop, one.step), (two.start, two.stop, two.step))
    return type(one) is type(two) and bool(one == two)


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Return all nodes that ``node`` is computed from."""
    found: set[fx.Node] = set()
    pending = list(node.all_input_nodes)
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending.extend(current.all_input_nodes)
    return found
