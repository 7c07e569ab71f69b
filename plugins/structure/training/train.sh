#!/usr/bin/env bash
# Trains the weights for flux2-tiny that this plugin ships: draws a data set, trains, and puts the result in its place.
# Usage: plugins/structure/training/train.sh FOLDER     (the folder keeps the data set and the run; about ten minutes on two cores)
set -euo pipefail
folder=$1
plugin=$(cd "$(dirname "$0")/.." && pwd)
[ -e "$folder/data/metadata.jsonl" ] || python -m silkscreen_tiny.datasets structure "$folder/data"
[ -e "$folder/start.safetensors" ] || python "$plugin/training/start.py" "$folder/start.safetensors"
silkscreen train --base flux2-tiny --template_model_id_or_path structure --dataset_metadata_path "$folder/data/metadata.jsonl" \
    --output_path "$folder/run" --batch_size 32 --num_epochs 5 --learning_rate 5e-4 --warmup_steps 50 --weight_decay 0 \
    --lr_scheduler cosine --ema_decay 0.99 --seed 1 --save_dtype float16 --resume latest "${@:2}" \
    --resume_from_checkpoint "$folder/start.safetensors"
cp "$folder/run/epoch-4.safetensors" "$plugin/src/silkscreen_structure/flux2-tiny.safetensors"
