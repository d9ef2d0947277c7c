"""Things that follow from an object, and are made once, by whoever asks first."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

Kept = TypeVar("Kept")


class Memo:
    """A base for objects that hand on what follows from them."""

    _kept: dict[Hashable, Any] | None = None

    def keep(self, name: Hashable, make: Callable[[], Kept]) -> Kept:
        """What ``make`` returns for the first who asks by this name; everyone else gets the same.

        Args:
            name: Says what it is, and all that it depends on besides this object. Tensors in it count by identity.
            make: Is not kept, and may refer to this object. What it returns must carry no gradient.
        """
        if self._kept is None:
            object.__setattr__(self, "_kept", {})  # of frozen ones, too
            assert self._kept is not None
        if name not in self._kept:
            with torch.inference_mode(False):  # training may use what inference has asked for first
                self._kept[name] = make()
        kept: Kept = self._kept[name]
        return kept
