#!/usr/bin/env bash
# Set up, train and evaluate. Run again, it resumes.
#
#   ./run_local.sh                             a small network on the generated data set (3 minutes on 2 CPU cores with bf16)
#   ./run_local.sh CS                          the published recipe on Cityscapes in CS, on every visible GPU
#   ./run_local.sh CS ccnet 60000 769,769 1    the same with model (docs/models.md), steps, input size and OHEM (1 or 0)
#
# Environment variables:
#   IMAGENET       weights of the backbone: a file, or torchvision or timm:NAME to download them
#                  (default: dataset/resnet101-imagenet.pth, if it exists)
#   SNAPSHOT_DIR   folder of the run (default: snapshots, or snapshots/mini)
#   GPU            ids such as 0,1,2,3, or cpu (default: as many GPUs as divide the batch)
set -euo pipefail
invoked_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ $# -gt 5 ] || [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
    sed -n '2,12s/^# \{0,1\}//p' "$(basename "${BASH_SOURCE[0]}")"
    if [ $# -gt 5 ]; then exit 2; else exit 0; fi
fi
absolute() { (cd "$invoked_from" && realpath -m -- "$1"); }
if [ $# -gt 0 ]; then
    data=$(absolute "$1")
    if [ ! -d "$data" ]; then
        echo "run_local.sh: error: $1: no such directory; name the folder with leftImg8bit and gtFine" >&2
        exit 2
    fi
fi
. tools/setup_env.sh

gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
if [ $# = 0 ]; then
    data=data/mini snapshots=${SNAPSHOT_DIR:-snapshots/mini} steps=300
    device=(--gpu "${GPU:-$([ "$gpus" = 0 ] && echo cpu || echo 0)}")
    speed=(--amp auto --channels-last)
    "$PYTHON" -m dataset.mini "$data"
    "$PYTHON" train.py --data-dir "$data" --random-mirror --random-scale --backbone resnet50 --input-size 97,97 \
        --batch-size 4 --num-steps $steps --num-workers 1 --print-frequency 20 --save-state-every 50 \
        --snapshot-dir "$snapshots" --resume "${speed[@]}" "${device[@]}"
    "$PYTHON" evaluate.py --data-dir "$data" --restore-from "$snapshots/CS_scenes_$steps.pth" --whole \
        "${speed[@]}" "${device[@]}"
    exit
fi

model=${2:-ccnet} steps=${3:-60000} size=${4:-769,769} ohem=${5:-0} snapshots=${SNAPSHOT_DIR:-snapshots}
device=(--gpu "${GPU:-cpu}")
for ids in 0 0,1 0,1,2,3 0,1,2,3,4,5,6,7; do # their number divides the batch of 8
    count=$(tr -cd , <<<"$ids" | wc -c)
    if [ -z "${GPU:-}" ] && [ "$gpus" -gt "$count" ]; then device=(--gpu "$ids"); fi
done
imagenet=dataset/resnet101-imagenet.pth
case "${IMAGENET:-}" in
"") ;;
torchvision* | timm:*) imagenet=$IMAGENET ;; # the name of weights to download
*) imagenet=$(absolute "$IMAGENET") ;;
esac
restore=(--restore-from "$imagenet")
if [ ! -e "$imagenet" ] && [ -z "${IMAGENET:-}" ]; then
    echo "run_local.sh: $imagenet does not exist: training from random weights, far below the published scores;" \
        "IMAGENET=torchvision downloads other weights" >&2
    restore=()
fi
"$PYTHON" train.py --data-dir "$data" --model "$model" --random-mirror --random-scale "${restore[@]}" \
    --learning-rate 1e-2 --weight-decay 1e-4 --batch-size 8 --input-size "$size" --num-steps "$steps" \
    --ohem "$ohem" --ohem-thres 0.7 --ohem-keep 100000 --snapshot-dir "$snapshots" --resume "${device[@]}"
"$PYTHON" evaluate.py --data-dir "$data" --model "$model" --input-size "$size" \
    --restore-from "$snapshots/CS_scenes_$steps.pth" "${device[@]}"
