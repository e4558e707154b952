"""Exactly the answer's tokens are supervised, whatever a tokenizer does to the text and its offsets."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lightning_dataflow.contracts import UserError
from lightning_dataflow.prompts.encoding import Encoder
from lightning_dataflow.prompts.records import normalise
from lightning_dataflow.prompts.template import ChatTemplate
from tests.unit.prompts.tiny import IM, MISTRAL, PLAIN, TAGGED, byte_tokenizer, chat, fast, show

SPACES = (("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"))
BARE = PLAIN.replace("{{ m.role }}\n", "").replace("assistant\n", "").replace("<|im_end|>\n", "<|im_end|>")
"""No text between a special token and the content."""
PIECES = ("▁", *"qrabYesnt", "▁Y", "es", "▁Yes", "▁a")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def answer_tokens(tokenizer, record) -> list[list[str]]:
    """The supervised tokens of each sample, as the vocabulary writes them."""
    samples, _ = Encoder(ChatTemplate(tokenizer)).encode(normalise(record, "auto", "here"))
    return [tokenizer.convert_ids_to_tokens(sample.input_ids[sample.loss_mask != 0].tolist()) for sample in samples]


def metaspace_tokenizer(kind: str, template: str = PLAIN, special=IM):
    """A space is part of the word that follows, and characters that no piece has are bytes, as with SentencePiece."""
    if kind == "unigram":
        scored = [
            ("<unk>", 0.0),
            *((piece, -1.0 - (len(piece) == 1)) for piece in PIECES),
            *((byte, -9.0) for byte in BYTES),
        ]
        backend = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    else:
        vocab = {piece: index for index, piece in enumerate(["<unk>", *BYTES, *PIECES])}
        merges = [("▁", "Y"), ("e", "s"), ("▁Y", "es"), ("▁", "a")]
        backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "older":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = "first" if kind == "first" else "always"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast(backend, special, template, eos_token=special[-1], bos_token=special[0])


@pytest.mark.parametrize("template", [PLAIN, TAGGED], ids=["plain", "tagged"])
@pytest.mark.parametrize("answer", ["if x:\n        y = 1\n        z =      2", "        y = 1", "  ", " \n  a  "])
def test_spaces_that_byte_level_tokenizers_leave_out_of_their_offsets(template, answer):
    tokenizer = byte_tokenizer(template, trim=True, merges=SPACES)
    expected = f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦{answer}<|im_end|>⟧\n"
    if not answer.strip():
        expected = "left out: the turn is empty"
    assert show(tokenizer, chat("q", answer)) == [expected]


def test_a_token_of_spaces_that_crosses_the_border_is_not_learnt():
    tokenizer = byte_tokenizer(PLAIN.replace("assistant\n", "assistant: ").replace("role }}\n", "role }}: "), trim=True)
    assert answer_tokens(tokenizer, chat("q", " a")) == [["Ġ", "a", "<|im_end|>"]]
    tokenizer = byte_tokenizer(tokenizer.chat_template, trim=True, merges=SPACES)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert answer_tokens(tokenizer, chat("q", " a")) == [["a", "<|im_end|>"]]


def test_a_merge_across_the_border_is_not_learnt():
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ")])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert answer_tokens(tokenizer, chat("q", "\nx\n\ny")) == [["x", "ĊĊ", "y", "<|im_end|>"]]


@pytest.mark.parametrize("trim", [False, True])
def test_characters_of_several_byte_level_tokens(trim):
    tokenizer = byte_tokenizer(trim=trim, merges=[("ð", "Ł"), ("Ġ", "ðŁ")])
    assert answer_tokens(tokenizer, chat("q", "é🙂 🙂")) == [
        ["Ã", "©", "ðŁ", "Ļ", "Ĥ", "ĠðŁ", "Ļ", "Ĥ", "<|im_end|>"],
    ]


@pytest.mark.parametrize("kind", ["bpe", "first", "older", "unigram"])
def test_sentencepiece_with_bytes_for_rare_characters(kind):
    tokenizer = metaspace_tokenizer(kind)
    yes, sun = ["Y", "es", "▁"], ["<0xE6>", "<0x97>", "<0xA5>"]
    assert answer_tokens(tokenizer, chat("q", "Yes é a", "é", "日 Yes")) == [
        [*yes, "<0xC3>", "<0xA9>", "▁a", "<|im_end|>", *sun, "▁Yes", "<|im_end|>"]
    ]


@pytest.mark.parametrize("kind", ["bpe", "older", "unigram"])
def test_the_space_that_sentencepiece_puts_after_a_special_token(kind):
    tokenizer = metaspace_tokenizer(kind, BARE)
    assert answer_tokens(tokenizer, chat("é", "é", "q", "Yes")) == [
        ["▁", "<0xC3>", "<0xA9>", "<|im_end|>", "▁Yes", "<|im_end|>"]
    ]


@pytest.mark.parametrize("kind", ["first", "older"])
def test_an_answer_begins_with_the_space_that_the_question_leaves_open(kind):
    tokenizer = metaspace_tokenizer(kind, MISTRAL, ("<s>", "</s>"))
    assert answer_tokens(tokenizer, chat("q", "Yes", "r", " Yes")) == [["▁Yes", "</s>", "▁", "▁Yes", "</s>"]]


def test_end_tokens_that_take_the_white_space_after_them():
    ending = AddedToken("<|im_end|>", rstrip=True, special=True, normalized=False)
    tokenizer = byte_tokenizer(special=("<|im_start|>", ending))
    assert answer_tokens(tokenizer, chat("q", "a", "r", "b")) == [["a", "<|im_end|>", "b", "<|im_end|>"]]


@pytest.mark.parametrize(
    ("normalizer", "text", "expected"),
    [
        (normalizers.Strip(), "  a  ", ["Ġ", "Ġ", "a"]),
        (normalizers.NFKC(), "ﬁ½", ["f", "i", "1", "â", "ģ", "Ħ", "2"]),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]), "É", ["e"]),
        (normalizers.Replace("a", "xyz"), "aq", ["x", "y", "z", "q"]),
        (normalizers.Replace("a", ""), "aqa", ["q"]),
    ],
    ids=["strip", "compatibility", "accents", "longer", "shorter"],
)
def test_normalisers_that_change_the_length_of_the_text(normalizer, text, expected):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    assert answer_tokens(tokenizer, chat("a", text)) == [[*expected, "<|im_end|>"]]


def test_tokens_that_the_tokenizer_adds_to_plain_text_are_nobodys_answer():
    tokenizer = byte_tokenizer(trim=True)
    ends = processors.TemplateProcessing(single="<|im_start|> $A <|im_end|>", special_tokens=[(IM[0], 256), (IM[1], 257)])
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), ends])
    assert show(tokenizer, {"text": " q a"}) == ["<|im_start|>⟦ q a⟧<|im_end|>"]
    assert show(tokenizer, {"prompt": "q", "completion": " a"}) == ["<|im_start|>q⟦ a⟧<|im_end|>"]
    assert show(tokenizer, chat("q", "a")) == ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n"]


def test_text_that_was_rendered_before_is_not_begun_twice():
    tokenizer = byte_tokenizer(special=("<s>", "</s>"), bos_token="<s>")
    begun = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.backend_tokenizer.post_processor = begun
    assert show(tokenizer, {"prompt": "q", "completion": "a"}) == ["<s>q⟦a⟧"]
    assert show(tokenizer, {"prompt": "<s>q", "completion": "a</s>"}) == ["<s>q⟦a</s>⟧"]


def test_half_of_a_surrogate_pair_leaves_the_record_out():
    reason = "left out: the text holds half of a surrogate pair, which is no character"
    for record in (chat("q", "half \ud83d emoji"), chat("half \ude00", "a"), {"text": "\ud83d"}):
        assert show(byte_tokenizer(), record) == [reason]
        assert show(byte_tokenizer(TAGGED), record) == [reason]


def test_a_tokenizer_that_does_not_tell_where_tokens_are():
    class Slow:
        is_fast, name_or_path = False, "slow"

    with pytest.raises(UserError, match=r"the tokenizer slow is not a fast one, .*: give input_ids and loss_mask"):
        Encoder(ChatTemplate(Slow()))
