"""What must hold for every model: the harness that the zoo tests and the table run them through.

Each check takes a model without stochastic depth and gives it back as it was. It raises
AssertionError with what was violated.
"""

from __future__ import annotations

import copy
import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

import torchdrop
from torchdrop import cost
from torchdrop.finding.survey import Survey, survey
from torchdrop.running.observers import SumEvent
from torchdrop.tracing.nodes import summands
from torchdrop.tracing.operations import callee

# 1 / (1 - p) rounds to 1 in every dtype, and B * (1 - p) to B: nothing is dropped or scaled.
BARELY = 1e-30


# ---------------------------------------------------------------------------------------------
# Models and what they return


def without_randomness(model: nn.Module) -> nn.Module:
    """Switch off every other random layer: dropout, and the masks that the model brings along."""
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def call(model: nn.Module, inputs: Any) -> Any:
    """``model`` on ``inputs`` as ``example_inputs`` takes them: a tensor, a tuple or a dict."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def tensors_of(output: Any) -> list[Tensor]:
    """Every tensor of floating point in what a model returned, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for item in output for tensor in tensors_of(item)]
    return []


def to_double(inputs: Any) -> Any:
    """``inputs`` with every tensor of floating point in float64."""
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {key: to_double(value) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(to_double(value) for value in inputs)
    return inputs


class InDouble(TorchFunctionMode):
    """Turns conversions to float32 into float64: norms and softmaxes often compute in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return (Tensor.double if func is Tensor.float else func)(*args, **kwargs)


def loss_of(output: Any) -> Tensor:
    """A scalar to which every element of the output contributes with a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors_of(output):
        weights = torch.arange(1, tensor.numel() + 1, dtype=tensor.dtype).sin().view(tensor.shape)
        total = total + (tensor * weights).sum() / tensor.numel()
    return total


def gradients(model: nn.Module, inputs: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of a step, the same as those of a mask where none was computed."""
    model.zero_grad(set_to_none=True)
    output = call(model, inputs)
    loss_of(output).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return [t.detach() for t in tensors_of(output)], found


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that surgery could harm."""
    return {
        "keys": list(model.state_dict()),
        "classes": [type(m) for m in model.modules()],
        "modules": [id(m) for m in model.modules()],
        "parameters": [id(p) for p in model.parameters()],
        "buffers": [id(b) for b in model.buffers()],
        "training": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "repr": repr(model),
    }


def instance_names(model: nn.Module) -> list[list[str]]:
    return [list(m.__dict__) for m in model.modules()]


@contextmanager
def same_randomness(seed: int = 0) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    before = [(b, b.clone()) for b in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextmanager
def attached(
    model: nn.Module, p: Any = 0.5, **options: Any
) -> Iterator[torchdrop.attaching.plan.Plan]:
    plan = torchdrop.add_stochastic_depth(model, p, schedule="uniform", **options)
    try:
        yield plan
    finally:
        torchdrop.remove_stochastic_depth(model)


def assert_same(a: Any, b: Any, tolerance: float = 0.0) -> None:
    """That the outputs ``a`` and ``b`` are equal; to ``tolerance`` of the largest element of b."""
    mine, theirs = tensors_of(a), tensors_of(b)
    assert [(t.shape, t.dtype) for t in mine] == [(t.shape, t.dtype) for t in theirs]
    assert mine, "there is nothing to compare"
    for i, (x, y) in enumerate(zip(mine, theirs, strict=True)):
        off = distance(x, y)
        assert off <= tolerance, f"output {i}: largest difference {off:.3g} of the largest element"


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest element of ``b``; infinite where one is NaN."""
    if torch.equal(a, b):
        return 0.0
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().double(), b.detach().double()
    finite = b.isfinite()
    if not torch.equal(a[~finite], b[~finite]):  # -inf in a mask that is returned, say
        return float("inf")
    if not finite.any():
        return 0.0
    off = (a[finite] - b[finite]).abs().max() / b[finite].abs().max().clamp_min(1e-300)
    return float("inf") if off.isnan() else off.item()


# ---------------------------------------------------------------------------------------------
# The dense model, and the checks of what is attached against it


@dataclass
class Dense:
    """What a model does without stochastic depth, recorded once for all checks."""

    fingerprint: dict[str, Any]
    names: list[list[str]]
    evaluation: Any
    training: Any
    buffers: list[Tensor]
    fired: Counter[str]
    flops: int
    pickles: bool


def record(model: nn.Module, inputs: Any) -> Dense:
    """Run the dense model once in evaluation and once in training; its buffers are restored."""
    before, names = fingerprint(model), instance_names(model)
    fired: Counter[str] = Counter()
    with torch.no_grad():
        with same_randomness():
            evaluation = call(model.eval(), inputs)
        with buffers_restored(model), same_randomness(), _counting(model, fired):
            training = None
            with cost.FlopCounter() as counter:
                training = call(model.train(), inputs)
            buffers = [b.clone() for b in model.buffers()]
    for module, mode in zip(model.modules(), before["training"], strict=True):
        module.training = mode
    # torch refuses to pickle modules with parametrized weights
    pickles = not any(map(is_parametrized, model.modules()))
    return Dense(before, names, evaluation, training, buffers, fired, counter.total, pickles)


@contextmanager
def _counting(model: nn.Module, fired: Counter[str]) -> Iterator[None]:
    """Count the calls of each module, by a hook on it."""

    def fire(name: str) -> Callable[..., None]:
        return lambda *_: fired.update([name])

    handles = [m.register_forward_hook(fire(name)) for name, m in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_untouched(model: nn.Module, dense: Dense) -> None:
    """The same keys, classes, parameters, hooks; without stochastic depth the same attributes."""
    now = fingerprint(model)
    for module, mode in zip(model.modules(), dense.fingerprint["training"], strict=True):
        module.training = mode
    now["training"] = [m.training for m in model.modules()]
    changed = [key for key, value in dense.fingerprint.items() if now[key] != value]
    assert not changed, f"changed: {', '.join(changed)}"
    if not torchdrop.has_stochastic_depth(model):
        assert instance_names(model) == dense.names, "attributes were left behind"


def check_evaluation(model: nn.Module, inputs: Any, dense: Dense) -> None:
    """Evaluation is the original forward, bit for bit."""
    with torch.no_grad(), same_randomness():
        assert_same(call(model.eval(), inputs), dense.evaluation)


def check_nothing_dropped(
    model: nn.Module, inputs: Any, dense: Dense, tolerance: float = 0.0
) -> float:
    """Training with nothing dropped, through the generated forward, is dense training.

    Also its batch statistics and the hooks that fire.

    Returns:
        The largest difference of an output.
    """
    plan = torchdrop.get_plan(model)
    rates = plan.state_dict()
    plan.set_p([BARELY] * len(plan.blocks))
    model.train()
    plan.observed()
    fired: Counter[str] = Counter()
    with torch.no_grad(), buffers_restored(model), same_randomness(), _counting(model, fired):
        ours = call(model.train(), inputs)
        assert set(plan.observed().values()) == {0.0}
        assert_same(ours, dense.training, tolerance)
        for buffer, theirs in zip(model.buffers(), dense.buffers, strict=True):
            assert distance(buffer, theirs) <= tolerance, "batch statistics differ"
    more, less = fired - dense.fired, dense.fired - fired
    assert not more, f"hooks fired more often: {dict(more)}"
    assert not less, f"hooks fired less often: {dict(less)}"
    plan.load_state_dict(rates)
    pairs = zip(tensors_of(ours), tensors_of(dense.training), strict=True)
    return max(distance(a, b) for a, b in pairs)


def check_work(model: nn.Module, inputs: Any, dense: Dense) -> tuple[float, float]:
    """A training pass takes the FLOPs that the plan's shares and the kept rows amount to.

    With it, where BatchNorm would see a single row of a small map, those of a second row.

    Returns:
        The FLOPs of the pass as a part of those of a dense one; the part that all branches have.
    """
    plan = torchdrop.get_plan(model)
    with torch.no_grad(), buffers_restored(model), same_randomness(), _decisions(plan) as decisions:
        ours = cost.flops(call, model.train(), inputs) / dense.flops
    expected, droppable, seconds = 1.0, 0.0, 0.0
    for state in _states(plan):
        calls = decisions[state.facts.name]
        assert calls, f"{state.facts.name} did not run"
        if state.action == "mask":
            continue
        assert state.share is not None, f"{state.facts.name} was not measured"
        droppable += state.share
        masks = [_rows(rows, kept) for rows, kept in calls]
        dropped = [1.0 - mask.double().mean().item() for mask in masks]
        if state.facts.has_batch_norm:
            alone = sum(1.0 / mask.numel() for mask in masks if mask.sum() == 1)
            seconds += state.share * alone / len(masks)
        expected -= state.share * sum(dropped) / len(dropped)
    # what does not depend on the batch, as a network for position biases, is computed all the same
    most = expected + seconds + 0.01
    most += 0.0 if ours <= most else _fixed_part(model, inputs, dense)
    assert expected - 0.01 <= ours <= most, (
        f"{ours:.1%} of the dense FLOPs, expected {expected:.1%}"
    )
    return ours, droppable


def check_all_gradients(model: nn.Module, inputs: Any) -> None:
    """Every parameter has the gradient that masks would leave it: zeros where no row was kept."""
    plan = torchdrop.get_plan(model)
    rates = plan.state_dict()
    model.train()
    found = {}
    for p in (BARELY, 0.5, 1.0):
        plan.set_p([p] * len(plan.blocks))
        with buffers_restored(model), same_randomness():
            found[p] = gradients(model, inputs)[1]
        missing = set(found[BARELY]) ^ set(found[p])
        assert not missing, f"p={p}: no gradient for {sorted(missing)[:4]}"
        assert all(bool(g.isfinite().all()) for g in found[p].values()), f"p={p}: not finite"
    unused = {n for n, p in model.named_parameters() if p.requires_grad} - set(found[BARELY])
    whole = {n for n, g in found[BARELY].items() if bool(g.any())}
    assert len(unused) < len(whole), "nearly nothing has a gradient"
    plan.load_state_dict(rates)


def check_copies(model: nn.Module, inputs: Any, dense: Dense) -> None:
    """A saved and loaded model and a deepcopy have a plan of their own and the same output."""
    model.eval()
    plan = torchdrop.get_plan(model)
    copies: list[Callable[[], nn.Module]] = [lambda: copy.deepcopy(model)]
    if dense.pickles:
        file = io.BytesIO()
        torch.save(model, file)  # which pickles it
        file.seek(0)
        copies.append(lambda: torch.load(file, weights_only=False))
    for make in copies:
        twin = make()
        theirs = torchdrop.get_plan(twin)
        assert theirs.state_dict() == plan.state_dict()
        mine = dict(model.named_modules())
        names = {module: name for name, module in twin.named_modules()}
        for ours, other in zip(plan.blocks, theirs.blocks, strict=True):
            assert mine.get(names.get(other.module)) is ours.module
        with torch.no_grad(), same_randomness():
            assert_same(call(twin, inputs), dense.evaluation)
        theirs.set_p(0.75)
        assert theirs.state_dict() != plan.state_dict()
        del twin, theirs


def _fixed_part(model: nn.Module, inputs: Any, dense: Dense) -> float:
    """The part of the dense FLOPs that is the same for every size of the batch."""
    one = {k: v[:1] for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs[:1]
    batch = len(next(iter(inputs.values()))) if isinstance(inputs, Mapping) else len(inputs)
    with torch.no_grad(), torchdrop.paused(model):
        small = cost.flops(call, model.eval(), one)
        whole = cost.flops(call, model.eval(), inputs)
    return (batch * small - whole) / (batch - 1) / whole


def _states(plan: torchdrop.attaching.plan.Plan) -> list[Any]:
    return [state for site in plan._sites for state in site.branches]


# ---------------------------------------------------------------------------------------------
# The reference: masks on the dense model


def check_masked_gradients(
    model: nn.Module,
    inputs: Any,
    tolerance: float = 1e-10,
    *,
    training_scale: bool = True,
    **options: Any,
) -> float:
    """Rows dropped: outputs and gradients equal those of masks on the dense model, in float64.

    The dense model runs its own forwards; what its residual additions add is masked as they
    happen, so nothing of what is generated takes part. Where a sum is no plain addition, the
    modules that a branch calls are masked. BatchNorm is in evaluation: else the statistics of the
    kept rows are not those of all.

    Returns:
        The largest difference.
    """
    parameters = [(p, p.dtype) for p in model.parameters()]
    buffers = [(m, dict(m._buffers)) for m in model.modules()]
    default = torch.get_default_dtype()
    model.double()
    torch.set_default_dtype(torch.float64)
    try:
        inputs = to_double(inputs)
        if options.get("example_inputs") is not None:
            options["example_inputs"] = to_double(options["example_inputs"])
        with InDouble():
            return _compare_with_masks(model, inputs, tolerance, training_scale, options)
    finally:
        torch.set_default_dtype(default)
        for parameter, dtype in parameters:
            parameter.data = parameter.data.to(dtype)
        for module, original in buffers:
            module._buffers.update(original)


def _compare_with_masks(
    model: nn.Module, inputs: Any, tolerance: float, training_scale: bool, options: dict[str, Any]
) -> float:
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    scale, gain = ("train", 2.0) if training_scale else ("eval", 1.0)
    with _readings() as surveys, attached(model, scale=scale, **options) as plan:
        splits = {b.name: b for r in surveys[0].residuals for b in r.branches}
        dims = {state.facts.name: state.facts.dim for state in _states(plan)}
        with same_randomness(), _decisions(plan) as decisions:
            mine, my_gradients = gradients(model, inputs)
        masked = [(block, branch) for block in plan.blocks for branch in block.branches]
    kept = {name: [_rows(*decision) for decision in found] for name, found in decisions.items()}
    assert any(0 < k.sum() < k.numel() for each in kept.values() for k in each), "none was cut"
    last, calls = _calls(model, inputs)
    shared = Counter(child for _, branch in masked for child in branch.children)
    additions = _Additions(model)
    with ExitStack() as stack:
        stack.callback(additions.remove)
        for block, branch in masked:
            times, dim = len(kept[branch.name]), dims[branch.name]
            if branch.action == "layer":
                hook = _mask_layer(kept[branch.name], gain, dim)
                handle = block.module.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
                continue
            if additions.mask(splits[branch.name], kept[branch.name], gain, dim):
                continue
            # every module that only this branch calls, and once; the last one scales as well
            own = [c for c in branch.children if shared[c] == 1 and calls[c] == times]
            own.sort(key=last.__getitem__)
            assert own, f"{branch.name}: no module of its own to mask"
            for path in own:
                hook = _mask(kept[branch.name], gain if path == own[-1] else 1.0, dim)
                stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        stack.enter_context(additions)
        with same_randomness():
            theirs, their_gradients = gradients(model, inputs)
    assert not additions.left(), f"not added: {additions.left()}"
    assert_same(mine, theirs, tolerance)
    assert set(my_gradients) == set(their_gradients)
    # on the scale of all gradients: some are zero but for rounding, as that of a key's bias
    size = max(g.abs().max().item() for g in their_gradients.values() if g.numel())
    worst, where = 0.0, ""
    for name, gradient in their_gradients.items():
        if not gradient.numel():
            continue
        off = (my_gradients[name] - gradient).abs().max().item() / size
        if not off <= worst:
            worst, where = off, name
    assert worst <= tolerance, f"the gradient of {where} is off by {worst:.3g} of the largest"
    return worst


@contextmanager
def _readings() -> Iterator[list[Survey]]:
    """Collects what is read of a model when stochastic depth is attached: reading takes longest."""
    taken: list[Survey] = []

    def note(*args: Any, **options: Any) -> Survey:
        taken.append(survey(*args, **options))
        return taken[-1]

    with patch("torchdrop.attaching.attach.survey", note):
        yield taken


@contextmanager
def _decisions(plan: torchdrop.Plan) -> Iterator[dict[str, list[Any]]]:
    """Collects what each branch decides in each of its calls: how many rows, and which of them."""
    taken: dict[str, list[Any]] = defaultdict(list)
    with ExitStack() as stack:
        for site in plan._sites:

            def note(event: SumEvent, site: Any = site) -> None:
                name = site.branches[event.index].facts.name
                taken[name].append((event.batch, event.rows))

            stack.enter_context(site.observe(note))
        yield taken


def _rows(batch: int, kept: Any) -> Tensor:
    """A decision as a mask: every row, none, or those that are listed."""
    mask = torch.zeros(batch, dtype=torch.bool)
    mask[kept if isinstance(kept, Tensor) else slice(batch if kept else 0)] = True
    return mask


def _calls(model: nn.Module, inputs: Any) -> tuple[dict[str, int], Counter[str]]:
    """In which order the last calls of the modules end; how often each is called."""
    last: dict[str, int] = {}
    calls: Counter[str] = Counter()

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[name] += 1
            last[name] = calls.total()

        return hook

    handles = [m.register_forward_hook(note(name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad(), same_randomness(), buffers_restored(model):
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return last, calls


def _where_kept(x: Tensor, keep: Tensor, gain: float, dim: int) -> Tensor:
    """``gain * x`` in the kept rows and 0 in the others, where ``x`` carries the batch."""
    if not x.is_floating_point() or x.dim() <= dim or x.shape[dim] % keep.numel():
        return x
    # windows, heads or positions folded into the batch: the batch varies slowest
    keep = keep.repeat_interleave(x.shape[dim] // keep.numel())
    shape = [1] * x.dim()
    shape[dim] = -1
    return torch.where(keep.view(shape), x * gain if gain != 1.0 else x, x.new_zeros(()))


def _mask(masks: list[Tensor], gain: float, dim: int) -> Callable[..., Any]:
    """A hook that masks what its module returns, call by call."""
    masks = list(masks)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        keep = masks.pop(0)
        if isinstance(output, tuple | list):
            return type(output)(
                _where_kept(o, keep, gain, dim) if isinstance(o, Tensor) else o for o in output
            )
        return _where_kept(output, keep, gain, dim) if isinstance(output, Tensor) else output

    return hook


_ADDITIONS = {
    "add",
    "iadd",
    "__add__",
    "__iadd__",
    "add_",
    "sub",
    "isub",
    "__sub__",
    "__isub__",
    "sub_",
}


class _Additions(TorchFunctionMode):
    """Masks what a model adds, addition by addition, while its own forwards run.

    An addition is known by the module in whose forward it stands, and by which of the additions of
    two tensors in that forward it is.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        # By the module: which of its additions, which operand, and the masks of its calls.
        self._asked: dict[nn.Module, dict[int, tuple[str, int, int, list[Tensor]]]]
        self._asked = defaultdict(dict)
        self._part_of: dict[nn.Module, nn.Module] = {}
        self._running: list[tuple[nn.Module, list[int]]] = []
        self._gain = 1.0
        self._handles: list[Any] = []

    def mask(self, branch: Any, masks: list[Tensor], gain: float, dim: int) -> bool:
        """Ask for the addition of ``branch`` to be masked; whether it is one that can be told."""
        split, block = branch.source.split, branch.source.graph
        if callee(split.add) not in _ADDITIONS:
            return False
        sums = [node for node in block.graph.nodes if summands(node) is not None]
        owner = self._model.get_submodule(branch.source.owner)
        for path in block.inlined:
            self._part_of[owner.get_submodule(path)] = owner
        operand = 0 if split.branch_first else 1
        self._asked[owner][sums.index(split.add)] = branch.name, operand, dim, list(masks)
        self._gain = gain
        return True

    def left(self) -> list[str]:
        """The branches that were not added as often as they were decided on."""
        return [name for each in self._asked.values() for name, *_, masks in each.values() if masks]

    def __enter__(self) -> _Additions:
        for module in self._model.modules():
            self._handles += [
                module.register_forward_pre_hook(self._begin, prepend=True),
                module.register_forward_hook(self._end, always_call=True),
            ]
        super().__enter__()
        return self

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:
        if module in self._part_of and self._running:  # its additions are those of the block
            self._running.append(self._running[-1])
        else:
            self._running.append((module, [0]))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        operands = [*args, *([kwargs["other"]] if "other" in kwargs else [])]
        two = len(operands) == 2 and all(isinstance(o, Tensor) for o in operands)
        if not self._running or getattr(func, "__name__", "") not in _ADDITIONS or not two:
            return func(*args, **kwargs)
        module, seen = self._running[-1]
        asked = self._asked.get(module, {}).get(seen[0])
        if operands[0] is not operands[1]:
            seen[0] += 1
            if asked is not None:
                _, place, dim, masks = asked
                assert masks, f"{asked[0]} is added more often than it was decided on"
                operands[place] = _where_kept(operands[place], masks.pop(0), self._gain, dim)
        kwargs.pop("other", None)
        return func(*operands, **kwargs)


def _mask_layer(masks: list[Tensor], gain: float, dim: int) -> Callable[..., Any]:
    """A hook that masks what its module adds to its first argument, call by call."""
    masks = list(masks)

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        first = output[0] if isinstance(output, tuple | list) else output
        first = x + _where_kept(first - x, masks.pop(0), gain, dim)
        return (first, *output[1:]) if isinstance(output, tuple | list) else first

    return hook


# ---------------------------------------------------------------------------------------------
# An independent count


_VIEW_NODES = re.compile(
    r"View|Permute|Transpose|Clone|Reshape|Squeeze|Unsqueeze|Alias|Expand|ToCopy|TBackward"
)
_LINEAR_NODES = re.compile(
    r"View|Permute|Transpose|Clone|Reshape|Squeeze|Alias|Expand|ToCopy|TBackward|Add|Sub|Mm|Bmm"
    r"|Addmm|Conv|Mul|Div|Norm|Pool|Pad|Split|Slice|Select|Cat|Stack|Unbind|AccumulateGrad|Embed"
    r"|Mean|Sum|Neg|Upsample|Roll|Index|Flip|Repeat|Copy|Unfold|Unsafe|MaxPool|Linear|Tril"
)


def identity_additions(model: nn.Module, inputs: Any) -> int:
    """How many outermost additions x + f(x), f with parameters and not linear, autograd recorded.

    Read off the graph of one evaluation pass, which knows nothing of modules or forwards.
    """
    model.eval()
    with same_randomness(), torch.enable_grad():
        outputs = tensors_of(call(model, _with_gradient(inputs)))
        roots = [t.grad_fn for t in outputs if t.grad_fn is not None]
    nodes = _topological(roots)
    index = {node: i for i, node in enumerate(nodes)}
    ancestors: list[int] = []
    for i, node in enumerate(nodes):
        bits = 1 << i
        for source, _ in node.next_functions:
            if source is not None:
                bits |= ancestors[index[source]]
        ancestors.append(bits)
    parameters = sum(1 << i for i, n in enumerate(nodes) if "AccumulateGrad" in n.name())
    curved = sum(1 << i for i, n in enumerate(nodes) if not _LINEAR_NODES.search(n.name()))
    found: list[tuple[int, int]] = []
    for i, node in enumerate(nodes):
        sources = [s for s, _ in node.next_functions if s is not None]
        if not node.name().startswith("AddBackward") or len(sources) != 2:
            continue
        a, b = (_through_views(s) for s in sources)
        for skip, branch in ((a, b), (b, a)):
            if skip is branch or not ancestors[index[branch]] >> index[skip] & 1:
                continue
            inside = ancestors[index[branch]] & ~ancestors[index[skip]]
            if inside & parameters and inside & curved:
                found.append((i, inside))
    return sum(not any(inside >> i & 1 for _, inside in found) for i, _ in found)


def _with_gradient(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.clone().requires_grad_() if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {key: _with_gradient(value) for key, value in inputs.items()}
    return type(inputs)(_with_gradient(value) for value in inputs)


def _topological(roots: list[Any]) -> list[Any]:
    """The nodes of an autograd graph, sources before what uses them."""
    done: dict[Any, None] = {}
    stack = [(root, False) for root in roots]
    while stack:
        node, ready = stack.pop()
        if node in done:
            continue
        if ready:
            done[node] = None
            continue
        stack.append((node, True))
        stack.extend((s, False) for s, _ in node.next_functions if s is not None and s not in done)
    return list(done)


def _through_views(node: Any) -> Any:
    while _VIEW_NODES.search(node.name()):
        sources = [s for s, _ in node.next_functions if s is not None]
        if len(sources) != 1:
            break
        node = sources[0]
    return node


# ---------------------------------------------------------------------------------------------
# Several at once


def checks(
    model: nn.Module, inputs: Any, *, large: bool = False
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every check but that of masked gradients, by name, to be called one after the other.

    Stochastic depth is attached when the first one is handed out, with ``inputs`` as example.

    Args:
        model: The model, without other randomness.
        inputs: What it is called with.
        large: Leave out what takes more memory than the model itself.
    """
    dense = record(model, inputs)
    state = model.state_dict()
    with attached(model, example_inputs=inputs):
        yield "attached", lambda: check_untouched(model, dense)
        yield "evaluation", lambda: check_evaluation(model, inputs, dense)
        yield "nothing dropped", lambda: check_nothing_dropped(model, inputs, dense) or None
        yield "FLOPs", lambda: "{:.3f} of {:.3f}".format(*check_work(model, inputs, dense))
        if not large:
            yield "all gradients", lambda: check_all_gradients(model, inputs)
            yield "copies", lambda: check_copies(model, inputs, dense)
        yield "checkpoints", lambda: model.load_state_dict(state) and None
    yield "removed", lambda: check_untouched(model, dense)


def check_surgery(model: nn.Module, x: Tensor, *, blocks: int, branches: int) -> None:
    """Run ``model`` through every identity; it comes back as it was."""
    without_randomness(model)
    dense = record(model, x)
    found = torchdrop.find_residuals(model)
    assert (len(found), sum(len(r.branches) for r in found)) == (blocks, branches)
    assert all(b.action == "skip" for r in found for b in r.branches)
    check_untouched(model, dense)
    state = model.state_dict()
    with attached(model) as plan:
        assert [r.module for r in plan.blocks] == [r.module for r in found]
        check_untouched(model, dense)
        check_evaluation(model, x, dense)
        check_nothing_dropped(model, x, dense)
        model.load_state_dict(state)
    check_untouched(model, dense)
    model.load_state_dict(state)


def check_training(model: nn.Module, x: Tensor) -> None:
    """A step with rows dropped: every parameter gets the gradient that a mask would leave it."""
    with attached(model):
        check_all_gradients(model, x)
