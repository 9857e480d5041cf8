"""How much memory a batch holds, whatever classes it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor


def batch_bytes(*parts: Any) -> int:
    """The bytes of all tensors in ``parts``, each once: ids that stay on their rank are the batch's own."""
    tensors = {(t.data_ptr(), t.nbytes): t for part in parts for t in _tensors(part, set())}
    return sum(t.nbytes for t in tensors.values())


def _tensors(part: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(part) in seen:
        return
    seen.add(id(part))
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, (JaggedTensor, KeyedJaggedTensor)):
        for one in (part.values(), part.weights_or_none(), part.lengths_or_none(), part.offsets_or_none()):
            yield from _tensors(one, seen)
    elif isinstance(part, Mapping):
        for one in part.values():
            yield from _tensors(one, seen)
    elif dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield from _tensors(getattr(part, field.name), seen)
    elif isinstance(part, Iterable) and not isinstance(part, (str, bytes)):
        for one in part:
            yield from _tensors(one, seen)
    elif hasattr(part, "__dict__"):
        for one in vars(part).values():
            yield from _tensors(one, seen)
