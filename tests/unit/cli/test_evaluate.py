"""The evaluate command, and callbacks that follow what it measures."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file, save_file

from lightning_dataflow import DFlashModule, export_draft
from lightning_dataflow.cli import evaluate, train
from lightning_dataflow.cli.evaluate import table
from lightning_dataflow.cli.judges import HFJudge
from lightning_dataflow.contracts import UserError
from lightning_dataflow.export.export import describe
from lightning_dataflow.export.folder import write_draft
from lightning_dataflow.strategies.published.engines import resolve_engine
from tests.sglang.speculating import SpeculatingServer
from tests.unit.cli.conftest import status_of
from tests.vllm.stand_in import write_stand_in

pytestmark = pytest.mark.integration

TINY = ("experiment=tiny", "logger=none")
VLLM = ("evaluate.backend=vllm", f"evaluate.python={sys.executable}")
SERVER = ("evaluate.backend=sglang_server", "evaluate.checkpoint=null")


@pytest.fixture(scope="module")
def run_in(tmp_path_factory, target_path, conversations):
    """run_in(folder)(command, *overrides) → exit status, on the session's tiny target."""

    def make(folder: Path):
        def call(main, *overrides: str) -> int:
            GlobalHydra.instance().clear()
            parts = (
                f"target.path={target_path}",
                f"data.path={conversations}",
                f"hydra.run.dir={folder}/runs/${{run_name}}",
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.setattr(sys, "argv", ["lightning-dataflow", *TINY, *parts, "run_name=test", *overrides])
                return status_of(main)

        return call

    return make


@pytest.fixture(scope="module")
def trained(run_in, tmp_path_factory):
    """A run of four steps, measured at each, that kept its best checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    settings = (
        "callbacks=best",
        "trainer.max_steps=4",
        "evaluate.every_n_steps=1",
        "callbacks.checkpoint.every_n_train_steps=2",
    )
    assert run_in(folder)(train.main, *settings, "data.num_eval_samples=4") == 0
    return folder / "runs" / "test"


@pytest.fixture
def run(run_in, tmp_path):
    return run_in(tmp_path)


def one_line(shown: str) -> str:
    lines = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_every_checkpoint_of_a_run_on_prompts_of_a_file(run, trained, tmp_path, capsys):
    lines = ({"turns": ["Repeat: red cat", "More"]}, {"question": "Repeat: one dog"}, {"prompt": "Repeat: old tree"})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("evaluate.data=questions.jsonl", "evaluate.batch_size=2", "evaluate.output=report.json")
    assert run(evaluate.main, f"evaluate.checkpoint={trained}", *options) == 0
    result = json.loads((tmp_path / "report.json").read_text())
    steps = [one["step"] for one in result["measurements"]]
    assert steps[-2:] == [2, 4] and len(steps) == len(set(steps))
    for one in result["measurements"]:
        assert one["num_identical"] == one["num_prompts"] == 3
        assert one["num_draft_tokens"] == 3 * one["num_drafts"]
        assert one["speed_up"] == pytest.approx(one["tokens_per_second"] / one["plain_tokens_per_second"])
    assert result["settings"]["batch_size"] == 2
    assert (tmp_path / "report.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    for row in ("acceptance_length ", "accepted_1 ", "tokens_per_target_forward ", "speed_up "):
        assert row in shown


def test_the_best_checkpoint_and_the_log_follow_the_acceptance_length(trained):
    result = json.loads((trained / "result.json").read_text())
    history = {one["step"]: one["acceptance_length"] for one in result["acceptance"]}
    assert list(history) == [0, 1, 2, 3, 4]
    best = max((step for step in history if step), key=lambda step: (history[step], -step))
    assert [path.name for path in (trained / "checkpoints").glob("best-*.ckpt")] == [f"best-step-{best:06d}.ckpt"]
    last = result["acceptance"][-1]
    assert result["metrics"]["val/acceptance_length"] == pytest.approx(last["acceptance_length"])
    assert result["metrics"]["val/tokens_per_target_forward"] == pytest.approx(last["tokens_per_target_forward"])
    assert result["metrics"]["val/accepted_0"] == pytest.approx(last["acceptance_per_position"][0])


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_the_command_finds_what_was_found_while_training(run, tmp_path, temperature):
    """On the held-out prompts, for the last step, which is the best or not."""
    settings = ("callbacks=best", "evaluate.every_n_steps=3", f"evaluate.temperature={temperature}", "seed=3")
    shared = ("strategy=eagle3", "data.num_eval_samples=3", "evaluate.max_new_tokens=8", *settings)
    assert run(train.main, "trainer.max_steps=4", "optimizer.lr=1e-2", *shared) == 0
    history = json.loads((tmp_path / "runs/test/result.json").read_text())["acceptance"]
    assert [one["step"] for one in history] == [0, 3, 4]
    checkpoint = "evaluate.checkpoint=runs/test/checkpoints/step-000004.ckpt"
    assert run(evaluate.main, checkpoint, "evaluate.output=report.json", *shared) == 0
    (found,) = json.loads((tmp_path / "report.json").read_text())["measurements"]
    for name in ("num_prompts", "num_drafts", "accepted_per_position", "acceptance_length", "tokens_per_target_forward"):
        assert found[name] == history[-1][name], name
    assert found["speed_up"] is not None and history[-1]["speed_up"] is None


def test_training_stops_when_the_acceptance_length_no_longer_grows(run, tmp_path):
    settings = ("callbacks=best", "trainer.max_steps=40", "evaluate.every_n_steps=2", "data.num_eval_samples=2")
    stopping = ("callbacks.early_stopping.patience=2", "optimizer.lr=0", "evaluate.max_new_tokens=4")
    assert run(train.main, *settings, *stopping) == 0
    result = json.loads((tmp_path / "runs/test/result.json").read_text())
    assert (result["status"], result["optimizer_steps"]) == ("completed", 6), "one measurement to beat, two that did not"
    assert "did not improve in the last 2 records" in result["stopped_early"]
    assert (tmp_path / "runs/test/checkpoints/step-000006.ckpt.complete").is_file()
    assert (tmp_path / "runs/test/checkpoints/best-step-000002.ckpt.complete").is_file()


def test_callbacks_that_follow_nothing_are_refused(run, capsys):
    assert run(train.main, "callbacks=best") == 1
    assert "callbacks.best follows val/acceptance_length, which is measured before and after training only: set " in (
        line := one_line(capsys.readouterr().err)
    )
    assert "evaluate.every_n_steps" in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.checkpoint=null"], "evaluate needs a draft: set evaluate.checkpoint"),
        (["evaluate.checkpoint=nowhere"], "evaluate.checkpoint=nowhere does not exist"),
        (["evaluate.checkpoint=EMPTY"], "no complete checkpoint in"),
        (["evaluate.backend=tpu"], "evaluate.backend=tpu is unknown: available are hf, vllm, sglang_server"),
        (["evaluate.output=nowhere/report.json"], "evaluate.output=nowhere/report.json: there is no such folder"),
        (
            ["evaluate.output=empty"],
            "evaluate.output=empty is no name of a file: name a JSON file, such as empty/report.json",
        ),
        (["evaluate.output="], "evaluate.output= is no name of a file"),
        (["evaluate.output=a.png"], "evaluate.output=a.png is the figure's name: name the JSON file, a.json"),
        (["evaluate.output=taken.json"], "taken.png, where its figure goes, is a folder"),
        (["evaluate.dtype=int8"], "evaluate.dtype=int8 is unknown: available are auto, float32, bfloat16, float16"),
        ([*VLLM, "evaluate.dtype=int8"], "evaluate.dtype=int8 is unknown: available are auto"),
        (["evaluate.data=nowhere.jsonl"], "nowhere.jsonl does not exist: evaluate.data takes a file"),
        (["evaluate.data=BAD"], "line 2: keys ['answer'] have no question"),
        (["evaluate.num_prompts=9"], "evaluate.num_prompts=9: 8 prompts are held out"),
        (["data.num_eval_samples=0"], "no held-out prompts: set data.num_eval_samples, or evaluate.data"),
        (["evaluate.max_new_tokens=2000"], "the target reads 1024; generate fewer"),
        (["evaluate.data=UNKNOWN"], "prompt 1 has token id 320, the target's vocabulary has 320"),
        (["evaluate.batch_size=0"], "evaluate.batch_size=0"),
        (["evaluate.temperature=-1"], "evaluate.temperature=-1"),
        (
            ["evaluate.temperature=1e-40"],
            "evaluate.temperature=1e-40: use 0 for greedy decoding, or a number from 1e-05 on",
        ),
        (["evaluate.num_draft_tokens=0"], "evaluate.num_draft_tokens=0"),
        (["evaluate.backend=vllm"], "backend vllm needs the Python of an environment with vLLM: set evaluate.python"),
        ([*VLLM], "has no vLLM: install it there"),
        ([*VLLM, "evaluate.vllm_args=3"], "evaluate.vllm_args=3: give arguments of vllm.LLM"),
        (["evaluate.backend=sglang_server"], "evaluate.checkpoint with backend sglang_server: the server was started with"),
        ([*SERVER], "backend sglang_server needs a server that speculates: set evaluate.url"),
        ([*SERVER, "evaluate.url=127.0.0.1:9"], "127.0.0.1:9 is no address of a server"),
        ([*SERVER, "evaluate.url=http://127.0.0.1:9"], "the server at http://127.0.0.1:9 does not answer"),
        ([*SERVER, "evaluate.url=http://127.0.0.1:9", "target.api_key_file=nowhere"], "cannot read target.api_key_file"),
    ],
)
def test_bad_input_is_one_line(run, trained, tmp_path, capsys, overrides, message):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "taken.png").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"question": "fine"}\n{"answer": 4}\n')
    (tmp_path / "unknown.jsonl").write_text('{"input_ids": [320]}\n')
    for name, path in (("EMPTY", "empty"), ("BAD", "bad.jsonl"), ("UNKNOWN", "unknown.jsonl")):
        overrides = [override.replace(f"={name}", f"={path}") for override in overrides]
    checkpoint = trained / "checkpoints" / "step-000004.ckpt"
    assert run(evaluate.main, f"evaluate.checkpoint={checkpoint}", *overrides) == 1
    shown = capsys.readouterr()
    assert message in one_line(shown.err)
    assert "decoded" not in shown.out


@pytest.fixture
def vllm(tmp_path):
    """Overrides for a vLLM that is none, and what it was asked to do."""
    executable, jobs = write_stand_in(tmp_path)
    options = ("evaluate.backend=vllm", f"evaluate.python={executable}", "evaluate.num_draft_tokens=3")

    def asked() -> list:
        return [json.loads(line)["draft"] for line in jobs.read_text().splitlines()] if jobs.exists() else []

    return options, asked


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_vllm_measures_and_leaves_what_lies_in_the_run(run, trained, target_path, tmp_path, vllm, capsys):
    options, asked = vllm
    checkpoint = trained / "checkpoints" / "step-000004.ckpt"
    exported = tmp_path / "runs" / "test" / "exported"
    kept = {  # drafts of the user's, one with the name of a checkpoint, one that is converted
        engine: export_draft(checkpoint, exported / name, engine=engine, target=str(target_path))
        for engine, name in (("vllm", "step-000004"), ("sglang", "mine"))
    }
    before = {engine: contents(folder) for engine, folder in kept.items()}
    for source in (checkpoint, kept["sglang"], kept["vllm"]):
        assert run(evaluate.main, *options, f"evaluate.checkpoint={source}", "evaluate.output=report.json") == 0
        (one,) = json.loads((tmp_path / "report.json").read_text())["measurements"]
        assert (one["name"], one["accepted_per_position"]) == (source.name.removesuffix(".ckpt"), [one["num_prompts"]] * 3)
    assert [draft["dtype"] if draft else None for draft in asked()] == [
        *(None, "float32"),  # alone, then with the draft
        *(None, "float32"),
        *(None, "bfloat16"),
    ]
    assert {engine: contents(folder) for engine, folder in kept.items()} == before
    files = {path.name for path in (tmp_path / "runs" / "test").iterdir()}
    assert {"vllm.log", "vllm-plain.log", "exported"} <= files
    assert not any(name.startswith(".exported") for name in files)


def test_a_draft_that_is_not_finite_is_not_measured(run, trained, target_path, tmp_path, vllm, capsys):
    """A checkpoint, and a folder that vLLM would read by itself; by either backend."""
    checkpoint, folder = tmp_path / "step-000004.ckpt", tmp_path / "draft"
    export_draft(trained / "checkpoints" / "step-000004.ckpt", folder, engine="vllm", target=str(target_path))
    saved = torch.load(trained / "checkpoints" / "step-000004.ckpt", weights_only=True)
    tensors = load_file(folder / "model.safetensors")
    for one in (saved["state_dict"]["draft.fc.weight"], tensors["fc.weight"]):
        one[0, 0] = float("nan")
    torch.save(saved, checkpoint)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    options, asked = vllm
    for backend in ((), options):
        for source in (checkpoint, folder):
            assert run(evaluate.main, *backend, f"evaluate.checkpoint={source}") == 1
            shown = one_line(capsys.readouterr().err)
            assert str(source) in shown and "fc.weight holds NaN or infinity" in shown
    assert asked() == []


def test_vllm_measures_the_folder_around_this_one(run_in, trained, target_path, tmp_path, vllm):
    """`..` names the draft, and no other folder."""
    options, _ = vllm
    checkpoint = trained / "checkpoints" / "step-000004.ckpt"
    draft = export_draft(checkpoint, tmp_path / "draft", engine="sglang", target=str(target_path))
    inside = draft / "inside"
    (inside / "runs" / "test" / "exported").mkdir(parents=True)
    (inside / "runs" / "test" / "notes").write_text("mine")
    assert run_in(inside)(evaluate.main, *options, "evaluate.checkpoint=..", "evaluate.output=report.json") == 0
    assert (inside / "runs" / "test" / "notes").read_text() == "mine"
    (one,) = json.loads((inside / "report.json").read_text())["measurements"]
    assert one["name"] == "draft"


def test_vllm_is_not_asked_for_more_than_a_draft_proposes(run, target_path, tmp_path, vllm, capsys):
    options, asked = vllm
    module = DFlashModule(str(target_path), num_layers=1, block_size=6)
    source = write_draft(tmp_path / "d", resolve_engine("vllm", "plain"), describe(module), module.draft.state_dict())
    assert run(evaluate.main, *options, f"evaluate.checkpoint={source}", "evaluate.num_draft_tokens=6") == 1
    assert "blocks of 6 draft at most 5 tokens" in one_line(capsys.readouterr().err)
    assert asked() == [], "the baseline is not decoded either"


def test_what_was_measured_before_a_draft_fails_is_kept(run, trained, tmp_path, capsys, monkeypatch):
    measure, drafts = HFJudge.measure, []

    def fail_at_the_second(self, draft, prompts):
        drafts.append(draft.stem)
        if len(drafts) == 2:
            raise UserError("the second one fails")
        return measure(self, draft, prompts)

    monkeypatch.setattr(HFJudge, "measure", fail_at_the_second)
    options = ("evaluate.output=report.json", "evaluate.num_prompts=2", "evaluate.baseline=false")
    assert run(evaluate.main, f"evaluate.checkpoint={trained}", *options) == 1
    (one,) = json.loads((tmp_path / "report.json").read_text())["measurements"]
    assert one["name"] == drafts[0]
    shown = capsys.readouterr()
    assert f"{drafts[0]}: acceptance length {one['acceptance_length']:.3f}, 1 of " in shown.out
    assert f"tokens_per_target_forward   {one['tokens_per_target_forward']:.3f}" in shown.out
    assert "the second one fails" in one_line(shown.err)


def test_a_prompt_needs_as_much_room_as_its_backend(run, trained, tmp_path, vllm, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"input_ids": [70] * (1024 - 4 - 3)}) + "\n")
    options = ("evaluate.data=long.jsonl", "evaluate.max_new_tokens=4", "evaluate.baseline=false")
    checkpoint = f"evaluate.checkpoint={trained / 'checkpoints' / 'step-000004.ckpt'}"
    assert run(evaluate.main, *options, checkpoint, "evaluate.num_draft_tokens=3") == 0
    assert run(evaluate.main, *options, checkpoint, "evaluate.num_draft_tokens=4") == 1
    assert "with evaluate.max_new_tokens=4 and 4 of proposals that is 1025, and the target reads 1024" in one_line(
        capsys.readouterr().err
    )
    assert run(evaluate.main, *options, checkpoint, *vllm[0]) == 1
    assert "and 8 of proposals that is 1029" in one_line(capsys.readouterr().err)
    with SpeculatingServer() as server:
        assert run(evaluate.main, *options, *SERVER, f"evaluate.url={server.url}", "evaluate.num_draft_tokens=9") == 0


def test_settings_in_the_report_are_those_that_were_used(run, trained, tmp_path, vllm):
    few = ("evaluate.num_prompts=1", "evaluate.max_new_tokens=4", "evaluate.output=report.json")
    checkpoint = f"evaluate.checkpoint={trained / 'checkpoints' / 'step-000004.ckpt'}"

    def used(*options: str) -> set[str]:
        assert run(evaluate.main, *few, *options) == 0
        return json.loads((tmp_path / "report.json").read_text())["settings"].keys()

    always = {"max_new_tokens", "temperature", "data", "num_prompts", "batch_size", "backend", "output"}
    ours = always | {"checkpoint", "num_draft_tokens", "dtype", "baseline", "seed"}
    with SpeculatingServer() as server:
        assert used(*SERVER, f"evaluate.url={server.url}") == always | {"url", "baseline_url", "timeout_s"}
    assert used(checkpoint) == ours
    keys_are_numbers = "+evaluate.vllm_args.additional_config={1: 2}"
    assert used(checkpoint, *vllm[0], keys_are_numbers) == ours | {"python", "vllm_args", "timeout_s"}


def test_the_table_has_a_column_for_each_draft():
    one = {"name": "a", "step": 1, "speed_up": None, "acceptance_per_position": (0.5, 0.25), "num_drafts": 4}
    other = {"name": "longer", "step": 20, "speed_up": None, "acceptance_per_position": (1.0, 0.75), "num_drafts": 4}
    assert table([one, other]).splitlines() == [
        "name                        a      longer",
        "step                        1      20",
        "accepted_1                  0.500  1.000",
        "accepted_2                  0.250  0.750",
        "num_drafts                  4      4",
    ]
