# Sourced by the examples that continue from a model of Hugging Face, with their arguments. Expects
# RUN, a directory; sets MODEL and TEXT, and runs what `convert_checkpoint.py` says to launch.

MODEL=${1:-}
TEXT=${2:-}
if [ -n "$MODEL" ]; then # the real thing, on GPUs
    GPUS=${GPUS:-8}
    HARDWARE=(--tensor-model-parallel-size "$GPUS" --sequence-parallel --bf16
        --use-distributed-optimizer)
    [ -n "$TEXT" ] || { echo "error: name a file with the paths of your texts after $MODEL" >&2; exit 2; }
else # the same steps with a small random model, on the CPU
    GPUS=2
    HARDWARE=(--tensor-model-parallel-size 2 --mdm-device cpu)
    export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
fi

tiny_model() { # FAMILY: a small random model in place of the one that was not given
    MODEL=$RUN/model
    [ -e "$MODEL/config.json" ] || python examples/tiny_model.py --family "$1" --output "$MODEL"
}

some_text() { # Python's own source in place of the text that was not given
    python -c 'import pathlib, sysconfig
for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("[a-f]*.py")): print(path)' \
        >"$RUN/files.txt"
    TEXT=$RUN/files.txt
}

preprocess() { # tokenizes the files that $TEXT lists with the converted model's tokenizer
    [ -e "$RUN/text.idx" ] || python tools/preprocess_data.py --input-list "$TEXT" \
        --hf-tokenizer "$1" --output-prefix "$RUN/text"
}

train() { # FLAGS: runs the launch line of the conversion, with these flags after its own
    local command
    command=$(sed -e "s#MY_RUN#$RUN/checkpoint#" -e "s#MY_DATA#$RUN/text#" \
        -e "s#--nproc-per-node [0-9]*#--standalone --nproc-per-node $GPUS#" "$RUN/megatron/launch.txt")
    eval "$command --split 95,5,0 --data-cache-path \"$RUN/cache\" \"\${HARDWARE[@]}\" \"\$@\""
}
