#!/usr/bin/env bash
# Draws a data set of flux2-tiny's scenes and trains on it.
# Usage: training/train.sh FOLDER [FLAGS OF silkscreen train]     (the folder keeps the data set and the run)
set -euo pipefail
folder=$1
package=$(cd "$(dirname "$0")/../src/{{package}}" && pwd)
[ -e "$folder/data/metadata.jsonl" ] || python -m silkscreen_tiny.datasets {{dataset}} "$folder/data" --count 512
silkscreen train --base flux2-tiny --template_model_id_or_path "$package" \
    --dataset_metadata_path "$folder/data/metadata.jsonl" --output_path "$folder/run" --validation_split 0.1 \
    --batch_size 16 --num_epochs 4 --learning_rate {{learning_rate}} --weight_decay 0 --resume latest "${@:2}"
