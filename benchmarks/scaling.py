"""Time of an iteration of `train srrl` from the shipped weights, on 1 and 2 CPU processes in turn.

python benchmarks/scaling.py
"""

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent))

from minireflect.checkpoints.ours import load_pipeline
from minireflect.config import preset
from minireflect.methods.srrl import train_srrl
from minireflect.rl.rewards import load_reward
from minireflect.run import Job, Run
from tests.test_parallel import with_processes

ITERATIONS, TRIALS = 3, 4


def work(folder: Path) -> None:
    config = preset("cpu")
    srrl = replace(config.srrl, iterations=ITERATIONS)
    pipe, reward = load_pipeline(), load_reward()
    texts = partial(config.mix.draw, config.seed, srrl.prompts_per_iteration)
    start = time.perf_counter()
    train_srrl(srrl, pipe, reward, texts, None, Job(Run(folder / "run", {})))
    (folder / "seconds").write_text(str((time.perf_counter() - start) / ITERATIONS))


if __name__ == "__main__":
    for _ in range(TRIALS):
        for n in (1, 2):
            with TemporaryDirectory() as place:
                folders = with_processes(n, work, Path(place))
                slowest = max(float((folder / "seconds").read_text()) for folder in folders)
            print(f"{n} processes: {slowest:.2f} s per iteration", flush=True)
