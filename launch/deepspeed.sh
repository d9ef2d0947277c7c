#!/usr/bin/env bash
# The deepspeed launcher: one line on one node, which reaches the others by ssh.
# Needs: kvtrain[deepspeed] and pdsh, ssh without a password to every node, the same paths on all of them.
#
#   HOSTFILE=launch/hostfile launch/deepspeed.sh fit --config RECIPE  # on the nodes that the file names
#   launch/deepspeed.sh fit --config RECIPE                           # all GPUs of this machine
#
# From the environment: HOSTFILE; HEAD, an address of its first node, where ssh cannot ask for it; PORT (29500); DEVICES,
# processes of this machine where there is no HOSTFILE; PYTHON (python).
# What the nodes must know besides (GLOO_SOCKET_IFNAME=eth0, HF_HOME=/shared/hf) stands in ./.deepspeed_env, a line each.
# SIGTERM to the launcher kills its workers; where machines are taken back, use slurm.sbatch or kubernetes.yaml.
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: [HOSTFILE=launch/hostfile] $0 fit|check|validate --config RECIPE [options]" >&2
  exit 2
fi
command=$1 && shift
if [ "$command" = fit ]; then set -- --ckpt_path last "$@"; fi

where=()
if [ -n "${HOSTFILE:-}" ]; then
  if [ ! -f "$HOSTFILE" ]; then echo "$0: no hostfile at '$HOSTFILE'" >&2 && exit 2; fi
  where=(--hostfile "$HOSTFILE")
  if [ -n "${HEAD:-}" ]; then where+=(--master_addr "$HEAD" --no_ssh_check); fi
elif [ -n "${DEVICES:-}" ]; then
  where=(--num_gpus "$DEVICES")
fi

export PDSH_RCMD_TYPE=${PDSH_RCMD_TYPE:-ssh}
exec "${PYTHON:-python}" -m deepspeed.launcher.runner "${where[@]}" --master_port "${PORT:-29500}" --no_local_rank \
  --module kvtrain "$command" "$@"
