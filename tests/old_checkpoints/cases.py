"""Runs of be7fed4 that later versions resume: their flags, and data without random numbers."""

from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

COMMIT = "be7fed4"
EOD_ID = 49
SAVED, LAST = 6, 12  # iterations: of the checkpoints, and of the runs' ends

COMMON = [
    *"--mdm-device cpu --num-layers 2 --hidden-size 16 --num-attention-heads 2".split(),
    *"--ffn-hidden-size 32 --seq-length 16 --max-position-embeddings 16".split(),
    *"--position-embedding-type rope --normalization RMSNorm --swiglu".split(),
    *"--disable-bias-linear --attention-dropout 0 --hidden-dropout 0".split(),
    # 51 ids, the last of which is the mask token, in a vocabulary padded to 64.
    *f"--tokenizer-type NullTokenizer --vocab-size 50 --null-tokenizer-eod-id {EOD_ID}".split(),
    *"--mdm-mask-token-id 50 --make-vocab-size-divisible-by 64".split(),
    *"--micro-batch-size 2 --global-batch-size 4 --num-workers 0 --split 80,20,0".split(),
    *"--lr 1e-2 --lr-decay-style linear --log-interval 1 --data-cache-path cache".split(),
    *f"--train-iters {LAST} --eval-interval {SAVED} --eval-iters 2 --save-interval {SAVED}".split(),
    *"--load checkpoint --save checkpoint --tensorboard-dir tensorboard".split(),
]
TEXT, PAIRS = ["--data-path", "text"], ["--data-path", "pairs", "--mdm-sft"]
CASES = {
    # The run takes 48 rows; one epoch of the training split has 20. 13 rows of the vocabulary are
    # padding, which takes part in the softmax.
    "pretraining": TEXT,
    # Fits after iterations 4, 8 and 12.
    "ppots": [
        *TEXT,
        *"--mdm-rate-sampler ppots --mdm-ppots-refit-interval 4 --mdm-ppots-bins 4".split(),
        *"--mdm-ppots-target gradient --mdm-mask exact-count".split(),
    ],
    "mirror": [*TEXT, *"--mdm-views 2 --mdm-quantiles strata".split()],
    "packed-pairs": [
        *PAIRS,
        *"--mdm-isolate-documents --mdm-rate-per document --mdm-normalization rows".split(),
        *"--mdm-pad-response-to-multiple-of 4".split(),
    ],
    "annealing": [*TEXT, *"--mdm-anneal-attention-iters 10 --mdm-shift".split()],
}


def write_data(directory: Path) -> None:
    """Writes `text` and `pairs` (.bin and .idx) into a directory."""
    text = _builder(directory / "text")
    for i in range(16):
        document = [(7 * i + (1 + i % 3) * j) % 47 + 1 for j in range(5 + 11 * i % 37)]
        text.add_document([*document, EOD_ID], [len(document) + 1])
    text.finalize(get_idx_path(str(directory / "text")))
    pairs = _builder(directory / "pairs")
    for i in range(40):
        prompt = [(3 * i + j) % 20 + 1 for j in range(i % 5)]
        response = [(5 * i + 2 * j) % 25 + 21 for j in range(1 + i % 4)]
        pairs.add_document([*prompt, *response, EOD_ID], [len(prompt), len(response) + 1])
    pairs.finalize(get_idx_path(str(directory / "pairs")))


def _builder(prefix: Path) -> IndexedDatasetBuilder:
    return IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.int32)
