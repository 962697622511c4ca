"""Every file of the corpus gets an error of its own, or is counted in the log."""

from __future__ import annotations

import logging

import pytest

from frozenprefix.errors import FrozenPrefixError
from tests.faults.corpus import BAD_FILES, Corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus(tmp_path_factory.mktemp("corpus") / "files")


@pytest.mark.filterwarnings("ignore")  # Pillow, NumPy and transformers warn of some of these files
@pytest.mark.parametrize("bad", BAD_FILES, ids=[bad.what for bad in BAD_FILES])
def test_every_bad_file_gets_an_error_of_its_own(corpus, bad, caplog):
    caplog.set_level(logging.INFO)
    message = ""
    with corpus.reader(bad) as reader:
        caplog.clear()
        try:
            reader.read()
        except FrozenPrefixError as error:
            message = str(error)
    assert bad.expected in (message or caplog.text)
    assert "\x1b" not in message
