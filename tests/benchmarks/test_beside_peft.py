"""FinLoRA beside plain PEFT: both sides compute the same in this process, and rows, commands and table are as documented."""

from __future__ import annotations

import json
import math
import sys
import threading
from argparse import Namespace

import beside_peft
import plain_peft
import pytest
import torch
from beside_inputs import Row, make_job, read_plain
from beside_table import is_within, render_rows
from safetensors.torch import load_file
from timed_command import CommandError, StoppedByLimitError, run_command
from train_throughput import PlainEngine

from finlora.config import OptimConfig
from finlora.engine.request import ADAPTER, normalise_choices
from finlora.errors import ConfigError
from finlora.inference.batch import BatchEngine
from finlora.inference.open_base import open_engine
from finlora.model.base import load_base
from finlora.model.base_files import read_base_files
from finlora.model.lora import attach_lora, save_adapter, trainable_parameters
from finlora.model.quantised import layer_to_tensors
from finlora.optim.optimizer import learning_rate_at, make_optimizer
from finlora.train.path import make_sampler
from finlora.train.run.run_folder import load_training_set
from finlora.train.steps.batches import PaddedBatches
from finlora.train.steps.loop import AnswerLoss, run_steps

CPU = torch.device("cpu")
EXACT = ("model.compute_dtype=float32", "train.precision=fp32", "lora.dropout=0")


@pytest.fixture(autouse=True)
def without_deepspeed(monkeypatch):
    """Hide DeepSpeed, as the script does: accelerate would import it for seconds."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)


@pytest.fixture
def prepare(tiny_base, prepared_synthetic, tmp_path):
    """Write the inputs of a row on the tiny base."""

    def write(*settings, tasks="synthetic_sentiment", variant="16bit-r4"):
        yaml = tmp_path / "row.yaml"
        yaml.write_text(f"data:\n  tasks: [{tasks}]\neval:\n  bits: null\n")
        options = Namespace(base=tiny_base, data=prepared_synthetic, device="cpu", settings=list(settings))
        return make_job(Row(task="fpb", variant=variant, seed=3), options, yaml, tmp_path / "row", 1.0)

    return write


def read_inputs(job):
    return json.loads((job.plain / "inputs.json").read_text())


def test_trainings_of_both_sides_give_the_same_adapter(prepare):
    """Order, schedule, clipping, weight decay, loss and the adapter's start: in float32 without dropout nothing else differs."""
    # 22 examples: two batches of 8 and one of 6 an epoch, cut into micro-batches of 2; the last epoch is cut short.
    job = prepare(
        *(*EXACT, "data.max_train_examples=22", "train.global_batch_size=8", "train.epochs=3", "train.max_steps=8"),
        *("train.max_pack_tokens=200", "optim.learning_rate=5e-3", "optim.warmup_ratio=0.3"),
        *("optim.weight_decay=0.1", "optim.max_grad_norm=0.05"),
    )
    settings = read_inputs(job)["training"]
    assert (settings["micro_batch"], settings["accumulation"], settings["num_warm_up"]) == (2, 4, 3)
    config = job.config
    base = load_base(config.model, 16, CPU, 0)
    model = attach_lora(base.model, config.lora, config.model.base, config.seed).train()
    training_set = load_training_set(config)
    optimizer = make_optimizer(list(trainable_parameters(model).values()), config.optim, 8)
    run_steps(
        PlainEngine(AnswerLoss(model), optimizer, CPU, config.optim.max_grad_norm, False),
        training_set.encoded,
        make_sampler(config, training_set.encoded),
        config.optim,
        worker=0,
        start_step=0,
        total_steps=8,
        batches=PaddedBatches(micro_batch_size=8, pad_token_id=0),
        device=CPU,
        log_every_steps=8,
        reduce_sum=lambda values: values,
        on_log=lambda _progress: None,
        on_step_end=lambda _step: False,
    )
    plain_peft.train(job.plain)
    found = load_file(str(job.plain / "adapter" / "adapter_model.safetensors"))
    expected = {name.replace(".default", ""): value for name, value in trainable_parameters(model).items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 1e-3  # B starts at 0
        assert torch.allclose(found[name], value, atol=1e-5), name
    assert (job.plain / "first-step").stat().st_size
    assert json.loads((job.plain / "training.json").read_text())["peak_gib"] > 0


@pytest.fixture
def scored(prepare):
    """Answers of both sides with one adapter: the plain side's file, and those of FinLoRA's engine."""

    def answer(tasks):
        job = prepare(*EXACT, "data.max_test_examples=12", "eval.batch_size=5", "eval.max_new_tokens=6", tasks=tasks)
        config = job.config
        model = attach_lora(load_base(config.model, 16, CPU, 0).model, config.lora, config.model.base, 1)
        torch.manual_seed(4)
        for parameter in trainable_parameters(model).values():
            parameter.data = torch.randn_like(parameter)
        save_adapter(model, job.plain / "adapter")
        plain_peft.evaluate(job.plain)
        questions = read_inputs(job)["questions"][tasks]
        prompts, choices = ([question[key] for question in questions] for key in ("prompt", "choices"))
        (work,) = job.works
        with open_engine(config, read_base_files(config.model), None, 1, sum(work.sizes), max(work.sizes)) as opened:
            opened.core.load_adapter(ADAPTER, job.plain / "adapter")
            engine = BatchEngine(opened.core, ADAPTER)
            if choices[0]:
                ours = engine.score_choices(prompts, choices, lambda _done: None)
            else:
                ours = engine.generate(prompts, config.eval.max_new_tokens, lambda _done: None)
        return job, json.loads((job.plain / "answers.json").read_text())["tasks"][tasks], ours

    return answer


def test_label_scores_of_both_sides_are_equal(scored):
    job, plain, ours = scored("synthetic_sentiment")
    assert len(plain["log_probs"]) == len(ours) == len(job.works[0].examples) == 12
    for found, expected in zip(plain["log_probs"], ours, strict=True):
        assert normalise_choices(found) == pytest.approx(expected, abs=1e-3)
    assert len({tuple(row) for row in ours}) == 12  # every question has scores of its own


def test_texts_of_both_sides_are_equal(scored):
    _, plain, ours = scored("synthetic_xbrl")
    assert plain["texts"] == ours
    assert len(set(ours)) > 1


def test_plain_answers_are_judged_as_finloras(prepare):
    job = prepare("data.max_test_examples=8")
    (work,) = job.works
    rows = [[float(choice == example.answer) for choice in example.choices] for example in work.examples]
    rows[0] = [-value for value in rows[0]]  # one of eight is wrong
    answers = {"tasks": {work.task: {"log_probs": rows, "seconds": 2.0}}, "peak_gib": 0.5}
    (job.plain / "answers.json").write_text(json.dumps(answers))
    (job.plain / "training.json").write_text(json.dumps({"losses": [2.0, 1.0], "peak_gib": 0.75}))
    found = read_plain(job)
    assert found["scores"][work.task]["accuracy"] == 7 / 8
    assert (found["train_peak_gib"], found["loss_last"], found["scoring_s"]) == (0.75, 1.0, 2.0)


@pytest.mark.parametrize("bits", [8, 4])
def test_bases_of_both_sides_are_quantised_alike(bits, prepare):
    job = prepare(*EXACT, variant=f"{bits}bit-r4")
    ours = load_base(job.config.model, bits, CPU, 0).model
    plain = plain_peft.load_base(read_inputs(job), bits)
    assert type(plain.lm_head) is torch.nn.Linear
    layers = [name for name, module in ours.named_modules() if ".layers." in name and hasattr(module, "in_features")]
    assert len(layers) == 14
    for name in layers:
        found, expected = (layer_to_tensors(net.get_submodule(name)) for net in (plain, ours))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


@pytest.mark.parametrize(("total", "ratio"), [(100, 0.03), (10, 0.25), (7, 0.0)])
def test_rates_of_both_sides_are_equal(total, ratio):
    optim = OptimConfig(learning_rate=2.0, warmup_ratio=ratio)
    num_warm_up = math.ceil(ratio * total)
    shares = [plain_peft.share_of_rate(step, num_warm_up, total) for step in range(total)]
    assert [2 * share for share in shares] == pytest.approx(
        [learning_rate_at(step, total, optim) for step in range(total)]
    )


def test_plain_side_refuses_what_it_does_not_have(prepare):
    with pytest.raises(ConfigError, match=r"optim\.schedule=cosine: expected linear, as plain_peft\.py has"):
        prepare("optim.schedule=cosine")


def side(accuracy, seconds=10.0, low=None, high=None):
    score = {"accuracy": accuracy, "low": low or accuracy - 0.02, "high": high or accuracy + 0.02, "num_examples": 1212}
    keys = ("start_up_s", "training_s", "train_wall_s", "evaluate_wall_s", "scoring_s", "wall_s")
    return {"scores": {"fpb": score}, "train_peak_gib": 1.25, **dict.fromkeys(keys, seconds)}


def record(finlora, plain, variant="4bit-r4", settings=()):
    identity = {"task": "fpb", "variant": variant, "seed": 0, "settings": list(settings), "device": "cpu"}
    return identity | {"at_once": 2, "ray": "own", "finlora": finlora, "plain": plain}


def test_table_says_which_accuracy_lies_outside():
    rows = [
        record(side(0.82), side(0.81, 20.0)),
        record(side(0.84), side(0.81, 40.0, high=0.85), "8bit-r8"),
        record({"error": "exit 5: no room"}, side(0.8), "16bit-r8"),
    ]
    text = render_rows(rows)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| fpb")]
    assert [line[6] for line in lines] == ["yes", "yes", "yes", "NO"]
    assert lines[1][1:9] == ["4bit-r4", "0", "PEFT", "1,212", "81.0 (79.0-83.0)", "yes", "20.0", "20.0"]
    assert "3 of 4 accuracies lie in the other side's 95 % interval." in text
    outside = "- OUTSIDE: fpb 8bit-r8 seed 0: PEFT's 81.0 (79.0-85.0) is not in FinLoRA's 84.0 (82.0-86.0)"
    assert [line for line in text.splitlines() if "OUTSIDE" in line] == [outside]
    assert "Both processes, whole: PEFT takes 3.00 times as long as FinLoRA (2.00 to 4.00)." in text
    assert "- not measured: fpb 16bit-r8 seed 0, FinLoRA: exit 5: no room" in text


def test_rows_are_in_the_order_of_the_tasks_and_changed_settings_are_named():
    rows = [record(side(0.8), side(0.8), "16bit-r8"), record(side(0.8), side(0.8), settings=["train.max_steps=8"])]
    for own in ("finlora", "plain"):
        rows[0][own]["scores"]["second"] = rows[0][own]["scores"]["fpb"] | {"accuracy": 0.5}
    text = render_rows(rows)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[4:] if line[:1] == "|"]
    first = ["fpb [1]", "4bit-r4"]
    assert [line[:2] for line in lines] == [
        first,
        first,
        *[[name, "16bit-r8"] for name in ("fpb", "fpb", "second", "second")],
    ]
    assert [line[7] for line in lines] == ["10.0"] * 4 + [""] * 2  # one adapter's times are shown once
    assert "[1] with train.max_steps=8" in text.splitlines()


def test_bounds_belong_to_an_interval():
    score = {"low": 0.25, "high": 0.75}
    assert [is_within(value, score) for value in (0.25, 0.75, 0.249, 0.751)] == [True, True, False, False]


@pytest.fixture
def run_main(tiny_base, prepared_fpb, tmp_path, monkeypatch, capsys):
    """Run the script on FPB with invented sides; returns exit code, output and the sides that were measured."""

    def run(answer, *options):
        measured = []

        def measure(side, job, _environment, stop):
            measured.append((side, job.config.model.bits, job.config.train.max_steps))
            return answer(side, stop)

        monkeypatch.setattr(beside_peft, "measure_side", measure)
        arguments = ["x", "--output", str(tmp_path / "out"), "--base", str(tiny_base), "--data", str(prepared_fpb)]
        arguments += ["--device", "cpu", "--tasks", "fpb", "--variants", "4bit-r4", "8bit-r8", *options]
        monkeypatch.setattr("sys.argv", [*arguments, "--set", "model.template=raw", "train.max_steps=2"])
        for name in ("PYTHONPATH", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
            monkeypatch.setenv(name, "1")  # main sets them; monkeypatch restores them
        return beside_peft.main(), capsys.readouterr().out, measured

    return run


def test_finished_rows_are_skipped_and_failed_ones_run_again(run_main, tmp_path):
    answers = iter([side(0.8), side(0.8), side(0.7), {"error": "exit 1: x"}])
    code, text, measured = run_main(lambda _side, _stop: next(answers))
    assert (code, [name for name, *_ in measured]) == (1, ["finlora", "plain"] * 2)
    assert "FAILED   fpb-8bit-r8-seed0: finlora 70.0 % in 10 s; plain exit 1: x" in text
    assert [path.name for path in (tmp_path / "out" / "work").iterdir()] == ["fpb-8bit-r8-seed0"]  # to look at
    code, text, measured = run_main(lambda _side, _stop: side(0.7))
    assert (code, measured) == (0, [("finlora", 8, 2), ("plain", 8, 2)])
    assert "4 of 4 accuracies" in text
    code, text, measured = run_main(lambda _side, _stop: side(0.7), "--table")
    assert (code, measured) == (0, [])
    assert "4 of 4 accuracies" in text


def test_sides_of_a_row_run_at_the_same_time(run_main):
    both = threading.Barrier(2, timeout=20)  # breaks where one waits for the other's end

    def answer(_side, _stop):
        both.wait()
        return side(0.8)

    assert run_main(answer, "--at-once", "2")[0] == 0


def test_time_limit_leaves_rows_for_the_next_call(run_main):
    def answer(_side, stop):
        assert stop.wait(20)
        raise StoppedByLimitError

    code, text, measured = run_main(answer, "--minutes", "0.26")
    assert (code, measured) == (2, [("finlora", 4, 2), ("plain", 4, 2)])  # of one row; the second sees the stop at once
    assert "stopped  fpb-4bit-r4-seed0" in text
    assert "2 of 2 rows left, 0 failed." in text


def test_shares_of_gpus_are_equal(monkeypatch):
    assert [beside_peft.share_of_gpu(*pair) for pair in ((1, 1), (12, 1), (16, 2), (1, 2))] == [1.0, 0.0833, 0.125, 1.0]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [beside_peft.choose_gpu(slot, 2) for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert beside_peft.choose_gpu(1, 2) == "7"


def run_python(text, tmp_path, stop=None, first_step=None):
    return run_command(
        [sys.executable, "-c", text], tmp_path / "log", tmp_path, {}, stop or threading.Event(), first_step
    )


def test_first_step_is_the_first_write_that_holds_something(tmp_path):
    mark = tmp_path / "step"
    text = (
        "import os, pathlib, time\n"
        "mark = pathlib.Path('step')\n"
        "mark.write_text('')\n"
        "os.utime(mark, (10, 10))\n"
        "time.sleep(0.2)\n"
        "pathlib.Path('new').write_text('1 9')\n"
        "os.utime('new', (20, 20))\n"
        "pathlib.Path('new').replace(mark)\n"
        "time.sleep(0.5)\n"
        "mark.write_text('9 9')\n"
    )
    timing = run_python(text, tmp_path, first_step=mark)
    assert timing.first_step == 20
    assert timing.wall > 0.7
    assert run_python("", tmp_path).first_step is None


def test_failed_command_is_named_by_its_last_line(tmp_path):
    with pytest.raises(CommandError, match=r"exit 3: the reason \(.*/log\)"):
        run_python("import sys; print('the reason'); sys.exit(3)", tmp_path)


def test_stopped_command_ends_with_its_children(tmp_path):
    stop = threading.Event()
    text = (
        "import subprocess, sys, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pathlib.Path('child').write_text(str(child.pid))\n"
        "child.wait()\n"
    )
    written = tmp_path / "child"

    def wait_for_child():
        while not (written.is_file() and written.read_text()):
            if stop.wait(0.02):
                return
        stop.set()

    threading.Thread(target=wait_for_child, daemon=True).start()
    with pytest.raises(StoppedByLimitError):
        run_python(text, tmp_path, stop)
    stat = f"/proc/{written.read_text()}/stat"
    for _ in range(200):
        try:
            with open(stat) as stream:  # noqa: PTH123
                state = stream.read().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        threading.Event().wait(0.05)
    pytest.fail("the child lives on")
