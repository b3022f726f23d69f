#!/usr/bin/env bash
# Tests and measures this project on one GPU, in at most SECONDS seconds (default 545).
#
#   bash device.sh [SECONDS]          in the root of the checkout, or with PROJECT=path of the checkout
#
# The stages below run one after the other, each with a time limit of its own. The folder
# $GPUKIT_STATE records which stages are done, and the same command continues with the rest. After
# each stage the results so far are in $OUT: read summary.txt first; all.tar.gz has all logs.
#
#   DRY=1                 runs on a CPU with tiny models, to show that the stages work
#   STAGES="train bench"  runs only these stages, after `install`
#   AGAIN="train"         repeats these stages
#   KEEP_GOING=1          continues although no way of training works
#   WORKERS, ROUNDS       processes of pytest; rounds of the benchmark
set -uo pipefail
begun=$(date +%s)
seconds=${1:-545}
KIT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
WHEELS=$(cd "${WHEELS:-$KIT/wheels}" && pwd)
PROJECT=$(cd "${PROJECT:-.}" && pwd)
OUT=${OUT:-gpukit-out}
OUT=$(mkdir -p "$OUT" && cd "$OUT" && pwd)
STATE=${GPUKIT_STATE:-/tmp/gpukit}
LOGS=$STATE/logs
SITE=$STATE/site # the libraries that the machine lacks
DRY=${DRY:-}
if [ -n "$DRY" ]; then slower=6; else slower=1; fi # time limits on a CPU are this many times longer
PYTHON=$(command -v python3 || command -v python)
mkdir -p "$STATE/done" "$LOGS" "$SITE"
touch "$STATE/environment.sh" "$STATE/flags" "$STATE/summary.txt"

export WHEELS PROJECT OUT DRY GPUKIT_STATE=$STATE
export PYTHONPATH=$SITE:$PROJECT:$PROJECT/tools${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export HOME=${HOME:-/root}
# A single rank only needs the loopback interface.
export NCCL_SOCKET_IFNAME=lo GLOO_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 NCCL_NVLS_ENABLE=0
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# All processes share the compiler's caches. There are many processes, so each compiles with few workers.
export TORCHINDUCTOR_CACHE_DIR=$STATE/inductor TRITON_CACHE_DIR=$STATE/triton
export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-4}
export CUDA_CACHE_PATH=$STATE/cuda
export XLA_PYTHON_CLIENT_PREALLOCATE=false # a JAX that something imports would take the memory
unset NVTE_FLASH_ATTN NVTE_FUSED_ATTN NVTE_UNFUSED_ATTN RANK WORLD_SIZE LOCAL_RANK

# ---------------------------------------------------------------------------------- stages, in general

passed() { echo $(($(date +%s) - begun)); }
left() { echo $((seconds - $(passed))); }
note() { echo "[$(passed) s] $*" | tee -a "$STATE/summary.txt"; }
listed() { [[ " $2 " == *" $1 "* ]]; } # WORD LIST
wanted() { [ "$1" = install ] || [ -z "${STAGES:-}" ] || listed "$1" "$STAGES"; }
is_done() { [ -e "$STATE/done/$1" ]; }
mark_done() { touch "$STATE/done/$1"; }

# Copies the results so far to $OUT, in few files.
collect() {
    local name
    cp "$STATE/summary.txt" "$OUT/"
    for name in gpu.json gpu-half.json throughput.json; do
        [ ! -e "$STATE/$name" ] || cp "$STATE/$name" "$OUT/"
    done
    if compgen -G "$STATE/gpu*.json.profile.txt" >/dev/null; then
        cat "$STATE"/gpu*.json.profile.txt >"$OUT/profile.txt"
    fi
    [ ! -e "$LOGS/tests.log" ] || tail -c 3000000 "$LOGS/tests.log" >"$OUT/tests.txt"
    (
        cd "$STATE" || exit
        find logs -type f -size +12M -exec sh -c 'tail -c 6000000 "$1" >"$1.end" && mv "$1.end" "$1"' _ {} \;
        find logs summary.txt environment.sh flags -type f >packed.txt
        # The complete logs of ranks; pytest only shows their ends.
        find pytest-* -name 'rank*.log' -size -3M >>packed.txt 2>/dev/null
        tar -czf "$OUT/all.tar.gz" -T packed.txt
    )
}

# stage NAME LIMIT LEAST COMMAND...: runs the command for at most LIMIT seconds, unless the stage is
# done or not wanted, or fewer than LEAST seconds are left. Its output is in $LOGS/NAME.log.
stage() {
    local name=$1 limit=$(($2 * slower)) least=$3 start status
    shift 3
    wanted "$name" || return 0
    if listed "$name" "${AGAIN:-}"; then rm -f "$STATE/done/$name"; fi
    is_done "$name" && return 0
    if [ "$(left)" -lt "$least" ]; then
        note "$name: not started, it needs $least s and $(left) s are left"
        return 75
    fi
    [ "$limit" -le "$(($(left) - 6))" ] || limit=$(($(left) - 6))
    start=$(passed)
    echo "===== $name, at most $limit s: $*" >>"$LOGS/$name.log"
    (
        # shellcheck disable=SC1091
        . "$STATE/environment.sh"
        export LIMIT=$limit GPUKIT_MARK=$mark
        exec timeout -k 8 -s "${SIGNAL:-TERM}" "$limit" "$@"
    ) >>"$LOGS/$name.log" 2>&1
    status=$?
    end_leftovers
    [ $status -ne 0 ] || mark_done "$name"
    note "$name: $(($(passed) - start)) s, status $status"
    "$PYTHON" "$KIT/figures.py" "$name" "$LOGS/$name.log" "$STATE" 2>&1 | tee -a "$STATE/summary.txt"
    collect
    return $status
}

# Ranks and workers have sessions of their own, which `timeout` does not end. The remaining processes
# of a stage are found by a mark in their environment.
mark=$$.$begun
end_leftovers() {
    local signal process found
    for signal in TERM KILL; do
        found=
        for process in /proc/[0-9]*; do
            grep -qzFx "GPUKIT_MARK=$mark" "$process/environ" 2>/dev/null || continue
            kill -s $signal "${process##*/}" 2>/dev/null && found=1
        done
        [ -n "$found" ] || return 0
        sleep 2
    done
}

# works CHECK STAGE: whether a check passed. Also true if there is no result because the stage was not
# requested, or because it has no such check without a GPU. A check that died counts as failed.
works() {
    [ -e "$LOGS/$2.log" ] || return 0
    if [ -n "$DRY" ] && ! grep -q "^CHECK .* $1 " "$LOGS/$2.log"; then return 0; fi
    grep -q "^CHECK ok   $1 " "$LOGS/$2.log"
}

# These settings hold for all later stages: an environment variable, or Megatron's flags for training.
set_always() { echo "export $1" >>"$STATE/environment.sh"; }
add_flags() { echo "$1" >>"$STATE/flags"; }
flags() { tr '\n' ' ' <"$STATE/flags"; }

# ------------------------------------------------------------------------------------- the stages' work

install() {
    if ! "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$SITE" "$WHEELS"/*.whl; then
        echo "pip failed: unpacking the wheels directly"
        for wheel in "$WHEELS"/*.whl; do
            "$PYTHON" -m zipfile -e "$wheel" "$SITE" || return 1
        done
    fi
    use_library compact || return 1
    "$PYTHON" -m compileall -q -j 8 "$SITE" "$PROJECT/megatron_mdm" "$PROJECT/tools" >/dev/null 2>&1
    rm -rf "$STATE/data" && mkdir "$STATE/data"
    TORCH_COMPILE_DISABLE=1 "$PYTHON" - "$STATE/data" <<'END'
import pathlib
import sys

from megatron_mdm.environment import prepare_environment

prepare_environment("cpu")

from benchmarks.python_text import write_data

write_data(pathlib.Path(sys.argv[1]))
END
}

# use_library zeroed|compact: installs Transformer Engine's library. "zeroed": as in the wheel, where the
# code of other GPUs is zeros. "compact": rewritten without that code.
use_library() {
    local library=transformer_engine/wheel_lib/libtransformer_engine.so
    local unzipped=$STATE/unzipped
    rm -rf "$unzipped" && mkdir "$unzipped"
    "$PYTHON" -c 'import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extract(*sys.argv[2:])' \
        "$WHEELS"/transformer_engine_cu13-*.whl $library "$unzipped" || return 1
    mkdir -p "$SITE/${library%/*}"
    chmod 755 "$unzipped/$library" && mv "$unzipped/$library" "$SITE/$library" || return 1
    if [ "$1" = compact ] && [ -e "$KIT/shrink_te.py" ]; then
        "$PYTHON" "$KIT/shrink_te.py" library "$SITE/$library" --compact
    fi
}

# train PORT FLAGS...: trains for 20 iterations and evaluates. The port is given because
# torch.distributed.run would resolve the host's name to find one.
train() {
    local port=$1 hidden=512 heads=8 ffn=1408 length=1024 device=cuda
    shift
    if [ -n "$DRY" ]; then hidden=32 heads=2 ffn=96 length=64 device=cpu; fi
    "$PYTHON" -m torch.distributed.run --nnodes 1 --nproc-per-node 1 --master-addr 127.0.0.1 \
        --local-addr 127.0.0.1 --master-port "$port" -m megatron_mdm.pretrain --mdm-device $device \
        --num-layers 4 --hidden-size $hidden --num-attention-heads $heads --ffn-hidden-size $ffn \
        --seq-length $length --max-position-embeddings $length --position-embedding-type rope \
        --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights \
        --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 4 --global-batch-size 8 \
        --tokenizer-type NullTokenizer --vocab-size 257 --null-tokenizer-eod-id 0 \
        --mdm-mask-token-id 256 --make-vocab-size-divisible-by 128 --mdm-recipe ppots \
        --data-path "$STATE/data/text" --data-cache-path "$STATE/cache$port" --split 95,5,0 \
        --num-workers 1 --train-iters 20 --eval-interval 20 --eval-iters 2 --log-interval 1 \
        --lr 1e-3 --lr-warmup-iters 2 --lr-decay-style constant --clip-grad 1.0 "$@"
}

why_it_failed() { # LOG
    echo "$(grep -E '^[A-Za-z_.]*(Error|Exception|error)\b' "$1" | tail -n 1)"
    tail -n 25 "$1"
}

# Ways to train, the ordinary one first: name|environment|flags. All later stages use the first way
# that works.
local_layers="--transformer-impl local --no-rope-fusion --no-masked-softmax-fusion"
local_layers+=" --no-persist-layer-norm --no-gradient-accumulation-fusion --attention-backend unfused"
ways=(
    "ordinary||"
    "no-torch.compile|TORCH_COMPILE_DISABLE=1|"
    "gradients-apart||--no-gradient-accumulation-fusion"
    "unfused-attention||--attention-backend unfused"
    "gloo||--distributed-backend gloo"
    "local-layers||$local_layers"
    "local-layers-no-torch.compile|TORCH_COMPILE_DISABLE=1|$local_layers --no-bias-swiglu-fusion --no-bias-dropout-fusion"
)

# train_as NAME LIMIT PORT ENVIRONMENT FLAGS...: runs `train` with a time limit; its output is in NAME.log.
train_as() {
    local name=$1 limit=$(($2 * slower)) port=$3 environment=$4
    shift 4
    # shellcheck disable=SC2046,SC2086
    env $environment timeout "$limit" bash "$KIT/device.sh" --part train "$port" "$@" $(flags) \
        >"$LOGS/$name.log" 2>&1
}

find_a_way_to_train() {
    local end=$(($(date +%s) + LIMIT)) way name environment more found='' fp8_trains='' beside='' port=29519
    local precision=(--bf16) fp8=(--fp8-format hybrid --fp8-recipe tensorwise)
    if [ -n "$DRY" ]; then precision=() fp8=(--seed 5); fi
    works te-linear-fp8-current te || fp8=()
    if [ ${#fp8[@]} -gt 0 ]; then # at the same time as BF16, since both take long to start
        train_as train-fp8 110 $port '' "${precision[@]}" "${fp8[@]}" &
        beside=$!
    fi
    for way in "${ways[@]}"; do
        [ $((end - $(date +%s))) -gt 20 ] || break
        IFS='|' read -r name environment more <<<"$way"
        port=$((port + 1))
        # shellcheck disable=SC2086
        if train_as "train-bf16-$name" 90 $port "$environment" "${precision[@]}" $more; then
            found=$name
            break
        fi
        echo "FAILS $name: $(why_it_failed "$LOGS/train-bf16-$name.log")"
    done
    [ -z "$beside" ] || { wait $beside && fp8_trains=1; }
    if [ -n "$found" ]; then
        echo "TRAINS $found"
        cp "$LOGS/train-bf16-$found.log" "$LOGS/train-bf16.log"
    fi
    # The settings that made BF16 work may also help FP8. Local layers do not support FP8.
    if [ -n "$found" ] && [ ${#fp8[@]} -gt 0 ] && [ -z "$fp8_trains" ] && [ "$found" != ordinary ] &&
        [[ $found != local-layers* ]] && [ $((end - $(date +%s))) -gt 30 ]; then
        mv "$LOGS/train-fp8.log" "$LOGS/train-fp8-ordinary.log"
        # shellcheck disable=SC2086
        train_as train-fp8 60 29539 "$environment" "${precision[@]}" "${fp8[@]}" $more && fp8_trains=1
    fi
    if [ ${#fp8[@]} -eq 0 ]; then
        echo "FAILS FP8: not tried, since the check of an FP8 layer failed"
    elif [ -n "$fp8_trains" ]; then
        echo "TRAINS FP8"
    else
        echo "FAILS FP8: $(why_it_failed "$LOGS/train-fp8.log")"
    fi
    [ -n "$found" ] || return 1
    [ -z "$environment" ] || set_always "$environment"
    [ -z "$more" ] || add_flags "$more"
}

# measure JSON SIZE:PRECISION...: runs `benchmark.py gpu` for these pairs in this order.
measure() {
    local json=$STATE/$1 all status fallback=(--precisions bf16 tensorwise)
    shift
    all="$(flags)${BENCH_FLAGS:-}"
    # Unfused attention stores its scores, so only few rows fit into memory.
    if [[ $all == *unfused* ]]; then all+=" --micro-batch-size 1"; fi
    if [ -n "$DRY" ]; then fallback=(--precisions bf16 --tiny); fi
    cd "$PROJECT" || return 1
    local common=(--json "$json" --rounds "${ROUNDS:-4}" "--flags=$all")
    "$PYTHON" "$KIT/bench.py" "${common[@]}" --minutes "$(minutes 8)" --least "${LEAST:-40}" \
        --profile-of 1B:bf16 1B:tensorwise tiny:bf16 -- "$@"
    status=$?
    if [ $status -eq 9 ]; then # bench.py cannot import the benchmark: run it directly, in its own order
        "$PYTHON" tools/benchmark.py gpu "${common[@]}" --minutes "$(minutes 12)" \
            "${fallback[@]}"
        status=$?
    fi
    return $status
}

# minutes SECONDS: the time limit of the stage less SECONDS, in minutes
minutes() { awk "BEGIN { print ($LIMIT - $1) / 60 }"; }

run_tests() {
    local workers=${WORKERS:-$(($(nproc) * 5 / 8))} parallel=() skipped=() files=() name
    cd "$PROJECT" || return 1
    while read -r name; do files+=("$name"); done < <(
        find tests -name test_transformer_engine.py -o -name test_fp8.py -o -name test_device.py | sort
    )
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then
        parallel=(-n $((workers > 1 ? workers : 1)) --dist worksteal)
    fi
    # Skip the tests that passed in an earlier call.
    while read -r name; do skipped+=(--deselect "$name"); done < <(
        grep -oE ' PASSED tests/[^ ]+::.*' "$LOGS/tests.log" | sed 's/^ PASSED //; s/ *$//' | sort -u
    )
    unset TORCH_COMPILE_DISABLE PYTHONWARNINGS
    if [ -n "$DRY" ]; then export MDM_TEST_DEVICE=cpu; fi
    exec timeout -k 10 -s INT $((LIMIT - 16)) "$PYTHON" -m pytest -v -ra -p no:cacheprovider \
        --durations 12 --basetemp "$STATE/pytest-$(date +%s)" "${parallel[@]}" tests/gpu "${files[@]}" \
        "${skipped[@]}"
}

throughput() {
    local tiny=()
    if [ -n "$DRY" ]; then
        tiny=(--vocabulary 1000 --layers 2 --hidden 32 --heads 2 --length 64 --rows 2)
    fi
    cd "$PROJECT" || return 1
    "$PYTHON" tools/benchmark.py throughput --json "$STATE/throughput.json" --rounds 8 "${tiny[@]}"
}

describe_machine() {
    date -u
    uname -a
    nvidia-smi
    nvidia-smi -q -d CLOCK,POWER | head -n 60
    nproc
    free -g
    df -h / /tmp /dev/shm
    "$PYTHON" --version
    "$PYTHON" -m pip list 2>/dev/null
    env | grep -E '^(PATH|LD_|CUDA|NV|PYTHON|HOME|TMP)' | sort
    ls -d /usr/local/cuda* /usr/local/nvidia*
    command -v gcc g++ nvcc ninja git
}

if [ "${1:-}" = --part ]; then # runs one of the functions above in a process of its own, which a timeout can end
    shift
    "$@"
    exit
fi
part=(bash "$KIT/device.sh" --part)

# ---------------------------------------------------------------------------------------- all in order

trap collect EXIT
trap 'note "ended by a signal"; exit 143' TERM INT
describe_machine >"$LOGS/machine.log" 2>&1 &
describing=$!
card=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null)
commit=$(cat "$KIT/commit" 2>/dev/null || echo unknown)
note "$seconds s, project $commit, ${card:-no GPU}"
ulimit -n 65536 2>/dev/null
if [ -z "$DRY" ] && ! is_done install; then # a cold disk reads whole files faster than many small pieces
    (
        cd "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || exit
        find torch transformers triton -name '*.so' -o -name '*.py' -o -name ptxas 2>/dev/null |
            timeout 30 xargs -n 16 -P 8 cat >/dev/null 2>&1
    ) &
fi
# If the host's name cannot be resolved, each attempt takes seconds or fails.
if [ -z "$DRY" ] && ! timeout 5 getent hosts "$(hostname)" >/dev/null; then
    echo "127.0.0.1 $(hostname)" >>/etc/hosts && note "/etc/hosts has the name of the host now"
fi

if ! stage install 120 30 "${part[@]}" install; then
    note "install failed: see the logs in all.tar.gz"
    exit 3
fi
wait $describing

for name in smoke te; do # these stages are done even if checks failed
    if listed $name "${AGAIN:-}"; then rm -f "$STATE/done/$name" "$LOGS/$name.log"; fi
done
AGAIN=" ${AGAIN:-} "
AGAIN=${AGAIN// smoke / } AGAIN=${AGAIN// te / }
if wanted smoke && ! is_done smoke; then
    stage smoke 100 30 "$PYTHON" "$KIT/smoke.py" torch ${DRY:+--dry}
    if grep -q "^CHECK FAIL loopback" "$LOGS/smoke.log"; then
        { ip link set lo up || ifconfig lo up; } 2>>"$LOGS/smoke.log" && note "the loopback is up now"
        mv "$LOGS/smoke.log" "$LOGS/smoke-without-loopback.log"
        stage smoke 60 30 "$PYTHON" "$KIT/smoke.py" torch
    fi
    mark_done smoke
    if ! works torch.compile smoke; then
        set_always TORCH_COMPILE_DISABLE=1
        note "torch.compile fails: the later stages do not use it"
    fi
    if ! works nccl smoke; then
        add_flags "--distributed-backend gloo"
        note "NCCL fails: the later stages use gloo"
    fi
fi

check_te() { stage te 110 30 "$PYTHON" "$KIT/smoke.py" te ${DRY:+--dry}; }
if wanted te && ! is_done te; then
    check_te
    if ! works te-import te && [ "$(left)" -gt 60 ]; then
        libraries=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia
        set_always "LD_LIBRARY_PATH=\${LD_LIBRARY_PATH:+\$LD_LIBRARY_PATH:}$libraries/cu13/lib:$libraries/cudnn/lib:$libraries/nccl/lib"
        note "Transformer Engine does not load: trying again with the libraries in $libraries"
        mv "$LOGS/te.log" "$LOGS/te-first.log"
        check_te
    fi
    if works te-import te && ! works te-rmsnorm te && [ "$(left)" -gt 60 ]; then
        note "Transformer Engine's own kernels fail: trying again with the library as in the wheel"
        mv "$LOGS/te.log" "$LOGS/te-compact.log"
        STAGES='' stage zeroed 60 30 "${part[@]}" use_library zeroed
        check_te
    fi
    mark_done te
    if ! works te-import te; then
        note "the later stages do not use Transformer Engine"
        mkdir -p "$STATE/away" # Megatron would try to import it and fail
        mv "$SITE"/transformer_engine* "$STATE/away/"
    fi
fi

stage train 200 45 "${part[@]}" find_a_way_to_train
if wanted train && ! is_done train && [ -z "${KEEP_GOING:-}" ]; then
    note "no way of training works: stopping, so that time is left for a repair (KEEP_GOING=1 continues)"
    exit 3
fi

memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)
first=(1B:bf16 1B:tensorwise 1B:delayed) half=(0.5B:bf16 0.5B:tensorwise)
largest=(2.7B:bf16 2.7B:tensorwise)
if [ "${memory:-0}" -gt 100000 ]; then largest=(3.5B:bf16 3.5B:tensorwise 6B:bf16 6B:tensorwise); fi
if ! works te-linear-fp8-current te; then
    note "the check of an FP8 layer failed: the later stages only use BF16"
    first=("${first[0]}") half=("${half[0]}") largest=("${largest[0]}")
fi
if [ -n "$DRY" ]; then first=(tiny:bf16) largest=(small:bf16) half=(); fi

bench() { stage bench "${BENCH_LIMIT:-230}" 70 "${part[@]}" measure gpu.json "${first[@]}"; }
large() { stage large 330 90 "${part[@]}" measure gpu.json "${largest[@]}"; }
tests() {
    SIGNAL=INT stage tests "${TESTS_LIMIT:-225}" 60 "${part[@]}" run_tests
    # With status 1 pytest has run all tests, and some failed. If it was cut off, it has another status.
    if [ $? -eq 1 ] && tail -n 3 "$LOGS/tests.log" | grep -qE '^=+ .*(passed|failed).*=+$'; then
        mark_done tests
    fi
}
if [ -e "$LOGS/bench.log" ]; then order=(large bench tests); else order=(bench tests large); fi
for name in "${order[@]}"; do $name; done # a second call starts with what the first had no time for
if [ ${#half[@]} -gt 0 ]; then # a micro-batch of 8 rows would take about 79 GB
    BENCH_FLAGS=" --micro-batch-size 4" stage half 150 60 "${part[@]}" measure gpu-half.json "${half[@]}"
fi
stage throughput 100 50 "${part[@]}" throughput
if [ -z "$DRY" ]; then
    CUDA_MODULE_LOADING=EAGER stage all-kernels 60 25 "$PYTHON" "$KIT/smoke.py" all-kernels
fi
note "done, $(left) s of $seconds s left"
