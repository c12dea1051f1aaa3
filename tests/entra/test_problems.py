"""Problems of reasoning-gym: different, checkable after Arrow, scored by the task's own scorer whatever the answer is."""

import builtins
import contextlib
import importlib.metadata
import json
import os
import pickle
import sys

import pytest

import entra.problems
from entra import answer_checkers, scorer_process
from entra.problems import (
    EVALUATING,
    PARSING,
    READ_VERSION,
    UnsafeScorerError,
    extract_answer,
    load_problems,
    reasoning_gym_reward,
    unsafe_reasoning_gym_reward,
)

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


@pytest.mark.parametrize("reward", [reasoning_gym_reward, unsafe_reasoning_gym_reward])
def test_reward_pickles_by_name(reward):
    assert pickle.loads(pickle.dumps(reward)) is reward


CODE = "__import__('os').system('touch executed')"
_EVENTS = []
_HOOKED = []


def _events(call):
    """What `call` compiles, executes, opens or starts, by Python's audit events; hooks stay, so there is one."""
    if not _HOOKED:
        watched = ("compile", "exec", "open", "os.system", "subprocess.Popen", "os.fork", "socket.connect")
        sys.addaudithook(lambda event, _: _EVENTS.append(event) if event in watched and _HOOKED[-1] else None)
    _HOOKED.append(True)
    try:
        with contextlib.suppress(Exception):
            call()
    finally:
        _HOOKED.append(False)
        found, _EVENTS[:] = list(_EVENTS), []
    return found


def _hostile(value):
    if isinstance(value, dict):
        return {name: _hostile(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_hostile(inner) for inner in value]
    return CODE if isinstance(value, str) else value


@pytest.fixture(scope="module")
def entries():
    """A problem of each task, as it comes out of JSON."""
    import reasoning_gym

    return {
        task: json.loads(json.dumps(reasoning_gym.create_dataset(task, seed=1, size=1)[0], default=str))
        for task in reasoning_gym.factory.DATASETS
        if task != "composite"
    }


def test_every_task_of_reasoning_gym_is_known_to_parse_or_to_evaluate(entries):
    """A new version may bring a task, or another scorer: it is read first, then put on one of the lists."""
    assert importlib.metadata.version("reasoning-gym") == READ_VERSION
    assert not PARSING & EVALUATING
    assert {*entries, "composite"} == PARSING | EVALUATING


def test_scorers_that_are_called_compile_open_and_start_nothing(entries, tmp_path, monkeypatch):
    """With code as the answer, as the right answer and as each part of the problem, which bitwise_arithmetic's ran."""
    monkeypatch.chdir(tmp_path)
    for task in sorted(PARSING | answer_checkers.CHECKERS.keys()):
        entry = entries[task]
        reasoning_gym_reward([f"<answer>{entry['answer']}</answer>"], [json.dumps(entry)])  # loads what it needs
        parts = [{**entry["metadata"], name: _hostile(value)} for name, value in entry["metadata"].items()]
        problems = [entry, {**entry, "answer": CODE}] + [{**entry, "metadata": part} for part in parts]
        for problem in problems:
            problem["metadata"]["source_dataset"] = task
            for answer in (CODE, entry["answer"]):
                found = _events(lambda a=answer, p=problem: reasoning_gym_reward([f"<answer>{a}</answer>"], [json.dumps(p)]))
                assert not found, (task, answer, problem)
    assert not os.path.exists("executed")
    assert _events(lambda: eval("1 + 1")) == ["compile", "exec"], "the watch works"


@pytest.mark.parametrize("task", sorted(answer_checkers.CHECKERS))
def test_checkers_of_ours_give_what_the_tasks_own_scorers_give(task):
    import reasoning_gym

    source = reasoning_gym.create_dataset(task, seed=7, size=12)
    own = reasoning_gym.get_score_answer_fn(task)
    scores = set()
    for entry in (json.loads(json.dumps(source[i])) for i in range(12)):
        right = entry["answer"] or "(8 - 4) * (7 - 1)"
        rows = [line.split() for line in right.splitlines()]
        answers = [right, f" {right} ", right + " + 1", f"({right})", "1 / 0", "2 +", "no idea", "", right.replace("*", "x")]
        answers += [str(rows), json.dumps(rows), str(rows[0]), str(tuple(rows[0])), str(list(right)), right[::-1], "[1, 2.5]"]
        answers += ["-12", "24", "6*4*1*1", "49/2 + 0*1*1", "-(3 - 27) * 1 * 1", ".5 * 48 * 1 * 1", "3 3 8 8"]
        if task == "bitwise_arithmetic":
            answers += [str(int(right, 0)), hex(int(right, 0) + 1), "0x10"]
        for answer in answers:
            with contextlib.suppress(Exception):
                scores.add(answer_checkers.check(task, answer, entry))
            text = [f"<answer>{answer}</answer>"]
            expected = min(max(_or_0(own, answer.strip(), entry), 0.0), 1.0) if answer.strip() else 0.0
            assert reasoning_gym_reward(text, [json.dumps(entry)]) == [expected], (answer, entry)
    assert {0.0, 1.0} <= {round(score) for score in scores}


def _or_0(score, answer, entry):
    try:
        return float(score(answer, entry))
    except Exception:
        return 0.0


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("task", "answer"),
    [
        pytest.param("rubiks_cube", "R999999999", id="moves-without-end"),
        pytest.param("rush_hour", "A+" + "9" * 18, id="steps-without-end"),
        pytest.param("coin_flip", "1e999999999", id="digits-without-end"),
        pytest.param("propositional_logic", "\u2228".join(f"p{i}" for i in range(40)), id="truth-values-without-end"),
        pytest.param("propositional_logic", "\u00ac" * 5000 + "P", id="signs-within-signs"),
        pytest.param("boxnet", '[{"a":"move(' + ", " * 50000 + '"}]', id="commas"),
        pytest.param("countdown", "(" * 4000, id="brackets"),
        pytest.param("n_queens", "[" * 9000, id="lists"),
        pytest.param("puzzle24", "-" * 9000 + "1", id="signs"),
        pytest.param("bitwise_arithmetic", "9" * 9000, id="digits"),
    ],
)
def test_answer_that_would_keep_a_scorer_busy_for_ever_is_wrong(task, answer, entries):
    """The first asked for 8 GB, the third for a number of a thousand million digits."""
    assert reasoning_gym_reward([f"<answer>{answer}</answer>"], [json.dumps(entries[task])])[0] <= 0.01


def test_task_that_runs_answers_as_code_is_refused_by_name(entries):
    entry = json.dumps(entries["simple_integration"])
    with pytest.raises(UnsafeScorerError, match=r"'simple_integration' runs the answer, or the problem.*run_answers"):
        reasoning_gym_reward(["<answer>x</answer>"], [entry])
    with pytest.raises(UnsafeScorerError, match="'simple_integration' runs the answer"):
        reasoning_gym_reward(["<answer>x</answer>"], [entry], run_answers_as_code=[True])  # a column is no permission
    with pytest.raises(ValueError, match=r"'simple_integration' runs the answer.*load_problems\(run_answers_as_code=True\)"):
        load_problems(["simple_integration"], 1)


def test_scorers_of_another_version_have_not_been_read(entries, monkeypatch):
    monkeypatch.setattr(entra.problems, "_installed", lambda: "0.1.26")
    with pytest.raises(UnsafeScorerError, match=r"of reasoning-gym 0.1.26 have not been read.*reasoning-gym==0.1.25"):
        reasoning_gym_reward(["<answer>x</answer>"], [json.dumps(entries["chain_sum"])])


needs_limits = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and limits: Linux or macOS")


@needs_limits
def test_code_in_an_answer_meets_a_process_with_nothing(entries, tmp_path, monkeypatch):
    """Its own score is all that such code can set; no file, socket, process, variable or other row is in its reach."""
    monkeypatch.setenv("ENTRA_SECRET", "1")
    monkeypatch.chdir(tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("here")
    entry = json.dumps(entries["polynomial_multiplication"])

    def told(*lines):
        """What code sees, told by a score: 0.75 for true."""
        body = "\n ".join(lines)
        code = f"import os\ndef f():\n {body}\nv = 0\ntry: v = f()\nexcept Exception: pass\n"
        code += "os.write(3, b'0.75' if v else b'0.25')\nos._exit(0)"
        return unsafe_reasoning_gym_reward([f"<answer>exec({code!r})</answer>"], [entry])[0] == 0.75

    try:
        assert unsafe_reasoning_gym_reward([f"<answer>{json.loads(entry)['answer']}</answer>"], [entry]) == [1.0]
        assert told("return 1")
        assert not told("return 'ENTRA_SECRET' in os.environ")
        assert not told(f"return open({str(victim)!r}).read()")
        assert not told(f"open({str(victim)!r}, 'w').write('gone'); return 1")
        assert not told("import _socket; return _socket.socket()")
        assert not told("return os.system('true') == 0")
        assert not told("return os.fork() >= 0")
        assert not told("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99)); return 1")
        assert not told("return len(bytearray(3 * 2 ** 30))")
        if sys.platform == "linux" and os.geteuid() == 0:
            assert not told(f"return os.path.exists({str(victim)!r}) or os.getuid() == 0")
            assert not told("os.kill(os.getppid(), 9); return 1")
        assert victim.read_text() == "here"
        assert unsafe_reasoning_gym_reward(["<answer>exec('raise SystemExit')</answer>"], [entry]) == [0.0]
        right = {task: json.dumps(entries[task]) for task in ("simple_integration", "intermediate_integration")}
        for text in right.values():
            assert unsafe_reasoning_gym_reward([f"<answer>{json.loads(text)['answer']}</answer>"], [text]) == [1.0]
        assert len(load_problems(["simple_integration"], 2, run_answers_as_code=True)) == 2
    finally:
        scorer_process.stop()


@needs_limits
@pytest.mark.timeout(60)
def test_code_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(scorer_process, "SECONDS", 0.5)
    forked = []
    fork = os.fork
    monkeypatch.setattr(os, "fork", lambda: forked.append(fork()) or forked[-1])

    def endless():
        while True:
            pass

    assert scorer_process._in_fork(endless, lambda: None) == {"score": 0.0}
    with pytest.raises(ChildProcessError):  # it has ended, and was waited for
        os.waitpid(forked[0], os.WNOHANG)


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
