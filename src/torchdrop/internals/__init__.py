"""Every private PyTorch API that torchdrop uses, each under a name of its own.

Private means: a name with a leading underscore, or an attribute that PyTorch does not document. A
release of PyTorch may change any of them. Each entry says what it is used for and what happens
without it. ``tests/internals`` tries each of them on the installed PyTorch, and
``tests/laws/test_private_apis.py`` checks that no file outside of this package uses one.

If an API is missing, one of three things happens:

* if results could be wrong, importing torchdrop (or the call that needs the API) raises an error
  that names the API;
* if only time or memory is lost, torchdrop warns once and continues;
* if PyTorch merely ignores a mark that torchdrop sets for the compiler, a running program cannot
  notice it, and only the test does.
"""

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
from torchdrop.internals.asked_modes import *  # noqa: F403
from torchdrop.internals.checkpoints import *  # noqa: F403
from torchdrop.internals.compilers import *  # noqa: F403
from torchdrop.internals.counting import *  # noqa: F403
from torchdrop.internals.graphs import *  # noqa: F403
from torchdrop.internals.modules import *  # noqa: F403
from torchdrop.internals.surroundings import *  # noqa: F403
from torchdrop.internals.tensors import *  # noqa: F403

__all__ = [
    *checkpoints.__all__,
    *compilers.__all__,
    *counting.__all__,
    *graphs.__all__,
    *asked_modes.__all__,
    *modules.__all__,
    *surroundings.__all__,
    *tensors.__all__,
]
