#!/usr/bin/env bash
# What a GPU has to say about kvtrain, in under ten minutes: tests/gpu, then short ratios, into benchmarks/results/.
#
#     benchmarks/gpu_all.sh                    # on the card that torch sees first
#     benchmarks/gpu_all.sh --wheels FOLDER    # what is missing comes from there; nothing is downloaded
#     benchmarks/gpu_all.sh --resume           # go on with the newest file, leaving out what is done
#     benchmarks/gpu_all.sh --cpu              # reduced, without a GPU: to see that it runs
#
# PYTHON names the interpreter; it must have torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python}" -m benchmarks.gpu "$@"
