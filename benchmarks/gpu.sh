#!/usr/bin/env bash
# What a GPU makes of a job and of its results, within ten minutes: the stages of a job and its memory, the speed of the
# smaller models in bfloat16 and under torch.compile, whether CPU and GPU plan the same and expect the same loss, what
# --offload takes and saves, and, in the time that is left, the speed of int8, beside torchao if it is installed.
# Without a GPU the same runs on the CPU, on a tiny model, to show that everything is there.
#
#     bash benchmarks/gpu.sh                        # ViT-B shapes, random weights and images
#     bash benchmarks/gpu.sh MODEL CALIBRATION      # a checkpoint, and samples for it
#
# PYTHON is the interpreter (default: python).
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
python=${PYTHON:-python}

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    device=cuda shape=b blocks=12 samples=256 checked=32 batches=(1 64) repeats=50 fractions=(0.7 0.5)
else
    echo "No GPU is there: everything runs on the CPU, on a tiny model, and the figures mean nothing."
    device=cpu shape=tiny blocks=2 samples=8 checked=8 batches=(1 2) repeats=2 fractions=(0.5)
fi

of_job=(--random "$shape" --blocks "$blocks")
of_speed=(--random "$shape" --blocks "$blocks")
if [ $# -eq 2 ]; then
    of_job=(--model "$1" --calibration "$2")
    of_speed=(--model "$1")
elif [ $# -ne 0 ]; then
    echo "usage: bash benchmarks/gpu.sh [MODEL CALIBRATION]" >&2
    exit 2
fi

"$python" "$here/stages.py" "${of_job[@]}" --samples "$samples" --device "$device" \
    --jobs 'keep=0.7' 'keep=0.7 fast=true' 'bits=3'
echo
"$python" "$here/speed.py" "${of_speed[@]}" --device "$device" --dtype bfloat16 --compile --batches "${batches[@]}" \
    --fractions "${fractions[@]}" --repeats "$repeats" --warmup 2
echo
"$python" "$here/agreement.py" "${of_job[@]}" --samples "$checked" --devices cpu "$device"
echo
if [ "$device" = cuda ]; then # its blocks on the GPU one at a time: time and peak memory beside those of the first table
    "$python" "$here/stages.py" "${of_job[@]}" --samples "$checked" --device "$device" \
        --jobs 'keep=0.7 precision=no' 'keep=0.7 precision=no offload=true'
    echo
fi
# int8 comes last: on a GPU it has the rest of the ten minutes, and elsewhere as long as it takes
left=$((580 - SECONDS > 1 ? 580 - SECONDS : 1))
[ "$device" = cuda ] || left=0
timeout "$left" "$python" "$here/speed.py" "${of_speed[@]}" --integers --device "$device" --dtype bfloat16 \
    --compile --batches "${batches[@]}" --fractions 0.5 --repeats "$repeats" --warmup 2 || {
    [ $? -eq 124 ] && echo "The ten minutes were over before all of int8 was timed."
}
