"""Every test runs with one torch thread (two slow tiny nets down) and with an environment of its own."""

from __future__ import annotations

import os

# Before torch is imported: diffusers takes its time embedding from torch.exp, which MKL rounds differently by CPU
# vendor (engine.layers says more). Its portable path makes the oracle the same on every machine.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before triton is imported, where it is: its kernels are checked without a GPU.
os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator

import pytest
import structlog
import torch

from tests import servers

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    structlog.reset_defaults()  # a command's logging writes to the standard error of its own test
    for name in list(os.environ):
        if name.startswith(("KONTEXT_BATCH_", "AWS_")):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from servers.given_or_started(
        "KONTEXT_TEST_REDIS_URL", lambda: servers.redis(tmp_path_factory.mktemp("redis")).start()
    )


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from servers.given_or_started(
        "KONTEXT_TEST_S3_URL", lambda: servers.s3(tmp_path_factory.mktemp("s3")).start()
    )
