"""Operations of PyTorch that run inside a block, counted; and the memory of their results."""

import gc
from collections import Counter

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operations(TorchDispatchMode):
    """Counts what runs inside, backward included, and knows which results are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.results = Counter(), {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.count[str(op)] += 1
        for tensor in tree_leaves(out) if not op.is_view else ():
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.results[reference.cdata] = reference, storage.nbytes()
        return out

    def kept(self) -> int:
        """Bytes of the results that somebody still holds."""
        gc.collect()
        return sum(size for reference, size in self.results.values() if not reference.expired())
