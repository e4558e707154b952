"""Tiny targets that vLLM serves on a CPU (heads of 32), and that have learnt the synthetic conversations."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lightning_dataflow.prompts import load_prompts
from lightning_dataflow.targets import load_tokenizer
from lightning_dataflow.targets.tiny import write_tiny_conversations, write_tiny_target

KINDS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
NUM_STEPS, BATCH_SIZE = 150, 8


def write_target(folder: Path, kind: str) -> None:
    """Train a target of `kind` on `folder`/conversations.jsonl and write it to `folder`/target."""
    write_tiny_target(folder / "tokenizer")
    conversations = write_tiny_conversations(folder / "conversations.jsonl")
    tokenizer = load_tokenizer(folder / "tokenizer")
    prompts, _ = load_prompts(str(conversations), tokenizer, max_length=256)
    config_type, model_type = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_type(
            config_type(
                vocab_size=320,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=8,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=32,
                max_position_embeddings=1024,
                rms_norm_eps=1e-4,
                rope_parameters={"rope_type": "default", "rope_theta": 3e4},
                initializer_range=0.05,
                tie_word_embeddings=kind == "qwen3",
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        _train(model, [prompt.input_ids for prompt in prompts], tokenizer.pad_token_id)
    model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")


def write_questions(file: Path) -> Path:
    """Prompts in the shapes of MT-Bench, GSM8K and HumanEval, of one token to many."""
    records = [
        {"turns": ["Repeat: red cat one dog", "Repeat: stone"]},
        {"question": "Repeat: green two house small river", "answer": "0"},
        {"task_id": "tiny/0", "prompt": "Repeat: dark tree four light five bird"},
        {"prompt": ["Repeat: old stone", "Repeat: red"]},
        {"input_ids": [72]},
        {"question": "cat cat cat dog large house blue old river tree three five one"},
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def _train(model: torch.nn.Module, sequences: list, pad_token_id: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(NUM_STEPS):
        batch = [sequences[(step * BATCH_SIZE + row) % len(sequences)] for row in range(BATCH_SIZE)]
        ids = torch.full((BATCH_SIZE, max(map(len, batch))), pad_token_id)
        for row, sequence in enumerate(batch):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == pad_token_id, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
