"""The law of visual tokens against the published points, and its frontier."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vistok.cli.app import run
from vistok.evaluate.scaling import Law, Run, fit, flops, frontier, plan, read_runs

TOKENS = (1, 4, 16, 36, 64, 144, 576)
REASONING = {  # scores of the paper's repository (locuslab/llava-token-compression), average over reasoning benchmarks
    0.5: (0.3855, 0.3917, 0.4078, 0.4133, 0.4151, 0.4244, 0.4320),
    1.8: (0.4333, 0.4519, 0.4528, 0.4597, 0.4609, 0.4758, 0.4808),
    4.0: (0.4630, 0.4692, 0.4858, 0.4916, 0.5023, 0.5092, 0.5185),
    7.0: (0.4810, 0.4971, 0.5050, 0.5141, 0.5172, 0.5238, 0.5354),
}
RUNS = [Run(n, t, 1 - s) for n, scores in REASONING.items() for t, s in zip(TOKENS, scores)]


def test_the_published_points_give_the_published_exponents():
    law = fit(RUNS)
    assert (law.alpha, law.beta) == (pytest.approx(0.0709, abs=2e-4), pytest.approx(0.0151, abs=2e-4))
    assert law.scale == pytest.approx(0.591, abs=1e-3)
    assert law.squares == pytest.approx(3.8e-4, abs=1e-5)
    assert law.worst < 0.0075
    free = fit(RUNS, None)  # published: alpha 0.077, beta 0.015
    assert free.alpha == pytest.approx(0.075, abs=0.005)
    assert free.squares <= law.squares


def test_a_law_is_found_again_exactly():
    true = Law(scale=0.5, alpha=0.1, beta=0.03, offset=0.1)
    runs = [Run(n, t, true.error(n, t)) for n in (0.5, 2, 8) for t in (1, 16, 256)]
    law = fit(runs, 0.1)
    assert (law.scale, law.alpha, law.beta) == pytest.approx((0.5, 0.1, 0.03), abs=1e-9)
    assert fit(runs, None).offset == pytest.approx(0.1, abs=0.011)


def test_nothing_on_the_frontier_is_beaten():
    law = fit(RUNS)
    best = frontier(law, sizes=list(REASONING), tokens=TOKENS, text=50)
    costs = [c.flops for c in best]
    assert costs == sorted(costs)
    assert all(a.error > b.error for a, b in itertools.pairwise(best))
    grid = [(flops(n, t, 50), law.error(n, t)) for n in REASONING for t in TOKENS]
    for choice in best:
        assert not [1 for cost, error in grid if cost <= choice.flops and error < choice.error]


def test_a_budget_buys_the_largest_model_with_few_tokens():
    law = fit(RUNS)
    best = plan(law, flops(7, 16, 50), sizes=list(REASONING), tokens=TOKENS, text=50)
    assert (best.params, best.tokens) == (7, 16)
    with pytest.raises(ValueError, match=r"Nothing fits into 1 FLOPs: the cheapest choice takes 5.1e\+10"):
        plan(law, 1, sizes=list(REASONING), tokens=TOKENS, text=50)


def test_runs_that_determine_nothing_are_refused():
    with pytest.raises(ValueError, match="at least 4 runs"):
        fit(RUNS[:3])
    with pytest.raises(ValueError, match="more than one size"):
        fit(RUNS[:7])
    with pytest.raises(ValueError, match="offset=0.9 is not below the smallest error"):
        fit(RUNS, 0.9)
    with pytest.raises(ValueError, match="grow together"):
        fit([Run(n, 10 * n, 0.5 / n) for n in (1, 2, 4, 8)])


def test_tables_of_spreadsheets_are_read(tmp_path):
    (tmp_path / "runs.csv").write_bytes(b"\xef\xbb\xbfparams, tokens, score\r\n\r\n0.5, 4, 0.4\r\n")
    assert read_runs(tmp_path / "runs.csv") == [Run(0.5, 4, 0.6)]


def test_the_command_reads_a_table_and_draws(tmp_path, capsys):
    lines = ["params,tokens,score", *(f"{r.params},{r.tokens},{1 - r.error}" for r in RUNS)]
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    arguments = ["scaling", str(tmp_path / "runs.csv"), "--out", str(tmp_path / "law.png"), "--budget", "1e12"]
    assert run(arguments) == 0
    said = capsys.readouterr().out
    assert "28 runs" in said
    assert "best within 1e+12 FLOPs" in said
    assert (tmp_path / "law.png").read_bytes()[:4] == b"\x89PNG"
    np.testing.assert_allclose([r.error for r in read_runs(tmp_path / "runs.csv")], [r.error for r in RUNS])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2", "expected the columns params, tokens and error"),
        ("params,tokens,error\n1,2,x", "line 2: expected 3 numbers"),
        ("params,tokens,error\n1,2", "line 2: expected 3 numbers"),
        ("params,tokens,error\n1,2,0.5,9", "line 2: expected 3 numbers"),
        ("params,tokens,error\ninf,2,0.5", "line 2: params and tokens are above 0 and finite"),
        ("\xff", "not written in UTF-8"),
        ("params,tokens,error\n1,2,0.5\n1,0,0.5", "line 3: params and tokens are above 0"),
    ],
)
def test_a_broken_table_names_its_line(tmp_path, text, message, capsys):
    (tmp_path / "runs.csv").write_bytes(text.encode("latin-1"))
    assert run(["scaling", str(tmp_path / "runs.csv")]) == 2
    assert message in capsys.readouterr().err
