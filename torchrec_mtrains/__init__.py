"""Storage tiers for TorchRec: embedding tables larger than memory, trained from an SSD, bit for bit as in memory."""

from .tiers import DdrHome, SsdHome, TierChain

__version__ = "0.1.0"

__all__ = ["DdrHome", "SsdHome", "TierChain", "__version__"]
