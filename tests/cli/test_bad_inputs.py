"""Every bad input gives its exit status, one clear error with a hint and no traceback; nothing on disk is lost."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import json
import os
import pickle
import re
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_cli.modeling.digests import SCHEME
from tests.builders import save_adapter
from tests.cli.in_process import call
from tests.conftest import CHATML, build_llama, make_config, write_rows

PREPARE, TRAIN, EVAL = (f"{command} --config run.yaml" for command in ("prepare-data", "train", "eval"))
PAIR = {"instruction": "Say hi.", "chosen": "Hi.", "rejected": "Well, hi, then."}
CHECKPOINTS = Path("runs/run/checkpoints")


@dataclass
class Project:
    """A folder in which everything is right: a model, pairs, a configuration; paths are relative to it."""

    folder: Path
    tokenizer: Any
    patch: pytest.MonkeyPatch
    started: Path
    """Another project of the same content, with a finished run in it."""
    largest_file: int | None = None
    """Bytes after which a file may not grow while the command runs: how a disk fills up for one process."""

    def write(self, name: str, content: str | bytes) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    def configure(self, **groups: Any) -> None:
        groups = {"checkpoints": {"every_steps": 2, "keep": 100}, "output_dir": "runs/run", **groups}
        make_config(self.folder, Path("model"), Path("pairs.jsonl"), **groups)

    def model(self, name: str = "model", **settings: Any) -> None:
        """Change settings of a model's config.json."""
        file = self.folder / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    def run(self, *, final: bool = False) -> None:
        """Bring in a run that was stopped after its last checkpoint, or one that is finished."""
        shutil.copytree(self.started / "runs", self.folder / "runs")
        if not final:
            shutil.rmtree(self.folder / "runs/run/final")

    def prepare(self) -> None:
        assert call(f"{PREPARE} --out prepared") == 0


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        breaks: Spoils a project.
        arguments: The command.
        status: The exit status: 2 for wrong usage, configuration or data; 1 for a run that failed.
        error: What the error's first line must match.
        hint: What the same error's hint must match.
        may_change: Files that the command writes as it should before it fails.
    """

    breaks: Callable[[Project], object]
    arguments: str
    status: int
    error: str
    hint: str
    may_change: tuple[str, ...] = ()


def nothing(project: Project) -> None:
    """Leave the project as it is: the arguments are what is wrong."""


def config(content: str | bytes) -> Callable[[Project], None]:
    return lambda project: project.write("run.yaml", content)


def settings(**groups: Any) -> Callable[[Project], None]:
    return lambda project: project.configure(**groups)


def data(*content: str | bytes | dict[str, Any], name: str = "pairs.jsonl") -> Callable[[Project], None]:
    """Write a data file of these lines, rows as JSON."""
    lines = [json.dumps(part) if isinstance(part, dict) else part for part in content]
    parts = [line if isinstance(line, bytes) else line.encode() for line in lines]
    return lambda project: project.write(name, b"\n".join(parts))


def file(name: str, content: str | bytes) -> Callable[[Project], None]:
    return lambda project: project.write(name, content)


def append(name: str, text: str) -> Callable[[Project], None]:
    return lambda project: project.write(name, (project.folder / name).read_text() + text)


def folder(name: str) -> Callable[[Project], None]:
    return lambda project: (project.folder / name).mkdir(parents=True)


def lost_part(project: Project) -> None:
    """Cut a model's weights into two parts of which only the first is there."""
    weights = project.folder / "model" / "model.safetensors"
    weights.rename(weights.with_name("model-1.safetensors"))
    parts = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    listed = json.dumps({"metadata": {}, "weight_map": parts})
    weights.with_name("model.safetensors.index.json").write_text(listed, encoding="utf-8")


def gone(*names: str) -> Callable[[Project], None]:
    def remove(project: Project) -> None:
        for name in names:
            (project.folder / name).unlink()

    return remove


def cut(name: str, size: int = -20) -> Callable[[Project], None]:
    def shorten(project: Project) -> None:
        path = project.folder / name
        path.write_bytes(path.read_bytes()[:size])

    return shorten


def unreadable(name: str) -> Callable[[Project], None]:
    """Put a regular file there whose reading fails, even for root."""

    def link(project: Project) -> None:
        (project.folder / name).unlink()
        (project.folder / name).symlink_to("/proc/self/mem")

    return link


def dangling(name: str) -> Callable[[Project], None]:
    return lambda project: (project.folder / name).symlink_to("nowhere")


def environment(**variables: str) -> Callable[[Project], None]:
    def set_all(project: Project) -> None:
        for name, value in variables.items():
            project.patch.setenv(name, value)

    return set_all


def limit(size: int) -> Callable[[Project], None]:
    return lambda project: setattr(project, "largest_file", size)


def both(*parts: Callable[[Project], object]) -> Callable[[Project], None]:
    def all_of_them(project: Project) -> None:
        for part in parts:
            part(project)

    return all_of_them


def parquet(*columns: str) -> Callable[[Project], None]:
    table = pa.table({name: ["text"] for name in columns})
    return lambda project: pq.write_table(table, project.folder / "pairs.parquet")


def full_device(project: Project) -> None:
    """Make a device of which every writing says that no space is left."""
    try:
        os.mknod(project.folder / "full", stat.S_IFCHR | 0o666, os.makedev(1, 7))
    except PermissionError:
        pytest.skip("making a device takes privileges")


def no_template(project: Project) -> None:
    (project.folder / "model" / "chat_template.jinja").unlink()


def fewer_merges(project: Project) -> None:
    path = project.folder / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    del tokenizer["model"]["merges"][-1]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def other_weights(project: Project) -> None:
    build_llama(project.folder / "model", project.tokenizer, seed=1)


def weights_of_nan(name: str) -> Callable[[Project], None]:
    """Save the project's model with a row of NaN."""

    def save(project: Project) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(project.folder / "model")
        with torch.no_grad():
            model.lm_head.weight[7] = float("nan")
        model.save_pretrained(project.folder / name)
        project.tokenizer.save_pretrained(project.folder / name)

    return save


def scales_its_logits(name: str) -> Callable[[Project], None]:
    """Save a model that multiplies its logits by a factor of its own kind."""

    def save(project: Project) -> None:
        from transformers import FalconH1Config, FalconH1ForCausalLM

        torch.manual_seed(0)
        small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 400}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "mamba_d_ssm": 32, "mamba_n_heads": 4}
        states = {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "initializer_range": 0.2}
        model = FalconH1ForCausalLM(FalconH1Config(**small, **heads, **states, lm_head_multiplier=0.25))
        model.save_pretrained(project.folder / name)
        project.tokenizer.save_pretrained(project.folder / name)

    return save


def gpt2(name: str, *, vocabulary: int = 400, positions: int = 512) -> Callable[[Project], None]:
    """Save a model of another kind and size, with the project's tokenizer."""

    def save(project: Project) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"vocab_size": vocabulary, "n_positions": positions, "n_embd": 16, "n_layer": 1, "n_head": 2}
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=2))
        shutil.rmtree(project.folder / name, ignore_errors=True)
        model.save_pretrained(project.folder / name)
        project.tokenizer.save_pretrained(project.folder / name)

    return save


def falcon(name: str) -> Callable[[Project], None]:
    """Save a model whose linear layers are of a class of their own, with the project's tokenizer."""

    def save(project: Project) -> None:
        from transformers import FalconConfig, FalconForCausalLM

        sizes = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        shutil.rmtree(project.folder / name)
        FalconForCausalLM(FalconConfig(**sizes, bos_token_id=0, eos_token_id=2)).save_pretrained(project.folder / name)
        project.tokenizer.save_pretrained(project.folder / name)

    return save


def few_bits(project: Project) -> None:
    """Give a layer of the model weights of 8 bits."""
    path = project.folder / "model/model.safetensors"
    weights = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, path, {"format": "pt"})


def uninstalled(package: str) -> Callable[[Project], None]:
    """Let a package be none that is installed."""
    find = importlib.util.find_spec
    return lambda project: project.patch.setattr(
        importlib.util, "find_spec", lambda name, *others: None if name == package else find(name, *others)
    )


class Payload:
    """Writes a file into the current folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('executed', 'w').close()",)


def pickled_weights(project: Project) -> None:
    (project.folder / "model" / "model.safetensors").unlink()
    project.write("model/pytorch_model.bin", pickle.dumps({"lm_head.weight": Payload()}, protocol=2))


def zipped_pickled_weights(project: Project) -> None:
    (project.folder / "model" / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload()}, project.folder / "model" / "pytorch_model.bin")


def code_in_the_model_folder(project: Project) -> None:
    project.model(model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    project.write("model/own.py", "open('executed', 'w').close()\nclass Own: pass\n")


def gguf(content: bytes) -> Callable[[Project], None]:
    return file("broken.gguf", content)


def prepared(*then: Callable[[Project], object]) -> Callable[[Project], None]:
    return both(Project.prepare, *then)


def stopped(*then: Callable[[Project], object]) -> Callable[[Project], None]:
    return both(Project.run, *then)


def finished(*then: Callable[[Project], object]) -> Callable[[Project], None]:
    return both(lambda project: project.run(final=True), *then)


def every_checkpoint_damaged(project: Project) -> None:
    for path in (project.folder / CHECKPOINTS).iterdir():
        cut(f"{CHECKPOINTS / path.name}/model.safetensors")(project)


def no_checkpoint_but_a_model(project: Project) -> None:
    """Put the trained model, whole as it is, where checkpoints stood."""
    shutil.rmtree(project.folder / CHECKPOINTS)
    shutil.copytree(project.started / "runs/run/final", project.folder / CHECKPOINTS / "step-000099")


def no_newest_checkpoint(project: Project) -> None:
    shutil.rmtree(project.folder / CHECKPOINTS / "step-000008")


def state_of_each(**changes: Any) -> Callable[[Project], None]:
    """Change what checkpoints say of themselves, and seal them anew, as another program or version would."""

    def reseal(project: Project) -> None:
        for checkpoint in (project.folder / CHECKPOINTS).iterdir():
            change(checkpoint / "training_state.json", checkpoint / "manifest.json")

    def change(state: Path, seal: Path) -> None:
        said = {**json.loads(state.read_text()), **changes}
        state.write_text(json.dumps({name: value for name, value in said.items() if value is not ...}))
        manifest = json.loads(seal.read_text())
        facts = {"bytes": state.stat().st_size, "sha256": hashlib.sha256(state.read_bytes()).hexdigest()}
        manifest["files"][state.name] = facts
        seal.write_text(json.dumps(manifest))

    return reseal


def adapter(*then: Callable[[Project], object], base: str = "model", **settings: Any) -> Callable[[Project], None]:
    """Let PEFT save an adapter of a model as `adapter`, of two layers a block, and spoil it."""

    def save(project: Project) -> None:
        told = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 8, **settings}
        save_adapter(project.folder / base, project.folder / "adapter", **told)

    return both(save, *then)


def says(**settings: Any) -> Callable[[Project], None]:
    """Change what the adapter says of itself."""

    def change(project: Project) -> None:
        path = project.folder / "adapter/adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return change


def weighs(change: Callable[[dict[str, torch.Tensor], str], object]) -> Callable[[Project], None]:
    """Change the tensors of the adapter, given the name of one of them."""

    def write(project: Project) -> None:
        path = project.folder / "adapter/adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors, next(name for name in tensors if name.endswith("lora_A.weight")))
        save_file(tensors, path)

    return write


def wider_model(project: Project) -> None:
    build_llama(project.folder / "model", project.tokenizer, seed=0, head_dim=16)


def in_utf_16(project: Project) -> None:
    pairs = project.folder / "pairs.jsonl"
    pairs.write_text(pairs.read_text(encoding="utf-8"), encoding="utf-16")


def of_one_prompt(project: Project) -> None:
    write_rows(project.folder / "pairs.jsonl", [{**PAIR, "chosen": f"Hi {n}."} for n in range(9)])


def own_config_file(project: Project) -> None:
    """Call the configuration as a run calls its own, beside a folder that is nobody's business."""
    text = (project.folder / "run.yaml").read_text()
    project.write("mine/config.yaml", f"# My notes, which no run may lose.\n{text}")
    project.write("mine/final/essay.txt", "All that I wrote.")


MANY_ALIASES = "a: &a [x, x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\n" + "".join(
    f"{chr(c + 1)}: &{chr(c + 1)} [{', '.join([f'*{chr(c)}'] * 10)}]\n" for c in range(ord("b"), ord("h"))
)
JINJA = "model.chat_template=template.jinja"
LOUD = "{% for m in messages %}{{ m.content | shout }}{% endfor %}"
LAST_ONLY = "{{ messages[-1].content }}"
NO_END = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}{{ 'assistant:' * add_generation_prompt }}"
)

TWO_BOS = "{{ bos_token + bos_token }}" + CHATML

CONFIG_CASES = {
    "no such config": Case(nothing, "train --config rum.yaml", 2, r"no configuration file `rum", r"did you mean `run"),
    "config is a folder": Case(folder("dir.yaml"), "train --config dir.yaml", 2, r"is a directory", r"a file was"),
    "config unreadable": Case(unreadable("run.yaml"), TRAIN, 2, r"reading the configuration failed", r"read"),
    "config in Latin-1": Case(config("model: modèle".encode("latin-1")), TRAIN, 2, r"not UTF-8", r"as UTF-8"),
    "config empty": Case(config("# nothing\n"), TRAIN, 2, r"is empty", r"at least `model`"),
    "config a list": Case(config("- model\n"), TRAIN, 2, r"not a mapping", r"write settings"),
    "config not YAML": Case(config("model: [a\n"), TRAIN, 2, r"not valid YAML", r"near that line"),
    "config with NUL": Case(config("model: a\0b\n"), TRAIN, 2, r"not valid YAML", r"characters"),
    "config nested too deeply": Case(config("model: " + "[" * 5000), TRAIN, 2, r"too deeply", r"two levels"),
    "config repeats itself": Case(config(MANY_ALIASES), TRAIN, 2, r"more than \d+ values", r"without anchors"),
    "config holds itself": Case(config("model: &a [*a]\n"), TRAIN, 2, r"too deeply|more than", r"."),
    "config with code": Case(
        config("model: !!python/object/apply:os.mkdir [executed]\n"),
        TRAIN,
        2,
        r"not valid YAML|group of settings",
        r".",
    ),
    "setting twice": Case(config("model: a\nmodel: b\n"), TRAIN, 2, r"`model` is set twice", r"keep one"),
    "setting unknown": Case(
        settings(training={"learning_rat": 1}), TRAIN, 2, r"`training.learning_rat` is not", r"`training.learning_rate`"
    ),
    "setting in the wrong group": Case(
        settings(beta=0.1), TRAIN, 2, r"`beta` is not a setting", r"did you mean `loss.beta`"
    ),
    "setting named by a number": Case(config("model: a\n1: b\n"), TRAIN, 2, r"`1` is not the name", r"names are text"),
    "text for a number": Case(
        settings(training={"learning_rate": "fast"}), TRAIN, 2, r"learning_rate` should be a number", r"highest"
    ),
    "number for text": Case(settings(model={"name": 7}), TRAIN, 2, r"`model.name` should be text.* 7", r"local folder"),
    "number out of range": Case(
        settings(training={"pairs_per_step": 0}), TRAIN, 2, r"greater than or equal to 1, but is 0", r"optimizer step"
    ),
    "not a number": Case(
        settings(training={"learning_rate": float("nan")}), TRAIN, 2, r"should be a finite number", r"learning rate"
    ),
    "no model": Case(config("data: {train: pairs.jsonl}\n"), TRAIN, 2, r"`model` is missing", r"add it"),
    "unknown format": Case(
        settings(data={"format": "chat"}), TRAIN, 2, r"`data.format` should be one of `auto`, `ins", r"rows"
    ),
    "unknown loss": Case(settings(loss="dpoo"), TRAIN, 2, r"`loss.type` should be one of `dpo`", r"did you mean `dpo`"),
    "unknown reference": Case(
        settings(reference="frozn"), TRAIN, 2, r"`reference.type` should be one of `cached`, `frozen`", r"."
    ),
    "setting without effect": Case(
        settings(data={"eval": None}, evaluation={"every_steps": 1}), TRAIN, 2, r"has no effect", r"set `data.eval`"
    ),
    "override without a value": Case(nothing, f"{TRAIN} training.epochs=", 2, r"a number, but is null", r"passes"),
    "override without =": Case(nothing, f"{TRAIN} training.epochs", 2, r"not a setting with a value", r"look like"),
    "override without a key": Case(nothing, f"{TRAIN} =3", 2, r"not a setting with a value", r"look like"),
    "override unknown": Case(nothing, f"{TRAIN} training.epoch=1", 2, r"is not a setting", r"`training.epochs`"),
    "override not YAML": Case(nothing, f"{TRAIN} tracking=[", 2, r"`tracking` is not valid YAML", r"quote"),
    "override of a number with too much": Case(nothing, f"{TRAIN} loss.beta=1e999", 2, r"finite number", r"reference"),
}

USAGE_CASES = {
    "unknown command": Case(
        nothing, "trian --config run.yaml", 2, r"`trian` is not a command of `dpo`", r"mean `dpo train`"
    ),
    "unknown option": Case(
        nothing, f"{TRAIN} --resum", 2, r"`--resum` is not an option of `dpo train`", r"mean `--resume`"
    ),
    "no config named": Case(nothing, "train", 2, r"no configuration is given", r"dpo train my.yaml"),
    "option without its value": Case(
        nothing, f"{EVAL} --json", 2, r"`--json` requires an argument", r"dpo eval --help"
    ),
    "a negative number of pairs to show": Case(
        nothing, f"{PREPARE} --show -1", 2, r"invalid value for `--show`", r"--help"
    ),
    "a word for the number of pairs to show": Case(
        nothing, f"{PREPARE} --show all", 2, r"invalid value for `--show`", r"--help"
    ),
    "resume and overwrite": Case(nothing, f"{TRAIN} --resume --overwrite", 2, r"exclude each other", r"choose one"),
}

DATA_CASES = {
    "no data named": Case(config("model: model\n"), PREPARE, 2, r"`data.train` is missing", r"name a data file"),
    "no data in the list": Case(settings(data={"train": []}), PREPARE, 2, r"`data.train` is empty", r"at least one"),
    "no such data": Case(nothing, f"{PREPARE} data.train=pears.jsonl", 2, r"no file or folder", r"`pairs.jsonl`"),
    "no such data in a folder": Case(
        both(folder("data"), data(PAIR, name="data/pairs.jsonl")),
        f"{PREPARE} data.train=data/pears.jsonl", 2, r"no file or folder `data/pears", r"`data/pairs.jsonl`",
    ),
    "no such data on the Hub": Case(nothing, f"{PREPARE} data.train=nobody/nothing", 2, r"cannot be load", r"network"),
    "no such held-out data": Case(nothing, f"{PREPARE} data.eval=held.jsonl", 2, r"no file or folder `held", r"name a"),
    "data of an unknown kind": Case(data("x", name="a.txt"), f"{PREPARE} data.train=a.txt", 2, r"known type", r"ends"),
    "a folder without data": Case(folder("data"), f"{PREPARE} data.train=data", 2, r"cannot be loaded", r"data files"),
    "data unreadable": Case(unreadable("pairs.jsonl"), PREPARE, 2, r"reading the data failed", r"read"),
    "data empty": Case(data(""), PREPARE, 2, r"there are no rows", r"that has rows"),
    "line cut off": Case(data(PAIR, '{"instruction": "S'), PREPARE, 2, r"is not valid JSON.*column", r"fix the row"),
    "line in Latin-1": Case(
        data('{"instruction": "é"}'.encode("latin-1")), PREPARE, 2, r"is not UTF-8: byte 0xe9", r"as UTF-8"
    ),
    "data in Latin-1 alone": Case(
        data('{"instruction": "é"}'.encode("latin-1")), f"{PREPARE} data.on_bad_row=drop", 2,
        r"none of 1 row is left", r"^save the file as UTF-8; the first",
    ),
    "a quote that nothing closes": Case(
        data('{"instruction": "x}'), PREPARE, 2, r"valid JSON: Unterminated string starting at column 17", r"fix the"
    ),
    "file in UTF-16": Case(in_utf_16, PREPARE, 2, r"not UTF-8", r"as UTF-8"),
    "null for a row": Case(data(PAIR, "null"), PREPARE, 2, r"is not a JSON object", r"fix the row"),
    "null for text": Case(data({**PAIR, "chosen": None}), PREPARE, 2, r"`chosen` is null", r"fix the row"),
    "number for a text": Case(data({**PAIR, "chosen": 7}), PREPARE, 2, r"a number instead of text", r"fix the row"),
    "list for a text": Case(data({**PAIR, "rejected": []}), PREPARE, 2, r"a list instead of text", r"fix the row"),
    "half a surrogate pair": Case(data({**PAIR, "chosen": "\ud800"}), PREPARE, 2, r"surrogate", r"fix the row"),
    "column missing": Case(
        data({"question": "a", "chosen": "b", "rejected": "c"}), PREPARE, 2,
        r"no known shape.*`question` \(text\)", r"prompt",
    ),
    "instruction empty": Case(data({**PAIR, "instruction": " "}), PREPARE, 2, r"`instruction` is empty", r"fix"),
    "broken rows dropped until none is left": Case(
        data("null"), f"{PREPARE} data.on_bad_row=drop", 2, r"none of 1 row is left: 1 undecodable", r"pairs.jsonl:1"
    ),
    "identical pairs only": Case(
        data({**PAIR, "rejected": "Hi."}), PREPARE, 2, r"none of 1 row is left: 1 identical", r"same text"
    ),
    "empty responses only": Case(data({**PAIR, "chosen": ""}), PREPARE, 2, r"left: 1 empty resp", r"`chosen` is empty"),
    "all too long": Case(nothing, f"{PREPARE} data.max_length=4", 2, r"none of 40 rows.*too long", r"max_length"),
    "too long as an error": Case(
        nothing, f"{PREPARE} data.max_length=4 data.on_too_long=error", 2, r"has \d+ tokens", r"raise `data.max_length`"
    ),
    "chat template that ends turns twice": Case(
        file("template.jinja", CHATML.replace("<|im_end|>", "<|im_end|><|im_end|>")),
        f"{TRAIN} {JINJA}", 2, r"chosen response ends twice", r"chat template writes",
    ),
    "JSON list cut off": Case(
        data('[{"instruction": ', name="a.json"), f"{PREPARE} data.train=a.json", 2, r"not valid JSON", r"fix that"
    ),
    "JSON object for a list": Case(
        data(json.dumps({"rows": [PAIR]}, indent=1), name="a.json"),
        f"{PREPARE} data.train=a.json", 2, r"not a JSON list", r"list of objects",
    ),
    "CSV ragged": Case(
        data("instruction,chosen,rejected", "a,b,c", "a,b", name="a.csv"),
        f"{PREPARE} data.train=a.csv", 2, r"has 2 fields where the header has 3", r"fix the row",
    ),
    "CSV with NUL": Case(
        data("instruction,chosen,rejected", "a,b\0,c", "\0", name="a.csv"),
        f"{PREPARE} data.train=a.csv", 2, r"NUL|has 1 fields", r"fix the row",
    ),
    "CSV of a header": Case(
        data("instruction,chosen,rejected", name="a.csv"), f"{PREPARE} data.train=a.csv", 2, r"no rows", r"has rows"
    ),
    "Parquet damaged": Case(
        both(parquet("instruction", "chosen", "rejected"), cut("pairs.parquet")),
        f"{PREPARE} data.train=pairs.parquet", 2, r"Parquet file cannot be read", r"write it again",
    ),
    "Parquet that is text": Case(
        data("text", name="a.parquet"), f"{PREPARE} data.train=a.parquet", 2, r"Parquet file cannot", r"write it"
    ),
    "Parquet without a column": Case(
        parquet("instruction", "chosen"), f"{PREPARE} data.train=pairs.parquet", 2,
        r"they have `instruction` \(text\)", r"rejected",
    ),
    "too few pairs to hold out": Case(
        nothing, f"{TRAIN} data.eval=0.001", 2, r"holding out 0.001 of 40 pairs leaves one side", r"change `data.eval`"
    ),
    "one prompt, which falls on one side": Case(of_one_prompt, TRAIN, 2, r"leaves one side empty", r"`data.eval`"),
    "max_steps never reached": Case(nothing, f"{TRAIN} training.max_steps=99", 2, r"99 is never reached", r"epochs"),
}  # fmt: skip

PREPARED_CASES = {
    "prepared data damaged": Case(
        prepared(cut("prepared/pairs.arrow")), f"{TRAIN} data.train=prepared", 2, r"damaged: pairs.arrow", r"again"
    ),
    "prepared data without its seal": Case(
        prepared(gone("prepared/manifest.json")), f"{TRAIN} data.train=prepared", 2, r"manifest.json is miss", r"again"
    ),
    "prepared data with a broken seal": Case(
        prepared(file("prepared/manifest.json", "{")), f"{TRAIN} data.train=prepared", 2, r"cannot be read", r"again"
    ),
    "prepared data without its pairs": Case(
        prepared(gone("prepared/pairs.arrow")), f"{TRAIN} data.train=prepared", 2, r"pairs.arrow is missing", r"again"
    ),
    "prepared under another length": Case(
        prepared(), f"{TRAIN} data.train=prepared data.max_length=99", 2, r"with another `data.max_length`", r"restore"
    ),
    "prepared with another tokenizer": Case(
        prepared(fewer_merges),
        f"{TRAIN} data.train=prepared", 2, r"with another `tokenizer`", r"again",
    ),
    "prepared data among raw data": Case(
        prepared(), f"{TRAIN} 'data.train=[prepared, pairs.jsonl]'", 2, r"cannot be mixed", r"only one prepared folder"
    ),
    "cache folder below a file": Case(
        environment(DPO_CACHE_DIR="pairs.jsonl/cache"), PREPARE, 1, r"failed: not a directory", r"DPO_CACHE_DIR"
    ),
    "home that cannot be written": Case(
        environment(DPO_CACHE_DIR="", XDG_CACHE_HOME="", HOME="/proc"), PREPARE, 1, r"failed: ", r"DPO_CACHE_DIR"
    ),
    "out a link to nothing": Case(dangling("mine"), f"{PREPARE} --out mine", 2, r"link to `nowhere`", r"--out"),
    "report a link to nothing": Case(
        dangling("mine"), f"{PREPARE} --report mine/report", 2, r"link to `nowhere`", r"--report"
    ),
    "report below a file": Case(nothing, f"{PREPARE} --report pairs.jsonl/new", 2, r"is a file", r"--report"),
    "out holds something else": Case(
        file("mine/essay.txt", "x"), f"{PREPARE} --out mine", 2, r"other files", r"another"
    ),
    "out is a file": Case(file("mine", "x"), f"{PREPARE} --out mine", 2, r"is a file", r"another"),
    "out holds pairs of other settings": Case(
        prepared(), f"{PREPARE} --out prepared data.max_length=99", 2, r"other data or settings", r"another with --out"
    ),
    "out below a file": Case(nothing, f"{PREPARE} --out pairs.jsonl/new", 2, r"is a file", r"another|--out"),
    "out where nothing can be made": Case(nothing, f"{PREPARE} --out /proc/new", 1, r"/proc/new|failed", r"."),
}  # fmt: skip

MODEL_CASES = {
    "no such model folder": Case(nothing, f"{TRAIN} model.name=./modle", 2, r"no model folder `./modle`", r"name a"),
    "no such model on the Hub": Case(nothing, f"{TRAIN} model.name=nobody/nothing", 2, r"cannot be loaded", r"network"),
    "model a file": Case(nothing, f"{TRAIN} model.name=pairs.jsonl", 2, r"neither a model folder", r"config.json"),
    "model without config.json": Case(gone("model/config.json"), TRAIN, 2, r"it has no config.json", r"with config"),
    "config.json broken": Case(file("model/config.json", "{"), TRAIN, 2, r"cannot be loaded", r"incomplete or damaged"),
    "config.json a list": Case(file("model/config.json", "[]"), TRAIN, 2, r"cannot be loaded", r"incomplete"),
    "config.json without a kind": Case(file("model/config.json", "{}"), TRAIN, 2, r"cannot be loaded", r"incomplete"),
    "weights missing": Case(gone("model/model.safetensors"), TRAIN, 2, r"no model.safetensors in", r"incomplete"),
    "weights missing in a dry run": Case(
        gone("model/model.safetensors"), f"{TRAIN} --dry-run", 2, r"the weights are missing", r"incomplete"
    ),
    "part of the weights missing": Case(lost_part, f"{TRAIN} --dry-run", 2, r"no model-2.safetensors in", r"incompl"),
    "model a folder of GGUF files": Case(
        file("ggufs/a.gguf", b"GGUF"), f"{TRAIN} model.name=ggufs", 2, r"no config.json", r"mean `ggufs/a.gguf`"
    ),
    "model a run": Case(
        file("earlier/final/config.json", b"{}"), f"{TRAIN} model.name=earlier", 2, r"no config", r"`earlier/final`"
    ),
    "weights truncated": Case(cut("model/model.safetensors"), TRAIN, 2, r"cannot be loaded", r"incomplete or damaged"),
    "weights of garbage": Case(file("model/model.safetensors", b"\xff" * 99), TRAIN, 2, r"cannot be load", r"damaged"),
    "weights of fewer layers": Case(
        lambda project: project.model(num_hidden_layers=3, layer_types=None), TRAIN, 2, r"parameters are m", r"complete"
    ),
    "weights of another width": Case(
        lambda project: project.model(intermediate_size=48), TRAIN, 2, r"has the shape \[32, 64\]", r"the same model"
    ),
    "config.json of another architecture": Case(
        file("model/config.json", '{"model_type": "gpt2", "vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4}'),
        TRAIN, 2, r"weights of \d+ parameters are missing", r"belongs to this model",
    ),
    "not a causal language model": Case(
        file("model/config.json", '{"model_type": "t5", "vocab_size": 400}'), TRAIN, 2, r"T5 is not a causal", r"text"
    ),
    "weights that are not finite": Case(weights_of_nan("model"), TRAIN, 2, r"nan|NaN|not finite", r"weights"),
    "pickled weights": Case(pickled_weights, TRAIN, 2, r"weights of `model` are pickled", r"model.allow_pickle"),
    "code in pickled weights": Case(
        pickled_weights, f"{TRAIN} model.allow_pickle=true", 2, r"hold more than tensors|damaged", r"safetensors"
    ),
    "code in zipped pickled weights": Case(
        zipped_pickled_weights, f"{TRAIN} model.allow_pickle=true", 2, r"hold more than tensors", r"safetensors"
    ),
    "an adapter for a model": Case(file("model/adapter_config.json", "{}"), TRAIN, 2, r"is an adapter", r"merge"),
    "config.json of a billion layers": Case(
        lambda project: project.model(num_hidden_layers=10**9), TRAIN, 2, r"`num_hidden_layers` to more", r"damaged"
    ),
    "config.json of a million million numbers": Case(
        lambda project: project.model(intermediate_size=10**12), TRAIN, 2, r"asks for [\d,]+ numb", r"to this model"
    ),
    "code in the model folder": Case(code_in_the_model_folder, TRAIN, 2, r"cannot be loaded.*code", r"never run"),
    "weights unreadable": Case(unreadable("model/model.safetensors"), TRAIN, 2, r"cannot be loaded", r"damaged|read"),
    "tokenizer missing": Case(
        gone("model/tokenizer.json", "model/tokenizer_config.json"), PREPARE, 2, r"has no tokenizer: its files", r"copy"
    ),
    "tokenizer broken": Case(file("model/tokenizer.json", "{}"), PREPARE, 2, r"tokenizer cannot be loaded", r"damaged"),
    "tokenizer truncated": Case(cut("model/tokenizer.json"), PREPARE, 2, r"tokenizer cannot be loaded", r"damaged"),
    "tokenizer of another model": Case(gpt2("model", vocabulary=300), TRAIN, 2, r"vocabulary ends at 299", r"token"),
    "positions for shorter texts only": Case(gpt2("model", positions=16), TRAIN, 2, r"positions.* 16", r"max_length"),
    "GGUF missing": Case(nothing, f"{TRAIN} model.name=no.gguf", 2, r"no GGUF file", r"check the path"),
    "GGUF empty": Case(gguf(b""), f"{TRAIN} model.name=broken.gguf", 2, r"is empty", r"copy it again"),
    "GGUF of garbage": Case(gguf(b"garbage" * 99), f"{TRAIN} model.name=broken.gguf", 2, r"is not a GGUF", r"copy it"),
    "GGUF unreadable": Case(
        both(gguf(b""), unreadable("broken.gguf")), f"{TRAIN} model.name=broken.gguf", 2, r"failed|cannot be", r"read"
    ),
    "GGUF cut off": Case(
        gguf(b"GGUF\3\0\0\0\x09\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0\x04\0"),
        f"{TRAIN} model.name=broken.gguf", 2, r"header of the GGUF file cannot be read", r"damaged",
    ),
    "no chat template": Case(no_template, PREPARE, 2, r"has no chat template", r"`plain` or"),
    "no such chat template": Case(nothing, f"{PREPARE} {JINJA}", 2, r"no chat template `template", r"name a Jinja"),
    "chat template written into the configuration": Case(
        settings(model={"chat_template": LOUD * 9}), PREPARE, 2, r"no chat template", r"name a Jinja file"
    ),
    "chat template in Latin-1": Case(
        file("template.jinja", b"\xe9"), f"{PREPARE} {JINJA}", 2, r"chat template is not UTF-8", r"as UTF-8"
    ),
    "chat template empty": Case(file("template.jinja", ""), f"{PREPARE} {JINJA}", 2, r"template.*empty", r"."),
    "chat template not Jinja": Case(
        file("template.jinja", "{% if %}"), f"{PREPARE} {JINJA}", 2, r"chat template fails", r"model.chat_template"
    ),
    "chat template with an unknown filter": Case(
        file("template.jinja", LOUD), f"{PREPARE} {JINJA}", 2, r"chat template fails.*shout", r"model.chat_template"
    ),
    "chat template that loses the prompt": Case(
        file("template.jinja", LAST_ONLY), f"{PREPARE} {JINJA}", 2, r"end of the prompt", r"model.chat_template"
    ),
    "chat template that ends no turn": Case(
        file("template.jinja", NO_END), f"{TRAIN} {JINJA}", 2, r"has no end token", r"closes the assistant"
    ),
    "chat template that writes BOS twice": Case(
        file("template.jinja", TWO_BOS), f"{TRAIN} {JINJA}", 2, r"starts with two BOS tokens", r"chat template writes"
    ),
    "chat template unreadable": Case(
        nothing, f"{PREPARE} model.chat_template=/proc/self/mem", 2, r"reading the chat template failed", r"read"
    ),
    "float16 on a CPU": Case(nothing, f"{TRAIN} model.dtype=float16", 2, r"float16` cannot be computed", r"bfloat16"),
    "no such reference": Case(nothing, f"{TRAIN} reference.model=./no", 2, r"no model folder `./no`", r"name a folder"),
    "reference of another vocabulary": Case(
        gpt2("other", vocabulary=500),
        f"{TRAIN} reference.type=frozen reference.model=other", 2, r"vocabulary of 500, the policy", r"same tok"
    ),
    "reference with fewer positions": Case(
        gpt2("other", positions=16),
        f"{TRAIN} reference.type=frozen reference.model=other", 2, r"the model has positions for 16", r"max_length",
    ),
    "reference that treats its logits in its own way": Case(
        scales_its_logits("other"),
        f"{TRAIN} reference.model=other training.layout=padded", 2, r"differ from the model's own", r"its own way",
    ),
    "evaluation of a model that treats its logits in its own way": Case(
        scales_its_logits("other"), f"{EVAL} --model other training.layout=padded", 2, r"differ from the model's own",
        r"its own way",
    ),
    "evaluation against a reference with fewer positions": Case(
        gpt2("other", positions=16),
        f"{EVAL} --model model reference.model=other", 2, r"the model has positions for 16", r"max_length",
    ),
    "process without a number": Case(
        environment(RANK=""), TRAIN, 2, r"variable RANK is not a whole number: ``", r"unset it",
    ),
    "processes without a number": Case(
        environment(WORLD_SIZE="two"), TRAIN, 2, r"WORLD_SIZE is not a whole number: `two`", r"unset it",
    ),
    "several processes that cannot meet": Case(
        environment(WORLD_SIZE="4"), TRAIN, 2, r"WORLD_SIZE is 4, but RANK, LOCAL_RANK, MASTER_ADDR", r"torchrun",
    ),
    "rank beyond the others": Case(
        environment(WORLD_SIZE="2", RANK="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1"),
        TRAIN, 2,
        r"RANK is 2, and WORLD_SIZE is 2", r"let the launcher",
    ),
    "an engine that is not used": Case(
        environment(ACCELERATE_USE_DEEPSPEED="true"), TRAIN, 2, r"configured for DeepSpeed", r"ACCELERATE_USE_DEEPSPEED"
    ),
    "an engine that is not used, in evaluating": Case(
        environment(ACCELERATE_USE_MEGATRON_LM="true"), EVAL, 2, r"configured for Megatron-LM", r"torchrun"
    ),
    "a device that does not exist": Case(
        environment(ACCELERATE_TORCH_DEVICE="abacus"), TRAIN, 1, r"Accelerate cannot start: .*abacus", r"ACCELERATE_"
    ),
    "reference damaged": Case(
        both(gpt2("other"), cut("other/model.safetensors")),
        f"{TRAIN} reference.type=frozen reference.model=other", 2, r"model cannot be loaded", r"damaged",
    ),
    "gradients to be accumulated": Case(
        environment(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="2"), TRAIN, 2, r"to accumulate gradients", r"set it to 1"
    ),
    "tracker unknown": Case(nothing, f"{TRAIN} tracking=[tensorbored]", 2, r"one of `tensorboard`", r"did you"),
    "tracker not installed": Case(nothing, f"{TRAIN} tracking=[dvclive]", 2, r"`dvclive` is not installed", r"pip"),
}  # fmt: skip

LORA, START, MERGED = f"{TRAIN} adapter=lora", f"{TRAIN} adapter.start=adapter", f"{TRAIN} model.name=adapter"
ADAPTER_CASES = {
    "adapter unknown": Case(nothing, f"{TRAIN} adapter=lroa", 2, r"`adapter` should be `lora` or null", r"mean `lora`"),
    "adapter that is a setting of one": Case(
        nothing, f"{TRAIN} adapter=dora", 2, r"`adapter` should be `lora`", r"\{type: lora, dora: true\}"
    ),
    "adapter a number": Case(nothing, f"{TRAIN} adapter=16", 2, r"should be a group of settings", r"`adapter: null`"),
    "adapter with an unknown setting": Case(
        settings(adapter={"rnk": 8}), TRAIN, 2, r"`adapter.rnk` is not a setting", r"mean `adapter.rank`"
    ),
    "adapter with a setting of PEFT": Case(
        settings(adapter={"lora_alpha": 8}), TRAIN, 2, r"`adapter.lora_alpha` is not a setting", r"`adapter.alpha`"
    ),
    "a rank above all sides of the layers": Case(
        nothing, f"{LORA} adapter.rank=99999999999", 2, r"`adapter.rank` 99999999999 is above both sides", r"32 at most"
    ),
    "a rank above one side more": Case(
        nothing, f"{LORA} adapter.rank=65", 2, r"every layer, of which the largest is 64", r"32 at most"
    ),
    "no such adapter on the Hub": Case(
        nothing, f"{TRAIN} adapter.start=nobody/none", 2, r"the adapter `nobody/none` cannot", r"unless the adapter is"
    ),
    "rank 0": Case(nothing, f"{TRAIN} adapter.rank=0", 2, r"`adapter.rank` should be greater than or", r"rank: 16"),
    "alpha 0": Case(nothing, f"{TRAIN} adapter.alpha=0", 2, r"`adapter.alpha` should be greater than 0", r"alpha: 32"),
    "dropout of everything": Case(nothing, f"{TRAIN} adapter.dropout=1", 2, r"should be less than 1", r"dropout: 0.0"),
    "no targets": Case(nothing, f"{TRAIN} 'adapter.targets=[]'", 2, r"`adapter.targets` should be", r"all-linear"),
    "a target without a name": Case(
        nothing, f"{TRAIN} 'adapter.targets=[q_proj, \"\"]'", 2, r"has an empty name", r"remove it"
    ),
    "targets that are no pattern": Case(
        nothing, f"{TRAIN} 'adapter.targets=(q_proj'", 2, r"no regular expression: missing \)", r"all-linear"
    ),
    "a target that there is not": Case(
        nothing, f"{TRAIN} 'adapter.targets=[q_proj, v_porj]'", 2, r"`v_porj` names no layer", r"q_proj.*v_proj"
    ),
    "a pattern of no layer": Case(
        nothing, f"{TRAIN} adapter.targets=q_proj", 2, r"`q_proj` names no layer", r"the layers that can"
    ),
    "the vocabulary projection a target": Case(
        nothing, f"{TRAIN} 'adapter.targets=[lm_head]'", 2, r"names the vocabulary projection", r"leave it out"
    ),
    "the embedding a target": Case(
        nothing, f"{TRAIN} 'adapter.targets=[embed_tokens]'", 2, r"`embed_tokens` names no layer", r"q_proj"
    ),
    "dropout with a loss that compares pairs": Case(
        settings(adapter={"dropout": 0.1}, loss="aot"), TRAIN, 2, r"go together with the loss `aot`", r"dropout` out"
    ),
    "an adapter with a reference that cannot follow": Case(
        both(gpt2("other"), settings(adapter="lora", reference={"type": "synced", "model": "other"})),
        TRAIN, 2, r"`reference.model` cannot move towards the policy", r"`reference: frozen`",
    ),
    "no such start": Case(nothing, START, 2, r"the adapter `adapter` .* does not exist", r"name a folder"),
    "a variable in the start that is not set": Case(
        nothing, f"{TRAIN} 'adapter.start=$NOWHERE/a'", 2, r"variable `NOWHERE` is not defined", r"export NOWHERE"
    ),
    "start a file": Case(nothing, f"{TRAIN} adapter.start=pairs.jsonl", 2, r"is a file, not an adapter", r"folder"),
    "start a run": Case(
        finished(), f"{TRAIN} adapter.start=runs/run output_dir=new", 2, r"no adapter_config.json", r"name a folder"
    ),
    "start a run that has an adapter": Case(
        adapter(lambda project: shutil.copytree("adapter", "runs/other/final")),
        f"{TRAIN} adapter.start=runs/other", 2, r"no adapter_config.json", r"mean `runs/other/final`",
    ),
    "start a whole model": Case(nothing, f"{TRAIN} adapter.start=model", 2, r"is a whole model", r"`model.name`"),
    "start of another rank": Case(
        adapter(), f"{START} adapter.rank=8", 2, r"`adapter.rank` is 8, but 4 in the", r"leave `adapter.rank` out"
    ),
    "start with another scale": Case(
        adapter(), f"{START} adapter.alpha=32", 2, r"`adapter.alpha` is 32, but 8", r"leave `adapter.alpha` out"
    ),
    "start that is not DoRA": Case(
        adapter(), f"{START} adapter.dora=true", 2, r"`adapter.dora` is true, but false", r"leave `adapter.dora` out"
    ),
    "start that is rsLoRA": Case(
        adapter(use_rslora=True), f"{START} adapter.rslora=false", 2, r"`adapter.rslora` is false, but true",
        r"leave `adapter.rslora` out",
    ),
    "start with other targets": Case(
        adapter(), f"{START} 'adapter.targets=[q_proj, k_proj]'", 2,
        r"`adapter.targets` is \[q_proj, k_proj\], but \[q_proj, v_proj\]", r"leave `adapter.targets` out",
    ),
    "start with fewer layers than the targets": Case(
        adapter(), f"{START} adapter.targets=all-linear", 2, r"targets are other layers.*`.*`, which it has not",
        r"leave `adapter.targets` out",
    ),
    "start of another base": Case(
        both(gpt2("other"), adapter(base="other", target_modules=["c_attn"], fan_in_fan_out=True)),
        START, 2, r"another base: the model has no linear layer `transformer", r"other`\), or an adapter of this",
    ),
    "start of a base of another size": Case(
        adapter(wider_model), START, 2, r"another base: .* 64 outputs in the model, and", r"beside"
    ),
    "start whose settings are cut": Case(
        adapter(cut("adapter/adapter_config.json")), START, 2, r"adapter_config.json cannot be read", r"again"
    ),
    "start without weights": Case(
        adapter(gone("adapter/adapter_model.safetensors")), START, 2, r"no adapter_model.safetensors", r"again"
    ),
    "start whose weights are cut": Case(
        adapter(cut("adapter/adapter_model.safetensors")), START, 2, r"safetensors cannot be read", r"again"
    ),
    "start whose weights are text": Case(
        adapter(file("adapter/adapter_model.safetensors", "NaN " * 99)), START, 2, r"cannot be read", r"again"
    ),
    "start whose weights are a pointer": Case(
        adapter(file("adapter/adapter_model.safetensors", "version https://git-lfs.github.com/spec/v1\n")),
        START, 2, r"Git LFS pointer", r"git lfs pull",
    ),
    "start whose weights are pickled": Case(
        adapter(lambda project: Path("adapter/adapter_model.safetensors").rename("adapter/adapter_model.bin")),
        START, 2, r"pickled \(adapter_model.bin\)", r"load it in PEFT",
    ),
    "start with a weight of another shape": Case(
        adapter(weighs(lambda all_, name: all_.update({name: torch.ones(3, 32)}))), START, 2, r"rank is 4", r"again"
    ),
    "start that lacks a weight": Case(
        adapter(weighs(lambda all_, name: all_.pop(name))), START, 2, r"should have A, B, and A differ", r"again"
    ),
    "start with a weight that is no number": Case(
        adapter(weighs(lambda all_, name: all_.update({name: torch.full((4, 32), float("nan"))}))),
        START, 2, r"is NaN or infinite", r"earlier checkpoint",
    ),
    "start with a scale that is no number": Case(
        adapter(says(lora_alpha=float("nan"))), START, 2, r"`lora_alpha` .* but is nan", r"again"
    ),
    "start of PiSSA": Case(
        adapter(says(init_lora_weights="pissa")), START, 2, r"base that was changed .*pissa", r"path_initial_model"
    ),
    "start with whole layers": Case(
        adapter(says(modules_to_save=["lm_head"])), START, 2, r"trained as a whole \(`modules_to_save`\)", r"merge it"
    ),
    "start with biases": Case(adapter(says(bias="lora_only")), START, 2, r"`bias: lora_only`", r"merge it"),
    "start of another kind": Case(adapter(says(peft_type="IA3")), START, 2, r"of the type 'IA3'", r"merge it"),
    "start whose ranks differ": Case(
        adapter(rank_pattern={"q_proj": 2}), START, 2, r"not all of its layers are alike", r"merge it"
    ),
    "start with a rank that is no whole number": Case(adapter(says(r=4.0)), START, 2, r"`r` .* but is 4.0", r"again"),
    "start with an endless alpha": Case(adapter(says(lora_alpha=1e400)), START, 2, r"`lora_alpha` .* is inf", r"again"),
    "start with bases": Case(
        adapter(says(base_model_name_or_path=["x"])), START, 2, r"`base_model_name_or_path` .* be text", r"again"
    ),
    "start with numbers for targets": Case(
        adapter(says(target_modules=[1, 2])), START, 2, r"`target_modules` .* names of layers", r"again"
    ),
    "start with a list of ranks": Case(
        adapter(says(rank_pattern=[1])), START, 2, r"`rank_pattern` .* a table of numbers", r"again"
    ),
    "start with half a pattern": Case(
        adapter(says(target_modules="(q")), START, 2, r"`target_modules` is no regular expression", r"again"
    ),
    "starts": Case(nothing, f"{TRAIN} 'adapter.start=[adapter]'", 2, r"`adapter.start` should be text", r"start: nu"),
    "start of another base, in a dry run": Case(
        adapter(wider_model), f"{START} --dry-run", 2, r"another base: .* 64 outputs in the model, and", r"beside"
    ),
    "start of another architecture, in a dry run": Case(
        both(gpt2("other"), adapter(base="other", target_modules=["c_attn"], fan_in_fan_out=True)),
        f"{START} --dry-run", 2, r"another base: the model has no linear layer `transformer", r"other`\)",
    ),
    "start not a number, in a dry run": Case(
        adapter(weighs(lambda all_, name: all_.update({name: torch.full((4, 32), float("nan"))}))),
        f"{START} --dry-run", 2, r"is NaN or infinite", r"earlier checkpoint",
    ),
    "start a run whose adapter cannot be one": Case(
        adapter(lambda project: shutil.copytree("adapter", "runs/other/final"), rank_pattern={"q_proj": 2}),
        f"{TRAIN} adapter.start=runs/other", 2, r"no adapter_config.json", r"^name a folder that PEFT or a run",
    ),
    "overwriting the start": Case(
        finished(adapter(lambda project: shutil.move("adapter", "runs/run/checkpoints/adapter"))),
        f"{TRAIN} --overwrite adapter.start=runs/run/checkpoints/adapter", 2, r"`--overwrite` would remove", r"another",
    ),
    "a model that is an adapter, under an adapter": Case(
        adapter(), f"{MERGED} adapter=lora", 2, r"`adapter` is an adapter itself", r"`adapter.start: adapter`.*--merge"
    ),
    "a model that is an adapter whose ranks differ, under an adapter": Case(
        adapter(rank_pattern={"q_proj": 2}), f"{MERGED} adapter=lora", 2, r"is an adapter itself",
        r"^to train another adapter, merge it first: `dpo export adapter",
    ),
    "a model that is an adapter of another kind, under an adapter": Case(
        adapter(says(peft_type="IA3")), f"{MERGED} adapter=lora", 2, r"of the type 'IA3'", r"^merge it in PEFT"
    ),
    "a model that is an adapter to nothing": Case(
        adapter(says(base_model_name_or_path=None)), MERGED, 2, r"names no base", r"write the whole path"
    ),
    "a model that is an adapter to a relative path": Case(
        adapter(says(base_model_name_or_path="model")), MERGED, 2, r"by a relative path, `model`", r"the whole path"
    ),
    "a model that is an adapter to what is gone": Case(
        adapter(lambda project: shutil.move("model", "moved")), MERGED, 2, r"/model`, which does not exist", r"write"
    ),
    "a model that is an adapter of a base without weights": Case(
        adapter(gone("model/model.safetensors")), MERGED, 2, r"weights are missing: .*/model`", r"incomplete"
    ),
    "a model that is an adapter of another base": Case(adapter(wider_model), MERGED, 2, r"another base", r"beside"),
    "a reference that is an adapter": Case(
        adapter(), f"{TRAIN} reference.model=adapter", 2, r"`adapter` is an adapter, and a ref",
        r"set `adapter.start: adapter` and.*; else merge it: `dpo export adapter",
    ),
    "a reference that is an adapter whose ranks differ": Case(
        adapter(rank_pattern={"q_proj": 2}), f"{TRAIN} reference.model=adapter", 2, r"is an adapter, and a ref",
        r"^merge it: `dpo export adapter",
    ),
    "a reference that is an adapter of another base": Case(
        both(lambda project: shutil.copytree("model", "other"), adapter(base="other")),
        f"{TRAIN} reference.model=adapter", 2, r"is an adapter, and a ref", r"^merge it: `dpo export adapter",
    ),
    "a reference that is another kind of adapter": Case(
        adapter(says(peft_type="IA3")), f"{TRAIN} reference.model=adapter", 2, r"of the type 'IA3'", r"^merge it in PE"
    ),
    "a configuration for a broken adapter": Case(
        adapter(gone("adapter/adapter_model.safetensors")), "init --model adapter --out new.yaml", 2,
        r"no adapter_model.safetensors", r"again",
    ),
    "scoring a broken adapter": Case(
        adapter(cut("adapter/adapter_model.safetensors")), f"{EVAL} --model adapter", 2, r"cannot be read", r"again"
    ),
}  # fmt: skip

NF4, INT8 = (f"{LORA} model.quantize={kind}" for kind in ("nf4", "int8"))
QUANTIZE_CASES = {
    "few bits without an adapter": Case(
        nothing, f"{TRAIN} model.quantize=nf4", 2, r"`model.quantize: nf4` needs an adapter", r"`adapter: lora`"
    ),
    "few bits without an adapter, in the file": Case(
        settings(model={"name": "model", "quantize": "int8"}), PREPARE, 2, r"`model.quantize: int8` needs", r"`adapter"
    ),
    "few bits without an adapter, to score": Case(
        nothing, f"{EVAL} --model model model.quantize=nf4", 2, r"needs an adapter: weights of so few", r"leave"
    ),
    "few bits of an unknown kind": Case(nothing, f"{LORA} model.quantize=nf5", 2, r"`model.quantize` should", r"`nf4`"),
    "few bits by their number": Case(nothing, f"{LORA} model.quantize=4", 2, r"`model.quantize` should be", r"nf4"),
    "few bits as other programs say it": Case(
        nothing, f"{LORA} model.load_in_4bit=true", 2, r"`model.load_in_4bit` is not a setting", r"to `nf4` or"
    ),
    "few bits of a model that has few": Case(
        lambda project: project.model(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        NF4, 2, r"quantized \(bitsandbytes\), and", r"unquantized original",
    ),
    "few bits of weights that have few": Case(few_bits, INT8, 2, r"quantized \(`.*` is F8_E4M3\)", r"dequantize"),
    "few bits of a model without linear layers": Case(
        falcon("model"), NF4, 2, r"FalconForCausalLM has no linear layers that bitsandbytes knows", r"quantize: null"
    ),
    "few bits of a file that is no GGUF": Case(
        file("model.gguf", "GGUF, but text"), f"{NF4} model.name=model.gguf", 2, r"does not read this ver", r"update"
    ),
    "few bits in a precision of GPUs": Case(
        nothing, f"{NF4} model.dtype=float16", 2, r"float16` cannot be computed in on a CPU", r"needs a GPU"
    ),
    "few bits without their package": Case(
        uninstalled("bitsandbytes"), NF4, 2, r"`bitsandbytes` is not installed", r"pip install 'dpo-cli\[quantize\]'"
    ),
    "an adapter without its package": Case(
        uninstalled("peft"), LORA, 2, r"`peft` is not installed", r"pip install 'dpo-cli\[adapters\]'"
    ),
}  # fmt: skip

OUTPUT_CASES = {
    "output folder holds a run": Case(stopped(), TRAIN, 2, r"contains another run", r"--resume.*--overwrite"),
    "output folder holds a finished run": Case(finished(), TRAIN, 2, r"contains another run", r"--resume.*--overwrite"),
    "output folder contains other files": Case(
        file("runs/run/essay.txt", "x"), TRAIN, 2, r"contains other files", r"another `output_dir`"
    ),
    "output folder contains other files, overwrite": Case(
        file("runs/run/essay.txt", "x"), f"{TRAIN} --overwrite", 2, r"contains other files", r"another `output_dir`"
    ),
    "output folder is a file": Case(file("runs/run", "x"), TRAIN, 2, r"is a file", r"another `output_dir`"),
    "output folder a link to nothing": Case(
        dangling("mine"), f"{TRAIN} output_dir=mine", 2, r"link to `nowhere`, which does not exist", r"output_dir"
    ),
    "output folder below a link to nothing": Case(
        dangling("mine"), f"{TRAIN} output_dir=mine/run", 2, r"link to `nowhere`, which does not exist", r"output_dir"
    ),
    "output folder below a file": Case(
        nothing, f"{TRAIN} output_dir=pairs.jsonl/run", 2, r"not a directory|is a file", r"in the way"
    ),
    "output folder where nothing can be made": Case(nothing, f"{TRAIN} output_dir=/proc/run", 1, r"failed", r"exist"),
    "output folder read-only": Case(nothing, f"{TRAIN} output_dir=/sys/run", 1, r"failed", r"permissions|read-only"),
    "output folder with NUL": Case(config('model: model\noutput_dir: "a\\0b"\ndata: {train: pairs.jsonl}\n'), TRAIN, 2,
        r"output_dir|output folder", r"."),
    "output folder with too long a name": Case(nothing, f"{TRAIN} output_dir={'x' * 300}", 2, r"too long", r"shorter"),
    "output folder is the user's own": Case(
        own_config_file,
        "train --config mine/config.yaml --overwrite output_dir=mine", 2, r"other files", r"another",
    ),
    "overwriting the model that is trained": Case(
        finished(), f"{TRAIN} --overwrite model.name=runs/run/final", 2, r"overwrit|remove|replace", r"another"
    ),
    "overwriting a run with broken data": Case(
        finished(data("null")), f"{TRAIN} --overwrite", 2, r"is not a JSON object", r"fix the row"
    ),
    "resuming under other settings": Case(
        stopped(), f"{TRAIN} --resume loss.beta=0.3", 2, r"`loss.beta` was 0.1 and is 0.3", r"restore them"
    ),
    "resuming from a broken config": Case(
        stopped(append("runs/run/config.yaml", "]")), f"{TRAIN} --resume", 2, r"cannot be read", r"--overwrite"
    ),
    "resuming without the config": Case(
        stopped(gone("runs/run/config.yaml")), f"{TRAIN} --resume", 2, r"of the run are missing", r"from a copy"
    ),
    "resuming with another model": Case(
        stopped(other_weights), f"{TRAIN} --resume", 2, r"the model is not the one", r"restore the model"
    ),
    "resuming with other data": Case(
        stopped(data(*[{**PAIR, "instruction": f"Say {n}."} for n in range(9)])),
        f"{TRAIN} --resume", 2, r"the data is not the one", r"restore the data",
    ),
    "checkpoint of another model": Case(
        stopped(state_of_each(stands_on={"model": SCHEME + "0" * 64, "data": "0" * 64})),
        f"{TRAIN} --resume", 2, r"the model is not the one", r"restore the model",
    ),
    "checkpoint of a version with other digests": Case(
        stopped(state_of_each(stands_on={"model": "0" * 64, "data": "0" * 64})),
        f"{TRAIN} --resume", 2, r"another version of dpo wrote the checkpoint", r"the version that began it",
    ),
    "checkpoint of another version": Case(
        stopped(state_of_each(stands_on=...)), f"{TRAIN} --resume", 2, r"every checkpoint is damaged", r"--overwrite"
    ),
    "every checkpoint damaged": Case(
        stopped(every_checkpoint_damaged), f"{TRAIN} --resume", 2, r"no checkpoint|every checkpoint", r"--overwrite"
    ),
    "no checkpoint but a model": Case(
        stopped(no_checkpoint_but_a_model), f"{TRAIN} --resume", 2, r"every checkpoint is damaged", r"--overwrite"
    ),
    "resuming a finished run whose model is damaged": Case(
        finished(cut("runs/run/final/model.safetensors")), f"{TRAIN} --resume", 2, r"damaged", r"remove|--overwrite"
    ),
}  # fmt: skip

EVAL_CASES = {
    "nothing trained yet": Case(nothing, EVAL, 2, r"no trained model yet", r"train first"),
    "trained model damaged": Case(
        finished(cut("runs/run/final/model.safetensors")),
        EVAL,
        2,
        r"the model is damaged: model.safetensors",
        r"another",
    ),
    "no such model to score": Case(nothing, f"{EVAL} --model ./no", 2, r"no model folder `./no`", r"name a folder"),
    "scored model of another vocabulary": Case(
        gpt2("other", vocabulary=300), f"{EVAL} --model other", 2, r"vocabulary", r"tokenizer"
    ),
    "no such model to compare": Case(
        nothing, f"{EVAL} --model model --model ./no", 2, r"no model folder `./no`", r"name a folder"
    ),
    "model named twice": Case(
        nothing, f"{EVAL} --model model --model ./model", 2, r"`./model` is named twice, also as `model`", r"once"
    ),
    "model of another vocabulary to compare": Case(
        gpt2("other", vocabulary=300), f"{EVAL} --model model --model other", 2, r"vocabulary", r"tokenizer"
    ),
    "model to compare that is not finite": Case(
        weights_of_nan("other"), f"{EVAL} --model model --model other", 2, r"nan|NaN|not finite", r"weights"
    ),
    "no such pairs to score": Case(
        nothing, f"{EVAL} --model model --data no.jsonl", 2, r"no file or folder", r"mean|name"
    ),
    "pairs to score of an unknown kind": Case(
        nothing, f"{EVAL} --model model --data run.yaml", 2, r"data file of a known type", r"ends in one of"
    ),
    "pairs to score broken": Case(
        data("null", name="held.jsonl"), f"{EVAL} --model model --data held.jsonl", 2, r"JSON object", r"fix"
    ),
    "nothing held out": Case(nothing, f"{EVAL} --model model data.eval=null", 2, r"no held-out pairs", r"--data"),
    "JSON into no folder": Case(
        nothing, f"{EVAL} --model model --json no/a.json", 2, r"there is no folder `no`", r"create it"
    ),
    "JSON onto a folder": Case(
        folder("a.json"), f"{EVAL} --model model --json a.json", 2, r"folder|directory", r"file"
    ),
    "JSON onto the configuration": Case(
        nothing, f"{EVAL} --model model --json run.yaml", 2, r"`run.yaml` exists already", r"another file"
    ),
    "JSON where nothing can be made": Case(
        nothing, f"{EVAL} --model model --json /proc/a.json", 1, r"writing the figures failed", r"exist"
    ),
    "JSON onto a full device": Case(
        full_device, f"{EVAL} --model model --json full", 1, r"no space left", r"free some"
    ),
}

RUN_FILES = ("runs/run/metrics.jsonl", "runs/run/environment.json", "runs/run/report.html")
FULL_CASES = {
    "disk full while preparing": Case(
        limit(6000), f"{PREPARE} --out prepared", 1, r"prepar\w+.* failed: .*file too large", r"file is larger"
    ),
    "disk full while the reference is kept": Case(
        both(lambda project: write_rows(project.folder / "pairs.jsonl", FRESH), Project.prepare, limit(6000)),
        f"{TRAIN} data.train=prepared", 1, r"reference cache failed: file too large", r"file is larger",
    ),
    "disk full while logging": Case(
        limit(40_000),
        f"{TRAIN} training.pairs_per_step=1 training.epochs=5 checkpoints.every_steps=999 data.eval=null",
        1, r"metrics.* failed: file too large", r"file is larger",
    ),
    "disk full while a checkpoint is saved": Case(
        limit(60_000), TRAIN, 1, r"saving a checkpoint failed", r"free some space|file is larger"
    ),
    "disk full while a resumed run saves": Case(
        stopped(no_newest_checkpoint, limit(60_000)),
        f"{TRAIN} --resume", 1, r"saving a checkpoint failed", r"free some space|file is larger", RUN_FILES,
    ),
    "disk full while the trained model is saved": Case(
        limit(60_000), f"{TRAIN} checkpoints.every_steps=99 checkpoints.at_end=false", 1,
        r"saving the trained model failed", r"free some|larger"
    ),
}  # fmt: skip
FRESH = [{**PAIR, "instruction": f"Say hi {n} times, please." * 9, "chosen": "Hi. " * n} for n in range(1, 40)]

CASES = (
    CONFIG_CASES
    | USAGE_CASES
    | DATA_CASES
    | PREPARED_CASES
    | MODEL_CASES
    | ADAPTER_CASES
    | QUANTIZE_CASES
    | OUTPUT_CASES
    | EVAL_CASES
    | FULL_CASES
)


@contextlib.contextmanager
def files_no_larger_than(size: int | None) -> Iterator[None]:
    """Let the system refuse larger files, which Python sees as an `OSError` and Rust as an error of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def intact(tmp_path_factory, tiny_llama, demo_rows):
    """A folder with a model, pairs and a configuration."""
    folder = tmp_path_factory.mktemp("intact")
    shutil.copytree(tiny_llama, folder / "model")
    write_rows(folder / "pairs.jsonl", demo_rows[:40])
    return folder


@pytest.fixture(scope="module")
def started(tmp_path_factory, intact, tokenizer):
    """The folder of a project whose run is finished, with all its checkpoints."""
    return finished(tmp_path_factory.mktemp("started"), intact, tokenizer)


@pytest.fixture
def project(tmp_path, intact, tokenizer, monkeypatch, started):
    return enter(tmp_path, intact, tokenizer, monkeypatch, started)


def finished(folder: Path, intact: Path, tokenizer: Any) -> Path:
    """Make a folder into a project and train in it."""
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, intact, tokenizer, patch, folder)
        assert call(TRAIN) == 0
    return folder


def enter(folder: Path, intact: Path, tokenizer: Any, patch: pytest.MonkeyPatch, started: Path) -> Project:
    """Make a folder into a project and go there."""
    shutil.copytree(intact, folder, dirs_exist_ok=True)
    patch.chdir(folder)
    project = Project(folder, tokenizer, patch, started)
    project.configure()
    return project


def content(folder: Path) -> dict[str, object]:
    """Return every file below a folder: its bytes, where a link leads, or its kind."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name, kind = path.relative_to(folder).as_posix(), path.lstat().st_mode
        if stat.S_ISLNK(kind):
            found[name] = path.readlink()
        elif not stat.S_ISDIR(kind):
            found[name] = path.read_bytes() if stat.S_ISREG(kind) else stat.S_IFMT(kind)
    return found


def errors(said: str) -> list[tuple[str, str]]:
    """Return each error that was said, with its hint."""
    blocks = re.split(r"^error: ", said, flags=re.MULTILINE)[1:]
    hints = (re.search(r"^hint: (.*)", block, flags=re.MULTILINE) for block in blocks)
    return [(block.splitlines()[0], hint[1] if hint else "") for block, hint in zip(blocks, hints, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_every_bad_input_has_its_status_an_error_and_a_hint_and_costs_nothing(project, capfd, name):
    case = CASES[name]
    case.breaks(project)
    before = content(project.folder)
    capfd.readouterr()
    with files_no_larger_than(project.largest_file):
        status = call(case.arguments)
        if case.status == 1:
            # A file that was left open is closed here, and complains if what it holds cannot be written.
            gc.collect()
    printed, said = capfd.readouterr()

    assert "Traceback" not in said, said
    assert status == case.status, said
    if case.status == 2:
        assert printed == ""
    fitting = [hint for error, hint in errors(said) if re.search(case.error, error)]
    assert fitting, said
    assert re.search(case.hint, fitting[0]), said

    after = content(project.folder)
    kept = before.keys() - set(case.may_change)
    assert {name: after.get(name) for name in kept} == {name: before[name] for name in kept}
    new = after.keys() - before.keys()
    assert not [name for name in new if ".tmp-" in name]
    if case.status == 2:
        assert not new
