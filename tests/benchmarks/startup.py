"""How long a person waits before anything happens."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

RUNS = 5
FIRST_MATRIX = """
import sys, time
begun = time.perf_counter()
from diagnostics.analyses.intruders import examine
def first(*arguments):
    print(time.perf_counter() - begun)
    heavy = [name for name in ("transformers", "transformer_lens", "peft") if name in sys.modules]
    print(heavy, flush=True)
    import os
    os._exit(0)
assert callable(examine.examine_fetched)
examine.examine_fetched = first
from diagnostics.cli.main import main
sys.argv = ["tunescope", "audit", *sys.argv[1:], "--only", "intruders", "--quiet"]
main()
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("base", "tuned"):
            directory = Path(folder) / name
            directory.mkdir()
            torch.manual_seed(len(name))
            state = {f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(256, 256) for i in range(4)}
            save_file(state, directory / "model.safetensors")
            (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
        command = Path(sys.executable).with_name("tunescope")
        times = []
        for _ in range(RUNS):
            begun = time.perf_counter()
            subprocess.run([command, "--help"], check=True, capture_output=True)
            times.append(time.perf_counter() - begun)
        print(f"tunescope --help: {sorted(times)[RUNS // 2]:.2f} s (median of {RUNS}; limit 0.5)")
        lines = []
        for _ in range(3):
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    FIRST_MATRIX,
                    f"{folder}/base",
                    f"{folder}/tuned",
                    "--out",
                    f"{folder}/out",
                ],
                check=True,
                capture_output=True,
                text=True,
            )
            lines.append(done.stdout.split("\n"))
        median = sorted(float(line[0]) for line in lines)[1]
        print(f"audit --only intruders, first matrix after {median:.2f} s (limit 2.5); loaded: {lines[0][1]}")
