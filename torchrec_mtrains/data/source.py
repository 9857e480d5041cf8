"""What the main job asks of its data: table shapes, training batches from any index on, and a held-out split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True)
class TableShape:
    """One embedding table that the data reads: ``rows`` rows, about ``pooling`` lookups a sample."""

    name: str
    feature: str
    rows: int
    pooling: int = 1


class BatchSource(Protocol):
    """A source of training batches whose order is a function of its constructor's arguments alone.

    ``train_batches(start)`` yields global batch ``start``, ``start + 1``, …: what a job that stopped after ``start``
    batches would have seen next. Each rank gets its own ``batch_size`` samples of every global batch.
    """

    @property
    def name(self) -> str:
        """A few words for reports."""

    @property
    def tables(self) -> tuple[TableShape, ...]:
        """The tables, one feature each, in the order of the batches' keys."""

    @property
    def dense_dim(self) -> int:
        """Number of dense features."""

    @property
    def batch_size(self) -> int:
        """Samples of one batch on one rank."""

    @property
    def endless(self) -> bool:
        """Whether the batches never end."""

    @property
    def train_steps(self) -> int | None:
        """Batches until the data ends, over all epochs; None where it never does (or is not known)."""

    def train_batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield training batches from global batch ``start`` on."""

    def held_out_batches(self, after: int = 0) -> Iterator[Batch]:
        """Yield the held-out batches of a job that has trained ``after`` batches, always the same ones."""


def make_batch(keys: list[str], values: np.ndarray, lengths: np.ndarray, dense: np.ndarray, labels: np.ndarray) -> Batch:
    """A TorchRec ``Batch`` from numpy arrays.

    Shapes: values (sum of lengths,) int64, key-major; lengths (keys × batch,) int32; dense (batch, dense_dim)
    float32; labels (batch,) float32.
    """
    return Batch(
        dense_features=torch.from_numpy(dense),
        sparse_features=KeyedJaggedTensor(keys=keys, values=torch.from_numpy(values), lengths=torch.from_numpy(lengths)),
        labels=torch.from_numpy(labels),
    )
