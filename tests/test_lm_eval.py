"""longfit as an lm-eval model: the cut, the same answers as our own evaluation, no silent no-op."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install lm-eval==0.4.13 nltk wonderwords scipy)")

from lm_eval.tasks import TaskManager

from longfit.errors import InputError, ScoreError, UnknownNameError, UnsupportedFeatureError
from longfit.eval import answering, needle
from longfit.eval.cells import Cell
from longfit.eval.lm_eval import LongfitLM, run, split_request
from longfit.fitted import FitMixin
from tests.lm_eval_tasks import write_task
from tests.test_needle import byte_tokenizer
from tests.tiny import tiny_model

NEW_TOKENS = 12


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    # Reading the thousands of tasks that lm-eval ships takes half a minute; the command line's test does it once.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture
def tokenizer():
    return byte_tokenizer(None)


@pytest.fixture
def model(tokenizer):
    made = tiny_model("llama", vocab_size=300, max_position_embeddings=2048)
    made.generation_config.eos_token_id = tokenizer.eos_token_id
    return made


def request(prompt, target, doc=None):
    return SimpleNamespace(args=(prompt, target), doc=doc or {})


def asked(text="Some long text of many words. " * 20, question="What is it?"):
    """A LongBench request."""
    doc = {"context": text, "question": question}
    return request(f"Read:\n{text}\nNow answer. {question} Answer:", {"until": ["\n"], "max_gen_toks": 8}, doc)


def test_longbench_is_cut_where_its_context_ends():
    one = asked("The context.", "Who?")
    assert split_request(one, one.args[0]) == ("Read:\nThe context.", "\nNow answer. Who? Answer:")
    examples = "Read:\nThe context.\nNow answer. Who? Answer: me\n\n"
    assert split_request(one, examples + one.args[0])[0] == examples + "Read:\nThe context."


@pytest.mark.parametrize(
    ("context", "question"),
    [
        ("Some text.\n", "What is the special magic number for a-b mentioned in the provided text? The special"),
        ("Some text.\n", "What are all the special magic uuids for a mentioned in the provided text?"),
        ("VAR A = 1\nQuestion: Find all variables that are assigned the value 1 in\n", "Question: Find all variables "
         "that are assigned the value 2 in the text above. Answer:"),
        ("1. a 2. b\n", "Question: What are the 10 most common words in the above list? Answer:"),
        ("aaa ... bbb\n", "Question: Do not provide any explanation. Please ignore the dots '....'. What"),
        ("Answer the question based on the given documents. Only give me the answer and do not output any other words."
         "\n\nThe following are given documents.\n\nDocument 1:\nQuestion: Why?\n\n",
         "Answer the question based on the given documents. Only give me the answer and do not output any other words."
         "\n\nQuestion: Who? Answer:"),
    ],
)  # fmt: skip
def test_rulers_prompts_are_cut_before_the_templates_last_question(context, question):
    prompt = context + question
    assert split_request(request(prompt, {}, {"input": prompt, "outputs": []}), prompt) == (context, question)


def test_what_cannot_be_cut_is_refused_unless_a_guess_will_do():
    prompt = "One paragraph.\n\nAnother paragraph."
    with pytest.raises(InputError, match="aware=true"):
        split_request(request(prompt, {}, {"text": "x"}), prompt)
    assert split_request(request(prompt, {}), prompt, guess=True) == ("One paragraph.\n\n", "Another paragraph.")
    with pytest.raises(InputError, match="cannot tell"):
        split_request(request("one line", {}), "one line", guess=True)


def native(model, tokenizer, samples, cell):
    task = copy.copy(needle.TASKS["niah_single"])
    task.settled = lambda prediction, sample: False  # lm-eval's RULER stops at the length only
    with answering.wrapped(model, cell) as fitted:
        reader = answering.Reader(fitted, tokenizer, NEW_TOKENS)
        return [answering.answer(reader, task, sample, cell)[0] for sample in samples]


def write_needles(folder, samples):
    write_task(folder, "ours", samples, " The ", 700, NEW_TOKENS, "process_results")


@pytest.mark.parametrize(
    ("method", "options", "awareness"),
    [("knorm", {}, "agnostic"), ("snapkv", {"window": 6}, "agnostic"), ("snapkv", {"window": 6}, "aware"),
     ("full", {}, "agnostic")],
)  # fmt: skip
def test_lm_eval_and_our_own_evaluation_give_the_same_texts_and_scores(
    model, tokenizer, tmp_path, method, options, awareness
):
    plain = method == "full"
    cell = Cell(method, "100%" if plain else "25%", awareness, options)
    samples = needle.TASKS["niah_single"].samples(tokenizer, length=700, n=4, chat=False)
    texts = [record["answer"] for record in native(model, tokenizer, samples, cell)]
    # A random model never finds the needle: every other sample asks for what it does say.
    samples = [
        dataclasses.replace(sample, answers=(next(filter(str.isalnum, text)),) if sample.index % 2 else sample.answers)
        for sample, text in zip(samples, texts, strict=True)
    ]
    ours = [record["score"] for record in native(model, tokenizer, samples, cell)]
    write_needles(tmp_path, samples)
    found = run(
        ["ours"],
        model,
        method,
        None if plain else "25%",
        aware=awareness == "aware",
        options=options,
        tokenizer=tokenizer,
        include_path=tmp_path,
        output=tmp_path / "out" / "results.json",
    )
    told = sorted(found["samples"]["ours"], key=lambda sample: sample["doc_id"])
    assert [sample["arguments"][0][0] for sample in told] == [s.prompt.context + s.prompt.question for s in samples]
    assert [sample["resps"][0][0] for sample in told] == texts
    assert ours == [0.0, 1.0, 0.0, 1.0] and found["results"]["ours"]["700,none"] == 0.5
    config = json.loads((tmp_path / "out" / "results.json").read_text())["config"]
    assert config["longfit_cell"] == cell.cell_id
    if not plain:
        assert config["longfit_compressions"] == 4
        assert config["longfit_kept_tokens"] < 0.27 * config["longfit_tokens_in"]


def fitted(model, tokenizer, **more):
    return LongfitLM(model, tokenizer=tokenizer, **{"compressor": "knorm", "budget": "25%"} | more)


def test_stop_strings_end_an_answer(model, tokenizer):
    lm = fitted(model, tokenizer)
    whole = lm.generate_until([asked()])[0]
    one = asked()
    one.args[1]["until"] = [whole[3]]
    assert lm.generate_until([one])[0] == whole[: whole.index(whole[3])]


def test_with_nothing_dropped_likelihoods_are_the_plain_models(model, tokenizer):
    requests = [request(asked().args[0], " blue", asked().doc), request("A text nobody can cut", " here", {})]
    wanted = LongfitLM(copy.deepcopy(model), tokenizer=tokenizer).loglikelihood(requests, disable_tqdm=True)
    found = fitted(model, tokenizer, budget="100%").loglikelihood(requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_likelihoods_know_the_greedy_continuation(model, tokenizer):
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"]
    silent = sorted(set(range(300)) - set(letters))
    model.lm_head.weight.data[silent] = 0.0  # a random model also says bytes that are no text
    lm = fitted(model, tokenizer)
    for number in range(4):
        one = asked(question=f"What is {number}?")
        said = lm.generate_until([one])[0][0]
        right, wrong = lm.loglikelihood([request(one.args[0], text, one.doc) for text in (said, "~")])
        assert right[1] and not wrong[1] and right[0] > wrong[0]


def test_choices_of_one_context_share_its_memory_and_feel_the_compression(model, tokenizer):
    choices = [request(asked().args[0], text, asked().doc) for text in ("a", "zq")]
    lm = fitted(copy.deepcopy(model), tokenizer)
    found = lm.loglikelihood(choices)
    assert lm.calls == 1 and found == lm.loglikelihood(choices)
    full = LongfitLM(model, tokenizer=tokenizer).loglikelihood(choices, disable_tqdm=True)
    assert all(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(found, full, strict=True))


def test_a_compressor_that_drops_nothing_is_an_error(model, tokenizer):
    lm = fitted(model, tokenizer)
    with lm.model.longfit.lossless(64), pytest.raises(ScoreError, match="nothing was compressed"):
        lm.generate_until([asked()])


def test_what_cannot_be_done_is_refused(model, tokenizer):
    for arguments, wanted in (
        ({"budget": None}, "needs a budget"),
        ({"compressor": None}, "without a compressor"),
        ({"window": 3}, "option_NAME"),
        ({"options": "[1]"}, "JSON object"),
        ({"options": "{"}, "not JSON"),
        ({"tokenizer": None}, "tokenizer"),
    ):
        with pytest.raises(InputError, match=wanted):
            fitted(model, arguments.pop("tokenizer", tokenizer), **arguments)
    with pytest.raises(UnknownNameError):
        fitted(model, tokenizer, compressor="knrm")
    lm = fitted(model, tokenizer, aware=True)
    with pytest.raises(UnsupportedFeatureError, match="perplexity"):
        lm.loglikelihood_rolling([request("text", "")])
    with pytest.raises(UnsupportedFeatureError, match="aware=false"):
        lm.loglikelihood([asked()])
    with pytest.raises(InputError, match="leaves nothing"):
        fitted(model, tokenizer).loglikelihood([request("", "text")])


def test_a_task_that_lm_eval_does_not_have_is_named(model, tokenizer):
    with pytest.raises(UnknownNameError, match="no task nosuchtask; `lm-eval ls tasks`"):
        run(["nosuchtask"], model, "knorm", "25%", tokenizer=tokenizer)


def test_a_tokenizer_without_a_chat_template_is_given_plain_prompts(model, tokenizer, tmp_path):
    samples = needle.TASKS["niah_single"].samples(tokenizer, length=700, n=1, chat=True)
    write_needles(tmp_path, samples)
    found = run(["ours"], model, "knorm", "25%", tokenizer=tokenizer, include_path=tmp_path, chat=True)
    (told,) = found["samples"]["ours"]
    assert told["arguments"][0][0] == samples[0].prompt.context + samples[0].prompt.question


def test_options_reach_the_method_in_both_spellings(model, tokenizer):
    lm = fitted(model, tokenizer, compressor="snapkv", options='{"kernel_size": 3}', option_window=6)
    assert isinstance(lm.model, FitMixin)
    assert (lm.model.longfit.method.window, lm.model.longfit.method.kernel_size) == (6, 3)


def test_the_command_line_runs_data_parallel(model, tokenizer, tmp_path):
    samples = needle.TASKS["niah_single"].samples(tokenizer, length=700, n=4, chat=False)
    write_needles(tmp_path, samples)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]  # accelerate launch --cpu starts one process
    command = [sys.executable, *launch, "-m", "longfit.eval.lm_eval", "--model", "longfit", "--tasks", "ours"]
    command += [
        "--include_path",
        str(tmp_path),
        "--output_path",
        str(tmp_path / "out"),
        "--log_samples",
        "--model_args",
    ]
    command += [
        f"pretrained={tmp_path / 'model'},compressor=snapkv,budget=25%,option_window=6,aware=false,dtype=float32"
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, "--device", "cpu"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for file in (tmp_path / "out").rglob("samples_*.jsonl") for line in file.open()]
    answers = [line["resps"][0][0] for line in sorted(lines, key=lambda line: line["doc_id"])]
    assert answers == [
        record["answer"] for record in native(model, tokenizer, samples, Cell("snapkv", "25%", options={"window": 6}))
    ]
