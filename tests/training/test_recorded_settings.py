"""What a run's config.yaml is believed of the settings that the run was started with."""

from __future__ import annotations

import pytest

from dpo_cli.errors import UserError
from dpo_cli.training.recorded_settings import RESOLVED, RecordedSettings


@pytest.fixture
def file(tmp_path):
    return tmp_path / "config.yaml"


@pytest.mark.parametrize(("written", "found"), [("512", 512), ("auto", None), ("true", None), ("0", None)])
def test_what_a_run_was_started_with_is_believed_where_it_is_a_count(file, written, found):
    file.write_text(f"{RESOLVED}training:\n  micro_batch_tokens: {written}\n")
    assert RecordedSettings(file).count("training.micro_batch_tokens") == found


def test_nothing_is_believed_of_a_configuration_that_no_run_wrote(file):
    file.write_text("training: {epochs: 2.0, micro_batch_tokens: 512}\n")
    recorded = RecordedSettings(file)
    assert (recorded.exist(), recorded.count("training.micro_batch_tokens"), recorded.length()) == (False, None, None)


@pytest.mark.parametrize(
    ("written", "found"), [("{epochs: 2.0, max_steps: null}", (2.0, None)), ("{epochs: 1, max_steps: 40}", (1, 40))]
)
def test_the_length_of_a_run_is_that_which_it_was_started_with(file, written, found):
    file.write_text(f"{RESOLVED}training: {written}\n")
    assert RecordedSettings(file).length() == found


@pytest.mark.parametrize("written", ["{}", "{epochs: 0}", "{epochs: 1.0, max_steps: many}"])
def test_a_length_that_no_run_writes_is_an_error_with_the_file(file, written):
    file.write_text(f"{RESOLVED}training: {written}\n")
    with pytest.raises(UserError, match=r"cannot be read: `training\.epochs` is") as caught:
        RecordedSettings(file).length()
    assert (caught.value.where, "put the file back from a copy" in caught.value.hint) == (str(file), True)
