"""Which cases pytest collects, and in what order; see `tests/conftest.py`."""

import pytest
import torch


@pytest.mark.gpu
def test_a_gpu_is_there():
    assert torch.cuda.is_available()


def test_cases_that_need_a_gpu_are_left_out_where_there_is_none(request):
    collected = any(item.name == test_a_gpu_is_there.__name__ for item in request.session.items)
    if request.config.option.markexpr or request.config.option.keyword:
        pytest.skip("a selection of tests")
    assert collected == torch.cuda.is_available()


def test_long_files_come_first_then_those_of_the_most_tests(request):
    (conftest,) = [plugin for plugin in request.config.pluginmanager.get_plugins() if hasattr(plugin, "LONG")]
    long = [conftest.HERE / name for name in conftest.LONG]
    assert [path for path in long if not path.is_file()] == []
    if not (request.config.option.markexpr or request.config.option.keyword):
        paths = [item.path for item in request.session.items]
        files = list(dict.fromkeys(paths))
        assert files[: len({*files} & {*long})] == [path for path in long if path in files]
        counts = [paths.count(path) for path in files if path not in long]
        assert counts == sorted(counts, reverse=True)
