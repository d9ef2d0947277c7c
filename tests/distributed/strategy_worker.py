"""One rank of many trainings: ``python -m tests.distributed.strategy_worker WORLD_SIZE FOLDER JOBS``.

``JOBS`` is JSON: by a job's name, the arguments of ``trainings.train``. Imports are paid once.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.distributed.trainings import train


def main(world_size: int, folder: Path, jobs: dict[str, dict[str, Any]]) -> None:
    """Run everything, in order; rank 0 leaves the results, of a refused job the words."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for job, arguments in jobs.items():
        print(f"{time.monotonic():.1f} {job}", flush=True)
        try:
            results[job] = train(place=folder, world_size=world_size, **arguments)
        except ValueError as error:
            results[job] = str(error)
    if os.environ["LOCAL_RANK"] == "0":
        torch.save(results, folder / "results.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
