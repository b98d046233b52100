#!/usr/bin/env bash
# What one GPU has to show, in ten minutes: the tests that need it, a layer beside dense and other libraries', a step
# beside its dense twins (images/s, MFU, peak memory, energy), and an epoch of Imagenette from a ViT-S.
#
#   bash benchmarks/gpu.sh [--dry-run] [STEP ...]     STEP: tests, layer, train, epoch; without, all of them
#
#   PYTHON      with torch for CUDA, timm, lightning and pytest (python3); nothing is installed or downloaded
#   OUT         folder of the records (runs/gpu; in a dry run runs/gpu-dry-run)
#   IMAGENETTE  its folder, for epoch; or synthetic_pets, drawn by code, as a stand-in
#   VIT         what epoch starts from: a .safetensors file or a model's folder
#
# A step that is done isn't done again on the same commit (OUT/steps.tsv). Exit code 0: every step asked for is done; 1:
# one failed, ran out of time or was skipped for want of data; 2: nothing could run. A dry run takes toy sizes on the
# CPU; its records say "dry_run": true and measure nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
refuse() { echo "gpu.sh: $*" >&2; exit 2; }

mode=gpu
if [ "${1:-}" = --dry-run ]; then mode=dry-run; shift; fi
[ $# -gt 0 ] || set -- tests layer train epoch
for name; do [[ $name =~ ^(tests|layer|train|epoch)$ ]] || refuse "there is no step $name, see its head."; done
if [ $mode = gpu ]; then
  layer=(--device cuda --tokens 4160 65536 --width 192 768 --experts 8 32 --precision bf16)
  train=(vit_moe_small_patch16_224 --device cuda --batch-size 256 --precision bf16 --memory-runs 1)
  fit=(--trainer.accelerator gpu --trainer.precision bf16-mixed --data.image_size 112) quick='' slack=1
else
  OUT=${OUT:-runs/gpu-dry-run} IMAGENETTE=${IMAGENETTE:-synthetic_pets} VIT=${VIT:-moevision/demo/models/pets/dense}
  layer=(--device cpu --quick) train=(test_vit_moe --device cpu --image-size 32 --quick) quick=--quick slack=5
  fit=(--trainer.accelerator cpu --data.train_size 64 --data.val_size 16 --data.test_size 16)
fi
PYTHON=${PYTHON:-python3} OUT=${OUT:-runs/gpu} OUT=${OUT%/} IMAGENETTE=${IMAGENETTE:-} VIT=${VIT:-}
export quick PYTHON OUT IMAGENETTE VIT PYTHONUNBUFFERED=1

missing=$("$PYTHON" -c 'import importlib.util as u, sys; print(*(n for n in sys.argv[1:] if not u.find_spec(n)))' \
  torch torchvision timm lightning jsonargparse torchmetrics safetensors scipy sklearn matplotlib rich jinja2 yaml PIL \
  filelock pytest hypothesis) || refuse "$PYTHON does not run: let PYTHON name an interpreter."
[ -z "$missing" ] || refuse "$PYTHON lacks $missing: let PYTHON name an interpreter that has them."
[ $mode = dry-run ] || "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  refuse "torch of $PYTHON finds no CUDA device here; --dry-run does without."
commit=$(git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null || echo unknown)
[[ $commit =~ ^[0-9a-f]{40}$ ]] || echo "note: commit $commit; records for pages need a commit without changes."
mkdir -p "$OUT" || refuse "let OUT name a folder that can be written."
mapfile -t tests < <(grep -rlE 'mark\.gpu\b' tests benchmarks --include 'test_*.py')

key() { printf '%s\t%s\t%s\t' "$mode" "$commit" "$1"; } # a line of steps.tsv; then state, seconds, result, record
latest() { grep -sF "$(key "$1")" "$OUT/steps.tsv" | tail -n 1; }
step() { # NAME, RECORD, pattern of the line that tells the result, SECONDS at most, command ...
  local record=$OUT/$2 began=$SECONDS state=failed status=0 result
  [[ $(latest "$1") != *$'\t'ok$'\t'* ]] || return 0
  rm -f "$record"
  echo "== $1, at most $(($4 * slack)) s"
  timeout --kill-after 10 $(($4 * slack)) "${@:5}" 2>&1 | tee "$OUT/last.txt" || status=$?
  case $status in 0) [ ! -s "$record" ] || state=ok ;; 9) state=skipped ;; 124 | 137) state="out of time" ;; esac
  result=$(grep -m1 -E "$3" "$OUT/last.txt" | sed 's/│/ /g' | tr -s ' \t' ' ')
  printf '%s%s\t%s\t%s\t%s\n' "$(key "$1")" "$state" $((SECONDS - began)) "${result:--}" "$record" >>"$OUT/steps.tsv"
}
# shellcheck disable=SC2329  # bash -c calls it, within its time
epoch() { # options of fit
  if [ ! -e "$VIT" ] || { [ ! -d "$IMAGENETTE" ] && [ "$IMAGENETTE" != synthetic_pets ]; }; then
    echo "gpu-epoch: IMAGENETTE ('$IMAGENETTE') must name a folder of images, and VIT ('$VIT') weights." && exit 9
  fi
  rm -rf "$OUT-epoch"
  local run=(--trainer.max_epochs 1 --runs_root "$OUT-epoch" --name gpu-epoch)
  "$PYTHON" -m moevision fit "$IMAGENETTE" --pretrained "$VIT" "${run[@]}" "$@" || exit 1
  "$PYTHON" -m benchmarks accuracy "$OUT-epoch/gpu-epoch" --out "$OUT/epoch.jsonl" ${quick:+"$quick"}
}
export -f epoch
for name; do
  case $name in
    tests) step tests tests.xml ' in [0-9.]+s$' 90 "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider \
      --junitxml "$OUT/tests.xml" -o junit_suite_name=$mode "${tests[@]}" ;;
    layer) step layer benchmark-layer.json '│ moe' 90 "$PYTHON" -m benchmarks layer "${layer[@]}" --out "$OUT" ;;
    train) step train benchmark-train.json '│ MoE' 240 "$PYTHON" -m benchmarks train "${train[@]}" --out "$OUT" ;;
    epoch) step epoch epoch.jsonl '^gpu-epoch: ' 150 bash -c 'epoch "$@"' - "${fit[@]}" ;;
  esac
done

printf '\n%-6s %-11s %7s  %s\n' step state seconds 'result (record)'
status=0
for name; do
  IFS=$'\t' read -r _ _ _ state seconds result record <<<"$(latest "$name")"
  printf '%-6s %-11s %7s  %s\n' "$name" "$state" "$seconds" "$result ($record)"
  [ "$state" = ok ] || status=1
done
[ $mode = gpu ] || { echo "A dry run measures nothing: its records stay where they are."; exit $status; }
cat <<END
To keep the records, and rewrite the pages that quote them (a new number needs a claim in benchmarks/records/pages/):
  mkdir -p benchmarks/layer/gpu benchmarks/train/gpu && cp "$OUT"/benchmark-layer.* benchmarks/layer/gpu/
  cp "$OUT/benchmark-train.json" benchmarks/train/gpu/ && cp "$OUT/epoch.jsonl" benchmarks/accuracy/gpu.jsonl
  python -m benchmarks records
END
exit $status
