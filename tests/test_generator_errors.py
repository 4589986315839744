"""How far generated latents are from real ones: teacher forcing against one pass,
brute-force histograms, floors, bad input"""
import numpy as np
import pytest
import torch

from away import Away
from tokkit.generators import ARCfg, ARGenerator
from tokkit.core import make_rng
from tokkit.data import ImageSet
from tokkit.data import TokenCache
from tokkit.features import FeatureExtractor
from tokkit.generators import FlowCfg, FlowGenerator
from tokkit.metrics import mmd2
from tokkit.generators import MaskedCfg, MaskedGenerator
from tokkit.perturbation import perturb_codes
from tokkit.quantizers import MultiScaleResidualQuantizer, ProductQuantizer
from tokkit.analysis import decoded_shift, error_profile, token_use, use_by, use_histogram
from tokkit.tokenizers import fit_spec, make_tokenizer

LABELS = torch.arange(60) % 10


@pytest.fixture(scope='module')
def some():
    "Ids with structure (60 16) of 32 codes, and the codes"
    book = torch.randn(32, 4, generator=make_rng(0))
    return torch.randint(32, (60, 16), generator=make_rng(1)).sort(1).values, book


def ar(**more):
    torch.manual_seed(0)
    gen = ARGenerator(ARCfg(**dict(n=16, codebook_size=32, width=16, depth=1, heads=2) | more)).eval()
    torch.nn.init.normal_(gen.lm_head.weight, std=.3)
    return gen


@pytest.mark.parametrize('guidance, temperature', [(1., 1.), (2., .7)])
def test_teacher_forcing_is_one_pass(some, guidance, temperature):
    ids, book = some
    gen = ar()
    prof = error_profile(gen, book, (ids, LABELS), guidance=guidance, temperature=temperature)
    with torch.no_grad():
        cond, free = (gen.logits(ids[:, :-1], y) for y in (LABELS, torch.full_like(LABELS, 10)))
    if guidance == 1:
        logits = cond
        want = (logits/temperature).softmax(-1).gather(2, ids[..., None])[..., 0]
        assert np.allclose(prof.values['p'], want, atol=1e-5)
    else:
        assert (not np.allclose(prof.values['p'],
                                (cond/temperature).softmax(-1).gather(2, ids[..., None])[..., 0], atol=1e-3)
                and not torch.equal(cond, free))
    assert np.array_equal(prof.depth, np.broadcast_to(np.arange(16), (60, 16)))
    wrong = prof.values['wrong'] == 1
    assert (np.isfinite(prof.values['distance'][wrong]).all()
            and np.isnan(prof.values['distance'][~wrong]).all())
    assert (prof.values['neighbour'][wrong] >= 2).all() and (prof.values['neighbour'][wrong] <= 32).all()


def test_a_sure_generator_errs_nowhere(some):
    """One that always says code 3, shown images of code 3;
    and its wrong token has the right number and distance"""
    ids = torch.full((10, 16), 3)
    book = some[1]
    gen = ar()
    torch.nn.init.zeros_(gen.lm_head.weight)
    with torch.no_grad(): gen.lm_head.bias[3] = 50
    prof = error_profile(gen, book, (ids, LABELS[:10]))
    assert prof.mean('p')[0] == pytest.approx(1) and prof.mean('wrong')[0] == 0 and prof.mean('rank')[0] == 0
    other = error_profile(gen, book, (ids*0+5, LABELS[:10]))
    far = torch.cdist(book[5:6], book)[0]
    assert other.mean('neighbour')[0] == int((far <= far[3]).sum())
    assert other.mean('distance')[0] == pytest.approx(float(far[3]/torch.pdist(book).mean()), rel=1e-5)


def test_free_running_keeps_a_fraction(some):
    ids, book = some
    for gen in (ar(), MaskedGenerator(MaskedCfg(n=16, codebook_size=32, width=16, depth=1, heads=2)).eval()):
        masked = isinstance(gen, MaskedGenerator)
        free = error_profile(gen, book, (ids, LABELS), 'free', .25)
        asked = np.isfinite(free.values['p']).mean()
        assert asked == pytest.approx(.75, abs=.06) if masked else asked == 1
    seen = error_profile(gen, book, (ids, LABELS), sigma=.25)
    assert np.isfinite(seen.values['p']).mean() == pytest.approx(.75, abs=.06)
    assert np.isfinite(seen.values['p']).sum(1)+seen.depth.max(1) == pytest.approx(16)


def test_codes_may_lie_on_another_device(some):
    ids = some[0]
    q = Away(32, 4, l2_norm=False)
    with torch.no_grad(): q.embedding.weight.copy_(some[1])
    q.here = False
    here, away = (error_profile(ar(), codes, (ids, LABELS)) for codes in (some[1], q))
    assert np.array_equal(here.values['distance'], away.values['distance'], equal_nan=True)
    pair = ids[:30], ids[30:]
    assert token_use(*pair, q, bootstrap=2).equals(token_use(*pair, some[1], bootstrap=2))
    assert (len(use_by(*pair, q, 'region', bootstrap=2)) == 18 and use_histogram(ids, q).shape == (1, 32)
            and not q.here)


def test_a_few_images_are_drawn_not_the_first(some):
    "n of a tensor, whose images may lie class by class, are those that n of a set would be"
    ids, book = some
    prof = error_profile(ar(), book, (ids, LABELS.sort().values), n=20)
    assert len(set(prof.labels)) > 5 and len(prof.labels) == 20


def test_drift_is_no_error():
    """A generator that knows both images of its world is sure of the next token;
    on its own it draws either, and neither is wrong"""
    torch.manual_seed(0)
    two = torch.arange(2)[:, None].expand(2, 16).repeat(32, 1)
    gen = ARGenerator(ARCfg(n=16, codebook_size=2, width=16, depth=1, heads=2, classes=1))
    opt = torch.optim.AdamW(gen.parameters(), lr=1e-2)
    for _ in range(150):
        loss = gen.loss(two, torch.zeros(64).long(), make_rng(0))
        opt.zero_grad()
        loss.backward()
        opt.step()
    asked = dict(tok=torch.eye(2), images=(two, torch.zeros(64).long()))
    teacher = error_profile(gen.eval(), **asked)
    free = error_profile(gen, **asked, mode='free', sigma=0.)
    assert teacher.mean('p')[0] > .93 and free.mean('p')[0] < .7


@pytest.mark.parametrize('how', [dict(top_k=3), dict(top_p=.4), dict(top_k=20, top_p=.7, temperature=1.5)])
def test_p_is_how_often_the_real_token_is_drawn(some, how):
    ids = some[0][:1].expand(3000, -1)
    book = some[1]
    gen = ar()
    prof = error_profile(gen, book, (ids, torch.zeros(3000).long()), n=None, **how)
    p = prof.values['p'][0]
    drawn = 1-prof.values['wrong'].mean(0)
    assert np.allclose(prof.values['p'], p, atol=1e-5) and (p == 0).any()
    assert (abs(drawn-p) <= 5*(p*(1-p)/3000)**.5+1e-6).all(), (p, drawn)


def test_several_levels(some):
    ids = torch.randint(32, (20, 9, 2), generator=make_rng(2))
    pq = ProductQuantizer(32, 8, 2)
    gen = ar(n=9, levels=2)
    prof = error_profile(gen, pq, (ids, LABELS[:20]))
    assert np.isfinite(prof.values['p']).all() and len(prof.frame()) == 9
    # (b s l k), level l one step late
    with torch.no_grad(): want = gen.logits(ids, LABELS[:20]).softmax(-1)
    p = prof.values['p'].reshape(20, 9, 2)
    for l in range(2):
        assert np.allclose(p[..., l], want[:, l:l+9, l].gather(2, ids[..., l, None])[..., 0], atol=1e-5)


def test_flow_errs_less_near_the_end():
    z = torch.randn(40, 16, 4, generator=make_rng(3))
    gen = FlowGenerator(FlowCfg(n=16, dim=4, width=16, depth=1, heads=2)).eval()
    values = [error_profile(gen, None, (z, LABELS[:40]), sigma=s).mean('distance')[0] for s in (.1, .5, .9)]
    assert values == sorted(values, reverse=True)
    free = error_profile(gen, None, (z, LABELS[:40]), 'free', .5, steps=4)
    assert np.isfinite(free.values['distance']).all() and 'distance' in repr(free)
    with pytest.raises(ValueError, match="this profile has distance, not 'p'"): free.mean('p')


def test_images_tokens_and_sets_are_one(tmp_path):
    tok = make_tokenizer('tiny', size=16).eval()
    x = torch.rand(20, 1, 16, 16, generator=make_rng(4))*2-1
    ds = ImageSet(((x+1)*127).to(torch.uint8), LABELS[:20], name='noise')
    fit_spec(tok, ds[:][0])
    gen = ar(codebook_size=tok.spec.codebook_size)
    with torch.no_grad(): ids = tok.tokenize(ds[:][0])
    cache = TokenCache.build(tmp_path/'c', ds, tok.tokenize, codebook_size=tok.spec.codebook_size)
    profiles = [error_profile(gen, tok, given, n=20)
                for given in (ds, cache, (ids, LABELS[:20]), (ds[:][0], LABELS[:20]))]
    for p in profiles[1:]: assert np.allclose(p.values['p'], profiles[0].values['p'], atol=1e-6)
    by = {b: profiles[0].frame(b) for b in ('position', 'depth', 'class', 'region')}
    assert (len(by['position']), len(by['class'])) == (16, 10)
    assert by['position'].p.mean() == pytest.approx(profiles[0].mean('p')[0], rel=1e-5)
    with pytest.raises(ValueError, match="by must be 'position'"): profiles[0].frame('pixel')


def test_use_by_brute_force(some):
    a = some[0][:30]
    b = some[0][30:]
    book = some[1]
    use = token_use(a, b, book, bootstrap=5).set_index(['of', 'metric'])
    def tv(p, q):
        p = p/p.sum()
        q = q/q.sum()
        return abs(p-q).sum()/2
    def pairs(t, axis):
        t = t.view(-1, 4, 4)
        s, e = (t[:, :, :-1], t[:, :, 1:]) if axis == 2 else (t[:, :-1], t[:, 1:])
        return np.bincount((s*32+e).flatten().numpy(), minlength=1024)
    assert use.value['horizontal', 'TV'] == pytest.approx(tv(pairs(a, 2), pairs(b, 2)), rel=1e-5)
    assert use.value['vertical', 'TV'] == pytest.approx(tv(pairs(a, 1), pairs(b, 1)), rel=1e-5)
    p, q = (np.bincount(t.flatten().numpy(), minlength=32) for t in (b, a))
    on = p+q > 0
    p, q = ((t[on]+.5)/(t[on]+.5).sum() for t in (p, q))
    assert use.value['codes', 'KL'] == pytest.approx((p*np.log(p/q)).sum(), rel=1e-4)
    assert np.allclose(use_histogram(a, book)[0], np.bincount(a.flatten().numpy(), minlength=32)/a.numel())


def test_floor_is_what_no_difference_gives():
    """Over many deals the distance of two sets of one kind lies about its floor;
    a small change of use rises above it"""
    excess = []
    for i in range(12):
        ids = torch.randint(16, (200, 16), generator=make_rng(i)).sort(1).values
        excess.append(token_use(ids[:100], ids[100:], torch.randn(16, 2), bootstrap=10,
                                seed=i).eval('(value-floor)/floor_sd').iloc[0])
    assert abs(np.mean(excess)) < 1
    moved = perturb_codes(ids[:100], torch.arange(16.)[:, None], .5, 3, rng=make_rng(0))
    use = token_use(moved, ids[100:], torch.randn(16, 2), bootstrap=10).set_index(['of', 'metric'])
    assert use.value['horizontal', 'TV'] > use.floor['horizontal', 'TV']+4*use.floor_sd['horizontal', 'TV']


def test_pairs_stay_within_a_scale():
    q = MultiScaleResidualQuantizer(16, 4, scales=(1, 2, 4))
    ids = torch.randint(16, (20, 21), generator=make_rng(5))
    assert set(token_use(ids[:10], ids[10:], q, bootstrap=2).of) == {'codes', 'horizontal', 'vertical'}
    with pytest.raises(ValueError, match='several scales have no regions'):
        use_by(ids[:10], ids[10:], q, 'region')


def test_a_change_is_found_where_it_is(some):
    ids, book = some
    made = ids.clone()
    made[LABELS == 4] = made[LABELS == 4].flip(1)
    classes = use_by(ids, made.roll(1, 1), book, 'class', (LABELS, LABELS), bootstrap=4)
    assert set(classes['class']) == set(map(str, range(10)))
    made = ids.clone()
    made[:, :2] = (made[:, :2]+7) % 32
    regions = use_by(made, ids, book, 'region', parts=2, bootstrap=4)
    assert regions[regions.metric == 'TV'].set_index('region').value.idxmax() == '0,0'
    assert (regions[(regions.metric == 'TV') & (regions.region != '0,0')].value < 1e-6).all()


def test_after_decoding():
    tok = make_tokenizer('tiny', size=16).eval()
    means = FeatureExtractor('patch means',
                             torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()), mean=(.5,
                             ), std=(.5,))
    ids = torch.randint(512, (60, *tok.quantizer.ids_shape(16)), generator=make_rng(6))
    whole = decoded_shift(tok, ids[:30], ids[30:], extractor=means, kernel='linear', bootstrap=5)
    with torch.no_grad(): g, r = (means(tok.detokenize(t).clamp(-1, 1)) for t in (ids[:30], ids[30:]))
    assert (whole.value[0] == pytest.approx(mmd2(g, r, 'linear').value, rel=1e-4)
            and list(whole.metric) == ['MMD²', 'FD'])
    assert whole.floor[0] == 0 and whole.floor[1] > 0
    assert abs(whole.value[1]-whole.floor[1]) < 5*whole.floor_sd[1], 'two sets of one kind lie at the floor'
    by = decoded_shift(tok, ids[:30], ids[30:], 'class', (LABELS[:30], LABELS[30:]), extractor=means,
                       bootstrap=0)
    assert list(by.metric.unique()) == ['MMD²'], 'three images of four features have no Fréchet distance'
    assert (len(decoded_shift(tok, ids[:30], ids[30:], 'region', extractor=means,
                              bootstrap=0).region.unique()) == 4)


def test_bad_input(some):
    ids, book = some
    gen = ar()
    for args, says in (((gen, book, (ids, LABELS), 'forced'), "mode must be 'teacher' or 'free'"),
                       ((gen, book, ids), 'a tensor has no labels'),
                       ((gen, book, (ids, LABELS), 'teacher', .5), 'sigma is 1'),
                       ((gen, book, (ids, LABELS), 'free', 1.5), 'sigma must be in'),
                       ((gen, book, (ids[:, :9], LABELS)), 'must be ids')):
        with pytest.raises(ValueError, match=says): error_profile(*args)
    with pytest.raises(ValueError, match='take one tokenizer for both'): token_use(ids, ids[:, :4], book)
    with pytest.raises(ValueError, match='at least 2 images'): token_use(ids, ids[:0], book)
    with pytest.raises(ValueError, match='smoothing must be > 0'): token_use(ids, ids, book, smoothing=0.)
    with pytest.raises(ValueError, match='needs labels'): use_by(ids, ids, book)
    with pytest.raises(ValueError, match="by must be"): use_by(ids, ids, book, 'pixel')
