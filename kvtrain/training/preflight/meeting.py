"""How processes talk before any collective works: through the store at which their launcher lets them meet."""

import json
import os
import socket
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from kvtrain.errors import UsageError, first_line
from kvtrain.training.preflight.world import World


class Meeting:
    """Exchanges small values between all processes; alone it needs no network.

    Args:
        world: Where this process stands.
        timeout: Seconds to wait for the others.

    Raises:
        UsageError: The others did not come in time, or the place to meet cannot be reached.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self.world, self.timeout = world, timedelta(seconds=timeout)
        self.store: Store | None = None
        if world.size > 1:
            self._guarded(self._open)

    def _open(self) -> None:
        world = self.world
        store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=self.timeout))
        self.store = PrefixStore("kvtrain-check", store)

    def share(self, name: str, value: Any) -> list[Any]:
        """The values of all ranks, in their order; every rank calls it, each name once."""
        store = self.store
        if store is None:
            return [value]
        store.set(f"{name}/{self.world.rank}", json.dumps(value))
        if self.world.rank == 0:
            texts = [self._get(f"{name}/{rank}") for rank in range(self.world.size)]
            store.set(name, json.dumps(texts))
        return [json.loads(text) for text in json.loads(self._get(name))]

    def close(self) -> None:
        """Let all leave together: the first rank may keep the store."""
        self.share("end", None)
        if self.store is not None:
            self.store.add("left", 1)
            if self.world.rank == 0:
                self._guarded(self._wait_until_all_left)

    def _wait_until_all_left(self) -> None:
        assert self.store is not None
        while self.store.add("left", 0) < self.world.size:
            pass

    def _get(self, key: str) -> str:
        assert self.store is not None
        self.store.set_timeout(self.timeout)
        return str(self._guarded(self.store.get, key).decode())

    def _guarded(self, action: Any, *arguments: Any) -> Any:
        """Raise what the store complains of in words of ours."""
        try:
            return action(*arguments)
        except (RuntimeError, OSError) as error:  # torch's DistStoreError and its kin among them
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UsageError(
                f"rank {self.world.rank} of {self.world.size} on {socket.gethostname()} has not met all others at "
                f"{address} within {self.timeout.total_seconds():.0f} s ({first_line(error)[:120]}); start every "
                "rank, each with a number of its own, and open that port of the first node to the others"
            ) from error
