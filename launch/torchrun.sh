#!/usr/bin/env bash
# torchrun, on one machine or on several: the same line on each of them.
# Needs: torch; on several machines the port 29500 of HEAD, open to the others.
#
#   launch/torchrun.sh fit --config RECIPE                          # all GPUs of this machine
#   HEAD=node0 NODES=8 launch/torchrun.sh fit --config RECIPE       # on every one of eight nodes
#
# From the environment: HEAD, the node where all meet; NODES (1); DEVICES, processes a node (gpu: one a GPU); PORT (29500);
# RESTARTS (3), how often all begin again from the last checkpoint when one is lost; JOB (kvtrain), a name of its own for
# each job at HEAD; GRACE (600), seconds for a last checkpoint after SIGTERM; PYTHON (python).
# Where names do not lead to nodes: NODE_RANK (0 on HEAD alone) and NODE_ADDRESS (where the others reach this node).
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: [HEAD=node0 NODES=8] $0 fit|check|validate --config RECIPE [options]" >&2
  exit 2
fi
NODES=${NODES:-1} PORT=${PORT:-29500} RESTARTS=${RESTARTS:-3}
command=$1 && shift
if [ "$command" = fit ]; then set -- --ckpt_path last "$@"; else RESTARTS=0; fi

if [ "$NODES" = 1 ]; then
  meeting=(--standalone)
else
  meeting=(--rdzv-backend c10d --rdzv-endpoint "${HEAD:?the node where all meet}:$PORT" --rdzv-id "${JOB:-kvtrain}")
  case ${NODE_RANK:-} in
    "") ;;
    0) meeting+=(--rdzv-conf is_host=1) ;;
    *) meeting+=(--rdzv-conf is_host=0) ;;
  esac
  if [ -n "${NODE_ADDRESS:-}" ]; then meeting+=(--local-addr "$NODE_ADDRESS"); fi
fi

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-600} # after 30 s torchrun would kill workers that still save
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # workers that start again would meet at the address of those that are gone
exec "${PYTHON:-python}" -m torch.distributed.run "${meeting[@]}" --nnodes "$NODES" \
  --nproc-per-node "${DEVICES:-gpu}" --max-restarts "$RESTARTS" -m kvtrain "$command" "$@"
