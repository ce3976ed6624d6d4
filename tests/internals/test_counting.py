"""FLOPs are counted for the total alone, and attention on the CPU too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from probes import Probe, Probes, Seen, check
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from torchdrop import internals
from torchdrop.internals import counting

probe = Probes()


@probe(
    "count_flops_without_modules",
    api="FlopCounterMode.mod_tracker",
    purpose="count FLOPs without hooks on every module",
)
def _() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    for alone in (True, False):
        mode = FlopCounterMode(display=False)
        if alone:
            internals.count_flops_without_modules(mode)
        with mode:
            model(torch.ones(4, 3)).sum().backward()
        assert mode.get_total_flops() == 2 * (2 * 4 * 3 * 5)
        assert (set(mode.get_flop_counts()) == {"Global"}) == alone


@probe(
    "cpu_attention_operations",
    api="torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    purpose="count the FLOPs of attention on the CPU",
)
def _() -> None:
    x = torch.randn(2, 2, 4, 4, requires_grad=True)
    with Seen() as seen:
        F.scaled_dot_product_attention(x, x, x).sum().backward()
    operations = internals.cpu_attention_operations()
    assert operations is not None
    ran = [func.overloadpacket for func in seen.operations]
    assert all(operation in ran for operation in operations)


@pytest.mark.parametrize("found", probe, ids=lambda found: found.names[0])
def test_a_private_api_behaves_as_torchdrop_needs_it(found: Probe) -> None:
    check(found)


def test_every_name_has_a_probe() -> None:
    assert probe.names() == sorted(counting.__all__)
