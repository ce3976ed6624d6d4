"""Layers for models that you write: each checks its arguments when it is made.

``make exports`` writes the imports from the ``__all__`` of each file of this package.
"""

from torchdrop.layers.cutout import Cutout
from torchdrop.layers.drop_block import DropBlock1d, DropBlock2d, DropBlock3d
from torchdrop.layers.drop_path import DropPath
from torchdrop.layers.gaussian_dropout import GaussianDropout
from torchdrop.layers.path_drop import PathDrop
from torchdrop.layers.shake_drop import ShakeDrop
from torchdrop.layers.spatial_dropout import SpatialDropout
from torchdrop.layers.stochastic_depth import StochasticDepth
from torchdrop.layers.uniform_dropout import UniformDropout

__all__ = [
    "Cutout",
    "DropBlock1d",
    "DropBlock2d",
    "DropBlock3d",
    "DropPath",
    "GaussianDropout",
    "PathDrop",
    "ShakeDrop",
    "SpatialDropout",
    "StochasticDepth",
    "UniformDropout",
]
