#!/usr/bin/env bash
#SBATCH --ntasks-per-node=1 --gpus-per-node=8 --exclusive --signal=USR1@600
# Pretrains a masked-diffusion model of one of the sizes beside this file, on one node or many:
#   bash examples/pretrain/launch.sh MODEL DATA TOKENIZER [FLAGS...]
# MODEL: 170m, 1b, 8b or moe: the file of flags. DATA: prefix of a .bin/.idx pair. TOKENIZER: a sentencepiece
# .model, or a Hugging Face directory. FLAGS win over those of the file. The same command resumes.
#   one node:     bash examples/pretrain/launch.sh 1b my_text my.model
#   four nodes:   on each, NODES=4 MASTER=node0 bash examples/pretrain/launch.sh 8b my_text my.model
#   under Slurm:  sbatch --nodes 4 examples/pretrain/launch.sh 8b my_text my.model   (from the checkout)
# GPUS: of a node (default 8; under Slurm GPUS=4 needs sbatch --gpus-per-node 4 as well). FP8: a recipe of
# Transformer Engine, as FP8=tensorwise or blockwise on H100 and mxfp8 on Blackwell; with delayed comes the margin that
# README recommends. PORT: of the rendezvous (default 29500). DRY_RUN=1 prints the command.
# Slurm asks the run to save and end 600 s before the time limit: examples/scale/README.md.
# Environment: one with Transformer Engine, as README installs it, is taken to be active.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/../..}"
FILES=examples/pretrain

stop() {
    echo "error: ${1//[[:cntrl:]]/?}" >&2
    exit 2
}
[ $# -ge 3 ] || stop "three arguments are needed, MODEL DATA TOKENIZER: see $FILES/launch.sh"
MODEL=$1 DATA=$2 TOKENIZER=$3
shift 3
for name in GPUS NODES PORT; do
    value=${!name:-1}
    [[ $value =~ ^[1-9][0-9]*$ ]] || stop "$name=$value: give a number from 1 on"
done
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
flags+=(--tokenizer-type "$type" --tokenizer-model "$TOKENIZER" --data-path "$DATA")
flags+=(--save "runs/$MODEL/checkpoint" --load "runs/$MODEL/checkpoint" --tensorboard-dir "runs/$MODEL/tb")

launch=(python -m megatron_mdm.launch --nproc-per-node "${GPUS:-8}")
rendezvous=(--rdzv-backend c10d --rdzv-endpoint)
if [ -n "${SLURM_JOB_ID:-}" ]; then
    host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # One task a node, with all its cores: Slurm would bind it to one, on which all ranks would run.
    srun=(srun --ntasks-per-node 1 --cpus-per-task "$SLURM_CPUS_ON_NODE" --cpu-bind=none)
    launch=("${srun[@]}" "${launch[@]}" --nnodes "$SLURM_JOB_NUM_NODES"
        --rdzv-id "$SLURM_JOB_ID" "${rendezvous[@]}" "$host:${PORT:-29500}")
elif [ "${NODES:-1}" -gt 1 ]; then
    [ -n "${MASTER:-}" ] || stop "NODES=$NODES needs MASTER, the name of one of the nodes"
    launch+=(--nnodes "$NODES" --rdzv-id mdm "${rendezvous[@]}" "$MASTER:${PORT:-29500}")
else
    # With an address, since not all machines know that of their own name.
    launch+=(--standalone --local-addr 127.0.0.1)
fi

command=("${launch[@]}" -m megatron_mdm.pretrain "${flags[@]}" "$@")
if [ -n "${DRY_RUN:-}" ]; then
    echo "${command[@]@Q}"
else
    exec "${command[@]}"
fi
