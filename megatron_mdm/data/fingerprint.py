"""Fingerprints of tokenizers: numbers and digests that determine the meaning of token ids.

Data and checkpoints hold the fingerprint of their tokenizer, so that a run can check that its own
tokenizer gives the ids the same meaning. A tokenizer that only adds ids is not different.

Imports neither torch nor megatron.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable

from megatron_mdm.data.encoding import TokenizerData
from megatron_mdm.data.record import digest

# Characters and spaces that common normalizations change. A sentencepiece model does not describe
# its normalization, so its fingerprint holds the normalized form of this text.
PROBE = (
    "  Two  spaces\ttab\nline\r\nend \u00a0\u3000\u200b\ufeff CAPITALS \u0130\u00df \u00e9 e\u0301 "
    "\ufb01 \uff21\uff11 \u2460 \u00bd \u212b \u2026 \u201cquotes\u201d \u2014 \u0000\u0007 "
    "\uac00 \u1100\u1161 \uff76\uff9e \u0e33 \U0001f600 "
)


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """The meaning of a tokenizer's ids, as plain values for records and checkpoints.

    `dataclasses.asdict` turns a fingerprint into a dict, and `Fingerprint(**dict)` turns it back.

    The digests leave out the mask token, because it is often added to a tokenizer later and does
    not occur in text.

    Attributes:
        kind: Megatron's name for the tokenizer's type: SentencePieceTokenizer,
            HuggingFaceTokenizer, or NullTokenizer, which has ids without text.
        size: The largest id, mask token left out, plus 1.
        eod: Id of the end-of-document token, None if there is none.
        mask: Id of the mask token, None if there is none.
        vocabulary: Digest of all ids below `size` with their tokens; empty without text.
        normalizer: Digest of how text is normalized; empty without text.
        pre_tokenizer: Digest of how text is split before tokens are looked up; empty without text.
    """

    kind: str
    size: int
    eod: int | None = None
    mask: int | None = None
    vocabulary: str = ""
    normalizer: str = ""
    pre_tokenizer: str = ""


def fingerprint(tokenizer: TokenizerData) -> Fingerprint:
    """Computes the fingerprint of a tokenizer."""
    return _fingerprint(tokenizer, None, {tokenizer.mask})


def differs(old: Fingerprint, tokenizer: TokenizerData | Fingerprint) -> str:
    """Describes how a tokenizer differs from the tokenizer of an old fingerprint.

    Args:
        old: Fingerprint of the tokenizer that made the data or trained the checkpoint.
        tokenizer: The tokenizer to use now; for a tokenizer without text, its fingerprint.

    Returns:
        Clauses about the tokenizer, joined by "; ". Empty if there is no difference.
    """
    if isinstance(tokenizer, Fingerprint):
        news = [tokenizer]
    else:
        # A mask token may have been added at an unused id, or an existing token may have become the
        # mask token. So compare without the old mask id, and without both mask ids.
        left_out = ({old.mask}, {old.mask, tokenizer.mask})
        news = [_fingerprint(tokenizer, old.size, ids) for ids in left_out]
    new = news[-1]
    if new.kind != old.kind:
        return f"it is a {new.kind} and not a {old.kind}"
    found = []
    if new.size < old.size:
        found.append(f"it has {new.size} ids and not {old.size} or more")
    elif all(new.vocabulary != old.vocabulary for new in news):
        found.append(f"its ids below {old.size} stand for other tokens")
    if new.normalizer != old.normalizer:
        found.append("it normalizes text differently")
    if new.pre_tokenizer != old.pre_tokenizer:
        found.append("it splits text differently before it looks up tokens")
    if new.eod != old.eod:
        found.append(f"its end of document is {_id(new.eod)} and not {_id(old.eod)}")
    return "; ".join(found)


def _id(token: int | None) -> str:
    return "no token" if token is None else f"token {token}"


def _fingerprint(
    tokenizer: TokenizerData, below: int | None, left_out: Collection[int | None]
) -> Fingerprint:
    """Computes a fingerprint whose vocabulary digest covers some ids only.

    Args:
        tokenizer: The tokenizer.
        below: The digest covers the ids below this number; None for all ids.
        left_out: Ids that the digest leaves out.
    """
    if tokenizer.sentencepiece_model is not None:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.sentencepiece_model)
        vocabulary = [(i, processor.id_to_piece(i)) for i in range(processor.get_piece_size())]
        normalizer, pre_tokenizer = processor.normalize(PROBE), None
    else:
        import tokenizers

        assert tokenizer.tokenizer_json is not None
        backend = tokenizers.Tokenizer.from_str(tokenizer.tokenizer_json)
        vocabulary = [(i, token) for token, i in backend.get_vocab(with_added_tokens=True).items()]
        sections = json.loads(tokenizer.tokenizer_json)
        normalizer, pre_tokenizer = sections["normalizer"], sections["pre_tokenizer"]
    size = 1 + max((i for i, _ in vocabulary if i != tokenizer.mask), default=-1)
    kept = [pair for pair in vocabulary if pair[0] < (below or size) and pair[0] not in left_out]
    return Fingerprint(
        tokenizer.kind,
        size,
        tokenizer.eod,
        tokenizer.mask,
        _digest_of_tokens(sorted(kept)),
        digest(normalizer),
        digest(pre_tokenizer),
    )


def _digest_of_tokens(pairs: Iterable[tuple[int, str]]) -> str:
    result = hashlib.sha256()
    for i, token in pairs:
        text = token.encode("utf-8", "surrogatepass")
        result.update(b"%d %d " % (i, len(text)) + text)
    return result.hexdigest()
