"""The torture of mdit.bench.torture finds nothing, and would find what is lost or wrong. Ranks are forked here, so that
a start takes a second; tools/torture.py itself, with starts of the real command, is run by `make slow`."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mdit.bench.faults import CONDITIONS, FAULTS, KINDS, Fault, PlannedFault
from mdit.bench.torture import RoundPlan, TortureSession, differs, possible_kinds
from mdit.bench.torture_start import TortureLayout, Workplace
from mdit.checkpoint.training_state import complete_checkpoints, seal
from mdit.config import UserError
from mdit.files import measure
from tests.processes import EACH, start_forked
from tests.training import REPOSITORY, launch

# Rounds of seed 0: sigint, second_start, flipped, truncated; kill, sigterm twice, all_damaged.
ONE_LAYOUT, CHANGING = 24, 9
STEPS, ONE = 24, TortureLayout(1, 2)
# Not those that need root or the watchdog's patience, and none that is Python of a start's own.
FORKED = [kind for kind in FAULTS if kind not in ("full_disk", "read_only", "hang")]


class ForkedRank:
    def __init__(self, command, log, **environment):
        _, script, *arguments = command
        self.process = start_forked(launch, script, arguments, environment=os.environ | EACH | environment, log=log)
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode


def new_session(folder, *kinds, **faults) -> TortureSession:
    place = Workplace(folder, steps=STEPS, checkpoint_every=4, start_rank=ForkedRank)
    return TortureSession(place, seed=0, kinds=[*kinds, *faults], faults=FAULTS | faults)


def test_a_plan_is_a_function_of_seed_and_round():
    plans = [RoundPlan.draw(3, number, KINDS, 60) for number in range(40)]
    assert plans == [RoundPlan.draw(3, number, KINDS, 60) for number in range(40)]
    assert plans != [RoundPlan.draw(4, number, KINDS, 60) for number in range(40)]
    assert {fault.kind for plan in plans for fault in plan.faults} == {*FAULTS}
    assert {kind for plan in plans for kind, _ in plan.conditions} == {"", *CONDITIONS}
    assert {plan.one_layout for plan in plans} == {True, False}
    assert {fault.kind for fault in RoundPlan.draw(3, 1, ["kill"], 60).faults} == {"kill"}
    assert possible_kinds(["pause", "kill"]) == (["kill", "pause"], [])  # in the table's order
    with pytest.raises(UserError, match="--kinds kil: expected some of kill, "):
        possible_kinds(["kil"])


def test_random_faults_lose_nothing(tmp_path):
    """A round in one layout and one that changes it, drawn as the tool draws them."""
    session = new_session(tmp_path, *FORKED)
    for number in (ONE_LAYOUT, CHANGING):
        session.run(5, only=number)
    print(session.report())
    assert not session.failed, session.report()
    assert sum(row.restarts for row in session.tally.values()) >= 3 and session.tally["final weights"].faults == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_five_minutes_of_all_kinds(tmp_path):
    command = [sys.executable, "tools/torture.py", "--minutes", "5", "--seed", "11", "--work", str(tmp_path / "work")]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0 and "nothing lost, nothing wrong" in ended.stdout, ended.stdout + ended.stderr


# It would find something


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A session with an undisturbed run."""
    session = new_session(tmp_path_factory.mktemp("torture"))
    session.undisturbed(ONE)
    return session


def strike_with(session, strike) -> TortureSession:
    """A round of one fault that is not one of the table -> the session that had it."""
    new = replace(session, kinds=["own"], faults=FAULTS | {"own": Fault(strike)}, findings=[], rounds=0)
    for folder in session.place.folder.glob("round_*"):
        shutil.rmtree(folder)
    own = PlannedFault("own", 10, False, 0, True, 0.0, 0)
    new.run_round(1, RoundPlan((ONE,), (("", 0),), (own,)))
    return new


def test_weights_that_are_altered_are_wrong(place):
    def alter(run, planned, rng) -> bool:
        """As by a run that loads something else than it has saved: every checksum matches."""
        run.kill()
        newest = complete_checkpoints(run.checkpoints)[0]
        file, state = next(newest.glob("*.safetensors")), json.loads((newest / "state.json").read_text())
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            metadata = opened.metadata()
        for name in [name for name in tensors if name.startswith("master/")]:
            tensors[name] += 1e-3
        save_file(tensors, file, metadata)
        state["files"][file.name] = measure(file)
        (newest / "state.json").write_text(json.dumps(seal(state)))
        return True

    session = strike_with(place, alter)
    (finding,) = session.findings
    assert finding.startswith("wrong: final weights in round 1 of seed 0: loss of step ")
    assert session.tally["own"].faults == 1 and session.tally["final weights"].wrong == 1
    assert "1 lost or wrong" in session.report()


def test_a_checkpoint_that_is_not_used_is_lost(place):
    def set_back(run, planned, rng) -> bool:
        run.kill()
        shutil.rmtree(complete_checkpoints(run.checkpoints)[0])
        return True

    session = strike_with(place, set_back)
    (finding,) = session.findings
    assert finding.startswith("lost: own in round 1 of seed 0: went back to step ")
    assert session.tally["own"].lost == 1


def test_a_set_that_is_not_put_back_is_lost(place):
    taken = []

    def take(run, planned, rng) -> bool:
        run.kill()
        shard = next(run.place.train_set.glob("*.tar"))
        taken.append((shard, shard.rename(shard.with_suffix(".aside"))))
        return True

    try:
        (finding,) = strike_with(place, take).findings
    finally:
        for shard, aside in taken:
            aside.rename(shard)
    assert finding.startswith("lost: own in round 1 of seed 0: does not go on: ") and taken[0][0].name in finding


def test_what_is_not_refused_is_wrong(place):
    def nothing(run, planned, rng) -> bool:
        run.kill()
        run.must_refuse("every checkpoint is damaged")
        return True

    (finding,) = strike_with(place, nothing).findings
    assert finding.startswith("wrong: own in round 1 of seed 0: not refused (every checkpoint is damaged)")


def test_a_run_that_a_fault_let_finish_is_compared_as_well(place):
    def wait(run, planned, rng) -> bool:
        run.must_end({0: {0}})
        return True

    session = strike_with(place, wait)
    assert (
        not session.findings and session.tally["final weights"].faults == 1 and session.tally["nan_batch"].faults == 3
    )


def test_a_hang_is_wrong(place, monkeypatch):
    def hang(run, planned, rng) -> bool:
        run.start.send(signal.SIGSTOP)
        monkeypatch.setattr("mdit.bench.tortured_run.LIMIT", 0.5)
        run.await_end(run.start)
        return True

    (finding,) = strike_with(place, hang).findings
    assert finding.startswith("wrong: own in round 1 of seed 0: hang: ")


def test_weights_are_compared_bit_for_bit_and_to_rounding(place, tmp_path):
    expected = place.undisturbed(ONE)
    run = shutil.copytree(expected, tmp_path / "run", symlinks=True)
    assert not differs(run, expected, exactly=True) and not differs(run, expected, exactly=False)
    file = run / "snapshots" / "latest" / "ema.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name != "pos_embed")
    for change, exactly, found in ((1e-7, True, True), (1e-7, False, False), (1e-3, False, True)):
        changed = {**weights, name: weights[name].clone()}
        changed[name].view(-1)[0] += change
        save_file(changed, file)
        assert bool(differs(run, expected, exactly=exactly)) == found
