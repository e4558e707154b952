"""A tiny random target with a real tokenizer, and synthetic conversations: the whole system without a download."""

import json
import os
import random
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ADJECTIVES = ("red", "green", "blue", "light", "dark", "small", "large", "old")
_NUMBERS = ("one", "two", "three", "four", "five")
_THINGS = ("cat", "dog", "bird", "tree", "river", "stone", "house")
_WORDS = _ADJECTIVES + _NUMBERS + _THINGS


def write_tiny_target(folder: str | Path, *, seed: int = 0) -> Path:
    """Write a random Llama (8 layers, hidden 64, vocabulary 320) with a byte tokenizer to `folder`, unless it is there.

    Safe when several processes call it at once: the folder appears complete, by a rename.
    """
    return _once(Path(folder), lambda part: _write_target(part, seed))


def write_tiny_conversations(file: str | Path, *, num_conversations: int = 96, seed: int = 0) -> Path:
    """Write synthetic ShareGPT conversations of 30 to 120 bytes a turn to `file`, unless it is there."""
    return _once(Path(file), lambda part: part.write_text("\n".join(_conversations(num_conversations, seed)) + "\n"))


def _write_target(folder: Path, seed: int) -> None:
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            initializer_range=0.15,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of the 256 bytes, three special tokens, and CHAT_TEMPLATE."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _conversations(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    lines = []
    for index in range(count):
        turns = []
        for _ in range(draw.randint(1, 2)):
            words = draw.choices(_WORDS, k=draw.randint(4, 10))
            turns.append({"from": "human", "value": "Repeat: " + " ".join(words)})
            turns.append({"from": "gpt", "value": " ".join(words + words[::-1][: draw.randint(0, 6)]) + "."})
        lines.append(json.dumps({"id": f"tiny-{index}", "conversations": turns}))
    return lines


def _once(path: Path, write: Callable[[Path], object]) -> Path:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        write(part)
        try:
            os.rename(part, path)
        except OSError:  # another process was first
            if not path.exists():
                raise
            shutil.rmtree(part, ignore_errors=True)
    return path
