"""The layers as functions of a tensor.

``p`` is always the probability of dropping. In evaluation, and with ``p=0``, a function that drops
returns the very object that was passed in. ``make exports`` writes the imports from the ``__all__``
of each file of torchdrop/layers.
"""

from torchdrop.layers.cutout import cutout
from torchdrop.layers.cutout_boxes import cutout_boxes
from torchdrop.layers.drop_block import drop_block1d, drop_block2d, drop_block3d
from torchdrop.layers.drop_block_gamma import drop_block_gamma
from torchdrop.layers.drop_path import drop_path, drop_path_add
from torchdrop.layers.gaussian_dropout import gaussian_dropout
from torchdrop.layers.path_drop import path_drop, path_drop_column
from torchdrop.layers.shake_drop import shake_drop
from torchdrop.layers.spatial_dropout import spatial_dropout
from torchdrop.layers.uniform_dropout import uniform_dropout

__all__ = [
    "cutout",
    "cutout_boxes",
    "drop_block1d",
    "drop_block2d",
    "drop_block3d",
    "drop_block_gamma",
    "drop_path",
    "drop_path_add",
    "gaussian_dropout",
    "path_drop",
    "path_drop_column",
    "shake_drop",
    "spatial_dropout",
    "uniform_dropout",
]
