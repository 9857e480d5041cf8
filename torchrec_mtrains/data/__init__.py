"""Training data for the main job: calibrated synthetic, MovieLens (RecBole's ``.inter``) and Criteo's Kaggle TSV."""

from .criteo import CriteoSource
from .movielens import MovieLensSource
from .source import BatchSource, TableShape
from .synthetic import SyntheticConfig, SyntheticSource

__all__ = [
    "BatchSource",
    "CriteoSource",
    "MovieLensSource",
    "SyntheticConfig",
    "SyntheticSource",
    "TableShape",
]
