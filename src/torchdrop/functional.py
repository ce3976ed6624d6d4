"""Tensor in, tensor out: the checks and the maths of every layer.

``p`` is always the probability of dropping. In evaluation, and with ``p=0``, the very object that
was passed in comes back.
"""

from torchdrop.cutout import cutout, cutout_boxes
from torchdrop.drop_block import drop_block1d, drop_block2d, drop_block3d, drop_block_gamma
from torchdrop.drop_path import drop_path, drop_path_add, spatial_dropout
from torchdrop.noise import gaussian_dropout, uniform_dropout
from torchdrop.path_drop import path_drop, path_drop_column
from torchdrop.shake_drop import shake_drop

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
