"""What a run and `dpo export` write is a model again: it is trained, scored and asked by the name of its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from dpo_cli.modeling.folders.tokenizers import load_tokenizer
from tests.builders import run_card
from tests.cli.in_process import call
from tests.conftest import build_llama, make_config, read_samples, write_rows

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ':' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
)
"""Another template than the model's own."""

FORMS = {
    "final of an adapter": "runs/adapter/final",
    "final of all weights": "runs/whole/final",
    "a checkpoint": "runs/whole/checkpoints/step-000002",
    "an exported adapter": "adapter",
    "a merged model in several files": "merged",
    "an exported model": "model-float16",
    "an exported GGUF file": "gguf/whole-Q8_0.gguf",
    "a merged GGUF file": "merged-gguf/adapter-F16.gguf",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory, tokenizer, demo_rows) -> Path:
    """A folder with a run of an adapter and one of all weights, and all that can be exported of them."""
    folder = tmp_path_factory.mktemp("project")
    build_llama(folder / "base", tokenizer, seed=0)
    (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/first\n---\n")
    (folder / "base" / "NOTICE").write_text("Made by somebody.")
    (folder / "other.jinja").write_text(TEMPLATE)
    write_rows(folder / "pairs.jsonl", demo_rows[:24])
    exports = [
        "runs/adapter --to adapter",
        "runs/adapter --merge --max-shard-size 30KB --to merged",
        "runs/whole --dtype float16 --to model-float16",
        "runs/whole --gguf q8_0 --to gguf",
        "runs/adapter --merge --gguf f16 --to merged-gguf",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, groups in (("whole", {}), ("adapter", {"adapter": {"type": "lora", "rank": 2}})):
            train(name, model={"name": "base", "chat_template": "other.jinja"}, **groups)
        for export in exports:
            assert call(f"export {export} --quiet") == 0
    return folder


def train(name: str, **groups: Any) -> None:
    """Train for two steps in the folder that the test is in."""
    training = {"max_steps": 2, "learning_rate": 1e-2}
    make_config(
        Path(), Path(), Path("pairs.jsonl"), name, **{"training": training, "output_dir": f"runs/{name}", **groups}
    )
    assert call(f"train {name}.yaml --quiet") == 0


@pytest.fixture
def here(project, monkeypatch) -> Path:
    monkeypatch.chdir(project)
    return project


@pytest.mark.parametrize("form", FORMS)
def test_it_is_trained_scored_and_asked_as_any_model(here, forked_dpo, tmp_path, form):
    name, prompts = FORMS[form], tmp_path / "prompts.txt"
    assert len(list(Path("merged").glob("model-*.safetensors"))) > 1
    prompts.write_text("Name three colours.\n")
    settings: dict[str, Any] = {"training": {"max_steps": 1}, "output_dir": str(tmp_path / "run")}
    file = make_config(tmp_path, Path(name), Path("pairs.jsonl"), model=name, **settings)
    for command in (
        ("train", "--config", file),
        ("eval", "--config", file, "--model", name, "--json", tmp_path / "figures.json"),
        ("sample", "--config", file, "--model", name, "--prompts", prompts, "--json", tmp_path / "answers.json"),
    ):
        done = forked_dpo(*command, cwd=here)
        assert done.returncode == 0, done.stderr
    # It begins where the other run ended: the margin of a policy that is its own reference is 0.
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    card = (tmp_path / "run/final/README.md").read_text()
    assert f"Fine-tuned from `{Path(name).name}`" in card
    if form != "a checkpoint":  # It has no card yet, but the licence files.
        assert "license: apache-2.0" in card
        assert "base_model: org/first" in card
    if Path(name).is_dir():
        assert (tmp_path / "run/final/NOTICE").read_text() == "Made by somebody."


@pytest.mark.parametrize("how", ["--gguf f16", "--dtype bfloat16"])
def test_a_run_that_began_from_an_exported_gguf_file_is_exported_again(here, tmp_path, how):
    settings: dict[str, Any] = {"training": {"max_steps": 1}, "output_dir": str(tmp_path / "run")}
    file = make_config(tmp_path, Path(), Path("pairs.jsonl"), model=FORMS["an exported GGUF file"], **settings)
    assert call(f"train {file} --quiet") == 0
    assert call(f"export {tmp_path}/run {how} --to {tmp_path}/out --quiet") == 0
    fields = ModelCard((tmp_path / "out/README.md").read_text()).data.to_dict()
    assert (fields["license"], fields["base_model"]) == ("apache-2.0", "org/first")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it.
@pytest.mark.parametrize("form", [form for form in FORMS if form != "a checkpoint"])
def test_the_lines_of_its_card_load_it_and_let_it_answer(here, capsys, form):
    folder = Path(FORMS[form]).parent if ".gguf" in FORMS[form] else Path(FORMS[form])
    names = run_card(folder, **({"path/to/base": "base"} if "adapter" in form else {}))
    assert capsys.readouterr().out.strip()
    assert names["prompt"] == "<|im_start|>user:Why is the sky blue?<|im_end|><|im_start|>assistant:"
    card = (folder / "README.md").read_text()
    fields = ModelCard(card).data.to_dict()
    assert fields["base_model"] == "org/first"
    assert fields["base_model_relation"] == ("adapter" if "adapter" in form else "finetune")
    assert str(here) not in card
    assert (folder / "NOTICE").read_text() == "Made by somebody."


def tokenizer_of(name: str) -> Any:
    """Load the tokenizer of a form: of a folder by transformers, of a GGUF file as a run does."""
    return load_tokenizer(name) if name.endswith(".gguf") else AutoTokenizer.from_pretrained(name)


@pytest.mark.parametrize("form", FORMS)
def test_its_template_writes_the_prompts_of_the_run(here, demo_rows, form):
    """Of `samples.jsonl`, which has the tokens that the run was trained on, as text."""
    prompts = {row["prompt"] for row in read_samples(Path("runs/adapter"))}
    ours, theirs = tokenizer_of("base"), tokenizer_of(FORMS[form])
    assert theirs.chat_template == TEMPLATE
    if Path(FORMS[form]).is_dir():
        assert (Path(FORMS[form]) / "chat_template.jinja").read_text() == TEMPLATE
    asked = ["\n".join(filter(None, (row["instruction"], row.get("input")))) for row in demo_rows[:24]]
    written = {
        theirs.apply_chat_template([{"role": "user", "content": one}], add_generation_prompt=True, tokenize=False)
        for one in asked
    }
    assert prompts
    assert prompts <= written
    for text in written:
        assert theirs(text).input_ids == ours(text).input_ids


@pytest.mark.parametrize("form", FORMS)
def test_it_keeps_every_token_with_its_number(here, form):
    ours, theirs = tokenizer_of("base"), tokenizer_of(FORMS[form])
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    assert {number: str(token) for number, token in ours.added_tokens_decoder.items()} == {
        number: str(token) for number, token in theirs.added_tokens_decoder.items()
    }


def test_a_run_with_the_plain_template_saves_none(here, tmp_path):
    train("plain", model={"name": "base", "chat_template": "plain"})
    final = Path("runs/plain/final")
    assert AutoTokenizer.from_pretrained(final).chat_template is None
    assert not (final / "chat_template.jinja").exists()
    prompt = read_samples(Path("runs/plain"))[0]["prompt"]
    assert prompt.startswith("### Instruction:\n")
    card = (final / "README.md").read_text()
    assert r'prompt = "### Instruction:\nWhy is the sky blue?\n\n### Response:\n"' in card
    shutil.rmtree("runs/plain")


@pytest.mark.parametrize("names", [["one.gguf"], ["one.gguf", "two.gguf"]], ids=len)
def test_a_folder_of_gguf_files_is_named_by_one_of_them(tmp_path, monkeypatch, capfd, pairs_file, names):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    for name in names:
        Path("models", name).touch()
    make_config(tmp_path, Path("models"), pairs_file)
    assert call("train run.yaml") == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "`models` is not a model folder" in said
    assert "models/one.gguf`" in said
