#!/bin/bash
# Train the three stages of a preset on one or several machines that share the project folder.
# Run the same line on each machine:
#
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 examples/torchrun.sh full_13b   # NODE_RANK=1 on the other
#
# NPROC_PER_NODE is the number of GPUs of a machine. All arguments go to examples/train.py. If the recipe
# has save_every, a killed run continues from its last checkpoint when it is started again.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "${NPROC_PER_NODE:-8}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" \
    examples/train.py "$@"
