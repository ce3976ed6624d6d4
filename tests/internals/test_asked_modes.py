"""The functions of PyTorch that ask for a mode or set one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from probes import Probe, Probes, check
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from torchdrop import internals
from torchdrop.internals import asked_modes

probe = Probes()


@probe(
    "mode_of_builtin",
    api="the functions of torch._C that ask for a mode or set one",
    purpose="read a block again where its forward asks for another mode",
)
def _() -> None:
    for kind, names in asked_modes._FUNCTIONS.items():
        for name in names:
            found = getattr(torch._C, name, None) or getattr(torch, name)
            if type(found) is type(torch.is_grad_enabled):  # the others are old names, in Python
                assert internals.mode_of_builtin(found) == kind, name
    assert internals.mode_of_builtin(torch.is_grad_enabled) == "grad"
    assert internals.mode_of_builtin(torch.is_autocast_enabled) == "autocast"
    assert internals.mode_of_builtin(torch.is_tensor) is None
    assert internals.mode_of_builtin(torch.relu) is None


@probe(
    "mode_of_code",
    api="torch.inference_mode.__enter__ or torch.get_default_device",
    purpose="read a block again where its forward asks for another mode",
)
def _() -> None:
    assert internals.mode_of_code(torch.inference_mode.__enter__.__code__) == "grad"
    assert internals.mode_of_code(torch.get_default_device.__code__) == "device"
    assert internals.mode_of_code(torch.no_grad.__enter__.__code__) is None


@probe(
    "function_modes",
    "default_device",
    api="torch.overrides._get_current_function_mode_stack or torch.utils._device.DeviceContext",
    purpose="run generated code under the modes of the forward",
)
def _() -> None:
    class Mine(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
            return func(*args, **(kw or {}))

    assert internals.function_modes() == []
    assert internals.default_device() is None
    with torch.device("meta"), Mine() as mine, torch.device("cpu"):
        assert internals.function_modes() == [mine]
        assert internals.default_device() == "cpu"
    assert internals.default_device() is None


@probe(
    "sdpa_backends",
    api="torch._C._get_flash_sdp_enabled and its relatives",
    purpose="run attention with the kernels that the forward asks for",
)
def _() -> None:
    before = internals.sdpa_backends()
    assert {"MATH", "FLASH_ATTENTION"} <= set(before[0])
    with sdpa_kernel([SDPBackend.MATH]):
        assert internals.sdpa_backends()[0] == ("MATH",)
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
        names, order = internals.sdpa_backends()
        assert set(names) == {"MATH", "FLASH_ATTENTION"}
        assert order[0] == int(SDPBackend.MATH)  # type: ignore[call-overload]
    assert internals.sdpa_backends()[0] == before[0]


@pytest.mark.parametrize("found", probe, ids=lambda found: found.names[0])
def test_a_private_api_behaves_as_torchdrop_needs_it(found: Probe) -> None:
    check(found)


def test_every_name_has_a_probe() -> None:
    assert probe.names() == sorted(asked_modes.__all__)
