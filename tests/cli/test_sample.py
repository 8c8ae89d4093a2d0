"""`dpo sample`: answers of several models to the same prompts, each kind of model and of prompt; what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_cli.config.outputs import json_file_errors
from tests.builders import save_adapter
from tests.cli.in_process import call
from tests.conftest import build_llama, make_config, write_rows
from tests.data.tiny_tokenizers import tokenizer_of
from tests.faults.launching import run_ranks

LIMIT = 12
TEXTS = ["Name a prime number.", "Say hello."]
CUT_OFF = "--max-new-tokens 12"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama, forked_dpo, demo_rows):
    """A run of four steps, and the prompts in every form."""
    folder = tmp_path_factory.mktemp("sampled")
    pairs = write_rows(folder / "pairs.jsonl", demo_rows[:20])
    few = {"max_steps": 4, "learning_rate": 0.01}
    config = make_config(folder, tiny_llama, pairs, training=few, evaluation={"max_new_tokens": LIMIT})
    ended = forked_dpo("train", "--config", config)
    assert ended.returncode == 0, ended.stderr
    (folder / "p.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    (folder / "p.json").write_text(json.dumps([{"instruction": text} for text in TEXTS]), encoding="utf-8")
    write_rows(folder / "prompts.jsonl", [{"prompt": text} for text in TEXTS])
    messages = [{"messages": [{"role": "user", "content": text}]} for text in TEXTS]
    write_rows(folder / "messages.jsonl", messages)
    return folder


@pytest.fixture
def here(run, monkeypatch):
    """The folder of that run."""
    monkeypatch.chdir(run)
    return run


def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def asked(capsys, arguments: str) -> list[dict]:
    """Run the program in this process and return the rows that it prints."""
    capsys.readouterr()
    status = call(f"sample --config run.yaml {CUT_OFF} --json - {arguments}")
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return [json.loads(line) for line in printed.out.splitlines()]


@torch.no_grad()
def own_answer(folder, text, tokenizer=None) -> str:
    """Return what transformers' own `generate` makes of a user's turn, by a model's own template."""
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    turns = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ends = [tokenizer.eos_token_id]
    found = model.generate(**ids, max_new_tokens=LIMIT, do_sample=False, eos_token_id=ends, pad_token_id=0)
    answer = found[0, ids["input_ids"].shape[1] :].tolist()
    return tokenizer.decode(answer[: answer.index(ends[0])] if ends[0] in answer else answer)


# Who is asked


def test_by_default_the_model_before_training_and_the_trained_one_answer_held_out_prompts(here, tiny_llama, demo_rows):
    assert call(f"sample --config run.yaml {CUT_OFF} --json rows.jsonl --count 3") == 0
    rows = rows_of("rows.jsonl")
    assert not list(json_file_errors(Path("rows.jsonl"))), "the next call may not replace them"
    models = [str(tiny_llama), str(here / "runs" / "run" / "final")]
    assert [row["model"] for row in rows] == models * 3
    for before, after in zip(rows[::2], rows[1::2], strict=True):
        assert before["where"] == after["where"]
        row = demo_rows[int(before["where"].rpartition(":")[2]) - 1]
        assert row["instruction"] in before["prompt"]
        assert before["chosen"] == row["chosen"]
        asked = f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]
        assert [before["answer"], after["answer"]] == [own_answer(model, asked) for model in models]
        assert before["tokens"] <= LIMIT
    assert any(before["answer"] != after["answer"] for before, after in zip(rows[::2], rows[1::2], strict=True))


def test_without_options_the_answers_are_those_that_the_run_has_kept(here, capsys):
    kept = rows_of("runs/run/samples.jsonl")
    capsys.readouterr()
    assert call("sample run.yaml --json -") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for step, answers in ((0, rows[::2]), (4, rows[1::2])):
        expected = [{name: row[name] for name in row if name != "step"} for row in kept if row["step"] == step]
        assert [{name: row[name] for name in row if name != "model"} for row in answers] == expected


@pytest.mark.parametrize("name", ["p.txt", "p.json", "prompts.jsonl", "messages.jsonl"])
def test_prompts_of_every_form_have_the_answers_of_transformers(here, capsys, name):
    rows = asked(capsys, f"--model runs/run/final --prompts {name}")
    assert [row["answer"] for row in rows] == [own_answer("runs/run/final", text) for text in TEXTS]
    assert [row["where"] for row in rows] == [f"{name}:1", f"{name}:{2 if name != 'p.json' else '1, row 2'}"]
    assert {row["chosen"] for row in rows} == {None}
    assert len(asked(capsys, f"--model runs/run/final --prompts {name} --count 1")) == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_checkpoints_adapters_and_models_in_parts_are_asked_each_by_its_own_weights(here, capsys, tiny_llama):
    save_adapter(tiny_llama, here / "adapter")
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(here / "parts", max_shard_size="30KB")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(here / "parts")
    assert len(list((here / "parts").glob("*.safetensors"))) > 1
    names = ["adapter", "parts", "runs/run/checkpoints/step-000002", str(tiny_llama), "adapter"]
    rows = asked(capsys, f"--prompts p.txt {' '.join(f'--model {name}' for name in names[:4])}")
    by_model = {name: [row["answer"] for row in rows if row["model"] == name] for name in names}
    assert by_model["parts"] == by_model[str(tiny_llama)] == [own_answer(tiny_llama, text) for text in TEXTS]
    from peft import AutoPeftModelForCausalLM

    merged = AutoPeftModelForCausalLM.from_pretrained(here / "adapter").merge_and_unload()
    merged.save_pretrained(here / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert by_model["adapter"] == [own_answer(here / "merged", text, tokenizer) for text in TEXTS]
    assert by_model["adapter"] != by_model["parts"]
    assert by_model[names[2]] == [own_answer(names[2], text) for text in TEXTS]


def test_a_run_with_a_start_adapter_is_compared_with_that_adapter(here, capsys, tiny_llama, forked_dpo):
    save_adapter(tiny_llama, here / "start", rank=16)
    few = {"max_steps": 1, "learning_rate": 0.05}
    make_config(here, tiny_llama, here / "pairs.jsonl", "started", adapter={"start": "start"}, training=few)
    ended = forked_dpo("train", "--config", "started.yaml", cwd=here)
    assert ended.returncode == 0, ended.stderr
    capsys.readouterr()
    assert call(f"sample --config started.yaml {CUT_OFF} --json - --prompts p.txt") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["model"] for row in rows[:2]] == [f"{tiny_llama} with start", str(here / "runs" / "started" / "final")]
    base, start = (asked(capsys, f"--prompts p.txt --model {name}") for name in (tiny_llama, "start"))
    assert [row["answer"] for row in rows[::2]] == [row["answer"] for row in start]
    assert [row["answer"] for row in start] != [row["answer"] for row in base]


@pytest.fixture(scope="module")
def stranger(run):
    """A model with another tokenizer and another template."""
    return build_llama(run / "stranger", tokenizer_of("Llama 3"), 5)


def test_a_model_with_another_tokenizer_reads_the_same_prompts_by_its_own(here, capsys, stranger, demo_rows):
    rows = asked(capsys, "--model runs/run/final --model stranger --count 2")
    ours, theirs = rows[::2], rows[1::2]
    for one, other in zip(ours, theirs, strict=True):
        row = demo_rows[int(one["where"].rpartition(":")[2]) - 1]
        question = f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]
        assert one["where"] == other["where"]
        assert one["prompt"] != other["prompt"]
        assert question in one["prompt"] and question in other["prompt"]
        assert other["answer"] == own_answer("stranger", question)


def test_one_prompt_is_shown_as_a_person_reads_it(here, capsys, demo_rows):
    """Of several, what all begin and end with is the template; of one, the data says what it is."""
    alone = f"sample run.yaml {CUT_OFF} --count 1 --page one.html"
    assert call(alone) == 0
    where, *lines = capsys.readouterr().out.splitlines()
    row = demo_rows[int(where.rpartition(":")[2]) - 1]
    assert lines[0] == f"  {row['instruction']}"
    page = Path("one.html").read_text(encoding="utf-8")
    for said in ("\n".join(lines), page):
        assert "<|im_start|>" not in said and "im_start" not in said
    # Prepared pairs are tokens, of which nobody knows where the template ends.
    assert call("prepare-data --config run.yaml data.eval=null --out tokens --report checked") == 0
    assert call(f"{alone} data.train=tokens") == 0
    assert "  (with what the template writes) <|im_start|>user" in capsys.readouterr().out


def test_held_out_pairs_that_are_tokens_alone_are_not_for_another_tokenizer(here, capsys, stranger):
    assert call("prepare-data --config run.yaml data.eval=null --out prepared --report report") == 0
    assert len(asked(capsys, "data.train=prepared --model runs/run/final --count 1")) == 1
    assert call("sample --config run.yaml data.train=prepared --model stranger") == 2
    said = capsys.readouterr().err
    assert "`stranger` has another tokenizer or template" in said and "--prompts" in said


def test_a_model_without_a_template_gets_the_configurations(here, capsys, tiny_llama):
    shutil.copytree(tiny_llama, here / "bare", dirs_exist_ok=True)
    (here / "bare" / "chat_template.jinja").unlink()
    rows = asked(capsys, f"--prompts p.txt --model {tiny_llama} --model bare")
    assert rows[0]["prompt"] == rows[1]["prompt"]
    plain = asked(capsys, f"--prompts p.txt --model {tiny_llama} model.chat_template=plain")
    assert plain[0]["prompt"] == "### Instruction:\nName a prime number.\n\n### Response:\n"


# Where answers go


@pytest.mark.parametrize("colour", [False, True])
def test_the_installed_program_shows_answers_with_their_differences_marked(here, forked_dpo, colour):
    arguments = ["sample", "run.yaml", *CUT_OFF.split(), "--prompts", "p.txt", "--page", "answers.html"]
    ended = forked_dpo(*arguments, cwd=here, env={"FORCE_COLOR": "1"} if colour else {})
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"^(\x1b\[1m)?1\. ", ended.stdout)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", ended.stdout).splitlines()
    assert [f"  {text}" in lines for text in TEXTS] == [True, True]
    assert ("\x1b[31m" in ended.stdout) == colour
    assert ("[-" in ended.stdout and "{+" in ended.stdout) != colour
    page = (here / "answers.html").read_text(encoding="utf-8")
    assert page.count("<mark>") and "Name a prime number." in page
    assert "page written: answers.html" in ended.stderr


def test_json_on_standard_output_is_all_that_is_there(here, forked_dpo):
    ended = forked_dpo("sample", "run.yaml", "--json", "-", "--prompts", "p.txt", *CUT_OFF.split(), "-q", cwd=here)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [json.loads(line)["where"] for line in ended.stdout.splitlines()] == ["p.txt:1"] * 2 + ["p.txt:2"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_two_processes_answer_as_one_does(here, capsys, zygote, sharding):
    one = asked(capsys, f"training.sharding={sharding} --count 3")
    arguments = [here / "run.yaml", f"training.sharding={sharding}", "--count", 3, *CUT_OFF.split()]
    ended = run_ranks(zygote, 2, "sample", *arguments, "--json", here / "two.jsonl")
    assert ended.status == 0, ended.said
    assert rows_of("two.jsonl") == one


# What is refused


def write(name, text):
    Path(name).write_text(text, encoding="utf-8")


@pytest.fixture
def faults(here):
    """Files that are wrong."""
    write("empty.txt", "\n  \n")
    write("rows.jsonl", '{"prompt": "fine"}\n{"question": "Why?"}\n')
    write("answered.jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
    write("long.txt", f"fine\n{'word ' * 2000}\n")
    write("broken.jsonl", '{"prompt": \n')
    write("picture.jsonl", "\x89PNG")
    shutil.copytree("runs/run/final", "damaged", dirs_exist_ok=True)
    write("damaged/config.json", "{}")
    Path("nothing").mkdir(exist_ok=True)
    return here


BAD = [
    ("--model ./missing", "there is no model folder `./missing`", "--model"),
    ("--model missing/model", "the model `missing/model` cannot be loaded", "--model"),
    ("--model missing.gguf", "there is no GGUF file", "--model"),
    ("--model nothing", "`nothing` is not a model folder", "--model"),
    ("--model p.txt", "neither a model folder nor a .gguf file", "--model"),
    ("--model damaged", "the model is damaged", "damaged"),
    ("output_dir=runs/other", "the run has no trained model yet", "`output_dir`"),
    ("--prompts missing.txt", "there is no file `missing.txt`", "--prompts"),
    ("--prompts missing.jsonl", "missing.jsonl", "--prompts"),
    ("--prompts empty.txt", "there are no prompts", "empty.txt"),
    ("--prompts rows.jsonl", "the row has no prompt; it has `question`", "rows.jsonl:2"),
    ("--prompts answered.jsonl", "ends with the assistant's turn", "answered.jsonl:1"),
    ("--prompts broken.jsonl", "not valid JSON", "broken.jsonl:1"),
    ("--prompts picture.jsonl", "the row is not", "picture.jsonl:1"),
    ("--prompts long.txt", "tokens, and `", "long.txt:2"),
    ("--count 0", "0 is too few", "--count 0"),
    ("--max-new-tokens -1", "-1 is too few", "--max-new-tokens -1"),
    ("--count many", "invalid value for `--count`", "the command line"),
    ("--page missing/page.html", "there is no folder `missing`", "--page missing/page.html"),
    ("--page nothing", "the page is a folder", "--page nothing"),
    ("--page -", "a page is not written to standard output", "--page -"),
    ("--page pairs.jsonl", "`pairs.jsonl` exists already, and is no page", "--page pairs.jsonl"),
    ("--json pairs.jsonl", "`pairs.jsonl` exists already, and is no JSON file that", "--json pairs.jsonl"),
    ("--json missing/rows.jsonl", "there is no folder `missing`", "--json missing/rows.jsonl"),
    ("--model=", "the value of `--model` is empty", "the command line"),
    ("data.eval=null", "the configuration has no held-out pairs", "`data.eval`"),
    ("model.name=./missing --prompts p.txt", "there is no model folder", "`model.name`"),
]


@pytest.mark.parametrize(("arguments", "what", "where"), BAD, ids=[arguments for arguments, *_ in BAD])
def test_what_is_wrong_is_a_plain_error(faults, capsys, arguments, what, where):
    assert call(f"sample --config run.yaml {arguments}") == 2
    said = capsys.readouterr()
    assert said.err.count("error: ") == 1
    assert what in said.err
    assert f"  in {where}" in said.err
    assert "Traceback" not in said.err
    assert not said.out


def test_several_things_that_are_wrong_are_told_together(faults, capsys):
    assert call("sample --config run.yaml --model ./missing --model ./lost --count 0 --prompts missing.txt") == 2
    assert capsys.readouterr().err.count("error: ") == 4
