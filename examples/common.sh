# Sourced by the examples that continue from a model of Hugging Face. Sets MODEL, TEXT, RUN, and
# LAUNCH, the command that trains what `convert` converted.

# On a machine with GPUs the real thing; else the same steps on the CPU, with a small random model.
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    GPUS=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
    HARDWARE=(--bf16 --use-distributed-optimizer --sequence-parallel)
    LAYOUT=(--tensor-model-parallel-size "$GPUS")
else
    GPUS=2
    HARDWARE=(--mdm-device cpu)
    LAYOUT=(--tensor-model-parallel-size 2)
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
    eval "$command \"\${HARDWARE[@]}\" \"\${LAYOUT[@]}\" \"\$@\""
}
