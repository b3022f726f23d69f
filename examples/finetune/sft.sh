#!/usr/bin/env bash
# Fine-tunes a model on conversations; the model learns the last answer of each:
#   bash examples/finetune/sft.sh [MODEL_DIRECTORY FILE_WITH_PATHS_OF_JSONL]
# for example with a LLaDA-8B-Base directory on 8 GPUs. Each line of the JSONL files is
# {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}; the chat template of the model's
# tokenizer renders it. Without arguments the script trains a small random model on generated conversations, on the
# CPU, in a minute or two. It writes {megatron,checkpoint,hf} under runs/sft, in a directory for each model and list
# of files. The same command resumes. common.sh lists the environment variables.
#
# By default a row holds one conversation and is padded with end tokens, which the model also learns to predict, as
# in LLaDA. With PACK=yes a row holds as many conversations as fit, without attention between them; each answer is
# padded to whole blocks of BLOCK tokens (64), and generation uses the same --block-length.
set -euo pipefail
cd "$(dirname "$0")/../.."
RUN=${RUNS:-runs}/${RUN:-sft}
FAMILY=llada
[ "${PACK:-no}" = no ] || RUN=$RUN-packed
source examples/finetune/common.sh

if [ -z "$REAL" ]; then # short conversations, instead of the source code that the other examples use
    BLOCK=${BLOCK:-16}
    python - >"$RUN/chats.jsonl" <<'PYTHON'
import json, random
random.seed(0)
words = ["class", "return", "import", "self", "name", "value", "error", "print", "list", "string"]
for _ in range(4000):
    word, times = random.choice(words), random.randint(2, 4)
    question = {"role": "user", "content": f"Write {word} {times} times."}
    answer = {"role": "assistant", "content": " ".join([word] * times)}
    print(json.dumps({"messages": [question, answer]}))
PYTHON
    echo "$RUN/chats.jsonl" >"$TEXT"
fi

ROWS=(--mdm-sft --mdm-normalization rows --mdm-recipe ppots)
if [ "${PACK:-no}" = no ]; then
    ROWS+=(--mdm-pad-eligible)
    CANVAS=(--length 32)
else
    BLOCK=${BLOCK:-64}
    ROWS+=(--mdm-isolate-documents --mdm-rate-per document --mdm-pad-response-to-multiple-of "$BLOCK")
    CANVAS=(--length "$BLOCK" --block-length "$BLOCK")
    LENGTH=128 # row length of the small model
fi

convert
preprocess --messages-key messages
if [ -n "$REAL" ]; then # LLaDA's learning rate and batch size; choose ITERS for three epochs
    train "${ROWS[@]}" --seq-length 4096 --micro-batch-size 2 --global-batch-size 256 \
        --train-iters "${ITERS:-3000}" --lr 2.5e-5 --min-lr 2.5e-6 --lr-warmup-iters 50 --lr-decay-style WSD \
        --lr-wsd-decay-style linear --lr-wsd-decay-iters 300 --weight-decay 0.1 --save-interval 500 --eval-interval 250
else
    ITERS=${ITERS:-200}
    train "${ROWS[@]}" --lr 3e-3 --seq-length "${LENGTH:-64}"
    echo "== an answer"
    python tools/generate.py --load "$RUN/checkpoint" --device cpu "${CANVAS[@]}" \
        --prompt $'user: Write name 3 times.\nassistant: ' 2>"$RUN/generate.log" \
        || { say_failed "$RUN/generate.log"; exit 1; }
fi
convert_back
