"""Trains several runs one after the other in one group of processes; started by torchrun. A case is
`[folder, options, stop]`: `stop` ends it with a signal to itself after that step."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nmm_serve.errors import TrainingError
from nmm_serve.train import loop
from nmm_serve.train.config import load_config


def main(recipe: str, cases: str) -> None:
    torch.set_num_threads(1)
    loop.gemm_rate = lambda device, dtype: 1e9  # a third of a second a run
    spread = loop.spread

    def noting(model, procs, *args):
        """Leave word of how many numbers of the model this process holds before it is spread."""
        held = sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta)
        (Path(folder) / f"held-{procs.rank}").write_text(str(held))
        return spread(model, procs, *args)

    loop.spread = noting
    dist.init_process_group("gloo")
    for folder, options, stop in json.loads(cases):

        def report(event, stop=stop):
            if stop and event["event"] == "train" and event["step"] == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            loop.train(load_config(recipe, options), folder, report)
        except (TrainingError, SystemExit):
            if not stop:
                raise
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
