#!/usr/bin/env bash
# Continues the pretraining of a LLaDA model:
#   bash examples/finetune/continue_llada.sh [MODEL_DIRECTORY FILE_WITH_PATHS_OF_TEXTS]
# for example with a LLaDA-8B-Base directory on 8 GPUs. Without arguments the script trains a small random model on
# Python's own source code, on the CPU, in a minute or two. It writes {megatron,checkpoint,hf} under
# runs/continue_llada, in a directory for each model and list of texts. The same command resumes. common.sh lists
# the environment variables.
#
# LLaDA was trained with rows of 4096 tokens, and its learning rate ended at 1e-5. This script warms up to 1e-5 again.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=${RUNS:-runs}/${RUN:-continue_llada}
FAMILY=llada
source examples/finetune/common.sh

convert
preprocess
if [ -n "$REAL" ]; then
    train --mdm-recipe ppots --seq-length 4096 --micro-batch-size 4 --global-batch-size 256 \
        --train-iters "${ITERS:-5000}" --lr 1e-5 --lr-warmup-iters 200 --lr-decay-style cosine --min-lr 1e-6 \
        --save-interval 500 --eval-interval 250
else
    train --mdm-recipe ppots
fi
convert_back
