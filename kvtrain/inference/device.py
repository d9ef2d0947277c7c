"""Where commands run a model: on the GPU where there is one."""

import torch

from kvtrain.errors import UsageError

AUTO = "auto"


def pick_device(name: str = AUTO) -> torch.device:
    """The device of a name.

    Args:
        name: ``"auto"`` takes the CUDA or ROCm GPU where there is one and the CPU otherwise; or as PyTorch names it,
            ``"cuda:1"``.

    Raises:
        UsageError: There is no such device here.
    """
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"no device {name!r} here ({reason}); --device auto takes what there is") from error
    if device.type == "meta":
        raise UsageError("the device 'meta' holds no numbers; --device auto takes what there is")
    return device
