"""kill -9 in the middle of a save: there is always a checkpoint to load, and never an older one than was complete."""

import random
import time
from itertools import count

import torch
import torch.distributed

from mdit.dist import World
from mdit.parallel.shard import WHOLE
from mdit.train import checkpoint
from mdit.train.checkpoint import find_latest, latest_step, load_into, save_training_state
from mdit.train.pieces import Piece
from tests.processes import fork_server

KILLS = 20
WORLD = World(0, 1, 0, torch.device("cpu"))
LAYOUT = {"world_size": 1}
PIECES = [Piece(f"p{i}", (250_000,), WHOLE, 0, 250_000, 0, 250_000 * i) for i in range(8)]
NUMEL = 8 * 250_000


def join_alone() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def save_for_ever(directory, journal) -> None:
    """Step after step; the journal says when a save begins and when it has returned."""
    join_alone()
    checkpoint.MAX_FILE_BYTES = 2**20  # a file for each piece
    with journal.open("a", buffering=1) as file:
        for step in count(latest_step(directory) + 1):
            file.write(f"saving {step}\n")
            tensors = {"master": [torch.full((NUMEL,), float(step))]}
            save_training_state(
                directory, step, tensors, PIECES, memory={"loss_sum": float(step)}, layout=LAYOUT, world=WORLD, keep=1
            )
            file.write(f"saved {step}\n")


def entries(journal) -> list[str]:
    return journal.read_text().splitlines() if journal.exists() else []


def test_twenty_kills(tmp_path):
    directory, journal, rng = tmp_path / "checkpoints", tmp_path / "journal", random.Random(0)
    join_alone()
    interrupted = 0
    try:
        for _ in range(KILLS):
            before = len(entries(journal))
            process = fork_server().Process(target=save_for_ever, args=(directory, journal))
            started = time.monotonic()
            process.start()
            while len(entries(journal)) < before + 4 and process.is_alive():  # into the third save of its life
                time.sleep(0.002)
            one_save = (time.monotonic() - started) / 4  # or a little more
            time.sleep(rng.uniform(0, one_save))
            process.kill()
            process.join()
            *_, last = entries(journal)
            interrupted += last.startswith("saving")
            complete = max(int(line.split()[1]) for line in entries(journal) if line.startswith("saved"))

            found = find_latest(directory, WORLD)
            assert found is not None and found.step >= complete
            flat = torch.empty(NUMEL)
            memory = load_into(found, {"master": [flat]}, PIECES, layout=LAYOUT, world=WORLD)
            assert (flat == found.step).all() and memory == {"loss_sum": found.step}
            assert not list(directory.glob("*.damaged"))
    finally:
        torch.distributed.destroy_process_group()
    assert interrupted > 0, "no kill came in the middle of a save"
