"""Finding the tiered groups of a sharded model. TorchRec keeps lookups out of ``named_modules``."""

from __future__ import annotations

from torch import nn

from .kernels.tiered_tbe import TieredTBE
from .sharded_modules import TieredCollection


def tiered_groups(module: nn.Module) -> list[TieredTBE]:
    """Every ``TieredTBE`` below a ``DistributedModelParallel`` or a sharded module, each once.

    The order is that of modules, lookups and groups, and so the same on every rank for groups that several ranks have.
    """
    found = {
        id(kernel.emb_module): kernel.emb_module
        for m in module.modules()
        if isinstance(m, TieredCollection)
        for kernel in m.tiered_kernels()
    }
    return list(found.values())
