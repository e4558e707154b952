"""The SGLang that is installed: our hook points are where we look, its pins and its files are as published."""

import base64
import csv
import hashlib
import subprocess

import pytest

from tests.sglang.environment import VARIABLES, sglang_python

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def test_hook_points_that_move_are_named():
    code = (
        "from lightning_dataflow.sglang_plugin import hook\n"
        "print(hook.moved_hook_points())\n"
        "import sglang, sglang.srt.managers.utils as utils\n"
        "del utils._async_d2h\n"
        "utils.GenerationBatchResult.copy_to_cpu = lambda self: None\n"
        "print(hook.moved_hook_points())\n"
        "for version in (sglang.__version__, '0.5.22'):\n"
        "    sglang.__version__ = version\n"
        "    try:\n"
        "        hook.register()\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    run = subprocess.run(
        [sglang_python(), "-c", code], env=VARIABLES | {"PATH": ""}, capture_output=True, text=True, timeout=300
    )
    first, second, moved, version = run.stdout.strip().splitlines()[-4:]
    assert first == "[]", run.stderr
    assert "_async_d2h" in second and "copy_to_cpu (without return_hidden_states)" in second
    assert "has moved" in moved
    assert version == "SGLang 0.5.22 is not supported, capture needs sglang>=0.5.23,<0.6: install one of those"


def test_our_requirements_leave_sglangs_pins_alone():
    code = (
        "from importlib.metadata import requires\n"
        "from packaging.requirements import Requirement\n"
        "pins = {one.name: one for one in map(Requirement, requires('sglang')) if str(one.specifier).startswith('==')}\n"
        "for ours in map(Requirement, requires('lightning-dataflow')):\n"
        "    if not ours.marker and ours.name in pins:\n"
        "        pin = str(pins[ours.name].specifier)[2:]\n"
        "        print(ours.name, pin, ours.specifier.contains(pin))\n"
    )
    shown = subprocess.run([sglang_python(), "-c", code], env=VARIABLES, capture_output=True, text=True, check=True).stdout
    assert "torch" in shown and "False" not in shown, shown


def test_no_line_of_sglang_is_changed():
    (record,) = sglang_python().parents[1].glob("lib/*/site-packages/sglang-*.dist-info/RECORD")
    rows = [row for row in csv.reader(record.open()) if row[0].startswith("sglang/") and row[1]]
    for name, digest, _ in rows:
        actual = hashlib.sha256((record.parents[1] / name).read_bytes()).digest()
        assert base64.urlsafe_b64encode(actual).rstrip(b"=").decode() == digest.removeprefix("sha256="), name
    assert len(rows) > 1000
