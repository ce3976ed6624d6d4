"""Networks with a method applied, and what their modules are given and give."""

from __future__ import annotations

import torchvision

from torchdrop.app.methods import METHODS
from torchdrop.app.models import CifarResNet, FractalNet


def net_for(name):
    """A small network that has a place for the method."""
    return FractalNet(10, 1) if name == "path_drop" else CifarResNet(8, 10, 1)


def applied_to(name, p, model=None):
    """A network with the method applied, and the method at work."""
    model = net_for(name) if model is None else model
    return model, METHODS[name].build(model, p)


def watch(module, hook):
    """The inputs ("in") or the outputs ("out") of a module from now on, as a list that grows."""
    seen = []
    if hook == "in":
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    else:
        module.register_forward_hook(lambda _, inputs, output: seen.append(output.detach()))
    return seen


def small_vit():
    return torchvision.models.VisionTransformer(32, 16, 4, 4, 48, 96, num_classes=10)
