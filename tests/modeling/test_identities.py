"""What is kept of a model's identity beside its files."""

from __future__ import annotations

from dpo_cli.modeling.folders import identities
from dpo_cli.modeling.folders.model_files import NO_TRUST
from dpo_cli.modeling.held import FLOAT32


def test_what_a_crash_left_of_a_record_goes_when_it_is_written_again_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(identities, "_SETTLED_SECONDS", -1.0)
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    kept = model, identities.stamp_of(model), FLOAT32, NO_TRUST, "identity"
    identities.remember_identity(*kept)
    (record,) = (tmp_path / "cache" / "identities").iterdir()
    others = record.with_name(".another.json.tmp-0a1b2c3d")
    for stray in (record.with_name(f".{record.name}.tmp-0a1b2c3d"), others):
        stray.write_text("half of it")
    identities.remember_identity(*kept)
    assert set(record.parent.iterdir()) == {record, others}
    assert identities.known_identity(model, FLOAT32, NO_TRUST) == "identity"
