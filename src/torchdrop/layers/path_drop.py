"""PathDrop: drop inputs of a join, chosen by each join itself or by one column of the network."""

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
from torchdrop.layers.draws import along_dim, in_memory_format_of, keep_mask, random_integers
from torchdrop.rows.collectives import find_communicating_module
from torchdrop.rows.sampling import host_generator
from torchdrop.rows.take_and_add import add_rows, take, with_zero_grads
from torchdrop.schedules import check_rate

__all__ = ["PathDrop", "path_drop", "path_drop_column"]

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
    """Draw the column that a network keeps, which is then passed to all of its joins.

    Args:
        columns: How many columns the network has.
        samples: The number of samples in the batch.
        paths: ``"global"``: a uniformly drawn column for each sample. ``"local"``: no column, each
            join decides by itself. ``"mixed"``: one or the other, each with probability one half,
            as FractalNet was trained.
        mode: ``"row"``: one draw for each sample. ``"batch"``: one draw for the whole batch.
        device: The device of the result: that of the activations if joins take tensors. None, the
            host, if joins run modules (:class:`torchdrop.layers.PathDrop` with ``branches``), since
            they decide on the host which modules run.
        generator: The generator to draw from, on ``device``. Eager mode only.

    Returns:
        An int64 tensor of shape (samples,), or (1,) with ``mode="batch"``: the number of a column,
        from 0, or -1 where each join decides by itself.

    Raises:
        TypeError: ``columns`` or ``samples`` is not an integer, or ``generator`` is neither None
            nor a torch.Generator.
        ValueError: ``paths`` or ``mode`` is unknown, ``columns`` below 1 or ``samples`` below 0.

    Reference:
        Larsson et al. 2017, FractalNet, arXiv:1605.07648.
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


def _draw_kept_inputs(
    n: int,
    samples: int,
    p: float,
    column: Tensor | None,
    columns: Sequence[int] | None,
    device: torch.device,
    generator: torch.Generator | None,
) -> Tensor:
    """Draw which of ``n`` inputs each sample keeps.

    Returns:
        A mask of shape (n, samples), in which each sample has at least one True.
    """
    kept = keep_mask((n, samples), p, device=device, generator=generator)
    # Where all inputs are dropped, one of them stays. It is drawn in any case, so that the number
    # of random numbers does not depend on the values drawn.
    index = torch.arange(n, device=device)[:, None]
    stays = random_integers(n, (samples,), device, generator)
    kept = kept | (~kept.any(0) & (index == stays))
    if column is None:
        return kept
    column = column.to(device)
    column_of_input = index if columns is None else torch.tensor(columns, device=device)[:, None]
    in_column = column_of_input == column
    # The output of a join that the column does not pass through is not used. It keeps all inputs,
    # so that its mean is not 0 / 0.
    in_column = in_column | ~in_column.any(0)
    return torch.where(column >= 0, in_column, kept)


def _check_columns(columns: Sequence[int] | None, n: int | None) -> None:
    """Raise unless ``columns`` is None or ``n`` integers; None for ``n`` means any number."""
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
    """Raise unless ``column`` is None or a tensor with one column or one for each sample."""
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
    """Return the mean of the inputs of a join that are not dropped: drop-path of FractalNet.

    *Local*: each of the n inputs is dropped with probability p. If all are dropped, one of them,
    chosen uniformly, is kept. An input is therefore dropped with probability ``p - p**n / n``,
    which is less than p, and with p=1 exactly one input is kept::

        path_drop(x_1, ..., x_n) = mean of the x_i that are kept       in training
                                   mean of all                        in evaluation and with p = 0

    *Global*: ``column`` is drawn once for a network by :func:`path_drop_column` and passed to all
    its joins. Each sample keeps the input that belongs to its column, and drops the others. A join
    that the column does not pass through returns the mean of all inputs, which is not used.

    No other scaling is needed, since a mean does not grow with the number of inputs. Dropped
    values are replaced by 0, not multiplied by 0.

    Args:
        branches: The inputs, tensors of one shape. Dtypes promote as in a sum.
        p: The probability of dropping an input, in [0, 1].
        training: If False, the result is the mean of all inputs. With a single input, it is that
            tensor itself, not a copy.
        mode: ``"row"``: decisions for each sample. ``"batch"``: for the whole batch.
        batch_dim: The dimension that counts samples.
        column: The column to keep, for each sample or for all, or -1 to draw locally.
        columns: The columns that the inputs belong to; by default 0, 1, ..., n - 1.
        generator: The generator to draw from, on the device of the inputs. Eager mode only.

    Returns:
        A tensor of the shape of the inputs.

    Raises:
        TypeError: ``branches`` is not a sequence of floating-point tensors, ``p`` is not a real
            number (bools and strings are not accepted), or ``batch_dim`` is not an integer.
        ValueError: There is no input, or the shapes differ; ``p`` is NaN or outside [0, 1];
            ``mode`` is unknown; or ``column`` or ``columns`` has the wrong length.

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
        raise ValueError("a join needs at least one input, but got none")
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
    kept = _draw_kept_inputs(len(branches), samples, rate, column, columns, first.device, generator)
    dtype = _result_dtype(branches)
    out: Tensor | None = None
    for x, mask in zip(branches, kept.unbind(0), strict=True):
        own_mask = in_memory_format_of(x, along_dim(mask, dim, x.dim()))
        part = torch.where(own_mask, x, 0.0)
        # In place is safe: `where` made a new tensor, and autograd does not save it.
        out = _at_least_float32(part.to(dtype)) if out is None else out.add_(part)
        del part  # frees its memory before the next one is made
    assert out is not None
    return out.div_(along_dim(kept.sum(0), dim, out.dim())).to(dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32, so that sums are not rounded to half precision."""
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
    out = _at_least_float32(branches[0])
    for x in branches[1:]:
        out = out + x
    return (out / len(branches)).to(_result_dtype(branches))


class PathDrop(LayerWithRate):
    """Drop inputs of a join and return the mean of the others: drop-path of FractalNet.

    Each of n inputs is dropped with probability p. If all are dropped, one of them, chosen
    uniformly, is kept, so an input is dropped with probability ``p - p**n / n``::

        y = mean of the x_i that are kept   in training
        y = mean of all                     in evaluation and with p = 0

    Without ``branches``, the layer is called with tensors and joins them. With ``branches``, a
    list of modules, it is called with one tensor and joins their outputs. A dropped module does
    not run in training: with ``mode="batch"`` only the kept modules run, and with ``"row"`` each
    module runs on the rows that keep it.

    FractalNet was trained with one column throughout the network for half of the samples. The
    forward of the network draws this column and passes it to all joins. The joins do not store it,
    so networks do not get the column of each other, and activation checkpointing repeats it::

        >>> column = functional.path_drop_column(4, len(x), device=x.device)
        >>> y = join(a, b, column=column)

    Args:
        p: The probability of dropping an input, in [0, 1]; .15 in the paper.
        branches: Modules that take the input of the join, or None to join tensors.
        mode: ``"row"`` or ``"batch"``.
        columns: The columns of the network that the inputs belong to, if only some of its columns
            end in this join; by default 0, 1, ..., n - 1.
        batch_dim: The dimension that counts samples.

    Shape:
        Inputs (or outputs of ``branches``) of one shape, any number of dimensions from 1; the
        output has the same.

    With ``branches``, decisions are drawn on the host; with ``mode="batch"`` all ranks of a
    process group draw the same ones. Parameters of a branch that did not run get gradients of
    zero, which DistributedDataParallel waits for. If ranks wait for each other inside a branch
    (SyncBatchNorm, ``fully_shard``), all branches run and are masked. ``torch.compile`` breaks the
    graph at the join, since the decisions determine which modules run. A join of tensors compiles
    without a break.

    Raises:
        TypeError: ``p`` is not a real number (bools and strings are not accepted), or a branch is
            not an nn.Module.
        ValueError: ``p`` is NaN or outside [0, 1], ``mode`` is unknown, or ``branches`` is empty.
            A call can also raise the errors of :func:`torchdrop.functional.path_drop`.

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
                raise ValueError("a join needs at least one branch, but got none")
        check_mode(mode)
        self.mode = mode
        if columns is not None:
            _check_columns(columns, None if modules is None else len(modules))
        self.columns = None if columns is None else tuple(columns)
        self.batch_dim = check_dim(batch_dim)
        self.branches = None if modules is None else nn.ModuleList(modules)

    def extra_repr(self) -> str:
        """Return the rate, the mode, and the arguments that differ from their defaults."""
        text = f"p={self.p}, mode={self.mode!r}"
        if self.columns is not None:
            text += f", columns={self.columns}"
        return text if self.batch_dim == 0 else text + f", batch_dim={self.batch_dim}"

    def forward(self, *inputs: Tensor, column: Tensor | None = None) -> Tensor:
        """Join ``inputs``, or the outputs of the branches for the one input."""
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
            raise TypeError(
                f"a join of modules takes one tensor, but got {len(inputs)}; give PathDrop no "
                "branches to join tensors"
            )
        (x,) = inputs
        check_input(x)
        dim = check_dim(self.batch_dim, x.dim())
        _check_column(column, x.shape[dim])
        if not self.training or (self.p == 0.0 and column is None):
            return _mean([_output(branch, x) for branch in self.branches])
        return self._run(list(self.branches), x, dim, column)

    def _run(self, branches: list[nn.Module], x: Tensor, dim: int, column: Tensor | None) -> Tensor:
        """Return the mean of the outputs of the branches, each run on the rows that keep it."""
        if find_communicating_module(branches, "a branch", same_on_all_ranks=self.mode == "batch"):
            # The other ranks wait in this branch, so it has to run, even if all its rows are zero.
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
            # A column for each sample needs a mask for each sample, also with mode="batch".
            draws = max(draws, column.shape[0])
        host = torch.device("cpu")
        generator = host_generator(same_on_all_ranks=self.mode == "batch")
        kept = _draw_kept_inputs(
            len(branches), draws, self.p, column, self.columns, host, generator
        ).expand(-1, samples)
        out: Tensor | None = None
        idle: list[nn.Parameter] = []
        outputs: list[Tensor] = []
        for branch, mask in zip(branches, kept, strict=True):
            index = mask.nonzero().flatten()
            # With an empty batch all branches run: their outputs give the shape of the result.
            if len(index) == 0 and samples > 0:
                idle.extend(branch.parameters())
                continue
            whole = len(index) == samples
            index = index.to(x.device, non_blocking=True)
            y = _output(branch, x if whole else take(x, index, dim))
            outputs.append(y)
            if out is None:
                shape = list(y.shape)
                shape[dim] = samples
                out = _at_least_float32(in_memory_format_of(y, y.new_zeros(shape)))
            expected = (*out.shape[:dim], len(index), *out.shape[dim + 1 :])
            if tuple(y.shape) != expected:
                raise ValueError(
                    f"branches have to return tensors of one shape, but {type(branch).__name__} "
                    f"returned {tuple(y.shape)}, where {expected} was expected"
                )
            out = out + y if whole else add_rows(out, y, index, 1.0, dim)
        assert out is not None  # every row keeps one branch
        count = along_dim(kept.sum(0).to(out.device), dim, out.dim())
        out = (out / count).to(_result_dtype(outputs))
        return with_zero_grads(out, idle) if idle else out


def _output(branch: Callable[..., Any], x: Tensor) -> Tensor:
    """Return ``branch(x)``; raise if that is not a tensor."""
    y = branch(x)
    if not isinstance(y, Tensor):
        raise TypeError(
            f"a join needs branches that return a tensor, but {type(branch).__name__} returned "
            f"{type(y).__name__}"
        )
    return y
