"""Models as judges: what they are shown, how replies are read, and that a failure is no score."""

import json
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from chat_server import KEY, said, serve  # noqa: F401 (serve is a fixture)
from tiny_model import TinyRun, lines, make_tiny, tiny_tokenizer, write_pope
from transformers import LlamaConfig, LlamaForCausalLM

from vflan.evaluation.benchmarks import BENCHMARKS
from vflan.evaluation.benchmarks.benchmark import metrics
from vflan.evaluation.evaluator import evaluate
from vflan.evaluation.judge import EndpointJudge, Judgement, LocalJudge, RuleJudge, judge_all, title
from vflan.evaluation.judge_prompts import (
    GRADE,
    PAIR,
    YES_NO,
    prompt_for,
    read_grade,
    read_pair,
    read_yes_no,
)

SAMPLE = {
    "text": "What is there?",
    "label": "A red star.",
    "category": "conv",
    "context": "One red star on sand.",
}


@pytest.fixture
def judge(tmp_path):
    return EndpointJudge(
        "grader", YES_NO, cache=tmp_path / "cache", timeout=5, retries=2, workers=2
    )


def ask(judge, answers, sample=SAMPLE):
    return judge_all(judge, [sample] * len(answers), answers)


# ---------------------------------------------------------------------------------- reading replies


@pytest.mark.parametrize(
    "reply, read",
    [
        ("8 9\nThe second is better.", (9.0, 8.0)),
        ("8, 9", (9.0, 8.0)),
        ("\n 7.5 10 \nbecause 3 stars", (10.0, 7.5)),
        ("8\n9", (9.0, 8.0)),
        ("**8 9**", (9.0, 8.0)),
        ("[8] [9]", (9.0, 8.0)),
        ("8 9 because the second is better", (9.0, 8.0)),
        ("Answer 1: 8\nAnswer 2: 9", (9.0, 8.0)),
        ("Answer 1: 8 / Answer 2: 9", (9.0, 8.0)),
        ("**Answer 2**: 9, **Answer 1**: 8", (9.0, 8.0)),
        ("Assistant 1: 8/10\nAssistant 2: 9.5/10", (9.5, 8.0)),
        ("Answer 1 is 7, Answer 2 is 8", (8.0, 7.0)),
        ("8/10, 9/10", (9.0, 8.0)),
        ("8/10", None),
        ("Answer 1: 8", None),
        ("Answer 1: 8\nAnswer 2: 9\nAnswer 1: 7", None),
        ("1. The first is good. 2. The second is not.", None),
        ("2024-01-02", None),
        ("8 9 10", None),
        ("8", None),
        ("0 9", None),
        ("-1 9", None),
        ("8 11", None),
        ("Both are good.\n8 9", None),
        ("", None),
    ],
)
def test_a_pair_is_two_bare_numbers_on_the_first_line_or_one_for_each_label(reply, read):
    assert read_pair(reply) == read


@pytest.mark.parametrize(
    "reply, read",
    [("0.7", 0.7), ("1", 1), ("0.0\n", 0), ("1.0.", 1), ("0.5 since", 0.5), ("0,7", 0.7),
     ("**0.8**", 0.8), ("50%", 0.5), ("0.5/1", 0.5), ("0.8/1.0", 0.8), ("7/10", 0.7),
     ("1 out of 10", 0.1), ("1 of 2", 0.5), ("Score: 0.7", 0.7), ("1) wrong", None),
     ("1. The answer misses it.", None), ("0.5-0.7", None), ("0.5 or 0.6", None), ("1/2/3", None),
     ("1/0", None), ("1.5", None), ("10", None), ("1st", None), ("about 0.5", None),
     ("-0.5", None), ("", None)],
)  # fmt: skip
def test_a_grade_from_0_to_1_or_in_its_own_scale_begins_the_reply(reply, read):
    assert read_grade(reply) == (None if read is None else (pytest.approx(read), 1.0))


@pytest.mark.parametrize(
    "reply, read",
    [("Yes", 1), ("no.", 0), (" **Yes**, it is", 1), ("NO", 0), ("Not sure", None),
     ("yesterday", None), ("I say yes", None), ("", None)],
)  # fmt: skip
def test_yes_or_no_is_the_first_word(reply, read):
    assert read_yes_no(reply) == (None if read is None else (float(read), 1.0))


# ------------------------------------------------------------------------------------------ prompts


def test_the_judge_is_shown_context_question_reference_first_and_candidate_second():
    text = PAIR.fill("What is {there}?", "REFERENCE", "CANDIDATE {0}", SAMPLE)
    wanted = [
        "One red star on sand.",
        "What is {there}?",
        "REFERENCE",
        "CANDIDATE {0}",
        "the two scores",
    ]
    assert [text.find(part) > 0 for part in wanted] == [True] * 5
    assert [text.index(part) for part in wanted] == sorted(text.index(part) for part in wanted)


def test_the_facts_of_a_mini_world_picture_are_its_context():
    assert "red star, blue ring" in PAIR.fill(
        "?", "r", "a", {"facts": [["red", "star"], ["blue", "ring"]]}
    )


def test_the_benchmarks_own_rules_are_read_if_their_file_exists(tmp_path):
    assert prompt_for("llava_bench", tmp_path) is PAIR and prompt_for("mm_vet", tmp_path) is GRADE
    assert prompt_for("cifar10", tmp_path) is YES_NO
    (tmp_path / "llava_bench").mkdir()
    rules = {
        "coding": {"role": "Dev", "prompt": "code"},
        "llava_bench_conv": {"role": "Helper", "prompt": "THE RULE"},
    }
    (tmp_path / "llava_bench" / "rule.json").write_text(json.dumps(rules))
    own = prompt_for("llava_bench", tmp_path)
    assert "[End of Helper 2]\n\n[System]\nTHE RULE" in own.fill("?", "r", "a", SAMPLE)
    assert "two answers" in own.fill("?", "r", "a", SAMPLE | {"category": "no rule for this one"})
    assert own.hash != PAIR.hash and len(own.hash) == 8
    (tmp_path / "llava_bench" / "rule.json").write_text('{"coding": {}}')
    with pytest.raises(
        ValueError, match="begins with llava_bench_: is it the benchmark's rule.json"
    ):
        prompt_for("llava_bench", tmp_path)


# ---------------------------------------------------------------------------------------- endpoints


def test_an_endpoint_is_asked_at_temperature_0_and_its_version_is_in_the_title(serve, judge):
    server = serve(lambda body, n: said("Yes"))
    found = ask(judge, ["A red star is there."])
    assert found == [Judgement(1.0, "Yes", 1.0, "served-v1")]
    body = server.asked[0]
    assert (
        body["model"] == "grader"
        and body["temperature"] == 0
        and body["max_tokens"] == YES_NO.max_tokens
    )
    assert "Prediction: A red star is there." in server.texts()[0] and server.keys == {
        f"Bearer {KEY}"
    }
    assert title(judge, found) == f"grader yes_no-{YES_NO.hash} served-v1"


def test_the_key_is_in_no_output_no_file_and_no_repr(serve, judge, tmp_path, capfd):
    refusal = (400, {"error": {"message": f"your key {KEY} for http is odd"}})
    server = serve(lambda body, n: refusal if "Prediction: two" in str(body) else said("No"))
    refusal[1]["error"]["message"] += f" at {server.url}"
    found = ask(judge, ["one", "two", "three"])
    assert "Error code: 400" in found[1].reason
    out = capfd.readouterr()
    kept = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "secret" not in repr(judge) + repr(found) + out.out + out.err + kept
    assert "127.0.0.1" not in repr(judge) + repr(found) + out.out + kept


def test_without_a_key_the_error_names_the_environment_variable(judge, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="Set OPENAI_API_KEY in the environment"):
        ask(judge, ["x"])


@pytest.mark.parametrize(
    "failure",
    [
        (429, {"error": {"message": "slow down"}}, {"Retry-After": "0.01"}),
        (429, {"error": {"message": "slow down"}}, {"Retry-After-Ms": "5"}),
        (500, {"error": {"message": "oh"}}),
        (503, "busy"),
    ],
    ids=["429 seconds", "429 milliseconds", "500", "503"],
)
def test_a_passing_failure_is_retried(serve, judge, failure):
    server = serve(lambda body, n: failure if n < 3 else said("Yes"))
    assert [j.score for j in ask(judge, ["x"])] == [1.0] and len(server.asked) == 3


def test_the_server_says_how_long_to_wait(serve, judge):
    serve(lambda body, n: (429, {}, {"Retry-After": "0.3"}) if n == 1 else said("Yes"))
    start = time.monotonic()
    ask(judge, ["x"])
    assert time.monotonic() - start > 0.25


def test_a_time_out_is_retried(serve, judge):
    def late(body, n):
        if n == 1:
            time.sleep(0.5)
        return said("Yes")

    server = serve(late)
    hasty = EndpointJudge("grader", YES_NO, cache=judge.cache, timeout=0.15, retries=2)
    assert [j.score for j in ask(hasty, ["x"])] == [1.0] and len(server.asked) == 2


def test_a_lasting_failure_has_a_reason_and_no_score(serve, judge, capsys):
    server = serve(
        lambda body, n: (
            (500, {"error": {"message": "oh no"}}) if "bad" in str(body) else said("Yes")
        )
    )
    found = ask(judge, ["good", "bad"])
    assert [j.score for j in found] == [1.0, None]
    assert "InternalServerError" in found[1].reason
    assert len(server.asked) == 1 + 2 * 3, "one try and two more, and once again as a whole"


@pytest.mark.parametrize(
    "body",
    ["not json at all", {}, {"choices": []}, {"choices": None}, "[1, 2]", "null",
     {"choices": [{"message": {"content": 7}}]}, said(None), said(""), said("maybe")],
    ids=str,
)  # fmt: skip
def test_a_malformed_or_empty_reply_is_a_failure(serve, judge, body):
    server = serve(lambda b, n: body)
    (found,) = ask(judge, ["x"])
    assert found.score is None and found.reason and len(server.asked) == 2, "it is asked once more"
    assert (
        len(list(judge.cache.glob("*.jsonl"))) == 1
        and not next(judge.cache.glob("*.jsonl")).read_text()
    )


def test_a_reply_that_cannot_be_read_may_be_right_the_second_time(serve, judge):
    serve(lambda body, n: said("hm") if n == 1 else said("No"))
    assert [j.score for j in ask(judge, ["x"])] == [0.0]


@pytest.mark.parametrize(
    "status, match",
    [
        (401, "refused the key: check OPENAI_API_KEY"),
        (403, "refused the key"),
        (404, "knows no model 'grader'"),
    ],
)
def test_a_wrong_key_or_name_stops_at_once(serve, judge, status, match):
    server = serve(lambda body, n: (status, {"error": {"message": f"bad {KEY}"}}))
    with pytest.raises(ValueError, match=match) as error:
        ask(judge, [str(i) for i in range(50)])
    assert len(server.asked) < 20 and "secret" not in str(error.value)


def test_an_endpoint_that_is_down_ends_the_judging(serve, judge):
    server = serve(lambda body, n: (500, {}))
    with pytest.raises(
        ConnectionError, match="failed 8 times in a row .*is it running.*call again to continue"
    ):
        ask(judge, [str(i) for i in range(100)])
    assert len(server.asked) < 60


def test_a_newer_models_name_for_the_limit_is_used(serve, judge):
    refusal = (
        400,
        {"error": {"message": "Unsupported parameter: use 'max_completion_tokens' instead."}},
    )
    server = serve(lambda body, n: refusal if "max_tokens" in body else said("Yes"))
    assert [j.score for j in ask(judge, ["x"])] == [1.0] and server.asked[-1][
        "max_completion_tokens"
    ] == 5


def test_nothing_is_paid_for_twice(serve, judge, capsys):
    server = serve(lambda body, n: said("Yes" if n < 3 else "No"))
    first = ask(judge, ["a", "b", "a"])
    assert len(server.asked) == 2 and first[0] == first[2]
    assert ask(judge, ["b", "a"]) == [first[1], first[0]] and len(server.asked) == 2
    assert "grader is asked for 2 judgements (0 more are in the cache)" in capsys.readouterr().out
    assert [j.score for j in ask(judge, ["c", "a"])] == [0.0, 1.0] and len(server.asked) == 3
    assert "for 1 judgements (1 more are in the cache)" in capsys.readouterr().out
    ask(judge, ["a"], SAMPLE | {"label": "another reference"})
    assert len(server.asked) == 4


def test_the_cost_is_estimated_before_the_first_call(serve, judge, capsys):
    printed = []
    serve(lambda body, n: printed.append(capsys.readouterr().out) or said("Yes"))
    priced = EndpointJudge("grader", YES_NO, price=(2.0, 8.0), cache=judge.cache, workers=1)
    ask(priced, ["x"])
    tokens = len(YES_NO.fill(SAMPLE["text"], SAMPLE["label"], "x", SAMPLE)) // 4
    assert f"about {tokens} tokens to read and at most 5 to write; $0.00 at most." in printed[0]
    assert priced.estimate(["x" * 4_000_000]).endswith("$2.00 at most.")
    assert "price unknown" in judge.estimate(["x"])


def test_a_run_judged_through_an_endpoint_names_the_judge_and_leaves_failures_out(
    serve, tmp_path, capsys
):
    write_pope(tmp_path / "benchmarks", tmp_path)
    tiny = make_tiny(tmp_path)
    run = TinyRun(tmp_path, tiny)
    judge = EndpointJudge("grader", cache=tmp_path / "cache")
    replies = {"is there a star ?": "Yes", "is there a blue ?": "No"}
    serve(
        lambda body, n: said(
            replies.get(
                body["messages"][0]["content"].split("\n")[0].removeprefix("Question: "), ""
            )
        )
    )
    scores = evaluate(run, judge={"pope": judge})
    row = scores[scores.metric == "f1"].iloc[0]
    assert (row.value, row.n, row.problems) == (
        50,
        6,
        6,
    ) and row.judge == f"grader yes_no-{YES_NO.hash} served-v1"
    assert "judge: no score in the reply" in capsys.readouterr().out
    assert "grader" in set(pd.read_csv(tmp_path / "scores.csv").judge).pop()
    assert "grader" not in json.dumps(lines(tmp_path / "answers" / "pope.jsonl")[0])


def test_a_pair_becomes_a_ratio_of_means(serve, tmp_path, monkeypatch):
    write_pope(tmp_path / "benchmarks", tmp_path)
    run = TinyRun(tmp_path, make_tiny(tmp_path))

    def items(samples, answers, judgements):
        score, out_of = ([getattr(j, field) for j in judgements] for field in ("score", "out_of"))
        return metrics("score", score, samples, den=out_of)

    pope = BENCHMARKS["pope"]
    options = dict(load=pope.load, prompt=pope.prompt, blind=pope.blind, max_new_tokens=4)
    options |= dict(items=items, judged=True, headline="score", default=True, unit=pope.unit)
    open_questions = SimpleNamespace(name="llava_bench", **options)
    monkeypatch.setitem(BENCHMARKS, "llava_bench", open_questions)
    serve(lambda body, n: said("10 5" if "is there a star ?" in str(body) else "5 5"))
    scores = evaluate(
        run, "llava_bench", judge=EndpointJudge("gpt", cache=tmp_path / "cache")
    ).set_index("metric")
    assert scores.value["score/random"] == pytest.approx(100 * 5 / 7.5)
    assert (
        scores.judge["score"].startswith(f"gpt pair-{PAIR.hash}") and scores.baseline.isna().all()
    )


# ------------------------------------------------------------------------------------ a local model


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory):
    """A random language model whose every word is `yes` (then the end), in a folder."""
    folder = tmp_path_factory.mktemp("vicuna")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **small)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


def says(monkeypatch, tokenizer, word):
    """Make every language model say `word` and stop."""
    ids = [tokenizer.convert_tokens_to_ids(word), tokenizer.eos_token_id]
    seen = []

    def generate(self, input_ids, attention_mask, max_new_tokens, **more):
        seen.append((input_ids, attention_mask, max_new_tokens))
        return torch.cat([input_ids, torch.tensor([ids] * len(input_ids))], dim=1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    return seen


@pytest.mark.parametrize("word, score", [("yes", 1.0), ("no", 0.0), ("star", None)])
def test_only_the_new_tokens_of_a_local_judge_are_read(vicuna, monkeypatch, word, score):
    folder, tokenizer = vicuna
    seen = says(monkeypatch, tokenizer, word)
    judge = LocalJudge(str(folder), YES_NO, batch_size=2)
    found = ask(judge, ["a red star", "a", "yes or no ? yes"])  # the prompt itself holds both words
    assert [j.score for j in found] == [score] * 3 and len(seen) == 2
    ids, mask, tokens = seen[0]
    assert tokens == 5 and mask[:, -1].all() and not mask[-1, 0] and ids.shape == mask.shape, (
        "padded on the left"
    )


def test_a_local_judge_is_prompted_as_vicuna_is_and_named_by_its_weights(vicuna, monkeypatch):
    folder, tokenizer = vicuna
    seen = says(monkeypatch, tokenizer, "yes")
    judge = LocalJudge(str(folder), YES_NO)
    found = judge.judge("what is there ?", "star", "a star", SAMPLE)
    text = tokenizer.decode(seen[0][0][0])
    assert text.endswith("ASSISTANT :") and "USER :" in text and len(found.version) == 8
    assert (
        title(judge, [found]) == f"{folder.name} yes_no-{YES_NO.hash} {found.version}"
        and "/" not in judge.title
    )


def test_a_local_judge_really_generates(vicuna):
    found = ask(LocalJudge(str(vicuna[0]), YES_NO), ["a", "b"])
    assert all(j.score in (0.0, 1.0) or "no score in the reply" in j.reason for j in found)


def test_the_rules_say_what_they_are_and_judge_out_of_ten():
    judge = RuleJudge({"colors": ["red"], "shapes": ["star"]})
    found = judge_all(judge, [SAMPLE], ["There is a red star."])
    assert found[0].out_of == 10 and title(judge, found) == "rules 1"
