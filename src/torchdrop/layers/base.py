"""The base classes of the layers, and their call as a single node under torch.fx."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from torchdrop.schedules import check_rate

__all__ = ["LayerWithCheckedProperties", "LayerWithRate", "fx_node_of_call"]


class LayerWithCheckedProperties(nn.Module):
    """A module whose properties are set by their own setters, which check the value.

    nn.Module would register a Parameter or a submodule under the name of the property instead.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class LayerWithRate(LayerWithCheckedProperties):
    """A module with a drop probability ``p``, which can be set at any time and is checked then.

    The rate is a plain float. torch.compile makes it a symbol of the graph when it changes for the
    first time, and then compiles no more, as long as the forward compares it with 0 and 1 only.
    """

    _p: float

    @property
    def p(self) -> float:
        """The probability of dropping, in [0, 1]."""
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        rate = check_rate(value)
        if self.is_replaced:
            raise ValueError(
                "p of this layer cannot be set, because add_stochastic_depth has replaced the "
                "layer; set its rate with torchdrop.get_plan(model).set_p(...)"
            )
        self._p = rate

    @property
    def is_replaced(self) -> bool:
        """Whether ``add_stochastic_depth`` has replaced this layer, and drops in its place."""
        return getattr(self.__dict__.get("forward"), "replaces_layer", False)


def fx_node_of_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Return the call of ``module`` as one node while torch.fx traces a parent, else None.

    If torch.fx traced the forward of the layer instead, the graph would keep the training mode of
    the moment of tracing, and ``eval()`` would have no effect on it.
    """
    proxy = next((a for a in args if isinstance(a, fx.Proxy)), None)
    if proxy is None:
        return None
    tracer = proxy.tracer
    if not isinstance(tracer, fx.Tracer) or module is tracer.root:
        return None
    path = tracer.path_of_module(module)
    return tracer.create_proxy("call_module", path, args, kwargs)  # type: ignore[return-value]
