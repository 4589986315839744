"""The field's protocol: agrees with torch-fidelity's own numbers on the same images, takes ADM's files,
holds features and never all images"""
import subprocess, sys, types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tokkit.cli import main
from tokkit.cli.comparing import read_cards
from tokkit.core import make_rng
from tokkit.data import from_uint8
from tokkit.features import extractors, FeatureStats, inception, INCEPTION_VIEWS
from tokkit.metrics import FeatureBank, load_samples, SampleFile, save_samples, save_stats
from tokkit.protocols import ADM50K, evaluate_protocol, open_reference, PROTOCOLS

BESIDE = Path(sys.prefix)/'torch-fidelity'      # where `./run test` installs it, without what it needs
SIDE = 75       # of what the network looks at here: a look costs a twentieth of one at 299 pixels


def without_torchvision(monkeypatch):
    """torch-fidelity imports torchvision, whose operators are missing beside the CPU torch, and which its
    Inception does not need: here, and only here, an empty module takes its place"""
    names = ['torchvision']
    names += [f'torchvision.{name}' for name in ('transforms', 'transforms.functional', 'datasets')]
    for name in names: monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    outer,transforms,functional,datasets = (sys.modules[name] for name in names)
    outer.transforms = transforms
    transforms.functional = functional
    datasets.CIFAR10 = datasets.STL10 = datasets.CIFAR100 = object


@pytest.fixture(scope='module')
def fidelity():
    "torch-fidelity, imported beside an empty torchvision, and gone again after this module"
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(BESIDE))
        without_torchvision(m)
        found = pytest.importorskip('torch_fidelity', reason='torch-fidelity is not installed: pip install '
                                    f'--no-deps --target {BESIDE} torch-fidelity==0.4.0')
        yield found
        for name in [name for name in sys.modules if name.split('.')[0] == 'torch_fidelity']:
            sys.modules.pop(name)
        extractors._inception_net.cache_clear()


@pytest.fixture(scope='module')
def weights(fidelity, tmp_path_factory) -> Path:
    "A file of random weights, large enough that features differ between images"
    kind = fidelity.FeatureExtractorInceptionV3
    path = tmp_path_factory.mktemp('inception')/'weights.pth'
    with pytest.MonkeyPatch.context() as m:
        module = sys.modules['torch_fidelity.feature_extractor_inceptionv3']
        m.setattr(module, 'load_state_dict_from_url', lambda *args, **kwargs: {})
        m.setattr(kind, 'load_state_dict', lambda self, state: None)
        torch.manual_seed(0)
        net = kind('inception', ['2048'])
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d): torch.nn.init.kaiming_normal_(layer.weight)
    net.fc.weight.mul_(100)         # verdicts that differ
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope='module')
def pictures() -> dict[str, torch.Tensor]:
    "Bytes (n 3 32 32) of two kinds, smooth enough to survive resizing"
    def some(n, seed, spread):
        coarse = torch.rand(n, 3, 4, 4, generator=make_rng(seed, 'pictures'))*spread
        fine = torch.nn.functional.interpolate(coarse, 32, mode='bilinear')
        return (fine*255).to(torch.uint8)
    return dict(real=some(48, 0, 1.), made=some(60, 1, .8))


@pytest.fixture(scope='module')
def ours(weights, pictures, tmp_path_factory) -> dict:
    "Cards of a small ADM protocol in single precision, with samples from a file and from a tensor"
    place = tmp_path_factory.mktemp('ours')
    kind = sys.modules['torch_fidelity'].FeatureExtractorInceptionV3
    save_samples(place/'real.npz', pictures['real'])
    save_samples(place/'made.npz', pictures['made'], torch.arange(60)%10)
    small = replace(ADM50K, name='small', n=60, half=False, part=20)
    bank = FeatureBank()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(kind, 'INPUT_IMAGE_SIZE', SIDE)
        cards = evaluate_protocol(SampleFile(place/'made.npz'), place/'real.npz', small, weights=weights,
                                  device='cpu', bootstrap=2, bank=bank)
    (seen,) = bank._kept.values()
    return dict(cards={c.metric: c for c in cards}, place=place, small=small, real=seen.features)


@pytest.fixture(scope='module')
def theirs(fidelity, weights, pictures) -> dict:
    "torch-fidelity's numbers of the same images, by its own functions from bytes to numbers"
    class Bytes(torch.utils.data.Dataset):
        def __init__(self, x): self.x = x
        def __len__(self): return len(self.x)
        def __getitem__(self, i): return self.x[i]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fidelity.FeatureExtractorInceptionV3, 'INPUT_IMAGE_SIZE', SIDE)
        return fidelity.calculate_metrics(
            input1=Bytes(pictures['made']), input2=Bytes(pictures['real']), cuda=False, isc=True, fid=True,
            prc=True, feature_extractor='inception-v3-compat', feature_extractor_weights_path=str(weights),
            isc_splits=3, samples_shuffle=False, save_cpu_ram=True, cache=False, verbose=False)


@pytest.mark.parametrize('metric, key', [
    ('gFID', 'frechet_inception_distance'), ('IS', 'inception_score_mean'), ('precision', 'precision'),
    ('recall', 'recall')])
def test_agrees_with_torch_fidelity(ours, theirs, metric, key):
    assert ours['cards'][metric].value == pytest.approx(theirs[key], rel=1e-4)


def test_the_comparison_says_something(ours):
    cards = ours['cards']
    assert list(cards) == ['gFID', 'sFID', 'IS', 'precision', 'recall']
    assert cards['IS'].value > 1.05 and 0 < cards['precision'].value < 1 and 0 < cards['recall'].value < 1
    assert all(c.se > 0 for c in cards.values())
    assert cards['gFID'].settings['protocol'] == 'small' and cards['gFID'].settings['labels'] == 'balanced'
    assert cards['gFID'].settings['departures'] == []
    assert [cards[m].extractor for m in ('gFID', 'sFID', 'IS')] == ['inception', 'inception.spatial',
                                                                    'inception.probabilities']


def test_views_are_those_of_the_evaluator(weights, pictures, fidelity):
    "Sizes at 299 pixels, and the layer in the middle, pixel by pixel"
    x = from_uint8(pictures['real'][:2])
    features = inception(weights, tuple(INCEPTION_VIEWS))(x)
    widths = {view: features[:,columns].shape[1] for view,columns in INCEPTION_VIEWS.items()}
    assert widths == dict(pool=2048, probabilities=1008, spatial=7*17*17)
    net = inception(weights).module.net
    maps = []
    hook = net.Mixed_6d.branch1x1.register_forward_hook(lambda *of: maps.append(of[-1]))
    net(pictures['real'][:2])
    hook.remove()
    assert torch.allclose(features[:,3056:].view(2, 17, 17, 7)[1,5,3], maps[0][1,:7,5,3], rtol=1e-4)
    assert inception(weights, ('spatial',)).name == 'inception.spatial'


def test_statistics_of_a_file_count_before_its_images(ours, weights, pictures, fidelity, tmp_path):
    "ADM's reference: statistics of all images, and some of the images"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fidelity.FeatureExtractorInceptionV3, 'INPUT_IMAGE_SIZE', SIDE)
        f = ours['real']
        stats = {view: FeatureStats.from_features(f[:,INCEPTION_VIEWS[view]]) for view in ('pool', 'spatial')}
        arrays = dict(mu=stats['pool'].mean, sigma=stats['pool'].cov, mu_s=stats['spatial'].mean,
                      sigma_s=stats['spatial'].cov)
        few = pictures['real'][:20].permute(0, 2, 3, 1).numpy()
        np.savez(tmp_path/'adm.npz', arr_0=few, **arrays)
        made = load_samples(ours['place']/'made.npz')
        how = dict(weights=weights, device='cpu', bootstrap=0, bank=FeatureBank())
        cards = evaluate_protocol(made, tmp_path/'adm.npz', ours['small'], metrics=('gFID', 'sFID'), **how)
        # a file of ours with who made it
        save_stats(tmp_path/'other.npz', replace(stats['pool'], extractor='inception', fingerprint='xy'))
        with pytest.raises(ValueError, match='with the fingerprint xy, protocol small looks with'):
            evaluate_protocol(made, tmp_path/'other.npz', ours['small'], **how)
    for card in cards:
        assert card.value == pytest.approx(ours['cards'][card.metric].value, rel=1e-5)
        assert card.settings['reference_n'] == 1_281_167 and card.reference == 'adm.npz'
    assert len(open_reference(tmp_path/'adm.npz').images) == 20


def test_weights_are_never_fetched(fidelity, tmp_path, monkeypatch):
    monkeypatch.setenv('TOKKIT_DATA', str(tmp_path))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path/'hub'))
    with pytest.raises(FileNotFoundError, match='expected its weights as .*inception-2015-12-05'):
        inception()
    (tmp_path/'bad.pth').write_bytes(b'no weights')
    with pytest.raises(ValueError, match='cannot be read safely'): inception(tmp_path/'bad.pth')


def test_without_the_extra(monkeypatch, tmp_path):
    "The package is named, and `quick` does without"
    monkeypatch.setitem(sys.modules, 'torch_fidelity', None)
    x = torch.rand(4, 3, 32, 32)*2-1
    with pytest.raises(ImportError, match=r"pip install 'tokkit-lab\[pretrained\]'"):
        evaluate_protocol(x, x, 'adm50k')
    cards = evaluate_protocol(x, x, 'quick', metrics='gFID', device='cpu')
    assert cards[0].settings['departures'] == ['4 samples, where quick asks for 1,000']
    assert 'protocol quick' in str(cards[0]) and 'efficientnet_lite0' in str(cards[0])


def test_the_command(photographs, tmp_path, capsys):
    "A folder of pictures, with fewer than the protocol asks for"
    bytes_ = (torch.rand(30, 3, 20, 20, generator=make_rng(0, 'x'))*255).to(torch.uint8)
    save_samples(tmp_path/'made.npz', bytes_, torch.arange(30)%3)
    words = ['evaluate', str(tmp_path/'made.npz'), '--protocol', 'quick', '--bootstrap', '2', '--reference',
             str(photographs/'train'), '--json', str(tmp_path/'cards.json')]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count('protocol quick') == 3 and '30 samples, where quick asks for 1,000' in said
    cards = read_cards(tmp_path/'cards.json')
    assert [c.metric for c in cards] == ['gFID', 'precision', 'recall']
    assert cards[0].settings['labels'] == 'balanced'
    assert main([*words, '--extractor', 'dinov2']) == 2
    assert '--extractor' in capsys.readouterr().err


PEAK = '''
import re, sys
from pathlib import Path
from tokkit.cli import main
main(['evaluate', sys.argv[1], '--protocol', 'quick', '-n', sys.argv[2], '--reference', sys.argv[3],
      '--metrics', 'gFID', '--bootstrap', '0', '--device', 'cpu'])
print(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])
'''

@pytest.mark.skipif(sys.platform != 'linux', reason='/proc/self/status tells the peak, on Linux')
def test_memory_is_flat_in_the_number_of_samples(tmp_path):
    "88 MB of floats more, of which none may stay"
    file = tmp_path/'made.npz'
    rows = np.random.default_rng(0).integers(0, 256, (640, 1, 1, 3), dtype=np.uint8)
    np.savez(file, arr_0=np.broadcast_to(rows, (640, 128, 128, 3)))
    np.savez(tmp_path/'real.npz', arr_0=np.broadcast_to(rows[:64], (64, 128, 128, 3)))
    def peak(n):
        done = subprocess.run([sys.executable, '-c', PEAK, file, str(n), tmp_path/'real.npz'],
                              capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])/1e3
    few,many = peak(192), peak(640)
    # the peak of one and the same measurement moves by 20 MB
    assert many-few < 40, f'{few:.0f} MB for 192 samples, {many:.0f} MB for 640'


def test_protocols_are_registered():
    assert {'adm50k', 'quick'} <= set(PROTOCOLS) and PROTOCOLS['adm50k'] is ADM50K
