#!/usr/bin/env bash
# Test a small `make demo`, a resumed run, a validation and a probe with records. CI runs this script.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
small="--data.batch_size 4 --trainer.max_steps 12 --trainer.val_check_interval 6"
small="$small --checkpoint.every_n_train_steps 6 --monitor.every_n_steps 3"
make demo DEMO="$folder" NOTES="--num_train 60 --num_valid 20 --num_test 20" FIT="$small"
resumed="--config $folder/waveform/config.yaml --ckpt_path last"
.venv/bin/jepa-audio fit $resumed --trainer.max_steps 14
.venv/bin/jepa-audio validate --config small/waveform --data.root "$folder/corpus/nsynth-train" \
  --run_dir "$folder/waveform" --ckpt_path last
.venv/bin/jepa-audio data convert nsynth "$folder/corpus" -o "$folder/records"
.venv/bin/jepa-audio probe --encoder "$folder/waveform/checkpoints/last.ckpt" --tasks nsynth_instrument --data "$folder/records" \
  --output "$folder/marble" --variants "[context]" --layers "[1, 2]" --robustness "[gain, low_pass]"
for file in report.html marble/leaderboard.html records/NSynth/NSynthI.train.jsonl probe/results.jsonl probe/leaderboard.md probe/leaderboard.html waveform/config.yaml spectrogram/checkpoints/last.ckpt; do
  test -s "$folder/$file"
done
echo "smoke test of the demo: all files exist"
