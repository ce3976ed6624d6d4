"""The lock for changes of the state of the whole process, which a thread later undoes."""

from __future__ import annotations

import threading

__all__ = ["PROCESS_LOCK"]

#: Held while a block is read or proved. Both put back the global random number generators and the
#: filters of warnings, and torch.fx patches nn.Module: two threads at once would put back what the
#: other one has changed. It is not held while a whole model runs, because that may wait for threads
#: that need the lock (DataParallel).
PROCESS_LOCK = threading.RLock()
