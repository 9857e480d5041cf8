"""The hooks of TorchRec that tiered tables stand on, and the few whose shape differs between its releases.

Every part of this package that needs TorchRec imports this file first, so that a release without one of the hooks is refused at
import, by name, where it would otherwise train tables in another way than the plan says.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .errors import UnsupportedError

TESTED = ("1.6.1", "1.8.0", "1.9.2")
"""What ``make torchrec-versions`` runs the tests on."""

HOOKS = (
    ("embedding_types", "EmbeddingComputeKernel.CUSTOMIZED_KERNEL"),
    ("types", "ShardingEnv2D"),
    ("embedding_lookup", "GroupedPooledEmbeddingsLookup._create_embedding_kernel"),
    ("embedding_lookup", "GroupedEmbeddingsLookup._create_embedding_kernel"),
    ("embeddingbag", "ShardedEmbeddingBagCollection.create_embedding_bag_sharding"),
    ("embeddingbag", "ShardedEmbeddingBagCollection.create_grouped_sharding_infos"),
    ("embeddingbag", "ShardedEmbeddingBagCollection._initialize_torch_state"),
    ("embedding", "ShardedEmbeddingCollection.create_embedding_sharding"),
    ("embedding", "ShardedEmbeddingCollection.create_grouped_sharding_infos"),
    ("embedding", "ShardedEmbeddingCollection._initialize_torch_state"),
    ("sharding_plan", "get_default_sharders"),
    ("planner.estimator", "EmbeddingPerfEstimatorFactory"),
    ("planner.enumerators", "EmbeddingEnumerator._filter_compute_kernels"),
    ("planner.enumerators", "EmbeddingEnumerator._filter_sharding_types"),
)
"""In ``torchrec.distributed``: what is overridden or called, by module."""


def check_hooks() -> None:
    """Raises: UnsupportedError for a TorchRec that lacks one of the hooks."""
    for module, name in HOOKS:
        try:
            found: Any = import_module(f"torchrec.distributed.{module}")
            for part in name.split("."):
                found = getattr(found, part)
        except (ModuleNotFoundError, AttributeError) as missing:
            if isinstance(missing, ModuleNotFoundError) and missing.name != f"torchrec.distributed.{module}":
                raise  # TorchRec, or something that it needs, is not installed
            raise UnsupportedError(
                f"TorchRec {_installed()} has no torchrec.distributed.{module}.{name}, which tiered tables need; use a release from "
                f"{TESTED[0]} to {TESTED[-1]} (tested are {', '.join(TESTED)})"
            ) from missing


def _installed() -> str:
    try:
        return version("torchrec")
    except PackageNotFoundError:
        return "(of unknown version)"


check_hooks()


def sharders_for_estimators(enumerator: Any) -> Mapping[str, Any]:
    """What the enumerator hands to estimators: by module, something with the sharder's ``fused_params``. Sharders before 1.7."""
    return enumerator._sharder_data_map if hasattr(enumerator, "_sharder_data_map") else enumerator.sharder_map
