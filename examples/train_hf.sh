#!/usr/bin/env bash
# Trains a small Llama and a small Gemma 2 from scratch by the Trainer, on all GPUs of this machine or on its CPU.
#   examples/train_hf.sh [any option of train_hf.py but --scratch, --model and --out]
# OUT is the folder for both (runs/train_hf), PROCESSES how many train together (the GPUs, or one on a CPU).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

processes=${PROCESSES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
launch=(python)
if [ "$processes" -gt 1 ]; then
  launch=(python -m torch.distributed.run --standalone --nproc-per-node "$processes")
fi
for model in llama gemma2; do
  "${launch[@]}" examples/train_hf.py --scratch "$model" --out "${OUT:-runs/train_hf}/$model" "$@"
done
