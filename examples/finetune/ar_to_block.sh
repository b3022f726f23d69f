#!/usr/bin/env bash
# Turns an autoregressive model into a block-diffusion model (as Fast-dLLM v2 was made from Qwen2.5):
#   bash examples/finetune/ar_to_block.sh [MODEL_DIRECTORY FILE_WITH_PATHS_OF_TEXTS]
# for example with a Qwen2.5-7B directory on 8 GPUs. Without arguments the script trains a small random model on
# Python's own source code, on the CPU, in a minute or two, and writes a text with it. It writes
# {megatron,checkpoint,hf} under runs/ar_to_block, in a directory for each model and list of texts. The same command
# resumes. common.sh lists the environment variables.
#
# Blocks grow: with blocks of one token and --mdm-shift, the loss is the next-token loss that the model was trained
# with. The config.json of the result has the last size as mdm_block_size.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=${RUNS:-runs}/${RUN:-ar_to_block}
FAMILY=qwen2
source examples/finetune/common.sh

convert --add-mask-token
preprocess
if [ -n "$REAL" ]; then # 20 billion tokens, in batches of 2 million
    train --mdm-recipe ppots --mdm-block-size-schedule "0:1 500:4 1500:32" \
        --seq-length 4096 --micro-batch-size 2 --global-batch-size 512 --train-iters "${ITERS:-10000}" --lr 1e-5 \
        --lr-warmup-iters 500 --lr-decay-style cosine --min-lr 1e-6 --save-interval 1000 --eval-interval 500
    GENERATE=(torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node "$TP" tools/generate.py)
else
    ITERS=${ITERS:-200}
    train --mdm-recipe ppots --mdm-block-size-schedule "0:1 20:4 60:8" --lr 3e-3
    GENERATE=(python tools/generate.py --device cpu)
fi
echo "== a text, block by block"
"${GENERATE[@]}" --load "$RUN/checkpoint" --prompt "def read(" --length 32 2>"$RUN/generate.log" \
    || { say_failed "$RUN/generate.log"; exit 1; }
convert_back
