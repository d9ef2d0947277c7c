"""``kvtrain check``: what a launch would meet, looked at before anything is trained.

``world`` is where a process stands among the others, ``meeting`` how processes talk before any collective works,
``facts`` what each of them finds out, ``verdicts`` what is made of it, ``check`` the order of it all.
"""

from kvtrain.training.preflight.check import Preflight, check_launch
from kvtrain.training.preflight.verdicts import Finding

__all__ = ["Finding", "Preflight", "check_launch"]
