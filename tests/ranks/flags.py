"""Flags that every run of `launch` starts with: a tiny model, its tokenizer, a few steps."""

VOCAB, MASK_ID, EOD_ID = 120, 127, 119

MODEL = [
    *"--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32".split(),
    *"--max-position-embeddings 32 --normalization RMSNorm --swiglu --disable-bias-linear".split(),
    *"--position-embedding-type rope --attention-dropout 0 --hidden-dropout 0".split(),
    *"--untie-embeddings-and-output-weights".split(),
]
# 64 x 2 = 128: the padded vocabulary, and so the softmax, is the same at tensor parallel 1 and 2.
TOKENIZER = [
    *f"--tokenizer-type NullTokenizer --vocab-size {VOCAB}".split(),
    *f"--null-tokenizer-eod-id {EOD_ID}".split(),
    *f"--mdm-mask-token-id {MASK_ID} --make-vocab-size-divisible-by 64".split(),
]
TRAINING = [
    *"--mdm-device cpu --micro-batch-size 2 --global-batch-size 8 --train-iters 5".split(),
    *"--lr 1e-2 --lr-decay-style constant --log-interval 1 --num-workers 0".split(),
    *"--eval-interval 1000 --eval-iters 0 --split 90,10,0".split(),
]
