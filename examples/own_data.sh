#!/bin/sh
# Your own CSV and your own task, without a line of Python.
#   MODEL=smollm2 STEPS=300 OUT=runs/tickets examples/own_data.sh tickets.csv
# tickets.csv has a header line and the columns that own_task.yaml names: subject, priority.
set -eu
here=$(dirname "$0")
zokernel finetune \
  --model_name_or_path "${MODEL:-smollm2}" \
  --train_file "$1" \
  --task_file "$here/own_task.yaml" \
  --method mezo --learning_rate 2e-5 --max_steps "${STEPS:-300}" \
  --per_device_train_batch_size 4 \
  --auto_find_batch_size true --early_stopping_patience 5 \
  --report_to none \
  --output_dir "${OUT:-runs/tickets}"
