"""Write docs/diagnosis.md from the findings of a run; with `--check` say whether it is current."""

from __future__ import annotations

import sys
from pathlib import Path

from write_findings_page import HEAD as TABLE
from written_page import write_or_check

from dpo_cli.evaluation.findings.finding import RunCheck
from dpo_cli.evaluation.findings.watch import RUN_CHECKS, gravest

PAGE = Path(__file__).parent.parent / "docs" / "diagnosis.md"

HEAD = """\
# The diagnosis of a run

While a run trains, its figures are compared with what a healthy run shows. A finding is a warning with the step, the
evidence in figures, and the first thing to try, settings with their present values:

    warning: step 64: both responses become less likely (chosen -1.23 nats per token, rejected -1.90). Try: lower
    `training.learning_rate` (0.0001; usual: about 1e-6)

Each is reported once, at the first step that shows it, and again in a line at the end of the run, where
`found    nothing` says that there is none. The exit status stays 0, and training goes on: you decide whether it should.

Set `evaluation.every_steps`: by default there is one evaluation, at the end, and many findings need several.

- Findings come from the run's folder alone: `metrics.jsonl`, `held_out.jsonl`, `samples.jsonl`, and `facts.json`
  with a few settings and sizes. So the [report](report.md) lists the same findings as the run did, and a resumed run
  does not repeat those that were reported before its checkpoint.
- A *window* is as many steps as have 64 pairs, at least 4: a single step varies too much. Of 64 pairs a share is known
  to ±12 points, and a mean to an eighth of the spread of its values. Each window is looked at once, at its end; a run
  shorter than that only where it is evaluated.
- Nats per token say how much likelier or less likely a response became. At evaluations they are those of the held-out
  pairs; between them they come from rewards (reward / β / tokens), if the reference is the policy before step 1.
- A finding that says nothing under a loss is left out: `stuck_at_ln2` for losses that do not begin there,
  `chosen_falls` and `both_fall` for `apo_down`, which lowers chosen responses on purpose, `easy_pairs` for `sft`, which
  makes no use of rejected ones.

| severity | means |
|---|---|
| error | the model gets worse than it was |
| warning | the run is likely to be wasted, or to teach something else than it should |
| info | worth knowing |

"""


def section(check: RunCheck) -> str:
    """Return what the page says of a finding."""
    remedies = "; ".join(remedy.text for remedy in check.remedies)
    return (
        f"## {check.name}\n\n"
        f"{_sentence(check.title)} ({check.severity})\n\n"
        f"- **Why:** {check.meaning}\n"
        f"- **What to do:** {_sentence(remedies)}\n"
        f"- **Found when:** {_sentence(check.when)}\n"
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def page() -> str:
    """Return the page: a table of all findings, the gravest first, and a section for each."""
    checks = sorted(RUN_CHECKS, key=gravest)
    table = "".join(f"| [{check.name}](#{check.name}) | {check.severity} | {check.title} |\n" for check in checks)
    head = HEAD + TABLE.replace("when", "what is seen") + table
    return head + "\n" + "\n".join(map(section, checks)) + "\nThis page is written by `make generated`.\n"


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
