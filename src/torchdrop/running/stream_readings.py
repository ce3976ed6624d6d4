"""For which calls it is known that a block returns its input where its branches are dropped.

With ``unit="block"`` the block's own forward runs, but that its branches are one branch,
``block(x) - x``, was read for fixed values of some things: attributes of the block, arguments that
are not tensors, decisions on shapes. Another call is read again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchdrop.error_pages import see
from torchdrop.finding.block_stream import follow_stream
from torchdrop.finding.residual import Branch, BranchSource, Residual
from torchdrop.finding.residual_sums import read_residual_sums
from torchdrop.running.program import MismatchError, Program, call_signature
from torchdrop.running.rewrite import rewrite
from torchdrop.tracing.block_graph import BlockGraph, trace_block
from torchdrop.tracing.untraceable import UntraceableError

if TYPE_CHECKING:
    from torchdrop.running.whole_site import WholeSite

__all__ = ["StreamReading", "StreamReadings"]

# How many readings are stored for a block at most.
_MOST_READINGS = 16


class StreamReading:
    """The forwards that add the branches of a block, as read for one kind of call.

    Args:
        graphs: By the path from the block: its own forward, "", and those of children that add
            branches.
    """

    def __init__(self, graphs: dict[str, BlockGraph]) -> None:
        self._programs = {path: rewrite(graph, [], path) for path, graph in graphs.items()}

    @property
    def own(self) -> Program:
        """What is known of the forward of the block itself."""
        return self._programs[""]

    def check(self, site: WholeSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise :class:`MismatchError` if this is another kind of call."""
        tensors = self.own.bind(site.__signature__, args, kwargs)
        self.check_attributes(site)
        self.own.check_decisions(tensors)

    def check_attributes(self, site: WholeSite) -> None:
        """Raise :class:`MismatchError` if attributes of the block, or modes, have changed."""
        for path, program in self._programs.items():
            program.check_attributes(site.module.get_submodule(path) if path else site.module)
            if program.asks:
                program.check_modes()


class StreamReadings:
    """The kinds of calls for which a block is dropped as a whole.

    Args:
        graphs: The forwards that were read when the block was attached, as for
            :class:`StreamReading`.
        changes: What these apply to the stream besides sums, which the user has accepted.
    """

    def __init__(self, graphs: dict[str, BlockGraph], changes: list[str]) -> None:
        self._known = [StreamReading(graphs)]
        self._parts = [path for path in graphs if path]
        self._inlined = graphs[""].inlined
        self._changes = changes

    def fitting(
        self, site: WholeSite, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> StreamReading:
        """Return the reading for a call; read the block again if none is known.

        Raises:
            RuntimeError: In this call the block does not return its input where its branches are
                dropped, or that cannot be read.
        """
        mismatch: MismatchError | None = None
        for reading in self._known:
            try:
                reading.check(site, args, kwargs)
            except MismatchError as found:
                mismatch = mismatch or found
            else:
                return reading
        assert mismatch is not None
        name = site.branches[0].facts.block
        difference = f"{name} was read with {mismatch.known}, but is called with {mismatch.given}"
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{difference}; call the model once like this before compiling it"
                + see("compile-and-export")
            )
        why = self._read(site, args, kwargs)
        if why:
            raise RuntimeError(
                f"{difference}, and in this call its branches cannot be dropped together: {why}; "
                f"give example_inputs as the model is called, or use unit='branch'"
                + see("whole-blocks")
            )
        return self._known[-1]

    def _read(self, site: WholeSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Read the block with the arguments of this call.

        Returns:
            Why it cannot be dropped as a whole in this call; empty if it can.
        """
        module, facts = site.module, site.branches[0].facts
        bound = site.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        inlined = {module.get_submodule(path) for path in self._inlined}
        try:
            own = trace_block(
                module,
                training=module.training,  # in evaluation, too, blocks are scaled
                arguments=bound.arguments,
                batch_dim=facts.dim,
                inlined=inlined,
            )
            graphs = {"": own}
            for path in self._parts:
                part = module.get_submodule(path)
                graphs[path] = trace_block(part, training=module.training, batch_dim=facts.dim)
        except UntraceableError as error:
            return str(error)
        branches: list[Branch] = []
        for path, read in graphs.items():
            for entry in read_residual_sums(read, batch_dim=facts.dim, assume=True):
                source = BranchSource(path, entry.split, read)
                name = f"{facts.block}:{len(branches)}"
                branches.append(
                    Branch(name, entry.shortcut, "layer", "", 0.0, (), (), source=source)
                )
        stream = follow_stream(Residual(facts.block, module, branches, owner=""))
        if stream.why_not:
            return stream.why_not
        others = [change for change in stream.changes if change not in self._changes]
        if others:
            return f"the block applies {' and '.join(others)} to its sums"
        if (stream.x, stream.sum_item) != (site.block.x, site.block.sum_item):
            return "its input or its output is another one"
        reading = StreamReading(graphs)
        if reading.own.seen is not None:
            tensors = reading.own.bind(site.__signature__, args, kwargs)
            reading.own.seen.add(call_signature(tensors))
        if len(self._known) >= _MOST_READINGS:
            del self._known[1]  # the first one, which belongs to the example, stays
        self._known.append(reading)
        return ""
