"""What `evaluate` takes for the Python of an environment with vLLM. It makes up what vLLM would count."""

import sys
from pathlib import Path

TEXT = """#!{python}
import json, sys
from pathlib import Path

if sys.argv[1] != "-c":  # which asks whether vLLM is there
    job = json.loads(Path(sys.argv[2]).read_text())
    speculation = job["engine"].get("speculative_config")
    draft = Path(speculation["model"]) if speculation else None
    with Path({jobs!r}).open("a") as file:
        print(json.dumps(dict(draft=draft and json.loads((draft / "config.json").read_text()))), file=file)
    length = speculation["num_speculative_tokens"] if speculation else 0
    num_prompts = len(job["prompts"])
    result = dict(
        tokens=[[5, 6, 7]] * num_prompts,
        seconds=1.0,
        num_drafts=num_prompts,
        num_draft_tokens=num_prompts * length,
        accepted_per_position=[num_prompts] * length,
        on_cpu=False,
    )
    Path(sys.argv[3]).write_text(json.dumps(result))
"""


def write_stand_in(folder: Path) -> tuple[Path, Path]:
    """(the executable, a file that gets a line of JSON for every process: the configuration of its draft)."""
    executable, jobs = folder / "stand-in", folder / "jobs.jsonl"
    executable.write_text(TEXT.format(python=sys.executable, jobs=str(jobs)))
    executable.chmod(0o755)
    return executable, jobs
