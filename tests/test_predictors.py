"""Agreement of metrics: the paper's published numbers, scipy,
brute force, and intervals that hold what they promise"""
import os, subprocess, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from tokkit.analysis import (COEFFICIENTS, coefficients, compare_agreement, paper_rows, pool, rank_agreement,
                             unit_values)
from tokkit.runs import collect
from tokkit.runs import grid_points

# Pearson, Spearman over the eleven tokenizers of tables 7 and 8 (arXiv 2509.12474)
PUBLISHED = {
    ('LlamaGen-B', 'gFID', 'pFID'): (.68, .68), ('LlamaGen-B', 'gFID', 'rFID'): (.63, .71),
    ('LlamaGen-B', 'gFID, guided', 'pFID'): (.76, .72), ('LlamaGen-B', 'gFID, guided', 'rFID'): (.66, .53),
    ('LlamaGen-L', 'gFID', 'pFID'): (.56, .55), ('LlamaGen-L', 'gFID', 'rFID'): (.45, .40),
    ('LlamaGen-L', 'gFID, guided', 'pFID'): (.78, .67), ('LlamaGen-L', 'gFID, guided', 'rFID'): (.64, .47),
}


@pytest.mark.parametrize('case', PUBLISHED)
def test_the_papers_tables(case):
    generator, target, metric = case
    rows = paper_rows()
    found = rank_agreement(rows[rows.generator == generator], metric, target, 'K',
                           draws=200).set_index(['scope', 'coefficient']).value
    # one is .4446 and published as .45
    assert np.allclose([found['pooled', 'Pearson'], found['pooled', 'Spearman']], PUBLISHED[case], atol=.006)
    assert found.between(-1, 1).all() and len(found) == 6


@pytest.mark.parametrize('ties', [False, True])
def test_scipy_agrees(ties):
    rng = np.random.default_rng(3)
    x = rng.integers(0, 4, (20, 12)).astype(float) if ties else rng.normal(size=(20, 12))
    y = x+rng.normal(size=x.shape).round(0 if ties else 9)
    c = coefficients(x, y)
    for name, f in dict(Pearson=stats.pearsonr, Spearman=stats.spearmanr, Kendall=stats.kendalltau).items():
        assert np.allclose(c[name], [f(a, b)[0] for a, b in zip(x, y)], atol=1e-12), name


def test_within_groups_by_brute_force():
    rng = np.random.default_rng(4)
    x = rng.normal(size=9)
    y = rng.normal(size=9)
    g = np.array([0, 0, 1, 1, 1, 2, 2, 2, 2])
    c = coefficients(x[None], y[None], g)
    centred = [np.concatenate([v[g == k]-v[g == k].mean() for k in range(3)]) for v in (x, y)]
    ranks = [np.concatenate([stats.rankdata(v[g == k])-((g == k).sum()+1)/2 for k in range(3)])
             for v in (x, y)]
    pairs = [np.sign((x[i]-x[j])*(y[i]-y[j])) for i in range(9) for j in range(i) if g[i] == g[j]]
    assert np.isclose(c['Pearson'].item(), stats.pearsonr(*centred)[0])
    assert np.isclose(c['Spearman'].item(), stats.pearsonr(*ranks)[0])
    assert np.isclose(c['Kendall'].item(), np.mean(pairs))


def test_many_samples_at_once_are_the_same_one_by_one():
    rng = np.random.default_rng(5)
    # so many pairs that they are counted in parts
    x, y = rng.normal(size=(2, 3000, 40))
    whole = coefficients(x, y)['Kendall']
    assert np.allclose(whole[[0, 1500, 2999]], [stats.kendalltau(x[i], y[i])[0] for i in (0, 1500, 2999)])


def test_constant_values_have_no_agreement():
    found = rank_agreement(dict(pFID=[1.]*6, gFID=list(range(6))), 'pFID', draws=50)
    assert found.value.isna().all() and found.low.isna().all()


def test_leaving_one_out_by_hand():
    rows = paper_rows()
    rows = rows[rows.generator == 'LlamaGen-B']
    r = rank_agreement(rows, 'pFID', draws=50).set_index('coefficient').loc['Kendall']
    w = unit_values(rows, ['pFID', 'gFID']).value
    alone = {t: stats.kendalltau(w.pFID.drop(t), w.gFID.drop(t))[0] for t in w.index}
    assert np.isclose(r.least, min(alone.values())) and np.isclose(r.most, max(alone.values()))
    assert np.isclose(abs(alone[r.without]-r.value), max(abs(v-r.value) for v in alone.values()))


def test_intervals_cover():
    rng = np.random.default_rng(6)
    truth = .7
    cover = 0
    for i in range(60):
        x = rng.normal(size=25)
        y = truth*x+(1-truth**2)**.5*rng.normal(size=25)
        r = rank_agreement(dict(pFID=x, gFID=y), 'pFID', draws=300, seed=i).iloc[0]
        cover += r.low <= truth <= r.high
    # 57 of 60 promised; a percentile bootstrap of 25 points gives a little less
    assert cover >= 50, cover


def test_errors_widen_and_repetitions_average():
    x = np.arange(10.)
    tidy = pd.DataFrame([dict(tokenizer=i, metric=m, seed=s, value=v+.1*s, se=e) for i, v in enumerate(x)
                         for s in range(3) for m, e in (('pFID', 2.), ('gFID', .1))])
    sure = tidy.assign(se=0.)
    wide, narrow = (rank_agreement(t, 'pFID').set_index('coefficient').loc['Spearman'] for t in (tidy, sure))
    assert wide.value == narrow.value == 1 and wide.low < narrow.low
    assert pool(tidy, ['tokenizer', 'metric']).repeats.eq(3).all()
    assert rank_agreement(tidy, 'pFID').equals(rank_agreement(tidy, 'pFID'))     # the same seed, to the bit


def test_better_only_with_an_interval():
    rng = np.random.default_rng(7)
    wrong = 0
    for i in range(40):
        g = rng.normal(size=16)
        a, b = g+rng.normal(size=(2, 16))
        found = compare_agreement(dict(pFID=a, rFID=b, gFID=g), draws=300,
                                  seed=i).set_index('coefficient').loc['Spearman']
        assert (found.better != '') == (found.low > 0 or found.high < 0)
        wrong += found.better != ''
    # equally good predictors: two in forty expected
    assert wrong <= 6, wrong
    assert set(compare_agreement(dict(pFID=g, rFID=-g, gFID=g)).better) == {'pFID'}
    assert set(compare_agreement(dict(pFID=-g, rFID=g, gFID=g)).better) == {'rFID'}


@pytest.mark.parametrize('table, why', [
    (dict(pFID=[1, 2, 3], gFID=[1, 2, 3]), 'needs at least 4 of tokenizer with all metrics, got 3'),
    (dict(pFID=[1, 2, 3, np.nan], gFID=[1, 2, 3, 4]), 'got 3'),
    (dict(pFID=[1, 2, 3, np.inf], gFID=[1, 2, 3, 4]), 'infinite pFID'),
    (dict(gFID=[1, 2, 3, 4]), "no values of 'pFID'"),
    (dict(pFID=[1, 2, 3, 4], gFID=[1, 2, 3, 4], K=[1, 2, 3, 4]), 'no two of tokenizer share a K'),
    (7, 'expected a table'),
])
def test_bad_tables(table, why):
    with pytest.raises(ValueError, match=why) as e:
        rank_agreement(table, 'pFID', group='K' if isinstance(table, dict) and 'K' in table else None)
    assert '\n' not in str(e.value)


def test_settings_are_not_averaged():
    rows = paper_rows()
    with pytest.raises(ValueError, match='rows with different generator would be averaged'):
        rank_agreement(rows, 'pFID')
    moving = rows[rows.generator == 'LlamaGen-B'].copy()
    moving.loc[moving.index[moving.metric == 'pFID'][:1], 'K'] = 1
    with pytest.raises(ValueError, match='one tokenizer has several values of K'):
        rank_agreement(moving, 'pFID', group='K')
    again = pd.DataFrame([dict(tokenizer=t, metric='rFID', value=v, seed=0, tokenizer_seed=s) for s in (0, 1)
                          for t, v in zip('abcd', range(4))])
    with pytest.raises(ValueError, match='rows with different tokenizer_seed would be averaged'):
        pool(again, ['tokenizer', 'metric'])
    assert pool(again, ['tokenizer', 'tokenizer_seed', 'metric']).repeats.eq(1).all()
    assert COEFFICIENTS == ('Pearson', 'Spearman', 'Kendall')


EXPERIMENT = Path(__file__).resolve().parent.parent/'nbs'/'experiments'/'e03_which_metric_predicts_gfid.ipynb'

def test_the_study_is_wide_enough():
    spec = yaml.safe_load(EXPERIMENT.with_suffix('.yaml').read_text())
    points = grid_points(spec['grid'])
    names = {p['tokenizer'] for p in points}
    assert len(names) >= 24 and len(points) == len({tuple(sorted(p.items())) for p in points})
    # quantizer, K, words
    for what in (lambda n: n.split('-')[0], lambda n: n.split('-')[1], lambda n: n.split('-')[2:]):
        assert len({str(what(n)) for n in names}) >= 3
    for name in names:
        mine = {(p['epochs'], p['seed']) for p in points if p['tokenizer'] == name}
        assert mine == {(epochs, seed) for epochs in (1., 8.) for seed in (0, 1, 2)}


@pytest.mark.slow
def test_the_study_runs(tmp_path):
    "Two seeds of a generator share their tokenizer, and every number that the result page reads is a row"
    command = [Path(sys.executable).parent/'tokkit', 'sweep', EXPERIMENT, '-g', 'seed=0,1', '-p', 'preset',
               'smoke', '-p', 'tokenizer', 'lfq-512-perturbed', '--workers', '1', '--threads', '1']
    env = dict(os.environ, TOKKIT_RUNS=str(tmp_path/'runs'), TOKKIT_DEVICE='cpu')
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    table = collect(tmp_path/'runs')
    assert ({'metric', 'value', 'se', 'n', 'extractor', 'seed', 'run_id', 'tokenizer', 'quantizer', 'K',
             'perturbation', 'loss', 'generator', 'guidance'} <= set(table))
    assert ({'rFID', 'pFID', 'iFID', 'FDr3', 'calibrated pFID', 'gFID', 'calibrated alpha',
             'pFID cell'} <= set(table.metric))
    values = table.pivot_table(index=['metric', 'guidance'], columns='seed', values='value')
    # measured once
    for m in ('rFID', 'pFID', 'iFID', 'FDr3'): assert values.loc[m][0].item() == values.loc[m][1].item()
    # another generator
    assert (values.loc['gFID'][0] != values.loc['gFID'][1]).all()
    assert (len([p for p in (tmp_path/'runs'/'tokenizer').glob('*perturbed*')
                 if not p.name.startswith('.')]) == 1)
