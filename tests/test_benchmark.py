"""What the benchmark claims: the arithmetic, the clock, the comparison of losses, the ratio run by run."""

from __future__ import annotations

import datetime
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from benchmark import __main__ as benchmark
from benchmark import speed
from benchmark.report import Case, Disagreement, Machine, Results, Run, check_losses, joined, page, plot, write_report
from benchmark.runs import OUR_CLOCK, THEIR_CLOCK, RunFailed, as_run, environment_of, run_process
from benchmark.speed import Gauge, GaugeFailed, Pause
from benchmark.work import LONG_TOKENS, Lengths, NotCounted, adapter_arithmetic, arithmetic, long_rows

from tests.conftest import ROOT
from tests.waiting import PATIENCE

pytestmark = [pytest.mark.program, pytest.mark.slow]


def make_run(seconds=10.0, losses=(0.6931, 0.6), peak=2e9, gflops=(90.0, 100.0)) -> Run:
    return Run(
        training_seconds=seconds,
        command_seconds=seconds + 5,
        peak_bytes=int(peak),
        losses=list(losses),
        gflops_meanwhile=list(gflops),
    )


def make_case(ours, theirs, epochs=1, forward_flops: float | None = 1e12) -> Case:
    tokens = {"prompt_tokens": 400, "chosen_tokens": 100, "rejected_tokens": 300}
    work = {"workload": "short", "source": "pairs.jsonl", "epochs": epochs, "pairs": 10, "pairs_per_step": 5}
    return Case(**work, **tokens, forward_flops=forward_flops, ours=ours, theirs=theirs)


def make_results(*cases: Case, not_counted=None) -> Results:
    return Results(
        date=datetime.date(2026, 1, 2),
        model="a-model",
        machine=Machine(cpu="a processor", cpus=4, threads=2, memory_gb=16.0),
        versions={"dpo": "1", "trl": "2", "torch": "3", "transformers": "4"},
        not_counted=not_counted,
        cases=list(cases),
    )


@pytest.fixture(scope="module")
def on_meta():
    import torch
    import transformers

    def build(name, **settings):
        config = getattr(transformers, f"{name}Config")(**settings)
        with torch.device("meta"):
            return getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(config)

    return build


def test_the_arithmetic_of_a_llama_is_that_counted_by_hand(on_meta):
    """Two layers of width 8 with 2 heads of 4 that share one key and value head, an MLP of 16, 10 tokens known.

    Weights of a layer: q 8·8, k and v 8·4 each, o 8·8, three of 8·16: 64 + 32 + 32 + 64 + 384 = 576.
    A token: 2·2·576 = 2304. A query and a key: 4·(2·4)·2 layers = 64. A response token: 2·10·8 = 160.

    A pair of 2 + 1 + 2 tokens has 5 shared tokens, 3 response tokens, and attends to
    prompt 1 + 2 = 3; chosen 3; rejected 3 + 4 = 7: 13 in all. 5·2304 + 13·64 + 3·160 = 12832.
    """
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    model = on_meta("Llama", vocab_size=10, **shape, **heads)
    assert arithmetic(model).forward(Lengths(prompt=2, chosen=1, rejected=2)) == 12832


def test_the_arithmetic_of_a_gpt2_is_that_counted_by_hand(on_meta):
    """One layer of width 8, whose linear layers are `Conv1D` and whose head is the embedding.

    Weights: 8·24 + 8·8 + 2·8·32 = 768; a token 1536; a query and a key 4·8 = 32; a response token 2·10·8 = 160.
    1 + 1 + 1 tokens attend to 1 + 2 + 2: 3·1536 + 5·32 + 2·160 = 5088.
    """
    model = on_meta("GPT2", vocab_size=10, n_embd=8, n_head=2, n_layer=1, n_positions=16)
    assert arithmetic(model).forward(Lengths(prompt=1, chosen=1, rejected=1)) == 5088


def test_what_cannot_be_counted_is_not_guessed(on_meta):
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(NotCounted, match="neither a linear layer nor an embedding"):
        arithmetic(on_meta("Mixtral", vocab_size=10, num_key_value_heads=1, num_local_experts=2, **shape))
    case = make_case([make_run()], [make_run()], forward_flops=None)
    text = page(make_results(case, not_counted="`a.b` is strange"))
    assert "is not counted: `a.b` is strange" in text
    assert "%" not in text


@pytest.mark.parametrize(("epochs", "passes"), [(1, 4), (3, 10)])
def test_the_reference_is_computed_once_and_every_epoch_costs_three_passes(epochs, passes):
    assert make_case([make_run()], [make_run()], epochs).necessary_flops == passes * 1e12


def test_an_adapter_adds_its_matrices_and_spares_the_gradients_of_the_base(on_meta):
    """Two layers of width 8 with 2 heads of 4 that share one key and value head, an MLP of 16; rank 3.

    Rows and columns of a layer's matrices: q and o 16 each, k and v 12 each, three of 24: 128. A token: 2·3·128·2
    layers = 1536, beside none for attention and none for the vocabulary. A pair of 2 + 1 + 2 tokens: 7680.

    Of 1000 operations and 10 of the adapter a reference pass takes 1000; a step 2000 and 30.
    """
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    model = on_meta("Llama", vocab_size=10, **shape, **heads)
    assert adapter_arithmetic(model, 3).forward(Lengths(prompt=2, chosen=1, rejected=2)) == 7680
    assert adapter_arithmetic(model, 0).forward(Lengths(prompt=2, chosen=1, rejected=2)) == 0
    case = make_case([make_run()], [make_run()], epochs=3, forward_flops=1000)
    adapted = case.model_copy(update={"adapter": "LoRA of rank 3", "adapter_flops": 10.0})
    assert adapted.necessary_flops == 1000 + 3 * 2030


def test_the_page_names_the_adapter_in_both_tables_and_keeps_it_apart_from_all_weights(tmp_path):
    pytest.importorskip("matplotlib")
    whole = make_case([make_run()], [make_run(30)])
    adapted = make_case([make_run(5)], [make_run(25)]).model_copy(update={"adapter": "LoRA of rank 16"})
    results = joined([make_results(whole), make_results(adapted)])
    assert len(results.cases) == 2
    text = page(results)
    assert "| short, LoRA of rank 16, 1 epoch | dpo | 2.00 | **5.00×** |" in text
    assert "| short, LoRA of rank 16, 1 epoch (pairs.jsonl) |" in text
    assert "| short, 1 epoch | dpo | 1.00 | **3.00×** |" in text
    assert "begin with the same adapter weights" in text
    assert "LoRA" not in page(make_results(whole))
    write_report(results, tmp_path)
    assert Results.model_validate_json((tmp_path / "results.json").read_text()) == results


def test_the_share_is_of_the_mean_speed_while_the_run_was_held():
    """4·10¹² operations in 80 s are 50 GFLOP/s, half of 100; in 160 s 25, half of what the machine does then."""
    ours, theirs = make_run(80, gflops=(80.0, 90.0, 130.0)), make_run(160, gflops=(50.0,))
    text = page(make_results(make_case([ours], [theirs])))
    assert "| 50.0 % | 85 s |" in text
    assert "| 50.0 % | 165 s |" in text
    assert "(50 – 130 GFLOP/s)" in text
    too_short = make_run(8, gflops=())
    assert "| – | 13 s |" in page(make_results(make_case([too_short], [theirs])))


def test_the_ratio_is_that_of_each_run_with_its_partner():
    """20/10, 60/20 and 50/10: the median is 3, while that of times alone would be 5."""
    case = make_case([make_run(s) for s in (10, 20, 10)], [make_run(s) for s in (20, 60, 50)])
    assert case.ratios == [2, 3, 5]
    text = page(make_results(case))
    assert "**3.00× (2.00× – 5.00×)**" in text
    assert "| 1.00 (0.50 – 1.00) |" in text
    assert "| 2.0 GB |" in text


def test_losses_that_differ_are_refused(tmp_path):
    good = make_run(losses=[0.6931, 0.6])
    assert check_losses(good, make_run(losses=[0.6931, 0.6001]), "a run") == pytest.approx(1e-4)
    for losses in ([0.6931, 0.6003], [0.6931, math.nan], [0.6931], []):
        with pytest.raises(Disagreement, match="short, 1 epoch, run 1"):
            write_report(make_results(make_case([good], [make_run(losses=losses)])), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_clock_runs_from_the_reference_pass_to_the_last_step():
    lines = [
        (1.0, "loading …"),
        (3.0, "reference log-probabilities: 64 pairs"),
        (5.0, "reference log-probabilities: 64/64 in 0:02"),
        (6.0, "checked: policy and reference are equal"),
        (7.0, "step 1/12  epoch 0.12  loss 0.6931"),
        (9.5, "step 12/12  epoch 1.00  loss 0.6000"),
        (11.0, "done in 0:04"),
    ]
    assert OUR_CLOCK.seconds(lines) == 6.5
    for missing in (1, 5):
        with pytest.raises(RunFailed, match="began" if missing == 1 else "ended"):
            OUR_CLOCK.seconds(lines[:missing] + lines[missing + 1 :])


def test_pauses_are_no_time_of_training():
    lines = [(2.0, "benchmark: training begins"), (9.0, "benchmark: training ended")]
    pauses = [Pause(0.5, 1.5, 1.0), Pause(1.5, 2.5, 1.0), Pause(4.0, 5.0, 1.0), Pause(8.5, 9.75, 1.0)]
    assert THEIR_CLOCK.seconds(lines, pauses) == 7.0 - 0.5 - 1.0 - 0.5


TICKING = """
import sys, time
def tell(what):
    print(what, file=sys.stderr, flush=True)
def tick(seconds):
    last = begun = time.monotonic()
    while last < begun + seconds:
        now = time.monotonic()
        if now - last > 0.2:
            print(last, now)
        last = now
tick(0.6)
tell("benchmark: training begins")
tick(4)
tell("benchmark: training ended")
tick(0.6)
"""


def test_a_run_is_held_while_the_machine_is_measured_and_only_while_it_trains(monkeypatch):
    def measure():
        time.sleep(0.3)
        return 7.0

    monkeypatch.setattr(speed, "SECONDS_BETWEEN", 0.2)
    started = time.monotonic()
    ended = run_process([sys.executable, "-c", TICKING], dict(os.environ), (THEIR_CLOCK, measure))
    in_all = time.monotonic() - started
    held = [tuple(map(float, line.split())) for line in ended.output.splitlines()]
    assert len(ended.pauses) >= 2
    # A busy machine holds it up as well.
    assert len(held) >= len(ended.pauses)
    for pause in ended.pauses:
        assert pause.gflops == 7.0
        assert any(began < pause.ended and pause.began < over for began, over in held)
    begun, over = (stamp for stamp, line in ended.lines if line.startswith("benchmark"))
    assert all(begun < pause.began < over for pause in ended.pauses)
    in_pauses = sum(pause.ended - pause.began for pause in ended.pauses)
    run = as_run(ended, THEIR_CLOCK, [0.5])
    assert run.gflops_meanwhile == [7.0] * len(ended.pauses)
    assert run.training_seconds == pytest.approx(over - begun - in_pauses, abs=0.1)
    assert run.training_seconds < run.command_seconds < in_all - in_pauses


def test_the_machine_is_measured_by_a_process_that_waits_to_be_asked():
    with Gauge(dict(os.environ)) as gauge:
        assert gauge() > 0
        assert gauge() > 0
        gauge._process.kill()
        with pytest.raises(GaugeFailed, match="is gone"):
            gauge()


def test_what_measures_the_machine_imports_no_more_than_it_needs():
    """It starts for every workload, and its imports would take longer than the products."""
    asked = "import sys, benchmark.products; print({'transformers', 'accelerate', 'datasets'} & sys.modules.keys())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])}
    command = [sys.executable, "-c", asked]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert ended.stdout == "set()\n"


def test_a_run_whose_machine_cannot_be_measured_is_ended_at_once(monkeypatch):
    def measure():
        raise GaugeFailed("gone")

    monkeypatch.setattr(speed, "SECONDS_BETWEEN", 0.2)
    started = time.monotonic()
    long = TICKING.replace("tick(4)", f"tick({10 * PATIENCE})")
    with pytest.raises(GaugeFailed, match="gone"):
        run_process([sys.executable, "-c", long], dict(os.environ), (THEIR_CLOCK, measure))
    assert time.monotonic() - started < PATIENCE


def test_a_benchmark_that_is_told_to_end_leaves_no_run_behind(tmp_path):
    """It is told in a pause, when the run is held and would never end by itself."""
    told = f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    held = told + TICKING.replace("tick(4)", "tick(60)")
    program = f"""
import os, signal, sys, time
from benchmark import speed
from benchmark.runs import THEIR_CLOCK, end_when_told, run_process
def measure():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    return 1.0
end_when_told()
speed.SECONDS_BETWEEN = 0.2
run_process([sys.executable, "-c", {held!r}], dict(os.environ), (THEIR_CLOCK, measure))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, check=False, timeout=PATIENCE)
    assert ended.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_results_measured_before_and_after_runs_are_refused():
    """Those of old had two speeds around a run, under another name; the page would say something else of them."""
    old = (
        make_results(make_case([make_run()], [make_run(30)]))
        .model_dump_json()
        .replace("gflops_meanwhile", "matmul_gflops")
    )
    with pytest.raises(ValueError, match="gflops_meanwhile"):
        Results.model_validate_json(old)


def test_the_program_is_named_by_its_commit():
    assert re.fullmatch(r"\d+\.\d+\.\d+( \([0-9a-f]{7,}(, changed)?\))?", benchmark.versions()["dpo"])


def test_the_clock_of_the_peer_is_read_from_its_own_marks():
    lines = [(1.0, "loading"), (2.0, "benchmark: training begins"), (9.0, "benchmark: training ended"), (9.5, "")]
    assert THEIR_CLOCK.seconds(lines) == 7.0


def test_peak_memory_is_that_of_the_very_process():
    # A process counts what its starter held, so the starter must be smaller than pytest with torch.
    program = """
import os, sys
from benchmark.runs import run_process
for text in ("b'x' * 300_000_000", "b'x'"):
    ended = run_process([sys.executable, "-c", f"print(len({text}))"], dict(os.environ))
    print(ended.peak_bytes, ended.output.strip())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    printed = run_process([sys.executable, "-c", program], environment).output.split()
    large, small = int(printed[0]), int(printed[2])
    assert printed[1::2] == ["300000000", "1"]
    assert large > 300e6
    assert small < 150e6


def test_a_process_that_fails_shows_what_it_said_last():
    with pytest.raises(RunFailed, match=r"status 3\n  line 10\n(.*\n)+  line 29"):
        run_process(
            [sys.executable, "-c", "import sys; [print('line', i, file=sys.stderr) for i in range(30)]; sys.exit(3)"],
            dict(os.environ),
        )


def test_long_rows_are_as_long_as_meant_and_the_same_every_time(demo_rows):
    def count(text):
        return len(text.split())

    made = list(itertools.islice(long_rows(demo_rows, count), 16))
    assert made == list(itertools.islice(long_rows(demo_rows, count), 16))
    assert len({row["instruction"] for row in made}) == 16
    for row in made:
        for field, tokens in LONG_TOKENS.items():
            assert tokens - 45 < count(row[field]) <= tokens


def test_page_and_plot_can_be_made_again_from_the_raw_figures(tmp_path):
    pytest.importorskip("matplotlib")
    results = make_results(make_case([make_run()], [make_run(30)]))
    write_report(results, tmp_path)
    assert Results.model_validate_json((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "README.md").read_text() == page(results)
    plot(results, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "benchmark.png").read_bytes()


def test_what_was_run_in_parts_stands_on_one_page():
    one = make_results(make_case([make_run(10), make_run(11)], [make_run(30), make_run(31)]))
    again = make_results(make_case([make_run(12)], [make_run(32)]))
    longer = make_results(make_case([make_run(20)], [make_run(80)], epochs=3))
    all_of_it = joined([one, again, longer])
    assert [[run.training_seconds for run in case.theirs] for case in all_of_it.cases] == [[30, 31, 32], [80]]
    text = page(all_of_it)
    assert text.count("| short, 1 epoch | dpo |") == text.count("| short, 3 epochs | dpo |") == 1
    assert "1 to 3 times each" in text


def test_what_cannot_stand_on_one_page_is_refused():
    one = make_results(make_case([make_run()], [make_run(30)]))
    with pytest.raises(Disagreement, match="the same run of short pairs"):
        joined([one, one])
    elsewhere = one.model_copy(update={"machine": Machine(cpu="another", cpus=1, threads=1, memory_gb=1.0)})
    with pytest.raises(Disagreement, match=r"machine: .*a processor.* here, .*another.* there"):
        joined([one, elsewhere])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"cases": []}', None])
def test_what_holds_no_results_ends_in_one_error(content, tmp_path, capsys, monkeypatch):
    file = tmp_path / "results.json"
    file.write_bytes(content) if content is not None else file.mkdir()
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--from", str(file), "--out", str(tmp_path / "out")])
    pytest.importorskip("matplotlib")
    assert benchmark.main() == 1
    assert f"error: `{file}` holds no results of the benchmark" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_of_a_gpu_name_the_card_and_what_its_memory_and_speed_are():
    """A margin of bfloat16 moves by more than float32's tolerance: 0.004 here, which is no disagreement."""
    card = Machine(cpu="a processor", cpus=4, threads=2, memory_gb=16.0, gpu="NVIDIA H100")
    case = make_case([make_run(losses=[0.6931, 0.604])], [make_run(losses=[0.6931, 0.6])])
    results = make_results(case.model_copy(update={"recomputed": True, "precomputed": True}))
    text = page(results.model_copy(update={"machine": card, "dtype": "bfloat16"}))
    assert "on one NVIDIA H100; a processor" in text
    assert "a-model in bfloat16" in text
    assert "the most that torch reserved of the GPU" in text
    assert "bfloat16 matrices of 8192 × 8192" in text
    assert "| short, recomputed, reference precomputed, 1 epoch |" in text
    with pytest.raises(Disagreement):
        page(results)


def test_a_process_that_computes_on_a_gpu_sees_it_and_one_on_a_cpu_does_not(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert environment_of(None)["CUDA_VISIBLE_DEVICES"] == ""
    on_gpu = environment_of(None, "cuda")
    assert not {"CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"} & on_gpu.keys()


def test_raw_figures_alone_are_read_again_as_they_were(tmp_path):
    results = make_results(make_case([make_run()], [make_run()]))
    write_report(results, tmp_path, raw_only=True)
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert benchmark.read_results([tmp_path / "results.json"]) == results


@pytest.mark.parametrize("options", [(), ("--adapter", "lora", "--recomputed", "--precomputed")])
def test_both_sides_train_a_model_of_random_weights(tmp_path, options):
    command = [sys.executable, "-m", "benchmark", "--shape", "tiny", "--workloads", "short", "--short-pairs", "4"]
    command += ["--short-per-step", "2", "--repeats", "1", "--epochs", "1", "--raw-only", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    ended = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert ended.returncode == 0, ended.stderr
    (case,) = benchmark.read_results([tmp_path / "results.json"]).cases
    assert (case.recomputed, case.precomputed, case.adapter is None) == (bool(options), bool(options), not options)
    assert len(case.ours[0].losses) == len(case.theirs[0].losses) == 2
