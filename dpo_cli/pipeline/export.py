"""`dpo export`: a model is taken out of a run, or made of another one, and proved before it is there.

One straight path: the source as a policy in float32, its adapter merged where that is asked for, what is written of it,
and the proof of what was written. All of it is computed in float32, whatever the run computed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpo_cli.config.export_forms import GgufFolder, PeftFolder
from dpo_cli.config.export_sources import ForeignAdapter, PlainModel, TrainedAdapter, TrainedModel
from dpo_cli.config.exporting import Export
from dpo_cli.config.publishing import EXPORT
from dpo_cli.data.tokens.chat_template import named_templates
from dpo_cli.errors import FAILED, UserError
from dpo_cli.evaluation.agreement import Difference
from dpo_cli.modeling.folders.provenance import Provenance
from dpo_cli.modeling.folders.saving import origin_of, remember_provenance, saved_folder, warn_of_ignored
from dpo_cli.modeling.gguf.llama_cpp import available
from dpo_cli.modeling.held import QUANTIZED
from dpo_cli.modeling.policy import Policy
from dpo_cli.pipeline.export_answers import check_answers, num_alike
from dpo_cli.pipeline.export_facts import NOTHING_WRITTEN, Facts, check_facts
from dpo_cli.pipeline.export_forms import AsGguf, Read, Written, written_as
from dpo_cli.pipeline.export_llama_cpp import (
    ACTIVATIONS,
    ANSWERS_BESIDE,
    LLAMA_CPP,
    MISSING,
    READERS,
    ByLlamaCpp,
    ByTransformers,
    read_by_llama_cpp,
)
from dpo_cli.pipeline.export_proof import (
    NONE,
    Proof,
    Said,
    asked,
    check_alike,
    check_merged,
    in_another_order,
)
from dpo_cli.pipeline.export_sources import alone, check_finite, give_adapter, in_float32, open_source, unquantized
from dpo_cli.pipeline.model_cards import (
    card_of_run,
    changes_of,
    digest_of_base,
    measured,
    provenance_of_run,
    shown_versions,
    step_of_model,
)
from dpo_cli.pipeline.models import trained_policy
from dpo_cli.pipeline.session import Session, started
from dpo_cli.reporting.card import ADAPTER, GGUF, MERGED, MODEL, Card, model_card
from dpo_cli.reporting.console import Console
from dpo_cli.reporting.tables import HELD_OUT, figures_table
from dpo_cli.system.hub import CARD
from dpo_cli.system.storage import remove_strays_of
from dpo_cli.system.text import several
from dpo_cli.training.checkpoints import FINGERPRINTS, HELD, beginning_of, held_at_beginning


def export(wanted: Export, console: Console) -> dict[str, Any]:
    """Write what is exported, prove it, and print how exact it is; return that.

    Raises:
        UserError: Something is wrong that the user can fix, or what was written is not what was exported.
    """
    with started(in_float32(wanted.source.config), console) as session:
        if session.accelerator.num_processes > 1:
            hint = "start it without torchrun or accelerate"
            raise UserError("a model is exported by one process", "the command line", hint)
        remove_strays_of(wanted.to)
        try:
            found = _exported(session, wanted)
        except torch.OutOfMemoryError as error:
            hint = "set the environment variable ACCELERATE_USE_CPU to true, which takes the host's memory instead"
            what = "the device has no room for the model in float32"
            raise UserError(what, str(session.accelerator.device), hint, status=FAILED) from error
    _show(found, wanted.to, console)
    return found


def _exported(session: Session, wanted: Export) -> dict[str, Any]:
    """Open the source, merge it, write it, read it again, and compare."""
    policy, tokenizer, proof = open_source(session, wanted)
    check_finite(policy, wanted.source.name)
    warn_of_ignored(policy.model)
    texts, is_gguf = proof.texts(tokenizer), isinstance(wanted.form, GgufFolder)
    facts = Facts.of(tokenizer, policy.model.generation_config, texts, chats_alone=is_gguf)
    form = written_as(wanted, policy, tokenizer, facts.stops)
    called, quantize = "the adapter" if wanted.source.is_adapter else "the model", session.config.model.quantize
    trained = source = asked(proof, policy, called, facts.stops)
    if wanted.merges and quantize:
        del policy
        session = unquantized(alone(session))
        policy = _unquantized_policy(session, wanted, tokenizer)
        source = asked(proof, policy, "the adapter on the unquantized base", facts.stops)
    rounded, merging, rounding = _ready(policy, proof.few(), form, wanted, source, facts)
    details: dict[str, Any] = _beginning(wanted)
    if isinstance(wanted.source, TrainedModel):
        # It was read from the run's own folder, which tells less than the base.
        complete = wanted.source.unscored is None
        known = provenance_of_run(wanted.source.config, wanted.source.run, complete=complete)
        remember_provenance(policy.model, known)
    provenance = origin_of(policy.model).provenance
    doing = f"writing the {'merged ' if wanted.merges else ''}model"
    with saved_folder(wanted.to, doing, details, replaces=False) as folder:
        form.write(policy, tokenizer, folder)
        del policy
        read = _read(alone(session), form, folder, wanted)
        written, exactness = _proved(read, proof, facts, rounded, merging.largest, form, wanted)
        by_transformers = ByTransformers(read.policy, written, read.tokenizer, facts)
        few = proof.few()
        by_llama_cpp = _by_llama_cpp(session, by_transformers, few, form, folder, wanted)
        found = {
            **({f"adapter on {quantize}": trained.figures} if wanted.merges and quantize else {}),
            "scored": proof.scored,
            called.removeprefix("the "): source.figures,
            "exported": written.figures,
            "weights": str(form),
            "reader": form.reader,
            **({"pairs compared": len(few.of(source))} if written.figures else {}),
            "difference": Difference.between(few.of(source), written.logps).as_dict(),
            "rounding": rounding.as_dict(),
            "exactness": exactness.as_dict(),
            "answers": {
                "compared": len(written.answers),
                "as rounded": num_alike(rounded.answers, written.answers),
                "alike": num_alike(source.answers, written.answers),
                "gap": rounded.gap,
            },
            **(by_llama_cpp.beside(source) if by_llama_cpp else {}),
        }
        if wanted.merges and quantize:
            found[quantize] = Difference.between(few.of(trained), written.logps).as_dict()
        details[EXPORT] = found
        gguf = form.file(folder).name if isinstance(form, AsGguf) else ""
        card = replace(_card(wanted, found, provenance, tokenizer), gguf=gguf)
        (folder / CARD).write_text(model_card(card), encoding="utf-8")
    return found


def _read(session: Session, form: Written, folder: Path, wanted: Export) -> Read:
    """Read what was written.

    Raises:
        UserError: Its reader refuses it.
    """
    try:
        return form.read(session, folder)
    except UserError as error:
        what = f"what was written is refused by {form.reader}: {error.what}"
        raise UserError(what, f"--to {wanted.to}", NOTHING_WRITTEN, status=FAILED) from error


def _proved(
    read: Read, proof: Proof, facts: Facts, rounded: Said, merged_by: float, form: Written, wanted: Export
) -> tuple[Said, Difference]:
    """Return what a model says that was written and read again, and how far that is from the weights in memory.

    Raises:
        UserError: It is not what was exported.
    """
    where = f"--to {wanted.to}"
    check_facts(facts, facts.read_again(read.tokenizer, read.generation), where)
    written = asked(proof, read.policy, "what was written", facts.stops, rounded.answers)
    # Measured is only what is in memory, before: this is the same numbers by the same code, however exact that is.
    what = f"what was written, as {form.reader} reads it, is not what was exported"
    exactness = check_alike(rounded, written, what, where)
    check_answers(proof.prompts, rounded.answers, written.answers, read.policy, facts.stops, merged_by, where)
    return written, exactness


def _by_llama_cpp(
    session: Session, by_transformers: ByTransformers, proof: Proof, form: Written, folder: Path, wanted: Export
) -> ByLlamaCpp | None:
    """Let llama.cpp read a GGUF file, where it is installed.

    Raises:
        UserError: It cannot read the file, or reads another model from it.
    """
    if not isinstance(form, AsGguf):
        return None
    if not available():
        session.console.notice(MISSING)
        return None
    return read_by_llama_cpp(form.file(folder), form.kind, by_transformers, proof, session.console, f"--to {wanted.to}")


def _ready(
    policy: Policy, proof: Proof, form: Written, wanted: Export, source: Said, facts: Facts
) -> tuple[Said, Difference, Difference]:
    """Merge a policy's adapter, and round its weights, where that is asked for; return what it says then.

    Beside it, how far merging takes its log-probabilities by sums in another order, and how far rounding by itself.

    Raises:
        UserError: The merged policy is not what the adapter was, or its weights are too large.
    """
    if wanted.merges:
        policy.merge()
    form.check(policy)
    exact, merging = source, NONE
    if wanted.merges:
        stops = None if form.rounds else facts.stops
        exact = asked(proof, policy, "the merged model", stops, source.answers)
        merging = check_merged(source, exact, f"--to {wanted.to}", lambda: in_another_order(proof, policy))
    if not form.rounds:
        return exact, merging, NONE
    changed = form.round(policy)
    if not changed and not wanted.merges:
        # The same weights say the same; of merged ones that are rounded, nothing was answered yet.
        return source, merging, NONE
    rounded = asked(proof, policy, "the model after rounding", facts.stops, source.answers)
    return rounded, merging, Difference.between(exact.logps, rounded.logps)


def _unquantized_policy(session: Session, wanted: Export, tokenizer: Any) -> Policy:
    """Return the base as it is in its files, with the adapter beside it."""
    assert isinstance(wanted.source, TrainedAdapter)
    policy = trained_policy(session)
    give_adapter(policy, wanted.source, tokenizer)
    return policy


def _beginning(wanted: Export) -> dict[str, Any]:
    """Return what an adapter's folder says of the base that it means nothing without."""
    if wanted.merges or not isinstance(wanted.source, TrainedAdapter):
        return {}
    folder = wanted.source.folder
    return {FINGERPRINTS: dict(beginning_of(folder)), HELD: held_at_beginning(folder) or ""}


def _differences(found: Mapping[str, Any]) -> dict[str, str]:
    """Name what was compared, and say how far apart it is."""
    source = "adapter" if "adapter" in found else "model"
    names = {
        "difference": f"exported against {source}",
        "rounding": f"of the weights to {found['weights']}, alone",
        LLAMA_CPP: f"exported, as llama.cpp reads it, against {source}",
        READERS: "llama.cpp against transformers, of the same file",
        ACTIVATIONS: "of activations that are rounded as llama.cpp does, alone",
        **{name: f"exported against the adapter on the {name} base" for name in QUANTIZED},
    }
    compared = {name: Difference(**found[name]) for name in names if name in found}
    return {name: f"{apart} (nats per token, {names[name]})" for name, apart in compared.items() if apart.largest}


def _columns(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of the scored pairs by the model."""
    names = ("model", "adapter", "exported")
    return {name: value for name, value in found.items() if name.startswith(names)}


def _card(wanted: Export, found: Mapping[str, Any], provenance: Provenance, tokenizer: Any) -> Card:
    """Gather what the model card is written from."""
    source, config = wanted.source, wanted.source.config
    columns = _columns(found) if found["exported"] else {}
    kept = {"provenance": provenance, "form": _form(wanted), "scored": found["scored"], "checked": _checked(found)}
    if isinstance(source, (ForeignAdapter, PlainModel)):
        facts = {"weights": found["weights"], "versions": shown_versions()}
        chats = bool(named_templates(tokenizer))
        return Card(source.name, base=config.model.name, facts=facts, chats=chats, **kept)
    step = step_of_model(config, source.run, source.folder)
    facts = {
        **digest_of_base(beginning_of(source.folder)),
        **({"optimizer steps": step} if step else {}),
        **({"adapter": f"{config.adapter.type}, merged in float32"} if wanted.merges and config.adapter else {}),
        "weights": found["weights"],
    }
    own = measured(source.run, step)
    if not columns:
        columns, kept["scored"] = own, HELD_OUT
    elif found["scored"] == HELD_OUT and "before" in own:
        columns = {"before": own["before"], **columns}
    changes = changes_of(source.run, step) if "before" in columns else {}
    return card_of_run(config, source.run, facts, tokenizer, columns=columns, changes=changes, **kept)


def _form(wanted: Export) -> str:
    """Name what the folder holds, as the card does."""
    if isinstance(wanted.form, GgufFolder):
        return GGUF
    return ADAPTER if isinstance(wanted.form, PeftFolder) else MERGED if wanted.merges else MODEL


def _checked(found: Mapping[str, Any]) -> dict[str, str]:
    """Say what was compared of what was written, and how far apart it was."""
    on = _compared(found) or found["scored"]
    return {"on": on, "read by": found["reader"], **_differences(found), **_alike(found)}


def _compared(found: Mapping[str, Any]) -> str:
    """Say of how many pairs the differences are, where they are of some of those that are scored; else nothing."""
    few, every = found.get("pairs compared", 0), found["exported"].get("pairs", 0)
    return f"{few} of {every} {found['scored']}" if few < every else ""


def _alike(found: Mapping[str, Any]) -> dict[str, str]:
    """Say how many greedy answers are the same, and why others are not."""
    answers, source = found["answers"], "adapter" if "adapter" in found else "model"
    if not (compared := answers["compared"]):
        return {}
    rounded, alike = answers["as rounded"], answers["alike"]
    if alike == rounded:
        return {"answers": f"{alike} of {several(compared, 'greedy answer is', 'greedy answers are')} the same"}
    what, how = ("rounded weights", "rounding") if found["rounding"]["largest"] else ("merged model", "merging")
    told = f"{rounded} of {several(compared, 'greedy answer')} of the {what}, {alike} of the {source}"
    why = f": {how} puts other tokens first, by at most {gap:.1e} nats" if (gap := answers["gap"]) else ""
    return {"answers": told + why}


def _show(found: Mapping[str, Any], to: Path, console: Console) -> None:
    """Print how exact the model is."""
    console.block()
    if found["exported"]:
        console.result(figures_table(_columns(found), found["scored"]))
        console.result("")
    some = {"compared": f"{few}, spread over all lengths"} if (few := _compared(found)) else {}
    said = _alike(found)
    if said and (beside := found.get(ANSWERS_BESIDE)):
        said["answers"] += f"; of llama.cpp and transformers {beside['alike']} of {beside['compared']}"
    lines = {**some, **_differences(found), **said, "model": f"{to} ({found['weights']})"}
    width = max(map(len, lines))
    for name, line in lines.items():
        console.result(f"{name:<{width}}  {line}")
