import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchdrop import schedules

rates = st.floats(0, 1)
depths = st.integers(1, 60)


@given(rates)
def test_a_legal_rate_comes_back_as_the_same_float(p):
    assert schedules.check_rate(p) == p
    assert type(schedules.check_rate(p)) is float


@pytest.mark.parametrize("p", [0, 1, np.float32(0.5), np.float64(0.5), np.int64(1)])
def test_integers_and_numpy_scalars_are_rates(p):
    assert schedules.check_rate(p) == float(p)
    assert type(schedules.check_rate(p)) is float


@pytest.mark.parametrize("p", [-1e-9, 1.0000001, 1.5, -1, 2, math.inf, -math.inf, math.nan])
def test_a_rate_outside_0_1_is_refused(p):
    with pytest.raises(ValueError, match=r"probability rate has to be between 0 and 1, but got"):
        schedules.check_rate(p, "rate")


@pytest.mark.parametrize("p", [True, False, "0.1", None, [0.1], 1j, torch.tensor(0.1)])
def test_what_is_no_real_number_is_refused(p):
    with pytest.raises(TypeError, match=r"rate has to be a real number between 0 and 1, but got"):
        schedules.check_rate(p, "rate")


# Every rule of the registry

RULES = pytest.mark.parametrize("rule", schedules.DEPTH_RULES)

# Rules whose rates may be lower in a deeper block.
MAY_FALL: set[str] = set()


def breaks_a_law(rule, p, depth, may_fall=False):
    """Which law of a rule over depth does not hold, or None."""
    got = rule(p, depth)
    if len(got) != depth:
        return "one rate for each block"
    if not all(type(a) is float and 0 <= a <= p for a in got):
        return "floats from 0 to p"
    if not may_fall and got != sorted(got):
        return "never falls with depth"
    if rule(0, depth) != [0.0] * depth:
        return "p=0 drops nothing"
    return None


@RULES
@given(p=rates, depth=depths)
def test_a_rule_holds_the_laws(rule, p, depth):
    function = schedules.DEPTH_RULES[rule]
    assert breaks_a_law(function, p, depth, rule in MAY_FALL) is None
    assert schedules.over_depth(p, depth, rule) == function(p, depth)


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (lambda p, depth: [p] * (depth + 1), "one rate for each block"),
        (lambda p, depth: [p * block for block in range(1, depth + 1)], "floats from 0 to p"),
        (
            lambda p, depth: [p / block for block in range(1, depth + 1)],
            "never falls with depth",
        ),
        (lambda p, depth: [max(p, 0.1)] * depth, "p=0 drops nothing"),
    ],
)
def test_a_rule_can_break_each_law(broken, law):
    assert breaks_a_law(broken, 0.5, 3) == law


@RULES
def test_no_blocks_have_no_rates(rule):
    assert schedules.over_depth(0.1, 0, rule) == []


@RULES
def test_bad_arguments_of_a_rule_are_named(rule):
    function = schedules.DEPTH_RULES[rule]
    with pytest.raises(ValueError, match=r"depth has to be 0 or more, but got -1"):
        function(0.1, -1)
    for depth in (True, 3.0, "3"):
        with pytest.raises(TypeError, match=r"depth has to be a number of blocks, but got"):
            function(0.1, depth)
    for p in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"between 0 and 1, but got"):
            function(p, 3)
    with pytest.raises(TypeError, match=r"has to be a real number between 0 and 1, but got '0\.1'"):
        function("0.1", 3)


def test_a_rule_that_does_not_exist_is_named_with_those_that_do():
    listed = ", ".join(repr(rule) for rule in schedules.DEPTH_RULES)
    for rule in ("cos", 1, ["linear"]):
        with pytest.raises(ValueError, match=rf"schedule has to be one of {listed}, or a function"):
            schedules.over_depth(0.1, 3, rule)


# The rules one by one


@given(rates, depths)
def test_the_deepest_block_gets_p(p, depth):
    assert schedules.linear(p, depth)[-1] == p
    assert schedules.uniform(p, depth)[-1] == p
    assert schedules.linear_from_zero(p, depth)[-1] == (p if depth > 1 else 0.0)


def test_the_rules_differ_as_their_names_say():
    """Three rules are called linear in the wild; these are the means of two at p=.1, L=12."""
    paper = schedules.over_depth(0.1, 12, "linear")
    timm = schedules.over_depth(0.1, 12, "linear_from_zero")
    assert sum(paper) / 12 == pytest.approx(0.0542, abs=5e-5)
    assert sum(timm) / 12 == pytest.approx(0.05)
    assert paper[0] == pytest.approx(0.1 / 12)
    assert timm[0] == 0.0
    assert schedules.over_depth(0.5, 54) == schedules.linear(0.5, 54)


def test_timm_gives_the_same_rates():
    layers = pytest.importorskip("timm.layers")
    if not hasattr(layers, "calculate_drop_path_rates"):
        pytest.skip("this timm has no calculate_drop_path_rates")
    assert schedules.linear_from_zero(0.1, 12) == pytest.approx(
        layers.calculate_drop_path_rates(0.1, 12)
    )


def test_exponential_doubles_over_depth_as_in_layerskip():
    """D(l) = exp(l ln 2 / (L - 1)) - 1 for l from 0, by hand for L = 5."""
    expected = [0.0, 0.18920712, 0.41421356, 0.68179283, 1.0]
    assert schedules.exponential(1.0, 5) == pytest.approx(expected, abs=1e-8)
    assert schedules.exponential(0.2, 5) == pytest.approx([0.2 * d for d in expected], abs=1e-8)
    assert schedules.exponential(0.2, 1) == [0.0]
    rates = schedules.exponential(0.3, 9)
    assert rates[-1] == 0.3
    ratios = [(1 + b / 0.3) / (1 + a / 0.3) for a, b in itertools.pairwise(rates)]
    assert ratios == pytest.approx([2 ** (1 / 8)] * 8)


def test_per_stage_is_constant_within_a_stage():
    rule = schedules.per_stage([2, 1, 3])
    assert rule(0.3, 6) == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.3, 0.3])
    assert schedules.per_stage((1, 2), "linear_from_zero")(0.3, 3) == [0.0, 0.3, 0.3]
    assert schedules.per_stage((1, 2), lambda p, depth: [0.2, 0.1])(0.3, 3) == [0.2, 0.1, 0.1]
    assert pickle.loads(pickle.dumps(rule)) == rule
    with pytest.raises(ValueError, match=r"per_stage\(\[2, 1, 3\]\) have 6 blocks, but the model"):
        rule(0.3, 5)
    for blocks in ("33", 3, [1.5], [True]):
        with pytest.raises(TypeError, match="blocks"):
            schedules.per_stage(blocks)
    with pytest.raises(ValueError, match="at least one block"):
        schedules.per_stage([2, 0])
    with pytest.raises(ValueError, match="has to be one of"):
        schedules.per_stage([2], "cos")


@given(rates, depths)
def test_a_function_is_a_rule(p, depth):
    assert schedules.over_depth(p, depth, lambda p, depth: [p] * depth) == [p] * depth
    assert schedules.over_depth(p, depth, schedules.linear) == schedules.linear(p, depth)


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (lambda p, depth: [p] * (depth + 1), ValueError, "each of the 3 blocks, but returned 4"),
        (lambda p, depth: [2.0] * depth, ValueError, r"schedule\(0\.5, 3\)\[0\] has to be between"),
        (lambda p, depth: ["a"] * depth, TypeError, "each of the 3 blocks, but returned"),
        (lambda p, depth: p, TypeError, "each of the 3 blocks, but returned 0.5"),
        (lambda p, depth: None, TypeError, "each of the 3 blocks, but returned None"),
    ],
)
def test_what_a_function_returns_is_checked(rule, error, message):
    with pytest.raises(error, match=message):
        schedules.over_depth(0.5, 3, rule)
