#!/usr/bin/env bash
# Turns an autoregressive model into a masked-diffusion model (as Dream was made from Qwen2.5):
#   bash examples/finetune/ar_to_mdm.sh [MODEL_DIRECTORY FILE_WITH_PATHS_OF_TEXTS]
# for example with a Qwen2.5-7B directory on 8 GPUs. Without arguments the script trains a small random model on
# Python's own source code, on the CPU, in a minute or two. It writes {megatron,checkpoint,hf} under runs/ar_to_mdm,
# in a directory for each model and list of texts. The same command resumes. common.sh lists the environment
# variables.
#
# The logits keep predicting the next token (--mdm-shift), so that the model has little to relearn. The small run
# anneals attention from causal to bidirectional in its first 20 iterations; annealing needs Megatron's local
# layers. The learning rate warms up again.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=${RUNS:-runs}/${RUN:-ar_to_mdm}
FAMILY=qwen2
source examples/finetune/common.sh

convert --add-mask-token
preprocess
if [ -n "$REAL" ]; then # 20 billion tokens, in batches of 2 million
    train --mdm-recipe ppots --seq-length 4096 --micro-batch-size 4 --global-batch-size 512 \
        --train-iters "${ITERS:-10000}" --lr 1e-5 --lr-warmup-iters 500 --lr-decay-style cosine --min-lr 1e-6 \
        --save-interval 1000 --eval-interval 500
else
    train --mdm-recipe ppots --mdm-anneal-attention-iters 20
fi
convert_back
