"""Ids written by a table read as the ids they were."""

import json
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.token_ids import COUNT, to_json


@given(st.lists(st.integers(0, COUNT - 1)))
def test_ids_come_back(ids):
    assert json.loads(to_json(array("I", ids).tobytes())) == ids


@pytest.mark.parametrize("largest", [0, 9, 10, 99_999, 100_000, COUNT - 1, COUNT, 2**32 - 1])
def test_ids_of_every_length_come_back(largest):
    assert json.loads(to_json(array("I", [largest, 0, largest]).tobytes())) == [largest, 0, largest]
