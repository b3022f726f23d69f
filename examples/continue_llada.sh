#!/usr/bin/env bash
# Continues the pretraining of a LLaDA model:
#   bash examples/continue_llada.sh [MODEL_DIRECTORY FILE_WITH_PATHS_OF_TEXTS]
# for example with a LLaDA-8B-Base directory on 8 GPUs. Without arguments it takes a small random model and
# Python's own source, and runs on the CPU in a minute or two. Writes
# runs/continue_llada/{megatron,checkpoint,hf}.
#
# LLaDA was trained with row lengths of 4096 and learning rates down to 1e-5: warm up again from there.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup.sh hf
RUN=runs/continue_llada
mkdir -p $RUN
source examples/common.sh
[ -n "$MODEL" ] || tiny_model llada
[ -n "$TEXT" ] || some_text

echo "== conversion"
[ -e $RUN/megatron ] || python tools/convert_checkpoint.py --to megatron --input "$MODEL" \
    --output $RUN/megatron --verify
echo "== data"
preprocess $RUN/megatron/huggingface
echo "== training"
if [ -n "${1:-}" ]; then
    train --mdm-recipe recommended --seq-length 4096 --micro-batch-size 4 --global-batch-size 256 \
        --train-iters 5000 --lr 1e-5 --lr-warmup-iters 200 --lr-decay-style cosine --min-lr 1e-6 \
        --save-interval 500 --eval-interval 250
else
    train --mdm-recipe recommended --seq-length 64 --micro-batch-size 8 --global-batch-size 16 \
        --train-iters 60 --lr 1e-3 --lr-warmup-iters 10 --log-interval 10 --save-interval 60 \
        --eval-interval 60 --eval-iters 4 \
        >$RUN/train.log 2>&1 || { tail -n 20 $RUN/train.log >&2; exit 1; }
    grep -E "validation NELBO" $RUN/train.log | tail -n 1
fi
echo "== back to Hugging Face"
[ -e $RUN/hf ] || python tools/convert_checkpoint.py --to huggingface --input $RUN/checkpoint \
    --output $RUN/hf
