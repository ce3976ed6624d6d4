"""All names of the package are those of its files."""

from torchdrop import internals
from torchdrop.internals import (
    asked_modes,
    checkpoints,
    compilers,
    counting,
    graphs,
    modules,
    surroundings,
    tensors,
)


def test_every_name_is_in_one_file():
    files = (asked_modes, checkpoints, compilers, counting, graphs, modules, surroundings, tensors)
    names = [name for file in files for name in file.__all__]
    assert sorted(names) == sorted(set(names)) == sorted(internals.__all__)
    assert all(hasattr(internals, name) for name in names)
