"""The autoregressive generator: one sample a seed, whatever the batch;
frequencies; several codes a token; what it refuses"""
from dataclasses import replace

import pytest, torch
from scipy.stats import chisquare

from tokkit.generators import ARCfg, ARGenerator, ARSampler, delay, draw_orders, released_decay, undelay
from tokkit.core import load_model, make_rng, save_model
from tokkit.generators import Guidance, sample_categorical, guide, row_noise, row_seeds, sample_batches

RAR = dict(order='random', modulated=True, qk_norm=True, target_aware=True)
KINDS = {'plain': {}, 'modulated': dict(modulated=True), 'aware': dict(target_aware=True), 'rar': RAR,
         'plain 2 levels': dict(levels=2), 'rar 3 levels': dict(levels=3, **RAR)}


def build(seed=0, n=12, **switches) -> ARGenerator:
    "A model with no weight at zero"
    gen = ARGenerator(ARCfg(n=n, codebook_size=24, classes=3, width=32, depth=2, heads=2, **switches)).eval()
    rng = make_rng(seed, 'weights')
    with torch.no_grad():
        for name, p in gen.named_parameters():
            p.copy_(torch.randn(p.shape, generator=rng)*.3+('norm' in name and 'weight' in name))
    return gen


@pytest.fixture(scope='module', params=KINDS)
def gen(request): return build(**KINDS[request.param])


@torch.no_grad()
def uncached(gen, labels, seeds, guidance=Guidance(1.), temperature=1., keep=None):
    "The whole model again for every step, twice when guided"
    b = len(labels)
    c = gen.cfg
    u = delay(row_noise(seeds, gen.shape, 'draw').view(b, c.n, -1))
    scales = guidance.scales(gen.steps)
    if keep is not None:
        mask = delay(row_noise(seeds, gen.shape, 'keep').view(b, c.n, -1)) < keep[1]
        real = delay(keep[0].view(b, c.n, -1))
    there = delay(torch.ones(1, c.n, c.levels, dtype=torch.bool))[0]
    ids = torch.zeros_like(u, dtype=torch.long)
    frames = torch.zeros(b, 0, c.levels, dtype=torch.long)
    for s in range(gen.steps):
        cond, free = (gen.scores(frames, l)[:, -1] for l in (labels, torch.full_like(labels, c.classes)))
        ids[:, s] = sample_categorical(guide(cond, free, scales[s]), u[:, s], temperature)
        if keep is not None: ids[:, s] = torch.where(mask[:, s], real[:, s], ids[:, s])
        row = torch.where(there[s], ids[:, s]+torch.arange(c.levels)*c.codebook_size, gen.blank)
        frames = torch.cat([frames, row[:, None]], 1)
    return undelay(ids).reshape(b, *gen.shape)


def labels_and_seeds(b, seed=3): return torch.arange(b) % 3, row_seeds(make_rng(seed), b)


GUIDANCE = Guidance(1.), Guidance(0.), Guidance(3.), Guidance(4., 1.5), Guidance(3., interval=(.2, .6))


@pytest.mark.parametrize('guidance', GUIDANCE, ids=str)
def test_cached_as_uncached(gen, guidance):
    y, seeds = labels_and_seeds(7)
    real = torch.randint(24, (7, *gen.shape), generator=make_rng(5))
    assert torch.equal(gen.sample(y, guidance, rng=seeds), uncached(gen, y, seeds, guidance))
    got = gen.sample(y, guidance, temperature=.7, keep=(real, .4), rng=seeds)
    assert torch.equal(got, uncached(gen, y, seeds, guidance, .7, (real, .4)))


def test_any_batch(gen):
    "Sample i is the same one alone, among 7 and among 64"
    labels = torch.arange(64) % 3
    got = {b: sample_batches(gen, labels[:n], 3., batch=b, seed=1)[0] for b,
           n in ((1, 12), (7, 64), (64, 64))}
    assert torch.equal(got[1], got[64][:12]) and torch.equal(got[7], got[64])
    assert len(got[64].flatten(1).unique(dim=0)) > 32
    assert not torch.equal(sample_batches(gen, labels, 3., batch=64, seed=2)[0], got[64])


def test_keep(gen):
    y, seeds = labels_and_seeds(6)
    real = torch.randint(24, (6, *gen.shape), generator=make_rng(5))
    free = gen.sample(y, 2., rng=seeds)
    assert torch.equal(gen.sample(y, 2., keep=(real, 1.), rng=seeds), real)
    assert torch.equal(gen.sample(y, 2., keep=(real, 0.), rng=seeds), free)
    kept = row_noise(seeds, gen.shape, 'keep') < .5
    half = gen.sample(y, 2., keep=(real, .5), rng=seeds)
    assert torch.equal(half[kept], real[kept]) and not torch.equal(half[~kept], free[~kept])


def test_known_frequencies():
    "A model that knows only the code before: pairs of codes come as often as its table says"
    gen = ARGenerator(ARCfg(n=2, codebook_size=4, classes=2, width=16, depth=1, heads=1)).eval()
    # scores after a label, and after a code
    table = torch.randn(2+4, 4, generator=make_rng(0))
    with torch.no_grad():
        for p in gen.parameters(): p.zero_()
        gen.norm.weight.fill_(1.)
        for row, i in enumerate([5, 6, 0, 1, 2, 3]): gen.embeddings.weight[i, row] = 1.
        x = gen.norm(gen.embeddings.weight[[5, 6, 0, 1, 2, 3]])           # (6 d), independent rows
        gen.lm_head.weight.copy_((torch.linalg.pinv(x) @ table).T)
    b = 6000
    y = torch.arange(b) % 2
    for temperature in (1., .6):
        ids = gen.sample(y, temperature=temperature, rng=make_rng(1))
        for label in range(2):
            p = (table/temperature).softmax(-1)
            want = (p[label][:, None]*p[2:]).flatten()
            seen = torch.bincount(ids[y == label] @ torch.tensor([4, 1]), minlength=16)
            assert (chisquare(seen.numpy(), (want/want.sum()*seen.sum()).numpy(),
                              sum_check=False).pvalue > .001)
            wrong = torch.full((16,), seen.sum()/16.)
            assert chisquare(seen.numpy(), wrong.numpy(), sum_check=False).pvalue < 1e-6


def test_levels_know_the_coarser_code():
    "A level sees the level before it of the same token, and not the other way round"
    gen = build(levels=2)
    ids = torch.randint(24, (1, 12, 2), generator=make_rng(1))
    y = torch.tensor([0])
    with torch.no_grad():
        base, coarse, fine = (gen.logits(v, y)[0] for v in (ids, changed(ids, 4, 0), changed(ids, 4, 1)))
    # level 0 of token 4 is set in step 4, level 1 in step 5
    assert torch.equal(base[:5], coarse[:5]) and torch.equal(base[:6], fine[:6])
    assert not torch.allclose(base[5, 1], coarse[5, 1]) and not torch.allclose(base[6, 0], fine[6, 0])


def changed(ids, i, level):
    ids = ids.clone()
    ids[:, i, level] = (ids[:, i, level]+1) % 24
    return ids


@pytest.mark.parametrize('switches', KINDS.values(), ids=KINDS)
def test_loss_is_that_of_the_probabilities(switches):
    "By hand: the mean of minus log p of every code, in the order that was drawn"
    gen = build(**switches, label_dropout=0.)
    y = torch.arange(4) % 3
    ids = torch.randint(24, (4, *gen.shape), generator=make_rng(2))
    for done in (0., 1.):
        with torch.no_grad(): out = gen.losses(ids, y, make_rng(4), done)
        rng = make_rng(4)
        torch.rand(4, generator=rng)
        orders = (draw_orders(4, 12, 1., rng) if gen.cfg.order == 'random' and not done
                  else torch.arange(12).expand(4, -1))
        sorted_ = torch.stack([ids[i, o] for i, o in enumerate(orders)])
        with torch.no_grad():
            p = gen.logits(sorted_, y, orders).log_softmax(-1).view(4, -1, gen.cfg.levels, 24)
        image = torch.arange(4)[:, None]
        codes = sorted_.view(4, 12, -1)
        logp = torch.stack([p[image, torch.arange(12)+j, j, codes[:, :, j]] for j in range(gen.cfg.levels)])
        assert out['loss'].item() == pytest.approx(-logp.mean().item(), rel=1e-5)
        assert 0 <= out['accuracy'] <= 1


def test_learns():
    "A small model of each kind learns sequences that depend on the label; sampling gives them back"
    for switches in ({}, RAR, dict(levels=2)):
        torch.manual_seed(0)
        gen = ARGenerator(ARCfg(n=6, codebook_size=8, classes=2, width=48, depth=2, heads=2, label_dropout=.1,
                                **switches))
        gen.train()
        rng = make_rng(0)
        y = torch.arange(32) % 2
        real = torch.randint(8, (2, *gen.shape), generator=make_rng(1))[y]
        optimizer = torch.optim.AdamW(released_decay(gen), lr=4e-3)
        for i in range(100):
            out = gen.losses(real, y, rng, i/100)
            optimizer.zero_grad()
            out['loss'].backward()
            optimizer.step()
        gen.eval()
        assert (gen.sample(y, guidance=1.5, rng=make_rng(2)) == real).float().mean() > .95, switches


def test_masked_step_is_the_step(gen, monkeypatch):
    "Places that never change shape: the whole buffer under a mask gives the same scores"
    y, seeds = labels_and_seeds(4)

    class Whole(ARSampler):
        def __call__(self, s, frame):
            if s == 0: return self.start()
            at = self.at[self.g.prefix+s-1:self.g.prefix+s]
            for c in self.caches: c.k[:, :, at+1:], c.v[:, :, at+1:] = 1e3, 1e3
            mask = torch.where(self.at > at, -torch.inf, 0.)
            return self.step(frame, self.places[s], self.modulations(s, 1 if s % 2 else 2**25), at,
                             self.length, mask)
    want = gen.sample(y, 2., rng=seeds)
    monkeypatch.setattr(gen, 'sampler', lambda labels, guided: Whole(gen, labels, guided), raising=False)
    assert torch.equal(gen.sample(y, 2., rng=seeds), want)


def test_other_labels(gen):
    "A sampler begun again with other labels is a new one, in the old tensors"
    y = torch.tensor([0, 1, 2, 0])
    other = torch.tensor([2, 2, 2, 2])
    old = ARSampler(gen, y, True)
    new = ARSampler(gen, other, True)
    rows = old.rows.data_ptr()
    frame = torch.zeros(4, gen.cfg.levels, dtype=torch.long)
    with torch.no_grad():
        for s in range(4): old(s, frame)
        old.relabel(other)
        for s in range(4): assert torch.equal(old(s, frame), new(s, frame))
    assert old.rows.data_ptr() == rows


def test_memory(gen):
    "The caches are as large as computed, and a sample needs a little more"
    s = ARSampler(gen, torch.zeros(5, dtype=torch.long), guided=True)
    assert sum(c.bytes for c in s.caches) == gen.cache_bytes(10) < 5*gen.sample_bytes
    assert len(s.kinds) == 2
    if gen.cfg.modulated: assert [tuple(m.shape[:2]) for m in s.modulations(1)] == [(2, 6)]*2+[(2, 2)]


def test_callback(gen):
    y, seeds = labels_and_seeds(3)
    seen = []
    ids = gen.sample(y, 2., rng=seeds, callback=seen.append)
    assert [s['i'] for s in seen] == list(range(gen.steps)) and all(s['steps'] == gen.steps for s in seen)
    for before, s in zip([None, *seen], seen):
        assert (torch.equal(s['latents'][s['known']], ids[s['known']])
                and (s['latents'][~s['known']] == 0).all())
        new = s['known'] if before is None else s['known'] & ~before['known']
        for p in ([s['position']] if gen.cfg.levels == 1 else s['position']): assert new[0][p]
        assert (s['logits'].shape[-1] == 24
                and new[0].sum() == (1 if gen.cfg.levels == 1 else len(s['position'])))
    assert seen[-1]['known'].all()


def test_save_and_load(gen, tmp_path):
    save_model(gen, tmp_path)
    again = load_model(tmp_path, 'ARGenerator', lambda c: ARGenerator(ARCfg(**c['cfg'])))
    y, seeds = labels_and_seeds(2)
    assert again.cfg == gen.cfg and torch.equal(again.sample(y, rng=seeds), gen.sample(y, rng=seeds))


def test_empty_batch(gen):
    assert gen.sample(torch.zeros(0, dtype=torch.long), 2.).shape == (0, *gen.shape)


BAD = [(dict(labels=torch.tensor([3])), 'labels must be in 0..2, got 3..3'),
       (dict(labels=torch.tensor([.5])), 'whole numbers'),
       (dict(temperature=0.), 'temperature must be > 0'), (dict(top_p=0.), 'top_p must be in (0, 1]'),
       (dict(top_k=0), 'top_k must be a whole number at least 1'),
       (dict(keep=(torch.zeros(1, 5).long(), .5)), 'keep must be ids (whole numbers) of shape (1, 12)'),
       (dict(keep=(torch.zeros(1, 12).long(), -.1)), 'sigma must be in [0, 1]'),
       (dict(keep=(torch.full((1, 12), 24), .5)), 'of another tokenizer'),
       (dict(guidance=-1.), 'guidance must be in [0, 1e+06]'), (dict(rng=torch.arange(3)), 'one seed a row')]


@pytest.mark.parametrize('how,line', BAD, ids=[l for _, l in BAD])
def test_bad_input(how, line):
    with pytest.raises(ValueError) as e: build().sample(**dict(labels=torch.tensor([0])) | how)
    assert line in str(e.value) and '\n' not in str(e.value)


def test_guidance_without_label_dropout_warns():
    gen = build(label_dropout=0.)
    with pytest.warns(UserWarning, match='label_dropout 0'): gen.sample(torch.tensor([0]), 2.)


def test_damaged_weights_name_the_step(gen):
    import copy
    broken = copy.deepcopy(gen)
    # enters with the token of step 3
    with torch.no_grad(): broken.pos_embed[0, gen.prefix+3] = torch.nan
    with pytest.raises(FloatingPointError, match=f'not finite at step 4 of {gen.steps}'):
        broken.sample(torch.tensor([0]))


BAD_SETTINGS = [(dict(heads=5), 'heads must divide'), (dict(order='random'), 'needs target_aware'),
                (dict(levels=0), 'levels must be'),
                (dict(order='x'), 'one of raster, random'),
                (dict(label_dropout=2.), 'label_dropout must be in')]


@pytest.mark.parametrize('switches,line', BAD_SETTINGS, ids=[line for _, line in BAD_SETTINGS])
def test_bad_settings(switches, line):
    with pytest.raises(ValueError, match=line): ARGenerator(replace(ARCfg(width=32), **switches))
