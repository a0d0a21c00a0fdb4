#!/usr/bin/env bash
# Trains under torchrun, which starts every process again from the newest state when one of them fails.
#
#   tools/elastic.sh --data-dir CS ...                    a process for each GPU of this machine
#   NNODES=2 RDZV_ENDPOINT=first:29400 tools/elastic.sh --data-dir CS ...
#                                                         the same line on each of two machines, `first` among them
#
# The arguments are those of train.py; --resume is added. Several machines share --snapshot-dir.
# Settings by environment: NPROC, processes on this machine (gpu: one for each); NNODES, machines, or a range such as
# 1:4 (1); RDZV_ENDPOINT, where they meet; RDZV_ID, the run's name there (ccnet); MAX_RESTARTS (3); CCNET_PYTHON, the
# interpreter (.venv/bin/python, which run_local.sh or tools/setup_env.sh sets up).
set -euo pipefail
if [ $# = 0 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
    sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    if [ $# = 0 ]; then exit 2; else exit 0; fi
fi
nodes=${NNODES:-1}
if [ "$nodes" != 1 ] && [ -z "${RDZV_ENDPOINT:-}" ]; then
    echo "elastic.sh: error: NNODES=$nodes: the machines have to meet; give RDZV_ENDPOINT=HOST:PORT, HOST one of them" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# On SIGTERM torchrun passes it on and kills what is left after 30 seconds; from torch 2.12 on it takes this number.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
# Else a restart meets the addresses of the processes before it in the store that torchrun keeps, and fails by chance.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# --resume on the first start too: processes that are started again because a machine has come or gone are not told so.
exec "${CCNET_PYTHON:-$root/.venv/bin/python}" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "${NPROC:-gpu}" \
    --rdzv-backend c10d --rdzv-endpoint "${RDZV_ENDPOINT:-localhost:0}" --rdzv-id "${RDZV_ID:-ccnet}" \
    --max-restarts "${MAX_RESTARTS:-3}" "$root/train.py" "$@" --resume
