"""TorchRec planner components that know the tiers below memory. They plan without the native core."""

from .. import errors as _errors  # noqa: F401  (relative: a top-level `import planner` fails at once)
from .. import torchrec_hooks as _torchrec_hooks  # noqa: F401  (first: refuses a TorchRec that cannot work)
from .access_profile import AccessProfile, MissCurve, TableAccess
from .assumed_access import assumed_access
from .built_in_hardware import hardware_profiles
from .chains import with_chains
from .charges import TierBytes, chain_bytes
from .checkpoint_schedule import CheckpointSchedule
from .constraints import TieredParameterConstraints
from .enumerators import TieredEnumerator
from .errors import InsufficientStorageError
from .estimators import TieredStorageEstimator
from .explanations import PlanSummary
from .hardware_profile import BlockDeviceProfile, DevicePoint, HardwareProfile, KernelCosts, LinkProfile, MemoryProfile
from .partitioners import TieredPartitioner
from .perf_model import PerfModel
from .planners import TieredShardingPlanner
from .proposers import TieredProposer
from .stats import TieredStats, plan_cells, render_plan
from .step_rating import PredictedStep
from .storage import TieredStorage
from .storage_reservations import DdrStorageReservation
from .topology import PmemDevice, TieredTopology

__all__ = [
    "AccessProfile",
    "BlockDeviceProfile",
    "CheckpointSchedule",
    "DdrStorageReservation",
    "DevicePoint",
    "HardwareProfile",
    "InsufficientStorageError",
    "KernelCosts",
    "LinkProfile",
    "MemoryProfile",
    "MissCurve",
    "PerfModel",
    "PlanSummary",
    "PmemDevice",
    "PredictedStep",
    "TableAccess",
    "TierBytes",
    "TieredEnumerator",
    "TieredParameterConstraints",
    "TieredPartitioner",
    "TieredProposer",
    "TieredShardingPlanner",
    "TieredStats",
    "TieredStorage",
    "TieredStorageEstimator",
    "TieredTopology",
    "assumed_access",
    "chain_bytes",
    "hardware_profiles",
    "plan_cells",
    "render_plan",
    "with_chains",
]
