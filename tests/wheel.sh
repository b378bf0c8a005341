#!/usr/bin/env bash
# Build the wheel, install it into a clean environment, and use it in an empty folder outside the clone.
# CI runs this script.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONPATH
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
uv=$PWD/.venv/bin/uv
PATH="$PWD/.venv/bin:$PATH" .venv/bin/python -m build --installer uv --outdir "$folder/dist" . >"$folder/build.log" ||
  { cat "$folder/build.log"; exit 1; }
"$uv" venv --quiet --python .venv/bin/python "$folder/venv"
"$uv" pip install --quiet --python "$folder/venv/bin/python" --constraints requirements.lock "$folder"/dist/*.whl
recipes=$(find configs -name '*.yaml' | wc -l)

mkdir -p "$folder/empty"
cd "$folder/empty"
jepa_audio="$folder/venv/bin/jepa-audio"
"$folder/venv/bin/python" -c 'import jepa_audio, sys; sys.exit(not jepa_audio.__file__.startswith(sys.prefix))'
test "$("$jepa_audio" configs | wc -l)" = "$recipes"
"$jepa_audio" configs copy demo/wavjepa -o copied.yaml
"$jepa_audio" data synth corpus --num_train 24 --num_valid 8 --num_test 8
small="--model.encoder.embed_dim 24 --model.encoder.num_heads 2 --model.encoder.depth 1 --model.targets.top_k 1"
small="$small --model.predictor.trunk.embed_dim 16 --model.predictor.trunk.num_heads 2 --model.predictor.trunk.depth 1"
small="$small --model.front_end.init_args.conv_layers [[8,10,5],[8,8,4],[8,4,4],[8,4,4]]"
small="$small --model.lr_schedule.init_args.warmup_steps 1 --data.batch_size 2 --data.num_workers 0"
small="$small --trainer.accelerator cpu --trainer.precision 32-true --trainer.max_steps 2 --trainer.val_check_interval 2"
# This folder has the name of a recipe; `--config wavjepa` must still find the recipe.
mkdir wavjepa
"$jepa_audio" fit --config wavjepa --data.root corpus/nsynth-train --run_dir wavjepa $small
"$jepa_audio" validate --config wavjepa/config.yaml --ckpt_path last
"$jepa_audio" export wavjepa wavjepa/checkpoints/last.ckpt -o published
"$jepa_audio" import wavjepa published -o imported
"$jepa_audio" probe --encoder imported/checkpoints/last.ckpt --tasks nsynth_instrument --data corpus --output probe \
  --preset linear --variants "[context]"
"$jepa_audio" report .
for file in copied.yaml wavjepa/config.yaml published/model.safetensors imported/config.yaml probe/results.jsonl report.html; do
  test -s "$file"
done
echo "test of the wheel: all files exist"
