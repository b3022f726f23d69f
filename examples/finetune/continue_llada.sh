#!/usr/bin/env bash
# Continues the pretraining of a LLaDA model:
#   bash examples/finetune/continue_llada.sh [MODEL_DIRECTORY FILE_WITH_PATHS_OF_TEXTS]
# for example with a LLaDA-8B-Base directory on 8 GPUs. Without arguments it takes a small random model and
# Python's own source, and runs on the CPU in a minute or two. Writes {megatron,checkpoint,hf} under
# runs/continue_llada, in a directory for each model and list of texts; the same command goes on where it was.
# common.sh says what may stand in the environment.
#
# LLaDA was trained with row lengths of 4096 and learning rates down to 1e-5: warm up again from there.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=${RUNS:-runs}/${RUN:-continue_llada}
FAMILY=llada
source examples/finetune/common.sh

convert
preprocess
if [ -n "$REAL" ]; then
    train --mdm-recipe recommended --seq-length 4096 --micro-batch-size 4 --global-batch-size 256 \
        --train-iters "${ITERS:-5000}" --lr 1e-5 --lr-warmup-iters 200 --lr-decay-style cosine --min-lr 1e-6 \
        --save-interval 500 --eval-interval 250
else
    train --mdm-recipe recommended
fi
convert_back
