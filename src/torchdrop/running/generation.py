"""Notice calls that only generate: in training mode, with a key/value cache, without gradients.

Reinforcement learning generates while the model is in training mode. Nothing is dropped then, and
the block gets its cache.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchdrop.error_pages import see
from torchdrop.internals import in_reentrant_checkpoint
from torchdrop.tracing.call_arguments import is_cache

if TYPE_CHECKING:
    from torchdrop.running.block_site import BlockSite

__all__ = ["caches_of", "only_fills_cache"]


def only_fills_cache(
    site: BlockSite, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool
) -> bool:
    """Whether a call in training only generates: it has a key/value cache and no gradients.

    Nothing is dropped then, and the block gets the cache. With gradients, an empty cache is
    replaced by None.

    Raises:
        ValueError: A call with gradients has a cache that is not empty, or a call in evaluation
            has a cache although ``scale="eval"``.
    """
    settings = site.settings
    caches = caches_of(site, args, kwargs)
    if caches is None:  # as a feed-forward layer, which gets no cache: as in the layer before
        return training and settings.generates and not _needs_gradients(args)
    settings.generates = (
        bool(caches) and training and not _needs_gradients((*args, *kwargs.values()))
    )
    if settings.generates:
        if not settings.warned_of_generation and not site.only_proves:
            settings.warned_of_generation = True
            warnings.warn(
                "in training mode the model is called with a key/value cache and without "
                "gradients, as by generate(); nothing is dropped in such calls. To say so in "
                "the code, generate inside `with torchdrop.paused(model):`" + see("caches"),
                stacklevel=2,
            )
        return True
    for cache in filter(is_cache, caches):
        indices = (getattr(m, "layer_idx", None) for m in site.module.modules())
        index = next((i for i in indices if isinstance(i, int)), 0)
        name = site.branches[0].facts.block
        if not training:
            raise ValueError(
                f"{name} is called with a key/value cache, but with scale='eval' its branches "
                f"are computed one by one in evaluation; pass use_cache=False, or use "
                f"scale='train'" + see("caches")
            )
        if _has_entries(cache, index):
            raise ValueError(
                f"{name} is called in training with a key/value cache that is not empty, and "
                f"the rows of its entries cannot be selected; pass use_cache=False" + see("caches")
            )
        if not settings.warned_of_cache and not site.only_proves:
            settings.warned_of_cache = True
            warnings.warn(
                "in training the model creates a key/value cache; blocks with stochastic depth "
                "get None instead of it. Pass use_cache=False" + see("caches"),
                stacklevel=2,
            )
    return False


def caches_of(site: BlockSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    """Return the arguments that are key/value caches, by their class or their names.

    None if the call has no argument for one.
    """
    names = list(site.__signature__.parameters) if args else []
    found: list[Any] | None = None
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        is_named = _NAMED_CACHE.fullmatch(name) and not isinstance(value, _NO_CACHE)
        if is_named or is_cache(value):
            found = found or []
            if value is not None and (is_cache(value) or _holds_something(value)):
                found.append(value)
    return found


# What is never a cache, although its parameter may be named cache_position or use_cache.
_NO_CACHE = (Tensor, bool, int, float, str)

# Whole names: a rope_cache is a table of constants.
_NAMED_CACHE = re.compile(
    r"(layer_)?past(_key_values?|_kv)?|((past_)?kv_|key_value_)?caches?|cache_params|inference_params"
)


def _holds_something(value: Any) -> bool:
    """Whether a cache of an unknown class is not an empty container."""
    return not isinstance(value, Sized) or len(value) > 0


def _needs_gradients(values: Iterable[Any]) -> bool:
    """Whether gradients are computed, or will be when a checkpoint runs the block again."""
    return (
        torch.is_grad_enabled()
        or any(isinstance(value, Tensor) and value.requires_grad for value in values)
        or in_reentrant_checkpoint()
    )


def _has_entries(cache: Any, layer: int) -> bool:
    """Whether a key/value cache has entries for the layer number ``layer``."""
    try:
        return bool(cache.get_seq_length(layer) > 0)
    except Exception:  # the cache of a state-space model does not count tokens
        layers = getattr(cache, "layers", ())
        states = getattr(layers[layer], "has_previous_state", {}) if layer < len(layers) else {}
        return any(states.values())
