"""TorchRec planner components that know the tiers below memory. They plan without the native core."""

from .. import errors as _errors  # noqa: F401  (relative: a top-level `import planner` fails at once)
from .. import torchrec_hooks as _torchrec_hooks  # noqa: F401  (first: refuses a TorchRec that cannot work)
from .constraints import TieredParameterConstraints
from .errors import InsufficientStorageError
from .planners import TieredShardingPlanner
from .stats import render_plan
from .storage_reservations import DdrStorageReservation
from .topology import TieredTopology

__all__ = [
    "DdrStorageReservation",
    "InsufficientStorageError",
    "TieredParameterConstraints",
    "TieredShardingPlanner",
    "TieredTopology",
    "render_plan",
]
