"""Policies that need no training: what a head keeps is decided while serving. Every file of ``policies/`` is one."""

from kvtrain.models.discovery import exported
from kvtrain.models.registry import MethodArchitecture

_POLICIES = exported(f"{__name__}.policies", "POLICY", folders=False)
ARCHITECTURES = tuple(MethodArchitecture(policy, f"{__name__}.build") for policy in _POLICIES)
__all__ = ["ARCHITECTURES"]
