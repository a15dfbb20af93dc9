"""The loop against plain transformers and PEFT: the same loss and the same gradients, for any split of the batch."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from finlora.config import LoraConfig, ModelConfig, OptimConfig
from finlora.data.encode import Encoded, collate
from finlora.errors import FinloraError
from finlora.model.base import load_base
from finlora.model.lora import attach_lora, trainable_parameters
from finlora.model.memory.peak import measure_peak_gib
from finlora.optim.optimizer import learning_rate_at, make_optimizer
from finlora.train.steps.batches import PaddedBatches
from finlora.train.steps.loop import AnswerLoss, count_steps, run_steps
from finlora.train.steps.sampler import Sampler

CPU = torch.device("cpu")
PAD = 2
# Prompts and answers of different lengths, so that padding and the number of answer tokens matter.
EXAMPLES = [Encoded(tuple(range(3, 3 + 5 + 3 * number)), tuple(range(200, 202 + number % 4))) for number in range(11)]


class PlainEngine:
    """Engine for run_steps in plain torch; keeps the gradients of each step."""

    def __init__(self, module, optimizer, is_frozen=False):
        self.module, self.optimizer, self.is_frozen = module, optimizer, is_frozen
        self.gradients = []
        self.num_forwards = 0

    def __call__(self, batch):
        self.num_forwards += 1
        return self.module(batch)

    def backward(self, loss, scale_wrt_gas=True):
        assert scale_wrt_gas is False
        loss.backward()

    def step(self):
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.gradients.append([None if p.grad is None else p.grad.clone() for p in parameters])
        if not self.is_frozen:
            self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.fixture
def model(tiny_base):
    """The tiny base in float32 with an adapter whose B is not zero, without dropout."""
    net = load_base(ModelConfig(base=str(tiny_base), compute_dtype="float32"), 16, CPU, 0).model
    model = attach_lora(net, LoraConfig(rank=4, dropout=0.0), net.name_or_path, 1)
    torch.manual_seed(5)
    for parameter in trainable_parameters(model).values():
        parameter.data = torch.randn_like(parameter) * 0.1
    return model.train()


def make_sampler(world_size=1, num_examples=11, global_batch_size=4):
    return Sampler(
        lengths=[example.num_tokens for example in EXAMPLES[:num_examples]],
        global_batch_size=global_batch_size,
        world_size=world_size,
        seed=3,
    )


def run(
    engine,
    sampler,
    *,
    worker=0,
    steps=(0, 1),
    optim=None,
    examples=EXAMPLES,
    log_every_steps=1,
    reduce_sum=None,
    rows=4,
):
    records, ends = [], []
    run_steps(
        engine,
        examples,
        sampler,
        optim or OptimConfig(),
        worker=worker,
        start_step=steps[0],
        total_steps=steps[1],
        batches=PaddedBatches(micro_batch_size=rows, pad_token_id=PAD),
        device=CPU,
        log_every_steps=log_every_steps,
        reduce_sum=reduce_sum or (lambda values: values),
        on_log=records.append,
        on_step_end=ends.append,
    )
    return records, ends


def gradients_of(model, sampler, worker=0, steps=(0, 1), rows=4):
    parameters = list(trainable_parameters(model).values())
    engine = PlainEngine(AnswerLoss(model), torch.optim.SGD(parameters, lr=1.0), is_frozen=True)
    records, _ = run(engine, sampler, worker=worker, steps=steps, rows=rows)
    return engine.gradients, records


def reference(model, indices):
    """Loss and gradients of transformers' own loss on the padded batch, with the base's full logits."""
    batch = collate([EXAMPLES[index] for index in indices], PAD)
    loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    gradients = torch.autograd.grad(loss, list(trainable_parameters(model).values()))
    return float(loss.detach()), gradients


def test_loss_and_gradients_equal_transformers_on_the_padded_batch(model):
    sampler = make_sampler()
    (own,), (record,) = gradients_of(model, sampler)
    loss, gradients = reference(model, sampler.global_batch(0))
    assert record.loss == pytest.approx(loss, rel=1e-5)
    assert len(own) == len(gradients) == 12
    for mine, theirs in zip(own, gradients, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("rows", [1, 2])
def test_gradients_do_not_depend_on_the_cut_into_micro_batches(model, rows):
    (whole,), (record,) = gradients_of(model, make_sampler())
    (cut,), (other,) = gradients_of(model, make_sampler(), rows=rows)
    assert other.loss == pytest.approx(record.loss, rel=1e-6)
    for mine, theirs in zip(cut, whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("step", [0, 2])
def test_mean_gradient_of_workers_equals_one_workers(model, step):
    """Step 2 is the last of the epoch: its 3 examples split into 2 and 1."""
    (whole,), (record,) = gradients_of(model, make_sampler(), steps=(step, step + 1))
    parts = [
        gradients_of(model, make_sampler(world_size=2), worker=worker, steps=(step, step + 1), rows=1)
        for worker in range(2)
    ]
    assert sum(records[0].loss for _, records in parts) == pytest.approx(record.loss, rel=1e-6)
    for first, second, theirs in zip(parts[0][0][0], parts[1][0][0], whole, strict=True):
        torch.testing.assert_close((first + second) / 2, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_worker_without_examples_steps_without_gradients(model):
    sampler = make_sampler(world_size=2, num_examples=9)
    (own,), _ = gradients_of(model, sampler, worker=1, steps=(2, 3))
    assert own == [None] * 12


def test_training_equals_a_plain_adamw_loop(model):
    reference_model = copy.deepcopy(model)
    sampler = make_sampler()
    optim = OptimConfig(learning_rate=1e-2, warmup_ratio=0.2, weight_decay=0.1)
    parameters = trainable_parameters(model)
    run(
        PlainEngine(AnswerLoss(model), make_optimizer(list(parameters.values()), optim, 6)),
        sampler,
        steps=(0, 6),
        optim=optim,
        rows=2,
    )
    expected = trainable_parameters(reference_model)
    adamw = torch.optim.AdamW(expected.values(), lr=1e-2, weight_decay=0.1)
    for step in range(6):
        _, gradients = reference(reference_model, sampler.global_batch(step))
        for parameter, gradient in zip(expected.values(), gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(expected.values(), optim.max_grad_norm)
        adamw.param_groups[0]["lr"] = learning_rate_at(step, 6, optim)
        adamw.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            parameter, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text
        )


def test_training_equals_pefts_lora_plus(model):
    reference_model = copy.deepcopy(model)
    sampler = make_sampler()
    optim = OptimConfig(
        learning_rate=2e-3,
        lora_plus_ratio=16.0,
        warmup_ratio=0.0,
        schedule="constant",
        weight_decay=0.1,
        max_grad_norm=0.0,
    )
    parameters = trainable_parameters(model)
    run(
        PlainEngine(AnswerLoss(model), make_optimizer(parameters, optim, 6)), sampler, steps=(0, 6), optim=optim, rows=2
    )
    expected = trainable_parameters(reference_model)
    theirs = create_loraplus_optimizer(
        reference_model, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    for step in range(6):
        _, gradients = reference(reference_model, sampler.global_batch(step))
        for parameter, gradient in zip(expected.values(), gradients, strict=True):
            parameter.grad = gradient
        theirs.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            parameter, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text
        )


def test_resumed_steps_equal_uninterrupted_ones_with_dropout(tiny_base):
    def make():
        net = load_base(ModelConfig(base=str(tiny_base), compute_dtype="float32"), 16, CPU, 0).model
        model = attach_lora(net, LoraConfig(dropout=0.5), net.name_or_path, 1).train()
        parameters = trainable_parameters(model)
        return parameters, PlainEngine(AnswerLoss(model), torch.optim.SGD(parameters.values(), lr=1.0))

    whole, engine = make()
    optim = OptimConfig(schedule="constant", warmup_ratio=0.0, learning_rate=0.1)
    records, ends = run(engine, make_sampler(), steps=(0, 5), optim=optim)
    parts, engine = make()
    first, _ = run(engine, make_sampler(), steps=(0, 3), optim=optim)
    torch.manual_seed(99)  # whatever happened in between
    second, _ = run(engine, make_sampler(), steps=(3, 5), optim=optim)
    assert [record.loss for record in first + second] == [record.loss for record in records]
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert ends == [1, 2, 3, 4, 5]


def test_dropout_differs_between_workers_and_steps(tiny_base, monkeypatch):
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)

    class NoEngine(PlainEngine):
        def __call__(self, *tensors):
            return torch.zeros((), requires_grad=True)

    for worker in range(2):
        sampler = make_sampler(world_size=2)
        run(
            NoEngine(None, torch.optim.SGD([torch.zeros(1)], lr=1.0), is_frozen=True),
            sampler,
            worker=worker,
            steps=(0, 3),
        )
    assert len(set(seeds)) == 6


def test_records_average_over_their_window_and_count_real_tokens(model):
    each, _ = run(PlainEngine(AnswerLoss(model), torch.optim.SGD([torch.zeros(1)]), True), make_sampler(), steps=(0, 5))
    some, _ = run(
        PlainEngine(AnswerLoss(model), torch.optim.SGD([torch.zeros(1)]), True),
        make_sampler(),
        steps=(0, 5),
        log_every_steps=3,
    )
    assert [record.step for record in some] == [3, 5]
    assert some[0].loss == pytest.approx(sum(record.loss for record in each[:3]) / 3)
    assert some[1].loss == pytest.approx(sum(record.loss for record in each[3:]) / 2)
    assert [record.epoch for record in each] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])
    first = each[0]
    num_tokens = sum(EXAMPLES[index].num_tokens for index in make_sampler().global_batch(0))
    assert first.tokens_per_second / first.examples_per_second == pytest.approx(num_tokens / 4)
    assert [record.total_steps for record in each] == [5] * 5
    assert each[-1].seconds_left == 0


def test_sums_of_all_workers_are_asked_for_once_a_record(model):
    asked = []

    def reduce_sum(values):
        asked.append(values.clone())
        return values * 2

    engine = PlainEngine(AnswerLoss(model), torch.optim.SGD([torch.zeros(1)]), True)
    (record,), _ = run(engine, make_sampler(), reduce_sum=reduce_sum)
    assert len(asked) == 1
    assert record.loss == pytest.approx(2 * float(asked[0][0]))


def test_loss_that_is_not_finite_stops_the_run_with_a_message(model):
    parameters = list(trainable_parameters(model).values())
    parameters[0].data[:] = float("nan")
    engine = PlainEngine(AnswerLoss(model), torch.optim.SGD(parameters))
    with pytest.raises(
        FinloraError, match=r"the loss became nan within the 1 steps before step 1: lower optim.learning_rate"
    ):
        run(engine, make_sampler())


@pytest.mark.parametrize(("epochs", "max_steps", "expected"), [(4, None, 12), (4, 5, 5), (1, 50, 3)])
def test_steps_follow_epochs_unless_a_limit_comes_first(epochs, max_steps, expected):
    assert count_steps(make_sampler(), epochs, max_steps) == expected


def test_answer_loss_is_the_sum_over_answer_tokens(model):
    batch = collate(EXAMPLES[:3], PAD)
    loss, _ = reference(model, [0, 1, 2])
    num_targets = sum(len(item.answer_ids) for item in EXAMPLES[:3])
    own = AnswerLoss(model)(batch)
    assert float(own.detach()) == pytest.approx(loss * num_targets, rel=1e-5)


def test_padding_does_not_change_the_loss(model):
    batch = collate(EXAMPLES[:3], PAD)
    wider = dataclasses.replace(
        batch,
        input_ids=torch.nn.functional.pad(batch.input_ids, (0, 7), value=9),
        attention_mask=torch.nn.functional.pad(batch.attention_mask, (0, 7)),
        labels=torch.nn.functional.pad(batch.labels, (0, 7), value=-100),
    )
    with torch.no_grad():
        losses = [float(AnswerLoss(model)(b)) for b in (batch, wider)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_memory_of_this_process_is_measured_in_gib():
    assert 0.05 < measure_peak_gib(CPU) < 64


def test_example_of_weight_two_is_a_step_with_it_twice(model):
    """The loss of a step is divided by the weighted number of answer tokens."""
    steps = []
    for examples in (
        [EXAMPLES[2], dataclasses.replace(EXAMPLES[5], weight=2.0)],
        [EXAMPLES[2], EXAMPLES[5], EXAMPLES[5]],
    ):
        parameters = list(trainable_parameters(model).values())
        engine = PlainEngine(AnswerLoss(model), torch.optim.SGD(parameters, lr=0.1), is_frozen=True)
        losses = []
        run_steps(
            engine,
            examples,
            Sampler(
                lengths=[item.num_tokens for item in examples],
                global_batch_size=len(examples),
                world_size=1,
                seed=0,
            ),
            OptimConfig(),
            worker=0,
            start_step=0,
            total_steps=1,
            batches=PaddedBatches(micro_batch_size=1, pad_token_id=PAD),
            device=CPU,
            log_every_steps=1,
            reduce_sum=lambda tensor: tensor,
            on_log=lambda progress, losses=losses: losses.append(progress.loss),
            on_step_end=lambda _step: False,
        )
        steps.append((losses, engine.gradients[0]))
    (loss, grads), (twice_loss, twice_grads) = steps
    assert loss == pytest.approx(twice_loss, rel=1e-5)
    for one, two in zip(grads, twice_grads, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-7)
