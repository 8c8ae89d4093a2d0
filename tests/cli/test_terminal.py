"""What a person sees of a run: on a terminal of any width, on a pipe, with --quiet, and when the run is to stop."""

from __future__ import annotations

import re

import pytest

from tests.conftest import read_metrics
from tests.marks import slow_unless
from tests.screen import OnTerminal

STEPS = {"training": {"max_steps": 8}, "evaluation": {"every_steps": 4}, "checkpoints": {"every_steps": 3}}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def drawn(said: str) -> list[str]:
    """Return the lines that lived: what was drawn and then cleared or written over."""
    parts = re.split(r"\r\n|\r|\x1b\[2K|\x1b\[1A|\x1b\[\?25[lh]", _COLOUR.sub("", said))
    return [part for part in parts if "━" in part or re.match(r"(step|evaluating:) ", part)]


# On a terminal


@pytest.mark.parametrize("width", slow_unless(lambda width: width == 60, [60, 80, 120]))
def test_a_run_on_a_terminal_fits_its_width_and_leaves_a_record(write_config, width):
    run = OnTerminal("train", "--config", write_config(**STEPS), width=width)
    screen = run.wait()
    assert run.process.returncode == 0, screen.lines
    assert screen.widest <= width
    assert not screen.hidden
    text = "\n".join(line.rstrip() for line in screen.lines)
    assert re.findall(r"^step (\d)/8  .*left *$", text, re.M) == list("12345678")
    assert re.findall(r"^evaluation after step (\d): loss \d", text, re.M) == ["4", "8"]
    assert len(re.findall(r"accuracy\s[\d.]+\s%\s\(95\s%\sinterval\s[\d.]+\s–\s[\d.]+\s%\),\smargin\s[+-]", text)) == 2
    assert re.findall(r"^checkpoint of step (\d) saved:", text, re.M) == ["3", "6", "8"]
    assert "━" not in text
    assert not re.search(r"\n\n\n", text.rstrip())


def test_the_time_left_is_whole_on_any_terminal_and_the_bar_goes_first(write_config):
    run = OnTerminal("train", "--config", write_config(**STEPS), width=60)
    run.wait()
    lived = drawn(run.said)
    assert [line for line in lived if line.startswith("step ") and "loss" in line]
    for line in lived:
        assert re.search(r"  (-:--|\d+:\d\d) left *$", line), line
        if "━" in line and line.startswith("step ") and "loss" in line:
            assert "tokens/s" in line


def test_text_is_wrapped_at_words_and_reads_as_on_a_pipe(tmp_path, forked_dpo):
    file = tmp_path / "run.yaml"
    file.write_text("model: models/none\ndata: {train: none.jsonl}\nloss: {type: dpo, betta: 1}\n", encoding="utf-8")
    on_pipe = forked_dpo("train", "--config", file).stderr
    assert max(map(len, on_pipe.splitlines())) > 40
    run = OnTerminal("train", "--config", file, width=40)
    screen = run.wait()
    assert run.process.returncode == 2
    assert screen.widest <= 40
    longer = [word for word in on_pipe.split() if len(word) > 33]
    words = " ".join(screen.lines).split()
    assert [word for word in on_pipe.split() if word not in longer] == [w for w in words if w in on_pipe.split()]


def test_a_secret_that_would_be_cut_in_two_is_covered(tmp_path):
    secret = "hf_" + "abcdefghij" * 4
    run = OnTerminal("train", "--config", tmp_path / secret, width=30)
    screen = run.wait()
    assert run.process.returncode == 2
    said = re.sub(r"\s", "", "".join(screen.lines))
    assert "abcdefghij" not in said


@pytest.mark.parametrize(
    ("env", "allowed"),
    [({"TERM": "dumb"}, ""), ({"NO_COLOR": "1"}, r"\x1b\[[01]?m"), ({"TERM": "dumb", "FORCE_COLOR": "1"}, _COLOUR)],
)
def test_terminals_of_little_skill_get_what_they_can_show(tmp_path, env, allowed):
    run = OnTerminal("train", "--config", tmp_path / "none.yaml", width=80, env=env)
    screen = run.wait()
    assert any(line.startswith("error: ") for line in screen.lines)
    assert "\x1b" not in re.sub(allowed, "", run.said)


# On a pipe


def step_lines(said: str) -> list[int]:
    return [int(number) for number in re.findall(r"^step (\d+)/", said, re.M)]


def test_a_pipe_has_a_line_for_every_so_many_steps_and_the_metrics_have_all(forked_dpo, write_config, tmp_path):
    ended = forked_dpo("train", "--config", write_config(**STEPS, logging={"every_steps": 3}))
    assert ended.returncode == 0, ended.stderr
    assert step_lines(ended.stderr) == [3, 6, 8]
    assert [row["step"] for row in read_metrics(tmp_path / "runs" / "run")] == list(range(1, 9))
    assert "\x1b" not in ended.stderr and "\r" not in ended.stderr
    assert re.findall(r"^checkpoint of step (\d) saved: ", ended.stderr, re.M) == ["3", "6", "8"]


def test_how_much_is_printed_may_change_when_a_run_goes_on(forked_dpo, write_config, tmp_path):
    file = write_config(**{**STEPS, "checkpoints": {"every_steps": 3, "at_end": False}})
    assert forked_dpo("train", "--config", file).returncode == 0
    (tmp_path / "runs" / "run" / "final").rename(tmp_path / "aside")
    again = forked_dpo("train", "--config", file, "--resume", "logging.every_steps=5")
    assert again.returncode == 0, again.stderr
    assert step_lines(again.stderr) == [8]


def test_quiet_prints_results_alone(forked_dpo, write_config):
    loud, quiet = write_config("loud", **STEPS), write_config("quiet", **STEPS)
    by_run = [forked_dpo("train", "--config", file, *more) for file, more in ((loud, []), (quiet, ["--quiet"]))]
    assert [one.returncode for one in by_run] == [0, 0], by_run
    assert by_run[0].stderr and not by_run[1].stderr
    assert by_run[1].stdout == by_run[0].stdout.replace("runs/loud", "runs/quiet")
    for command in ("eval", "prepare-data"):
        ended = forked_dpo(command, "--config", quiet, "-q")
        assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
        assert ended.stdout


def test_quiet_still_prints_errors(forked_dpo, write_config):
    wrong = forked_dpo("train", "--config", write_config(), "--quiet", "training.epochs=-1")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert "hint: " in wrong.stderr


# The header


def test_the_header_says_what_decides_a_run(forked_dpo, write_config):
    training = {"schedule": "cosine", "warmup_ratio": 0.25, "weight_decay": 0.01, "max_steps": 8}
    loss = [{"type": "dpo", "beta": 0.2, "logps": "mean"}, {"type": "sft", "weight": 0.5}]
    ended = forked_dpo("train", "--config", write_config(training=training, loss=loss))
    assert ended.returncode == 0, ended.stderr
    facts = dict(re.findall(r"^(\w[\w -]*?)  +(.*)$", ended.stderr, re.M))
    assert facts["loss"] == "1 · dpo (beta 0.2, logps mean) + 0.5 · sft"
    assert facts["learning rate"] == "0.001, cosine, warm-up until step 2"
    assert facts["optimizer"] == "adamw, weight_decay 0.01"
    assert facts["steps"] == "8 of 4 pairs, 1 epoch"
    assert facts["micro-batch"].startswith("at most ")


def test_every_loss_names_its_beta_in_the_header():
    from dpo_cli.config import Config
    from dpo_cli.pipeline.plan import described_loss
    from dpo_cli.preference.losses import Loss
    from dpo_cli.settings import members

    for member in members(Loss):
        kind = member.model_fields["type"].default
        config = Config.model_validate({"model": {"name": "m"}, "loss": {"type": kind}})
        beta = member.model_fields.get("beta")
        assert described_loss(config) == (f"{kind} (beta {beta.default:g})" if beta else kind)


# Asked to stop


def test_ctrl_c_is_answered_at_once_and_says_what_another_would_cost(write_config, tmp_path):
    settings = {"training": {"max_steps": 2000, "epochs": 1000}, "checkpoints": {"every_steps": 10_000}}
    run = OnTerminal("train", "--config", write_config(**settings, logging={"every_steps": 1}), width=80)
    run.until("step 3/2000 ")
    run.press(b"\x03")
    screen = run.wait()
    assert run.process.returncode == 130, screen.lines
    assert screen.widest <= 80 and not screen.hidden
    text = " ".join(" ".join(screen.lines).split())
    said = re.search(r"stopping after this step; press Ctrl-C again to stop at once and lose (\d+) steps", text)
    assert said, text
    done = read_metrics(tmp_path / "runs" / "run")[-1]["step"]
    assert 3 <= int(said[1]) <= done
    assert f"stopped after step {done}; saved" in text and "`--resume` continues from there" in text
    assert screen.lines[-2].strip() == "stopped by SIGINT"


def test_a_signal_during_an_evaluation_says_which_and_what_it_waits_for(zygote, write_config, tmp_path):
    # It is stopped long before its end: nobody is too late to tell it.
    settings = {"training": {"epochs": 1000}, "evaluation": {"every_steps": 2}}
    running = zygote.start("train", "--config", write_config(**settings))
    running.until("evaluating: ")
    running.send(10)
    ended = running.wait()
    assert ended.status == 138, ended.said
    assert re.search(r"^SIGUSR1 received: stopping after this (evaluation|step)$", ended.said, re.M), ended.said
