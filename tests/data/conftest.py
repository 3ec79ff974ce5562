"""One small tokenizer, trained on the corpus, for all tests of this folder."""

from __future__ import annotations

import pytest

from gnomon.data.tokenizer import Tokenizer
from gnomon.recipes.pretrain import CorpusConfig, train_tokenizer


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    return train_tokenizer(CorpusConfig(records=2_000), vocab_size=1024, samples=1_500)
