"""ms-swift's own loader and GRPO code run the plugin of docs/engines.md."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from page import blocks
from serving import running
from swift.rewards import orms
from swift.rl_core.data import GRPOSample
from swift.rl_core.grpo_algorithm import compute_rewards_per_func
from swift.utils import import_external_file
from tiny_models import build
from tiny_tokenizer import build_tokenizer

import entra
from entra.policy import Policy
from entra.serve.app import create_app

POLICY = Policy(build("qwen3"), build_tokenizer())
QUESTION = {"role": "user", "content": "1 + 3?"}


def sample(text, solution):
    return GRPOSample(messages=[QUESTION, {"role": "assistant", "content": text}], extra={"solution": solution})


def test_the_plugin_of_the_page(tmp_path, monkeypatch):
    (code,) = blocks("ms-swift", "python")
    (tmp_path / "entra_plugin.py").write_text(code)
    texts = ["it is 4, it is 4", "it is 5", "", "4"]
    with running(create_app(POLICY, token="secret")) as port:
        monkeypatch.setenv("ENTRA_SERVE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("ENTRA_SERVE_TOKEN", "secret")
        import_external_file(str(tmp_path / "entra_plugin.py"))
        reward = orms["entra"](args=None)
        found = compute_rewards_per_func([sample(text, "4") for text in texts], [reward], None, torch.device("cpu"))
    kept = [texts[0], texts[3]]
    first, last = entra.score_batch([[QUESTION]] * 2, kept, model=POLICY.model, tokenizer=POLICY.tokenizer)
    torch.testing.assert_close(found[:, 0], torch.tensor([first, 0.0, torch.nan, last]), equal_nan=True)


@pytest.mark.parametrize("flag", re.findall(r"--(\w+)", blocks("ms-swift", "bash")[0]))
def test_every_flag_of_the_page_is_ms_swifts(flag):
    folder = Path(find_spec("swift").origin).parent
    fields = re.compile(rf"^    {flag}: ", re.MULTILINE)
    assert any(
        fields.search(path.read_text()) for part in ("arguments", "rlhf_trainers") for path in folder.glob(f"{part}/**/*.py")
    )
