#!/usr/bin/env bash
# From a fresh machine with Python 3.12 to a trained masked-diffusion model, on the CPU, in one go:
#   bash examples/quickstart.sh               five minutes on two cores, and some for the installation
#   bash examples/quickstart.sh --minutes 60  the same model, trained for longer
# It sets up .venv, trains a tokenizer and a small model on the source code of Python's standard library (2 data-parallel
# ranks), draws the loss, measures 20 samples, fills a gap and draws the order of decoding. The same command reuses what
# is there, and continues an interrupted training from its last checkpoint. Other minutes or a changed library train anew.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "error: $1" >&2
    exit 2
}
interrupted() { # bash runs this when the training has ended
    # shellcheck disable=SC2046
    kill $(jobs -p) 2>/dev/null || true # the progress
    echo "interrupted: the same command continues from the last checkpoint" >&2
    exit 130
}
minutes=5
while [ $# -gt 0 ]; do
    case $1 in
        --minutes)
            [[ ${2:-} =~ ^[1-9][0-9]{0,3}$ ]] || fail "--minutes${2:+ $2}: give a whole number from 3 to 9999"
            minutes=$2
            shift
            ;;
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' examples/quickstart.sh
            exit
            ;;
        *) fail "$1: no such flag; the only one is --minutes N (5 without it)" ;;
    esac
    shift
done
[ "$minutes" -ge 3 ] || fail "--minutes $minutes: give a whole number from 3 to 9999"

source tools/setup.sh plot
source examples/progress.sh
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore # one thread a process: the processes share the cores
python -c 'import matplotlib' 2>/dev/null || fail "the pictures need matplotlib: pip install matplotlib"
python=.venv/bin/python
[ "${SETUP:-yes}" != no ] || python=python # as the commands at the end name it

run=runs/quickstart
mkdir -p $run
# On two quiet cores a training step takes about 0.1 s, and everything else about 120 s.
steps=$(((minutes * 60 - 120) * 10))

# The last twentieth of the files is held out.
python - $run/text.txt $run/held_out.txt <<'PYTHON'
import pathlib, sys, sysconfig
root = pathlib.Path(sysconfig.get_paths()["stdlib"])
skipped = {"test", "tests", "site-packages", "idlelib", "lib2to3", "encodings", "pydoc_data"}
files = [
    f"{path}\n"
    for path in sorted(root.rglob("*.py"))
    if not skipped & set(path.relative_to(root).parts) and path.stat().st_size
]
number = round(0.95 * len(files))
for name, part in zip(sys.argv[1:], (files[:number], files[number:])):
    pathlib.Path(name).write_text("".join(part))
PYTHON
echo "== tokenizer"
python tools/train_tokenizer.py --input-list $run/text.txt --output $run/tokenizer.model \
    --vocab-size 1024 --unless-done
echo "== data"
for part in text held_out; do
    python tools/preprocess_data.py --input-list $run/$part.txt --output-prefix $run/$part \
        --tokenizer-model $run/tokenizer.model --unless-done 2>$run/data.log || { say_failed $run/data.log; exit 1; }
done

# --init-method-std: with Megatron's 0.02 so narrow a model learns only the frequencies of tokens for long. With about
# 1/sqrt(width) context reaches the output from the start.
flags=(
    --mdm-device cpu --mdm-recipe clipped
    --num-layers 4 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 352
    --seq-length 128 --max-position-embeddings 128 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.08
    --tokenizer-type SentencePieceTokenizer --tokenizer-model $run/tokenizer.model
    --train-data-path $run/text --valid-data-path $run/held_out --data-cache-path $run/cache --num-workers 1
    --micro-batch-size 8 --global-batch-size 16 --train-iters $steps
    --lr 3e-3 --min-lr 3e-4 --lr-warmup-iters 50 --lr-decay-style cosine
    --weight-decay 0.1 --clip-grad 1.0
    --log-interval 20 --eval-interval $((steps / 4)) --eval-iters 16
    --save-interval 500 --save-retain-interval $((500 * steps))
)
{
    printf '%s\n' "${flags[@]}"
    cat $run/text.json $run/held_out.json
} >$run/settings.new
latest=$run/checkpoint/latest_checkpointed_iteration.txt
if cmp -s $run/settings.new $run/settings.txt; then
    rm $run/settings.new
else
    [ ! -e $latest ] \
        || echo "the minutes, the settings or the library have changed: trains anew, and replaces $run/checkpoint" >&2
    rm -rf $run/tensorboard $run/checkpoint
    mv $run/settings.new $run/settings.txt
fi
if [ "$(cat $latest 2>/dev/null)" != "$steps" ]; then
    if [ -e $latest ]; then
        flags+=(--load $run/checkpoint)
    else
        rm -rf $run/tensorboard # of a training that was interrupted before its first checkpoint
    fi
    echo "== training ($steps steps; follow it with: tail -f $run/train.log)"
    # Without an address torchrun would ask for that of the machine's name, which not all machines know.
    trap interrupted INT
    run_logged $run/train.log torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2 \
        -m megatron_mdm.pretrain "${flags[@]}" --tensorboard-dir $run/tensorboard --save $run/checkpoint
    trap - INT
fi
echo "== result"
python tools/plot_run.py --tensorboard-dir $run/tensorboard --output $run/training.png

sampling=(--length 48 --temperature 0.4 --block-length 12)
gaps="class Teapot:
    def<mask>init<mask>self, water):
<mask>self.water =<mask>
<mask>self.tea = None

    def<mask>(self):
        if self.water is<mask>:
            raise<mask>('no water')
        return self.tea
"
say() { # COMMAND...: runs it with its messages in a log
    "$@" 2>$run/tool.log || { say_failed $run/tool.log; exit 1; }
}
echo "== 20 samples, none chosen (their measures: python examples/quickstart_samples.py --help)"
say python examples/quickstart_samples.py --load $run/checkpoint --device cpu --training $run/text.txt \
    --held-out $run/held_out "${sampling[@]}" --json $run/samples.json
echo "== gaps filled from the text before and after them, the surest first (the order: $run/decoding.png)"
echo "$gaps" # a token has its space in front of it
echo "becomes"
say python tools/generate.py --load $run/checkpoint --device cpu --prompt "$gaps" --length 0 --picture $run/decoding.png
cat <<NEXT
== next
$python tools/generate.py --load $run/checkpoint --device cpu --length 0 --show \\
    --prompt "if self.name is<mask>: raise<mask>('no name')"
$python tools/variance_report.py --load $run/checkpoint --device cpu --data $run/held_out \\
    --rows 50 --output $run/variance.json
NEXT
[ "$minutes" -ge 60 ] || echo "bash examples/quickstart.sh --minutes 60   # trains anew, and replaces this checkpoint"
