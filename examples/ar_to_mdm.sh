#!/usr/bin/env bash
# From an autoregressive model to a masked-diffusion model (as Dream came from Qwen2.5):
#   bash examples/ar_to_mdm.sh [MODEL_DIRECTORY FILE_WITH_PATHS_OF_TEXTS]
# for example with a Qwen2.5-7B directory on 8 GPUs. Without arguments it takes a small random model and Python's
# own source, and runs on the CPU in a minute or two. Writes runs/ar_to_mdm/{megatron,checkpoint,hf}.
#
# The logits keep predicting the next token (--mdm-shift), so that little has to be learned anew. In
# the small run attention opens from causal to bidirectional over its first part, which needs Megatron's
# local layers. The learning rate warms up again.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup.sh hf
RUN=runs/ar_to_mdm
mkdir -p $RUN
source examples/common.sh
[ -n "$MODEL" ] || tiny_model qwen2
[ -n "$TEXT" ] || some_text

echo "== conversion, with a mask token"
[ -e $RUN/megatron ] || python tools/convert_checkpoint.py --to megatron --input "$MODEL" \
    --output $RUN/megatron --add-mask-token --verify
echo "== data"
preprocess $RUN/megatron/huggingface
echo "== training"
if [ -n "${1:-}" ]; then # 20 billion tokens; batches of 2 million
    train --mdm-shift --mdm-recipe recommended --seq-length 4096 --micro-batch-size 4 \
        --global-batch-size 512 --train-iters 10000 --lr 1e-5 --lr-warmup-iters 500 \
        --lr-decay-style cosine --min-lr 1e-6 --save-interval 1000 --eval-interval 500
else
    train --mdm-shift --mdm-recipe recommended --mdm-anneal-attention-iters 20 --seq-length 64 \
        --micro-batch-size 8 --global-batch-size 16 --train-iters 60 --lr 1e-3 \
        --lr-warmup-iters 10 --log-interval 10 --save-interval 60 --eval-interval 60 --eval-iters 4 \
        >$RUN/train.log 2>&1 || { tail -n 20 $RUN/train.log >&2; exit 1; }
    grep -E "validation NELBO" $RUN/train.log | tail -n 1
fi
echo "== back to Hugging Face"
[ -e $RUN/hf ] || python tools/convert_checkpoint.py --to huggingface --input $RUN/checkpoint \
    --output $RUN/hf
