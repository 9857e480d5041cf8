"""Storage tiers for TorchRec: embedding tables larger than memory, trained from an SSD, bit for bit as in memory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .tiers import DdrCache, DdrHome, PmemCache, PmemHome, SsdHome, TierChain

if TYPE_CHECKING:
    from . import kernels, planner
    from .calibration import calibrate
    from .checkpoint import load_checkpoint, save_checkpoint, trickle, wants_checkpoint
    from .default_sharders import sharders
    from .explanation import explain
    from .groups import tiered_groups
    from .kernels.initial_values import uniform_init_fn
    from .parameter_sharding import TieredParameterSharding
    from .planner.access_profile import AccessProfile
    from .rank_failures import fail_together
    from .registration import register, unregister
    from .resizing import resize
    from .sharder import TieredEmbeddingBagCollectionSharder, TieredEmbeddingCollectionSharder
    from .stager import TieredStager
    from .tier_counters import counters, write_scalars
    from .tracing import trace
    from .train_pipeline import TieredTrainPipeline
    from .wrapping_sharders import (
        TieredFeatureProcessedEmbeddingBagCollectionSharder,
        TieredManagedCollisionEmbeddingBagCollectionSharder,
        TieredManagedCollisionEmbeddingCollectionSharder,
    )

__version__ = "0.1.0"

__all__ = [
    "AccessProfile",
    "DdrCache",
    "DdrHome",
    "PmemCache",
    "PmemHome",
    "SsdHome",
    "TierChain",
    "TieredEmbeddingBagCollectionSharder",
    "TieredEmbeddingCollectionSharder",
    "TieredFeatureProcessedEmbeddingBagCollectionSharder",
    "TieredManagedCollisionEmbeddingBagCollectionSharder",
    "TieredManagedCollisionEmbeddingCollectionSharder",
    "TieredParameterSharding",
    "TieredStager",
    "TieredTrainPipeline",
    "__version__",
    "calibrate",
    "counters",
    "explain",
    "fail_together",
    "kernels",
    "load_checkpoint",
    "planner",
    "register",
    "resize",
    "save_checkpoint",
    "sharders",
    "tiered_groups",
    "trace",
    "trickle",
    "uniform_init_fn",
    "unregister",
    "wants_checkpoint",
    "write_scalars",
]

# Loaded when first used: the planner works without the native core, and the vocabulary without TorchRec.
_MODULE_OF = {
    "AccessProfile": ".planner.access_profile",
    "TieredEmbeddingBagCollectionSharder": ".sharder",
    "TieredEmbeddingCollectionSharder": ".sharder",
    "TieredFeatureProcessedEmbeddingBagCollectionSharder": ".wrapping_sharders",
    "TieredManagedCollisionEmbeddingBagCollectionSharder": ".wrapping_sharders",
    "TieredManagedCollisionEmbeddingCollectionSharder": ".wrapping_sharders",
    "TieredParameterSharding": ".parameter_sharding",
    "TieredStager": ".stager",
    "TieredTrainPipeline": ".train_pipeline",
    "calibrate": ".calibration",
    "counters": ".tier_counters",
    "explain": ".explanation",
    "fail_together": ".rank_failures",
    "load_checkpoint": ".checkpoint",
    "register": ".registration",
    "resize": ".resizing",
    "save_checkpoint": ".checkpoint",
    "sharders": ".default_sharders",
    "tiered_groups": ".groups",
    "trace": ".tracing",
    "trickle": ".checkpoint",
    "uniform_init_fn": ".kernels.initial_values",
    "unregister": ".registration",
    "wants_checkpoint": ".checkpoint",
    "write_scalars": ".tier_counters",
}

_WITH_TORCHREC = {"planner", *_MODULE_OF} - {"uniform_init_fn"}


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCHREC:
        import_module(".torchrec_hooks", __name__)  # refuses a TorchRec that cannot work, before anything of it is used
    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name], __name__), name)
    elif name in ("kernels", "planner"):
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
