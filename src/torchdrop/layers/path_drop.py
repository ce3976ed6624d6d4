"""PathDrop: which inputs of a join are kept, local to it or as one column of the whole network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from torchdrop.checks import (
    check_choice,
    check_dim,
    check_generator,
    check_input,
    check_mode,
    check_whole,
)
from torchdrop.layers.base import LayerWithRate, fx_node_of_call
from torchdrop.layers.draws import in_memory_format_of, keep_mask, random_integers
from torchdrop.rows.collectives import meets_ranks
from torchdrop.rows.sampling import host_generator
from torchdrop.rows.take_and_add import add_rows, take, with_zero_grads
from torchdrop.schedules import check_rate

__all__ = ["PATHS", "PathDrop", "path_drop", "path_drop_column"]

PATHS = ("local", "global", "mixed")


def path_drop_column(
    columns: int,
    samples: int = 1,
    paths: str = "mixed",
    *,
    mode: str = "row",
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the column that a network of many joins keeps, to be passed to all of them.

    Args:
        columns: How many columns the network has.
        samples: The number of samples in the batch.
        paths: ``"global"``: every sample one column, uniformly. ``"local"``: none, each join
            decides by itself. ``"mixed"``: one or the other, each with probability one half (the
            paper's training).
        mode: ``"row"``: each sample has its own draw. ``"batch"``: one draw.
        device: Where the result is to be: that of the activations, or the host (None) where joins
            run modules (:class:`torchdrop.layers.PathDrop`).
        generator: Draws, on ``device``. Eager mode only.

    Returns:
        An int64 tensor (samples,), or (1,) with ``mode="batch"``: a column from 0, or -1 where
        joins decide.

    Raises:
        TypeError: ``columns`` or ``samples`` is no integer, or ``generator`` none.
        ValueError: ``paths`` or ``mode`` is unknown, ``columns`` below 1 or ``samples`` below 0.
    """
    check_choice(paths, PATHS, "paths")
    check_mode(mode)
    check_whole(columns, "columns", 1)
    check_whole(samples, "samples")
    check_generator(generator)
    shape = (samples if mode == "row" else 1,)
    device = torch.device("cpu") if device is None else device
    column = random_integers(columns, shape, device, generator)
    if paths == "local":
        return torch.full_like(column, -1)
    if paths == "mixed":
        return torch.where(keep_mask(shape, 0.5, device=device, generator=generator), column, -1)
    return column


def _kept(
    n: int,
    samples: int,
    p: float,
    column: Tensor | None,
    columns: Sequence[int] | None,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """For each of ``n`` inputs and each sample, whether it is kept: (n, samples). Never none."""
    kept = keep_mask((n, samples), p, device=device, generator=generator)
    # Where all are dropped, one stays. It is drawn always: what is drawn is not to depend on it.
    number = torch.arange(n, device=device)[:, None]
    last = random_integers(n, (samples,), device, generator)
    kept = kept | (~kept.any(0) & (number == last))
    if column is None:
        return kept
    column = column.to(device)
    own = number if columns is None else torch.tensor(columns, device=device)[:, None]
    chosen = own == column
    # A join that this column does not pass through is not used; it is the mean of all.
    chosen = chosen | ~chosen.any(0)
    return torch.where(column >= 0, chosen, kept)


def _check_columns(columns: Sequence[int] | None, n: int | None) -> None:
    if columns is None:
        return
    if not isinstance(columns, Sequence) or any(
        isinstance(c, bool) or not isinstance(c, int) for c in columns
    ):
        raise TypeError(f"columns has to be a sequence of integers, but got {columns!r}")
    if n is not None and len(columns) != n:
        raise ValueError(
            f"columns has to name the column of each of the {n} inputs, but got {tuple(columns)}"
        )


def _check_column(column: Tensor | None, samples: int) -> None:
    if column is not None and not isinstance(column, Tensor):
        raise TypeError(
            f"column has to be a tensor, as path_drop_column returns it, but got {column!r}"
        )
    if column is not None and column.shape not in ((1,), (samples,)):
        raise ValueError(
            f"column has to have the shape (1,) or ({samples},), as path_drop_column returns it, "
            f"but got {tuple(column.shape)}"
        )


def path_drop(
    branches: Sequence[Tensor],
    p: float,
    training: bool = True,
    *,
    mode: str = "row",
    batch_dim: int = 0,
    column: Tensor | None = None,
    columns: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The mean of the inputs of a join that are not dropped: drop-path of FractalNet.

    *Local*: each of the n inputs is dropped with probability p. Where all are, one of them chosen
    uniformly is kept, so an input is dropped with probability ``p - p**n / n``, less than p, and
    with p=1 exactly one is kept::

        path_drop(x_1, ..., x_n) = mean of the x_i that are kept       in training
                                   mean of all                        in evaluation and with p = 0

    *Global*: with ``column``, drawn once for a network by :func:`path_drop_column` and passed to
    all its joins, a sample keeps the input that belongs to its column and drops the others. A join
    that the column does not pass through gives the mean of all, which is not used.

    Nothing else is scaled: the mean of survivors has the right size. Dropped values are selected
    away, not multiplied by zero.

    Args:
        branches: The inputs, tensors of one shape. Dtypes promote as in a sum.
        p: The probability of dropping an input, in [0, 1].
        training: False gives the mean of all inputs; of a single one, the object itself.
        mode: ``"row"``: each sample has its own draws. ``"batch"``: one draw for all.
        batch_dim: The dimension that counts samples.
        column: For each sample, or once, the column to keep, or -1 for local draws.
        columns: The columns that the inputs belong to; by default 0, 1, ..., n - 1.
        generator: Draws, on the device of the inputs. Eager mode only.

    Returns:
        A tensor of the shape of the inputs.

    Raises:
        TypeError: An input is no floating-point tensor, ``p`` no real number (a bool or a string
            is none), or ``batch_dim`` no integer.
        ValueError: There is no input, or their shapes differ; ``p`` is NaN or outside [0, 1],
            ``mode`` is unknown; ``column`` or ``columns`` has another length.

    Reference:
        Larsson et al. 2017, FractalNet, arXiv:1605.07648.
    """
    if not isinstance(branches, Sequence):
        raise TypeError(
            f"branches has to be a sequence of tensors, but got a {type(branches).__name__}"
        )
    branches = tuple(branches)
    if has_torch_function(branches):
        return handle_torch_function(
            path_drop,
            branches,
            branches,
            p,
            training,
            mode=mode,
            batch_dim=batch_dim,
            column=column,
            columns=columns,
            generator=generator,
        )
    rate = check_rate(p)
    check_mode(mode)
    if not branches:
        raise ValueError("a join needs one input at least, but got none")
    for i, x in enumerate(branches):
        check_input(x, f"branches[{i}]")
    check_generator(generator)
    first = branches[0]
    if any(x.shape != first.shape for x in branches):
        shapes = ", ".join(str(tuple(x.shape)) for x in branches)
        raise ValueError(f"branches have to have the same shape, but got {shapes}")
    dim = check_dim(batch_dim, first.dim())
    _check_columns(columns, len(branches))
    samples = first.shape[dim]
    _check_column(column, samples)
    if not training or (rate == 0.0 and column is None):
        return _mean(branches)
    if mode == "batch":
        samples = 1 if column is None else column.shape[0]
    kept = _kept(len(branches), samples, rate, column, columns, first.device, generator)
    shape = [1] * first.dim()
    shape[dim] = kept.shape[1]
    dtype = _result_dtype(branches)
    out: Tensor | None = None
    for x, mask in zip(branches, kept.unbind(0), strict=True):
        part = torch.where(in_memory_format_of(x, mask.view(shape)), x, 0.0)
        # In place: what `where` gave is ours, and nothing needs its values later.
        out = _wide(part.to(dtype)) if out is None else out.add_(part)
        del part  # before the next one is made
    assert out is not None
    return out.div_(kept.sum(0).view(shape)).to(dtype)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: a sum of many in half precision would be rounded every time."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _result_dtype(branches: Iterable[Tensor]) -> torch.dtype:
    first, *others = branches
    dtype = first.dtype
    for x in others:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _mean(branches: Sequence[Tensor]) -> Tensor:
    if len(branches) == 1:
        return branches[0]
    out = _wide(branches[0])
    for x in branches[1:]:
        out = out + x
    return (out / len(branches)).to(_result_dtype(branches))


class PathDrop(LayerWithRate):
    """A join that drops inputs and takes the mean of the others: drop-path of FractalNet.

    Each of n inputs is dropped with probability p; where all are, one chosen uniformly is kept, so
    the delivered rate is ``p - p**n / n``::

        y = mean of the x_i that are kept   in training
        y = mean of all                     in evaluation and with p = 0

    Called with tensors, it joins them. Made with ``branches``, modules, and called with one tensor,
    it joins what they give for it, and while training runs none that is dropped: with
    ``mode="batch"`` only the branches that are kept, with ``"row"`` each on the rows that keep it.

    In a network of many joins, the paper keeps one column of all of them for half of the samples.
    The network draws it and passes it on, so that a checkpoint or a second network cannot confuse
    it::

        >>> column = functional.path_drop_column(4, len(x), device=x.device)
        >>> y = join(a, b, column=column)

    Args:
        p: The probability of dropping an input, in [0, 1]; .15 in the paper.
        branches: Modules that take the input of the join, or None.
        mode: ``"row"`` or ``"batch"``.
        columns: The columns of the network that the inputs belong to, where not all of its columns
            end in this join; by default 0, 1, ..., n - 1.
        batch_dim: The dimension that counts samples.

    Shape:
        Inputs (or outputs of ``branches``) of one shape, any number of dimensions from 1; the
        output has the same.

    With ``branches``, draws are made on the host, with ``mode="batch"`` alike on all ranks of a
    process group, and parameters of a branch that did not run get gradients of zero, which
    DistributedDataParallel waits for; where ranks wait for each other in a branch (SyncBatchNorm,
    ``fully_shard`` inside), all of them run and are masked. ``torch.compile`` breaks the graph
    there, since what runs depends on the draw; of tensors, the join compiles whole.

    Raises:
        TypeError: ``p`` is no real number (a bool or a string is none), a branch no module.
        ValueError: ``p`` is NaN or outside [0, 1], ``mode`` is unknown, or ``branches`` empty.
            When called, also as :func:`torchdrop.functional.path_drop`.

    Reference:
        Larsson et al. 2017, FractalNet, arXiv:1605.07648.
    """

    def __init__(
        self,
        p: float,
        branches: Iterable[nn.Module] | None = None,
        mode: str = "row",
        *,
        columns: Sequence[int] | None = None,
        batch_dim: int = 0,
    ) -> None:
        super().__init__()
        self.p = p
        modules = None if branches is None else list(branches)
        if modules is not None:
            for module in modules:
                if not isinstance(module, nn.Module):
                    raise TypeError(
                        f"branches have to be nn.Modules, but got {type(module).__name__}"
                    )
            if not modules:
                raise ValueError("a join needs one branch at least, but got none")
        check_mode(mode)
        self.mode = mode
        if columns is not None:
            _check_columns(columns, None if modules is None else len(modules))
        self.columns = None if columns is None else tuple(columns)
        self.batch_dim = check_dim(batch_dim)
        self.branches = None if modules is None else nn.ModuleList(modules)

    def extra_repr(self) -> str:
        """The rate and the rules."""
        text = f"p={self.p}, mode={self.mode!r}"
        if self.columns is not None:
            text += f", columns={self.columns}"
        return text if self.batch_dim == 0 else text + f", batch_dim={self.batch_dim}"

    def forward(self, *inputs: Tensor, column: Tensor | None = None) -> Tensor:
        """Join ``inputs``, or what the branches give for the one input."""
        node = fx_node_of_call(self, inputs, {} if column is None else {"column": column})
        if node is not None:
            return node
        if self.branches is None:
            return path_drop(
                inputs,
                self.p,
                self.training,
                mode=self.mode,
                batch_dim=self.batch_dim,
                column=column,
                columns=self.columns,
            )
        if len(inputs) != 1:
            raise TypeError(f"a join of modules takes one tensor, but got {len(inputs)}")
        (x,) = inputs
        check_input(x)
        dim = check_dim(self.batch_dim, x.dim())
        _check_column(column, x.shape[dim])
        if not self.training or (self.p == 0.0 and column is None):
            return _mean([_output(branch, x) for branch in self.branches])
        return self._run(list(self.branches), x, dim, column)

    def _run(self, branches: list[nn.Module], x: Tensor, dim: int, column: Tensor | None) -> Tensor:
        """The mean of what the branches give, each run on the rows that keep it."""
        if meets_ranks(branches, "a branch", alike=self.mode == "batch"):
            return path_drop(
                [_output(branch, x) for branch in branches],
                self.p,
                mode=self.mode,
                batch_dim=dim,
                column=column,
                columns=self.columns,
            )
        samples = x.shape[dim]
        draws = samples if self.mode == "row" else 1
        if column is not None:
            draws = max(draws if self.mode == "row" else 1, column.shape[0])
        host = torch.device("cpu")
        generator = host_generator(alike=self.mode == "batch")
        kept = _kept(len(branches), draws, self.p, column, self.columns, host, generator).expand(
            -1, samples
        )
        out: Tensor | None = None
        idle: list[nn.Parameter] = []
        dtypes: list[Tensor] = []
        for branch, mask in zip(branches, kept, strict=True):
            index = mask.nonzero().flatten()
            if len(index) == 0 and samples > 0:
                idle.extend(branch.parameters())
                continue
            whole = len(index) == samples
            index = index.to(x.device, non_blocking=True)
            y = _output(branch, x if whole else take(x, index, dim))
            dtypes.append(y)
            if out is None:
                shape = list(y.shape)
                shape[dim] = samples
                out = _wide(in_memory_format_of(y, y.new_zeros(shape)))
            expected = (*out.shape[:dim], len(index), *out.shape[dim + 1 :])
            if tuple(y.shape) != expected:
                raise ValueError(
                    f"branches have to give one shape, but {type(branch).__name__} gave "
                    f"{tuple(y.shape)} where another gave {expected}"
                )
            out = out + y if whole else add_rows(out, y, index, 1.0, dim)
        assert out is not None  # every row keeps one branch
        count = kept.sum(0).to(out.device)
        shape = [1] * out.dim()
        shape[dim] = samples
        out = (out / count.view(shape)).to(_result_dtype(dtypes))
        return with_zero_grads(out, idle) if idle else out


def _output(branch: Callable[..., Any], x: Tensor) -> Tensor:
    y = branch(x)
    if not isinstance(y, Tensor):
        raise TypeError(
            f"a join needs branches that return a tensor, but {type(branch).__name__} returned "
            f"{type(y).__name__}"
        )
    return y
