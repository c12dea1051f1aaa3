"""Problems of reasoning-gym: different, checkable after Arrow, scored by the task's own scorer whatever the answer is."""

import builtins
import json
import pickle

import pytest

from entra.problems import extract_answer, load_problems, reasoning_gym_reward

pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'entra-reward[reasoning]'")
pytest.importorskip("datasets", reason="needs datasets: pip install 'entra-reward[train]'")

TASKS = {"chain_sum": {"max_terms": 3, "max_digits": 1}, "spell_backward": {"max_word_len": 4}, "prime_factorization": {}}


@pytest.fixture(scope="module")
def problems():
    return load_problems(TASKS, 60)


def test_tasks_take_turns_and_no_problem_comes_twice(problems):
    assert problems.column_names == ["prompt", "task", "answer", "entry"]
    assert problems["task"][:4] == [*TASKS, "chain_sum"]
    assert len({prompt[0]["content"] for prompt in problems["prompt"]}) == 60
    assert load_problems(TASKS, 60).to_list() == problems.to_list()
    assert load_problems(TASKS, 60, seed=10**6).to_list() != problems.to_list()


def test_prompts_are_messages_or_text(problems):
    question = json.loads(problems[0]["entry"])["question"]
    assert problems[0]["prompt"][0]["role"] == "user"
    assert problems[0]["prompt"][0]["content"].startswith(question)
    assert load_problems(["chain_sum"], 1, chat=False)[0]["prompt"].endswith("</answer>.\n")


def test_right_answers_score_1_and_wrong_ones_less(problems):
    columns = problems[:]
    right = [f"so <answer>{answer}</answer>" for answer in columns["answer"]]
    assert reasoning_gym_reward(right, **{name: columns[name] for name in ("entry", "task")}) == [1.0] * 60
    messages = [[{"role": "assistant", "content": text}] for text in right]
    assert reasoning_gym_reward(messages, columns["entry"]) == [1.0] * 60
    # Not 0: spell_backward pays for each letter in its place.
    assert max(reasoning_gym_reward(["<answer>no idea</answer>"] * 60, columns["entry"])) < 0.5


def test_answer_on_which_a_scorer_stumbles_is_wrong(problems):
    factors = problems[2]
    assert factors["task"] == "prime_factorization"  # whose scorer calls int() on each factor
    assert reasoning_gym_reward(["<answer>two times three</answer>", ""], [factors["entry"]] * 2) == [0.0, 0.0]


def test_reward_pickles_by_name():
    assert pickle.loads(pickle.dumps(reasoning_gym_reward)) is reasoning_gym_reward


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        pytest.param("<answer>1</answer> no, <answer>\n 2 </answer>.", "2", id="last-tag"),
        pytest.param(r"<answer>3</answer> or \boxed{4}", "3", id="tag-before-box"),
        pytest.param(r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}", id="box-with-braces"),
        pytest.param("3 + 4\nThe final answer is: $7$.\n", "7", id="sentence"),
        pytest.param("**Answer:** 7", "7", id="bold"),
        pytest.param("3 + 4\n-7", "-7", id="last-line"),
        pytest.param(" \n", "", id="nothing"),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("tasks", "size", "message"),
    [
        pytest.param(["chain_sun"], 3, "no task 'chain_sun'; did you mean 'chain_sum'?", id="unknown-task"),
        pytest.param({"chain_sum": {"max_term": 3}}, 3, "does not take .*max_term", id="unknown-option"),
        pytest.param({"chain_sum": {"max_terms": 1}}, 3, "max_terms must be >= min_terms", id="bad-option"),
        pytest.param({"chain_sum": {"max_terms": 2, "max_digits": 1}}, 300, "only 200 different problems", id="too-few"),
        pytest.param(["arc_agi"], 1, "does not accept its own answer", id="not-checkable"),
        pytest.param(["gsm_symbolic"], 30, "do not fit JSON", id="no-json"),
        pytest.param([], 1, "tasks is empty", id="none"),
        pytest.param(["chain_sum"], 0, "size=0 must be at least 1", id="size"),
    ],
)
def test_bad_tasks_are_refused(tasks, size, message):
    with pytest.raises(ValueError, match=message):
        load_problems(tasks, size)


def test_missing_package_says_how_to_install_it(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "reasoning_gym":
            raise ModuleNotFoundError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'entra-reward\[reasoning\]'"):
        load_problems(["chain_sum"], 1)
