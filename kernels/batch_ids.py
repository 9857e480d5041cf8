"""``BatchIds``: the ids and offsets of a batch as users pass them, checked, and as pools read them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor

from .. import errors

BatchSizes = list[list[int]]
"""By feature and rank: how many bags a batch has, where features differ in that (TorchRec's variable batch per feature)."""

VARIABLE_BATCH_OPTIMIZERS = (EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ROWWISE_ADAGRAD)
"""Those of the admitted ones for which FBGEMM has a variable batch per feature."""

_INT32, _INT64 = torch.int32, torch.int64


class BatchIds:
    """Of features whose tables have ``feature_rows`` rows."""

    def __init__(self, feature_rows: Sequence[int], mode: BoundsCheckMode, optimizer: EmbOptimType, device: torch.device) -> None:
        self._features, self._mode, self._optimizer = len(feature_rows), mode, optimizer
        self.rewrites_bad = mode not in (BoundsCheckMode.FATAL, BoundsCheckMode.NONE)
        """FATAL and NONE leave bad ids to the slot pool, which refuses them."""
        self._feature_rows = torch.tensor(feature_rows, dtype=_INT64, device=device)
        self._warning = torch.zeros(1, dtype=_INT64, device=device)

    def read(self, indices: Tensor, offsets: Tensor, batch_sizes: BatchSizes | None) -> tuple[Tensor, Tensor, int]:
        """The ids; and where their features begin: that of feature f, and the end of the one before, is ``starts[f * stride]``.

        Shapes: as ``TieredTBE.forward``. Raises: ConfigurationError, UnsupportedError.
        """
        if indices.dtype not in (_INT32, _INT64) or offsets.dtype not in (_INT32, _INT64):
            raise errors.ConfigurationError(f"ids and offsets must be int32 or int64, got {indices.dtype} and {offsets.dtype}")
        ids = (self._with_rows_for_bad(indices, offsets, batch_sizes) if self.rewrites_bad else indices).contiguous()
        if batch_sizes:
            return ids, self._starts(offsets, batch_sizes), 1
        return ids, offsets.contiguous(), self._bags_of_a_feature(offsets)

    def _with_rows_for_bad(self, indices: Tensor, offsets: Tensor, batch_sizes: BatchSizes | None) -> Tensor:
        """WARNING and IGNORE turn bad ids into row 0 as the stock TBE does; here on a copy."""
        indices = indices.clone()
        if batch_sizes:
            bags = [sum(of_feature) for of_feature in batch_sizes]
            first_bags = torch.tensor([0, *itertools.accumulate(bags)], dtype=_INT32)
            variable = {"B_offsets": first_bags, "max_B": max(bags)}
        else:
            variable = {}
        torch.ops.fbgemm.bounds_check_indices(
            self._feature_rows, indices, offsets.to(indices.dtype), self._mode, self._warning, None, **variable
        )
        return indices

    def _starts(self, offsets: Tensor, batch_sizes: BatchSizes) -> Tensor:
        """Where each feature's ids begin, and where the last one's end. Shapes: (features + 1,) int64."""
        if self._optimizer not in VARIABLE_BATCH_OPTIMIZERS:
            raise errors.UnsupportedError(
                f"FBGEMM has no variable batch per feature for {self._optimizer.name}; use one of "
                f"{', '.join(o.name for o in VARIABLE_BATCH_OPTIMIZERS)}, or give every feature the same batch size"
            )
        ends, count = [0, *itertools.accumulate(sum(of_feature) for of_feature in batch_sizes)], offsets.numel()
        if len(ends) != self._features + 1 or ends[-1] + 1 != count:
            raise errors.ConfigurationError(
                f"offsets must have one element for each of the {ends[-1]} bags of {self._features} features, and one more, got "
                f"{count} for the batch sizes of {len(batch_sizes)} features"
            )
        return offsets[torch.tensor(ends)].long()

    def _bags_of_a_feature(self, offsets: Tensor) -> int:
        bags, rest = divmod(offsets.numel() - 1, self._features)
        if rest:
            raise errors.ConfigurationError(f"offsets must have batch × {self._features} features + 1 elements, got {offsets.numel()}")
        return bags
