"""What all layers with a rate have in common: checked when it is set, one node for torch.fx."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from torchdrop.schedules import check_rate

__all__ = ["LayerWithCheckedProperties", "LayerWithRate", "fx_node_of_call"]


class LayerWithCheckedProperties(nn.Module):
    """A module whose properties check what they are set to, whatever that is."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)  # nn.Module would register a Parameter
        else:
            super().__setattr__(name, value)


class LayerWithRate(LayerWithCheckedProperties):
    """A module with a drop probability that may be changed at any time and is checked when it is.

    The rate is a plain float. Under torch.compile it turns into a symbol the second time it
    changes, provided that nothing in the graph asks for its value beyond p = 0 and p = 1.
    """

    _p: float

    @property
    def p(self) -> float:
        """The probability of dropping, in [0, 1]."""
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        rate = check_rate(value)
        if getattr(self.__dict__.get("forward"), "takes_over", False):
            raise ValueError(
                "stochastic depth has taken this layer over and does not follow its p any more; "
                "use torchdrop.get_plan(model).set_p(...)"
            )
        self._p = rate


def fx_node_of_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """While torch.fx traces a parent of ``module``: the call of it as one node.

    Traced through, the drop of the moment would be baked in and would stay after ``eval()``.
    """
    proxy = next((a for a in args if isinstance(a, fx.Proxy)), None)
    if proxy is None:
        return None
    tracer = proxy.tracer
    if not isinstance(tracer, fx.Tracer) or module is tracer.root:
        return None
    path = tracer.path_of_module(module)
    return tracer.create_proxy("call_module", path, args, kwargs)  # type: ignore[return-value]
