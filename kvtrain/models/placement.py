"""Where a module runs, which need not be where its weights lie."""

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device:
    """Where a module with weights runs.

    What accelerate offloads lies on the meta device until it runs, and a hook on it says where that is; so do adapters'
    wrappers, within which the hook may be.
    """
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # one hook, or several in a row
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    return next(module.parameters()).device
