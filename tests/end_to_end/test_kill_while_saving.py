"""kill -9 in the middle of a save: there is always a checkpoint to load, and never an older one than was complete."""

import random
import time
from itertools import count

import torch
import torch.distributed

from mdit.checkpoint import training_state
from mdit.checkpoint.fragments import Fragment
from mdit.checkpoint.training_state import find_latest, latest_step, load_into, save_training_state
from mdit.dist import World
from mdit.parallel.shard import WHOLE
from tests.processes import fork_server

KILLS, RANKS = 20, 2
NUMEL = 200_000  # of each of PARAMETERS, half of it on each rank
PARAMETERS = [f"p{i}" for i in range(8)]


def fragments_of(rank: int, ranks: int) -> list[Fragment]:
    share = NUMEL // ranks
    return [Fragment(name, (NUMEL,), WHOLE, share * rank, share, 0, share * i) for i, name in enumerate(PARAMETERS)]


def save_for_ever(rank: int, directory, journal, meeting) -> None:
    """Step after step; the journal says when a save begins and when it has returned on rank 0."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    world = World(rank, RANKS, rank, torch.device("cpu"))
    training_state.MAX_FILE_BYTES = 2**18  # several files a rank
    with journal.open("a", buffering=1) as file:
        for step in count(latest_step(directory) + 1):
            if world.is_rank_zero:
                file.write(f"saving {step}\n")
            tensors = {"master": [torch.full((NUMEL // RANKS * len(PARAMETERS),), float(step))]}
            numbers, layout = {"loss_sum": float(step)}, {"world_size": RANKS}
            save_training_state(
                directory,
                step,
                tensors,
                fragments_of(rank, RANKS),
                numbers=numbers,
                run={},
                layout=layout,
                world=world,
                keep=1,
            )
            if world.is_rank_zero:
                file.write(f"saved {step}\n")


def entries(journal) -> list[str]:
    return journal.read_text().splitlines() if journal.exists() else []


def test_twenty_kills(tmp_path):
    directory, journal, rng = tmp_path / "checkpoints", tmp_path / "journal", random.Random(0)
    alone = World(0, 1, 0, torch.device("cpu"))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    interrupted = 0
    try:
        for kill in range(KILLS):
            arguments = directory, journal, tmp_path / f"meeting{kill}"
            ranks = [fork_server().Process(target=save_for_ever, args=(rank, *arguments)) for rank in range(RANKS)]
            before, started = len(entries(journal)), time.monotonic()
            for process in ranks:
                process.start()
            while len(entries(journal)) < before + 4 and ranks[0].is_alive():  # into the third save of its life
                time.sleep(0.002)
            one_save = (time.monotonic() - started) / 4  # or a little more
            time.sleep(rng.uniform(0, one_save))
            for process in rng.sample(ranks, RANKS):
                process.kill()
            for process in ranks:
                process.join()
            *_, last = entries(journal)
            interrupted += last.startswith("saving")
            complete = max(int(line.split()[1]) for line in entries(journal) if line.startswith("saved"))

            found = find_latest(directory, alone)
            assert found is not None and found.step >= complete
            flat = torch.empty(NUMEL * len(PARAMETERS))
            layout = {"world_size": 1}
            numbers = load_into(found, {"master": [flat]}, fragments_of(0, 1), layout=layout, world=alone)
            assert (flat == found.step).all() and numbers == {"loss_sum": found.step}
            assert not list(directory.glob("*.damaged"))
    finally:
        torch.distributed.destroy_process_group()
    assert interrupted > 0, "no kill came in the middle of a save"
