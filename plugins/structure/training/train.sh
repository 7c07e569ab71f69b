#!/usr/bin/env bash
# Trains the weights for flux2-tiny that this plugin ships: draws a data set, trains, and puts the result in its place.
# First at high noise alone, where a layout is settled but the objective's weights are small; then at every level.
# Usage: plugins/structure/training/train.sh FOLDER     (the folder keeps the data set and the runs; see the README)
set -euo pipefail
folder=$1
plugin=$(cd "$(dirname "$0")/.." && pwd)
[ -e "$folder/data/metadata.jsonl" ] || python -m silkscreen_tiny.datasets structure "$folder/data" --count 6000
[ -e "$folder/start.safetensors" ] || python "$plugin/training/start.py" "$folder/start.safetensors"
train() {
    silkscreen train --base flux2-tiny --template_model_id_or_path structure \
        --dataset_metadata_path "$folder/data/metadata.jsonl" --batch_size 32 --learning_rate 1e-3 --warmup_steps 50 \
        --weight_decay 0 --adam_beta2 0.95 --seed 1 --resume latest "$@"
}
train --output_path "$folder/layout" --resume_from_checkpoint "$folder/start.safetensors" \
    --max_timestep_boundary 0.2 --num_epochs 6 --ema_decay 0.98 "${@:2}"
train --output_path "$folder/run" --resume_from_checkpoint "$folder/layout/epoch-5.safetensors" \
    --num_epochs 10 --lr_scheduler cosine --ema_decay 0.99 --save_dtype float16 "${@:2}"
silkscreen pack "$plugin" "$folder/run/epoch-9.safetensors" --base flux2-tiny --dtype float16 --overwrite --out "$folder" --trust-code
