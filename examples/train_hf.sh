#!/usr/bin/env bash
# Trains a small Llama and a small Gemma 2 from scratch by the Trainer, on all GPUs of this machine or on its CPU.
#   examples/train_hf.sh [any option of train_hf.py but --scratch, --model and --out]
# OUT is the folder for both (runs/train_hf).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
launch=(python)
if [ "$gpus" -gt 1 ]; then
  launch=(torchrun --standalone --nproc-per-node "$gpus")
fi
for model in llama gemma2; do
  "${launch[@]}" examples/train_hf.py --scratch "$model" --out "${OUT:-runs/train_hf}/$model" "$@"
done
