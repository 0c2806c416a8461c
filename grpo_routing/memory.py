"""What a piece of work holds at once, counted tensor by tensor instead of asked of the system.

Every operator's results are counted by their storage (views share one) until Python and autograd let go of it. What a kernel
allocates inside itself is not seen. Works on real tensors and on fake ones, which have shapes and no values.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within the context: `live` bytes of tensors that were made there and still are, their `peak`, and the `largest` one."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self.known and id(storage) not in before:
                    self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        size, name = storage.nbytes(), id(storage)

        def gone(_: weakref.ref) -> None:
            self.live -= size
            del self.known[name]

        self.known[name] = weakref.ref(storage, gone)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
