# Sourced by the examples that continue from a model of Hugging Face, with their arguments. Expects RUN, a
# directory; sets MODEL and TEXT. Without arguments: a small random model, Python's own source, the CPU.

MODEL=${1:-}
TEXT=${2:-}
mkdir -p "$RUN"
if [ -n "$MODEL" ]; then # the real thing, on GPUs
    REAL=yes
    GPUS=${GPUS:-8}
    HARDWARE=(--tensor-model-parallel-size "$GPUS" --sequence-parallel --bf16
        --use-distributed-optimizer)
    [ -n "$TEXT" ] || { echo "error: name a file with the paths of your texts after $MODEL" >&2; exit 2; }
else # the same steps
    REAL=
    GPUS=2
    HARDWARE=(--tensor-model-parallel-size 2 --mdm-device cpu)
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
    [ -e "$RUN/megatron" ] || python tools/convert_checkpoint.py --to megatron --input "$MODEL" \
        --output "$RUN/megatron" --verify "$@"
}

preprocess() { # FLAGS: tokenizes the files that $TEXT lists with the converted model's tokenizer
    echo "== data"
    [ -e "$RUN/text.idx" ] || python tools/preprocess_data.py --input-list "$TEXT" \
        --hf-tokenizer "$RUN/megatron/huggingface" --output-prefix "$RUN/text" "$@"
}

train() { # FLAGS: runs the launch line of the conversion, with these flags after its own
    echo "== training"
    local command
    command=$(sed -e "s#MY_RUN#$RUN/checkpoint#g" -e "s#MY_DATA#$RUN/text#" \
        -e "s#--nproc-per-node [0-9]*#--standalone --nproc-per-node $GPUS#" "$RUN/megatron/launch.txt")
    command+=" --split 95,5,0 --data-cache-path \"$RUN/cache\" \"\${HARDWARE[@]}\" \"\$@\""
    if [ -n "$REAL" ]; then
        eval "$command"
    else
        set -- --seq-length 64 --micro-batch-size 8 --global-batch-size 16 --train-iters 60 --lr 1e-3 \
            --lr-warmup-iters 10 --log-interval 10 --save-interval 60 --eval-interval 60 --eval-iters 4 "$@"
        eval "$command" >"$RUN/train.log" 2>&1 || { tail -n 20 "$RUN/train.log" >&2; exit 1; }
        grep -E "validation NELBO" "$RUN/train.log" | tail -n 1
    fi
}

convert_back() {
    echo "== back to Hugging Face"
    [ -e "$RUN/hf" ] || python tools/convert_checkpoint.py --to huggingface --input "$RUN/checkpoint" \
        --output "$RUN/hf"
}
