# The examples that continue from a Hugging Face model source this file with their own arguments. They set RUN (a
# directory) and FAMILY first. This file sets MODEL and TEXT, and changes RUN to a subdirectory for this model and
# these texts. Without arguments it takes a small random model, Python's own source code and the CPU. A step is not
# repeated unless its model, texts or flags have changed. To resume a training that was interrupted, run the same
# command again.
#
# Environment variables, with their defaults in parentheses:
#   GPUS   number of GPUs of the machine (8)
#   TP     tensor-parallel size (4); it has to divide the attention heads and the query groups, which are 28 and 4
#          for Qwen2.5-7B
#   ITERS  iterations of a new training
#   RUNS   directory of all runs (runs)
#   RUN    name of the run in it (the name of the example); another name starts a new experiment, and two examples
#          must not share a name
#   SETUP  SETUP=no uses the active Python environment instead of .venv

source examples/progress.sh

stop() {
    echo "error: ${1//[[:cntrl:]]/?}" >&2
    exit 2
}

MODEL=${1:-}
TEXT=${2:-}
if [ -n "$MODEL" ]; then # a real model, on GPUs
    REAL=yes
    GPUS=${GPUS:-8}
    TP=${TP:-4}
    HARDWARE=(--tensor-model-parallel-size "$TP" --sequence-parallel --bf16) # launch.txt has the other flags
    [ -e "$MODEL/config.json" ] || stop "$MODEL is not a Hugging Face model directory: it has no config.json"
    [ -f "$TEXT" ] || stop "name a file with the paths of your texts after $MODEL"
    [ "${SETUP:-yes}" = no ] || [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1 \
        || stop "no GPU here, which $MODEL needs; SETUP=no uses the active environment and installs nothing"
    RUN=$RUN/$(basename "$MODEL")-$({ realpath "$MODEL" && cat "$TEXT"; } | sha256sum | cut -c1-8)
    source tools/setup.sh hf,gpu
    mkdir -p "$RUN"
else # the same steps with a small model, on the CPU
    REAL=
    GPUS=2
    TP=2
    HARDWARE=(--tensor-model-parallel-size 2 --mdm-device cpu)
    RUN=$RUN/tiny
    source tools/setup.sh hf
    mkdir -p "$RUN"
    export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
    MODEL=$RUN/model
    TEXT=$RUN/files.txt
    [ -e "$MODEL/config.json" ] || python examples/tiny_model.py --family "$FAMILY" --output "$MODEL"
    python -c 'import pathlib, sysconfig
for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("[a-f]*.py")): print(path)' \
        >"$TEXT"
fi

convert() { # FLAGS: converts the model to Megatron, with these flags
    echo "== conversion"
    local replace=--replace
    [ ! -e "$RUN/checkpoint" ] || replace= # never replace the model that a training started from
    python tools/convert_checkpoint.py --to megatron --input "$MODEL" --output "$RUN/megatron" \
        --pad-vocab-to-multiple-of "$TP" --verify --unless-done $replace "$@"
}

preprocess() { # FLAGS: tokenizes the files listed in $TEXT with the converted model's tokenizer
    echo "== data"
    local replace=
    [ ! -e "$RUN/checkpoint" ] || replace=--no-replace # never replace the data that a training started from
    python tools/preprocess_data.py --input-list "$TEXT" --hf-tokenizer "$RUN/megatron/huggingface" \
        --output-prefix "$RUN/text" --unless-done $replace "$@"
}

train() { # FLAGS: runs the command of the conversion's launch.txt, followed by these flags
    echo "== training"
    local command
    command=$(sed -e 's#MY_RUN#"$RUN/checkpoint"#g' -e 's#MY_DATA#"$RUN/text"#' \
        -e 's#--nproc-per-node [0-9]*#--standalone --local-addr 127.0.0.1 --nproc-per-node "$GPUS"#' \
        "$RUN/megatron/launch.txt")
    command+=' --split 95,5,0 --data-cache-path "$RUN/cache" "${HARDWARE[@]}" "$@"'
    if [ -n "$REAL" ]; then # of all checkpoints the last one stays, and one in 10000 iterations
        set -- --save-retain-interval 10000 "$@"
        eval "$command"
    else
        local iters=${ITERS:-60}
        set -- --seq-length 64 --micro-batch-size 8 --global-batch-size 16 --train-iters "$iters" --lr 1e-3 \
            --lr-warmup-iters $((iters / 6)) --log-interval 10 --save-interval "$iters" \
            --eval-interval "$iters" --eval-iters 4 "$@"
        run_command() { eval "$command"; } # the command refers to "$@"
        run_logged "$RUN/train.log" run_command "$@"
        grep -E "validation NELBO" "$RUN/train.log" | tail -n 1
    fi
}

convert_back() { # repeated if the training has continued since the last conversion
    echo "== back to Hugging Face"
    python tools/convert_checkpoint.py --to huggingface --input "$RUN/checkpoint" --output "$RUN/hf" \
        --unless-done --replace
}
