#!/usr/bin/env bash
# From an autoregressive model to a masked-diffusion model (as Dream came from Qwen2.5):
#   bash examples/finetune/ar_to_mdm.sh [MODEL_DIRECTORY FILE_WITH_PATHS_OF_TEXTS]
# for example with a Qwen2.5-7B directory on 8 GPUs. Without arguments it takes a small random model and Python's
# own source, and runs on the CPU in a minute or two. Writes {megatron,checkpoint,hf} under runs/ar_to_mdm, in a
# directory for each model and list of texts; the same command goes on where it was. common.sh says what may stand
# in the environment.
#
# The logits keep predicting the next token (--mdm-shift), so that little has to be learned anew. In
# the small run attention opens from causal to bidirectional over its first part, which needs Megatron's
# local layers. The learning rate warms up again.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=${RUNS:-runs}/${RUN:-ar_to_mdm}
FAMILY=qwen2
source examples/finetune/common.sh

convert --add-mask-token
preprocess
if [ -n "$REAL" ]; then # 20 billion tokens; batches of 2 million
    train --mdm-recipe recommended --seq-length 4096 --micro-batch-size 4 --global-batch-size 512 \
        --train-iters "${ITERS:-10000}" --lr 1e-5 --lr-warmup-iters 500 --lr-decay-style cosine --min-lr 1e-6 \
        --save-interval 1000 --eval-interval 500
else
    train --mdm-recipe recommended --mdm-anneal-attention-iters 20
fi
convert_back
