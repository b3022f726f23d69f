# Sourced by the examples that continue from a model of Hugging Face, with their arguments. Expects RUN, a
# directory, and FAMILY; sets MODEL and TEXT, and RUN to a part of it that belongs to these two alone. Without
# arguments: a small random model, Python's own source, the CPU. What is there is not made again unless its model,
# texts or flags have changed, and a training that broke off goes on from its last checkpoint: run the same command
# again.
#
# Environment: GPUS of the machine (8); TP, over how many each copy of the model is spread (4: it has to divide
# the attention heads and the query groups, of which Qwen2.5-7B has 28 and 4); ITERS, of a new training; RUNS,
# where to write (runs); RUN, the name of the run there (that of the example), with which another experiment begins
# anew, and which belongs to one example alone; SETUP=no takes the active environment instead of .venv.

source examples/progress.sh

stop() {
    echo "error: ${1//[[:cntrl:]]/?}" >&2
    exit 2
}

MODEL=${1:-}
TEXT=${2:-}
if [ -n "$MODEL" ]; then # the real thing, on GPUs
    REAL=yes
    GPUS=${GPUS:-8}
    TP=${TP:-4}
    HARDWARE=(--tensor-model-parallel-size "$TP" --sequence-parallel --bf16) # the launch line has the rest
    [ -e "$MODEL/config.json" ] || stop "$MODEL is no model directory of Hugging Face: it has no config.json"
    [ -f "$TEXT" ] || stop "name a file with the paths of your texts after $MODEL"
    RUN=$RUN/$(basename "$MODEL")-$({ realpath "$MODEL" && cat "$TEXT"; } | sha256sum | cut -c1-8)
    source tools/setup.sh hf,gpu
    mkdir -p "$RUN"
else # the same steps
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

convert() { # FLAGS: to Megatron, with these flags
    echo "== conversion"
    local replace=--replace
    [ ! -e "$RUN/checkpoint" ] || replace= # never what a training began with
    python tools/convert_checkpoint.py --to megatron --input "$MODEL" --output "$RUN/megatron" \
        --pad-vocab-to-multiple-of "$TP" --verify --unless-done $replace "$@"
}

preprocess() { # FLAGS: tokenizes the files that $TEXT lists with the converted model's tokenizer
    echo "== data"
    local replace=
    [ ! -e "$RUN/checkpoint" ] || replace=--no-replace # never what a training began with
    python tools/preprocess_data.py --input-list "$TEXT" --hf-tokenizer "$RUN/megatron/huggingface" \
        --output-prefix "$RUN/text" --unless-done $replace "$@"
}

train() { # FLAGS: runs the launch line of the conversion, with these flags after its own
    echo "== training"
    local command
    command=$(sed -e 's#MY_RUN#"$RUN/checkpoint"#g' -e 's#MY_DATA#"$RUN/text"#' \
        -e 's#--nproc-per-node [0-9]*#--standalone --local-addr 127.0.0.1 --nproc-per-node "$GPUS"#' \
        "$RUN/megatron/launch.txt")
    command+=' --split 95,5,0 --data-cache-path "$RUN/cache" "${HARDWARE[@]}" "$@"'
    if [ -n "$REAL" ]; then
        eval "$command"
    else
        local iters=${ITERS:-60}
        set -- --seq-length 64 --micro-batch-size 8 --global-batch-size 16 --train-iters "$iters" --lr 1e-3 \
            --lr-warmup-iters $((iters / 6)) --log-interval 10 --save-interval "$iters" \
            --eval-interval "$iters" --eval-iters 4 "$@"
        run_command() { eval "$command"; } # which refers to "$@"
        run_logged "$RUN/train.log" run_command "$@"
        grep -E "validation NELBO" "$RUN/train.log" | tail -n 1
    fi
}

convert_back() { # anew if the training has gone on since
    echo "== back to Hugging Face"
    python tools/convert_checkpoint.py --to huggingface --input "$RUN/checkpoint" --output "$RUN/hf" \
        --unless-done --replace
}
