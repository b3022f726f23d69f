#!/usr/bin/env bash
# From a fresh machine with Python 3.12 to a trained masked-diffusion model, on the CPU, in one go:
# sets up .venv, trains a tokenizer and a small model on the source code of Python's standard
# library (tensor parallel over 2 processes), and shows the validation loss before and after, a
# picture of it, and a sample of text. A second run reuses what is there, unless the library has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/setup.sh plot
source examples/progress.sh
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore # one thread a process: the processes share the cores

run=runs/quickstart
mkdir -p $run

python - >$run/files.txt <<'PYTHON'
import pathlib, sysconfig
root = pathlib.Path(sysconfig.get_paths()["stdlib"])
skipped = {"test", "tests", "site-packages", "idlelib", "lib2to3", "encodings", "pydoc_data"}
for path in sorted(root.rglob("*.py")):
    if not skipped & set(path.relative_to(root).parts) and path.stat().st_size:
        print(path)
PYTHON
echo "== tokenizer"
python tools/train_tokenizer.py --input-list $run/files.txt --output $run/tokenizer.model \
    --vocab-size 2048 --unless-done
echo "== data"
python tools/preprocess_data.py --input-list $run/files.txt --output-prefix $run/text \
    --tokenizer-model $run/tokenizer.model --unless-done

pretrain() { # the flags of both runs below; output goes to $run/$1.log, a summary to the terminal
    # --init-method-std: at Megatron's 0.02 so narrow a model learns frequencies of tokens alone for long; about
    # 1/sqrt(width) lets context reach the output from the start.
    local log=$run/$1.log
    shift
    # Without an address torchrun would ask for that of the machine's name, which not all machines know.
    run_logged "$log" torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2 -m megatron_mdm.pretrain \
        --mdm-device cpu --tensor-model-parallel-size 2 \
        --num-layers 4 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 352 \
        --seq-length 128 --max-position-embeddings 128 --position-embedding-type rope \
        --normalization RMSNorm --swiglu --disable-bias-linear \
        --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.088 \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model $run/tokenizer.model \
        --data-path $run/text --data-cache-path $run/cache --split 95,5,0 --num-workers 1 \
        --micro-batch-size 32 --global-batch-size 32 --train-iters 500 \
        --lr 3e-3 --min-lr 3e-4 --lr-warmup-iters 50 --lr-decay-style cosine \
        --weight-decay 0.1 --clip-grad 1.0 \
        --log-interval 20 --eval-interval 500 --eval-iters 16 \
        --tensorboard-dir $run/tensorboard "$@"
}

# The record of the data stands beside the checkpoint that was trained on them.
if ! cmp -s $run/text.json $run/checkpoint/data.json; then
    rm -rf $run/tensorboard $run/checkpoint
    echo "== validation before training"
    pretrain before --skip-train
    grep "validation NELBO" $run/before.log | tail -n 1
    echo "== training (500 steps; follow it with: tail -f $run/train.log)"
    pretrain train --save $run/checkpoint --save-interval 500
    cp $run/text.json $run/checkpoint/data.json
fi
echo "== result"
python tools/plot_run.py --tensorboard-dir $run/tensorboard --output $run/training.png
echo "== a sample"
python tools/generate.py --load $run/checkpoint --device cpu --prompt "def " --length 96 \
    --temperature 0.7 2>$run/generate.log || { say_failed $run/generate.log; exit 1; }
