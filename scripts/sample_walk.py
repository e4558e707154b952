"""Show which functions of the package run for one sample, how often, and in how many files they are.

`python scripts/sample_walk.py [SETTING=VALUE ...]` trains on N and on 2N samples of equal length, by default streamed
(`topology=disagg_online`). In every process of the run a profile hook counts the calls of the package's functions.
Calls a sample = (calls with 2N - calls with N) / N, so that what runs once a process or once a run drops out.

- A function is on the walk if it has at least `--least` calls a sample. The default, a little below a half, takes in what
  runs once for a micro-batch of 2 samples, and leaves out what runs once or twice for a step of 8.
- Polls grow with time, so sums differ by about 1 % between runs. Functions whose repeats differ by more than a quarter
  are listed apart. A supervisor ("main") does nothing but poll and is left out.
- Python makes a call for each resumed generator and each comprehension too; they are counted apart from functions.
- Not seen: C++, threads that C++ starts (backward on a GPU), and methods that `dataclass` writes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

HOOK = """
import atexit, json, os, re, sys, threading, time
package, calls, codes = os.environ["WALK_PACKAGE"], {}, {}

def count(frame, event, _):
    if event == "call" and frame.f_code.co_filename.startswith(package):
        key = (threading.get_ident(), id(frame.f_code))  # one thread alone writes it, so no call is lost
        codes[key[1]] = frame.f_code  # kept, so that no other code gets its id
        calls[key] = calls.get(key, 0) + 1

def write():
    table, part = {}, out + ".part"
    for (_, code), number in dict(calls).items():
        code = codes[code]
        place = f"{code.co_filename[len(package):]}:{code.co_firstlineno} {code.co_qualname} {code.co_flags}"
        table[place] = table.get(place, 0) + number
    if table:
        with open(part, "w") as file:
            json.dump(table, file)
        os.replace(part, out)

def write_regularly():  # the process may be killed
    while True:
        time.sleep(0.3)
        write()

def start():
    global out
    calls.clear()
    role = re.findall(r"\\brole=(\\w+)", " ".join(sys.orig_argv)) or ["main"]
    out = f"{os.environ['WALK_OUT']}/{role[-1]}-{os.getpid()}-{time.monotonic_ns()}.json"
    threading.Thread(target=write_regularly, daemon=True).start()

start()
os.register_at_fork(after_in_child=start)
atexit.register(write)
threading.setprofile(count)
sys.setprofile(count)
"""
RUN = ("experiment=tiny", "logger=none", "callbacks=no_evaluation", "data.num_eval_samples=0", "run_name=walk")
RARE = "callbacks.checkpoint.every_n_train_steps=1000000"  # a checkpoint belongs to no sample
COMPREHENSION = re.compile(r"<(listcomp|dictcomp|setcomp|genexpr)>$")
GENERATOR = 0x20 | 0x80 | 0x200  # flags of a code object: generator, coroutine, asynchronous generator
Walk = dict[tuple[str, str], float]
"""Calls by process role and place, "FILE:LINE NAME FLAGS"."""


def measure(tree: Path, num_samples: int, work: Path, settings: list[str]) -> Counter[tuple[str, str]]:
    """Calls by process role and place in one run over `num_samples` samples."""
    (work / "calls").mkdir(parents=True)
    (work / "sitecustomize.py").write_text(HOOK)
    turns = [("human", "Repeat: {:05d} red cats and one small stone"), ("gpt", "{:05d} red cats and one small stone.")]
    records = [[{"from": who, "value": text.format(number)} for who, text in turns] for number in range(num_samples)]
    prompts = work / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"conversations": record}) + "\n" for record in records))
    paths = f"{work}{os.pathsep}{tree}"  # the hook, and the package of this tree even if another is installed
    variables = {
        "WALK_PACKAGE": f"{tree / 'lightning_dataflow'}{os.sep}",
        "WALK_OUT": str(work / "calls"),
        "PYTHONPATH": paths,
    }
    size = [f"data.path={prompts}", f"trainer.max_steps={num_samples // 8}", "data.global_batch_size=8"]
    command = [sys.executable, str(tree / "train.py"), *RUN, RARE, *size, *settings]
    with (work / "log").open("w") as log:
        status = subprocess.run(command, cwd=work, env=os.environ | variables, stdout=log, stderr=log).returncode
    files = list((work / "calls").glob("*.json"))
    if status or not files:
        raise SystemExit(f"{' '.join(command)}\n{(work / 'log').read_text()[-3000:]}\nstatus {status}, {len(files)} counts")
    calls: Counter[tuple[str, str]] = Counter()
    for file in files:
        calls.update({(file.name.split("-")[0], place): number for place, number in json.loads(file.read_text()).items()})
    roles = {role for role, _ in calls} - {"main"} or {"main"}
    return Counter({key: number for key, number in calls.items() if key[0] in roles})


def kind_of(place: str) -> str:
    _, name, flags = place.split(" ")
    return "comprehension" if COMPREHENSION.search(name) else "generator" if int(flags) & GENERATOR else "function"


def summary(title: str, walk: Walk) -> str:
    """One line: calls, functions and files, and the calls by kind and by role."""
    sums: dict[str, float] = defaultdict(float)
    for (role, place), calls in walk.items():
        sums[kind_of(place)] += calls
        sums[role] += calls
    places = {place for _, place in walk}
    files = {place.split(":")[0] for place in places}
    parts = ", ".join(f"{name} {calls:.1f}" for name, calls in sorted(sums.items()))
    return f"{title}: {sum(walk.values()):.1f} calls a sample of {len(places)} functions in {len(files)} files ({parts})"


def show(title: str, walk: Walk, repeats: dict[tuple[str, str], list[float]]) -> None:
    print(f"\n{title}\n   calls  least   most  role      kind           function")
    for key, calls in walk.items():
        role, place = key
        where, name, _ = place.split(" ")
        low, high = min(repeats[key]), max(repeats[key])
        print(f"{calls:8.2f} {low:6.2f} {high:6.2f}  {role:<9} {kind_of(place):<14} {where} {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="of train.py, such as strategy=dflash store=shared_dir")
    parser.add_argument("--tree", type=Path, default=Path.cwd(), help="folder of train.py")
    parser.add_argument("--samples", type=int, default=64, help="N, a multiple of 8")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each size")
    parser.add_argument("--least", type=float, default=0.45, help="calls a sample of a function on the walk")
    given = parser.parse_args()
    settings, sizes = ["strategy=dflash", "topology=disagg_online", *given.settings], (given.samples, 2 * given.samples)
    growths: list[Walk] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(given.repeat):
            works = [Path(folder) / f"{turn}-{size}" for size in sizes]
            small, large = (measure(given.tree.resolve(), *run, settings) for run in zip(sizes, works, strict=True))
            growths.append({key: (large[key] - small[key]) / given.samples for key in large.keys() | small.keys()})
    repeats = {key: [growth.get(key, 0.0) for growth in growths] for key in set().union(*growths)}
    mean = {key: sum(values) / len(values) for key, values in repeats.items()}
    walk = {key: mean[key] for key in sorted(mean, key=lambda key: (-mean[key], key)) if mean[key] >= given.least}
    steady = {key: calls for key, calls in walk.items() if max(repeats[key]) - min(repeats[key]) <= 0.25 * calls}
    unsteady = {key: calls for key, calls in walk.items() if key not in steady}
    print(f"{' '.join(settings)}: {sizes[0]} and {sizes[1]} samples, {given.repeat} runs each")
    print(summary(f"at least {given.least:g} times a sample", walk))
    print(summary("with what runs once a step (0.1)", {key: calls for key, calls in mean.items() if calls >= 0.1}))
    show("steady", steady, repeats)
    show("depends on time", unsteady, repeats)


if __name__ == "__main__":
    main()
