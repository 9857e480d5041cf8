"""Finding the tiered tables of a sharded model. TorchRec keeps lookups out of ``named_modules``."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .kernels.tiered_tbe import TieredTBE
from .sharded_modules import TieredCollection


def tiered_collections(module: nn.Module) -> Iterator[TieredCollection]:
    """Every sharded collection that may have tiered tables, below a ``DistributedModelParallel`` or a sharded module."""
    return (m for m in module.modules() if isinstance(m, TieredCollection))


def tiered_groups(module: nn.Module) -> list[TieredTBE]:
    """Every ``TieredTBE`` below a ``DistributedModelParallel`` or a sharded module, each once.

    The order is that of modules, lookups and groups, and so the same on every rank for groups that several ranks have.
    """
    found = {id(k.emb_module): k.emb_module for c in tiered_collections(module) for k in c.tiered_kernels()}
    return list(found.values())
