"""python -m benchmarks.commands [--data FILE] [--only NAME,...]: time and peak memory of every `pykern` command.

Each runs once, as a process of its own, on small inputs that are made here or come with Python; the table is Markdown.
Times are wall clock, memory is the largest resident set (ru_maxrss), both with the interpreter and torch included.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Each line builds on the files of those before it; {data} is the text, everything else is made in the folder.
COMMANDS = {
    "tokenize train": "tokenize train --data {data} --kind bpe --vocab-size 1024 --out bpe.json",
    "tokenize inspect": "tokenize inspect --tokenizer bpe.json 'the shortest path'",
    "prepare": "prepare --data {data} --tokenizer bpe.json --out tokens.npy",
    "train": "train --data {data} --out model --steps 100 --eval-every 0",
    "train --dtype bfloat16": "train --data {data} --out half --steps 100 --eval-every 0 --dtype bfloat16",
    "evaluate --baseline": "evaluate --model model --data {data} --baseline",
    "evaluate --compare": "evaluate --data {data} --compare --steps 50",
    "generate": "generate --model model --prompt 'def ' --max-new-tokens 200 --seed 0",
    "generate --beams 4": "generate --model model --prompt 'def ' --max-new-tokens 100 --beams 4",
    "finetune --task lm": "finetune --model model --data {data} --out tuned --task lm --steps 50 --eval-tokens 2048",
    "finetune --task classify": "finetune --model model --data labelled.jsonl --out classes --task classify --steps 50",
    "classify --test": "classify --model classes --test labelled.jsonl",
    "prompt": "prompt --template shots.txt --model model --examples shots.jsonl --shots 2 --query word=up "
    "--candidates up,down",
    "evaluate --task icl": "evaluate --task icl --shots 0,1,2,4,8 --compare finetune --out icl",
    "attention": "attention --model model --prompt 'import sys' --out map.html",
    "order": "order",
    "digits": "digits",
    "export --to hf": "export --model model --to hf --out hf",
    "import": "import --from hf --out back",
    "export --to gguf": "export --model model --to gguf --out model.gguf",
    "export --to npz": "export --model model --to npz --out model.npz",
    "check linear": "check linear",
    "info": "info",
    "bench decode": "bench decode --model model -p 64 -n 64 -r 3",
}


def write_inputs(folder: Path) -> None:
    """Labelled texts and a template with its examples."""
    rows = [
        {"text": f"{word} {i}", "label": label} for i in range(40) for word, label in (("def f", "a"), ("# c", "b"))
    ]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "shots.txt").write_text("{{#examples}}{{word}} -> {{answer}}\n{{/examples}}{{word}} -> ")
    shots = [{"word": word, "answer": word} for word in ("up", "down", "left")]
    (folder / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shots))


# A process begins with the peak of the one that started it, so a small one starts the command: it tells the time and
# the peak of its only child.
STARTER = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[2:])
seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
with open(sys.argv[1], "w") as measured:
    print(seconds, peak / 1024, code, file=measured)
"""


def measure(arguments: list[str], folder: Path) -> tuple[float, float, str]:
    """Seconds, peak MB and, where the command failed, the end of what it printed."""
    command = [sys.executable, "-c", STARTER, "measured.txt", sys.executable, "-m", "pykern", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with (folder / "output.txt").open("w") as output:
        subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, check=True)
    seconds, megabytes, code = (float(number) for number in (folder / "measured.txt").read_text().split())
    said = (folder / "output.txt").read_text(errors="replace")[-300:]
    return seconds, megabytes, f"exit code {int(code)}: {said}" if code else ""


def rows(data: str, only: list[str]) -> Iterator[str]:
    yield "| command | seconds | MB |"
    yield "|---|---|---|"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        for label, line in COMMANDS.items():
            if only and label not in only:
                continue
            seconds, megabytes, failure = measure(shlex.split(line.format(data=shlex.quote(data))), folder)
            if failure:
                raise SystemExit(f"pykern {line} failed:\n{failure}")
            yield f"| `pykern {line.format(data='DATA')}` | {seconds:.1f} | {megabytes:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.commands", description=__doc__)
    parser.add_argument("--data", default="stdlib", help='a text file, or "stdlib" (default)')
    parser.add_argument("--only", default="", help="labels, with commas between: " + ", ".join(COMMANDS))
    arguments = parser.parse_args()
    only = [label for label in arguments.only.split(",") if label]
    for label in only:
        if label not in COMMANDS:
            parser.error(f"--only: {label!r} is none of {', '.join(COMMANDS)}")
    for row in rows(str(Path(arguments.data).resolve()) if arguments.data != "stdlib" else "stdlib", only):
        print(row, flush=True)


if __name__ == "__main__":
    main()
