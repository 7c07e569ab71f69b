#!/usr/bin/env bash
# Trains the weights for flux2-tiny that this plugin ships: draws a data set, trains, and puts the result in its place.
# Usage: plugins/softrgb/training/train.sh FOLDER     (the folder keeps the data set and the run; about ten minutes on two cores)
set -euo pipefail
folder=$1
plugin=$(cd "$(dirname "$0")/.." && pwd)
[ -e "$folder/data/metadata.jsonl" ] || python -m silkscreen_tiny.datasets softrgb "$folder/data"
silkscreen train --base flux2-tiny --template_model_id_or_path softrgb --dataset_metadata_path "$folder/data/metadata.jsonl" \
    --output_path "$folder/run" --batch_size 32 --num_epochs 5 --learning_rate 2e-3 --warmup_steps 50 --weight_decay 0 \
    --lr_scheduler cosine --ema_decay 0.99 --seed 1 --save_dtype float16 --from_scratch --resume latest "${@:2}"
cp "$folder/run/epoch-4.safetensors" "$plugin/src/silkscreen_softrgb/flux2-tiny.safetensors"
