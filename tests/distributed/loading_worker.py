"""One rank that loads bases into its parts: ``python -m tests.distributed.loading_worker WORLD_SIZE FOLDER STRATEGY``.

Rank 0 leaves, for every model, its bytes in float32, the most host memory that loading it took, and its logits.
"""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from torch.distributed.device_mesh import init_device_mesh

import kvtrain
from kvtrain.training import DMCModule, DuoModule, LCKVModule, Phase, RetrofitModule
from kvtrain.training.strategies import FSDP2, DeepSpeedZeRO
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


class FSDP2Alone(FSDP2):
    """Without a trainer."""

    root_device = torch.device("cpu")
    is_global_zero = False

    def __init__(self, word: str, world_size: int) -> None:
        super().__init__()
        self._device_mesh = init_device_mesh("cpu", (world_size,))
        self.precision_plugin = Precision()

    def whole(self, model: Any) -> AbstractContextManager[None]:
        """Where a model's forward pass finds its parameters."""
        return nullcontext()


class ZeRO3Alone(DeepSpeedZeRO):
    """Without a trainer."""

    root_device = torch.device("cpu", 0)

    def __init__(self, word: str, world_size: int) -> None:
        super().__init__(f"configs/deepspeed/{word}.json")

    def whole(self, model: Any) -> AbstractContextManager[None]:
        """Where a model's forward pass finds its parameters."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(model.parameters()))


def logits(model: Any) -> torch.Tensor:
    """Of a few tokens."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS, use_cache=False).logits
    return found


def join(word: str, world_size: int) -> Any:
    """Connect the ranks; returns the strategy."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    if word == "fsdp2":
        return FSDP2Alone(word, world_size)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", dist_init_required=False)
    return ZeRO3Alone(word, world_size)


def main(world_size: int, folder: Path, word: str) -> None:
    """Load everything."""
    torch.set_num_threads(1)
    strategy = join(word, world_size)
    results: dict[str, Any] = {}
    for base in BASES:
        for name, make in MODULES.items():
            module = strategy._lightning_module = make(str(folder / base))
            peak, model = peak_above_start(partial(strategy.build_model, module))
            size = 4 * sum(size for size, _ in strategy.parameter_sizes(model))
            with strategy.whole(model):
                results[f"{name} {base}"] = {"size": size, "peak": peak, "logits": logits(model)}
            module.model = model
            if name == "full":
                peak, teacher = peak_above_start(partial(strategy.build_teacher, module))
                results[f"teacher {base}"] = {"size": size, "peak": peak, "logits": logits(teacher)}
                del teacher
            del model, module.model
    if int(os.environ["LOCAL_RANK"]) == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
