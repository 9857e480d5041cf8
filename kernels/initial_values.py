"""What a tiered table starts with: deferred where its ``init_fn`` is understood, applied block by block where it is not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import errors
from .deferred_init import Columns, UniformInit, table_seed

InitFn = Callable[[Tensor], "Tensor | None"]

BLOCK_BYTES = 32 << 20
"""Weights that are made and written at once when an ``init_fn`` is applied (guess: far below any memory budget)."""


def rows_per_block(row_bytes: int, block_bytes: int = BLOCK_BYTES) -> int:
    """Rows of a block of about ``block_bytes``, at least one."""
    return max(1, block_bytes // row_bytes)


@dataclass(frozen=True)
class UniformInitFn:
    """An ``init_fn`` for an in-memory table: the values that a tiered table of that name starts with, bit for bit.

    Values are uniform in [low, high) and keyed by (seed, table, row, column), so they do not depend on how a table is
    sharded. TorchRec hands an ``init_fn`` the local shard without saying which rows it holds, so a table in memory must be
    whole on its rank (table-wise, data-parallel, or unsharded).

    Raises, when called: ConfigurationError for a tensor that is not the whole table.
    """

    table: str
    num_embeddings: int
    embedding_dim: int
    low: float
    high: float
    seed: int = 0

    def __call__(self, weight: Tensor) -> Tensor:
        """Fills ``weight``, (num_embeddings, embedding_dim) FP32 or FP16, in place; an empty one is a rank without the table."""
        if weight.numel() == 0:
            return weight
        if tuple(weight.shape) != (self.num_embeddings, self.embedding_dim):
            raise errors.ConfigurationError(
                f"table {self.table!r}: initial values were asked for a tensor of shape {tuple(weight.shape)}, the whole table is "
                f"{(self.num_embeddings, self.embedding_dim)}. A shard cannot know its rows: load a state dict into it instead"
            )
        init = self.deferred(columns=self.embedding_dim, weight_type=str(weight.dtype).removeprefix("torch."))
        block = rows_per_block(8 * self.embedding_dim)
        with torch.no_grad():
            for first in range(0, self.num_embeddings, block):
                rows = min(block, self.num_embeddings - first)
                weight[first : first + rows] = init.materialize(first, rows)
        return weight

    def deferred(self, columns: Columns, weight_type: str, first_row: int = 0) -> UniformInit:
        """The same values for one shard, made when a row is first touched."""
        return UniformInit(table_seed(self.table, self.seed), self.low, self.high, first_row, columns, weight_type)


def uniform_init_fn(
    table: str, num_embeddings: int, embedding_dim: int, low: float | None = None, high: float | None = None, seed: int = 0
) -> UniformInitFn:
    """The ``init_fn`` for an in-memory twin of a tiered table; bounds default to TorchRec's ±1/√num_embeddings."""
    bound = 1 / math.sqrt(num_embeddings)
    return UniformInitFn(table, num_embeddings, embedding_dim, -bound if low is None else low, bound if high is None else high, seed)


def as_uniform(init_fn: InitFn | None, table: str, num_embeddings: int, embedding_dim: int) -> UniformInitFn | None:
    """``init_fn`` as something that can be deferred, or None when it must be applied.

    Understood: ours; ``nn.init.zeros_``; and, as ``functools.partial`` with keyword arguments, ``nn.init.uniform_`` (TorchRec's
    default) and ``nn.init.constant_``.
    """
    if init_fn is None or isinstance(init_fn, UniformInitFn):
        return init_fn
    function, keywords = init_fn, {}
    if isinstance(init_fn, functools.partial):
        if init_fn.args:
            return None
        function, keywords = init_fn.func, dict(init_fn.keywords)
    if function is nn.init.zeros_ and not keywords:
        bounds = (0.0, 0.0)
    elif function is nn.init.uniform_ and keywords.pop("generator", None) is None and not keywords.keys() - {"a", "b"}:
        bounds = (keywords.get("a", 0.0), keywords.get("b", 1.0))
    elif function is nn.init.constant_ and keywords.keys() == {"val"}:
        bounds = (keywords["val"], keywords["val"])
    else:
        return None
    return UniformInitFn(table, num_embeddings, embedding_dim, *bounds)
