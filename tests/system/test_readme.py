"""Every command of the README runs as it stands there; the quickstart on fewer samples."""

import re
import shlex
import subprocess

import pytest

from tests.processes import ROOT, environment

pytestmark = pytest.mark.slow

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()]
SHORTER = "data.num_samples=8 data.num_passes=1 data.num_eval_samples=2 evaluate.max_new_tokens=8"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tracked files beside this checkout's environment and assets."""
    if not (ROOT / ".venv").exists() or not (ROOT / "assets" / "sharegpt.jsonl").exists():
        pytest.skip("needs .venv and assets/: run `bash scripts/setup.sh` first")
    folder = tmp_path_factory.mktemp("readme")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / ".venv").symlink_to((ROOT / ".venv").resolve())
    (folder / "assets").mkdir()
    for name in ("smollm2-135m-instruct", "sharegpt.jsonl"):
        (folder / "assets" / name).symlink_to((ROOT / "assets" / name).resolve())
    return folder


@pytest.mark.timeout(1800)
def test_the_readme_runs_from_top_to_bottom(checkout):
    path = f"{(checkout / '.venv' / 'bin')}:{environment()['PATH']}"
    settings = {**environment(), "PATH": path, "PYTHONPATH": str(checkout)}
    settings.pop("OMP_NUM_THREADS")
    assert len(COMMANDS) > 8
    for command in COMMANDS:
        if command == "bash scripts/test.sh":  # this is it
            continue
        if command == "bash scripts/quickstart.sh":
            command += f" {SHORTER} run_name=quickstart"
        arguments = shlex.split(command)
        result = subprocess.run(arguments, cwd=checkout, env=settings, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        if "quickstart" in command:
            assert "step 0: acceptance length 1.0" in result.stdout
            assert (checkout / "runs" / "quickstart" / "figure.png").exists()
