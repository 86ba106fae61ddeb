from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest

import gpuml
from gpuml import schedules
from gpuml.schedules import constant, cosine, exponential, get_schedule, step_decay


def factors(schedule, n_epochs):
    return [schedule(epoch, n_epochs) for epoch in range(n_epochs)]


@pytest.mark.parametrize("factor", [math.nan, math.inf, -0.1, "a", None])
def test_a_factor_that_is_none_stops_the_training(rng, factor):
    """Before the step: the weights are those of the epochs before."""
    X = rng.normal(size=(20, 3))
    models = [gpuml.Linear(3, 1, device="cpu") for _ in range(2)]
    with pytest.raises(
        ValueError, match=r"gives .* for epoch 2 of 10 .*: expected a number from 0"
    ):
        gpuml.train(models[0], X, X[:, :1], schedule=lambda e, n: factor if e == 2 else 1)
    gpuml.train(models[1], X, X[:, :1], n_epochs=2)
    assert (models[0].parameters.flat == models[1].parameters.flat).all()


def test_a_cosine_falls_along_half_a_wave():
    assert factors(cosine(), 3) == pytest.approx([1, 0.75, 0.25], rel=1e-12)
    for n_epochs, final in [(1, 0.0), (7, 0.3), (50, 1.0), (50, 0.01)]:
        # cos² of half the angle instead of the cosine of the angle
        expected = [
            final + (1 - final) * math.cos(math.pi * epoch / n_epochs / 2) ** 2
            for epoch in range(n_epochs)
        ]
        assert factors(cosine(final=final), n_epochs) == pytest.approx(expected, rel=1e-12)


def test_a_warm_up_rises_in_equal_steps_and_the_wave_fills_the_rest():
    assert factors(cosine(warmup=3, final=0.2), 6)[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert factors(cosine(warmup=3, final=0.2), 6)[3:] == factors(cosine(final=0.2), 3)
    assert factors(cosine(warmup=4), 5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    for epoch in (0, 4):
        with pytest.raises(ValueError, match="warm-up of 5 epochs needs more than 5"):
            cosine(warmup=5)(epoch, 5)


@pytest.mark.parametrize("final", [0, 0.1, 0.3, 1 / 3, 0.7, 1])
def test_the_full_rate_is_exactly_the_full_rate(final):
    assert cosine(final=final)(0, 10) == 1
    assert cosine(warmup=2, final=final)(2, 10) == 1
    assert cosine(final=1)(3, 10) == 1
    assert step_decay(3, 0.1)(2, 10) == 1
    if final:
        assert exponential(final)(0, 10) == 1
    assert factors(constant(), 3) == [1, 1, 1]


def test_step_decay_falls_after_every_so_many_epochs():
    expected = [Fraction(1, 2) ** (epoch // 4) for epoch in range(13)]
    assert factors(step_decay(4, 0.5), 13) == expected
    assert factors(step_decay(1, 0.5), 4) == [1, 0.5, 0.25, 0.125]
    assert factors(step_decay(20, 0.5), 4) == [1] * 4


def test_exponential_decay_has_one_ratio_and_is_on_the_way_to_the_final_factor():
    found = factors(exponential(0.02), 9)
    ratios = [after / before for before, after in itertools.pairwise(found)]
    assert ratios == pytest.approx([ratios[0]] * 8, rel=1e-12)
    assert found[-1] * ratios[0] == pytest.approx(0.02, rel=1e-12)
    assert factors(exponential(1), 3) == [1, 1, 1]


def test_schedules_agree_with_pytorch():
    torch = pytest.importorskip("torch")
    optim = torch.optim.lr_scheduler

    def rates(make):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = make(optimizer)
        found = []
        for _ in range(12):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return pytest.approx(found, rel=1e-9)

    assert factors(cosine(final=0.1), 12) == rates(
        lambda o: optim.CosineAnnealingLR(o, T_max=12, eta_min=0.1)
    )
    assert factors(step_decay(5, 0.3), 12) == rates(lambda o: optim.StepLR(o, 5, gamma=0.3))
    assert factors(exponential(0.01), 12) == rates(
        lambda o: optim.ExponentialLR(o, gamma=0.01 ** (1 / 12))
    )


EACH = [constant(), cosine(warmup=2, final=0.1), step_decay(3, 0.5), exponential(0.01)]


@pytest.mark.parametrize("schedule", EACH, ids=repr)
def test_a_schedule_prints_as_the_call_that_makes_it(schedule):
    twin = eval(repr(schedule), vars(schedules))
    assert twin == schedule
    assert hash(twin) == hash(schedule)
    assert twin is not schedule
    assert [other for other in EACH if other == schedule] == [schedule]


def test_schedules_are_equal_when_their_settings_are():
    assert cosine() != cosine(final=0.1)
    assert cosine(warmup=1) != cosine()
    assert step_decay(3, 0.5) != step_decay(3, 0.4)
    assert step_decay(3, 0.5) != step_decay(4, 0.5)
    assert exponential(0.1) != exponential(0.2)
    assert exponential(1) != constant()
    for number, same in [(cosine(warmup=2.0, final=0), cosine(warmup=2)), (cosine(final=1),) * 2]:
        assert number == same
        assert repr(number) == repr(same)
    assert repr(cosine()) == "cosine(warmup=0, final=0.0)"


def test_a_schedule_cannot_be_changed():
    with pytest.raises(AttributeError):
        cosine().final = 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cosine(warmup=-1), "warmup must be an integer, at least 0, got -1"),
        (lambda: cosine(warmup=1.5), "warmup must be an integer"),
        (lambda: cosine(warmup=math.nan), "warmup must be an integer"),
        (lambda: cosine(warmup=math.inf), "warmup must be an integer"),
        (lambda: cosine(warmup=True), "warmup must be an integer"),
        (lambda: cosine(final=-0.1), "final must be from 0 to 1, got -0.1"),
        (lambda: cosine(final=1.1), "final must be from 0 to 1"),
        (lambda: cosine(final=math.nan), "final must be from 0 to 1"),
        (lambda: step_decay(0, 0.5), "every must be an integer, at least 1"),
        (lambda: step_decay(2.5, 0.5), "every must be an integer"),
        (lambda: step_decay(2, 0), "factor must be above 0, up to 1, got 0"),
        (lambda: step_decay(2, 1.5), "factor must be above 0, up to 1"),
        (lambda: exponential(0), "final must be above 0, up to 1"),
        (lambda: exponential(-0.5), "final must be above 0, up to 1"),
        (lambda: exponential(2), "final must be above 0, up to 1"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_schedules_have_names():
    assert get_schedule("cosine") == cosine()
    assert get_schedule("constant") == constant()

    def mine(epoch, n_epochs):
        return 1 / (1 + epoch)

    assert get_schedule(mine) is mine
    given = cosine(warmup=3)
    assert get_schedule(given) is given
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        get_schedule("cosin")
    with pytest.raises(ValueError, match=r"gpuml\.schedules\.step_decay\(10, 0\.1\)"):
        get_schedule("step_decay")
    for maker in (cosine, constant, exponential, step_decay):
        with pytest.raises(TypeError, match=rf"not its maker: gpuml\.schedules\.{maker.__name__}"):
            get_schedule(maker)
    with pytest.raises(TypeError, match=r"\(epoch, n_epochs\) -> factor, got 0\.5"):
        get_schedule(0.5)


def test_the_messages_name_calls_that_work():
    for name in schedules.MAKERS:
        assert callable(eval(schedules._call(name), {"gpuml": gpuml}))
