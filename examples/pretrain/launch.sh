#!/usr/bin/env bash
#SBATCH --job-name=mdm --ntasks-per-node=1 --gpus-per-node=8 --exclusive --output=slurm-%j.out
#SBATCH --time=24:00:00 --signal=USR1@600 --requeue --open-mode=append
# Pretrains a masked-diffusion model of one of the sizes beside this file, on one node or many:
#   bash examples/pretrain/launch.sh MODEL DATA TOKENIZER [FLAGS...]
# MODEL: 170m, 1b, 8b, 8b_blocks or moe, the name of a .flags file. DATA: prefix of a .bin/.idx pair, or "0.7 A 0.3 B"
# for a blend. If DATA is -, the FLAGS name the data, for example --train-data-path A --valid-data-path B, or --data-args-path FILE
# --split 999,1,0. TOKENIZER: a sentencepiece .model, or a Hugging Face directory. FLAGS override those of the file.
#   one node:     bash examples/pretrain/launch.sh 1b my_text my.model
#   four nodes:   on each, NODES=4 MASTER=node0 bash examples/pretrain/launch.sh 8b my_text my.model
#   under Slurm:  sbatch --nodes 4 examples/pretrain/launch.sh 8b my_text my.model   (from the checkout)
# The run's checkpoints, index cache and logs are in runs/RUN, on a disk that all nodes share. RUN is the name of the
# run (default: MODEL). The same command resumes; another RUN starts a new run.
# GPUS: GPUs of a node (default 8; under Slurm GPUS=4 needs sbatch --gpus-per-node 4 as well). FP8: a recipe of
# Transformer Engine, for example FP8=tensorwise or blockwise on H100, and mxfp8 on Blackwell; FP8=delayed also sets the
# margin that megatron_mdm/mcore/FP8.md recommends. PORT: port of the rendezvous (default 29500). TORCHRUN: more flags for torchrun, for
# example TORCHRUN="--max-restarts 3 --log-dir logs --redirects 3". DRY_RUN=1 prints the command. REHEARSE=1 rehearses
# the launch on this machine's CPU (examples/scale/README.md).
# CONTAINER: under Slurm with pyxis, the image in which the run starts, for example nvcr.io#nvidia/nemo:26.08 or a .sqsh
# file. The checkout is mounted. MOUNTS: other folders for the container, for example MOUNTS=/data or /disk1:/data,/disk2
# (examples/containers/README.md).
# Options of sbatch override those above. examples/scale/README.md explains how a run under Slurm saves before its time
# limit. Without CONTAINER activate an environment with Transformer Engine first; README.md, section Install, explains how
# to install it.
set -euo pipefail
FILES=examples/pretrain

stop() {
    echo "error: ${1//[[:cntrl:]]/?}" >&2
    exit 2
}
checkout=$(dirname "$0")/../..
[ -d "$checkout/$FILES" ] || checkout=${SLURM_SUBMIT_DIR:-.} # sbatch runs a copy of this script
[ -d "$checkout/$FILES" ] || stop "$checkout has no $FILES: run sbatch in the checkout's directory"
cd "$checkout"
[ $# -ge 3 ] || stop "three arguments are needed, MODEL DATA TOKENIZER: see $FILES/launch.sh"
MODEL=$1 DATA=$2 TOKENIZER=$3
shift 3
for name in GPUS NODES PORT; do
    value=${!name:-1}
    [[ $value =~ ^[1-9][0-9]*$ ]] || stop "$name=$value: give a number from 1 on"
done
[ -z "${CONTAINER:-}" ] || [ -n "${SLURM_JOB_ID:-}${REHEARSE:-}" ] || stop "CONTAINER=$CONTAINER needs Slurm with pyxis: start the \
script with sbatch, or without CONTAINER inside the container (examples/containers/README.md)"
[ -e "$FILES/$MODEL.flags" ] || stop "there is no $FILES/$MODEL.flags: name one of the files *.flags there"

flags=()
for file in common "$MODEL"; do
    read -r -d '' -a words < <(sed 's/#.*//' "$FILES/$file.flags") || true
    flags+=("${words[@]}")
done
[ -z "${FP8:-}" ] || flags+=(--fp8-format hybrid --fp8-recipe "$FP8")
[ "${FP8:-}" != delayed ] || flags+=(--fp8-margin 4)
type=HuggingFaceTokenizer
[ "${TOKENIZER%.model}" = "$TOKENIZER" ] || type=SentencePieceTokenizer
flags+=(--tokenizer-type "$type" --tokenizer-model "$TOKENIZER")
if [ "$DATA" != - ]; then
    prefixes=("$DATA")
    [ -e "$DATA.idx" ] || read -r -d '' -a prefixes <<<"$DATA" || true
    flags+=(--data-path "${prefixes[@]}" --split 999,1,0)
fi
directory=runs/${RUN:-$MODEL}
flags+=(--save "$directory/checkpoint" --load "$directory/checkpoint" --tensorboard-dir "$directory/tb")
flags+=(--data-cache-path "$directory/cache")

gpus=${GPUS:-8}
nodes=${NODES:-1}
launch=(python -m megatron_mdm.launch --nproc-per-node "$gpus")
rendezvous=(--rdzv-backend c10d --rdzv-endpoint)
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${REHEARSE:-}" ]; then
    nodes=$SLURM_JOB_NUM_NODES
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    host=${hosts%%$'\n'*} # not "scontrol | head": head ends early, and scontrol fails if it has more to write
    # One task a node, with all cores of the node: by default Slurm binds the task, and so all ranks, to one core.
    srun=(srun --ntasks-per-node 1 --cpus-per-task "$SLURM_CPUS_ON_NODE" --cpu-bind=none)
    if [ -n "${CONTAINER:-}" ]; then
        # Packages in ~/.local would hide those of the image, so the home directory is not mounted.
        srun+=("--container-image=$CONTAINER" "--container-mounts=$PWD${MOUNTS:+,$MOUNTS}" "--container-workdir=$PWD"
            --no-container-mount-home)
        # Variables of the image win over exported ones, except for those that are named here.
        [ -z "${PYTHONPATH:-}" ] || srun+=(--container-env=PYTHONPATH)
    fi
    launch=("${srun[@]}" "${launch[@]}" --nnodes "$nodes"
        --rdzv-id "$SLURM_JOB_ID" "${rendezvous[@]}" "$host:${PORT:-29500}")
elif [ "$nodes" -gt 1 ]; then
    [ -n "${MASTER:-${REHEARSE:-}}" ] || stop "NODES=$nodes needs MASTER, the name of one of the nodes"
    launch+=(--nnodes "$nodes" --rdzv-id mdm "${rendezvous[@]}" "${MASTER:-}:${PORT:-29500}")
else
    # With an explicit address, since some machines cannot resolve their own host name.
    launch+=(--standalone --local-addr 127.0.0.1)
fi
# The check needs nothing but Python 3.12. Outside a container there may be none; the run then makes a similar check.
check=python
[ -z "${CONTAINER:-}" ] || check=python3
if [ "$check" = python ] || python3 -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
    "$check" -m megatron_mdm.sizing.nodes "$nodes" "$gpus" "${flags[@]}" "$@"
fi

# The masked head computes logits of a different size in each micro-batch, which would fragment the allocator's memory.
# The setting has two names. Megatron looks for the older one, which torch reads first.
if [ -z "${PYTORCH_CUDA_ALLOC_CONF+set}${PYTORCH_ALLOC_CONF+set}" ]; then
    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
fi

read -r -d '' -a torchrun <<<"${TORCHRUN:-}" || true
if [ -n "${REHEARSE:-}" ]; then
    exec python -m megatron_mdm.rehearse --nodes "$nodes" --gpus-per-node "$gpus" -- "${flags[@]}" "$@"
fi
command=("${launch[@]}" "${torchrun[@]}" -m megatron_mdm.pretrain "${flags[@]}" "$@")
if [ -n "${DRY_RUN:-}" ]; then
    echo "${command[@]@Q}"
else
    exec "${command[@]}"
fi
