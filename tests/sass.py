"""What nvcc made of the kernels: registers, stack and instruction counts of each, read from the extension by cuobjdump.

`PYTHONPATH=. python tests/sass.py` prints them, `... --write` makes them the golden file, tests/cuda_golden.json.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

GOLDEN = Path(__file__).parent / "cuda_golden.json"
ARCH = "sm_80"
# Instructions that are counted. Those of local memory are spills; HMMA are the tensor cores; LDG.E.128 is a pack.
COUNTED = {
    "LDL": r"LDL\b",
    "STL": r"STL\b",
    "HMMA": r"HMMA\b",
    "LDSM": r"LDSM\b",
    "LDGSTS": r"LDGSTS\b",
    "LDG128": r"LDG\.E(?:\.\w+)*\.128\b",
    "STG128": r"STG\.E(?:\.\w+)*\.128\b",
    "BAR": r"BAR\.SYNC\b",
    "all": r"[A-Z]",
}


def tools():
    """The folders of cuobjdump, nvdisasm and c++filt as a search path; None when one is missing."""
    path = os.environ["PATH"]
    for package in ("nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"):
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.parent.name == "bin":
                path = f"{file.locate().resolve().parent}{os.pathsep}{path}"
    found = all(shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm", "c++filt"))
    return path if found else None


def _run(*command, text=None):
    run = subprocess.run(
        command, input=text, text=True, capture_output=True, timeout=300, env={**os.environ, "PATH": tools()}
    )
    if run.returncode:
        raise RuntimeError(f"{command[0]} failed: {run.stderr[-2000:]}")
    return run.stdout


def _short(names):
    """{mangled: norm_forward<float, true>}"""
    plain = _run("c++filt", text="\n".join(names)).splitlines()
    short = {}
    for name, text in zip(names, plain, strict=True):
        text = re.sub(r"pykern::cuda::|\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", text)
        short[name] = re.sub(r"^void ", "", text).split("(")[0]
    assert len(set(short.values())) == len(short), "two kernels have one short name"
    return short


def kernels(extension):
    """{kernel: {"registers": n, "stack": bytes, "local": bytes, instruction: count}} of one architecture."""
    usage = _run("cuobjdump", "--dump-resource-usage", "-arch", ARCH, str(extension))
    found = {}
    for name, numbers in re.findall(r"Function (\S+):\n\s+(REG:.*)", usage):
        number = dict(re.findall(r"(\w+):(\d+)", numbers))
        found[name] = {"registers": int(number["REG"]), "stack": int(number["STACK"]), "local": int(number["LOCAL"])}
    listing = _run("cuobjdump", "-sass", "-arch", ARCH, str(extension))
    for part in listing.split("Function : ")[1:]:
        name, code = part.split("\n", 1)
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);", code, re.MULTILINE)
        for counted, pattern in COUNTED.items():
            found[name][counted] = sum(re.match(pattern, line) is not None for line in lines)
    short = _short(list(found))
    return {short[name]: found[name] for name in sorted(found, key=short.get)}


def compiler(extension):
    """The version of ptxas that made the code, as it says itself."""
    listing = _run("cuobjdump", "-elf", "-arch", ARCH, str(extension))
    found = re.search(r"Cuda compilation tools, release [\d.]+, V([\d.]+)", listing)
    return found[1] if found else "unknown"


def main():
    from pykern import _C

    measured = {"compiler": compiler(_C.__file__), "arch": ARCH, "kernels": kernels(_C.__file__)}
    if "--write" in sys.argv:
        text = json.dumps(measured, indent=1)
        GOLDEN.write_text(re.sub(r"\n {3}|\n  (?=})", " ", text) + "\n")  # a line per kernel
    for name, numbers in measured["kernels"].items():
        print(name, *(f"{key}={value}" for key, value in numbers.items() if value))


if __name__ == "__main__":
    main()
