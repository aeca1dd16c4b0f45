"""Same numbers on every run: torch's global generator is seeded before each test, hypothesis tries fixed examples."""

import os
import signal
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before the first import of triton: kernels run on the CPU, interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes, which would import torch again

for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # as in a shell's background or under nohup, where their tests fail
        signal.signal(number, default)

TESTS = Path(__file__).parent
QUICK = {  # the files of `make quick`: every room's fastest tests, under a minute together on two cores
    "kernels/test_selection.py",
    "kernels/test_custom_op.py",
    "test_house.py",
    "test_words.py",
    "unit/test_bench_report.py",
    "unit/test_caches.py",
    "unit/test_config.py",
    "unit/test_calls.py",
    "unit/test_decode.py",
    "unit/test_documents.py",
    "unit/test_edm.py",
    "unit/test_ema.py",
    "unit/test_encoders.py",
    "unit/test_files.py",
    "unit/test_masking.py",
    "unit/test_meter.py",
    "unit/test_model.py",
    "unit/test_order.py",
    "unit/test_plan.py",
    "unit/test_presets.py",
    "unit/test_quantise.py",
    "unit/test_sampler.py",
    "unit/test_samples.py",
    "unit/test_settings.py",
    "unit/test_shards.py",
    "unit/test_snapshot.py",
    "unit/test_sources.py",
    "unit/test_sources_emoji.py",
    "unit/test_validation.py",
}

# The checks that are off judge how fast and how lucky it was in making examples. It takes numbers from the modules that
# are loaded: examples are fixed as far as these are.
_CHECK = hypothesis.HealthCheck
hypothesis.settings.register_profile(
    "mdit",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=50,
    suppress_health_check=[_CHECK.too_slow, _CHECK.filter_too_much, _CHECK.data_too_large, _CHECK.large_base_example],
)
hypothesis.settings.load_profile("mdit")


def pytest_ignore_collect(collection_path, config):
    """`-m quick` does not even import the other files."""
    if config.option.markexpr == "quick" and collection_path.is_file():
        return None if collection_path.relative_to(TESTS).as_posix() in QUICK else True


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes minutes: make slow"))
        if item.path.relative_to(TESTS).as_posix() in QUICK:
            item.add_marker(pytest.mark.quick)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def group_of_one():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def impatient(monkeypatch):
    """A file system that fails is asked again at once."""
    monkeypatch.setattr("mdit.files.PATIENCE", (0, 0))


@pytest.fixture(autouse=True)
def _environment():
    """No test leaves variables to the next, as a launcher run in this process leaves RANK and WORLD_SIZE."""
    with mock.patch.dict(os.environ):
        yield
