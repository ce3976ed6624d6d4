"""Hostile values for everything public, and the harness that says whether a call took them well.

A call took a value well if it is right, or if it raises a ValueError or TypeError of ours, with a
message, and left everything as it was: models, random numbers, hooks. An accident inside (`len()`
of something that has none) is a TypeError too, so what counts is that a `raise` of ours raised it.
The checks at the end are given a way to draw and draw their case; test_bad_input.py runs a
few hundred of them, benchmarks/soak/bad_input.py ten thousand.
"""

from __future__ import annotations

import contextlib
import copy
import decimal
import fractions
import io
import linecache
import math
import os
import tempfile
import traceback
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import torchdrop
from torchdrop import diagnostics, functional, schedules
from torchdrop.running.block_site import sites_of

PACKAGE = str(Path(torchdrop.__file__).parent)
Draw = Callable[[Any], Any]

MARKUP = "[bold]<script>alert(1)</script>\n\x1b[31m{{x}}{0}%s\u202e"


class FindingError(AssertionError):
    """A call that did not take a hostile value well."""


class RefusedError(Exception):
    """A call refused its arguments as it should."""


# --- the harness


def state_of(*models: Any) -> dict[str, Any]:
    """Everything that a failing call has to leave as it was."""
    state: dict[str, Any] = {
        "random numbers": torch.get_rng_state().numpy().tobytes(),
        "gradients": torch.is_grad_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "dtype": torch.get_default_dtype(),
    }
    for number, model in enumerate(models):
        if not isinstance(model, nn.Module):
            continue
        for name, module in model.named_modules(remove_duplicate=False):
            hooks = [len(v) for k, v in module.__dict__.items() if k.endswith("_hooks") and v]
            state[f"{number} {name}"] = (
                type(module),
                module.training,
                list(module.__dict__),
                hooks,
                id(module.__dict__.get("forward")),
                [repr(v) for v in module.__dict__.values() if isinstance(v, int | float | str)],
            )
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    state[f"{number} {name}.{key}"] = (
                        id(tensor),
                        tensor.requires_grad,
                        tensor.detach().numpy().tobytes(),
                        tensor.grad is None,
                    )
        state[f"{number} rates"] = [b.rate.p for site in sites_of(model) for b in site.branches]
    return state


def said_well(error: BaseException) -> bool:
    """Whether a `raise` of this package raised it, with a message."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    ours = last.filename.startswith(PACKAGE) and line.startswith("raise")
    return (ours or _no_such_argument(error, frames)) and len(str(error)) >= 20


def _no_such_argument(error: BaseException, frames: traceback.StackSummary) -> bool:
    # Python itself says it, at the call.
    return "unexpected keyword" in str(error) and frames[-1].filename == __file__


def attempt(call: Callable[[], Any], *models: Any, also: tuple[type[Exception], ...] = ()) -> Any:
    """The result of a call.

    Raises:
        RefusedError: It refused, and everything is as it was.
        FindingError: It did neither.
    """
    before = state_of(*models)
    try:
        return call()
    except Exception as error:
        failure = error
    if not isinstance(failure, (ValueError, TypeError, *also)) or not said_well(failure):
        raise FindingError(
            "".join(traceback.format_exception(failure)[-6:]) + "\nis no refusal of ours"
        ) from failure
    after = state_of(*models)
    if after != before:
        changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        raise FindingError(f"{failure!r} was raised after {changed} had been changed") from failure
    raise RefusedError from failure


def right(condition: object, what: str) -> None:
    """Note a result that is not right."""
    if not condition:
        raise FindingError(f"accepted, but {what}")


# --- the values


def _values(*makers: Any) -> st.SearchStrategy[Any]:
    """One of the makers' values, fresh each time."""
    return st.sampled_from(makers).map(lambda make: make())


ODD = _values(
    lambda: None,
    lambda: True,
    lambda: False,
    lambda: "",
    lambda: "0.5",
    lambda: "row",
    lambda: MARKUP,
    lambda: b"row",
    lambda: 0.5 + 0j,
    lambda: float("nan"),
    lambda: float("inf"),
    lambda: -float("inf"),
    lambda: -0.0,
    lambda: -0.1,
    lambda: -1,
    lambda: 0,
    lambda: 1,
    lambda: 2,
    lambda: 7,
    lambda: 0.5,
    lambda: math.nextafter(1.0, 2.0),
    lambda: 5e-324,
    lambda: fractions.Fraction(1, 3),
    lambda: decimal.Decimal("0.5"),
    lambda: np.float64(0.5),
    lambda: np.float32("nan"),
    lambda: np.int64(1),
    lambda: np.int64(3),
    lambda: np.bool_(True),
    lambda: np.array(0.5),
    lambda: np.array([0.1, 0.2, 0.3]),
    lambda: np.array([[0.1], [0.2]]),
    lambda: np.array(["a"]),
    lambda: torch.tensor(0.5),
    lambda: torch.tensor(float("nan")),
    lambda: torch.tensor([0.1, 0.2, 0.3]),
    lambda: torch.tensor([]),
    lambda: nn.Parameter(torch.tensor(0.5)),
    lambda: [],
    lambda: (),
    lambda: [0.1, 0.2],
    lambda: (0.1, 0.2, 0.3),
    lambda: [0.1, float("nan"), 0.3],
    lambda: [0.1, "0.2", None],
    lambda: [[0.1], [0.2], [0.3]],
    lambda: [torch.tensor(0.1)] * 3,
    lambda: (2, 2),
    lambda: (-1.0, 1.0),
    lambda: (1.0, -1.0),
    lambda: range(3),
    lambda: {},
    lambda: {"0": 0.5},
    lambda: {"0": float("nan")},
    lambda: {"nowhere": 0.1},
    lambda: {MARKUP: 0.1},
    lambda: {0: 0.5},
    lambda: {None: 0.5},
    lambda: {"version": 1},
    lambda: {"version": 1, "p": None},
    lambda: {"version": 1, "p": {"0": 2.0, "1": 0.1, "2": 0.1}},
    lambda: {"version": 1, "p": {0: 0.1}},
    lambda: {"version": 1, "p": {"0": 0.3, "1": 0.1, "2": None}},
    lambda: {0.1, 0.2, 0.3},
    lambda: (x for x in (0.1, 0.2, 0.3)),
    lambda: object(),
    lambda: float,
    lambda: lambda *a: 0.5,
    lambda: nn.Linear(2, 2),
    lambda: torch.float32,
    lambda: torch.Generator(),
    lambda: NotImplemented,
)
HUGE = _values(lambda: 10**30, lambda: 1e308, lambda: -(10**30), lambda: 2**63)
NUMBERS = st.one_of(st.floats(), st.floats(0, 1), st.floats(-0.5, 1.5), st.integers(-3, 20))
RATES = st.one_of(ODD, NUMBERS, HUGE, st.text(max_size=5))
COUNTS = st.one_of(ODD, st.integers(-3, 12), st.floats(-3, 12), st.text(max_size=3))

SHAPES = [(), (0,), (4,), (4, 3), (4, 6), (0, 6), (1, 6), (2, 3, 8), (0, 3, 8, 8), (1, 3, 8, 8)]
SHAPES += [(4, 3, 8, 8), (2, 3, 1, 1), (2, 0, 8, 8), (2, 3, 0, 8), (2, 3, 4, 8, 8), (1,) * 7]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ODD_DTYPES = [torch.int64, torch.bool, torch.complex64, torch.uint8]


@st.composite
def _tensors(draw: Any) -> Tensor:
    dtype = draw(st.sampled_from([*DTYPES, *DTYPES, *DTYPES, *ODD_DTYPES]))
    x = torch.ones(draw(st.sampled_from(SHAPES))).to(dtype)
    if x.is_floating_point() and draw(st.booleans()):
        x.requires_grad_()
    if x.dim() > 1 and draw(st.booleans()):
        x = x.transpose(0, -1)
    return x


TENSORS = _tensors()
INPUTS = st.one_of(TENSORS, TENSORS, TENSORS, ODD)


# --- the models


class Block(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(x).relu())


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn(self.conv(x)).relu()


class Given(nn.Module):
    """A block with a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + self.fc(x + condition).relu()


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Given(), Given()])

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        return x


class Masked(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.drop_path = torchdrop.DropPath(p)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.fc(x).relu())


def mlp() -> nn.Module:
    return nn.Sequential(Block(), Block(), Block())


def conv() -> nn.Module:
    return nn.Sequential(ConvBlock(), ConvBlock(), ConvBlock())


def masked() -> nn.Module:
    return nn.Sequential(Masked(0.1), Masked(0.2), Masked(0.3))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU())


MODELS: dict[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]] = {
    mlp: lambda n: (torch.ones(n, 6),),
    conv: lambda n: (torch.ones(n, 3, 4, 4),),
    masked: lambda n: (torch.ones(n, 6),),
    Conditioned: lambda n: (torch.ones(n, 6), torch.ones(n, 6)),
}

OPTIONS = {
    # An error inside a function of the user's is the user's.
    "schedule": st.one_of(ODD, st.sampled_from(list(schedules.DEPTH_RULES))).filter(
        lambda value: not callable(value)
    ),
    "mode": st.one_of(ODD, st.sampled_from(["row", "batch"])),
    "sampling": st.one_of(ODD, st.sampled_from(["exact", "independent", "window"])),
    "scale": st.one_of(ODD, st.sampled_from(["train", "eval"])),
    "select": st.one_of(ODD, st.just(lambda r: True)).filter(lambda value: value is not float),
    "compute": st.one_of(ODD, st.sampled_from(["auto", "skip", "mask"])),
    "sync_ranks": ODD,
    "zero_grad": ODD,
    "example_inputs": INPUTS,
    "batch_dim": st.one_of(ODD, st.just(0)),
    "no_such_option": ODD,
}


def _some(draw: Draw, options: dict[str, Any], most: int) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(options)), max_size=most, unique=True))
    return {name: draw(options[name]) for name in names}


def _legal(rates: list[float]) -> bool:
    return all(type(p) is float and 0.0 <= p <= 1.0 for p in rates)


def _step(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    out = model(*inputs)
    out.sum().backward()
    return out.detach()


# --- the checks


def check_add(draw: Draw) -> None:
    """Any rate, any options, any batch size, on a model that has residual branches or has none."""
    make = draw(st.sampled_from([*MODELS, plain]))
    model = make()
    p, options = draw(RATES), _some(draw, OPTIONS, 2)
    dense, before = copy.deepcopy(model), state_of(model)
    plan = attempt(lambda: torchdrop.add_stochastic_depth(model, p, **options), model)
    rates = [b.p for r in plan.blocks for b in r.branches]
    right(rates and _legal(rates), f"with the rates {rates}")
    inputs = MODELS[make](draw(st.sampled_from([0, 1, 2, 5])))
    if options.get("scale", "train") == "train":
        right(torch.equal(model.eval()(*inputs), dense.eval()(*inputs)), "evaluation differs")
    out = _step(model.train(), inputs)
    right(out.shape == inputs[0].shape and bool(out.isfinite().all()), "a step is wrong")
    torchdrop.remove_stochastic_depth(model)
    model.zero_grad()
    for key, value in dense.state_dict().items():
        model.state_dict()[key].copy_(value)  # BatchNorm counted
    after = state_of(model)
    del after["random numbers"], before["random numbers"]
    right(after == before, "remove did not restore the model")


def check_plan(draw: Draw) -> None:
    """Rates and states that a plan is given after it was made."""
    model = draw(st.sampled_from([mlp, masked]))()
    plan = torchdrop.add_stochastic_depth(model, [0.1, 0.2, 0.3])
    for _ in range(draw(st.integers(1, 3))):
        value = draw(RATES)
        what = draw(st.sampled_from(["set_p", "load_state_dict", "pickled state"]))
        if what == "pickled state":
            value, what = {**plan.state_dict(), "p": value}, "load_state_dict"
        with contextlib.suppress(RefusedError):
            attempt(lambda what=what, value=value: getattr(plan, what)(value), model)
        rates = [b.p for r in plan.blocks for b in r.branches]
        right(len(rates) == 3 and _legal(rates), f"with the rates {rates}")
    if draw(st.booleans()):
        torchdrop.remove_stochastic_depth(model)
        value = draw(RATES)
        for call in (lambda: plan.set_p(value), plan.observed):
            try:
                attempt(call, model)
            except RefusedError:
                continue
            raise FindingError("the plan of what was removed answers")


def check_batches(draw: Draw) -> None:
    """What a model with stochastic depth is called with: it takes what the dense model takes."""
    make = draw(st.sampled_from(list(MODELS)))
    model = make().train(draw(st.booleans()))
    dense = copy.deepcopy(model)
    mode = draw(st.sampled_from(["row", "batch"]))
    torchdrop.add_stochastic_depth(
        model, draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])), schedule="uniform", mode=mode
    )
    inputs = MODELS[make](draw(st.sampled_from([0, 2, 3])))
    if make is Conditioned and draw(st.booleans()):
        inputs = (inputs[0], torch.ones(draw(st.sampled_from([(1, 6), (6,), (3, 6), (0, 6), ()]))))
    elif draw(st.booleans()):
        inputs = (draw(INPUTS), *inputs[1:])
    try:
        expected = dense(*inputs)
    except Exception:
        expected = None
    if expected is not None and expected.shape != getattr(inputs[0], "shape", None):
        # A branch that makes more rows of its skip: what it would be is not known when dropped.
        return
    before = state_of(model)
    try:
        out = model(*inputs)
    except Exception as error:
        # An error of the user's own model is the user's; one of ours has to say what to do.
        right(expected is None or said_well(error), f"only the dense model takes it: {error!r}")
        after = state_of(model)
        for state in (before, after):  # a forward draws, and BatchNorm counts
            for key in [k for k in state if k == "random numbers" or "bn." in k]:
                del state[key]
        right(after == before, "a forward that failed changed the model")
        return
    if expected is not None:
        right(out.shape == expected.shape and out.dtype == expected.dtype, "the output differs")


_SIZED = {"block_size": COUNTS, "size": COUNTS, "holes": COUNTS}
_PARAMETERS: dict[str, Any] = {
    "p": RATES,
    "beta": RATES,
    "mode": st.one_of(ODD, st.sampled_from(["row", "batch"])),
    "batch_dim": COUNTS,
    "channel_dim": COUNTS,
    "inplace": ODD,
    "rate": st.one_of(ODD, st.sampled_from(["exact", "paper"])),
    "per_channel": ODD,
    "scale": st.one_of(ODD, st.sampled_from(["expectation", "count", "train", "eval"])),
    "alpha": RATES,
    "columns": COUNTS,
    "column": INPUTS,
    "place": st.one_of(ODD, st.sampled_from(["clipped", "inside"])),
    "fill": st.one_of(ODD, st.sampled_from(["mean", "noise"])),
    "boxes": INPUTS,
    "generator": ODD,
    "training": st.booleans(),
    "projection": ODD,
    "sync_ranks": ODD,
    "zero_grad": ODD,
    "module": ODD,
    "samples": COUNTS,
    "height": COUNTS,
    "width": COUNTS,
    "paths": st.one_of(ODD, st.sampled_from(["mixed", "local", "global"])),
    "no_such_option": ODD,
    **_SIZED,
}

# Legal values of the arguments that a layer or a function cannot do without.
EXAMPLES: dict[str, Any] = {
    "p": 0.3,
    "beta": 0.3,
    "block_size": 3,
    "size": 2,
    "module": nn.Identity(),
    "samples": 3,
    "height": 8,
    "width": 8,
    "columns": 3,
    "shape": (8, 8),
}
# Inputs, which the checks draw themselves, and what changes the kind of result.
_NOT_DRAWN = {"x", "skip", "branch", "branches", "device", "return_boxes"}


def _arguments(call: Callable[..., Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Legal values of what `call` needs, and the names of its other arguments."""
    parameters = [p for p in signature(call).parameters.values() if p.name not in _NOT_DRAWN]
    needed = {p.name for p in parameters if p.default is p.empty} | {"block_size"}
    given = {p.name: EXAMPLES.get(p.name, 0.3) for p in parameters if p.name in needed}
    return given, tuple(p.name for p in parameters if p.name not in needed)


LAYERS = {name: _arguments(getattr(torchdrop.layers, name)) for name in torchdrop.layers.__all__}


def _evaluation_is_identity(name: str) -> bool:
    """Whether the layer, made of legal values, gives what it gets in evaluation."""
    layer = getattr(torchdrop.layers, name)(**LAYERS[name][0]).eval()
    for shape in ((4, 3), (2, 3, 8), (4, 3, 8, 8), (2, 3, 4, 8, 8)):
        with contextlib.suppress(ValueError):
            x = torch.ones(shape)
            return torch.equal(layer(x), x)
    return False


def check_layers(draw: Draw) -> None:
    """Every layer, made of anything and called with anything."""
    name = draw(st.sampled_from(sorted(LAYERS)))
    given, others = LAYERS[name]
    pool = {key: _PARAMETERS.get(key, ODD) for key in (*given, *others, "no_such_option")}
    arguments = {**given, **_some(draw, pool, 2)}
    kind = getattr(torchdrop.layers, name)
    layer = attempt(lambda: kind(**arguments), arguments.get("module"))
    repr(layer)
    inputs = [draw(INPUTS) for _ in range(2 if name == "PathDrop" and draw(st.booleans()) else 1)]
    training = draw(st.booleans())
    layer.train(training)
    # A module that the user gave fails in its own way.
    if name == "StochasticDepth" and not isinstance(arguments["module"], nn.Identity):
        return
    out = attempt(lambda: layer(*inputs), layer)
    if name == "Cutout" and isinstance(inputs[0], list):  # a sample, which holds an image
        right(type(out) is list and len(out) == len(inputs[0]), f"it gave a {type(out).__name__}")
    else:
        x = inputs[0]
        if len(inputs) == 2 and all(isinstance(y, Tensor) for y in inputs):
            x = x.to(torch.promote_types(x.dtype, inputs[1].dtype))  # they are added
        # PathDrop takes a mean, and any module may stand in StochasticDepth.
        changes = name in ("PathDrop", "StochasticDepth") or not _evaluation_is_identity(name)
        _check_output(out, x, training or changes)
    if hasattr(layer, "p"):
        was, value = layer.p, draw(RATES)
        try:
            attempt(lambda: setattr(layer, "p", value), layer)
        except RefusedError:
            right(layer.p == was, "a rate that was refused was set")
        right(_legal([layer.p]), f"with the rate {layer.p!r}")


def _check_output(out: Any, x: Any, training: bool) -> None:
    right(isinstance(x, Tensor), f"the input was a {type(x).__name__}")
    right(isinstance(out, Tensor), f"it gave a {type(out).__name__}")
    right(out.shape == x.shape and out.dtype == x.dtype, f"{x.shape, x.dtype} became {out.shape}")
    right(bool(out.isfinite().all()), "it is not finite")
    right(training or torch.equal(out, x), "evaluation is not the identity")


FUNCTIONS = {name: _arguments(getattr(functional, name)) for name in functional.__all__}


def check_functions(draw: Draw) -> None:
    """Every function of torchdrop.functional."""
    name = draw(st.sampled_from(sorted(FUNCTIONS)))
    given, others = FUNCTIONS[name]
    pool = {key: _PARAMETERS.get(key, COUNTS) for key in (*given, *others, "no_such_option")}
    arguments = {**given, **_some(draw, pool, 2)}
    call = getattr(functional, name)
    if name == "drop_block_gamma":
        gamma = attempt(lambda: call(**arguments))
        right(0.0 <= gamma <= 1.0, f"gamma is {gamma}")
        return
    if next(iter(signature(call).parameters)) not in _NOT_DRAWN:  # it makes a tensor of numbers
        right(isinstance(attempt(lambda: call(**arguments)), Tensor), "no tensor")
        return
    x: Any = draw(INPUTS)
    if name == "path_drop":
        inputs: tuple[Any, ...] = ([x, draw(INPUTS)] if draw(st.booleans()) else x,)
    else:
        inputs = (x, draw(INPUTS)) if name == "drop_path_add" else (x,)
    # In place on a leaf that needs a gradient is refused by autograd, in its words.
    if arguments.get("inplace") is True and isinstance(x, Tensor) and x.requires_grad:
        return
    out = attempt(lambda: call(*inputs, **arguments))
    if name not in ("path_drop", "drop_path_add"):
        _check_output(out, x, True)


OVER_TIME: dict[str, tuple[str, ...]] = {
    "constant": ("rate",),
    "ramp": ("rate", "rate"),
    "cosine": ("rate", "rate"),
    "steps": ("points",),
    "early": ("rate", "rate", "decay"),
    "late": ("rate", "rate"),
    "progressive": ("rate", "speed"),
    "scheduled_drop_path": ("rate",),
    "curriculum": ("rate", "speed"),
}
"""The rules over time, and what their arguments are."""


def check_over_time(draw: Draw) -> None:
    """The rules over time, and what applies them."""
    legal = {
        "rate": st.floats(0, 1),
        "speed": st.floats(0, 100),
        "decay": st.sampled_from(["linear", "constant"]),
        "points": st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=3),
    }
    name = draw(st.sampled_from(list(OVER_TIME)))
    # Mostly all but one are legal: else hardly a case is taken.
    odd = draw(st.integers(0, 2 * len(OVER_TIME[name])))
    given = [draw(RATES if i == odd else legal[kind]) for i, kind in enumerate(OVER_TIME[name])]
    rule = attempt(lambda: getattr(schedules.over_time, name)(*given))
    progress = draw(st.one_of(RATES, st.floats(0, 1), st.floats(0, 1)))
    rate = attempt(lambda: rule(progress))
    right(_legal([rate]), f"it gave {rate}")
    model = draw(st.one_of(ODD, st.sampled_from([plain, masked]).map(lambda make: make())))
    attempt(lambda: torchdrop.apply_schedule(model, rule, progress))
    right(all(m.p == rate for m in model.modules() if hasattr(m, "p")), "a layer has another rate")


def check_stages(draw: Draw) -> None:
    """The rule that has one rate a stage."""
    blocks = draw(st.one_of(ODD, st.lists(st.integers(-1, 4), max_size=4)))
    rule = attempt(lambda: schedules.per_stage(blocks))
    p, depth = draw(st.floats(0, 1)), draw(st.one_of(st.just(sum(blocks)), st.integers(0, 6)))
    found = attempt(lambda: rule(p, depth))
    right(len(found) == depth and _legal(found), f"it gave {found}")


def check_schedules(draw: Draw) -> None:
    """The rules over depth."""
    name = draw(st.sampled_from([*schedules.DEPTH_RULES, "over_depth"]))
    # Mostly one of the two is hostile: with both, hardly a case is taken.
    p = draw(st.one_of(RATES, st.floats(0, 1), st.floats(0, 1)))
    depth = draw(st.one_of(COUNTS, st.integers(0, 12), st.integers(0, 12)))
    more: tuple[Any, ...] = ()
    if name == "over_depth" and draw(st.booleans()):
        more = (draw(ODD.filter(lambda value: not callable(value))),)
    rule: Callable[..., Any] = schedules.DEPTH_RULES.get(name, schedules.over_depth)
    found = attempt(lambda: rule(p, depth, *more))
    right(len(found) == depth and _legal(found), f"it gave {found}")


def check_models(draw: Draw) -> None:
    """What is no model, or a model without residual branches, where a model is expected."""
    model = draw(st.one_of(ODD, st.sampled_from([plain, mlp, masked]).map(lambda make: make())))
    name = draw(
        st.sampled_from(
            [
                "find_residuals",
                "get_plan",
                "has_stochastic_depth",
                "remove_stochastic_depth",
                "add_stochastic_depth",
                "paused",
            ]
        )
    )
    if name == "paused":

        def call() -> Any:
            with torchdrop.paused(model):
                pass
    else:

        def call() -> Any:
            return getattr(torchdrop, name)(model)

    attempt(call, model)
    right(isinstance(model, nn.Module), f"{name} took {model!r} for a model")


def check_diagnostics(draw: Draw) -> None:
    """Any batches, any model, any number of repeats."""
    model: Any = draw(st.sampled_from([conv, mlp, plain]))()
    if draw(st.integers(0, 3)) == 0:
        model = draw(ODD)
    fitting = MODELS.get(conv if isinstance(model, nn.Module) else mlp)
    assert fitting is not None
    batches = draw(
        st.one_of(
            ODD,
            st.lists(INPUTS, max_size=2),
            st.integers(0, 3).map(lambda n: [fitting(n)]),
            st.integers(0, 3).map(lambda n: [(fitting(n)[0], torch.zeros(n))]),
        )
    )
    name = draw(st.sampled_from(["variance_shift", "recalibrate_batch_norm", "check_order"]))
    arguments: dict[str, Any] = {}
    if name == "check_order":
        batches = draw(INPUTS)
    elif name == "variance_shift":
        arguments = _some(draw, {"repeats": COUNTS, "channel_dim": COUNTS}, 2)
    before = state_of(model)
    del before["random numbers"]
    generator = isinstance(batches, type(x for x in ()))
    try:
        attempt(lambda: getattr(diagnostics, name)(model, batches, **arguments), model)
    except FindingError as finding:
        # The user's own model may fail on a batch in its own way, and has to be as it was then.
        after = state_of(model)
        del after["random numbers"]
        if generator or after != before or not _fails_itself(model, batches):
            raise finding from None


def _fails_itself(model: Any, batches: Any) -> bool:
    if not isinstance(model, nn.Module):
        return False
    with contextlib.suppress(TypeError):
        for batch in batches if not isinstance(batches, Tensor) else [batches]:
            given = batch[0] if isinstance(batch, tuple | list) and batch else batch
            for mode in (True, False):
                try:
                    copy.deepcopy(model).train(mode)(given)
                except Exception:
                    return True
    return False


CHOICES: dict[str, Any] = {
    "--methods": ["none", "shake", "all", "none,none", ",", "path_drop", MARKUP, "cutout"],
    "--model": ["resnet-8", "resnet-0", "resnet--8", "resnet-１４", "os:getcwd", ":", "a:", ":b"],
    "--data": [
        "digits",
        "folder:",
        "folder:a\x00b",
        "folder:.",
        "torchvision:",
        "torchvision:MNIST",
        "mnist5k:",
    ],
    "--preset": ["paper-cifar10", "paper", ""],
    "--p": ["0.3", "nan", "inf", "-1", "dropout=", "=0.3", "none=0.5", "dropout=0.2", "=", "1e400"],
    "--augment": ["none", "mixup", "flip-shift"],
    "--accelerator": ["cpu", "warp", "tpu"],
    "--precision": ["32-true", "3", "16-true"],
    "--out": ["", ".", "/dev/null", "/proc/x", "a\x00b", "x" * 300, MARKUP],
    "--data-dir": ["", "/dev/null", "a\x00b"],
}
for _name in (
    *("--seeds", "--train-size", "--val-size", "--test-size", "--image-size", "--epochs"),
    *("--batch-size", "--lr", "--cost-steps", "--threads", "--devices"),
):
    CHOICES[_name] = ["0", "-1", "1", "2", "nan", "inf", "1e9", "", "many", "１", "0x10", "1.5"]


def check_command(draw: Draw) -> None:
    """Any arguments of the command line, up to the point where training would begin."""
    from torchdrop.app import cli, compare

    small = {"--model": "resnet-8", "--methods": "none", "--train-size": "20", "--threads": "1"}
    names = draw(st.lists(st.sampled_from(sorted(CHOICES)), min_size=1, max_size=3, unique=True))
    chosen = {
        name: draw(st.one_of(st.sampled_from(CHOICES[name]), st.text(max_size=4))) for name in names
    }
    words = [f"{name}={value}" for name, value in {**small, **chosen}.items()]
    if draw(st.integers(0, 5)) == 0:
        words.append(draw(st.sampled_from(["--resume", "--nothing", "more", "--", "-1", "--help"])))

    def begun(self: Any) -> None:
        chosen = self.settings
        self.source = compare.open_source(
            self.setup.data, test_size=chosen.test_size, image_size=chosen.image_size
        )
        for name in self.setup.methods:
            self._build(name, 0)
        next(iter(self._data(0).train.pixels))
        self.results.save()

    errors, here = io.StringIO(), os.getcwd()
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with (
                mock.patch.object(compare._Comparison, "run", begun),
                contextlib.redirect_stderr(errors),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                code = cli.main(["compare", *words])
        except Exception as error:
            raise FindingError(f"{words} ends in a traceback: {error!r}") from error
        finally:
            os.chdir(here)
    right(torch.get_num_threads() == threads, "the number of threads stays changed")
    right(code in (0, 2), f"{words} ends with {code}")
    if code == 2:
        right(
            errors.getvalue().startswith("torchdrop: error: ")
            and errors.getvalue().count("\n") == 1
            and len(errors.getvalue()) > 40,
            f"{words} says {errors.getvalue()!r}",
        )


BENCH_CHOICES: dict[str, Any] = {
    "--p": ["0.3", "nan", "inf", "-1", "-0.0", "", "=", "1e400", "half"],
    "--schedule": ["linear", "uniform", "cubic", "", MARKUP],
    "--mode": ["row", "batch", "rows", ""],
    "--device": ["cpu", "cpu:1", "cuda:99", "meta", "gpu", "", MARKUP],
    "--out": CHOICES["--out"],
    **dict.fromkeys(("--batch", "--size", "--steps", "--threads"), CHOICES["--seeds"]),
}
BENCH_MODELS = [
    "resnet-8",
    "resnet-0",
    "fractalnet",
    "os:getcwd",
    ":",
    "a:",
    "torchvision:",
    MARKUP,
]


def check_bench(draw: Draw) -> None:
    """Any arguments of ``torchdrop bench``, up to the point where steps would be timed."""
    from torchdrop.app import bench, cli

    names = draw(st.lists(st.sampled_from(sorted(BENCH_CHOICES)), max_size=3, unique=True))
    chosen = {
        name: draw(st.one_of(st.sampled_from(BENCH_CHOICES[name]), st.text(max_size=4)))
        for name in names
    }
    small = {"--size": "8", "--batch": "2", "--threads": "1", "--device": "cpu"}
    words = [f"{name}={value}" for name, value in {**small, **chosen}.items()]
    words.insert(0, draw(st.sampled_from(["resnet-8", *BENCH_MODELS])))

    def measured(settings: Any, subjects: Any, *rest: Any) -> Any:
        for subject in subjects.values():
            right(subject.images.shape[0] == settings.batch, "the batch is of another size")
            right(all(0.0 <= r.p <= 1.0 for r in torchdrop.get_plan(subject.model).blocks), "rate")
        raise bench.UserError("it is measured here, which takes too long")

    # Sizes that a machine may not hold are a matter of the machine.
    words = [word.replace("1e9", "9") for word in words]
    errors, here, threads = io.StringIO(), os.getcwd(), torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            with (
                mock.patch.object(bench, "_measure", measured),
                contextlib.redirect_stderr(errors),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                code = cli.main(["bench", *words])
        except Exception as error:
            raise FindingError(f"{words} ends in a traceback: {error!r}") from error
        finally:
            os.chdir(here)
    right(torch.get_num_threads() == threads, "the number of threads stays changed")
    said = errors.getvalue().splitlines()[-1]
    right(
        code == 2 and said.startswith("torchdrop: error: ") and len(said) > 40, f"{words}: {said}"
    )


CHECKS: dict[str, tuple[Callable[[Draw], None], float]] = {
    "add": (check_add, 0.12),
    "plan": (check_plan, 0.06),
    "batches": (check_batches, 0.06),
    "layers": (check_layers, 0.3),
    "functions": (check_functions, 0.3),
    "schedules": (check_schedules, 0.05),
    "over_time": (check_over_time, 0.05),
    "stages": (check_stages, 0.05),
    "models": (check_models, 0.05),
    "diagnostics": (check_diagnostics, 0.05),
    "command": (check_command, 0.01),
    "bench": (check_bench, 0.01),
}
"""Each check, and its share of all cases: the slower, the smaller."""
