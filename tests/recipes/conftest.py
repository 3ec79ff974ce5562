"""One small tokenizer, trained on the corpus, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gnomon.data.tokenizer import Tokenizer
from gnomon.recipes.pretrain import CorpusConfig, train_tokenizer


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    return train_tokenizer(CorpusConfig(records=2_000), vocab_size=1024, samples=1_500)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Losses are compared bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
