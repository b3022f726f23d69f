#!/usr/bin/env bash
# Fine-tunes a model on conversations, of which it learns the last answers:
#   bash examples/sft.sh [MODEL_DIRECTORY FILE_WITH_PATHS_OF_JSONL]
# for example with a LLaDA-8B-Base directory on 8 GPUs; each line of the JSONL files is
# {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}, rendered by the chat template of
# the model's tokenizer. Without arguments it takes a small random model and made-up
# conversations, and runs on the CPU in a minute or two. Writes runs/sft/{megatron,checkpoint,hf}.
#
# A row holds as many conversations as fit, none of which sees another. PACK=no takes LLaDA's own rows:
# one conversation each, filled up with its end, which is predicted too.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup.sh hf
RUN=runs/sft
FAMILY=llada
source examples/common.sh

ROWS=(--mdm-sft --mdm-normalization rows --mdm-recipe recommended)
if [ "${PACK:-yes}" = yes ]; then
    ROWS+=(--mdm-isolate-documents --mdm-rate-per document)
else
    ROWS+=(--mdm-pad-eligible)
fi

if [ -z "$REAL" ]; then # instead of the source code that the other examples take
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

convert
preprocess --messages-key messages
if [ -n "$REAL" ]; then # LLaDA's learning rate and batch; choose the iterations for three epochs
    train "${ROWS[@]}" --seq-length 4096 --micro-batch-size 2 --global-batch-size 256 --train-iters 3000 \
        --lr 2.5e-5 --lr-warmup-iters 50 --lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters 300 \
        --min-lr 2.5e-6 --weight-decay 0.1 --save-interval 500 --eval-interval 250
else
    train "${ROWS[@]}" --train-iters 200 --save-interval 200 --eval-interval 200 --lr 3e-3
    echo "== an answer"
    python tools/generate.py --load "$RUN/checkpoint" --device cpu --length 16 \
        --prompt $'user: Write name 3 times.\nassistant: ' 2>"$RUN/generate.log" \
        || { tail -n 3 "$RUN/generate.log" >&2; exit 1; }
fi
convert_back
