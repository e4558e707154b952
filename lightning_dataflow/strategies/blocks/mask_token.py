"""Which token stands for the tokens to be drafted."""

import re
from typing import Any

from lightning_dataflow.contracts import UserError

_RESERVED = re.compile(r"mask|reserved|unused|extra_id|placeholder", re.IGNORECASE)


def choose_mask_token(tokenizer: Any, vocab_size: int) -> int:
    """A token id that no text has.

    The tokenizer's mask token; else the first row that the embedding table has beyond the tokenizer's ids; else a special
    token that is reserved by its name; else the last special token that neither the tokenizer nor its chat template uses.

    Raises:
        UserError: there is none.
    """
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    num_known = max(tokenizer.get_vocab().values()) + 1
    if num_known < vocab_size:
        return num_known
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    template = str(tokenizer.chat_template or "")
    special = {
        id: str(token)
        for id, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and id not in used and str(token) not in template
    }
    reserved = [id for id, name in special.items() if _RESERVED.search(name)]
    if not special:
        raise UserError(
            f"no token to mask drafted positions with: all {vocab_size} ids of the tokenizer are in use; set mask_token_id "
            "to one that the training data does not have"
        )
    return reserved[0] if reserved else max(special)
