"""Hidden states that stay on the GPU between processes arrive whole, and a pipeline over them says what one process says."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from test_drive import RAGGED, make_requests, run, tokens_of

from finlora.engine.drive import EngineCore
from finlora.engine.in_process import InProcess
from finlora.engine.joining import join_stages
from finlora.engine.limits import Limits
from finlora.engine.messages import Parcel
from finlora.engine.request import Request, Sampling
from finlora.engine.scheduler import Scheduler
from finlora.engine.stage import Stage
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.tokenizer import load_tokenizer

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE, END, ROWS, HIDDEN, BUSY_S = "cuda", 1, 1024, 64, 0.02
SENT = [(0, 3), (1, 500), (0, 1), (0, 900), (1, 2), (0, 900)]
"""(place, rows): rooms that are used again, outgrown, and larger than what they hold."""


def make_states(number, num_rows):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(num_rows, HIDDEN, generator=generator).bfloat16()


def start_sender(send):
    """Return a process that runs `send` with a pipe, and the pipe's end here."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=send, args=(there,))
    process.start()
    there.close()
    return process, here


def send_all(pipe):
    """Stage 1 of 3; it computes for a while, and its parcels are on their way before that is over."""
    from finlora.engine.handover import Sender, Stamps

    device = torch.device("cuda")
    sender = Sender(1, 3, HIDDEN, torch.bfloat16, device)
    for number, (place, num_rows) in enumerate(SENT):
        states = make_states(number, num_rows).to(device)
        # Stage 0 took 3 ms.
        before = Stamps(torch.tensor([[1_000, 0, 0], [3_001_000, 0, 0], [number, 0, 0]], device=device))
        torch.cuda.synchronize()
        started = time.perf_counter()
        sender.begin(place, num_rows, before)
        torch.cuda._sleep(int(BUSY_S * 2.0e9))  # cycles of a clock of 2 GHz at most
        parcel = sender.send(place, number, states)
        pipe.send((parcel, time.perf_counter() - started))
        pipe.recv()
    pipe.close()
    os._exit(0)  # what the other has mapped stays until it closes it


@pytest.mark.parametrize("_gpu", [pytest.param(None, marks=ON_GPU)])
def test_states_arrive_though_the_parcel_comes_before_them(_gpu):
    from finlora.engine.handover import Receiver

    other, here = start_sender(send_all)
    receiver = Receiver(3, HIDDEN, torch.bfloat16, torch.device("cuda"))
    make_states(0, 1).cuda() * 2  # the kernel is loaded before its time is taken
    queued = []
    for number, (_, num_rows) in enumerate(SENT):
        parcel, seconds = here.recv()
        queued.append(seconds)
        hidden, stamps = receiver.receive(parcel)
        receiver.wait(parcel)
        stamps.begin(2)
        doubled = hidden * 2
        stamps.end(2, number)
        before, own, mine = stamps.read(0, 2, number)
        assert torch.equal(doubled.cpu(), make_states(number, num_rows) * 2)
        assert before == pytest.approx(3e-3)
        assert own > 0.8 * BUSY_S
        assert 0 <= mine < BUSY_S  # the wait for the stage before does not count
        here.send(None)
    other.join(30)
    assert other.exitcode == 0
    assert min(queued) < BUSY_S / 2
    receiver.close()


def ask_all(executor, base, adapter_folders, in_flight):
    """Return all answers' tokens, and the meter's reading."""
    limits = Limits(cache_rows=ROWS, max_in_flight=in_flight, follows=executor.can_follow)
    core = EngineCore(executor, Scheduler(limits, END, lambda: 3), load_tokenizer(Path(base.base)))
    core.load_adapter("all", adapter_folders["all"])
    requests = make_requests(count=6)
    requests.append(Request(id="adapted", prompt_ids=RAGGED[2], adapter="all", sampling=Sampling(max_tokens=4)))
    answers, _ = run(core, requests)
    core.unload_adapter("all")
    return {name: tokens_of(answer) for name, answer in answers.items()}, core.meter.read()


def send_and_die(pipe):
    """Stage 0 of 2, killed while it computes what its second parcel is for."""
    from finlora.engine.handover import Sender

    sender, states = Sender(0, 2, HIDDEN, torch.bfloat16, torch.device("cuda")), make_states(0, 1).cuda()
    for ticket, cycles in ((8, 1e6), (9, 1e11)):
        sender.begin(0, 1, None)
        torch.cuda._sleep(int(cycles))
        pipe.send(sender.send(0, ticket, states))
        pipe.recv()
    os.kill(os.getpid(), 9)


@pytest.mark.parametrize("_gpu", [pytest.param(None, marks=ON_GPU)])
def test_states_of_a_stage_that_dies_are_neither_waited_for_nor_used(_gpu):
    from finlora.engine.handover import Receiver

    other, here = start_sender(send_and_die)
    receiver = Receiver(2, HIDDEN, torch.bfloat16, torch.device("cuda"))

    def compute(parcel, ticket):
        _, stamps = receiver.receive(parcel)
        receiver.wait(parcel)
        stamps.begin(1)
        stamps.end(1, ticket)
        return stamps.read(0, 1, ticket)

    assert all(seconds >= 0 for seconds in compute(here.recv(), 8))
    here.send(None)
    parcel = here.recv()
    with pytest.raises(RuntimeError, match=r"the stage before \(process \d+\) is not there"):
        compute(parcel._replace(pid=end_process()), 9)  # its event does not come
    here.send(None)
    other.join(30)
    assert other.exitcode == -9
    with pytest.raises(RuntimeError, match=r"stage 0 died before its hidden states were complete|is not there"):
        compute(parcel, 9)  # CUDA says that it came
    receiver.close()
    assert (torch.ones(2, device="cuda") * 2).tolist() == [2, 2]  # this process goes on


def end_process():
    """Return the number of a process that is not there."""
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    return process.pid


@pytest.fixture(scope="module")
def expected(four_layers, adapter_folders):
    """Tokens of one stage in this process, on the same device: random weights are others on CPU."""
    with quiet_bitsandbytes():
        base = load_base(four_layers, 16, torch.device(DEVICE), 0)
        alone = InProcess([Stage(base.model, range(4), ROWS, torch.float32)])
    return ask_all(alone, four_layers, adapter_folders, 1)[0]


@pytest.fixture(scope="module")
def pipeline(four_layers, ray_instance):
    from finlora.engine.pipeline import Pipeline, PipelineConfig

    config = PipelineConfig(num_stages=4, cache_rows=ROWS, device=DEVICE, gpus_per_stage=0.25, cpus_per_stage=0.25)
    pipeline = Pipeline(four_layers, 16, config, seed=0)
    yield pipeline
    pipeline.close()


@pytest.mark.parametrize("_gpu", [pytest.param(None, marks=ON_GPU)])
def test_four_stages_of_one_gpu_say_what_one_says(_gpu, pipeline, expected, four_layers, adapter_folders):
    import ray

    handing = [actor.__ray_call__.remote(lambda self: self.hands_over) for actor in pipeline.actors]
    assert ray.get(handing) == [True, True, True, False]
    found, reading = ask_all(pipeline, four_layers, adapter_folders, 4)  # so that several places are in use
    assert found == expected
    assert len(reading.busy) == 4
    assert all(0 < share < 1 for share in reading.busy)
    assert pipeline.peak_memory_gib() > 4 * 2 / 1024  # a parcel's memory each, beside the weights


def wait_for_death(pipeline):
    from ray.exceptions import RayError

    for _ in range(300):
        try:
            pipeline.check()
        except RayError:
            return
        time.sleep(0.1)
    raise AssertionError("the stage lives")


@pytest.mark.parametrize("_gpu", [pytest.param(None, marks=ON_GPU)])
@pytest.mark.parametrize("dying", [0, 2])
def test_stage_that_starts_anew_hands_over_again(_gpu, dying, pipeline, expected, four_layers, adapter_folders):
    import ray

    pid = ray.get(pipeline.actors[dying].__ray_call__.remote(lambda _stage: os.getpid()))
    os.kill(pid, 9)
    wait_for_death(pipeline)
    assert pipeline.repair() == [dying]
    assert ask_all(pipeline, four_layers, adapter_folders, 4)[0] == expected


def test_stages_that_cannot_share_memory_use_messages_and_say_why(ray_instance, caplog):
    import ray

    @ray.remote(num_cpus=0)
    class Pretending:
        """A stage on the GPU `one`, which refuses the parcel of stage 1."""

        def __init__(self):
            self.hands_over, self.refusal = False, None

        def take_number(self, number, num_stages):
            return "one" if number < 3 else "another"

        def offer(self):
            self.hands_over = True
            return Parcel(b"m", b"e", 1, 1, 1)

        def accept(self, parcel):
            return self.refusal

        def use_messages(self):
            self.hands_over = False

    actors = [Pretending.remote() for _ in range(4)]
    ray.get(
        actors[2].__ray_call__.remote(lambda self: setattr(self, "refusal", "CUDA: cudaErrorMapBufferObjectFailed"))
    )
    join_stages(actors, "messages")
    handing = ray.get([actor.__ray_call__.remote(lambda self: self.hands_over) for actor in actors])
    assert handing == [True, False, False, False]  # 2 and 3 are on GPUs of their own
    assert "Stages 1 and 2 share a GPU but not its memory (CUDA: cudaErrorMapBufferObjectFailed)" in caplog.text
    for actor in actors:
        ray.kill(actor)
