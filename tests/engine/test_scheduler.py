"""Continuous batching on a target without a model: who gets what, when, and in which pass."""

import pytest

from gemma_mtp.decoding import Progress, Rows, SamplingParams, draft_and_verify
from gemma_mtp.decoding.economy import GUESSED_SHAPE, CostShape
from gemma_mtp.engine.interface import Part
from gemma_mtp.engine.scheduler import PROMPT_BESIDE_MOST, Request, Scheduler, Update, prompt_beside
from gemma_mtp.errors import LateError, SettingsError

from ..decoding.fake_target import VOCAB, FakeTarget, FakeText


class FakeEngine(FakeTarget):
    """Runs several sequences a pass, and remembers what each pass held."""

    context, max_depth, max_rows, max_outputs, drafts = 10_000, 8, 512, 24, False

    def __init__(self, room: int = 1_000_000) -> None:
        """room: tokens that all sequences together may hold."""
        super().__init__(order=2)  # so that it repeats itself and lookup drafts
        self.room = room
        self.parts: list[list[tuple[int, int]]] = []
        self.held: list[list[int]] = []
        self.fail_at: int | None = None

    def create(self) -> list[int]:
        self.held.append([])
        return self.held[-1]

    def release(self, sequence: list[int]) -> None:
        self.held = [held for held in self.held if held is not sequence]

    def fits(self, wanted: list[tuple[list[int], int]]) -> bool:
        return sum(map(len, self.held)) + sum(count for _, count in wanted) <= self.room

    def share(self, sequence: list[int]) -> None:
        """Nothing is shared: see test_prefix_cache.py for what is."""

    def adopt(self, sequence: list[int], tokens: list[int]) -> int:
        return 0

    def run(self, parts: list[Part]) -> list[Rows]:
        assert self.fits([(part.sequence, len(part.tokens)) for part in parts])
        self.parts.append([(len(part.tokens), part.rows) for part in parts])
        if self.fail_at == len(self.parts) - 1:
            raise MemoryError("no memory")
        assert sum(len(part.tokens) for part in parts) <= self.max_rows
        assert sum(part.rows for part in parts) <= self.max_outputs
        return [self.step(*part) for part in parts]


class Asked:
    """A request and what it was told."""

    def __init__(self, prompt: list[int], params: SamplingParams, draft: int | str = "auto"):
        self.updates: list[Update] = []
        self.request = Request(prompt, params, FakeText(), (), draft, self.updates.append)

    @property
    def tokens(self) -> list[int]:
        return [token for update in self.updates for piece in update.pieces for token in piece.tokens]

    @property
    def text(self) -> str:
        return "".join(piece.text for update in self.updates for piece in update.pieces)

    @property
    def ends(self) -> list[tuple[str | None, Exception | None]]:
        return [(u.finish_reason, u.error) for u in self.updates if u.finish_reason or u.error]


def run(scheduler: Scheduler, passes: int = 10_000) -> None:
    for _ in range(passes):
        if not scheduler.running and not scheduler.waiting:
            return
        scheduler.step()


def mixed(count: int) -> list[Asked]:
    settings = [
        {"presence_penalty": 0.3, "frequency_penalty": 0.4},
        {"temperature": 1.0, "seed": 3, "logit_bias": {5: 1.5}},
        {"temperature": 0.7, "top_k": 9, "repetition_penalty": 1.2},
    ]
    lengths = [1, 5, 700, 30]
    return [
        Asked(
            [(7 * i + j * j) % VOCAB for j in range(lengths[i % 4])],
            SamplingParams(max_tokens=3 + 5 * (i % 7), stop=["abc"] if i % 5 == 0 else [], **settings[i % 3]),
            ["auto", "off", 4][i % 3],
        )
        for i in range(count)
    ]


def test_each_request_gets_what_it_gets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Prompts are soon done, so that all places decode at once.
    monkeypatch.setattr("gemma_mtp.engine.scheduler.PROMPT_BESIDE", PROMPT_BESIDE_MOST)
    asked, engine = mixed(30), FakeEngine()
    scheduler = Scheduler(engine, 12)
    for one in asked[:20]:
        scheduler.add(one.request)
    run(scheduler, 5)
    for one in asked[20:]:  # these join while the others run
        scheduler.add(one.request)
    run(scheduler)
    for one in asked:
        expected, text = alone(one)
        assert (one.tokens, one.text, one.ends) == (expected.tokens, text, [(expected.finish_reason, None)])
    assert not engine.held
    assert max(len(parts) for parts in engine.parts) == 12
    assert any(rows > 1 for parts in engine.parts for _, rows in parts), "nothing was drafted"


def alone(asked: Asked) -> tuple[Progress, str]:
    """What a request comes to without others, and its text."""
    progress = Progress(asked.request.prompt, asked.request.params, text=FakeText(), context=10_000)
    return progress, "".join(piece.text for piece in draft_and_verify(FakeEngine(), [], progress))


@pytest.mark.parametrize("room", [760, 900, 1500])
def test_where_memory_runs_out_all_get_what_they_get_alone(room: int) -> None:
    asked, engine = mixed(30), FakeEngine(room)
    scheduler = Scheduler(engine, 12)
    for one in asked:
        scheduler.add(one.request)
    run(scheduler)
    for one in asked:
        expected, _ = alone(one)
        assert (one.tokens, one.ends) == (expected.tokens, [(expected.finish_reason, None)])
    assert not engine.held


def test_preempted_requests_go_on_where_they_were() -> None:
    asked = [Asked([i] * 40, SamplingParams(max_tokens=200, temperature=1.0, seed=i)) for i in range(4)]
    engine = FakeEngine(330)  # three start, and one can end
    scheduler = Scheduler(engine, 4)
    for one in asked:
        scheduler.add(one.request)
    run(scheduler)
    preempted = [one.updates[-1].stats.preemptions for one in asked]
    assert preempted[0] == 0
    assert preempted[2] > 0
    for one in asked:
        expected, _ = alone(one)
        assert one.tokens == expected.tokens
        assert one.ends == [("length", None)]


def test_preempted_requests_can_be_cancelled() -> None:
    asked = [Asked([i] * 40, SamplingParams(max_tokens=200)) for i in range(3)]
    scheduler = Scheduler(FakeEngine(330), 4)
    for one in asked:
        scheduler.add(one.request)
    while not (asked[2].updates and asked[2].updates[-1].stats.preemptions):
        scheduler.step()
    assert (scheduler.running, scheduler.waiting) == (2, 1)
    asked[2].request.cancelled = True
    scheduler.step()
    assert asked[2].ends == [("cancelled", None)]
    run(scheduler)
    assert [len(one.tokens) for one in asked[:2]] == [200, 200]


def test_places_are_shared_among_clients() -> None:
    greedy = [Asked([1, 2], SamplingParams(max_tokens=9)) for _ in range(6)]
    modest = Asked([1, 2], SamplingParams(max_tokens=9))
    scheduler = Scheduler(FakeEngine(), 2)
    for one in greedy:
        one.request.client = "greedy"
        scheduler.add(one.request)
    scheduler.step()
    modest.request.client = "modest"
    scheduler.add(modest.request)
    while not modest.ends:
        scheduler.step()
    assert sum(bool(one.ends) for one in greedy) < 5


def test_what_takes_too_long_ends_running_or_waiting() -> None:
    asked = [Asked([1, 2], SamplingParams(max_tokens=90)) for _ in range(2)]
    scheduler = Scheduler(FakeEngine(), 1)
    for one in asked:
        scheduler.add(one.request)
    run(scheduler, 3)
    for one in asked:
        one.request.deadline = 0
    scheduler.step()
    for one in asked:
        ((reason, error),) = one.ends
        assert reason is None
        assert isinstance(error, LateError)
    assert (scheduler.running, scheduler.waiting) == (0, 0)


def test_requests_can_come_while_others_are_looked_at() -> None:
    scheduler = Scheduler(FakeEngine(), parallel=1)
    late: list[Asked] = []

    class Arriving(Request):
        """While it is looked at, another thread has its turn and adds a request."""

        @property
        def cancelled(self) -> bool:
            if len(late) < 5:
                late.append(Asked([3, 1, 2], SamplingParams(max_tokens=2)))
                scheduler.add(late[-1].request)
            return False

        @cancelled.setter
        def cancelled(self, value: bool) -> None:
            pass

    waiting = [Asked([1, 2, 3], SamplingParams(max_tokens=2)) for _ in range(3)]
    for asked in waiting:
        request = asked.request
        scheduler.add(Arriving(request.prompt, request.params, request.text, (), "off", request.receive))
    run(scheduler)
    assert len(late) == 5
    assert all(asked.ends == [("length", None)] for asked in waiting + late)


def test_prompts_run_in_chunks_beside_decoding() -> None:
    engine, long = FakeEngine(), Asked([1] * 1000, SamplingParams(max_tokens=2), "off")
    scheduler = Scheduler(engine, 2)
    scheduler.add(Asked([1, 2], SamplingParams(max_tokens=50), "off").request)
    scheduler.step()
    scheduler.add(long.request)
    while not long.updates:
        scheduler.step()
    most = prompt_beside(GUESSED_SHAPE, 1)
    chunks = [most] * (1000 // most) + [1000 % most]
    assert engine.parts[1:] == [[(1, 1), (chunk, int(chunk != most))] for chunk in chunks]


def test_the_more_decode_the_more_of_a_prompt_runs_beside_them() -> None:
    for count in (1, 4, 20):
        engine = FakeEngine()
        scheduler = Scheduler(engine, 24)
        for _ in range(count):
            scheduler.add(Asked([1, 2], SamplingParams(max_tokens=50), "off").request)
        run(scheduler, 4)
        scheduler.add(Asked([1] * 1000, SamplingParams(max_tokens=2), "off").request)
        scheduler.step()
        expected = prompt_beside(GUESSED_SHAPE, count)
        assert engine.parts[-1] == [(1, 1)] * count + [(expected, 0)]


def test_the_dearer_a_row_the_less_of_a_prompt_runs_beside_them() -> None:
    cheap, dear = (CostShape([1 + row * i for i in range(9)]) for row in (0.1, 0.4))
    assert prompt_beside(cheap, 2) == 4 * prompt_beside(dear, 2) == 28
    assert prompt_beside(cheap, 30) == PROMPT_BESIDE_MOST
    assert prompt_beside(cheap._replace(prompt=0.05), 2) == 2 * prompt_beside(cheap, 2)
    assert prompt_beside(CostShape([1.0] * 9), 1) == PROMPT_BESIDE_MOST
    assert prompt_beside(CostShape([1 + 50 * i for i in range(9)]), 1) == 1


def test_drafts_get_the_rows_that_are_left() -> None:
    for count, depth in ((1, 8), (4, 5), (8, 2), (12, 1), (24, 0)):
        engine = FakeEngine()
        scheduler = Scheduler(engine, 24)
        for _ in range(count):
            scheduler.add(Asked([1, 2, 3] * 9, SamplingParams(max_tokens=100), 8).request)
        run(scheduler, 30)
        assert max(rows for parts in engine.parts for _, rows in parts) == 1 + depth


def test_a_cancelled_request_leaves_before_the_next_pass() -> None:
    engine, running, waiting = FakeEngine(), *(Asked([1, 2], SamplingParams(max_tokens=90)) for _ in range(2))
    scheduler = Scheduler(engine, 1)
    scheduler.add(running.request)
    scheduler.add(waiting.request)
    run(scheduler, 3)
    running.request.cancelled = waiting.request.cancelled = True
    scheduler.step()
    assert len(engine.parts) == 3
    assert (running.ends, waiting.ends) == ([("cancelled", None)],) * 2
    assert not engine.held
    assert (scheduler.running, scheduler.waiting) == (0, 0)


def test_a_failed_pass_is_told_and_later_requests_run() -> None:
    engine, failed, later = FakeEngine(), *(Asked([1, 2], SamplingParams(max_tokens=4)) for _ in range(2))
    engine.fail_at = 1
    scheduler = Scheduler(engine, 1)
    scheduler.add(failed.request)
    scheduler.add(later.request)
    run(scheduler)
    assert [str(error) for _, error in failed.ends] == ["no memory"]
    assert later.ends == [("length", None)]
    assert not engine.held


def test_the_number_of_parallel_requests_is_checked() -> None:
    with pytest.raises(SettingsError, match="between 1 and 24"):
        Scheduler(FakeEngine(), 25)


@pytest.mark.parametrize("max_tokens", [0, 9])
def test_log_probabilities_of_prompts_are_those_of_a_prompt_alone(max_tokens: int) -> None:
    settings = {"logprobs": 2, "prompt_logprobs": True, "temperature": 1.0, "frequency_penalty": 0.5}
    params = SamplingParams(max_tokens=max_tokens, **settings)  # type: ignore[arg-type]
    engine = FakeEngine()
    scheduler = Scheduler(engine, 8)
    scored = [Asked([(i + j * j) % VOCAB for j in range(length)], params) for i, length in enumerate((1, 3, 90, 400))]
    others = mixed(4)
    for asked in (*scored, *others):
        scheduler.add(asked.request)
    run(scheduler)
    for asked in scored:
        prompt = list(asked.request.prompt)
        found = asked.updates[-1].prompt_logprobs
        assert found is not None
        expected = [engine.logprob(prompt[: i + 1], token) for i, token in enumerate(prompt[1:])]
        assert [one.chosen for one in found] == pytest.approx(expected)
        assert all(len(one.top) == 2 for one in found)
        assert asked.ends == [("length", None)]
        plain = SamplingParams(max_tokens=9, **settings | {"prompt_logprobs": False})  # type: ignore[arg-type]
        progress = Progress(prompt, plain, text=FakeText(), context=10_000)
        list(draft_and_verify(FakeTarget(order=2), [], progress))
        assert asked.tokens == progress.tokens[:max_tokens]
    assert all(asked.updates[-1].prompt_logprobs is None for asked in others)
