"""Which cases pytest collects; see `tests/conftest.py`."""

import os

import pytest
import torch


@pytest.mark.gpu
def test_a_gpu_is_there():
    assert torch.cuda.is_available()


def test_cases_that_need_a_gpu_are_left_out_where_there_is_none(request):
    collected = any(item.name == test_a_gpu_is_there.__name__ for item in request.session.items)
    if request.config.option.markexpr or request.config.option.keyword:
        pytest.skip("a selection of tests")
    assert collected == (torch.cuda.is_available() or os.environ.get("REHEARSE_GPU") == "1")
