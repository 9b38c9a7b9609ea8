"""Rectified flow: goldens of the official noise module and guidance, and what the definitions imply."""

from __future__ import annotations

import math

import pytest
import torch

from vistok.flow import (
    APG,
    CFG,
    SAMPLERS,
    DualCFG,
    EulerMaruyamaSampler,
    EulerSampler,
    RectifiedFlow,
    Sampling,
    shift_time,
    time_features,
)

MODES = {
    "logit_normal": RectifiedFlow(),
    "logit_normal_stratified": RectifiedFlow(stratified=True),
    "uniform": RectifiedFlow(t_sampler="uniform"),
    "mode129": RectifiedFlow(t_sampler="mode", mode_scale=1.29),
}


@pytest.mark.parity
@pytest.mark.parametrize("case", ["cfg3", "apg75", "apg_nomom", "apg_eta", "apg_wide"])
def test_four_guided_steps_match_the_official_code(golden, case):
    ref = golden("rectified_flow")
    given = dict(ref.meta["cases"][case])
    guidance = {"cfg": CFG, "apg": APG}[given.pop("kind")](**given)
    for _ in range(2):  # the second time as the first: the state is reset
        guidance.reset()
        for step, (v_c, v_u) in enumerate(zip(ref["cond"], ref["uncond"])):
            found = guidance(v_c, v_u, x=torch.zeros_like(v_c), t=1 - step / 4)
            torch.testing.assert_close(found, ref[f"guided_{case}"][step], atol=1e-5, rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize("name", MODES)
def test_times_and_noised_data_match_the_official_code(golden, name):
    ref, flow = golden("rectified_flow"), MODES[name]
    t = flow.from_normal(ref["draw_normal"]) if name == "logit_normal" else flow.sample_t(16, draws=ref["draw_uniform"])
    torch.testing.assert_close(t, ref[f"sigma_{name}"], atol=1e-6, rtol=0)
    x_t = flow.add_noise(ref[f"clean_{name}"], ref[f"eps_{name}"], ref[f"sigma_{name}"])
    torch.testing.assert_close(x_t, ref[f"xt_{name}"], atol=1e-6, rtol=0)


@pytest.mark.parity
def test_time_features_match_the_official_code(golden):
    ref = golden("rectified_flow")
    torch.testing.assert_close(time_features(ref["t"]), ref["t_features"], atol=2e-4, rtol=0)


def test_time_features_at_zero_are_ones_then_zeros():
    found = time_features(torch.zeros(()))
    assert torch.equal(found, torch.cat([torch.ones(128), torch.zeros(128)]))
    with pytest.raises(ValueError, match="must be even"):
        time_features(torch.zeros(1), 7)


def test_noise_and_data_are_the_ends_of_the_path():
    data, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    flow, t = RectifiedFlow(), torch.tensor([0.3, 0.9])
    assert torch.equal(flow.add_noise(data, noise, torch.zeros(2)), data)
    assert torch.equal(flow.add_noise(data, noise, torch.ones(2)), noise)
    x_t, v = flow.add_noise(data, noise, t), flow.target(data, noise)
    torch.testing.assert_close(flow.data_of(x_t, v, t), data)
    torch.testing.assert_close(flow.noise_of(x_t, v, t), noise)
    torch.testing.assert_close(RectifiedFlow(prediction="data").velocity(data, x_t, t), v)
    torch.testing.assert_close(flow.loss(v, data, noise), torch.zeros(2))


def test_loss_of_a_silent_network_is_one_plus_the_power_of_the_data():
    data, noise = 2 * torch.randn(400, 64), torch.randn(400, 64)
    loss = RectifiedFlow().loss(torch.zeros_like(data), data, noise)
    assert loss.shape == (400,)
    assert float(loss.mean()) == pytest.approx(5.0, rel=0.03)


def test_laws_of_the_training_times():
    g = torch.Generator().manual_seed(0)
    assert float(RectifiedFlow().sample_t(20_000, g).median()) == pytest.approx(0.5, abs=0.01)
    u = torch.rand(64)
    torch.testing.assert_close(RectifiedFlow(t_sampler="mode").sample_t(64, draws=u), 1 - u)
    strata = RectifiedFlow(stratified=True)
    t = torch.cat([strata.sample_t(8, g, offset=o, total=16) for o in (0, 8)]).double()
    share = 0.5 * (1 + torch.erf(t.logit() / math.sqrt(2)))
    assert torch.equal((share * 16).floor(), torch.arange(16.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RectifiedFlow(t_sampler="mode", mode_scale=2), "monotone"),
        (lambda: RectifiedFlow(t_sampler="uniform", stratified=True), "Stratified times are logit-normal"),
        (lambda: RectifiedFlow(prediction="data", least_t=0), "least_t"),
        (lambda: EulerSampler(0), "at least 1 step"),
        (lambda: EulerSampler(3, shift=0), "shift is positive"),
        (lambda: CFG(-1.0), "at least 0, and 1 for no guidance; got -1.0"),
        (lambda: APG(math.nan), "at least 0"),
        (lambda: Sampling(steps=0), "at least 1 step"),
        (lambda: Sampling(shift=-1.0), "shift is positive"),
        (lambda: Sampling(guidance=-2.0), "at least 0"),
        (lambda: EulerMaruyamaSampler(3, last=0), "last=0"),
        (lambda: EulerMaruyamaSampler(3)(lambda x, t: x, torch.zeros(1), noises=[]), "3 steps need 2 noises"),
    ],
)
def test_misuse_is_one_clear_line(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_deterministic_sampler_refuses_noise():
    with pytest.raises(TypeError, match="deterministic"):
        EulerSampler(2)(lambda x, t: x, torch.zeros(1), generator=torch.Generator())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 5])
def test_straight_paths_are_integrated_exactly(name, steps):
    data, noise = torch.randn(2, 6), torch.randn(2, 6)
    found = SAMPLERS[name](steps, shift=1.7)(lambda x, t: noise - data, noise)
    torch.testing.assert_close(found, data)


@pytest.mark.parametrize(
    ("name", "order", "each", "saved"),
    [("euler", 1, 1, 0), ("heun", 2, 2, 1), ("midpoint", 2, 2, 0), ("rk4", 4, 4, 1), ("ab2", 2, 1, 0)],
)
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_samplers_have_their_order(name, order, each, saved, shift):
    """dx/dt = x sin(3 t) from t = 1 to 0; halving the step divides the error by 2^order."""
    exact = math.exp((math.cos(3.0) - 1) / 3)

    def error(steps):
        sampler = SAMPLERS[name](steps, shift=shift)
        assert sampler.evaluations == each * steps - saved
        x = sampler(lambda x, t: x * math.sin(3 * t), torch.ones(1, dtype=torch.float64))
        return abs(float(x) - exact)

    assert math.log2(error(40) / error(80)) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 4])
def test_nothing_is_asked_at_the_data_end_where_data_predictions_are_divided_by_t(name, steps):
    data, noise, flow = torch.randn(2, 6), torch.randn(2, 6), RectifiedFlow(prediction="data")
    sampler = SAMPLERS[name](steps)
    assert min(sampler.evaluated) > 0

    def field(x, t):
        return flow.velocity(data + 0.01 * torch.sin(50 * x), x, torch.full((2,), t))  # a prediction a little off

    assert float((sampler(field, noise) - data).abs().max()) < 0.05


def test_official_grid_and_shifted_grid():
    assert EulerSampler(4).times == [1, 0.75, 0.5, 0.25, 0]
    assert EulerSampler(4).evaluated == [1, 0.75, 0.5, 0.25]
    assert EulerSampler(4, shift=2).times == pytest.approx([1, 0.857143, 0.666667, 0.4, 0], abs=1e-6)
    assert shift_time(0.3, 1.0) == 0.3


def test_one_exact_euler_step_gives_the_data():
    data, noise = torch.randn(3, 2), torch.randn(3, 2)
    torch.testing.assert_close(EulerSampler(1)(lambda x, t: x - data, noise), data)


def branches(x, t, count=1):
    given = torch.sin(x) * t
    return (given, torch.cos(x), x)[:count]


def test_scale_one_is_the_conditional_branch_and_one_call():
    seen = []

    def field(x, t, count):
        seen.append(count)
        return branches(x, t, count)

    noise = torch.randn(2, 5)
    plain = EulerSampler(3)(lambda x, t: branches(x, t)[0], noise)
    for guidance in (CFG(1.0), APG(1.0), CFG(lambda t: 1.0), DualCFG(1.0, 1.0)):
        assert torch.equal(EulerSampler(3)(field, noise, guidance), plain)
    assert set(seen) == {1}


def test_apg_without_its_parts_is_cfg():
    noise = torch.randn(2, 5)
    apg = APG(4.0, eta=1.0, norm_threshold=0.0, momentum=None)
    torch.testing.assert_close(EulerSampler(3)(branches, noise, apg), EulerSampler(3)(branches, noise, CFG(4.0)))
    data_space = APG(4.0, eta=1.0, norm_threshold=0.0, momentum=None, space="data")
    torch.testing.assert_close(EulerSampler(3)(branches, noise, data_space), EulerSampler(3)(branches, noise, CFG(4.0)))


def test_apg_is_orthogonal_limited_and_damped():
    given, empty = torch.randn(3, 40), torch.randn(3, 40)
    found = APG(5.0, norm_threshold=0.7)(given, empty, x=given, t=1.0) - given
    assert float((found * given).sum(1).abs().max()) < 1e-4
    assert bool((found.norm(dim=1) <= 4 * 0.7 + 1e-5).all())
    wide = APG(5.0, norm_threshold=0.7 / 40**0.5, relative=True)(given, empty, x=given, t=1.0) - given
    torch.testing.assert_close(found, wide)
    damped = APG(2.0, eta=1.0, norm_threshold=0.0)
    for _ in range(40):
        last = damped(given, empty, x=given, t=1.0)
    torch.testing.assert_close(last - given, (given - empty) / 1.5)
    equal = APG(5.0)(given, given, x=given, t=1.0)
    torch.testing.assert_close(equal, given)


@pytest.mark.parametrize("guidance", [CFG(3.0), APG(7.5), APG(7.5, space="data"), DualCFG(renorm="channel")])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_equals_its_pictures_one_by_one(guidance, name):
    noise = torch.randn(3, 7)
    batch = SAMPLERS[name](4)(branches, noise, guidance)
    again = SAMPLERS[name](4)(branches, noise, guidance)
    assert torch.equal(batch, again)
    for i in range(3):
        torch.testing.assert_close(SAMPLERS[name](4)(branches, noise[i : i + 1], guidance), batch[i : i + 1])


def test_a_scale_that_varies_sees_the_times_of_the_grid():
    seen = []

    def scale(t):
        seen.append(t)
        return 2.0

    EulerSampler(4)(branches, torch.randn(1, 3), APG(scale))
    assert sorted(set(seen), reverse=True) == [1, 0.75, 0.5, 0.25]


def test_half_precision_networks_keep_a_float32_state():
    found = EulerSampler(3)(lambda x, t: x.to(torch.bfloat16), torch.ones(1, 2))
    assert found.dtype == torch.float32
    assert EulerSampler(1)(lambda x, t: x.float(), torch.ones(1, dtype=torch.float64)).dtype == torch.float64


def test_stochastic_sampler_takes_noises_or_a_generator():
    sampler, noise = EulerMaruyamaSampler(4), torch.randn(2, 3)
    assert sampler.times == pytest.approx([1, 0.68, 0.36, 0.04, 0])
    g = torch.Generator().manual_seed(3)
    noises = [torch.randn(2, 3, generator=g) for _ in range(3)]
    drawn = sampler(branches, noise, CFG(2.0), generator=torch.Generator().manual_seed(3))
    assert torch.equal(sampler(branches, noise, CFG(2.0), noises=noises), drawn)
    data = torch.randn(2, 3)
    ends = EulerMaruyamaSampler(400)(lambda x, t: (x - data) / t, noise, generator=g)
    assert float((ends - data).abs().max()) < 0.2
