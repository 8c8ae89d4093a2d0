"""Licence and origin of a model go into a GGUF file and come back from one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader

from dpo_cli.modeling.folders.loading import empty_policy, load_policy
from dpo_cli.modeling.folders.provenance import Licence, Provenance, provenance_of
from dpo_cli.modeling.folders.saving import origin_of
from dpo_cli.modeling.gguf.about import card_of_file
from dpo_cli.modeling.gguf.writing import write_gguf
from tests.conftest import GGUF
from tests.modeling.gguf.test_reading_experts import add_words

FRONTS = {
    "a licence of the Hub's list": "license: apache-2.0\nbase_model: org/first\n",
    "one of its own": "license: other\nlicense_name: my-terms\nlicense_link: LICENSE\nbase_model: [org/one, org/two]\n",
}


def fields_of(file: Path) -> dict[str, object]:
    return {key: field.contents() for key, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize("name", FRONTS)
def test_what_a_folder_tells_is_in_the_file_and_is_read_from_it(tmp_path, tiny_llama, tokenizer, name):
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(f"---\n{FRONTS[name]}---\n# A model\n", encoding="utf-8")
    model = load_policy(str(tmp_path / "model"))
    known = provenance_of(tmp_path / "model")
    assert known.licence is not None
    write_gguf(model, tmp_path / "model.gguf", "f32", "tiny", lambda writer: add_words(writer, tokenizer))
    found = fields_of(tmp_path / "model.gguf")
    assert found["general.license"] == known.licence.id
    assert found["general.base_model.0.repo_url"] == f"https://huggingface.co/{known.bases[0]}"
    assert found["general.base_model.count"] == len(known.bases)
    for load in (load_policy, empty_policy):
        read = load(str(tmp_path / "model.gguf"))
        assert provenance_of(Path(read.name_or_path)) == known
    assert origin_of(load_policy(str(tmp_path / "model.gguf"))).provenance == known


def test_a_file_says_nothing_of_what_is_not_known(tmp_path, tiny_llama, tokenizer):
    model = load_policy(str(tiny_llama))
    write_gguf(model, tmp_path / "model.gguf", "f32", "tiny", lambda writer: add_words(writer, tokenizer))
    assert not [key for key in fields_of(tmp_path / "model.gguf") if key.startswith(("general.lic", "general.base_"))]
    assert origin_of(load_policy(str(tmp_path / "model.gguf"))).provenance == Provenance()


@pytest.mark.parametrize("metadata", [{}, {"license": 3}, {"base_model.count": "x"}, {"base_model.count": 2}], ids=str)
def test_what_cannot_be_used_is_passed_over(metadata):
    assert card_of_file(metadata) == ""


@pytest.mark.real_model
def test_the_real_file_tells_its_licence(tmp_path):
    found = {key.removeprefix("general."): value for key, value in fields_of(GGUF).items()}
    (tmp_path / "README.md").write_text(card_of_file(found), encoding="utf-8")
    assert provenance_of(tmp_path).licence == Licence("apache-2.0")
