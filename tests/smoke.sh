#!/usr/bin/env bash
# The demo in small: every command once, on a corpus of a few notes. For CI; `make demo` is the real one.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
run=.venv/bin/jepa-audio
$run data synth "$folder/corpus" --num_train 60 --num_valid 20 --num_test 20
for recipe in wavjepa pupujepa; do
  $run fit --config "configs/demo/$recipe.yaml" --data.root "$folder/corpus/nsynth-train" --run_dir "$folder/$recipe" \
    --data.batch_size 4 --trainer.max_steps 12 --model.lr_schedule.init_args.warmup_steps 2 \
    --trainer.val_check_interval 6 --checkpoint.every_n_train_steps 6 --monitor.every_n_steps 3
done
$run fit --config configs/demo/wavjepa.yaml --data.root "$folder/corpus/nsynth-train" --run_dir "$folder/wavjepa" \
  --data.batch_size 4 --trainer.max_steps 14 --model.lr_schedule.init_args.warmup_steps 2 --ckpt_path last
$run validate --config configs/demo/wavjepa.yaml --data.root "$folder/corpus/nsynth-train" --run_dir "$folder/wavjepa" \
  --ckpt_path last
$run probe --checkpoints "[$folder/wavjepa/checkpoints/last.ckpt, $folder/pupujepa/checkpoints/last.ckpt]" \
  --corpus "$folder/corpus" --output "$folder/probe"
$run report "$folder"
for wanted in report.html probe/results.jsonl probe/table.md wavjepa/config.yaml; do test -s "$folder/$wanted"; done
echo "smoke run of the demo: all files are there"
