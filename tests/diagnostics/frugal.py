"""Commands run one by one in a process that may not have as much memory as a checkpoint takes.

`python -m tests.diagnostics.frugal DIRECTORY LIMITS` writes a base and a tuned checkpoint of many shards.
Then each command of `LIMITS`, a JSON object, is run in a fork that is allowed so many float32 copies of the
largest matrix beyond what it starts with. Prints for each an empty text, or why it failed.

The limit is RLIMIT_DATA, which the kernel enforces on all private writable memory. RLIMIT_AS would count
addresses that libraries reserve, and a resident size counts pages of files that the kernel may drop at any
time. Tensors are mapped copy-on-write, so that RLIMIT_DATA counts them too as long as they are in use:
keeping a whole checkpoint mapped is found out just as copying it is.
"""

import json
import os
import re
import resource
import shutil
import sys
from pathlib import Path

SIZE, LAYERS, CHANGED = 1024, 5, 6
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")
LARGEST = 4 * SIZE**2
CHECKPOINT = LAYERS * len(PARTS) * LARGEST


def write_pair(root, dtype=None):
    """20 matrices of float32, or of a dtype, in 5 shards each; 6 of tuned have a spike of their own."""
    import torch
    from safetensors.torch import save_file

    falling = (1 + torch.arange(SIZE)).float() ** -0.5
    for side in ("base", "tuned"):
        directory, index = root / side, {}
        directory.mkdir()
        for layer in range(LAYERS):
            shard = {}
            for position, part in enumerate(PARTS):
                number = layer * len(PARTS) + position
                generator = torch.Generator().manual_seed(number)
                W = torch.randn(SIZE, SIZE, generator=generator) * falling
                if side == "tuned" and number < CHANGED:
                    u, v = torch.randn(2, SIZE, generator=generator)
                    W += torch.outer(u, v) / SIZE * SIZE**0.5 * (2 if number % 2 else 0.01)
                shard[f"model.layers.{layer}.self_attn.{part}.weight"] = W.to(dtype)
            file = f"model-{layer:05}.safetensors"
            save_file(shard, directory / file)
            index |= dict.fromkeys(shard, file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        (directory / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')


def commands(root):
    """What is run, by name; each is given nothing and must not fail."""
    import torch

    from diagnostics import intruder_dimensions
    from diagnostics.analyses.skills.movement import Movement
    from diagnostics.analyses.sparsification.analysis import checkpoint_sparseness
    from diagnostics.analyses.sparsity.mask_overlap import Overlaps, squared_change
    from diagnostics.edits.graft import graft
    from diagnostics.edits.interpolate import interpolate
    from diagnostics.edits.mitigate import mitigate
    from probes import CheckpointPair, open_checkpoint
    from probes.checkpoints.mask_file import Patch
    from probes.checkpoints.prune import cut_levels, magnitude_order, pattern_pruned

    base, tuned, out = root / "base", root / "tuned", root / "out"
    pair = CheckpointPair(base, tuned)
    every = {name: torch.arange(0, header.entries, 97) for name, header in pair.tuned.headers.items()}
    Patch.of(pair, every).save(root / "mask.safetensors")

    def masks():
        orders = [magnitude_order(side) for side in (pair.base, pair.tuned)]
        cuts = [order.cuts((0.1, 0.5, 0.9)) for order in orders]
        overlaps = Overlaps(3)
        for name in orders[0].shapes:
            sides = pair.base.tensor(name), pair.tuned.tensor(name)
            kept = (cut_levels(cut, name, stored) for cut, stored in zip(cuts, sides, strict=True))
            overlaps.add(*kept, squared_change(*sides))
        half = list(overlaps)[1]
        assert half.base == half.tuned == round(0.5 * CHECKPOINT / 4)
        assert orders[0].pruned(cuts[0][1], name).dtype == torch.bool
        assert pattern_pruned(pair.tuned, name, pair.tuned.tensor(name), 2, 4).float().mean() == 0.5

    def movement():
        shapes = {name: header.shape for name, header in pair.tuned.headers.items()}
        moved = Movement(shapes, lambda name: (pair.base.tensor(name), pair.tuned.tensor(name)))
        assert len(moved.entries) == CHANGED
        largest = moved.largest(1000)
        moved.random(largest, seed=0)
        moved.sample_others(largest, 0.001, seed=0)

    def density():
        assert checkpoint_sparseness(pair.tuned)["entries"] == CHECKPOINT // 4

    def intruders():
        metrics = intruder_dimensions(pair).metrics
        assert (metrics["changed"], metrics["intruders"], metrics["verified"]) == (CHANGED, CHANGED // 2, 1)

    def load():
        checkpoint = open_checkpoint(tuned)
        held = [checkpoint.tensor(name).clone() for name in checkpoint.headers]
        assert len(held) == LAYERS * len(PARTS)

    def keep_mapped():
        checkpoint = open_checkpoint(tuned)
        held = [checkpoint.tensor(name) for name in checkpoint.headers]
        assert len(held) == LAYERS * len(PARTS)

    return {
        "intruders": intruders,
        "masks": masks,
        "density": density,
        "movement": movement,
        "interpolate": lambda: interpolate(base, tuned, 0.5, out),
        "mitigate": lambda: mitigate(base, tuned, out, scale=0.5),
        "mitigate-update": lambda: mitigate(base, tuned, out, scale=0.5, mode="update"),
        "graft": lambda: graft(base, tuned, root / "mask.safetensors", out),
        "load": load,
        "keep-mapped": keep_mapped,
    }


def warm_up():
    """Have every library make what it makes once, so that it counts as there from the beginning."""
    import pandas as pd
    import torch

    from diagnostics.numerics import linalg

    torch.set_num_threads(1)
    W = torch.randn(1100, 1100)
    gram = linalg.gram(W).float() + 1100 * torch.eye(1100)
    for decompose in (torch.linalg.eigh, torch.linalg.qr, torch.linalg.cholesky_ex):
        decompose(gram)
        decompose(gram.double())
    pd.DataFrame({"name": ["a"], "value": [1.0]}).groupby("name").agg(most=("value", "max")).reset_index()


def data_bytes():
    """What RLIMIT_DATA is held against."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmData:\s+(\d+) kB", status)[1]) * 1024


def limited(run, copies):
    """Why a command failed in a fork with this much memory; empty where it did not."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        failure = ""
        try:
            most = int(data_bytes() + copies * LARGEST)
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
            run()
        except BaseException as error:
            failure = f"{type(error).__name__}: {error}"
        os.write(write, failure.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        failure = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return failure or ("" if status == 0 else f"ended with status {status}")


def main(root, limits):
    """Run the commands that have a limit."""
    # A tensor for each core is mapped while files are hashed.
    os.cpu_count = lambda: 2
    write_pair(root)
    warm_up()
    runs, failures = commands(root), {}
    for name, copies in limits.items():
        failures[name] = limited(runs[name], copies)
        shutil.rmtree(root / "out", ignore_errors=True)
    sys.stdout.write(json.dumps(failures) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
