"""Same numbers on every run: torch's global generator is seeded before each test, hypothesis tries fixed examples."""

import os
import signal
from unittest import mock

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before the first import of triton: kernels run on the CPU, interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")

for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # as in a shell's background or under nohup, where their tests fail
        signal.signal(number, default)

hypothesis.settings.register_profile("mdit", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis.settings.load_profile("mdit")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment():
    """No test leaves variables to the next, as a launcher run in this process leaves RANK and WORLD_SIZE."""
    with mock.patch.dict(os.environ):
        yield
