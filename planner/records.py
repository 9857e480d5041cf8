"""A record: the weights of one row and its optimizer state."""

from __future__ import annotations

from torch import Tensor

_FP32_BYTES = 4

ROWWISE, ELEMENTWISE = "rowwise", "elementwise"

# The per-row states of the optimizers that tiered tables train with, by FBGEMM's and by PyTorch's or TorchRec's names.
_STATES: dict[str, tuple[str, ...]] = {
    "EXACT_SGD": (),
    "EXACT_ADAGRAD": (ELEMENTWISE,),
    "EXACT_ROWWISE_ADAGRAD": (ROWWISE,),
    "SGD": (),
    "Adagrad": (ELEMENTWISE,),
    "RowWiseAdagrad": (ROWWISE,),
}
_STATES_ON_GPU: dict[str, tuple[str, ...]] = {
    **_STATES,
    "ADAM": (ELEMENTWISE, ELEMENTWISE),
    "PARTIAL_ROWWISE_ADAM": (ELEMENTWISE, ROWWISE),
    "LAMB": (ELEMENTWISE, ELEMENTWISE),
    "Adam": (ELEMENTWISE, ELEMENTWISE),
    "PartialRowWiseAdam": (ELEMENTWISE, ROWWISE),
    "LAMBOptimizer": (ELEMENTWISE, ELEMENTWISE),
}


def optimizer_name(tensor: Tensor, fused_params: dict[str, object]) -> str:
    """The table's optimizer: of ``apply_optimizer_in_backward`` first, else of the sharder's fused params, else FBGEMM's default."""
    classes = getattr(tensor, "_optimizer_classes", None)
    if classes:
        return classes[0].__name__
    optimizer = fused_params.get("optimizer")
    return "EXACT_SGD" if optimizer is None else str(getattr(optimizer, "name", optimizer))


def state_bytes_per_row(optimizer: str, columns: int, device: str = "cpu") -> int | None:
    """Optimizer state of one row of ``columns`` values; None for an optimizer that tiered tables do not train with on such a device."""
    states = (_STATES_ON_GPU if device == "cuda" else _STATES).get(optimizer)
    if states is None:
        return None
    return sum(_FP32_BYTES * (1 if state is ROWWISE else columns) for state in states)


def rowwise_bytes_per_row(optimizer: str) -> int:
    """Of that, what a row has as a whole, on a GPU."""
    return sum(_FP32_BYTES for state in _STATES_ON_GPU.get(optimizer, ()) if state is ROWWISE)
