"""One rank that loads bases into shards: ``python -m tests.distributed.loading_worker WORLD_SIZE FOLDER``.

Rank 0 leaves, for every model, its bytes in float32, the most host memory that loading it took, and its logits.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from torch.distributed.device_mesh import init_device_mesh

import kvtrain
from kvtrain.training import DMCModule, DuoModule, LCKVModule, Phase, RetrofitModule
from kvtrain.training.strategies import FSDP2
from tests.host_memory import peak_above_start

PHASES = [Phase("retrofit", 1, 1e-3)]
AVERAGED = kvtrain.LCKV(kv_map="cla2", init="mean")
# By name: the module of a base, of which kind there are several.
MODULES = {
    "full": lambda base: RetrofitModule(base, phases=PHASES),
    "dmc": lambda base: DMCModule(base, kvtrain.DMC(), phases=PHASES),
    "duo": lambda base: DuoModule(base, phases=PHASES),
    "duo, bfloat16": lambda base: DuoModule(base, phases=PHASES, weights="bfloat16"),
    "duo, rounded": lambda base: RetrofitModule(base, kvtrain.Duo(full_heads=((1,), (0,), (), (0, 1))), phases=PHASES),
    "lckv": lambda base: LCKVModule(base, kvtrain.LCKV(kv_map="0_2_2_3", forward_passes=2), phases=PHASES),
    "lckv, averaged": lambda base: LCKVModule(base, AVERAGED, phases=PHASES),
    "converted": lambda base: DMCModule(base, kvtrain.DMC(), phases=PHASES, num_key_value_heads=1),
}
BASES = ("tied", "untied", "half")
IDS = torch.arange(3, 51).view(2, 24)


class Alone(FSDP2):
    """Without a trainer."""

    root_device = torch.device("cpu")
    is_global_zero = False


def logits(model: Any) -> torch.Tensor:
    """Of a few tokens."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS, use_cache=False).logits
    return found


def main(world_size: int, folder: Path) -> None:
    """Load everything."""
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    strategy = Alone()
    strategy._device_mesh = init_device_mesh("cpu", (world_size,))
    strategy.precision_plugin = Precision()
    results: dict[str, Any] = {}
    for base in BASES:
        for name, make in MODULES.items():
            module = make(str(folder / base))
            peak, model = peak_above_start(partial(strategy.build_model, module))
            size = 4 * sum(parameter.numel() for parameter in model.parameters())
            results[f"{name} {base}"] = {"size": size, "peak": peak, "logits": logits(model)}
            del model
    if rank == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
