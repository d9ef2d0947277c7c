"""Lightning modules, one for each architecture, on one small base."""

from kvtrain.training.base import TrainingModule
from kvtrain.training.dmc import DMCModule
from kvtrain.training.duo import DuoModule
from kvtrain.training.lckv import LCKVModule, LCKVPretrainModule
from kvtrain.training.pretrain import PretrainModule
from kvtrain.training.retrofit import RetrofitModule
from kvtrain.training.schedules import Phase
from kvtrain.training.transnormer import (
    TransNormerClassificationModule,
    TransNormerMaskedModule,
    TransNormerModule,
)

__all__ = [
    "DMCModule",
    "DuoModule",
    "LCKVModule",
    "LCKVPretrainModule",
    "Phase",
    "PretrainModule",
    "RetrofitModule",
    "TrainingModule",
    "TransNormerClassificationModule",
    "TransNormerMaskedModule",
    "TransNormerModule",
]
